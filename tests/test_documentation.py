"""README and docs say what the tool says: tables follow from the registries, printed output is what is printed."""

import doctest
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from attnlens.models.catalogue import shipped_file

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not shipped_file().is_file(), reason="the tables count the timm version whose catalogue is shipped")
@pytest.mark.parametrize("name", load_script("registry_tables").TABLES)
def test_tables_are_what_the_registries_say(name):
    tables = load_script("registry_tables")
    assert tables.filled(ROOT / name, tables.TABLES[name]) == (ROOT / name).read_text(), "run `make tables`"


def test_every_family_of_a_rule_is_put_into_words():
    from attnlens.layouts.describe import rules_by_class
    from attnlens.layouts.registry import REFUSED
    from attnlens.layouts.timm.families import FAMILIES

    of_rules = {rule.family for rules in rules_by_class().values() for rule in rules}
    assert of_rules | {known.family for known in REFUSED.values()} == set(FAMILIES)


def test_the_table_in_the_readme_is_what_inspect_prints(tmp_path):
    command = [sys.executable, "-c", "from attnlens.cli import main; main()", "inspect", "-o", str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "\n".join(line.rstrip() for line in done.stdout.strip().splitlines()) in README.read_text()


def test_the_python_example_prints_what_the_readme_says():
    failed, tried = doctest.testfile(str(README), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried > 5
    assert failed == 0


def test_every_local_link_leads_somewhere():
    for page in (README, *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_tree_in_the_readme_names_every_room_of_the_package():
    tree = README.read_text().partition("```\nattnlens/")[2].partition("```")[0]
    rooms = {path.name for path in (ROOT / "attnlens").iterdir() if not path.name.startswith("_")} - {"py.typed"}
    assert {name for name in rooms if name not in re.findall(r"[\w.]+", tree)} == set()


def test_the_readme_counts_the_initialisers():
    from attnlens.inits import initialisers

    assert re.findall(r"Of (\d+) initialisers", README.read_text()) == [str(len(initialisers()))]


def test_the_page_of_initialisers_names_each_with_its_options():
    from attnlens.inits import initialisers

    lines = [
        line.split("|")[1:-1] for line in (ROOT / "docs" / "inits.md").read_text().splitlines() if line[:3] == "| `"
    ]
    told = {name: cells[-1] for cells in lines for name in re.findall(r"`([\w-]+)`", cells[0])}
    assert set(initialisers()) <= set(told)
    for name, known in initialisers().items():
        missing = [option for option in known.options if f"`{option}`" not in told[name] and option not in told[name]]
        assert "..." in told[name] or not missing, name
