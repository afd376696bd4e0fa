"""Inspecting a model: statistics of every circuit and of every layer of filters, and what they are of on request."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from operator import methodcaller
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from attnlens.atomic import FileSet
from attnlens.balance import Gains
from attnlens.circuits import (
    CIRCUITS,
    FactoredProduct,
    Fold,
    Kind,
    fold_ov,
    fold_qk,
    layer_ov,
    ov_circuit,
    parse_folds,
    qk_circuit,
    sum_of,
)
from attnlens.errors import UnsupportedAttentionError, UsageError
from attnlens.filters.inspection import FilterInspection, inspect_filters
from attnlens.heads import Array, HeadWeights
from attnlens.layouts import AttentionSpec, Refusal, read_heads
from attnlens.layouts.flags import FLAGS
from attnlens.layouts.spec import OPT_IN
from attnlens.models.open import Access, OpenedModel, open_model
from attnlens.provenance import run_provenance
from attnlens.statistics.diagonal import fit_diagonal
from attnlens.statistics.gains import describe_gains
from attnlens.statistics.table import ALL_HEADS, Row, StatsTable
from attnlens.threads import Progress, over_threads

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.figure import Figure
    from torch import nn

    from attnlens.checkpoints import Checkpoint

UNSAID = frozenset({"qk_bias"})
"""Flags too common to be said of every model; the table holds them all the same."""

SpectrumKey = tuple[int, Kind, Fold]
GainsKey = tuple[int, Kind, str]
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
    gains: dict[GainsKey, Gains] = field(repr=False)
    """Row and column gains of balanced products by (layer, circuit, ``each`` head or ``all`` summed)."""
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
            stack = CIRCUITS[circuit](weights, fold)
            found[layer] = dict(enumerate(stack.dense(size)))
            if circuit == "ov":
                found[layer][ALL_HEADS] = sum_of(stack, weights, fold).dense(size)
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
    model: str | os.PathLike[str] | nn.Module | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    num_heads: int | None = None,
    fold: str = "both",
    layers: Sequence[int] | None = None,
    layer_spectra: bool = False,
    include: Sequence[str] = (),
    offline: bool = False,
    remote: bool = False,
    progress: Progress = iter,
) -> Inspection:
    """Read a model's attention weights and depthwise filters; fit every QK and OV circuit and every covariance.

    ``model`` is a timm name, an ``hf-hub:`` or ``local-dir:`` name, a path to a checkpoint, a live ``nn.Module``, or
    None for the small ViT shipped with the package; ``checkpoint`` gives the weights and ``model`` then names the
    architecture. ``num_heads`` reads a file nothing names the architecture of by its tensors' names.

    Statistics: per head W_QK = W_Q @ W_K.T and W_OV = W_V @ W_O, per layer the sum of W_OV over its
    heads; see `DiagonalFit` and `GainStatistics`. ``fold`` is raw, effective, centred, balanced, both (raw and
    effective) or all. ``layer_spectra``
    also fills the statistics of the layer sums that need every eigenvalue, an O(embed_dim^3) cost a layer.
    ``include`` may name ``channel`` and ``linear``: kinds of attention whose product is no score between tokens, read
    only on request. ``offline`` uses no network; ``remote`` fetches of a safetensors file on a hub, unless it is in the
    local cache, only the tensors that are read. ``progress`` wraps the iteration over layers. Layers of depthwise
    convolutions are counted by themselves; what is said of each: `attnlens.filters.statistics.FilterFit`. ``layers``
    chooses of both kinds.

    Raises `AttnlensError` subclasses: no such model, unreadable or unfitting weights, attention of a refused family.
    """
    opened = open_model(model, checkpoint, num_heads, Access(offline=offline, remote=remote), filters=True)
    names = parse_folds(fold)
    wanted, unwanted = _by_kind(opened, include)
    specs = _chosen(opened, wanted, layers)
    filters = inspect_filters(opened, layers, progress)
    reading = Lock()

    def measure(
        indexed: tuple[int, AttentionSpec],
    ) -> tuple[list[Row], dict[SpectrumKey, Array], dict[GainsKey, Gains]]:
        with reading:  # a checkpoint serves one reader at a time
            weights = read_heads(indexed[1], opened.checkpoint, indexed[0])
        return measure_layer(weights, names, layer_spectra=layer_spectra)

    results = over_threads(measure, specs, progress, largest=_largest(opened, specs)) if specs else []
    spectra = {key: values for _, found, _ in results for key, values in found.items()}
    measured = tuple(name for name in names if not specs or any(key[2] == name for key in spectra))
    if not measured:
        raise UsageError(f"the norms in front of the layers of {opened.name} are not known: use --fold raw")
    return Inspection(
        model=opened.name,
        stats=StatsTable(tuple(row for rows, _, _ in results for row in rows)),
        folds=measured,
        depth=len(opened.architecture.order),
        specs=specs,
        refused=(*opened.architecture.refused, *unwanted),
        provenance={**opened.provenance(), **run_provenance()},
        checkpoint=opened.checkpoint,
        spectra=spectra,
        gains={key: gains for _, _, found in results for key, gains in found.items()},
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
) -> tuple[list[Row], dict[SpectrumKey, Array], dict[GainsKey, Gains]]:
    """Fit every circuit of one layer: table rows, singular values ``[head, rank]`` and balanced products' gains."""
    rows: list[Row] = []
    spectra: dict[SpectrumKey, Array] = {}
    gains: dict[GainsKey, Gains] = {}
    raw = {"qk": qk_circuit(weights)}
    if weights.W_O is not None:
        raw |= {"ov": ov_circuit(weights), "sum": layer_ov(weights)}
    for fold in folds:
        if fold != "raw" and "norm_unknown" in weights.leaves_out:
            continue
        for name, product in raw.items():
            circuit: Kind = "qk" if name == "qk" else "ov"
            folded = (fold_qk if name == "qk" else fold_ov)(product, weights, fold)
            heads: Iterable[int | str] = (ALL_HEADS,) if name == "sum" else range(folded.shape[0])
            singular = folded.singular_values() if name != "sum" or layer_spectra else None
            if name != "sum" and singular is not None:
                spectra[weights.layer, circuit, fold] = singular
            if folded.gains is not None:
                gains[weights.layer, circuit, ALL_HEADS if name == "sum" else "each"] = folded.gains
            rows += _rows(weights, heads, circuit, fold, (fit_diagonal(folded, singular), describe_gains(folded)))
    return rows, spectra, gains


def _rows(
    weights: HeadWeights, heads: Iterable[int | str], circuit: Kind, fold: Fold, found: Sequence[Any]
) -> list[Row]:
    statistics = [np.atleast_1d(getattr(each, name)).tolist() for each in found for name in each.names()]
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
