"""README and docs say what the tool says: tables follow from the registries, printed output is what is printed."""

import doctest
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

from attnlens.cli.app import COMMANDS, load_command
from attnlens.models.catalogue import shipped_file

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
WORDS = {2: "two", 3: "three", 4: "four", 5: "five"}


def flat(page: str) -> str:
    """Return a page with every line break a space."""
    return " ".join((ROOT / page).read_text().split())


def rows(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table behind a heading, without its two first lines."""
    section = (ROOT / page).read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[2:]]


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
    figures = len(list(tmp_path.glob("*.png")))
    assert f"writes {WORDS[figures]} figures" in flat("README.md")
    assert f"`inspect` {WORDS[figures]} figures" in flat("docs/trust-faults.md")


def test_what_the_readme_shows_of_fit_params_and_init_is_what_they_print(tmp_path):
    def printed(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from attnlens.cli import main; main()", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)

    fitted = printed("fit-params", "-o", "params.json").stdout.partition("Pooled requests")[0]
    asked = ("vit_tiny_patch16_224", "--init", "fitted", "--params", "params.json", "-o", "model.safetensors")
    drawn = printed("init", *asked)
    for text in (fitted, drawn.stdout, drawn.stderr):
        shown = "\n".join(line.rstrip() for line in text.strip().splitlines())
        assert shown
        assert shown in README.read_text()


def test_the_python_example_prints_what_the_readme_says():
    failed, tried = doctest.testfile(str(README), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried > 5
    assert failed == 0


def test_every_local_link_leads_somewhere():
    for page in (README, ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_tree_names_every_room_of_the_package():
    tree = (ROOT / "CONTRIBUTING.md").read_text().partition("```\nattnlens/")[2].partition("```")[0]
    rooms = {path.name for path in (ROOT / "attnlens").iterdir() if not path.name.startswith("_")} - {"py.typed"}
    assert {name for name in rooms if name not in re.findall(r"[\w.]+", tree)} == set()


def test_the_readme_counts_the_architectures_as_the_tables_of_the_registry_do():
    counts = re.search(r"has (\d+) architectures .*?: (\d+) are read whole, (\d+) in part", flat("docs/families.md"))
    every, whole, part = map(int, counts.groups())
    assert (
        f"in {whole + part} of the {every} architectures of timm that have attention ({part} of them in part)"
        in flat("README.md")
    )


def test_the_results_count_the_initialisers():
    from attnlens.inits import initialisers

    assert re.findall(r"Of (\d+) initialisers", (ROOT / "docs" / "results.md").read_text()) == [
        str(len(initialisers()))
    ]


def test_the_page_of_initialisers_names_each_with_its_options_and_their_defaults():
    from attnlens.inits import initialisers

    told = {name: cells[-1] for cells in rows("docs/inits.md", "Names") for name in re.findall(r"`([\w-]+)`", cells[0])}
    assert set(told) == set(initialisers())
    numbers = 0
    for name, known in initialisers().items():
        missing = [option for option in known.options if option not in told[name]]
        assert "..." in told[name] or not missing, name
        for option, value in re.findall(r"`(\w+)` (-?\d*\.?\d+)", told[name]):
            assert float(value) == known.options[option], (name, option)
            numbers += 1
    assert numbers > 10


def test_a_default_in_a_synopsis_is_that_of_the_command():
    checked = set()
    for page in (ROOT / "docs").glob("*.md"):
        text = page.read_text()
        for command, synopsis in re.findall(r"^    attnlens ([a-z-]+) (.*(?:\n {12,}\S.*)*)", text, re.MULTILINE):
            defaults = {name: p.default for p in load_command(command).params for name in p.opts}
            for option, value in re.findall(r"\[(--[\w-]+) ([\d.]*\d)\]", synopsis):
                assert defaults[option] == float(value), (page.name, command, option)
                checked.add((command, option))
    assert {("fit-params", "--level"), ("fit-params", "--seed"), ("signal", "--eta"), ("init", "--seed")} <= checked


def pages() -> list[Path]:
    return [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def commands(text: str) -> list[str]:
    """Return the commands of attnlens on a page, in lines of code and in sentences, without their remarks."""
    lines = re.findall(r"^    ((?:torchrun .* -m )?attnlens (?:.*\\\n)*.*)$", text, re.MULTILINE)
    found = [line.replace("\\\n", " ") for line in lines] + re.findall(r"`((?:\w+=\S+ )*attnlens [^`]+)`", text)
    return [re.sub(r"\s{2,}#.*$|^.*?(?=attnlens )", "", " ".join(one.split("\n"))) for one in found]


@pytest.mark.parametrize("page", pages(), ids=lambda path: path.name)
def test_every_command_on_a_page_is_accepted_with_its_options_and_words(page):
    for command in commands(page.read_text()):
        name, *words = shlex.split(command)[1:]
        if name in COMMANDS and words and not re.search(r"(?<!/)\[(?!train)|\.\.\.$| \.\.\. ", command):
            load_command(name).make_context(name, words)  # raises for an option, a word or a number that is not taken


def test_commands_are_found_on_pages_and_a_wrong_one_is_refused():
    assert sum(len(commands(page.read_text())) for page in pages()) > 100
    (wrong,) = commands("so `attnlens inspect --folds raw`")
    with pytest.raises(Exception, match="--folds"):
        load_command("inspect").make_context("inspect", shlex.split(wrong)[2:])


def test_a_synopsis_names_options_that_are_there_and_every_word_of_a_choice():
    checked = set()
    for page in pages():
        for command, synopsis in re.findall(
            r"^    attnlens ([a-z-]+) (.*(?:\n {12,}\S.*)*)", page.read_text(), re.MULTILINE
        ):
            known = load_command(command)
            help_text = " ".join(known.get_help(known.make_context(command, [], resilient_parsing=True)).split())
            for option in re.findall(r"--[\w-]+", synopsis):
                assert option in help_text, (page.name, command, option)
            for option, words in re.findall(r"(--[\w-]+) ([\w-]+(?:\|[\w-]+)+)", synopsis):
                assert re.search(rf"{option} [<\[]{re.escape(words)}[>\]]", help_text), (page.name, command, option)
                checked.add((command, option))
    assert {("fit-params", "--fold"), ("fit-params", "--per"), ("init", "--gains"), ("signal", "--mlp")} <= checked


def test_every_file_that_a_page_shows_is_shown():
    shown = []
    for page in (ROOT / "docs").glob("*.md"):
        for line in re.findall(r"^-+ ?8.*$", page.read_text(), re.MULTILINE):
            included = re.fullmatch(
                r'--8<-- "(.+)"', line
            )  # a formatter of Python parts the mark, and nothing is shown
            assert included, (page.name, line)
            assert any((folder / included[1]).is_file() for folder in (ROOT, ROOT / "docs")), (page.name, line)
            shown.append(included[1])
    assert {"example.py", "paper_figure.py", "gallery/example.txt"} <= set(shown)


def test_every_file_of_the_repository_that_a_page_names_is_there():
    named = 0
    for page in pages():
        text = page.read_text()
        for code in [*re.findall(r"`([^`\n]+)`", text), *re.findall(r"^    (.+)$", text, re.MULTILINE)]:
            for path in re.findall(r"(?<![\w./<-])(?:attnlens|benchmarks|docs|scripts|tests)/[\w./*-]*[\w*]", code):
                assert any(ROOT.glob(path)), (page.name, path)
                named += 1
    assert named > 80


def test_the_page_of_signal_propagation_names_each_variant_with_its_options():
    from attnlens.signal.variants import KEEP, VARIANTS, accepted_options

    told = {cells[0].strip("`"): cells[-1] for cells in rows("docs/signal.md", "Attention variants")}
    assert list(told) == [*VARIANTS, KEEP]
    for name, options in told.items():
        assert re.findall(r"`(\w+)`", options) == list(accepted_options(name)), name
        for option, value in re.findall(r"`(\w+)` (\.?\d+)", options):
            assert accepted_options(name)[option] == float(value)


def test_the_page_of_comparisons_names_the_arms_and_the_defaults_of_each_network():
    from attnlens.training.arms import CONTROLS, WIRINGS
    from attnlens.training.networks.registry import networks

    arms = [name for cells in rows("docs/training.md", "Arms") for name in re.findall(r"`([\w-]+)`", cells[0])]
    assert arms[-len(WIRINGS) :] == list(WIRINGS)
    defaults = {cells[-1].strip("`") for cells in rows("docs/training.md", "Networks")}
    assert defaults == {",".join(kind.default_arms) for kind in networks()}
    assert {arm for row in defaults for arm in row.split(",")} | set(CONTROLS.values()) <= set(arms)


def claims() -> dict[str, list[str]]:
    """Return what pages say with numbers that the code or a file of results holds, by page."""
    from attnlens.checkpoints import archives, converted, tars
    from attnlens.checkpoints.open import LONGEST_NAME
    from attnlens.cli.train_compare import EXIT_CODES
    from attnlens.filters.statistics import DRAWS
    from attnlens.fit.params import VERSION
    from attnlens.inits.verify.mistakes import SAME_DRAW
    from attnlens.models import bounded
    from attnlens.models.architecture import LARGEST_ARGUMENT, MOST_MODULES
    from attnlens.printable import LONGEST
    from attnlens.reports.matrices import CODES, CORNER, HEATMAP_BYTES
    from attnlens.training.config import TUNING_SEEDS
    from attnlens.training.data import image_files
    from attnlens.training.data.images import UNEVEN
    from attnlens.training.networks.convmixer import PRESETS as CONVMIXERS
    from attnlens.training.networks.vit import ViT
    from attnlens.training.options import PRESETS
    from benchmarks.trust.guard import SECONDS
    from benchmarks.trust.readers import IMAGES, WEIGHTS

    mixer, text = CONVMIXERS["convmixer-tiny"], PRESETS["text"]
    alike = [each for each in CONVMIXERS.values() if {**each, "kernel_size": mixer["kernel_size"]} == mixer]
    kernels = " or ".join(f"{each['kernel_size']} x {each['kernel_size']}" for each in alike)
    seeds = next(p.default for p in load_command("train-compare").params if p.name == "seeds")
    trust, tolerance, balance = (
        json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        for name in ("trust", "init_tolerance", "balance_speed")
    )
    draws, expanded = tolerance["largest"], f"{archives.EXPANDS} times"
    scan, faults, hostile = trust["scan"], trust["faults"], trust["hostile"]
    made = {how: f"{part['inputs']:,}" for how, part in hostile["by_making"].items()}
    broken = sum(number for name, number in hostile.items() if name.startswith("violations_"))
    kills = faults["kills_by_command"]
    parts = {name: part["cases"] for name, part in faults["parts"].items() if "cases" in part}
    return {
        "docs/training.md": [
            f"digits, {len(ViT.default_arms)} arms x {seeds} seeds",
            f"width {mixer['dim']}, depth {mixer['depth']}, {kernels} filters",
            f"(`--train-images`, {text['train_images']:,}), each of `--context` bytes ({text['context']})",
            f"`--target` ({text['target']:g})",
            f"with seeds from {TUNING_SEEDS:,} on",
            f"more than {UNEVEN} times its fair share",
            f"0 after a budget, {EXIT_CODES['interrupt']} after Ctrl-C, {EXIT_CODES['terminate']} after SIGTERM",
        ],
        "docs/inits.md": [
            f"cosine above {SAME_DRAW}",
            f"{draws['alpha']['sd']:.2f} alpha/d in alpha and {draws['beta']['sd']:.2f} alpha/d in beta",
            f"means within {draws['alpha']['mean']:.2f} alpha/d",
            f"n = {tolerance['rows'][0]['n']} draws at each of {len(tolerance['rows'])} settings",
        ],
        "docs/checkpoints.md": [f"{expanded} the archive's bytes and {archives.ALLOWANCE >> 20} MiB"],
        "docs/filters.md": [f"mean over {DRAWS} sets of filters", f"unless p = 1/{DRAWS + 1}"],
        "docs/params.md": [f"schema `attnlens.params`, version {VERSION}"],
        "docs/report.md": [
            f"its first {CORNER} x {CORNER} entries",
            f"more than {HEATMAP_BYTES // CORNER**2 // 2} products",  # raw and effective
            f"in {len(CODES)} levels",
        ],
        "docs/reproduction.md": [
            f"cost of balancing: {median(balance['balance_over_rest']):.2f} of the other statistics"
        ],
        "docs/trust.md": [
            f"of images only {', '.join(image_files.FORMATS)} are ever decoded",
            f"at most {LONGEST:,} printable characters",
            f"{SECONDS:g} seconds of processor time",
            f"{WEIGHTS.multiple} bytes for each byte of file, and {WEIGHTS.constant >> 20} MiB",
            f"{IMAGES.multiple} bytes for each byte of file, and {IMAGES.constant >> 20} MiB",
            f"Pixels may be {image_files.DECODED} times the file",
            f"members may hold {expanded} its length, and {archives.ALLOWANCE >> 20} MiB",
            f"at most {bounded.SECONDS} seconds of processor time and {bounded.MEMORY >> 20} MiB",
            f"at most {bounded.CHEAP_SECONDS} seconds and {bounded.CHEAP_MEMORY >> 20} MiB",
            f"a tar's member have at most {tars.LARGEST_HEADER >> 10} KiB each",
            f"a tensor's name has at most {LONGEST_NAME:,} characters",
            f"tar may expand {image_files.EXPANDS}-fold and {image_files.ALLOWANCE >> 20} MiB",
            f"at most {MOST_MODULES:,} modules",
            f"is above {LARGEST_ARGUMENT:,}",
            f"at most {converted._GROWS} times the file, and {converted._ALWAYS >> 20} MiB",
            f"{hostile['inputs']:,} inputs (seed 22, {hostile['made_on']['cpus']} cores",
            f"{hostile['past_parser']:,} got past the parser, {hostile['accepted']:,} were accepted",
            f"{hostile['refused']:,} refused, and {broken or 'none'} broke a promise",
            f"{made['by hand']} of them are written by hand, {made['built']} built whole, {made['mutated']} mutated",
        ],
        "docs/scale.md": [
            f"{scan['local']['models']} small models with random weights",
            f"{scan['local']['read']} were read, {scan['local']['failed_as_planted']} failed as planted",
            f"{scan['local']['compared_with_inspect']} of {scan['local']['compared_with_inspect']} compared were equal",
            f"{scan['scan_seconds']['local']:.0f} s and {scan['scan_seconds']['ray']:.0f} s on 2 cores",
        ],
        "docs/trust-faults.md": [
            (
                f"{faults['kills']} kills ({', '.join(f'{number} of {name}' for name, number in kills.items())}), "
                f"{faults['kills_in_processes_of_their_own']} of them"
            ),
            f"{faults['half_files_or_lost_ones']} half or lost files",
            f"{faults['kills_before_writing']} came before writing, {faults['kills_while_writing']} while a file",
            (
                f"{faults['kills_between_two_writes']} between two writes of a comparison, "
                f"{faults['kills_after_writing']} after the command"
            ),
            f"{faults['sets_of_files_from_two_runs']} kills came between two renames",
            f"{faults['of_those_equal_to_the_one_never_killed']} of {faults['comparisons_resumed']} comparisons",
            (
                f"{parts['disks']} cases of full and read-only disks, {parts['two_writers']} pairs of writers, "
                f"{parts['two_comparisons']} pairs of comparisons, {parts['inputs_that_vanish']} inputs and "
                f"{parts['folders_that_vanish']} cases of folders that vanish, {parts['hub']} of a hub"
            ),
            f"{parts['failing_writes']} steps of writing of eight commands and {parts['failing_comparisons']} checks",
            f"{faults['parts']['ranks_killed']['kills']} ranks of torchrun",
        ],
    }


def test_a_number_on_a_page_is_that_of_the_code_or_of_the_results():
    missing = [
        (page, claim)
        for page, said in claims().items()
        for claim in said
        if not re.search(rf"(?<![\d.,]){re.escape(claim)}", flat(page))
    ]
    assert missing == []
