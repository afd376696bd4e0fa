"""What an initialisation did: requested and realised parameters of every product, read back from the network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from attnlens.circuits import FactoredProduct, Fold, Kind, WholeProduct, ov_circuit, qk_circuit, side_by_side
from attnlens.filters.covariance import covariance_error, relative_distance, second_moment
from attnlens.heads import Array, HeadWeights, expand_groups
from attnlens.inits.folding import coordinates
from attnlens.inits.plan import ALL_HEADS, FilterLayer, FilterPlan, Layer, Plan, Request
from attnlens.printable import printable
from attnlens.statistics.diagonal import alpha_beta
from attnlens.statistics.inverse import Parameters, realised
from attnlens.statistics.pairs import offdiagonal_kurtosis
from attnlens.statistics.table import StatsTable, Tabular
from attnlens.strict_json import finite_or_none
from attnlens.words import counted, numbered

if TYPE_CHECKING:
    from torch import Tensor

_WIDE = 512
"""Above this width products of a layer are formed in float32: a relative error of 4e-7 that float64 would not show."""
_FIRST = ("layer", "circuit", "head", "alpha", "beta")
"""Columns that a table of products begins with."""
_UNKNOWN = Parameters(math.nan, math.nan)


@dataclass(frozen=True)
class ProductReport:
    """One product, QK of a head or OV of a layer (``head`` is ``all``); NaN where a number is not known.

    ``requested`` parameters are those of the draw, ``expected`` what it realises on average at this rank, ``alpha`` and
    ``beta`` what the network has. ``relative_error`` is ||M - A|| / ||A|| in Frobenius norm, A the requested matrix
    (for QK its best approximation of the head's rank): what storing the weights in the network's dtype cost.
    With gains, alpha and beta are those of the balanced product, and the excess kurtosis off the diagonal that of the
    product with its gains.
    """

    layer: int
    name: str
    circuit: Kind
    head: int | str
    requested_alpha: float
    requested_beta: float
    expected_alpha: float
    expected_beta: float
    alpha: float
    beta: float
    relative_error: float
    requested_kurtosis: float = math.nan
    kurtosis: float = math.nan


@dataclass(frozen=True)
class FilterReport:
    """One layer of depthwise filters as the network holds it now; NaN where no covariance was requested.

    ``rms`` is the root mean square of a weight, ``rms_before`` what it was. With S = F^T F / n of the n filters and
    Sigma the requested covariance of the same trace, ``covariance_error`` is ||S - Sigma|| / ||Sigma||, and
    ``expected_error`` its root mean square over draws, sqrt((tr(Sigma)^2 + tr(Sigma^2)) / n) / ||Sigma||.
    ``relative_error`` is that of the filters against those drawn: what storing them in the network's dtype cost.
    """

    layer: int
    name: str
    filters: int
    kernel: tuple[int, int]
    rms_before: float
    rms: float
    effective_rank: float
    covariance_error: float
    expected_error: float
    relative_error: float


@dataclass(frozen=True)
class Skipped:
    """A product, or with an empty ``circuit`` a whole layer, that was left as it was, and why."""

    layer: int
    name: str
    circuit: str
    reason: str


@dataclass(frozen=True, repr=False)
class InitReport(Tabular):
    """What `init_` did to a network; its rows are the products, where there are none the layers of filters."""

    init: str
    seed: int
    options: Mapping[str, Any]
    fold: Fold
    products: tuple[ProductReport, ...]
    skipped: tuple[Skipped, ...] = ()
    notes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """What else a reader must know, with the layers it is true of."""
    filters: tuple[FilterReport, ...] = ()
    """Layers of depthwise filters, counted apart from those of attention."""

    def _table(self) -> StatsTable:
        rows: Sequence[ProductReport | FilterReport] = self.products or self.filters
        return StatsTable.of(
            {name: vars(row)[name] for name in _FIRST if name in vars(row)} | vars(row) for row in rows
        )

    def _headline(self) -> str:
        return f"InitReport: {str(self).splitlines()[0]}"

    @property
    def worst_error(self) -> float:
        """Return the largest relative error of a product or of a layer's filters, NaN where none is known."""
        errors = [*(p.relative_error for p in self.products), *(f.relative_error for f in self.filters)]
        return max((error for error in errors if not math.isnan(error)), default=math.nan)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data; a number that is not known is null."""
        data = asdict(self)
        data["options"] = {name: describe_option(value) for name, value in self.options.items()}
        data["notes"] = {note: list(layers) for note, layers in self.notes.items()}
        for row in (*data["products"], *data["filters"]):
            row.update({name: finite_or_none(value) for name, value in row.items()})
        return data

    def __str__(self) -> str:
        """Say in a few lines what was done."""
        lines = [f"{self.init}, seed {self.seed}" + (f", {self.fold} products" if self.products else "")]
        for circuit, unit in (("qk", "head"), ("ov", "layer")):
            rows = [p for p in self.products if p.circuit == circuit and (unit == "head") == (p.head != ALL_HEADS)]
            if rows:
                alpha, beta = (sum(getattr(p, name) for p in rows) / len(rows) for name in ("alpha", "beta"))
                over = counted(len(rows), unit)
                lines.append(f"{circuit.upper()}: mean alpha {alpha:.4f}, beta {beta:+.4f} over {over}")
        tails = [p for p in self.products if not math.isnan(p.requested_kurtosis)]
        if tails:
            near = sum(abs(p.kurtosis - p.requested_kurtosis) <= 0.2 * abs(p.requested_kurtosis) for p in tails)
            lines.append(
                f"kurtosis with gains: within 20% of the source's in {near} of {counted(len(tails), 'product')}"
            )
        if self.filters:
            lines += self._filter_lines()
        if not math.isnan(self.worst_error):
            lines.append(f"largest relative error of {self._what()}: {self.worst_error:.1e}")
        lines += [f"skipped {' '.join(filter(None, (s.name, s.circuit)))}: {s.reason}" for s in self.skipped]
        lines += [f"{note} ({numbered(layers, 'layer')})" for note, layers in self.notes.items()]
        return "\n".join(map(printable, lines))

    def _filter_lines(self) -> list[str]:
        count, layers = sum(row.filters for row in self.filters), counted(len(self.filters), "layer")
        lines = [f"filters: {count} in {layers}, effective rank {_range(self.filters, 'effective_rank')}"]
        if not math.isnan(self.filters[0].covariance_error):
            errors = [row.covariance_error / row.expected_error for row in self.filters]
            lines.append(f"error of their covariance: {min(errors):.2f} to {max(errors):.2f} of what sampling makes")
        return lines

    def _what(self) -> str:
        return " or ".join(
            word for word, rows in (("a product", self.products), ("a layer's filters", self.filters)) if rows
        )


def _range(rows: Sequence[FilterReport], name: str) -> str:
    values = [getattr(row, name) for row in rows]
    return f"{min(values):.1f} to {max(values):.1f}"


def describe_option(value: Any) -> Any:
    """Return an option's value as JSON, a module or parameter object by its class."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, list | tuple):
        return [describe_option(item) for item in value]
    return str(value) if hasattr(value, "__fspath__") else f"<{type(value).__name__}>"


def measure(layer: Layer, now: HeadWeights, plan: Plan, fold: Fold) -> list[ProductReport]:
    """Measure the planned products of a layer as the network holds them now; ``fold`` is that of its rule."""
    balanced, fold = fold == "balanced", coordinates(fold)
    kurtoses = _kurtoses if balanced and plan.gains else _no_kurtoses
    requests = {(request.circuit, request.head): request for request in plan.requests}
    tails = {(each.circuit, each.head): each.kurtosis for each in plan.gains}
    rows = []
    planned = plan.weights()

    def row(circuit: Kind, head: int | str, measured: Parameters, error: float, tail: float) -> ProductReport:
        request = requests.get((circuit, head))
        requested = _UNKNOWN if request is None else Parameters(request.alpha, request.beta)
        expected = _UNKNOWN if request is None else expected_parameters(layer, request)
        key, asked = (layer.index, layer.spec.path, circuit, head), tails.get((circuit, head), math.nan)
        return ProductReport(*key, *requested, *expected, *measured, error, asked, tail)

    if "q" in planned:
        wanted = (planned["q"], expand_groups(planned["k"], layer.weights.num_heads))
        product = qk_circuit(now, fold)
        errors = factored_errors((product.A, product.B), wanted)
        rows += [
            row("qk", head, measured, float(errors[head]), tail)
            for head, (measured, tail) in enumerate(zip(parameters(product, balanced), kurtoses(product), strict=True))
        ]
    if "v" in planned and layer.weights.W_O is not None:
        have = ov_circuit(now, fold)
        total = product_matrix(have.A, have.B)
        if plan.total is not None:
            wanted_total = _tensor(plan.total)
        else:
            outputs = planned["o"].swapaxes(1, 2) if "o" in planned else have.B
            wanted_total = product_matrix(expand_groups(planned["v"], layer.weights.num_value_heads), outputs)
        error = float((total - wanted_total).norm() / wanted_total.norm())
        whole = WholeProduct.of(total.double().numpy(), layer.values_width)
        rows.append(row("ov", ALL_HEADS, parameters(whole, balanced)[0], error, kurtoses(whole)[0]))
        if ("ov", 0) in requests:
            rows += [
                row("ov", head, measured, math.nan, tail)
                for head, (measured, tail) in enumerate(zip(parameters(have, balanced), kurtoses(have), strict=True))
            ]
    return rows


def measure_filters(layer: FilterLayer, now: Array, plan: FilterPlan) -> FilterReport:
    """Measure a layer's filters as the network holds them now."""
    assert plan.filters is not None
    covariance = second_moment(now)
    error, expected = math.nan, math.nan
    if plan.covariance is not None:
        error, expected = covariance_error(covariance, plan.covariance, len(now))
    trace = float(covariance.trace())
    return FilterReport(
        layer.index,
        layer.spec.path,
        len(now),
        layer.spec.kernel,
        rms_before=math.sqrt(float((layer.filters**2).mean())),
        rms=math.sqrt(trace / len(covariance)),
        effective_rank=trace**2 / float((covariance**2).sum()) if trace else math.nan,
        covariance_error=error,
        expected_error=expected,
        relative_error=relative_distance(now, plan.filters),
    )


def expected_parameters(layer: Layer, request: Request) -> Parameters:
    """Return what a request realises at the layer's rank; NaN for heads that share keys: no closed form is known."""
    weights = layer.weights
    if request.circuit == "qk":
        width, rank, shared = weights.embed_dim, weights.head_dim, layer.query_groups > 1
    else:
        whole = request.head == ALL_HEADS
        width, shared = weights.out_dim, not whole and layer.value_groups > 1
        rank = layer.values_width if whole else weights.value_dim
    return _UNKNOWN if shared else expected_at(request.alpha, request.beta, min(rank, width), width)


@lru_cache(maxsize=4096)
def expected_at(alpha: float, beta: float, rank: int, width: int) -> Parameters:
    """Return `inverse.realised`, and its limit, a random projection times beta, at alpha = 0."""
    if alpha == 0 and rank < width:
        kept = rank / width
        return Parameters(abs(beta) * math.sqrt(kept * (1 - kept)), beta * kept)
    return realised(alpha, beta, rank, width)


def parameters(product: FactoredProduct, balanced: bool = False) -> list[Parameters]:
    """Return alpha and beta of each product of a stack, as `statistics.diagonal` defines them; NaN if not square.

    ``balanced``: those of the balanced products.
    """
    if not product.is_square:
        return [_UNKNOWN] * math.prod(product.shape[:-2])
    product = product.balanced() if balanced else product
    columns = (np.ravel(values).tolist() for values in alpha_beta(product.diagonal(), product.squared_norm()))
    return [Parameters(*pair) for pair in zip(*columns, strict=True)]


def _kurtoses(product: FactoredProduct) -> list[float]:
    """Return the excess kurtosis of each product's off-diagonal entries."""
    values: list[float] = np.ravel(offdiagonal_kurtosis(product) if product.is_square else np.nan).tolist()
    return values


def _no_kurtoses(product: FactoredProduct) -> list[float]:
    return [math.nan] * math.prod(product.shape[:-2])


def factored_errors(have: tuple[Array, Array], wanted: tuple[Array, Array]) -> Array:
    """Return ||A B^T - C D^T|| / ||C D^T|| of each product in a stack, in Frobenius norm, without forming any.

    With E = A - C and F = B - D the difference is E B^T + C F^T. Where only the split between the factors is another
    its terms cancel: float64 leaves 1e-8 of them.
    """
    A, B = (_tensor(factor) for factor in have)
    C, D = (_tensor(factor) for factor in wanted)
    E, F = A - C, B - D

    def inner(X: Tensor, Y: Tensor, Z: Tensor, W: Tensor) -> Tensor:  # <X Z^T, Y W^T>
        return ((X.mT @ Y) * (Z.mT @ W)).sum((-2, -1))

    difference = inner(E, E, B, B) + inner(C, C, F, F) + 2 * inner(E, C, B, F)
    return (difference.clamp_min(0).sqrt() / inner(C, C, D, D).sqrt()).numpy()


def product_matrix(A: Array, B: Array) -> Tensor:
    """Return sum_h A[h] @ B[h]^T of factors ``[head, rows, rank]`` as a torch matrix, in float32 where it is wide."""
    left, right = _tensor(side_by_side(A)), _tensor(side_by_side(B))
    return left.float() @ right.float().mT if left.shape[0] > _WIDE else left @ right.mT


def _tensor(array: Array) -> Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array))
