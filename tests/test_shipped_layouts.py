"""Shipped descriptions of architectures: those that building gives, believed for their own rules and timm alone."""

import json
import subprocess
import sys
import zipfile
from importlib.metadata import version

import pytest

from attnlens.models import described
from attnlens.models.architecture import build
from attnlens.models.catalogue import load_catalogue
from attnlens.models.described import describe_architecture, layouts_file, rules_digest, ship_layouts

NAMES = ("test_vit", "test_convnext", "test_vit2", "test_efficientnet")
WITH_ARGUMENTS = ("test_vit", {"num_heads": 4, "depth": 3})


def up_to_date() -> bool:
    """Whether an archive is shipped for the installed timm that the layout rules as they are made."""
    if not layouts_file().is_file():
        return False
    with zipfile.ZipFile(layouts_file()) as archive:
        return json.loads(archive.read("about.json"))["rules"] == rules_digest()


of_this_timm = pytest.mark.skipif(
    not up_to_date(), reason="no descriptions by these rules and of this timm are shipped"
)


@pytest.fixture
def shipped(monkeypatch, tmp_path):
    """Ship four architectures, three in the first member of the archive, and let the user's cache be empty."""
    monkeypatch.setattr(described, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(described, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(described, "_TOGETHER", 3)
    path = ship_layouts([*((name, {}) for name in NAMES), WITH_ARGUMENTS])
    monkeypatch.setattr(described, "cache_folder", lambda: tmp_path / "empty")
    return path


@pytest.fixture
def never_built(shipped, monkeypatch):
    assert shipped.is_file()

    def fail(*_):
        raise AssertionError("built")

    monkeypatch.setattr(described, "build", fail)


@pytest.mark.usefixtures("never_built")
@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_description_is_the_built_one_and_nothing_is_cached(shipped, name):
    assert describe_architecture(name) == build(name, {})
    assert not (shipped.parent.parent / "empty").exists()


@pytest.mark.usefixtures("shipped", "never_built")
@pytest.mark.parametrize("other", ["aaa", "test_vit3", "zzz"])
def test_an_architecture_that_is_not_shipped_is_built(other):
    with pytest.raises(AssertionError, match="built"):
        describe_architecture(other)


@pytest.mark.usefixtures("shipped", "never_built")
def test_descriptions_by_other_rules_are_never_believed(monkeypatch):
    monkeypatch.setattr(described, "rules_digest", lambda: "0123456789ab")
    with pytest.raises(AssertionError, match="built"):
        describe_architecture("test_vit")


@pytest.mark.usefixtures("shipped", "never_built")
def test_descriptions_of_another_timm_are_never_believed(monkeypatch):
    monkeypatch.setattr(described, "version", lambda _: "0.0.0")
    with pytest.raises(AssertionError, match="built"):
        describe_architecture("test_vit")


@pytest.mark.usefixtures("shipped")
def test_an_architecture_with_arguments_is_shipped_under_them_in_any_order(shipped, monkeypatch):
    assert shipped.is_file()
    monkeypatch.setattr(described, "describe_bounded", None)
    name, arguments = WITH_ARGUMENTS
    found = describe_architecture(name, dict(reversed(arguments.items())))
    assert found == build(name, arguments)
    assert len(found.specs) == 3


def test_arguments_are_not_those_that_were_shipped():
    assert len(describe_architecture("test_vit", {"depth": 2}).specs) == 2


@pytest.mark.parametrize("broken", [b"", b"PK\x03\x04 no archive", None])
def test_a_broken_archive_costs_time_only(shipped, broken):
    whole = shipped.read_bytes()
    shipped.write_bytes(whole[: len(whole) // 2] + whole[len(whole) // 2 + 40 :] if broken is None else broken)
    assert describe_architecture("test_vit") == build("test_vit", {})


def test_the_same_architectures_make_the_same_bytes(shipped):
    before = shipped.read_bytes()
    assert ship_layouts([WITH_ARGUMENTS, *((name, {}) for name in reversed(NAMES))]).read_bytes() == before


@of_this_timm
def test_every_architecture_of_the_catalogue_is_shipped():
    with zipfile.ZipFile(layouts_file()) as archive:
        names = [
            name for member in archive.namelist() if member != "about.json" for name in json.loads(archive.read(member))
        ]
    known = {entry.name for entry in load_catalogue().entries}
    assert len(names) == len(known) + 1
    assert known < set(names)
    assert layouts_file().stat().st_size < 1_000_000


FIRST_RUN = """
import sys
from attnlens.models.described import describe_architecture
from attnlens.models.open import open_model
assert len(describe_architecture("vit_base_patch16_224").specs) == 12
assert len(open_model(None, None).architecture.specs) == 6
print(sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "timm"}))
"""


@of_this_timm
def test_the_first_run_of_an_architecture_imports_neither_torch_nor_timm(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FIRST_RUN],
        env={"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
    assert not list(tmp_path.iterdir())
    assert version("timm") in layouts_file().name
