"""Inspecting a model: statistics of every circuit and of every layer of filters, and what they are of on request."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnlens.atomic import FileSet
from attnlens.balance import Gains
from attnlens.circuits import (
    CIRCUITS,
    FactoredProduct,
    Fold,
    Kind,
    layer_ov,
    parse_folds,
    sum_of,
)
from attnlens.errors import UnsupportedAttentionError, UsageError
from attnlens.filters.inspection import FilterInspection, inspect_filters
from attnlens.heads import Array, HeadWeights
from attnlens.layouts import AttentionSpec, Refusal
from attnlens.layouts.flags import FLAGS, in_words, layers_by_reason
from attnlens.layouts.spec import OPT_IN
from attnlens.models.open import named_and_weights, open_model
from attnlens.models.opened import Access, IndexedSpecs, OpenedModel, unknown_norms
from attnlens.provenance import run_provenance
from attnlens.statistics.corners import Corners
from attnlens.statistics.gains import gain_profiles
from attnlens.statistics.layer import GainsKey, Observe, SpectrumKey, measure_layer
from attnlens.statistics.table import ALL_HEADS, Row, StatsTable, Tabular
from attnlens.threads import Progress, over_threads
from attnlens.vocabulary import CIRCUIT, FOLD, HEADS, ON_REQUEST, head_index, layer_choice, layer_index
from attnlens.words import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

    from attnlens.figures.drawings import Drawing
    from attnlens.figures.panels import Given


UNSAID = frozenset({"qk_bias"})
"""Flags too common to be said of every model; the table holds them all the same."""


@dataclass(frozen=True, repr=False)
class Inspection(Tabular):
    """What `inspect` found: ``stats`` is the table of attention, ``filters`` what there is of depthwise filters.

    Its rows are those of ``stats``; of a model without attention those of ``filters``.

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
    opened: OpenedModel = field(repr=False)
    spectra: dict[SpectrumKey, Array] = field(repr=False)
    """Singular values of every head's product, ``[head, rank]``, by (layer, circuit, fold)."""
    gains: dict[GainsKey, Gains] = field(repr=False)
    """Row and column gains of balanced products by (layer, circuit, ``each`` head or ``all`` summed)."""
    filters: FilterInspection

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the attention layers that were read."""
        return tuple(layer for layer, _ in self.specs)

    def _table(self) -> StatsTable:
        return self.stats if self.specs else self.filters.stats

    def _headline(self) -> str:
        parts = []
        if self.specs:
            parts.append(f"{len(self.specs)} of {counted(self.depth, 'attention layer')}, {' and '.join(self.folds)}")
        if self.filters.specs:
            parts.append(f"{len(self.filters.specs)} of {counted(self.filters.depth, 'layer')} of depthwise filters")
        return f"Inspection of {self.model}: {'; '.join(parts)}"

    def heads(self, layer: int) -> HeadWeights:
        """Read one layer's weights again."""
        return self.opened.heads(layer_index(layer, self.layers))

    def circuits(
        self, layer: int, head: int | str | None = None, *, circuit: Kind = "qk", fold: Fold = "raw"
    ) -> FactoredProduct:
        """Return a layer's QK or OV product(s): of one head, of ``"all"`` heads summed (OV), or stacked (None)."""
        circuit, fold = CIRCUIT(circuit), FOLD(fold)
        weights = self.heads(layer)
        if HEADS.find(head) == ALL_HEADS:
            if circuit != "ov":
                raise UsageError("only OV products are summed over heads: QK scores of different heads never add")
            return layer_ov(weights, fold)
        product = CIRCUITS[circuit](weights, fold)
        if head is None:
            return product
        return product.head(head_index(head, product.shape[0], weights.layer))

    def figures(
        self,
        fold: Fold | None = None,
        size: int = 64,
        corners: Corners | None = None,
        *,
        style: str | None = None,
        width: str | float | None = None,
    ) -> dict[str, Figure]:
        """Draw ``qk_heatmap``, ``ov_heatmap``, ``depth_profile`` and ``spectra`` where attention was read.

        Where balanced products were measured, ``gains`` too.
        Where depthwise filters were, ``filter_covariance``, ``filter_profile`` and ``filter_spectra``.
        The heatmaps show the top-left ``size x size`` corner of every product under ``fold`` (effective where it was
        measured), the spectra are of ``fold`` too, and the profile compares all folds that were measured.
        ``corners`` are those that were kept while measuring; without them, or where they are of another fold or size,
        the layers are read again. ``style`` and ``width`` are those of `attnlens.figure_style`. Raises `UsageError` for
        a fold that was not measured or a size below 1.
        """
        from attnlens.figures.drawings import draw_all

        return draw_all(self._drawings(fold, size, corners), style, width)

    def figure(
        self,
        name: str,
        fold: Fold | None = None,
        size: int = 64,
        corners: Corners | None = None,
        *,
        ax: Given | None = None,
        style: str | None = None,
        width: str | float | None = None,
    ) -> Figure:
        """Draw one of `figures` by its name, and return the figure it is in.

        ``ax`` are axes to draw into, with no title and no prose: one where the figure has one panel, one a panel in
        reading order, or a dict from names of panels to axes, which draws those alone: ``{"beta ov": ax}``. The names
        are in the error for others. A figure with a colour bar takes its room from the axes. Raises `UsageError`.
        """
        from attnlens.figures.drawings import draw_one

        return draw_one(self._drawings(fold, size, corners), name, ax, style, width)

    def _drawings(self, fold: Fold | None, size: int, corners: Corners | None) -> dict[str, Drawing]:
        from attnlens.figures.circuits import circuit_drawings

        fold = ("effective" if "effective" in self.folds else self.folds[0]) if fold is None else FOLD(fold)
        if fold not in self.folds:
            raise UsageError(f"fold {fold!r} was not measured: choose from {', '.join(self.folds)}")
        _check_size(size)
        filters = self.filters.drawings(self.model) if self.filters.specs else {}
        if not self.specs:
            return filters
        known = corners if corners is not None and (corners.fold, corners.size) == (fold, size) else None
        words = in_words(self.left_out(), len(self.layers))
        about: Any = {"model": self.model, "notes": f"Note: {words}." if words else ""}
        read = cache(lambda: known or self.corners(fold, size))
        profiles = gain_profiles(self.gains) if self.gains else {}
        return circuit_drawings(self.stats, self.folds, self.spectra, profiles, read, fold=fold, **about) | filters

    def corners(self, fold: Fold, size: int) -> Corners:
        """Read the layers again and return the corners of their products."""
        fold = FOLD(fold)
        _check_size(size)
        found = Corners(fold, size)
        for layer in self.layers:
            circuits = [circuit for circuit in CIRCUITS if (layer, circuit, fold) in self.spectra]
            weights = self.heads(layer) if circuits else None
            for circuit in circuits:  # none without W_O, or under a norm that is not known
                assert weights is not None
                products = CIRCUITS[circuit](weights, fold)
                found.observe(weights, circuit, fold, products)
                if circuit == "ov":
                    found.observe(weights, circuit, fold, sum_of(products, weights, fold))
        return found

    def left_out(self) -> dict[str, list[int]]:
        """Say what the products leave out of the network, in words, with the layers it is true of."""
        return layers_by_reason((layer, _caveats(spec)) for layer, spec in self.specs)

    def stacks(self) -> dict[str, list[int]]:
        """Return which layers stand in which stack: paths with ``*`` for their numbers, and the layers of each."""
        found: dict[str, list[int]] = {}
        for layer, spec in self.specs:
            found.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", spec.path), []).append(layer)
        return found

    def _repr_html_(self) -> str:
        """Return what a notebook shows: attention, depthwise filters, or one after the other."""
        about: dict[str, Any] = {"model": self.model, "provenance": self.provenance}
        parts = []
        if self.specs:
            from attnlens.figures.notebook import profile_html

            parts.append(profile_html(self.stats, self.folds, self.layers, self.depth, **about))
        if self.filters.specs:
            from attnlens.filters.notebook import filters_html

            parts.append(filters_html(self.filters.stats, self.filters.depth, **about))
        return "\n".join(parts)

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
    layers: Sequence[int] | int | str | None = None,
    layer_spectra: bool = False,
    include: Sequence[str] = (),
    weights: str | None = None,
    row_order: str | None = None,
    offline: bool = False,
    remote: bool = False,
    progress: Progress = iter,
    observe: Observe | None = None,
) -> Inspection:
    """Return the fit of every QK and OV circuit, and of every covariance of depthwise filters, of a model.

    ``source`` is a timm name, an ``hf-hub:`` or ``local-dir:`` name, a path to a checkpoint, a live ``nn.Module``, a
    state dict, or None for the small ViT shipped with the package. Where ``checkpoint`` gives the weights, ``source``
    names the architecture; ``inspect(weights, model=name)`` says the same. ``model_args`` are arguments of timm's
    architecture where the shapes do not show them; ``input_size`` (a side, or the shape of one input) serves to follow
    a live network that does not state it. ``num_heads`` reads what nothing names the architecture of, a file, a state
    dict or a live network, by its tensors' names. ``weights`` names one of several networks in a file, by its prefix or
    key; ``row_order`` the order of packed rows, from the outermost axis: ``qkv,head,dim``, ``head,dim,qkv``, ...

    Statistics: per head W_QK = W_Q @ W_K.T and W_OV = W_V @ W_O, per layer the sum of W_OV over its
    heads; see `DiagonalFit` and `GainStatistics`. ``fold`` is raw, effective, centred, balanced, both (raw and
    effective) or all. ``layer_spectra``
    also fills the statistics of the layer sums that need every eigenvalue, an O(embed_dim^3) cost a layer.
    ``include`` may name ``channel`` and ``linear``: kinds of attention whose product is no score between tokens, read
    only on request. ``offline`` uses no network; ``remote`` fetches of a safetensors file on a hub, unless it is in the
    local cache, only the tensors that are read. ``progress`` wraps the iteration over layers; ``observe`` is called
    with the products of every layer as they are measured, by several threads at once: see `Observe`. Layers of
    depthwise convolutions are counted by themselves; what is said of each: `attnlens.filters.statistics.FilterFit`.
    ``layers`` chooses of both kinds: indices, one index, or text such as ``"0-3,11"``.

    Raises `AttnlensError` subclasses: no such model, unreadable or unfitting weights, attention of a refused family.
    """
    names, wanted = parse_folds(fold), layer_choice(layers)
    asked = tuple(map(ON_REQUEST, [include] if isinstance(include, str) else include))
    architecture, held = named_and_weights(source, checkpoint, model)
    access = Access(offline=offline, remote=remote, network=weights, row_order=row_order)
    opened = open_model(
        architecture, held, num_heads, access, filters=True, model_args=model_args, input_size=input_size
    )
    provenance = opened.provenance_beside()
    unwanted = opened.not_asked_for(asked)
    if len(unwanted) == len(opened.architecture.specs) and unwanted and not opened.architecture.filters:
        first = next(iter(unwanted.values()))
        raise UnsupportedAttentionError(f"{first.path} {first.reason}")
    specs = opened.choose(wanted, include=asked, or_filters=True)
    filters = inspect_filters(opened.architecture, opened.filters, wanted, progress)

    def measure(
        indexed: tuple[int, AttentionSpec],
    ) -> tuple[list[Row], dict[SpectrumKey, Array], dict[GainsKey, Gains]]:
        return measure_layer(opened.heads(indexed[0]), names, layer_spectra=layer_spectra, observe=observe)

    largest = max((opened.bytes_of(spec) for _, spec in specs), default=0)
    results = over_threads(measure, specs, progress, largest=largest) if specs else []
    spectra = {key: values for _, found, _ in results for key, values in found.items()}
    measured = tuple(name for name in names if not specs or any(key[2] == name for key in spectra))
    if not measured:
        raise UsageError(unknown_norms(opened))
    return Inspection(
        model=opened.name,
        stats=StatsTable(tuple(row for rows, _, _ in results for row in rows)),
        folds=measured,
        depth=len(opened.architecture.order),
        specs=specs,
        refused=(*opened.architecture.refused, *unwanted.values()),
        provenance={**provenance(), **run_provenance()},
        opened=opened,
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
        inspection.opened.checkpoint.check()  # figures are drawn from the weights after these were measured
        files.write(paths["stats.json"], lambda file: file.write(text.encode()))
    return paths


def _check_size(size: int) -> None:
    if not isinstance(size, int) or size < 1:
        raise UsageError(f"a corner of {size} x {size} entries cannot be drawn: give a size of 1 or more")


def _caveats(spec: AttentionSpec) -> list[str]:
    """Say in words what a layer's product leaves out and what else a reader must know."""
    flags = [FLAGS.get(flag, flag) for flag in spec.leaves_out if flag not in UNSAID]
    return [*flags, *([": ".join(OPT_IN[spec.kind])] if spec.kind in OPT_IN else []), spec.label]


def need_attention(inspection: Inspection, what: str) -> Inspection:
    """Return an inspection that holds attention; raises `UnsupportedAttentionError` saying ``what`` is of attention."""
    if not inspection.specs:
        raise UnsupportedAttentionError(
            f"{inspection.model} has depthwise filters and no attention that was read: {what} is of attention. "
            "`attnlens inspect` shows its filters"
        )
    return inspection
