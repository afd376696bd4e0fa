"""The measurement of whole commands: what a process takes, what the table says of goals, that it is current."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from attnlens.checkpoints import open_checkpoint
from attnlens.models.open import open_model
from benchmarks.speed.__main__ import RESULTS, Bench, command
from benchmarks.speed.process import Run, busy_process, run, summary
from benchmarks.speed.rows import ROWS, Row
from benchmarks.speed.table import PAGE, fill, goals
from benchmarks.speed.weights import write_attention

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
BURNS = """
import time
held = bytearray(200 << 20)
end = time.process_time() + 0.5
while time.process_time() < end: pass
time.sleep(0.5)
print("done")
"""


def test_a_process_is_measured_alone():
    ours = bytearray(400 << 20)  # of the parent: it must not count
    found = run([sys.executable, "-c", BURNS], os.environ, 60)
    assert found.output == "done\n"
    assert 0.5 <= found.cpu < found.wall
    assert found.wall >= 1.0
    assert 200 <= found.private_mib < 260 < len(ours) >> 20
    assert 200 <= found.peak_mib < 300


def test_a_failure_and_a_limit_are_told():
    with pytest.raises(subprocess.CalledProcessError):
        run([sys.executable, "-c", "raise SystemExit(3)"], os.environ, 60)
    with pytest.raises(subprocess.TimeoutExpired):
        run([sys.executable, "-c", "import time; time.sleep(60)"], os.environ, 0.2)


def test_the_busy_process_ends_with_its_block():
    def running():
        commands = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):  # ended since
                commands.append(path.read_bytes())
        return any(b"while True: pass" in command for command in commands)

    with busy_process():
        assert running()
    assert not running()


def entry(wall, **more):
    return {**summary([Run(wall, wall, 90.0, 80.0, "")]), **more}


def test_a_goal_is_met_or_the_table_says_by_how_much_it_is_not():
    row = Row("x", lambda *_: (), goals={"wall": 2.0, "busy": 4.0, "private_mib": 30.0}, above="base", why="it waits")
    base = {"base": entry(1.0) | {"private_mib": {"median": 60.0}}}
    assert goals(row, entry(1.5, busy=entry(3.0)), base) == (
        "2 s: met (1.5); 4 s beside a busy process: met (3); 30 MiB private above imports: met (20)"
    )
    assert goals(row, entry(3.0), base) == (
        "2 s: missed by 1, 1.50 times (3); 30 MiB private above imports: met (20). Why: it waits"
    )


def test_the_line_that_ran_holds_no_folder_of_the_machine():
    ran = command(["--bench-python", "/some/where/bin/python", "--rows", "help"])
    assert ran == "python -m benchmarks.speed --bench-python python --rows help"


def test_every_row_with_a_goal_says_why_it_may_be_missed_and_can_be_run(tmp_path):
    for row in ROWS.values():
        assert row.why or not row.goals
        assert row.above in ROWS or (not row.above and "private_mib" not in row.goals)
        assert row.make(tmp_path / "weights", tmp_path)[0] == sys.executable


def test_a_row_is_run_in_a_cache_of_its_own(tmp_path):
    found = Bench(tmp_path, sys.executable, 60).row(ROWS["help"])
    assert "train-compare" in found.output


def test_the_giants_file_holds_what_is_read_and_is_as_long_as_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.speed.weights.PARAMETERS", {"test_vit": 1_000_000})
    write_attention("test_vit", tmp_path / "a.safetensors")
    found = open_checkpoint(tmp_path / "a.safetensors")
    assert sum(np.prod(found.shape(name)) for name in found) == 1_000_000
    assert np.isfinite(open_model(None, tmp_path / "a.safetensors").heads(0).W_Q).all()


@pytest.mark.skipif(not RESULTS.is_file(), reason="nothing was measured")
def test_the_table_is_what_the_results_say():
    assert fill(json.loads(RESULTS.read_text())) == PAGE.read_text()
