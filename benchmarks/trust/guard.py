"""What must hold while a hostile file is read, watched from the interpreter, the kernel and the process's memory.

A case is tried in a child forked from a process in which every reader has run before. There

* an audit hook sees each program started, socket opened, module imported, code executed, file opened or written;
* inotify sees every access to the folder that nobody may touch, by native code too;
* the kernel's high-water mark of resident memory is reset before the case and read after it, without the pages of
  libraries' code, which a forked child maps anew as it runs through them;
* processor time is measured, and the parent kills a child that does not come back.

What is refused must be an `AttnlensError` of one printable, bounded line; what is printed must be printable.
"""

from __future__ import annotations

import ctypes
import gc
import io
import json
import os
import select
import shutil
import signal
import struct
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from attnlens.errors import AttnlensError
from attnlens.printable import LONGEST

SECONDS = 20.0
"""Processor time a case may take."""
PATIENCE = 300.0
"""Time by the clock in which a case's process may stand still, waiting for another, before it is killed.

A process that does not get a processor, on a machine that does other work, does not stand still.
"""
_LOOK = 5.0
"""Seconds between two looks at a process that has not answered."""
KINDS = ("code", "outside", "memory", "error", "text", "timeout", "crash")
"""The violations."""

_CODE = {
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn", "subprocess.Popen"),
    *(
        "socket.connect",
        "socket.bind",
        "socket.getaddrinfo",
        "socket.sendto",
        "socket.gethostbyname",
        "pickle.find_class",
    ),
    *("ctypes.dlopen", "ctypes.dlsym", "marshal.loads", "code.__new__", "exec", "import", "urllib.Request"),
}
_READS = {"open", "os.listdir", "os.scandir"}
_WRITES = {
    *("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate", "os.chmod", "os.chown"),
    *("shutil.move", "shutil.rmtree", "shutil.copyfile", "tempfile.mkstemp", "tempfile.mkdtemp", "os.mknod"),
}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_IN_ALL = 0x00000FFF


@dataclass(frozen=True)
class Link:
    """A symbolic link to be made."""

    target: str


@dataclass(frozen=True)
class Case:
    """Files to be written into an empty folder, and which of them a reader is given."""

    format: str
    what: str
    files: Mapping[str, bytes | Link]
    given: str = ""
    made: str = "by hand"
    """By whom: by hand, by mutation of a valid file, or built whole."""

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(len(content) for content in self.files.values() if isinstance(content, bytes))


@dataclass
class Outcome:
    """What became of a case: ``accepted``, ``refused``, or a violation of `KINDS`."""

    case: Case
    verdict: str
    detail: str = ""
    growth: int = 0
    seconds: float = 0.0
    size: int = 0
    passed: bool = False
    """Whether the parser took the file, whatever was refused behind it."""


@dataclass(frozen=True)
class Bound:
    """Resident memory a reader may take beyond what it had: ``multiple`` for each byte of file, and a constant."""

    multiple: int
    constant: int

    def of(self, size: int) -> int:
        """Return the bytes allowed for files of a size."""
        return self.multiple * size + self.constant


WEIGHTS = Bound(64, 64 << 20)
"""Of readers of weights and JSON. Python's objects of a document of ``[[],[],...`` take thirty times its length."""
IMAGES = Bound(256, 320 << 20)
"""Of readers of images: decoded, stacked and split, each 64 times the file and 64 MiB at most."""

Reader = Callable[[Path, Path], None]
"""Reads what lies at the first path, may write below the second."""


def _callers() -> Iterator[str]:
    """Yield the modules of the functions that lead to the audit hook, the nearest first."""
    frame = sys._getframe(2)  # noqa: SLF001
    while frame is not None:
        yield str(frame.f_globals.get("__name__"))
        frame = frame.f_back


class _Blocked(BaseException):
    """Raised inside an operation that must not happen, so that it does not."""


@dataclass
class _Watch:
    """What the audit hook sees while it is armed."""

    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    armed: bool = False
    passed: bool = False
    """Whether a reader has told that the parser is behind it."""
    seen: list[tuple[str, str]] = field(default_factory=list)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        # ast.literal_eval, with which numpy reads its headers, compiles and runs nothing
        compiles = event == "compile" and sys._getframe(1).f_code.co_name != "parse"  # noqa: SLF001
        # to set its number of threads threadpoolctl asks the BLAS that is loaded; before 3.8 it opens it anew each time
        asked = event in ("ctypes.dlopen", "ctypes.dlsym") and "threadpoolctl" in islice(_callers(), 6)
        if (event in _CODE and not asked) or compiles:
            self._block("code", f"{event} {arguments!r:.300}")
        elif event in _READS and isinstance(arguments[0], str | bytes | os.PathLike):
            writing = event == "open" and bool(arguments[2] & _WRITING)
            self._path(event, arguments[0], self.writes if writing else self.reads + self.writes)
        elif event in _WRITES:
            for path in arguments[: 2 if event in ("os.rename", "os.link", "shutil.move") else 1]:
                if isinstance(path, str | bytes | os.PathLike):
                    self._path(event, path, self.writes)

    def _path(self, event: str, path: Any, allowed: tuple[str, ...]) -> None:
        text = os.fsdecode(path)
        real = "" if "\0" in text else os.path.realpath(text)  # raises no event of its own
        if real and not any(real == place or real.startswith(f"{place}/") for place in allowed):
            self._block("outside", f"{event} {real}")

    def _block(self, kind: str, detail: str) -> None:
        self.seen.append((kind, detail))
        raise _Blocked(detail)


_watch = _Watch()
_hooked: list[bool] = []


def passed() -> None:
    """Tell, from within a reader, that the parser took the file."""
    _watch.passed = True


class Guard:
    """Tries cases; make one after every reader has run once, in a process with one thread."""

    def __init__(self, readers: Mapping[str, tuple[Reader, Bound]], folder: Path, forbidden: Path, cache: Path) -> None:
        self.readers, self.folder, self.forbidden = readers, folder, forbidden
        self.canary = Path("CANARY").absolute()
        installed = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), str(Path(__file__).parents[2])}
        system = (
            "/proc/self",
            "/proc/cpuinfo",
            "/proc/loadavg",
            "/proc/meminfo",
            "/sys/devices",
            "/sys/fs/cgroup",
            "/dev/null",
            "/dev/urandom",
            str(cache),
        )
        _watch.reads = tuple(os.path.realpath(place) for place in (*installed, *system) if place != "/proc/self")
        _watch.reads += ("/proc/self", f"/proc/{os.getpid()}")
        self._cache = str(cache.resolve())
        if not _hooked:
            sys.addaudithook(_watch)
            _hooked.append(True)
        libc = ctypes.CDLL(None)
        self._trim = libc.malloc_trim
        gc.collect()
        gc.freeze()  # a collection in a child would otherwise touch, and so copy, every object there is
        self._trim(0)
        self._notify = libc.inotify_init1(os.O_NONBLOCK)
        for place in (forbidden, *(path for path in forbidden.rglob("*") if path.is_dir())):
            libc.inotify_add_watch(self._notify, os.fsencode(place), _IN_ALL)

    def try_all(self, cases: Sequence[Case], batch: int = 50) -> Iterator[Outcome]:
        """Try cases in children of this process, a batch each, and yield what became of each."""
        waiting = list(cases)
        while waiting:
            outcomes = self._batch(waiting[:batch])
            yield from outcomes
            waiting = waiting[len(outcomes) :]

    def _batch(self, cases: Sequence[Case]) -> list[Outcome]:
        here, there = os.pipe()
        failure = self.folder / "failure"
        child = os.fork()
        if child == 0:
            os.close(here)
            try:
                self._serve(cases, there)
            except BaseException:  # noqa: BLE001  # the child must not go on as its parent would
                _watch.armed = False
                failure.write_text(traceback.format_exc())
            finally:
                os._exit(1)
        os.close(there)
        outcomes: list[Outcome] = []
        pending = b""
        while len(outcomes) < len(cases):
            data = os.read(here, 1 << 16) if _answers(here, child) else None
            if not data:
                case, verdict = cases[len(outcomes)], "timeout" if data is None else "crash"
                os.kill(child, signal.SIGKILL)
                outcomes.append(
                    Outcome(
                        case,
                        verdict,
                        f"no end after {SECONDS:g} s of processor time, or stands still"
                        if data is None
                        else _last(failure),
                    )
                )
                break
            pending += data
            *lines, pending = pending.split(b"\n")
            for line in lines:
                outcomes.append(Outcome(cases[len(outcomes)], *json.loads(line)))
        os.close(here)
        os.waitpid(child, 0)
        return outcomes

    def _serve(self, cases: Sequence[Case], there: int) -> None:
        """Try cases in the child; it never returns."""
        quiet = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(quiet, descriptor)
        _watch.reads += (f"/proc/{os.getpid()}",)
        for number, case in enumerate(cases):
            folder = self.folder / f"{os.getpid()}-{number}"
            given, output = folder / "given", folder / "output"
            output.mkdir(parents=True)
            write_files(given, case.files)
            result = self._try(case, given, output)
            if any(
                output.glob("attnlens-*")
            ):  # unpacked, and held by a circle: removed with it, now and not in a later try
                gc.collect()
            shutil.rmtree(folder)
            os.write(there, json.dumps(result).encode() + b"\n")
        os._exit(0)

    def _try(self, case: Case, given: Path, output: Path) -> tuple[str, str, int, float, int, bool]:
        reader, bound = self.readers[case.format]
        said = io.StringIO()
        sys.stdout = sys.stderr = said
        _watch.seen.clear()
        _watch.passed = False
        before = _watch.reads
        _watch.reads = (*before, os.path.realpath(given))
        _watch.writes = (os.path.realpath(output), self._cache)
        self._drain()
        self._trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        (base, mapped), began = _memory("VmRSS", "RssFile"), time.process_time()
        verdict, detail, refused = "accepted", "", None
        tempfile.tempdir = str(output)  # archives are unpacked there
        _watch.armed = True
        try:
            reader(given / case.given, output)
        except AttnlensError as error:
            refused = error
        except _Blocked as error:
            verdict, detail = "outside", f"{error}{_place(error)}"  # what was seen says which kind it was
        except BaseException as error:  # noqa: BLE001  # whatever it is, it is the finding
            verdict, detail = "error", f"{type(error).__name__}: {error}{_place(error)}"
        finally:
            _watch.armed = False
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        if refused is not None:
            verdict, detail = _judged(str(refused))
        seconds, (peak, after) = time.process_time() - began, _memory("VmHWM", "RssFile")
        growth = max(0, peak - base - max(0, after - mapped))
        _watch.reads = before
        text = said.getvalue()
        if any(not (c.isprintable() or c in "\n\t") for c in text):
            verdict, detail = "text", f"printed {text!r:.200}"
        if growth > bound.of(case.size):
            verdict, detail = "memory", f"{growth} bytes for a file of {case.size}; {detail}"
        if seconds > SECONDS:
            verdict, detail = "timeout", f"{seconds:.1f} s of processor time; {detail}"
        if touched := self._drain():
            verdict, detail = "outside", f"inotify saw {touched}"
        if _watch.seen:
            kind, what = _watch.seen[0]
            verdict, detail = kind, f"{what}; {detail if what not in detail else detail.removeprefix(what)}"
        if self.canary.exists():
            self.canary.unlink()
            verdict, detail = "code", "the canary was written"
        return verdict, detail, growth, round(seconds, 3), case.size, _watch.passed

    def _drain(self) -> list[str]:
        """Return the names that were touched in the forbidden folder since the last call."""
        try:
            data = os.read(self._notify, 1 << 16)
        except BlockingIOError:
            return []
        names, start = [], 0
        while start < len(data):
            _, mask, _, length = struct.unpack_from("iIII", data, start)
            names.append(f"{data[start + 16 : start + 16 + length].rstrip(bytes(1)).decode()} {mask:x}")
            start += 16 + length
        return names


def _answers(pipe: int, child: int) -> bool:
    """Wait for an answer, or the end, of a child; False where it takes too much processor time, or stands still."""
    start, last, still = _used(child), 0.0, 0.0
    while not select.select([pipe], [], [], _LOOK)[0]:
        used = _used(child) - start
        still = 0.0 if used > last or _state(child) == "R" else still + _LOOK
        last = used
        if used > SECONDS + _LOOK or still > PATIENCE:
            return False
    return True


def _used(process: int) -> float:
    """Return the seconds of processor time a process has taken."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _state(process: int) -> str:
    """Return R for a process that runs or waits for a processor, another letter for one that waits otherwise."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


def _last(failure: Path) -> str:
    """Return why a child ended."""
    if not failure.exists():
        return "the child ended"
    text = failure.read_text()
    failure.unlink()
    return text[-500:]


def _judged(text: str) -> tuple[str, str]:
    """Judge the text of an error: one printable line of bounded length."""
    if not text.isprintable() or len(text) > LONGEST or not text:
        return "text", f"{len(text)} characters: {text!r:.200}"
    return "refused", text


def _place(error: BaseException) -> str:
    """Return the last line of attnlens an error passed through."""
    place, trace = "", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if "attnlens" in name:
            place = f" at {Path(name).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _memory(*lines: str) -> list[int]:
    """Return lines of /proc/self/status in bytes."""
    with open("/proc/self/status") as file:  # noqa: PTH123  # some microseconds, for every input
        found = dict(text.split(":", 1) for text in file)
    return [int(found[line].split()[0]) * 1024 for line in lines]


def write_files(folder: Path, files: Mapping[str, bytes | Link]) -> None:
    """Write the files of a case."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Link):
            path.symlink_to(content.target)
        else:
            path.write_bytes(content)
