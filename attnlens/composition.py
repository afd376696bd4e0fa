"""Composition of heads over layers: how much of what a head writes the query, key or value side of a later head reads.

Row vectors: head 1 adds x W_OV1 to the stream, W_OV1 = W_V1 @ W_O1. A later head scores y W_QK2 y'^T and adds y' W_OV2.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from attnlens.circuits import FactoredProduct, Fold, ov_circuit, parse_folds, qk_circuit
from attnlens.drawn import Drawn
from attnlens.errors import UnsupportedAttentionError, UsageError
from attnlens.heads import Array
from attnlens.layouts import AttentionSpec
from attnlens.layouts.spec import Slot
from attnlens.models.open import open_model
from attnlens.models.opened import Access, OpenedModel
from attnlens.provenance import run_provenance
from attnlens.statistics.table import Row, StatsTable, Tabular
from attnlens.strict_json import finite_or_none
from attnlens.threads import Progress, over_threads
from attnlens.vocabulary import COMPOSED, layer_choice, layer_index
from attnlens.words import counted

if TYPE_CHECKING:
    from torch import nn

    from attnlens.figures.drawings import Drawing

Composed = Literal["q", "k", "v"]
KINDS: tuple[Composed, ...] = ("q", "k", "v")
COLUMNS = ("kind", "from_layer", "from_head", "layer", "head", "fold", "score", "baseline", "deviation")
HELD = 1 << 28
"""Bytes of weights whose writers, and whose readers, are held at once: earlier layers are read again for each block."""

_BLOCK = 64  # rows and columns of Gram matrices held at once, of every head
_OF_PAIR = 1 << 10  # bytes that the arrays of a pair of layers take beside their entries

SCORES_HELD = 1 << 27
"""Bytes of scores and deviations that are held, beyond as many as the weights have in float64."""

Pair = tuple[Composed, int, int]
IndexedSpec = tuple[int, AttentionSpec]


@dataclass(frozen=True)
class Half:
    """One side of a product M1 @ M2 of stacks of d x d matrices, reduced to what the Frobenius norm needs.

    ``factor`` ``[head, rank, d]`` is R_A @ B^T of M = A @ B^T (of M2^T for the later side): ||M X|| = ||factor X||.
    """

    factor: Array
    squared_norm: Array
    concentration: Array
    """sum of s^4 / (sum of s^2)^2 over singular values s: 1/d for a multiple of a rotation, 1 for rank one"""

    @classmethod
    def of(cls, product: FactoredProduct) -> Half:
        """Reduce a stack of products, each at its unit scale: what is said of them is free of scale."""
        product, _ = product.unit
        factor = np.matmul(product.triangles[0], np.swapaxes(product.B, -1, -2))
        gram = np.matmul(factor, np.swapaxes(factor, -1, -2))
        squared_norm = np.trace(gram, axis1=-2, axis2=-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return cls(factor, squared_norm, (gram**2).sum((-2, -1)) / squared_norm**2)


def composition_scores(earlier: FactoredProduct | Half, later: FactoredProduct | Half) -> tuple[Array, Array]:
    """Return ||M1 @ M2||_F / (||M1||_F ||M2||_F) and its deviation, each ``[earlier head, later head]``.

    M1 = A1 @ B1^T and M2 = A2 @ B2^T with B1 and A2 ``[head, d, rank]``; no d x d product is formed:
    ||M1 M2||_F = ||R_A1 (B1^T A2) R_B2^T||_F with the triangular factors of A1 and B2, so that ||M1 M2||_F^2 =
    <(B1^T A2)^T (A1^T A1) (B1^T A2), B2^T B2>. NaN where M1 or M2 is zero. A `Half` for ``later`` is that of M2^T.

    Baseline: for M1 and M2 in directions that have nothing to do with each other, M1 U M2 with U uniform over
    rotations, the squared score has mean 1/d exactly, whatever the singular values, and variance
    2 (c1 - 1/d) (c2 - 1/d) / ((d - 1)(d + 2)) with c = sum s^4 / (sum s^2)^2. ``deviation`` is the squared score less
    1/d in units of that standard deviation. Source: Elhage et al. 2021, "A Mathematical Framework for Transformer
    Circuits", for the score; the baseline is derived in docs/scale.md.
    """
    first = earlier if isinstance(earlier, Half) else Half.of(earlier)
    second = later if isinstance(later, Half) else Half.of(later.T)
    ((squares,),) = _squared_norms([first.factor], [second.factor], [[True]])
    return _scores(squares, first, second)


def _scores(squares: Array, first: Half, second: Half) -> tuple[Array, Array]:
    d = first.factor.shape[-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = squares / np.multiply.outer(first.squared_norm, second.squared_norm)
        spread = np.multiply.outer(first.concentration - 1 / d, second.concentration - 1 / d)
        deviation = (share - 1 / d) / np.sqrt(2 * spread / ((d - 1) * (d + 2)))
    return np.sqrt(share), deviation


def _squared_norms(
    writers: Sequence[Array], readers: Sequence[Array], wanted: Sequence[Sequence[bool]]
) -> list[list[Array]]:
    """Return ||F_i G_j^T||_F^2 of stacks F ``[head, rank, d]`` and G, ``[head of F, head of G]``, by stack of each.

    It is <F_i^T F_i, G_j^T G_j>, block by block of the Gram matrices, of which the upper half is made: d^2 operations
    a pair of heads where F_i G_j^T takes 2 rank^2 d. Zeros where a pair of stacks is not ``wanted``.
    """
    d = readers[0].shape[-1]
    starts = np.cumsum([0, *map(len, writers)])
    runs = [[place for place, row in enumerate(wanted) if row[j]] for j in range(len(readers))]
    parts = [slice(start, start + _BLOCK) for start in range(0, d, _BLOCK)]

    def along(rows: slice) -> list[Array]:
        found = [np.zeros((starts[-1], len(stack))) for stack in readers]
        for cols in (part for part in parts if part.start >= rows.start):
            written = np.concatenate([_gram_block(stack, rows, cols) for stack in writers])
            written *= 1 if cols == rows else 2
            for sums, stack, run in zip(found, readers, runs, strict=True):
                if run:
                    some = slice(starts[run[0]], starts[run[-1] + 1])
                    sums[some] += written[some] @ _gram_block(stack, rows, cols).T
        return found

    by_reader = [np.maximum(sum(each), 0.0) for each in zip(*over_threads(along, parts), strict=True)]
    return [[sums[start:end] for sums in by_reader] for start, end in pairwise(starts)]


def _gram_block(factors: Array, rows: slice, cols: slice) -> Array:
    """Return a block of F^T F of every F ``[head, rank, d]``, in one row each."""
    return np.matmul(np.swapaxes(factors[..., rows], -1, -2), factors[..., cols]).reshape(len(factors), -1)


@dataclass(frozen=True, repr=False)
class Composition(Drawn, Tabular):
    """What `compose` found, by kind ("q", "k" or "v"), earlier layer and later layer."""

    model: str
    fold: Fold
    heads: Mapping[int, int]
    """Query heads of every layer that was read."""
    widths: Mapping[int, int]
    """Width of the stream each layer reads."""
    scores: Mapping[Pair, Array]
    """``[earlier head, later head]``"""
    deviations: Mapping[Pair, Array]
    leaves_out: Mapping[int, tuple[str, ...]]
    provenance: dict[str, Any]
    labels: Mapping[int, str] = field(default_factory=dict)
    """What else a reader must know of a layer, in words: how its layout was found."""

    def _table(self) -> StatsTable:
        return self.stats

    def _headline(self) -> str:
        return f"Composition of heads in {self.model}: {counted(len(self.heads), 'layer')}, {self.fold} products"

    def baseline(self, layer: int) -> float:
        """Return the root of the mean squared score of unrelated directions, 1 / sqrt(d)."""
        return self.widths[layer_index(layer, self.widths)] ** -0.5

    def array(self, kind: Composed) -> Array:
        """Return the scores as ``[earlier layer, head, later layer, head]``, layers in the order of ``heads``.

        NaN where there is no composition: no earlier layer, another stream, another width, a head that is not there.
        """
        kind = COMPOSED(kind)
        places = {layer: place for place, layer in enumerate(self.heads)}
        most = max(self.heads.values())
        found = np.full((len(places), most, len(places), most), np.nan)
        for (of, first, second), scores in self.scores.items():
            if of == kind:
                rows, columns = scores.shape
                found[places[first], :rows, places[second], :columns] = scores
        return found

    @property
    def stats(self) -> StatsTable:
        """The scores as a table, a row a pair of heads and kind."""
        return StatsTable(tuple(self.rows()), COLUMNS)

    def rows(self) -> Iterator[Row]:
        """Yield the rows of `stats`, one at a time."""
        for (kind, first, second), scores in self.scores.items():
            deviations, baseline = self.deviations[kind, first, second], self.baseline(second)
            for i, row in enumerate(zip(scores.tolist(), deviations.tolist(), strict=True)):
                for j, (score, deviation) in enumerate(zip(*row, strict=True)):
                    yield (kind, first, i, second, j, self.fold, score, baseline, deviation)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data: a matrix of scores for each pair of layers."""
        return {**self.about(), "pairs": [self.pair_json(pair) for pair in self.scores]}

    def about(self) -> dict[str, Any]:
        """Return what `to_json` says beside the scores."""
        about = {"model": self.model, "fold": self.fold, "provenance": self.provenance}
        layers = [
            {"layer": layer, "heads": self.heads[layer], "leaves_out": list(self.leaves_out[layer])}
            | {"label": self.labels.get(layer, "")}
            for layer in self.heads
        ]
        return {"schema": "attnlens.composition", "schema_version": 1, **about, "layers": layers}

    def pair_json(self, pair: Pair) -> dict[str, Any]:
        """Return what `to_json` says of a pair of layers."""
        about = {"kind": pair[0], "from_layer": pair[1], "layer": pair[2], "baseline": self.baseline(pair[2])}
        return about | {"scores": _plain(self.scores[pair]), "deviations": _plain(self.deviations[pair])}

    def _drawings(self) -> dict[str, Drawing]:
        """Return what draws ``q_composition``, ``k_composition`` and ``v_composition``."""
        from attnlens.figures.composition import draw_composition

        about = {"model": self.model, "fold": self.fold}
        return {
            f"{kind}_composition": partial(draw_composition, self.logs(kind), self.heads, kind, **about)
            for kind in KINDS
        }

    def logs(self, kind: Composed) -> dict[tuple[int, int], Array]:
        """Return log2(score / baseline), ``[earlier head, later head]`` by earlier and later layer."""
        kind = COMPOSED(kind)
        with np.errstate(divide="ignore"):
            return {
                (first, second): np.log2(scores / self.baseline(second))
                for (of, first, second), scores in self.scores.items()
                if of == kind
            }


def compose(
    model: str | os.PathLike[str] | nn.Module | None = None,
    checkpoint: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    num_heads: int | None = None,
    model_args: dict[str, Any] | None = None,
    input_size: int | tuple[int, ...] | None = None,
    fold: str = "effective",
    layers: Sequence[int] | int | str | None = None,
    weights: str | None = None,
    row_order: str | None = None,
    offline: bool = False,
    remote: bool = False,
    progress: Progress = iter,
) -> Composition:
    """Return how strongly every head composes with every head of an earlier layer, without a d x d product.

    With row vectors, for head 1 in an earlier layer and head 2 in a later one (see `composition_scores`):

    - Q: ||W_OV1 W_QK2||_F / (||W_OV1||_F ||W_QK2||_F), what head 1 wrote is the query;
    - K: ||W_OV1 W_QK2^T||_F / (||W_OV1||_F ||W_QK2||_F), what head 1 wrote is the key;
    - V: ||W_OV1 W_OV2||_F / (||W_OV1||_F ||W_OV2||_F), what head 1 wrote is carried on.

    ``fold`` is raw, effective (gain of the norm that head 2 reads, LayerScale behind head 1) or centred, as in
    `attnlens.circuits`. The model is given as to `inspect`. Only layers of one stream compose: those whose paths agree
    up to the first number and whose widths are equal. Memory: two layers' weights in float64 beside twice `HELD`.

    Raises `UsageError` for a fold that is not one of the three or a layer that cannot be read,
    `UnsupportedAttentionError` where no two layers compose, and what `inspect` raises.
    """
    wanted = layer_choice(layers)
    chosen = parse_folds(fold)
    if len(chosen) != 1:
        raise UsageError(f"fold {fold!r} is more than one: compose takes raw, effective or centred")
    if chosen[0] == "balanced":
        raise UsageError(
            "fold 'balanced' divides gains of its own out of each product, so that no two compose: use raw, effective "
            "or centred"
        )
    access = Access(offline=offline, remote=remote, network=weights, row_order=row_order)
    opened = open_model(model, checkpoint, num_heads, access, model_args=model_args, input_size=input_size)
    provenance = opened.provenance_beside()
    specs = opened.choose(wanted, chosen[0])
    _check_room(opened, specs)
    scores: dict[Pair, Array] = {}
    deviations: dict[Pair, Array] = {}
    work = _Work(opened, chosen[0])
    for block in progress(list(work.blocks(specs))):
        readers = [
            (later, kind, half)
            for later, found in zip(block, work.map(work.readers, block), strict=True)
            for kind, half in found.items()
        ]
        earlier = [spec for spec in specs if any(work.composes(spec, later) for later in block)]
        for some in work.blocks(earlier):
            found = work.scores(some, readers)
            scores |= {pair: score for pair, (score, _) in found.items()}
            deviations |= {pair: deviation for pair, (_, deviation) in found.items()}
    if not scores:
        raise UnsupportedAttentionError(
            f"no two layers of {opened.name} compose: of {counted(len(specs), 'layer')} none stands behind "
            "another of its width"
        )
    ordered = sorted(scores, key=lambda pair: (KINDS.index(pair[0]), pair[1:]))
    return Composition(
        model=opened.name,
        fold=chosen[0],
        heads={layer: spec.q.heads for layer, spec in specs},
        widths={layer: work.width(spec) for layer, spec in specs},
        scores={pair: scores[pair] for pair in ordered},
        deviations={pair: deviations[pair] for pair in ordered},
        leaves_out={layer: spec.leaves_out for layer, spec in specs},
        labels={layer: spec.label for layer, spec in specs},
        provenance={**provenance(), **run_provenance()},
    )


def _check_room(opened: OpenedModel, specs: Sequence[IndexedSpec]) -> None:
    """Raise `UsageError` where scores would take more than `SCORES_HELD` bytes beyond those of the weights."""
    heads = [spec.q.heads for _, spec in specs]
    pairs = (sum(heads) ** 2 - sum(number**2 for number in heads)) // 2
    of_layers = _OF_PAIR * (len(heads) * (len(heads) - 1) // 2)
    if len(KINDS) * (16 * pairs + of_layers) > SCORES_HELD + sum(opened.bytes_of(spec) for _, spec in specs):
        raise UsageError(
            f"{counted(pairs, 'pair')} of heads in {counted(len(specs), 'layer')} of {opened.name} are too many for "
            "weights of this size: choose fewer layers with --layers"
        )


class _Work:
    """Reads layers of one model and reduces them."""

    def __init__(self, opened: OpenedModel, fold: Fold) -> None:
        self._opened, self._fold = opened, fold

    def map(self, function: Callable[[IndexedSpec], Any], specs: Sequence[IndexedSpec]) -> list[Any]:
        """Apply a function that reads layers, in as many threads as memory has room for."""
        largest = max((self._opened.bytes_of(spec) for _, spec in specs), default=0)
        return over_threads(function, specs, largest=largest)

    def scores(
        self, earlier: Sequence[IndexedSpec], readers: Sequence[tuple[IndexedSpec, Composed, Half]]
    ) -> dict[Pair, tuple[Array, Array]]:
        """Return score and deviation of every pair of layers that compose, by what the later one reads."""
        found: dict[Pair, tuple[Array, Array]] = {}
        writers = self.map(self.writer, earlier)
        for d in dict.fromkeys(writer.factor.shape[-1] for writer in writers):  # of the same width alone
            first = [pair for pair in zip(earlier, writers, strict=True) if pair[1].factor.shape[-1] == d]
            second = [each for each in readers if each[2].factor.shape[-1] == d]
            wanted = [[self.composes(spec, later) for later, _, _ in second] for spec, _ in first]
            squares = _squared_norms([half.factor for _, half in first], [half.factor for *_, half in second], wanted)
            for i, (spec, writer) in enumerate(first):
                for j, (later, kind, reader) in enumerate(second):
                    if wanted[i][j]:
                        found[kind, spec[0], later[0]] = _scores(squares[i][j], writer, reader)
        return found

    def blocks(self, specs: Sequence[IndexedSpec]) -> Iterator[list[IndexedSpec]]:
        """Split the layers into runs whose readers, no larger than their weights, fit into `HELD`."""
        held = np.cumsum([self._opened.bytes_of(spec) for _, spec in specs]) // HELD
        for _, run in groupby(zip(specs, held, strict=True), key=lambda item: item[1]):
            yield [spec for spec, _ in run]

    def composes(self, first: IndexedSpec, second: IndexedSpec) -> bool:
        """Whether what the first layer writes is what the second reads: one stream, one width, one behind the other."""
        return (
            first[0] < second[0]
            and first[1].o is not None
            and _stream(first[1].path) == _stream(second[1].path)
            and self._outer(first[1].o) == self.width(second[1])
        )

    def width(self, spec: AttentionSpec) -> int:
        """Return the width a layer reads."""
        return self._outer(spec.q)

    def _outer(self, slot: Slot) -> int:
        """Return the width of the network's side of a projection: the other axis, flattened to two dimensions."""
        first, *rest = self._opened.architecture.shapes[slot.tensor.replace("{head}", "0")]
        return math.prod(rest) if slot.axis == 0 else first

    def writer(self, spec: IndexedSpec) -> Half:
        """Return what the heads of a layer write."""
        return Half.of(ov_circuit(self._opened.heads(spec[0]), self._fold))

    def readers(self, spec: IndexedSpec) -> dict[Composed, Half]:
        """Return what the heads of a layer read: each product transposed, as the later side of a composition."""
        weights = self._opened.heads(spec[0])
        qk = qk_circuit(weights, self._fold)
        found: dict[Composed, Half] = {"q": Half.of(qk.T), "k": Half.of(qk)}
        if "latent_query" in weights.leaves_out:
            del found["q"]
        if "cross" in weights.leaves_out:  # keys and values read the other stream
            return {"q": found["q"]}
        return found if weights.W_O is None else {**found, "v": Half.of(ov_circuit(weights, self._fold).T)}


@lru_cache(1 << 12)
def _stream(path: str) -> str:
    """Return what precedes the first number in a path: the layers of one tower share it."""
    parts = path.split(".")
    return ".".join(parts[: next((place for place, part in enumerate(parts) if part.isdigit()), len(parts))])


def _plain(values: Array) -> list[list[float | None]]:
    return [[finite_or_none(value) for value in row] for row in values.tolist()]
