"""Readers with a defect each: ``python -m benchmarks.trust.planted`` shows that the guard catches every one.

A check that cannot fail says nothing. Each reader here breaks one promise in one way; the guard must name it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from attnlens.errors import CheckpointError
from benchmarks.trust.guard import Bound, Case, Reader

BOUND = Bound(64, 64 << 20)


class _RawError(CheckpointError):
    """An error that passes on what a file says as it is."""

    __str__ = Exception.__str__


def executes(path: Path, _output: Path) -> None:
    os.system(path.read_text())  # noqa: S605


def executes_natively(_path: Path, _output: Path) -> None:
    from safetensors.numpy import save_file

    save_file({}, "CANARY")  # by a system call of its own, which no audit hook hears of


def starts_a_program(_path: Path, _output: Path) -> None:
    subprocess.run(["true"], check=False)


def evaluates(_path: Path, _output: Path) -> None:
    eval("1 + 1")  # noqa: S307


def unpickles(_path: Path, _output: Path) -> None:
    import pickle

    pickle.loads(b"ccollections\nOrderedDict\n)R.")  # noqa: S301


def imports(_path: Path, _output: Path) -> None:
    __import__("antigravity")


def connects(_path: Path, _output: Path) -> None:
    import socket

    socket.create_connection(("127.0.0.1", 9), timeout=1)


def reads_outside(_path: Path, _output: Path) -> None:
    Path("FORBIDDEN/secret.json").read_text()


def reads_outside_natively(_path: Path, _output: Path) -> None:
    from safetensors import safe_open

    with safe_open("FORBIDDEN/secret.safetensors", framework="numpy") as file:
        file.keys()


def lists_outside(_path: Path, _output: Path) -> None:
    os.listdir("FORBIDDEN")  # noqa: PTH208


def follows_a_link(path: Path, _output: Path) -> None:
    path.with_name("link").read_bytes()


def writes_outside(path: Path, _output: Path) -> None:
    (path.parent / "new").write_text("x")


def renames_outside(_path: Path, output: Path) -> None:
    (output / "a").write_text("x")
    (output / "a").rename("FORBIDDEN/a")


def allocates(_path: Path, _output: Path) -> None:
    bytearray(200 << 20)


def allocates_and_refuses(_path: Path, _output: Path) -> None:
    bytearray(200 << 20)
    raise CheckpointError("too large")


def raises_a_key_error(_path: Path, _output: Path) -> None:
    raise KeyError("name")


def breaks_the_line(_path: Path, _output: Path) -> None:
    raise _RawError("two\nlines")


def passes_escapes_on(_path: Path, _output: Path) -> None:
    raise _RawError("\x1b[2J")


def never_stops_talking(_path: Path, _output: Path) -> None:
    raise _RawError("x" * 100_000)


def prints_escapes(_path: Path, _output: Path) -> None:
    print("\x1b]0;title\x07")


def never_ends(_path: Path, _output: Path) -> None:
    while True:
        pass


def waits_for_ever(_path: Path, _output: Path) -> None:
    os.read(os.pipe()[0], 1)


def dies(_path: Path, _output: Path) -> None:
    os.abort()


def reads(path: Path, output: Path) -> None:
    (output / "copy").write_bytes(path.read_bytes())


def refuses(path: Path, _output: Path) -> None:
    raise CheckpointError(f"{path} \x1b[2J is\nrefused")


PLANTED: dict[Reader, str] = {
    **dict.fromkeys((executes, executes_natively, starts_a_program, evaluates, unpickles, imports, connects), "code"),
    **dict.fromkeys((reads_outside, reads_outside_natively, lists_outside, follows_a_link), "outside"),
    **dict.fromkeys((writes_outside, renames_outside), "outside"),
    **dict.fromkeys((allocates, allocates_and_refuses), "memory"),
    **dict.fromkeys((breaks_the_line, passes_escapes_on, never_stops_talking, prints_escapes), "text"),
    raises_a_key_error: "error",
    never_ends: "timeout",
    waits_for_ever: "timeout",
    dies: "crash",
    reads: "accepted",
    refuses: "refused",
}
"""What the guard must call each; the last two break nothing."""


def judged() -> dict[str, tuple[str, str]]:
    """Return by reader what the guard must call it, and what it calls it."""
    from benchmarks.trust import guard
    from benchmarks.trust.guard import Guard, Link
    from benchmarks.trust.hostile import Workshop

    guard.SECONDS, guard.PATIENCE = 4.0, 15.0
    workshop = Workshop({})
    readers = {reader.__name__: (reader, BOUND) for reader in PLANTED}
    try:
        files = {"file": b"touch CANARY", "link": Link(str(workshop.forbidden / "secret.json"))}
        cases = [Case(name, "planted", files, "file") for name in readers]
        watch = Guard(readers, workshop.tries, workshop.forbidden, workshop.folder / "cache")
        found = list(watch.try_all(cases))
    finally:
        workshop.close()
    return {o.case.format: (expected, o.verdict) for o, expected in zip(found, PLANTED.values(), strict=True)}


if __name__ == "__main__":
    results = judged()
    print(json.dumps(results, indent=1))
    sys.exit(any(expected != found for expected, found in results.values()))
