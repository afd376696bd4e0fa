"""The tables of a composition, written pair by pair: all pairs of heads where they are few, else the strongest."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from attnlens.atomic import FileSet
from attnlens.composition import COLUMNS, KINDS, Composed, Composition, Pair
from attnlens.csv_text import write_csv
from attnlens.statistics.table import Row
from attnlens.strict_json import finite_or_none

MOST_PAIRS = 100_000
"""Pairs of heads of each kind that are written unasked: some 35 MB in all."""

Chosen = Mapping[Pair, NDArray[np.bool_]]


@dataclass(frozen=True)
class Written:
    """How many pairs of heads there are, kinds counted apart, and how many were written."""

    found: int
    written: int


def save_composition(
    found: Composition,
    folder: str | os.PathLike[str],
    command: str,
    files: FileSet | None = None,
    *,
    all_pairs: bool = False,
) -> Written:
    """Write ``composition.csv``, a row a pair of heads, and ``composition.json`` into ``folder``.

    Of a kind of which there are more than `MOST_PAIRS`, those of the largest score over baseline are written, unless
    ``all_pairs``: the JSON then has ``strongest`` in the place of matrices, ``[from_head, head, score, deviation]``.
    Neither text is ever in memory as a whole. They join ``files``, such as the figures of the same run, or make a set
    of their own; ``composition.json`` names the other files of the set with their sha256.
    """
    whole = all_pairs or all(_count(found, kind) <= MOST_PAIRS for kind in KINDS)
    chosen = None if whole else {pair: mask for kind in KINDS for pair, mask in _strongest(found, kind).items()}
    total = sum(scores.size for scores in found.scores.values())
    written = Written(total, total if chosen is None else sum(int(mask.sum()) for mask in chosen.values()))
    about = found.about()
    about["provenance"] = {**about["provenance"], "command": command}
    about["pairs_of_heads"] = {"found": written.found, "written": written.written}
    with ExitStack() as stack:
        files = files or stack.enter_context(FileSet())
        files.write(Path(folder) / "composition.csv", lambda file: write_csv(file, COLUMNS, _rows(found, chosen)))
        about["files"] = files.hashes()
        files.write(Path(folder) / "composition.json", lambda file: _write_json(file, about, found, chosen))
    return written


def _count(found: Composition, kind: Composed) -> int:
    return sum(scores.size for (of, *_), scores in found.scores.items() if of == kind)


def _strongest(found: Composition, kind: Composed) -> dict[Pair, NDArray[np.bool_]]:
    """Return which pairs of heads are among the `MOST_PAIRS` of the largest score over baseline, by pair of layers."""
    ratios = {
        pair: np.nan_to_num(scores, nan=-1.0) / found.baseline(pair[2])
        for pair, scores in found.scores.items()
        if pair[0] == kind
    }
    every = np.concatenate([ratio.ravel() for ratio in ratios.values()]) if ratios else np.empty(0)
    least = np.partition(every, -MOST_PAIRS)[-MOST_PAIRS] if every.size > MOST_PAIRS else 0.0
    return {pair: ratio >= max(least, 0.0) for pair, ratio in ratios.items()}


def _rows(found: Composition, chosen: Chosen | None) -> Iterator[Row]:
    if chosen is None:
        yield from found.rows()
        return
    for pair, mask in chosen.items():
        kind, first, second = pair
        for i, j, score, deviation in _kept(found, pair, mask):
            yield (kind, first, i, second, j, found.fold, score, found.baseline(second), deviation)


def _kept(found: Composition, pair: Pair, mask: NDArray[np.bool_]) -> Iterator[tuple[int, int, float, float]]:
    i, j = np.nonzero(mask)
    yield from zip(
        i.tolist(), j.tolist(), found.scores[pair][mask].tolist(), found.deviations[pair][mask].tolist(), strict=True
    )


def _write_json(file: IO[bytes], about: Mapping[str, Any], found: Composition, chosen: Chosen | None) -> None:
    file.write(json.dumps({**about, "pairs": []}).removesuffix("]}").encode())
    for number, pair in enumerate(found.scores):
        one = found.pair_json(pair) if chosen is None else _strongest_json(found, pair, chosen[pair])
        file.write((", " * bool(number) + json.dumps(one)).encode())
    file.write(b"]}\n")


def _strongest_json(found: Composition, pair: Pair, mask: NDArray[np.bool_]) -> dict[str, Any]:
    kind, first, second = pair
    rows = [[i, j, score, finite_or_none(deviation)] for i, j, score, deviation in _kept(found, pair, mask)]
    return {"kind": kind, "from_layer": first, "layer": second, "baseline": found.baseline(second), "strongest": rows}
