"""Inspecting a model: statistics of every circuit and of every layer of filters, and what they are of on request."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from operator import methodcaller
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from attnlens.atomic import FileSet
from attnlens.circuits import (
    FactoredProduct,
    Fold,
    Kind,
    fold_ov,
    fold_qk,
    layer_ov,
    ov_circuit,
    parse_folds,
    qk_circuit,
)
from attnlens.errors import UnsupportedAttentionError, UsageError
from attnlens.filters.inspection import FilterInspection, inspect_filters
from attnlens.heads import Array, HeadWeights
from attnlens.layouts import AttentionSpec, Refusal, read_heads
from attnlens.layouts.flags import FLAGS
from attnlens.layouts.spec import OPT_IN
from attnlens.models.open import named_and_weights, open_model
from attnlens.models.opened import Access, OpenedModel
from attnlens.provenance import run_provenance
from attnlens.statistics.diagonal import DiagonalFit, fit_diagonal
from attnlens.statistics.table import ALL_HEADS, Row, StatsTable
from attnlens.threads import Progress, over_threads

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.figure import Figure
    from torch import nn

    from attnlens.checkpoints import Checkpoint

UNSAID = frozenset({"qk_bias"})
"""Flags too common to be said of every model; the table holds them all the same."""

CIRCUITS: dict[Kind, Callable[[HeadWeights, Fold], FactoredProduct]] = {"qk": qk_circuit, "ov": ov_circuit}
SpectrumKey = tuple[int, Kind, Fold]
IndexedSpecs = tuple[tuple[int, AttentionSpec], ...]


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found: ``stats`` is the table of attention, ``filters`` what there is of depthwise filters.

    Circuits, covariances and figures are made from the weights on request.
    """

    model: str
    stats: StatsTable
    folds: tuple[Fold, ...]
    depth: int
    """Number of attention layers of the model, read or not."""
    specs: IndexedSpecs
    refused: tuple[Refusal, ...]
    provenance: dict[str, Any]
    checkpoint: Checkpoint = field(repr=False)
    spectra: dict[SpectrumKey, Array] = field(repr=False)
    """Singular values of every head's product, ``[head, rank]``, by (layer, circuit, fold)."""
    filters: FilterInspection

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the attention layers that were read."""
        return tuple(layer for layer, _ in self.specs)

    def heads(self, layer: int) -> HeadWeights:
        """Read one layer's weights again."""
        for index, spec in self.specs:
            if index == layer:
                return read_heads(spec, self.checkpoint, layer)
        raise UsageError(f"layer {layer} was not read: choose from {list(self.layers)}")

    def circuits(
        self, layer: int, head: int | str | None = None, *, circuit: Kind = "qk", fold: Fold = "raw"
    ) -> FactoredProduct:
        """Return a layer's QK or OV product(s): of one head, of ``"all"`` heads summed (OV), or stacked (None)."""
        weights = self.heads(layer)
        if head == ALL_HEADS:
            if circuit != "ov":
                raise UsageError("only OV products are summed over heads: QK scores of different heads never add")
            return layer_ov(weights, fold)
        product = CIRCUITS[circuit](weights, fold)
        if head is None:
            return product
        if not isinstance(head, int) or not 0 <= head < product.shape[0]:
            raise UsageError(f"head {head!r} of layer {layer} does not exist: choose 0 to {product.shape[0] - 1}")
        return product.head(head)

    def corners(self, circuit: Kind, fold: Fold, size: int | None = 64) -> dict[int, dict[int | str, Array]]:
        """Return the top-left ``size x size`` corner of every product, by layer and head (``all`` for summed OV)."""
        found: dict[int, dict[int | str, Array]] = {}
        for layer in self.layers:
            weights = self.heads(layer)
            stack = CIRCUITS[circuit](weights, fold).dense(size)
            found[layer] = dict(enumerate(stack))
            if circuit == "ov":
                found[layer][ALL_HEADS] = stack.sum(0)
        return found

    def figures(self, fold: Fold | None = None, size: int = 64) -> Mapping[str, Figure]:
        """Draw ``qk_heatmap``, ``ov_heatmap``, ``depth_profile`` and ``spectra``, and what there is of filters."""
        from attnlens.figures import draw_all

        return draw_all(self, fold or ("effective" if "effective" in self.folds else self.folds[0]), size)

    def left_out(self) -> dict[str, list[int]]:
        """Say what the products leave out of the network, in words, with the layers it is true of."""
        found: dict[str, list[int]] = {}
        for layer, spec in self.specs:
            reasons = [FLAGS.get(flag, flag) for flag in spec.leaves_out if flag not in UNSAID]
            if spec.kind in OPT_IN:
                reasons.append(": ".join(OPT_IN[spec.kind]))
            for reason in (*reasons, *([spec.label] if spec.label else [])):
                found.setdefault(reason, []).append(layer)
        return found

    def stacks(self) -> dict[str, list[int]]:
        """Return which layers stand in which stack: paths with ``*`` for their numbers, and the layers of each."""
        found: dict[str, list[int]] = {}
        for layer, spec in self.specs:
            found.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", spec.path), []).append(layer)
        return found

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        from attnlens.reports.notebook import inspection_html

        return inspection_html(self)

    def to_json(self) -> dict[str, Any]:
        """Return everything but the weights as JSON-ready data (the content of ``stats.json``)."""
        return {
            "schema": "attnlens.stats",
            "schema_version": 1,
            "model": self.model,
            "folds": list(self.folds),
            "provenance": self.provenance,
            "refused": [vars(refusal) for refusal in self.refused],
            "layers": [
                {"layer": layer, "name": spec.path, "class": spec.module_class, "family": spec.family}
                | {"scale": spec.scale, "leaves_out": list(spec.leaves_out), "label": spec.label}
                for layer, spec in self.specs
            ],
            "stats": self.stats.json_rows(),
            "filters": self.filters.to_json(),
        }


def inspect(
    source: str | os.PathLike[str] | nn.Module | Mapping[str, Any] | None = None,
    /,
    checkpoint: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    model: str | os.PathLike[str] | nn.Module | None = None,
    model_args: dict[str, Any] | None = None,
    input_size: int | tuple[int, ...] | None = None,
    num_heads: int | None = None,
    fold: str = "both",
    layers: Sequence[int] | None = None,
    layer_spectra: bool = False,
    include: Sequence[str] = (),
    weights: str | None = None,
    row_order: str | None = None,
    offline: bool = False,
    remote: bool = False,
    progress: Progress = iter,
) -> Inspection:
    """Read a model's attention weights and depthwise filters; fit every QK and OV circuit and every covariance.

    ``source`` is a timm name, an ``hf-hub:`` or ``local-dir:`` name, a path to a checkpoint, a live ``nn.Module``, a
    state dict, or None for the small ViT shipped with the package. Where ``checkpoint`` gives the weights, ``source``
    names the architecture; ``inspect(weights, model=name)`` says the same. ``model_args`` are arguments of timm's
    architecture where the shapes do not show them; ``input_size`` (a side, or the shape of one input) serves to follow
    a live network that does not state it. ``num_heads`` reads what nothing names the architecture of, a file, a state
    dict or a live network, by its tensors' names.

    Statistics: per head W_QK = W_Q @ W_K.T and W_OV = W_V @ W_O, per layer the sum of W_OV over its
    heads; see `DiagonalFit`. ``fold`` is raw, effective, centred, both (raw and effective) or all. ``layer_spectra``
    also fills the statistics of the layer sums that need every eigenvalue, an O(embed_dim^3) cost a layer.
    ``include`` may name ``channel`` and ``linear``: kinds of attention whose product is no score between tokens, read
    only on request. ``offline`` uses no network; ``remote`` fetches of a safetensors file on a hub, unless it is in the
    local cache, only the tensors that are read. ``progress`` wraps the iteration over layers. Layers of depthwise
    convolutions are counted by themselves; what is said of each: `attnlens.filters.statistics.FilterFit`. ``layers``
    chooses of both kinds.

    Raises `AttnlensError` subclasses: no such model, unreadable or unfitting weights, attention of a refused family.
    """
    architecture, held = named_and_weights(source, checkpoint, model)
    access = Access(offline=offline, remote=remote, network=weights, row_order=row_order)
    opened = open_model(
        architecture, held, num_heads, access, filters=True, model_args=model_args, input_size=input_size
    )
    names = parse_folds(fold)
    wanted, unwanted = _by_kind(opened, include)
    specs = _chosen(opened, wanted, layers)
    filters = inspect_filters(opened, layers, progress)
    reading = Lock()

    def measure(indexed: tuple[int, AttentionSpec]) -> tuple[list[Row], dict[SpectrumKey, Array]]:
        with reading:  # a checkpoint serves one reader at a time
            weights = read_heads(indexed[1], opened.checkpoint, indexed[0])
        return measure_layer(weights, names, layer_spectra=layer_spectra)

    results = over_threads(measure, specs, progress, largest=_largest(opened, specs)) if specs else []
    spectra = {key: values for _, found in results for key, values in found.items()}
    measured = tuple(name for name in names if not specs or any(key[2] == name for key in spectra))
    if not measured:
        raise UsageError(
            f"the norms in front of the layers of {opened.name} are not known{opened.untraced}: use --fold raw"
        )
    return Inspection(
        model=opened.name,
        stats=StatsTable(tuple(row for rows, _ in results for row in rows)),
        folds=measured,
        depth=len(opened.architecture.order),
        specs=specs,
        refused=(*opened.architecture.refused, *unwanted),
        provenance={**opened.provenance(), **run_provenance()},
        checkpoint=opened.checkpoint,
        spectra=spectra,
        filters=filters,
    )


def save_inspection(
    inspection: Inspection, folder: str | os.PathLike[str], command: str, files: FileSet | None = None
) -> dict[str, Path]:
    """Write ``stats.json``, ``stats.csv`` of attention and ``filters.csv`` of filters, where there are such layers.

    They join ``files``, such as the figures of the same run, or make a set of their own; ``command`` goes into the
    provenance. ``stats.json`` names the other files of the set with their sha256: those that are there with another
    hash are of another run.
    """
    tables = {"stats.csv": inspection.stats, "filters.csv": inspection.filters.stats}
    contents = {name: table.to_csv().encode() for name, table in tables.items() if len(table)}
    paths = {name: Path(folder) / name for name in (*contents, "stats.json")}
    with ExitStack() as stack:
        files = files or stack.enter_context(FileSet())
        for name, content in contents.items():
            files.write(paths[name], methodcaller("write", content))
        data = inspection.to_json()
        data["provenance"] = {**data["provenance"], "command": command}
        text = json.dumps({**data, "files": files.hashes()}, indent=1) + "\n"
        files.write(paths["stats.json"], lambda file: file.write(text.encode()))
    return paths


def measure_layer(
    weights: HeadWeights, folds: Sequence[Fold], *, layer_spectra: bool = False
) -> tuple[list[Row], dict[SpectrumKey, Array]]:
    """Fit every circuit of one layer: the table's rows, and the singular values ``[head, rank]`` of each stack."""
    rows: list[Row] = []
    spectra: dict[SpectrumKey, Array] = {}
    raw = {"qk": qk_circuit(weights)}
    if weights.W_O is not None:
        raw |= {"ov": ov_circuit(weights), "sum": layer_ov(weights)}
    for fold in folds:
        if fold != "raw" and "norm_unknown" in weights.leaves_out:
            continue
        for name, product in raw.items():
            circuit: Kind = "qk" if name == "qk" else "ov"
            folded = (fold_qk if name == "qk" else fold_ov)(product, weights, fold)
            if name == "sum":
                fit = fit_diagonal(folded, folded.singular_values() if layer_spectra else None)
                rows += _rows(weights, (ALL_HEADS,), circuit, fold, fit)
            else:
                singular = spectra[weights.layer, circuit, fold] = folded.singular_values()
                rows += _rows(weights, range(folded.shape[0]), circuit, fold, fit_diagonal(folded, singular))
    return rows, spectra


def _rows(weights: HeadWeights, heads: Iterable[int | str], circuit: Kind, fold: Fold, fit: DiagonalFit) -> list[Row]:
    statistics = [np.atleast_1d(getattr(fit, name)).tolist() for name in DiagonalFit.names()]
    about = (weights.num_heads, weights.name, " ".join(weights.leaves_out))
    return [
        (weights.layer, head, circuit, fold, *values, *about) for head, *values in zip(heads, *statistics, strict=True)
    ]


def _largest(opened: OpenedModel, specs: IndexedSpecs) -> int:
    """Return the bytes the tensors of the largest layer take in float64."""
    shapes = opened.architecture.shapes
    return max(8 * sum(math.prod(shapes[name]) for name in spec.tensors()) for _, spec in specs)


def _by_kind(opened: OpenedModel, include: Sequence[str]) -> tuple[IndexedSpecs, tuple[Refusal, ...]]:
    """Part the layers that are read from those of a kind that is read only on request."""
    indexed = opened.architecture.indexed()
    refusals = {layer: spec.opt_in_refusal() for layer, spec in indexed if spec.kind not in include}
    unwanted = {layer: refusal for layer, refusal in refusals.items() if refusal is not None}
    wanted = tuple((layer, spec) for layer, spec in indexed if layer not in unwanted)
    if not wanted and unwanted and not opened.architecture.filters:
        first = next(iter(unwanted.values()))
        raise UnsupportedAttentionError(f"{first.path} {first.reason}")
    return wanted, tuple(unwanted.values())


def _chosen(opened: OpenedModel, specs: IndexedSpecs, layers: Sequence[int] | None) -> IndexedSpecs:
    if layers is None:
        return specs
    readable = sorted({layer for layer, _ in specs} | set(range(len(opened.architecture.filters))))
    wrong = [layer for layer in layers if layer not in readable]
    if wrong:
        raise UsageError(f"layer {wrong[0]} of {opened.name} cannot be read: choose from {readable}")
    return tuple((layer, spec) for layer, spec in specs if layer in layers)


def need_attention(inspection: Inspection, what: str) -> Inspection:
    """Return an inspection that holds attention; raises `UnsupportedAttentionError` saying ``what`` is of attention."""
    if not inspection.specs:
        raise UnsupportedAttentionError(
            f"{inspection.model} has depthwise filters and no attention that was read: {what} is of attention. "
            "`attnlens inspect` shows its filters"
        )
    return inspection
