"""Counts of what became of inputs: additive, so that a long run is kept piece by piece and gone on with.

A file of pieces begins with what it is of: the sources and the seed. Several processes may append to it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from attnlens.errors import UsageError
from benchmarks.trust.guard import IMAGES, KINDS, WEIGHTS, Outcome

Tally = dict[str, Any]
_IMAGE = ("image folder", "image tar", "decoded cache")
_COUNTS = ("inputs", "past_parser", "accepted", "refused")
_ROOT = Path(__file__).parents[2]


def tally(outcomes: Sequence[Outcome], seconds: float) -> Tally:
    """Return the counts of some outcomes."""
    parts: dict[str, dict[str, int]] = {}
    for outcome in outcomes:
        part = parts.setdefault(f"{outcome.case.format}|{outcome.case.made}", dict.fromkeys(_COUNTS, 0))
        part["inputs"] += 1
        part["past_parser"] += outcome.passed
        if outcome.verdict in part:
            part[outcome.verdict] += 1
    largest = {
        "growth": max((o.growth for o in outcomes), default=0),
        "weights": _multiple(outcomes, image=False),
        "images": _multiple(outcomes, image=True),
        "large": max((o.growth / o.size for o in outcomes if o.size >= 1 << 20), default=0.0),
        "seconds": max((o.seconds for o in outcomes), default=0.0),
    }
    found = [[o.verdict, o.case.format, o.case.made, o.case.what, o.detail] for o in outcomes if o.verdict in KINDS]
    return {"parts": parts, "largest": largest, "violations": found, "seconds": seconds}


def _multiple(outcomes: Iterable[Outcome], *, image: bool) -> float:
    constant = (IMAGES if image else WEIGHTS).constant
    chosen = [o for o in outcomes if (o.case.format in _IMAGE) == image]
    return max((max(o.growth - constant, 0) / max(o.size, 1) for o in chosen), default=0.0)


def together(tallies: Iterable[Tally]) -> Tally:
    """Return the counts of several pieces."""
    whole: Tally = {"parts": {}, "largest": {}, "violations": [], "seconds": 0.0}
    for one in tallies:
        for name, part in one["parts"].items():
            known = whole["parts"].setdefault(name, dict.fromkeys(_COUNTS, 0))
            whole["parts"][name] = {count: known[count] + part[count] for count in _COUNTS}
        for name, value in one["largest"].items():
            whole["largest"][name] = max(value, whole["largest"].get(name, 0))
        whole["violations"] += one["violations"]
        whole["seconds"] += one["seconds"]
    return whole


def counts(whole: Tally) -> dict[str, Any]:
    """Return what trust.json says of the counts."""
    parts, largest = whole["parts"], whole["largest"]
    by_format: dict[str, dict[str, Any]] = {}
    for name, part in sorted(parts.items()):
        form, _, made = name.partition("|")
        by_format.setdefault(form, {})[made] = {**part, "past_parser_share": _share(part)}
    made = {name.partition("|")[2] for name in parts}
    by_making = {one: _summed(part for name, part in parts.items() if name.endswith(f"|{one}")) for one in sorted(made)}
    kinds = [violation[0] for violation in whole["violations"]]
    return {
        **_summed(parts.values()),
        **{f"violations_{kind}": kinds.count(kind) for kind in KINDS},
        "by_making": by_making,
        "by_format": by_format,
        "largest_growth_bytes": largest["growth"],
        "largest_multiple_beyond_the_constant": {name: round(largest[name], 1) for name in ("weights", "images")},
        "largest_multiple_of_files_over_1_MiB": round(largest["large"], 1),
        "longest_seconds": largest["seconds"],
        "inputs_per_second": round(sum(part["inputs"] for part in parts.values()) / max(whole["seconds"], 1e-9), 1),
        "bounds": {"weights and JSON": vars(WEIGHTS), "images": vars(IMAGES)},
    }


def _summed(parts: Iterable[dict[str, int]]) -> dict[str, Any]:
    found = dict.fromkeys(_COUNTS, 0)
    for part in parts:
        found = {name: found[name] + part[name] for name in _COUNTS}
    return {**found, "past_parser_share": _share(found)}


def _share(part: dict[str, int]) -> float:
    return round(part["past_parser"] / max(part["inputs"], 1), 3)


class Kept:
    """Pieces in a file, a line each; without a path they are kept in memory alone."""

    def __init__(self, path: Path | None, seed: int) -> None:
        self.path, self._memory = path, {}
        head = {"sources": sources(), "seed": seed}
        if path is None:
            return
        with path.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            first = file.readline()
            if not first:
                file.write(json.dumps(head) + "\n")
            elif json.loads(first) != head:
                raise UsageError(f"{path} is of other sources, or of another seed: name another file")

    def add(self, piece: str, found: Tally) -> None:
        """Keep the counts of a piece."""
        self._memory[piece] = found
        if self.path is not None:
            with self.path.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write("\n" + json.dumps({"piece": piece, **found}) + "\n")  # behind what a killed process left

    def pieces(self) -> dict[str, Tally]:
        """Return the pieces there are, those of other processes among them; half a line counts for nothing."""
        if self.path is None:
            return dict(self._memory)
        found = {}
        for line in filter(None, self.path.read_text().splitlines()[1:]):
            try:
                one = json.loads(line)
            except ValueError:  # the end of a process that was killed
                continue
            found[one.pop("piece")] = one
        return found


def sources() -> str:
    """Return the digest of the package and of this harness: what was tried, and by what."""
    digest = hashlib.sha256()
    for folder in ("attnlens", "benchmarks/trust"):
        for path in sorted((_ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(_ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()
