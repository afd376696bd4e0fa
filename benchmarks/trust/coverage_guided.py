"""Coverage-guided fuzzing: ``python -m benchmarks.trust.coverage_guided --seconds N`` fills "coverage_guided".

Each of `parsers.PARSERS` is given what libFuzzer, through atheris, makes of its corpus by which branches an input
reaches. An assertion, an error that is not foreseen, a program that would be started, more than 512 MiB or ten seconds
of one input are findings: the input is kept under ``--findings`` and the exit code is 1. Needs the group "fuzz".
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_INSTRUMENTED = ("attnlens.checkpoints", "attnlens.strict_json", "attnlens.state", "pickletools", "json", "zipfile")
"""Modules whose branches are counted."""
MEMORY, SECONDS_EACH = 512, 10
"""MiB beyond what the process had before, and seconds, that one input may take."""


def search(name: str, folder: Path, arguments: list[str]) -> None:
    """Give a parser what libFuzzer makes of its corpus, which is put into the folder; it never returns."""
    import atheris

    with atheris.instrument_imports(include=list(_INSTRUMENTED)):
        from benchmarks.trust.parsers import PARSERS, corpus
    parse = PARSERS[name]
    for number, data in enumerate(corpus(name)):
        (folder / str(number)).write_bytes(data)
        parse(data)  # imports what it needs
    sys.addaudithook(_refuse)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 + MEMORY
    atheris.Setup([sys.argv[0], str(folder), *arguments, f"-rss_limit_mb={most}"], parse)
    atheris.Fuzz()


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect", "pty.spawn"):
        raise RuntimeError(f"{event} {arguments!r}")


def measure(name: str, seconds: int, findings: Path, seed: int) -> dict[str, Any]:
    """Search for so long in a process of its own; return how many inputs were tried and what was reached."""
    with tempfile.TemporaryDirectory() as folder:
        options = [
            *(f"-max_total_time={seconds}", f"-seed={seed}", "-print_final_stats=1", f"-timeout={SECONDS_EACH}"),
            *(f"-artifact_prefix={findings}/{name.replace(' ', '-')}-", "-max_len=65536"),
        ]
        command = [sys.executable, "-m", "benchmarks.trust.coverage_guided", "--search", name, folder, *options]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    started = re.search(r"seed corpus: files: (\d+)", done.stderr)
    lines = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)/", done.stderr)
    tried = re.search(r"stat::number_of_executed_units:\s+(\d+)", done.stderr)
    if not lines or tried is None or started is None:
        raise RuntimeError(done.stderr[-2000:])
    if done.returncode:
        sys.stderr.write(done.stderr[-4000:])
    return {
        "inputs": int(tried[1]),
        "seconds": seconds,
        "corpus_before": int(started[1]),
        "corpus_after": int(lines[-1][2]),
        "branches_before": int(lines[0][0]),
        "branches_after": int(lines[-1][0]),
        "findings": int(done.returncode != 0),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="of each parser")
    parser.add_argument("--only", default="", help="one parser")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="parsers at once")
    parser.add_argument(
        "--findings", type=Path, default=Path("findings"), help="folder for inputs that break a promise"
    )
    parser.add_argument("--no-record", action="store_true", help="leave trust.json as it is")
    if sys.argv[1:2] == ["--search"]:
        search(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
        return 0
    options = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        parser.error("atheris is missing: pip install --group fuzz")
    from benchmarks.trust.parsers import PARSERS
    from benchmarks.trust.record import record

    options.findings.mkdir(parents=True, exist_ok=True)
    began, names = time.monotonic(), [name for name in PARSERS if options.only in ("", name)]
    with ThreadPoolExecutor(options.jobs) as pool:
        place = options.findings.absolute()
        made = pool.map(lambda name: measure(name, options.seconds, place, options.seed), names)
        found = dict(zip(names, made, strict=True))
    counts = {"inputs": sum(one["inputs"] for one in found.values()), "by_parser": found}
    counts["findings"] = sum(one["findings"] for one in found.values())
    print(json.dumps(counts, indent=1))
    if not options.no_record:
        command = f"python -m benchmarks.trust.coverage_guided --seconds {options.seconds} --seed {options.seed}"
        record("coverage_guided", command, time.monotonic() - began, counts)
    return int(counts["findings"] > 0)


if __name__ == "__main__":
    sys.exit(main())
