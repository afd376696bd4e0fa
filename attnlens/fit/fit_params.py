"""Fitting parameters: from inspected models to a parameter file that drives an initialiser."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from attnlens.circuits import FactoredProduct, Fold, Kind, fold_ov, fold_qk, layer_ov, ov_circuit, qk_circuit
from attnlens.errors import UnsupportedAttentionError, UsageError
from attnlens.filters.entries import Estimator, FilterEntry
from attnlens.filters.fit import filter_medians, fit_filter_entries
from attnlens.fit.entries import Entry, Heads, LayerSummary, Source, pool, sd, select
from attnlens.fit.gains import LEVELS, CircuitGains
from attnlens.fit.params import InitParams, Per
from attnlens.heads import Array, HeadWeights
from attnlens.inspection import Inspection
from attnlens.layouts import AttentionSpec
from attnlens.layouts.flags import FLAGS, layers_by_reason
from attnlens.layouts.spec import OPT_IN
from attnlens.models.open import open_model
from attnlens.models.opened import Access, OpenedModel
from attnlens.provenance import run_provenance
from attnlens.statistics.depth import relative_depth
from attnlens.statistics.diagonal import AlphaBeta, fit_alpha_beta
from attnlens.statistics.inference import Inference, infer, judge_balanced
from attnlens.statistics.inverse import Requests, requests
from attnlens.statistics.table import ALL_HEADS
from attnlens.statistics.verdicts import corrected, judge
from attnlens.strict_json import finite_or_none
from attnlens.threads import Progress, over_threads
from attnlens.vocabulary import FOLD, PER, SHRINKAGE, coverage, several

if TYPE_CHECKING:
    import os

# Where a fit lies beyond the bound of its rank, the request is the one at this share of the bound's cosine.
_NEAREST_SHARE_OF_BOUND = 0.99
_SMALLEST_FIT = 1e-300


def fit_params(
    *models: Any,
    checkpoint: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    per: Per = "head",
    fold: Fold = "effective",
    level: float = 0.95,
    seed: int = 0,
    num_heads: int | None = None,
    shrinkage: Estimator = "ledoit-wolf",
    model_args: dict[str, Any] | None = None,
    input_size: int | tuple[int, ...] | None = None,
    weights: str | None = None,
    row_order: str | None = None,
    offline: bool = False,
    remote: bool = False,
    command: str | None = None,
    progress: Progress = iter,
) -> InitParams:
    """Return the fit of every circuit and every layer of filters of models: what to request of an initialiser.

    ``models`` are what `attnlens.inspect` takes, one by one or as one list; none means the shipped ViT. What `inspect`
    returned stands for the model it was of, every layer of it. QK products are fitted head by head, OV
    on each layer's sum, as the recipe draws them, and head by head beside it. ``fold`` is ``raw``, ``effective``,
    ``centred`` or ``balanced``; beside it stand the raw products and, unless it is ``raw``, the balanced ones with
    their gains.
    Realised parameters: M ~ alpha Z + beta I with intervals at ``level``; requested ones by `inverse.request`.
    ``per`` says what an initialiser takes from the file: see `InitParams.requests`. Filters: the covariance of each
    layer, shrunk towards isotropy by ``shrinkage`` (``ledoit-wolf``, ``oas`` or ``none``), and the closed form's width.
    ``num_heads``, ``model_args``, ``input_size``, ``weights``, ``row_order``, ``offline`` and ``remote`` are those of
    `attnlens.inspect`.

    Raises what `attnlens.inspect` raises; `UsageError` for a checkpoint with several models.
    """
    per, fold, level, shrinkage = PER(per), FOLD(fold), coverage(level), SHRINKAGE(shrinkage)
    given, models = models, several(models)
    if given and not models:
        raise UsageError("the list of models is empty: give at least one, or nothing for the shipped ViT")
    if checkpoint is not None and (len(models) > 1 or any(isinstance(model, Inspection) for model in models)):
        raise UsageError("a checkpoint belongs to one model: give one MODEL with --checkpoint, or several without")
    access = Access(offline=offline, remote=remote, network=weights, row_order=row_order)
    everything: list[Entry] = []
    gains: list[CircuitGains] = []
    filters: list[FilterEntry] = []
    sources: list[Source] = []
    for model in models or (None,):
        opened = (
            model.opened
            if isinstance(model, Inspection)
            else open_model(
                model, checkpoint, num_heads, access, filters=True, model_args=model_args, input_size=input_size
            )
        )
        provenance = opened.provenance_beside()
        fitted, of_model, heads = _fit_model(opened, len(sources), fold, level, seed, progress)
        everything += fitted
        gains += of_model
        of_filters, unread = fit_filter_entries(opened.architecture, opened.filters, len(sources), shrinkage, progress)
        if not fitted and not of_filters:
            raise UnsupportedAttentionError(f"no layer of {opened.name} can be fitted: {unread[0]}")
        filters += of_filters
        sources.append(
            Source(
                model=opened.name,
                provenance=provenance(),
                num_layers=len(opened.architecture.order),
                num_heads=heads,
                num_filter_layers=len(opened.architecture.filters),
                **_caveats(opened, fold, unread),
            )
        )
    entries = [entry for entry in everything if entry.fold == fold]
    groups = [(circuit, heads) for circuit, heads in _GROUPS if select(entries, circuit, heads)]
    return InitParams(
        schema="attnlens.params",
        schema_version=4,
        fold=fold,
        per=per,
        level=level,
        created=_created(command),
        sources=sources,
        entries=everything,
        layers=list(_layer_summaries(entries)),
        pooled=[pool(circuit, heads, select(entries, circuit, heads)) for circuit, heads in groups],
        gain_levels=LEVELS.tolist(),
        gains=gains,
        filters=filters,
        filter_medians=filter_medians(filters),
    )


_NOT_IN_FILE = (
    "identity_z",
    "p_value",
    "sign_p_value",
    "bulk_trace_share",
    "directions_above",
    "directions",
    "channels",
    "factor_cosine",
    "spread_ratio",
    "typical_ratio",
    "sign_agreement",
    "expected_agreement",
)
"""What the verdict alone needs, and the p-value, which is corrected first."""
_INFERRED = tuple(name for name in Inference.names() if name not in _NOT_IN_FILE)
_GROUPS: tuple[tuple[Kind, Heads], ...] = (("qk", "each"), ("ov", "each"), ("ov", "all"))


def _fit_model(
    opened: OpenedModel, source: int, fold: Fold, level: float, seed: int, progress: Progress
) -> tuple[list[Entry], list[CircuitGains], list[int]]:
    """Fit every circuit of one model, raw, under ``fold`` and balanced; return its gains and heads by layer too.

    p-values are corrected over all circuits of a fold. A model without any has no entries where it has filters, and is
    refused where it has none.
    """
    specs = [(layer, spec) for layer, spec in opened.architecture.indexed() if not _unread(spec, fold)]
    if not specs and opened.architecture.filters:
        return [], [], []
    if not specs:
        _, spec = opened.architecture.indexed()[0]
        raise UnsupportedAttentionError(
            f"no layer of {opened.name} can be fitted: {spec.path} {_unread(spec, fold, opened.untraced)}"
        )
    folds: tuple[Fold, ...] = tuple(dict.fromkeys(("raw", fold, *(() if fold == "raw" else ("balanced",)))))

    def measure(indexed: tuple[int, AttentionSpec]) -> tuple[int, list[_Stack], list[CircuitGains]]:
        weights = opened.heads(indexed[0])
        depth = relative_depth(indexed[0], len(opened.architecture.order))
        place = {"source": source, "layer": indexed[0], "depth": depth}
        stacks: list[_Stack] = []
        gains: list[CircuitGains] = []
        for name, circuit, names, circuits, balanced in _circuits(weights, folds):
            _check_size(circuits, f"{weights.name}: the entries of the {name} {circuit.upper()} product", names)
            inference = infer(circuits, level=level, seed=seed, of_balanced=balanced)
            stacks.append(_Stack.of(circuits, {**place, "circuit": circuit, "fold": name}, names, inference))
            if circuits.gains is not None:
                head: Heads = "all" if names == [ALL_HEADS] else "each"
                gains.append(CircuitGains.of(circuits, {**place, "circuit": circuit}, head))
        return weights.num_heads, stacks, gains

    measured = over_threads(measure, specs, progress, largest=max(opened.bytes_of(spec) for _, spec in specs))
    heads = [count for count, _, _ in measured]
    stacks = [stack for _, found, _ in measured for stack in found]
    gains = [each for _, _, found in measured for each in found]
    if not stacks and opened.architecture.filters:
        return [], [], heads
    if not stacks:
        raise UnsupportedAttentionError(f"no product of {opened.name} is square: there is no diagonal to fit")
    entries = [entry for name in folds for entry in _entries([s for s in stacks if s.place["fold"] == name])]
    return entries, gains, heads


def _check_size(product: FactoredProduct, entries: str, names: Sequence[int | str]) -> None:
    """Raise `UnsupportedAttentionError` for the first product of a stack, not zero, whose fit float64 does not hold."""
    unit, exponent = product.unit
    size = np.sqrt(unit.squared_norm() / product.shape[-1])  # the root of alpha^2 + beta^2, about
    small = np.atleast_1d((size > 0) & (np.ldexp(size, exponent) < _SMALLEST_FIT))
    for name in np.flatnonzero(small)[:1]:
        which = "summed over heads" if names[name] == ALL_HEADS else f"of head {names[name]}"
        raise UnsupportedAttentionError(
            f"{entries} {which} are too small to be measured, below {_SMALLEST_FIT:g}: multiply the weights by a power "
            "of two, which leaves everything but the scale as it is"
        )


def _unread(spec: AttentionSpec, fold: Fold, untraced: str = "") -> str:
    """Say why a layer is not fitted, to follow its name; empty for one that is. ``untraced``: why norms are unknown."""
    if spec.kind in OPT_IN:
        return "is {}: {}".format(*OPT_IN[spec.kind])
    if not spec.has_fold(fold):
        return f"has norms that are not known{untraced}, so that it has no {fold} product: use --fold raw"
    return ""


def _caveats(opened: OpenedModel, fold: Fold, unread: Sequence[str]) -> dict[str, Any]:
    """Return what of a model is not in its fit: modules that were not read, and what the products leave out."""
    reasons = [(layer, spec, _unread(spec, fold, opened.untraced)) for layer, spec in opened.architecture.indexed()]
    not_read = [
        *(f"{refusal.path} {refusal.reason}" for refusal in opened.architecture.refused),
        *unread,
        *(f"{spec.path} {reason}" for _, spec, reason in reasons if reason),
    ]
    read = (
        (layer, [*(FLAGS.get(flag, flag) for flag in spec.leaves_out), *([spec.label] if spec.label else [])])
        for layer, spec, reason in reasons
        if not reason
    )
    return {"not_read": not_read, "left_out": layers_by_reason(read)}


class _Folded:
    """The products of one layer under each fold, made once each.

    A sum and the heads it is the sum of share what is computed of them, and so do a product and the balanced one.
    """

    def __init__(self, weights: HeadWeights) -> None:
        self._weights = weights
        self._made: dict[tuple[str, Fold], FactoredProduct] = {}
        self._judged: dict[tuple[str, Fold], Mapping[str, Array]] = {}
        self.raw = {"qk": qk_circuit(weights)}
        if weights.W_O is not None:
            self.raw["sum"] = layer_ov(weights)
            self.raw["heads"] = self.raw["sum"].parts or ov_circuit(weights)

    def product(self, name: str, fold: Fold) -> FactoredProduct:
        """Return ``qk``, ``heads`` or their ``sum`` under a fold."""
        if (name, fold) not in self._made:
            self._made[name, fold] = self._make(name, fold)
        return self._made[name, fold]

    def _make(self, name: str, fold: Fold) -> FactoredProduct:
        if fold == "balanced":
            return self.product(name, "effective").balanced()
        if name == "heads":
            return self.product("sum", fold).parts or self.raw["heads"]
        return (fold_qk if name == "qk" else fold_ov)(self.raw[name], self._weights, fold)

    def judged(self, name: str, fold: Fold) -> Mapping[str, Array]:
        """Return `judge_balanced` of a product: effective ones have it in common with the balanced."""
        fold = "effective" if fold == "balanced" else fold
        if (name, fold) not in self._judged:
            self._judged[name, fold] = judge_balanced(self.product(name, fold))
        return self._judged[name, fold]


def _circuits(
    weights: HeadWeights, folds: Sequence[Fold]
) -> Iterator[tuple[Fold, Kind, list[int | str], FactoredProduct, Mapping[str, Array]]]:
    """Yield every square product under every fold, with what is said of it balanced."""
    folded = _Folded(weights)
    heads: dict[str, tuple[Kind, list[int | str]]] = {
        "qk": ("qk", list(range(weights.num_heads))),
        "heads": ("ov", list(range(weights.num_value_heads))),
        "sum": ("ov", [ALL_HEADS]),
    }
    for fold, name in product(folds, heads):
        if name in folded.raw and folded.raw[name].is_square:
            yield fold, *heads[name], folded.product(name, fold), folded.judged(name, fold)


@dataclass(frozen=True)
class _Stack:
    """The fits of one layer's products of one kind, before p-values are corrected over the model."""

    place: dict[str, Any]
    names: Sequence[int | str]
    fit: AlphaBeta
    inference: Inference

    @classmethod
    def of(
        cls, product: FactoredProduct, place: dict[str, Any], names: Sequence[int | str], inference: Inference
    ) -> _Stack:
        """Fit a stack of products and put its inference beside the fit."""
        sizes = {"head_dim": product.rank_bound, "embed_dim": product.shape[-1]}
        return cls({**place, **sizes}, names, fit_alpha_beta(product), inference)


def _entries(stacks: Sequence[_Stack]) -> Iterator[Entry]:
    """Yield the entries of one model under one fold; their p-values are corrected over all of them as one family."""
    p_values = corrected(np.concatenate([np.ravel(stack.inference.p_value) for stack in stacks]))
    requested = _requests(stacks)
    start = 0
    for stack in stacks:
        of_stack = p_values[start : start + len(stack.names)]
        judged = judge(stack.fit, stack.inference, of_stack)
        for index, (name, judgement) in enumerate(zip(stack.names, judged, strict=True)):
            alpha, beta = (float(np.ravel(getattr(stack.fit, field))[index]) for field in ("alpha", "beta"))
            inferred: dict[str, Any] = {
                field: finite_or_none(float(np.ravel(getattr(stack.inference, field))[index])) for field in _INFERRED
            }
            yield Entry(
                **stack.place,
                **inferred,
                head=name,  # type: ignore[arg-type]
                alpha=alpha,
                beta=beta,
                p_value=float(of_stack[index]),
                p_value_alone=float(np.ravel(stack.inference.p_value)[index]),
                verdict=judgement.verdict.value,
                reason=judgement.reason,
                request_alpha=float(requested.alpha[start + index]),
                request_beta=float(requested.beta[start + index]),
                reachable=bool(requested.reachable[start + index]),
            )
        start += len(stack.names)


def _requests(stacks: Sequence[_Stack]) -> Requests:
    """Return the requests that realise the fits, or the nearest ones: a fit's beta, alpha raised into reach."""
    counts = [len(stack.names) for stack in stacks]
    sizes = [np.repeat([stack.place[name] for stack in stacks], counts) for name in ("head_dim", "embed_dim")]
    alpha, beta = (
        np.concatenate([np.ravel(getattr(stack.fit, name)) for stack in stacks]) for name in ("alpha", "beta")
    )
    found = requests(alpha, beta, *sizes)
    reach = _NEAREST_SHARE_OF_BOUND**2 * sizes[0] / sizes[1]
    nearest = np.where(found.reachable, alpha, np.abs(beta) * np.sqrt(np.maximum(1 / reach - 1, 0.0)))
    return requests(nearest, beta, *sizes)._replace(reachable=found.reachable)


def _layer_summaries(entries: Sequence[Entry]) -> Iterator[LayerSummary]:
    for circuit, heads in _GROUPS:
        groups: dict[tuple[int, int], list[Entry]] = {}
        for entry in select(entries, circuit, heads):
            groups.setdefault((entry.source, entry.layer), []).append(entry)
        for (source, layer), measured in groups.items():
            alpha, beta = (np.array([getattr(entry, name) for entry in measured]) for name in ("alpha", "beta"))
            yield LayerSummary(
                source=source,
                layer=layer,
                circuit=circuit,
                head=heads,
                alpha_mean=float(alpha.mean()),
                alpha_sd=sd(alpha),
                beta_mean=float(beta.mean()),
                beta_sd=sd(beta),
                n=len(measured),
            )


def _created(command: str | None) -> dict[str, Any]:
    return {**run_provenance(), "command": command}
