"""Disks that are full or read-only: a small tmpfs of its own, in a mount namespace that ends with this process.

``python -m benchmarks.trust.fault_disks --draws 4`` prints the counts as JSON; it starts itself again under
``unshare -r -m``, which an ordinary user may call where user namespaces are permitted.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

UNSHARE = ["unshare", "--map-root-user", "--mount", "--propagation", "private"]
ROOM = 32 << 20
"""Bytes of the tmpfs."""


def permitted() -> str:
    """Return why no private tmpfs can be mounted here, empty where one can."""
    if shutil.which("unshare") is None:
        return "there is no unshare"
    with TemporaryDirectory() as folder:
        script = f"mount -t tmpfs -o size=64k none {folder}"
        done = subprocess.run([*UNSHARE, "sh", "-c", script], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"no tmpfs may be mounted: {done.stderr.strip()}"


def in_namespace(draws: int, seed: int, commands: str) -> dict[str, Any]:
    """Run this module in a mount namespace of its own and return its counts."""
    module = [sys.executable, "-m", "benchmarks.trust.fault_disks", "--inside", "--draws", str(draws)]
    command = [*UNSHARE, *module, "--seed", str(seed), "--commands", commands]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


@dataclass
class Disk:
    """A tmpfs, and what became of the commands that met it full or read-only."""

    place: Path
    cases: Counter[str] = field(default_factory=Counter)
    tally: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def mount(self, options: str = "") -> None:
        """Mount it, empty."""
        with suppress(subprocess.CalledProcessError):
            self._call("umount", str(self.place))
        self._call("mount", "-t", "tmpfs", "-o", f"size={ROOM}{options}", "none", str(self.place))

    def read_only(self) -> None:
        """Let nothing be written any more, root included."""
        self._call("mount", "-o", "remount,ro", str(self.place))

    def leave_free(self, room: int) -> Path:
        """Fill it up to so many bytes."""
        ballast = self.place / "ballast"
        status = os.statvfs(self.place)
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, status.f_bavail * status.f_bsize - room))
        return ballast

    @staticmethod
    def _call(*command: str) -> None:
        subprocess.run(command, check=True, capture_output=True)

    def expect(self, what: str, met: list[str]) -> None:
        """Count a case and note what was wrong with it."""
        self.cases[what] += 1
        self.wrong += [f"{what}: {one}" for one in met]


def try_simple(disk: Disk, draws: int, rng: random.Random, work: Path, names: list[str]) -> None:
    """Meet a disk that fills at a random byte of the writing, one without inodes, and a read-only one."""
    from benchmarks.trust.fault_commands import measure, put_old, simple_commands
    from benchmarks.trust.fault_planted import half_done
    from benchmarks.trust.fault_runs import Child

    for command in simple_commands(work, names):
        measure(command, work, real=False)
        needed = sum(path.stat().st_size for path in (work / f"{command.name}-counted").rglob("*") if path.is_file())
        for kind in (*["full disk"] * draws, "no inodes", "read-only disk"):
            inodes = len(list((work / f"{command.name}-old").rglob("*"))) + 3  # and the folders above
            disk.mount(f",nr_inodes={inodes}" if kind == "no inodes" else "")
            folder = disk.place / "here"
            put_old(command, work, folder)
            if kind == "full disk":
                disk.leave_free(rng.randrange(int(0.9 * needed)))
            elif kind == "no inodes":
                with suppress(OSError):
                    for number in range(10):
                        (disk.place / str(number)).touch()
            else:
                disk.read_only()
            ended = Child(command.new, folder, words=work / "words").wait()
            met = half_done(command, folder, ended)
            if ended.code or command.name != "scan":  # whose files do not all need room at once
                met += _refused(ended, kind, folder)
            disk.expect(f"{kind}: {command.name}", met)


def _refused(ended: Any, kind: str, folder: Path, before: dict[str, str] | None = None) -> list[str]:
    from benchmarks.trust.fault_checks import contents, leftovers

    reason = os.strerror(errno.EROFS if kind == "read-only disk" else errno.ENOSPC)
    wrong = []
    if ended.code != 1 or not ended.one_line or reason not in ended.err:
        wrong.append(f"exit code {ended.code}, told: {ended.err}")
    if before is not None and contents(folder) != before:
        wrong.append("the old outputs are not what they were")
    if leftovers(folder):
        wrong.append("temporary files are left")
    return wrong


def try_comparison(disk: Disk, draws: int, rng: random.Random, work: Path) -> None:
    """Let a comparison meet a full disk, make room, and go on; then let the finished one meet a read-only disk."""
    from benchmarks.trust.fault_checks import contents, leftovers
    from benchmarks.trust.fault_commands import comparison, finished, fresh, often_saved, small_source
    from benchmarks.trust.fault_kills import resumable
    from benchmarks.trust.fault_runs import Child

    base = comparison(small_source(work))
    finished(Child(base, fresh(work / "whole")).wait())
    whole = contents(work / "whole" / "out")
    needed = sum(path.stat().st_size for path in (work / "whole").rglob("*") if path.is_file())
    for _ in range(draws):
        disk.mount()
        folder = fresh(disk.place / "here")
        ballast = disk.leave_free(rng.randrange(int(0.9 * needed)))
        ended = Child(base, folder, often_saved, words=work / "words").wait()
        met = [] if ended.code in (0, 1) and ended.one_line is (ended.code == 1) else [f"{ended.code}: {ended.err}"]
        disk.tally["comparisons that the full disk stopped"] += ended.code == 1
        met += ["temporary files are left"] * bool(leftovers(folder))
        runs = {name for name in contents(folder) if name.startswith("out/runs/")}
        ballast.unlink()
        if ended.code == 1:
            finished(Child(resumable(base, folder), folder, words=work / "words").wait())
        disk.tally["finished runs that were there then"] += len(runs)
        met += [] if contents(folder / "out") == whole else ["it differs from one never stopped"]
        disk.expect("full disk: train-compare, gone on with", met)
    disk.read_only()
    before = contents(folder)
    ended = Child(resumable(base, folder), folder, words=work / "words").wait()
    disk.expect("read-only disk: train-compare", _refused(ended, "read-only disk", folder, before))


def try_caches(disk: Disk, work: Path) -> None:
    """Run with the caches on a disk that is full, and on one that is read-only: that costs time, nothing else."""
    from benchmarks.trust.fault_commands import comparison, fresh, small_source
    from benchmarks.trust.fault_runs import Child

    for kind in ("full disk", "read-only disk"):
        disk.mount()
        disk.leave_free(0)
        if kind == "read-only disk":
            disk.read_only()

        def before() -> None:
            os.environ["XDG_CACHE_HOME"] = str(disk.place / "cache")

        for name, arguments in (
            ("inspect", ["inspect", "-o", "made"]),
            ("train-compare", comparison(small_source(work))),
        ):
            ended = Child(arguments, fresh(work / "cacheless"), before).wait()
            disk.expect(f"{kind}: cache of {name}", [] if ended.code == 0 else [f"exit code {ended.code}: {ended.err}"])


def main() -> None:
    """Print the counts as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", default="inspect,fit-params,init,train-compare,caches")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.inside:
        print(json.dumps(in_namespace(given.draws, given.seed, given.commands), indent=1))
        return
    from benchmarks.trust.fault_runs import warm

    with TemporaryDirectory() as work, TemporaryDirectory() as place:
        warm()
        os.environ["XDG_CACHE_HOME"] = f"{work}/cache"
        disk, rng, names = Disk(Path(place)), random.Random(given.seed), given.commands.split(",")
        try:
            try_simple(disk, given.draws, rng, Path(work), names)
            if "train-compare" in names:
                try_comparison(disk, given.draws, rng, Path(work))
            if "caches" in names:
                try_caches(disk, Path(work))
        finally:
            subprocess.run(["umount", place], check=False, capture_output=True)
    print(json.dumps({"cases": sum(disk.cases.values()), "wrong": disk.wrong, "by_case": disk.cases, **disk.tally}))


if __name__ == "__main__":
    main()
