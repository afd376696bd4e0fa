"""How many threads work: the user's number, else one of BLAS for each core that affinity, quota and load leave."""

import os
import platform
import subprocess
import sys
from threading import Event, current_thread

import pytest

from attnlens import threads
from attnlens.threads import available_cores, beside, free_cores, limited_to, over_threads


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that pretends a machine of eight cores with a quota, a load and so many running processes."""
    monkeypatch.setattr(threads, "CGROUPS", tmp_path)
    monkeypatch.setattr(threads, "LOAD", tmp_path / "loadavg")
    monkeypatch.setattr(threads, "_affinity", lambda: 8)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv(threads.USER, raising=False)

    def pretend(quota="", load=0.0, running=1, version=2):
        if version == 2:
            (tmp_path / "cpu.max").write_text(quota)
        else:
            for name, text in zip(("quota", "period"), quota.split(), strict=True):
                (tmp_path / f"cpu.cfs_{name}_us").write_text(f"{text}\n")
        monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
        if running is not None:
            (tmp_path / "loadavg").write_text(f"{load} 0.0 0.0 {running}/321 4567\n")

    return pretend


@pytest.mark.parametrize(
    ("quota", "version", "cores"),
    [
        ("max 100000", 2, 8),
        ("200000 100000", 2, 2),
        ("150000 100000", 2, 2),
        ("50000 100000", 2, 1),
        ("-1 100000", 1, 8),
        ("300000 100000", 1, 3),
        ("", 2, 8),
    ],
)
def test_a_control_groups_quota_bounds_the_cores(machine, quota, version, cores):
    machine(quota, version=version)
    assert available_cores() == cores


def test_the_users_number_and_a_share_bound_the_cores(machine, monkeypatch):
    machine("500000 100000")
    monkeypatch.setenv(threads.USER, "3")
    assert available_cores() == 3
    with limited_to(2):
        assert available_cores() == 2
    monkeypatch.setenv(threads.USER, "64")
    assert available_cores() == 5


@pytest.mark.parametrize(
    ("load", "running", "free"),
    [(0.0, 1, 8), (3.2, 4, 5), (3.2, 1, 8), (0.1, 4, 5), (50.0, 51, 1), (3.2, None, 5), (0.2, None, 8)],
    ids=["idle", "busy", "ended just now", "began just now", "crowded", "by the load", "idle by the load"],
)
def test_cores_are_free_that_nothing_else_keeps_busy(machine, load, running, free):
    machine(load=load, running=running)
    assert free_cores() == free


def test_a_machine_larger_than_the_quota_is_busy_elsewhere(machine):
    machine("200000 100000", load=5.0, running=6)
    assert free_cores() == 2


@pytest.mark.parametrize("cores", [1, 3])
def test_the_users_number_is_that_of_the_workers(machine, monkeypatch, cores):
    machine()
    monkeypatch.setenv(threads.USER, str(cores))
    found = set(over_threads(lambda _: current_thread().name, range(200)))
    assert len(found) <= cores


@pytest.mark.parametrize(("cores", "apart"), [(1, False), (2, True)])
def test_a_call_begins_beside_where_there_is_a_second_core(machine, monkeypatch, cores, apart):
    machine()
    monkeypatch.setenv(threads.USER, str(cores))
    began = Event()

    def work():
        began.set()
        return current_thread().name

    result = beside(work)
    assert began.wait(10 if apart else 0) == apart
    assert (result() != current_thread().name) == apart


def test_what_fails_beside_is_raised_where_the_result_is_asked_for(machine, monkeypatch):
    machine()
    monkeypatch.setenv(threads.USER, "2")
    result = beside(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        result()


PRINT_THREADS = """
import os, sys
import attnlens.cli.app as app
def told(*_, **__):
    import scipy.linalg, torch
    from threadpoolctl import threadpool_info
    blas = {found["num_threads"] for found in threadpool_info() if found["user_api"] == "blas"}
    print(sorted(blas), torch.get_num_threads())
app.app = told
from attnlens.cli import main
main()
"""


@pytest.mark.parametrize(("given", "blas"), [({}, "[1]"), ({"OMP_NUM_THREADS": "1"}, "[1]")])
def test_every_command_passes_the_guard(given, blas):
    plain = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", PRINT_THREADS], env={**plain, **given}, capture_output=True, text=True, check=True
    )
    found, _, torch_threads = done.stdout.strip().rpartition(" ")
    assert found == blas
    assert 1 <= int(torch_threads) <= available_cores()


FAULTS = """
import resource, sys
import numpy as np
from attnlens.threads import keep_memory, over_threads
if sys.argv[1] == "kept":
    keep_memory()
def work(seed):
    for size in np.random.default_rng(seed).integers(1 << 16, 1 << 21, 40):
        held = np.ones(size), np.ones(size // 3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
over_threads(work, range(8))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_threads_of_a_command_take_memory_from_the_kernel_once():
    free, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("free", "kept")
    )
    assert kept < free / 2
