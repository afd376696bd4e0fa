"""kill -9, full and read-only disks, vanishing files, two writers: the small version of `benchmarks.trust.faults`."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from attnlens.atomic import TEMPORARY, FileSet, _taken_back, open_scratch, sweep, write_atomic, write_text_atomic
from attnlens.checkpoints import open_checkpoint
from attnlens.errors import CheckpointError, OutputError, UsageError
from attnlens.training.store import Store
from benchmarks.trust.fault_checks import (
    DamagedError,
    content_hash,
    contents,
    half_files,
    leftovers,
    states,
)
from benchmarks.trust.fault_disks import in_namespace, permitted
from tests.conftest import ROOT
from tests.training_setup import compare, config, small, write_source

KILL = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"


# What a killed process leaves.


def run_python(*lines):
    """Run some lines in a process of their own and return its exit code."""
    return subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, check=False).returncode


def killed_while_writing(target):
    write = ("def write(file):", "    file.write(b'ha')", f"    {KILL}")
    code = run_python("from attnlens.atomic import write_atomic", *write, f"write_atomic({str(target)!r}, write)")
    assert code == -9


def test_a_killed_writer_leaves_the_old_file_and_one_temporary_that_the_next_one_removes(tmp_path):
    target = write_text_atomic(tmp_path / "a.json", "old")
    killed_while_writing(target)
    assert target.read_text() == "old"
    assert len(leftovers(tmp_path)) == 1
    write_text_atomic(tmp_path / "another.json", "new")
    assert leftovers(tmp_path) == []


def test_the_temporary_file_of_a_writer_at_work_is_not_swept(tmp_path):
    with FileSet() as files:
        files.write(tmp_path / "a.txt", lambda file: file.write(b"new"))
        sweep(tmp_path)
        sweeping = ("from pathlib import Path", "from attnlens.atomic import sweep", f"sweep(Path({str(tmp_path)!r}))")
        assert run_python(*sweeping) == 0
        assert len(leftovers(tmp_path)) == 1
    assert (tmp_path / "a.txt").read_text() == "new"


def test_files_of_others_are_never_swept(tmp_path):
    (tmp_path / ".mine.part").write_text("another program's")
    (tmp_path / f"seen{TEMPORARY}").write_text("not hidden")
    sweep(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_scratch_file_of_a_killed_process_is_swept(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    elsewhere = ("import tempfile", f"tempfile.tempdir = {str(tmp_path)!r}")
    assert run_python(*elsewhere, "from attnlens.atomic import open_scratch", "open_scratch('x')", KILL) == -9
    assert len(leftovers(tmp_path)) == 1
    path, file = open_scratch("y")
    assert leftovers(tmp_path) == [path]
    file.close()


# Files that belong together.


def test_a_set_that_fails_leaves_every_old_file(tmp_path):
    for name in ("a", "b"):
        write_text_atomic(tmp_path / name, "old")

    def fail(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write():
        with FileSet() as files:
            files.write(tmp_path / "a", lambda file: file.write(b"new"))
            files.write(tmp_path / "b", fail)

    with pytest.raises(OutputError, match=r"cannot write .*b: No space left on device\. Choose"):
        write()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old", "b": "old"}


@pytest.mark.parametrize("step", ["os.rename", "os.link", "os.chmod"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_name_that_cannot_be_given_takes_back_those_that_were(tmp_path, step, number):
    """Each of three files is denied its name in turn, one of which replaces nothing."""
    (tmp_path / "a").write_text("old a")
    (tmp_path / "c").write_text("old c")
    code = (
        "import errno, os, sys",
        "from attnlens.atomic import FileSet",
        "seen = []",
        "def hook(event, arguments):",
        f"    if event == {step!r} and (seen.append(event) or len(seen) == {number}):",
        "        raise OSError(errno.EIO, os.strerror(errno.EIO))",
        "with FileSet() as files:",
        "    for name in 'abc':",
        f"        files.write({str(tmp_path)!r} + '/' + name, lambda file: file.write(b'new'))",
        "    sys.addaudithook(hook)",
    )
    copied = step == "os.link"  # two files have an old one; a file system without links has it copied
    assert run_python(*code) == (0 if copied else 1)
    texts = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert texts == (dict.fromkeys("abc", "new") if copied else {"a": "old a", "c": "old c"})


def test_a_folder_that_cannot_be_flushed_leaves_every_old_file(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")
    monkeypatch.setattr("attnlens.atomic._sync_folder", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "EIO")))
    with pytest.raises(OutputError, match=r"cannot write .*: EIO"), FileSet() as files:  # noqa: PT012  # at its end
        for name in "ab":
            files.write(tmp_path / name, lambda file: file.write(b"new"))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}


def test_the_second_name_of_an_old_file_is_not_swept_while_the_new_ones_take_their_places(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), _taken_back() as place:  # noqa: PT012  # it is raised in the context
        (tmp_path / "new").write_text("new")
        place(tmp_path / "new", tmp_path / "a")
        sweeping = ("from pathlib import Path", "from attnlens.atomic import sweep", f"sweep(Path({str(tmp_path)!r}))")
        assert run_python(*sweeping) == 0
        raise KeyboardInterrupt
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}


def test_a_file_that_cannot_be_flushed_is_told_once_and_removed(tmp_path):
    def write(file):
        file.write(b"in the buffer, for which the disk has no room")
        os.close(file.fileno())

    with pytest.raises(OutputError, match=r"cannot write .*a: Bad file descriptor"):
        write_atomic(tmp_path / "a", write)
    assert list(tmp_path.iterdir()) == []


def test_two_sets_written_at_once_are_not_mixed(tmp_path):
    names = [str(number) for number in range(7)]
    barrier = threading.Barrier(2)

    def write(content):
        for _ in range(20):
            barrier.wait()
            with FileSet() as files:
                for name in names:
                    files.write(tmp_path / name, lambda file: file.write(content))
            barrier.wait()
            assert len({(tmp_path / name).read_bytes() for name in names}) == 1
            barrier.wait()

    failures = []

    def checked(content):
        try:
            write(content)
        except BaseException as error:  # noqa: BLE001  # told by the main thread
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=checked, args=(content,)) for content in (b"one", b"two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert leftovers(tmp_path) == []


def test_a_device_is_no_place_for_a_file():
    before = Path("/dev/null").stat()
    with pytest.raises(OutputError, match="cannot write /dev/null: it is a device or a pipe"):
        write_atomic("/dev/null", lambda file: file.write(b"x"))
    assert Path("/dev/null").stat().st_rdev == before.st_rdev


def test_a_link_stays_and_the_file_behind_it_is_replaced(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "far" / "a.txt")
    write_text_atomic(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "far" / "a.txt").read_text() == "new"


# The checker, with planted defects.


def planted(tmp_path):
    """Write one output of every kind, twice, as two runs would."""
    from PIL import Image

    for name, value in (("old", 1), ("new", 2)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a.json").write_text(json.dumps({"time": f"1{value}:00", "value": value}) + "\n")
        (folder / "a.csv").write_text(f"x,y\n1,{value}\n2,{value}\n")
        (folder / "a.jsonl").write_text(f'{{"x": {value}}}\n{{"x": 2}}\n')
        Image.new("RGB", (31, 17), (value, 2, 3)).save(folder / "a.png")
        save_file({"b": np.full((3, 5), value, np.float32), "a": np.arange(7)}, folder / "a.safetensors")
        np.savez(folder / "a.npz", x=np.full(11, value))
    return contents(tmp_path / "old"), contents(tmp_path / "new")


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.jsonl", "a.png", "a.safetensors", "a.npz"])
def test_the_checker_finds_a_file_cut_anywhere(tmp_path, name):
    old, new = planted(tmp_path)
    path = tmp_path / "new" / name
    whole = path.read_bytes()
    assert states(tmp_path / "new", old, new)[name] == "new"
    for length in sorted({0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 2, len(whole) - 1}):
        path.write_bytes(whole[:length])
        assert half_files(states(tmp_path / "new", old, new)), f"{length} of {len(whole)} bytes passed"


def test_the_checker_finds_a_missing_row_a_changed_byte_and_a_missing_file(tmp_path):
    old, new = planted(tmp_path)
    folder = tmp_path / "new"
    (folder / "a.csv").write_text("x,y\n1,2\n")
    assert "neither the old nor the new" in half_files(states(folder, old, new))[0]
    shutil.copy(tmp_path / "old" / "a.csv", folder / "a.csv")
    assert states(folder, old, new)["a.csv"] == "old"
    data = bytearray((folder / "a.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "a.safetensors").write_bytes(data)
    (folder / "a.png").unlink()
    assert len(half_files(states(folder, old, new))) == 2


def test_the_checker_leaves_out_the_clock_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"time": "12:00", "value": 1}')
    first = content_hash(path)
    path.write_text('{"time": "13:30", "value": 1}')
    assert content_hash(path) == first
    path.write_text('{"time": "13:30", "value": 2}')
    assert content_hash(path) != first
    path.write_text('{"time": "13:30", "value": 2')
    with pytest.raises(DamagedError, match="does not open whole"):
        content_hash(path)


# Commands.


@pytest.fixture
def fonts():
    """Let matplotlib list its fonts in the cache of this test run, once, where the processes below find it."""
    import matplotlib.font_manager

    return matplotlib.font_manager.fontManager


def in_a_process(script, folder):
    """Run a script of the benchmark in a process and a folder of its own; return what it prints last."""
    command = [sys.executable, "-c", script, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


KILLS = """
import json, os, random, sys
from collections import Counter
from pathlib import Path
from benchmarks.trust.fault_commands import fresh, judge, measure, put_old, simple_commands
from benchmarks.trust.fault_kills import kill_comparisons, kill_simple
from benchmarks.trust.fault_runs import Child, kill_self, warm

def at_the_fourth_rename():
    renames = []
    def hook(event, _):
        if event == "os.rename":
            renames.append(event)
            if len(renames) == 4:
                kill_self()
    sys.addaudithook(hook)

work, rng = Path(sys.argv[1]), random.Random(0)
warm()
inspect, init = simple_commands(work, ["inspect", "init"])
for command in (inspect, init):
    measure(command, work, real=False)
put_old(inspect, work, folder := fresh(work / "renaming"))
code = Child(inspect.new, folder, at_the_fourth_rename).wait().code
tally = Counter()
mixed = {"code": code, "wrong": judge(inspect, folder, tally, 0.0), **tally}
found = {"init": kill_simple(init, 3, 0, rng, work), "train-compare": kill_comparisons(3, 0, rng, work)}
print(json.dumps([mixed, {name: {**one.to_json(), "wrong": one.wrong} for name, one in found.items()}]))
"""


@pytest.mark.usefixtures("fonts")
def test_killed_commands_leave_the_old_or_the_new_and_killed_comparisons_end_as_if_they_had_not_been(tmp_path):
    mixed, found = in_a_process(KILLS, tmp_path)
    told = {"while writing": 1, "sets of files from two runs": 1, "of those told apart by the hashes they name": 1}
    assert mixed == {"code": -9, "wrong": [], **told}
    for one in found.values():
        assert one["wrong"] == []
        assert one["kills"] >= 3  # a comparison is killed up to three times before it is looked at
        assert one["temporary_files_after_the_next_run"] == 0
    assert found["train-compare"]["comparisons resumed to their end"] >= 1


PLANTED = """
import json, random, sys
from pathlib import Path
from benchmarks.trust.fault_planted import failing_comparison, failing_writes
from benchmarks.trust.fault_runs import warm

work, rng = Path(sys.argv[1]), random.Random(0)
warm()
found = failing_writes(4, rng, work, ["compare", "compose", "report"]), failing_comparison(4, rng, work)
print(json.dumps([one.to_json() for one in found]))
"""


@pytest.mark.usefixtures("fonts")
def test_a_write_that_fails_leaves_all_outputs_old_and_a_comparison_that_goes_on(tmp_path):
    commands, comparisons = in_a_process(PLANTED, tmp_path)
    assert commands["wrong"] == comparisons["wrong"] == []
    assert commands["cases"] == 12
    assert comparisons["by_case"]["train-compare that cannot take a step of writing"] == 4


RANKS = """
import json, random, sys
from pathlib import Path
from benchmarks.trust.fault_runs import warm
from benchmarks.trust.fault_workers import kill_ranks

warm()
found = kill_ranks(1, random.Random(0), Path(sys.argv[1]))
print(json.dumps({**found.to_json(), "wrong": found.wrong}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the ranks are found in /proc")
@pytest.mark.usefixtures("fonts")
def test_a_comparison_that_lost_a_rank_of_torchrun_goes_on_and_ends_as_if_it_had_not(tmp_path):
    found = in_a_process(RANKS, tmp_path)
    assert found["wrong"] == []
    assert found["kills"] == found["of those equal to the one never killed"] >= 1
    assert found["temporary_files_after_the_next_run"] == 0


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"))


def test_the_checkpoint_of_a_run_that_has_ended_is_removed_by_the_next_resume(source, tmp_path):
    options, folder = small(source, seeds=1, epochs=1), tmp_path / "out"
    compare(source, folder, options=options)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "default-0.pt").write_bytes(b"of a process that was killed before it removed this")
    compare(source, folder, options=options, resume=True)
    assert list((folder / "checkpoints").iterdir()) == []


def test_a_folder_another_comparison_is_at_work_in_is_refused_in_one_line(source, tmp_path):
    options, folder = small(source, seeds=1, epochs=1), tmp_path / "out"
    compare(source, folder, options=options)
    code = (
        f"import sys, fcntl\nfile = open({str(folder / '.lock')!r}, 'ab')\nfcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(OutputError, match=r"another train-compare is at work in .*out: wait for it, or choose"):
            compare(source, folder, options=options, resume=True)
        other.kill()
        other.wait()
    compare(source, folder, options=options, resume=True)


def test_a_comparison_that_is_refused_makes_no_folder(tmp_path):
    with pytest.raises(UsageError, match="holds no comparison"), Store.claim(tmp_path / "x", config(), resume=True):
        pass
    assert not (tmp_path / "x").exists()


def test_a_comparison_whose_folder_is_removed_says_so(tmp_path):
    with Store.claim(tmp_path / "x", config(), resume=False) as store:
        shutil.rmtree(tmp_path / "x")
        with pytest.raises(OutputError, match="was removed while the comparison ran: start it again"):
            store.save_records("default-0", [])
    assert not (tmp_path / "x").exists()


# Inputs that change while they are read.


def _keeping_times(act):
    """Do something to a file and put its times back."""

    def acted(path):
        status = path.stat()
        act(path)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    return acted


CHANGES = {
    "removed": (lambda path: path.unlink(), "was removed while it was read"),
    "cut": (lambda path: os.truncate(path, path.stat().st_size // 2), "was replaced, cut or changed"),
    "replaced": (
        lambda path: (path.with_name("b").write_bytes(path.read_bytes()), path.with_name("b").replace(path)),
        "was replaced, cut or changed",
    ),
    "rewritten": (
        lambda path: (path.write_bytes(path.read_bytes()), os.utime(path, (1, 1))),
        "was replaced, cut or changed",
    ),
    "overwritten at its length and time": (
        _keeping_times(lambda path: path.write_bytes(path.read_bytes()[::-1])),
        "was replaced, cut or changed",
    ),
}


def _weights(path, prefix=""):
    """Write the weights of a small ViT."""
    import timm
    import torch

    torch.manual_seed(0)
    state = timm.create_model("vit_tiny_patch16_224", **NETWORK).state_dict()
    state = {prefix + name: value.contiguous() for name, value in state.items()}
    if path.suffix == ".pt":
        torch.save(state, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: value.numpy() for name, value in state.items()})
    else:
        save_file({name: value.numpy() for name, value in state.items()}, path)


NETWORK = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 3}
QKV = "blocks.1.attn.qkv.weight"


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npz"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_file_that_changes_while_it_is_read_is_told_at_the_next_read(tmp_path, suffix, change):
    path = tmp_path / f"weights{suffix}"
    _weights(path)
    opened = open_checkpoint(path)
    opened[QKV].sum()
    act, told = CHANGES[change]
    act(path)
    for read in (lambda: opened[QKV], opened.provenance, opened.check):
        with pytest.raises(CheckpointError, match=told):
            read()


@pytest.mark.parametrize("prefix", ["visual.trunk.", "odd."], ids=["converted", "below a prefix"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("change", CHANGES)
def test_so_is_one_that_was_converted(tmp_path, suffix, change, prefix):
    from attnlens.models.open import open_model

    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "model_args": NETWORK}))
    path = tmp_path / f"weights{suffix}"
    _weights(path, prefix)
    opened = open_model(path, None)
    assert "converted" in opened.provenance()
    act, told = CHANGES[change]
    act(path)
    for read in (lambda: opened.checkpoint[QKV], opened.provenance, opened.checkpoint.check):
        with pytest.raises(CheckpointError, match=told):
            read()


def test_nothing_is_written_of_a_file_that_changed_after_it_was_measured(tmp_path):
    from attnlens.inspection import inspect, save_inspection

    path = tmp_path / "weights.safetensors"
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "model_args": NETWORK}))
    _weights(path)
    found = inspect(path)
    CHANGES["overwritten at its length and time"][0](path)
    with pytest.raises(CheckpointError, match="was replaced, cut or changed"):
        save_inspection(found, tmp_path / "out", "attnlens inspect")
    assert not list((tmp_path / "out").glob("*"))


# Disks.


@pytest.mark.usefixtures("fonts")
def test_full_and_read_only_disks_leave_the_old_outputs():
    reason = permitted()
    if reason:
        pytest.skip(reason)
    found = in_namespace(1, 0, "fit-params")
    assert found["by_case"] == {"full disk: fit-params": 1, "no inodes: fit-params": 1, "read-only disk: fit-params": 1}
    assert found["wrong"] == []
