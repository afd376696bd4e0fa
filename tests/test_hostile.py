"""Hostile files: every case written by hand and a small fuzz hold what docs/trust.md promises; the guard can fail."""

import json
import os
import random
import subprocess
import sys
import time
import tracemalloc
from collections import OrderedDict

import pytest
import torch

from attnlens.checkpoints import TorchFile
from attnlens.checkpoints.pickles import load_pickle
from attnlens.errors import CheckpointError, UsageError
from attnlens.printable import LONGEST, one_line, printable
from attnlens.strict_json import parse_json, within
from benchmarks.trust import built, payloads, seeds
from benchmarks.trust.guard import Case, Outcome
from benchmarks.trust.mutations import members_of, zip_of
from benchmarks.trust.parsers import PARSERS, corpus
from benchmarks.trust.tally import Kept, counts, tally, together
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the guard reads /proc and inotify")


def module(name, *arguments):
    """Run a module of the benchmarks and return what it printed and its exit code."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", f"benchmarks.trust.{name}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return json.loads(done.stdout), done


def test_the_guard_catches_a_reader_that_breaks_each_promise():
    found, done = module("planted")
    assert {name: verdict for name, (_, verdict) in found.items()} == {name: due for name, (due, _) in found.items()}
    assert done.returncode == 0
    assert {due for due, _ in found.values()} >= {"code", "outside", "memory", "error", "text", "timeout", "crash"}


def test_no_hostile_file_breaks_a_promise():
    found, done = module("hostile", "--inputs", "150", "--seed", "1", "--no-record")
    assert done.returncode == 0, done.stderr
    assert {name: count for name, count in found.items() if name.startswith("violations") and count} == {}
    assert found["inputs"] > 800
    assert found["accepted"] > 50, "a reader that refuses everything promises nothing"
    assert all(any(made["refused"] for made in count.values()) for count in found["by_format"].values())
    built = found["by_making"]["built"]
    assert built["past_parser_share"] > 0.6, "what is built is whole: what is odd about it lies behind the parser"
    assert built["accepted"]
    assert built["refused"]


@pytest.mark.parametrize("name", ["safetensors", "npz", "tensors"])
def test_a_shape_that_claims_more_than_a_disk_holds_makes_a_short_file(name):
    shapes = {"huge": (3, 2**40), "small": (2, 3)}
    made = getattr(built, name)(random.Random(0), shapes)
    assert "small" in made if name == "tensors" else 2 * 3 <= len(made) < built.LONGEST + 4096


def outcomes(*verdicts):
    case = Case("npz", "x", {}, made="built")
    return [Outcome(case, verdict, "why", growth=7, seconds=0.5, size=3, passed=True) for verdict in verdicts]


def test_pieces_of_a_long_run_are_kept_and_count_as_the_whole(tmp_path):
    path = tmp_path / "kept"
    Kept(path, 3).add("0", tally(outcomes("accepted", "refused"), 1.0))
    other = Kept(path, 3)  # another process, later
    assert set(other.pieces()) == {"0"}
    other.add("250", tally(outcomes("memory"), 2.0))
    whole = tally(outcomes("accepted", "refused", "memory"), 3.0)
    assert together(Kept(path, 3).pieces().values()) == whole
    found = counts(whole)
    assert (found["inputs"], found["past_parser"], found["violations_memory"]) == (3, 3, 1)
    assert found["by_format"]["npz"]["built"]["refused"] == 1
    with path.open("a") as file:
        file.write('{"piece": "500", "par')
    assert together(Kept(path, 3).pieces().values()) == whole
    Kept(path, 3).add("500", tally(outcomes("refused"), 1.0))  # behind the half line of a process that was killed
    assert set(Kept(path, 3).pieces()) == {"0", "250", "500"}


def test_counts_of_another_seed_or_of_other_sources_are_not_gone_on_with(tmp_path):
    path = tmp_path / "kept"
    Kept(path, 3)
    with pytest.raises(UsageError, match="of another seed"):
        Kept(path, 4)
    path.write_text(json.dumps({"sources": "0" * 64, "seed": 3}) + "\n")
    with pytest.raises(UsageError, match="of other sources"):
        Kept(path, 3)


def test_text_of_files_is_printable_on_one_line_of_bounded_length():
    assert printable("plain \u00e4\u03b1") == "plain \u00e4\u03b1"
    assert printable("\x1b[2J\u202e\ud800") == r"\x1b[2J\u202e\ud800"
    assert str(CheckpointError("two\nlines \x1b]0;x\x07")) == r"two lines \x1b]0;x\x07"
    long = one_line("\x1b" * 10**7 + "what to do")
    assert len(long) == LONGEST
    assert long.endswith("what to do")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"[" * 100_000, "levels"),
        ("[" * 65 + "]" * 65, "deeper than 64 levels"),
        ('{"a": 1, "a": 2}', "'a' is given twice"),
        (r'["\ud800"]', "half of a surrogate pair"),
        (r'{"\udfff": 1}', "half of a surrogate pair"),
        ("[NaN]", "NaN is no JSON"),
        ("[1e999]", "beyond what float64 holds"),
        ("9" * 5000, "4300 digits"),
        (b"\xff\xfe", "utf-8"),
    ],
)
def test_json_that_readers_disagree_about_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


def test_json_within_the_limits_is_read_as_it_is():
    assert parse_json("[" * 64 + "]" * 64)
    assert parse_json(r'{"a": ["\ud83d\ude00", 1.5, null]}') == {"a": ["\U0001f600", 1.5, None]}
    assert parse_json("[NaN]", constant=lambda _: None) == [None]


def test_a_link_is_followed_inside_its_folder_and_in_a_hub_cache_only(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    (blobs / "1").write_text("x")
    (tmp_path / "secret").write_text("x")
    (snapshot / "in.json").write_text("x")
    for name, target in {
        "own": "in.json",
        "hub": "../../blobs/1",
        "out": "../../secret",
        "circle": "circle",
        "no": "x",
    }.items():
        (snapshot / name).symlink_to(target)
    assert within(snapshot, snapshot / "own", CheckpointError)
    assert within(snapshot, snapshot / "hub", CheckpointError)
    with pytest.raises(CheckpointError, match="is a link that leaves"):
        within(snapshot, snapshot / "out", CheckpointError)
    for name in ("circle", "no"):
        with pytest.raises(CheckpointError, match="cannot be followed"):
            within(snapshot, snapshot / name, CheckpointError)
    assert within(snapshot, snapshot / "absent", CheckpointError)


@pytest.mark.parametrize(
    "name",
    [
        "modules in modules",
        "lists that double",
        "one list, many dictionaries",
        "one state, many objects",
        "one key, many names",
        "one shape, many tensors",
    ],
)
def test_what_a_pickle_says_once_and_uses_often_is_not_copied_each_time(name, tmp_path):
    whole = seeds.pth(seeds.transformers_state())
    inner = b"\x80\x02" + payloads.growing()[name] + b"."
    members = [(path, inner if path.endswith("data.pkl") else held) for path, held in members_of(whole)]
    path = tmp_path / "model.pth"
    path.write_bytes(zip_of(members))
    tracemalloc.start()
    began = time.process_time()
    try:
        opened = TorchFile(path)
        assert {name: tuple(opened[name].shape) for name in opened} == {"w": (8, 8)}
    except CheckpointError:
        pass
    seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 20
    assert peak < 64 * (path.stat().st_size + (1 << 20))


def test_a_checkpoint_with_an_ordered_dictionary_and_its_state_is_still_loaded(tmp_path):
    state = OrderedDict(w=torch.ones(2, 3))
    state._metadata = {"": {"version": 1}}
    torch.save({"a": state, "b": OrderedDict(state), "same": state}, tmp_path / "a.pt")
    loaded = load_pickle(tmp_path / "a.pt", CheckpointError)
    assert torch.equal(loaded["a"]["w"], torch.ones(2, 3))
    assert loaded["same"]._metadata == state._metadata


@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_keeps_its_word_about_what_fuzzing_starts_from_and_its_cuts(name):
    rng = random.Random(name)
    known = list(corpus(name))
    assert len(known) > 1
    for data in known:
        PARSERS[name](data)
        for _ in range(5):
            cut = bytearray(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.3 else data)
            if cut:
                cut[rng.randrange(len(cut))] ^= 1 << rng.randrange(8)
            PARSERS[name](bytes(cut))
