"""The catalogue: what its rows count, how it is searched, that a killed build goes on, that the shipped one is true."""

import json
import lzma
import random
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.metadata import version

import pytest

from attnlens.errors import ModelNotFoundError, UsageError
from attnlens.models import catalogue as module
from attnlens.models.catalogue import Catalogue, Entry, build_catalogue, load_catalogue, shipped_file, summarise

TAG = {"hf_hub_id": "owner/name", "hf_hub_filename": None, "url": None}


of_this_timm = pytest.mark.skipif(not shipped_file().is_file(), reason="no catalogue is shipped for the installed timm")


def entry(name, *, tags=(), families=("A",), **read):
    return Entry(name, 3, read or {"token": 3}, (3, 5), (7, 11), families, dict.fromkeys(tags, TAG), 2, ("3x3", "1x5"))


SMALL = Catalogue(
    timm="1.2.3",
    rules="abc",
    entries=(
        entry("vit_tiny", tags=("first", "second")),
        entry("vit_small_dinov2"),
        entry("xcit_tiny", families=("B2", "C5"), channel=2, token=1),
    ),
    failed={},
)


@pytest.fixture
def small_timm(monkeypatch, tmp_path):
    """Let timm know three architectures only, and keep what is built of them in an empty cache."""
    import timm

    monkeypatch.setattr(timm, "list_models", lambda: ["test_vit", "test_resnet", "test_nfnet"])
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "attnlens")
    monkeypatch.setattr(module, "SHIPPED", tmp_path / "shipped")
    return tmp_path / "attnlens"


def names(found):
    return [item.name for item in found]


def test_a_row_counts_layers_heads_widths_and_tags():
    found = summarise("test_vit")
    assert (found.layers, found.read, found.heads, found.widths, found.families) == (
        6,
        {"token": 6},
        (2,),
        (64,),
        ("A",),
    )
    assert found.tags == {
        "r160_in1k": {"hf_hub_id": "timm/test_vit.r160_in1k", "hf_hub_filename": None, "url": None},
    }


def test_labelled_kinds_are_counted_apart():
    found = summarise("davit_tiny")
    assert (found.layers, found.readable, found.labelled) == (12, 6, {"channel": 6})


def test_depthwise_filters_are_counted_beside_attention_and_without_it():
    alone, beside = summarise("test_convnext"), summarise("test_vit")
    assert (alone.layers, alone.filters, alone.kernels) == (0, 9, ("7x7",))
    assert (beside.filters, beside.kernels) == (0, ())
    both = summarise("coatnet_nano_rw_224")
    assert both.layers > 0
    assert both.filters > 0


def test_an_architecture_without_either_has_no_row():
    assert summarise("test_resnet") is None


def test_rows_survive_json():
    assert Catalogue.from_json(json.loads(json.dumps(SMALL.to_json())), "built") == SMALL


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        (None, ["vit_tiny", "vit_small_dinov2", "xcit_tiny"]),
        ("tiny", ["vit_tiny", "xcit_tiny"]),
        ("VIT_*", ["vit_tiny", "vit_small_dinov2"]),
        ("*dinov?", ["vit_small_dinov2"]),
        ("vit_tiny.second", ["vit_tiny"]),
        ("*.first", ["vit_tiny"]),
        ("[vx]*tiny", ["vit_tiny", "xcit_tiny"]),
    ],
)
def test_a_pattern_is_a_part_of_a_name_or_a_shell_pattern_for_all_of_it(pattern, found):
    assert names(SMALL.select(pattern)) == found


def test_a_family_is_chosen_by_its_name_in_any_case():
    assert names(SMALL.select(family="c5")) == ["xcit_tiny"]
    assert SMALL.select("vit_small", family="C5") == []
    with pytest.raises(UsageError, match="family='Z' is no layout family: choose from A, B2, C5"):
        SMALL.select(family="Z")


@pytest.mark.parametrize(("pattern", "near"), [("vit_tny", "vit_tiny"), ("*dinov9*", "dinov2")])
def test_a_pattern_that_matches_nothing_is_told_with_the_nearest_names(pattern, near):
    with pytest.raises(ModelNotFoundError, match=rf"is named '.*': did you mean .*{near}"):
        SMALL.select(pattern)


def test_a_built_catalogue_is_kept_and_used_again(small_timm, monkeypatch):
    built = load_catalogue()
    assert names(built.entries) == ["test_vit"]
    assert [path.name for path in small_timm.iterdir()] == ["catalogue.json"]
    monkeypatch.setattr(module, "summarise", None)
    assert load_catalogue() == built


def test_a_build_that_was_killed_goes_on_where_it_was(small_timm, monkeypatch):
    examined = []

    def counting(name):
        examined.append(name)
        if len(examined) == 3:
            raise KeyboardInterrupt
        return summarise(name)

    monkeypatch.setattr(module, "summarise", counting)
    with pytest.raises(KeyboardInterrupt):
        build_catalogue()
    journal = small_timm / "catalogue.jsonl"
    journal.write_text(journal.read_text() + '\n{"name": "test_nf')  # killed while writing
    assert names(build_catalogue().entries) == ["test_vit"]
    assert examined == ["test_vit", "test_resnet", "test_nfnet", "test_nfnet"]
    assert not journal.exists()


def test_one_architecture_that_cannot_be_built_does_not_hide_the_others(small_timm, monkeypatch):
    def failing(name):
        if name == "test_resnet":
            raise RuntimeError("no such thing\nat all")
        return summarise(name)

    monkeypatch.setattr(module, "summarise", failing)
    found = load_catalogue()
    assert names(found.entries) == ["test_vit"]
    assert found.failed == {"test_resnet": "RuntimeError: no such thing"}
    assert load_catalogue() == found
    assert small_timm.is_dir()


def test_a_cache_that_cannot_be_written_costs_time_only(small_timm):
    small_timm.write_text("a file where the folder should be")
    assert names(load_catalogue().entries) == ["test_vit"]


@of_this_timm
def test_the_shipped_catalogue_is_used_for_its_own_timm_version_only(small_timm, monkeypatch):
    monkeypatch.undo()
    assert load_catalogue().origin == "shipped"
    monkeypatch.setattr(module, "version", lambda _: "0.0.0")
    assert shipped_file().name == "timm-0.0.0.json.xz"
    assert not shipped_file().exists()
    assert not small_timm.exists()


@of_this_timm
def test_the_shipped_catalogue_is_small_and_says_what_it_was_made_with():
    packed = shipped_file().read_bytes()
    header = json.loads(lzma.decompress(packed))
    assert len(packed) < 100_000
    assert (header["schema"], header["timm"], header["failed"]) == ("attnlens.catalogue", version("timm"), {})
    attention = [item for item in header["entries"] if item["layers"]]
    assert (len(attention), sum(len(item["tags"]) for item in attention)) == (695, 955)
    depthwise = [item for item in header["entries"] if item["filters"]]
    assert (len(header["entries"]), len(depthwise), sum(item["filters"] for item in depthwise)) == (1006, 551, 15370)


@of_this_timm
@pytest.mark.slow
def test_the_shipped_catalogue_equals_a_fresh_build_of_a_sample():
    shipped = load_catalogue()
    for known in random.Random(0).sample(shipped.entries, 40):
        assert summarise(known.name) == known, f"{known.name} is described otherwise now: run `make catalogue`"


# The command.


@pytest.fixture
def listing(monkeypatch, run):
    """Run `attnlens list-models` in process on the small catalogue; return exit code, stdout and stderr."""
    monkeypatch.setattr("attnlens.models.catalogue.load_catalogue", lambda *_, **__: SMALL)
    return partial(run, "list-models")


def test_a_pipe_gets_tab_separated_lines(listing):
    code, out, err = listing("tiny")
    assert (code, err) == (0, "")
    assert [line.split("\t") for line in out.splitlines()] == [
        ["name", "layers", "read", "labelled", "heads", "width", "families", "filters", "kernels", "tags"],
        ["vit_tiny", "3", "3", "", "3-5", "7-11", "A", "2", "3x3 1x5", "first second"],
        ["xcit_tiny", "3", "1", "2 channel", "3-5", "7-11", "B2 C5", "2", "3x3 1x5", ""],
    ]


def test_a_terminal_gets_a_table(listing, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _, out, _ = listing("xcit")
    flat = " ".join(out.split())
    assert "1 architecture with attention or depthwise filters in timm 1.2.3 (catalogue: built here)" in flat
    assert "to type: NAME, or NAME.TAG" in flat
    assert "xcit_tiny 1/3 3-5 7-11 2 B2 C5 2 channel" in flat


def test_json_holds_the_header_and_whole_rows(listing):
    found = json.loads(listing("dinov2", "--json")[1])
    assert (found["schema"], found["timm"], found["origin"]) == ("attnlens.models", "1.2.3", "built")
    assert found["models"] == [json.loads(json.dumps(SMALL.entries[1].to_json()))]


def test_cached_keeps_the_tags_at_hand(listing, monkeypatch):
    monkeypatch.setattr(
        "attnlens.checkpoints.hub.cached_tags", lambda tags: {k: tags[k] for k in tags if k == "second"}
    )
    code, out, _ = listing("--cached", "--json")
    assert code == 0
    assert [list(item["tags"]) for item in json.loads(out)["models"]] == [["second"]]
    assert names(SMALL.entries)[0] == json.loads(out)["models"][0]["name"]


def test_nothing_cached_is_an_empty_list_and_a_word_on_stderr(listing, monkeypatch):
    monkeypatch.setattr("attnlens.checkpoints.hub.cached_tags", lambda _: {})
    code, out, err = listing("--cached")
    assert (code, out.count("\n")) == (0, 1)
    assert err == "none of them has weights in the local cache\n"


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [(("vit_tny",), 1, "did you mean vit_tiny"), (("--family", "Z"), 2, "--family 'Z' is no layout family")],
)
def test_errors_are_one_line_with_their_exit_code(listing, arguments, code, told):
    found, out, err = listing(*arguments)
    assert (found, out, err.count("\n")) == (code, "", 1)
    assert told in err


def test_what_could_not_be_built_is_told(listing, monkeypatch):
    broken = replace(SMALL, failed={"odd_vit": "RuntimeError: no such thing"})
    monkeypatch.setattr("attnlens.models.catalogue.load_catalogue", lambda *_, **__: broken)
    assert listing()[2] == "not built: odd_vit (RuntimeError: no such thing)\n"


@of_this_timm
def test_the_shipped_list_imports_neither_torch_nor_timm_and_a_closed_pipe_is_quiet():
    code = (
        "import sys\nfrom attnlens.cli import main\n"
        "try:\n    main()\nfinally:\n    print(sorted({'torch', 'timm'} & set(sys.modules)), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "list-models", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "{\n"
        process.stdout.close()
        assert process.stderr.read() == "[]\n"
