"""The order of the rows of a packed projection: named, and held against what the weights themselves show.

Weight decay and the symmetry v_i -> c v_i, o_i -> o_i / c tie the norm of unit i's row of W_V to that of its column of
W_O. Over the units of a layer the two logarithms are correlated where rows are read in the right order, and are not
where they are read in a wrong one. An untrained file shows nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnlens.checkpoints import Checkpoint
from attnlens.errors import CheckpointError, UsageError
from attnlens.words import counted

STANDARD = "qkv,head,dim"
KNOWN = (STANDARD, "head,qkv,dim", "head,dim,qkv", "qkv,dim,head", "dim,qkv,head", "dim,head,qkv")
"""Orders that are tried: axes from the outermost to the innermost."""
CONFIGURED = {
    "codegen": "4,qvk,head,dim",
    "gpt_neox": "head,qkv,dim",
    "gpt_neox_japanese": "head,qkv,dim",
    "bloom": "head,qkv,dim",
    "persimmon": "head,qkv,dim",
    "gpt_bigcode": "head,qkv,dim",
}
"""Orders of models of transformers whose code says so; GPTBigCode without its shared keys."""
CONTRADICTED = 0.35
"""Correlation from which another order is believed: right orders have .58 to .97, wrong ones at most .28."""
FITS = 0.35
_LAYERS = 8
"""Layers that are looked at, spread over the depth."""

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Packed:
    """One layer's packed projection: its tensor, the output projection, whether rows are columns."""

    qkv: str
    o: str
    transposed: bool


@dataclass(frozen=True)
class Verdict:
    """What the weights say of an order: its correlation, and the best other order with its own; NaN where unknown."""

    order: str
    correlation: float
    other: str
    other_correlation: float

    @property
    def words(self) -> str:
        """Return the verdict in words."""
        if self.correlation >= FITS and self.correlation > self.other_correlation:
            return (
                f"rows ordered {self.order}, which the weights bear out (correlation {self.correlation:.2f} of row "
                f"norms of V with column norms of O, {self.other_correlation:.2f} in the next best order)"
            )
        return (
            f"rows ordered {self.order}, which the weights neither bear out nor contradict (correlation "
            f"{self.correlation:.2f} of row norms of V with column norms of O)"
        )


def parse_order(text: str) -> tuple[str, ...]:
    """Return the axes of an order such as ``head,dim,qkv`` or ``4,qvk,head,dim``. Raises `UsageError`."""
    axes = tuple(part.strip() for part in text.split(","))
    roles = [axis for axis in axes if sorted(axis) == ["k", "q", "v"]]
    rest = sorted(axis for axis in axes if axis not in roles and not re.fullmatch(r"[1-9]\d{0,3}", axis))
    numbers = [axis for axis in axes if axis.isdecimal()]
    if len(roles) != 1 or rest != ["dim", "head"] or len(numbers) > 1 or (numbers and axes[0] != numbers[0]):
        raise UsageError(
            f"--row-order {text} is no order of rows: give the axes from the outermost, as {', '.join(KNOWN[:3])}; a "
            "number in front stands for groups of heads (CodeGen: 4,qvk,head,dim)"
        )
    return axes


def standard_rows(order: str, heads: int, rows: int) -> NDArray[np.intp]:
    """Return for each row of [role, head, dim] its place in a packed projection of that order.

    Raises `UsageError` where the axes do not make up the rows.
    """
    axes = parse_order(order)
    groups = int(axes[0]) if axes[0].isdecimal() else 1
    if rows % (3 * heads) or heads % groups:
        of = f"{counted(heads, 'head')} in {counted(groups, 'group')}"
        raise UsageError(f"--row-order {order}: {counted(rows, 'row is', 'rows are')} not q, k and v of {of}")
    size = {"head": heads // groups, "dim": rows // 3 // heads}
    roles = next(axis for axis in axes if sorted(axis) == ["k", "q", "v"])
    inner = [axis for axis in axes if not axis.isdecimal()]
    shape = [groups, *(size.get(axis, 3) for axis in inner)]
    places = np.arange(rows, dtype=np.intp).reshape(shape)
    turned = places.transpose(1 + inner.index(roles), 0, 1 + inner.index("head"), 1 + inner.index("dim"))
    return turned[[roles.index(role) for role in "qkv"]].reshape(-1)


def tried_orders(order: str) -> tuple[str, ...]:
    """Return the orders that one is held against, with v in each place, each once."""
    others = [known.replace("qkv", roles) for known in KNOWN for roles in ("qkv", "qvk", "vqk")]
    return tuple(dict.fromkeys([order, *others, "4,qvk,head,dim"]))


def judge(stored: Checkpoint, layers: Iterable[Packed], heads: int, order: str) -> Verdict:
    """Hold an order against the others by the weights: the median over layers of each order's correlation."""
    found: dict[str, list[float]] = {}
    chosen = list(layers)
    step = -(-len(chosen) // _LAYERS)
    for layer in chosen[::step]:
        rows, columns = _norms(stored, layer)
        for name in tried_orders(order):
            if "4" in name and heads % 4:
                continue
            value = rows[standard_rows(name, heads, len(rows))][2 * len(rows) // 3 :]
            found.setdefault(name, []).append(_correlation(value, columns))
    medians = {name: float(np.median(values)) for name, values in found.items()}
    own = medians.pop(order)
    other = max(medians, key=lambda name: medians[name])
    return Verdict(order, own, other, medians[other])


def check(verdict: Verdict, units: int, where: str) -> None:
    """Raise `UsageError` where the weights fit another order than the one that is assumed.

    Chance alone gives a correlation of 1 / sqrt(``units``): five times that is asked for, and a clear distance.
    """
    needed = max(CONTRADICTED, 5.0 / units**0.5)
    if verdict.other_correlation >= needed and verdict.other_correlation - max(verdict.correlation, 0.0) >= needed / 2:
        raise UsageError(
            f"the packed rows of {where} are not in the order {verdict.order}: norms of V's rows and of O's columns "
            f"correlate by {verdict.correlation:.2f} in it, and by {verdict.other_correlation:.2f} in {verdict.other}. "
            f"Add --row-order {verdict.other}, or --row-order {verdict.order} to read it so all the same"
        )


def _norms(stored: Checkpoint, layer: Packed) -> tuple[Vector, Vector]:
    """Return the log norms of the packed rows, and of the output projection's columns."""
    from attnlens.layouts.read_write import widened

    packed, out = (widened(stored[name], name) for name in (layer.qkv, layer.o))
    for name, values in ((layer.qkv, packed), (layer.o, out)):
        if values.size == 0:
            raise CheckpointError(f"{name} has no entries, its shape is {list(values.shape)}")
    packed, out = (values.reshape(values.shape[0], -1) for values in (packed, out))
    if layer.transposed:
        packed, out = packed.T, out.T
    tiny = np.finfo(np.float64).tiny
    return np.log(np.linalg.norm(packed, axis=1) + tiny), np.log(np.linalg.norm(out, axis=0) + tiny)


def _correlation(one: Vector, other: Vector) -> float:
    """Return Pearson's correlation, 0 where one of the two is constant."""
    a, b = one - one.mean(), other - other.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 0 else 0.0


class ReorderedRows(Checkpoint):
    """A checkpoint whose packed projections and their biases are read in the order [role, head, dim]."""

    def __init__(self, origin: Checkpoint, rows: Mapping[str, tuple[NDArray[np.intp], int]], order: str) -> None:
        self.origin, self.behind, self._rows, self._order = origin, (origin,), rows, order
        self.metadata, self.computed, self.title = origin.metadata, origin.computed, origin.title

    def provenance(self) -> dict[str, Any]:
        """Return the origin's provenance and the order its packed rows were read in."""
        return {**self.origin.provenance(), "row_order": self._order}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self.origin.shape(name)

    def expect(self, names: Iterable[str]) -> None:
        """Tell the origin which tensors will be asked for."""
        self.origin.expect(names)

    def __getitem__(self, name: str) -> Any:
        """Return a tensor, its packed rows in order."""
        stored = self.origin[name]
        if name not in self._rows:
            return stored
        rows, axis = self._rows[name]
        if stored.shape[axis] != len(rows):
            raise CheckpointError(f"{name} has shape {tuple(stored.shape)}, and its weight {len(rows)} packed rows")
        return stored[rows] if axis == 0 else stored[:, rows]

    def __contains__(self, name: object) -> bool:
        """Whether a tensor of that name is there; nothing is read."""
        return name in self.origin

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.origin)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.origin)
