"""The parameter file: what was measured in which models, and what to request of an initialiser to start there.

A file holds, per source, layer and head, the realised fit (alpha, beta with intervals) and the *request*: the (alpha,
beta) to draw with so that the truncated product realises it. Requests are free of width and rank: a full d x d draw
``alpha * Z + beta * I`` has the same two numbers whatever d is, so they, and not the realised ones, carry over to
another model. Beside the fold's entries stand those of the balanced products, with their gains (`attnlens.fit.gains`).
Of depthwise filters it holds the covariance of every layer and a closed form fitted to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from attnlens.atomic import write_text_atomic
from attnlens.circuits import Fold, Kind
from attnlens.drawn import Drawn
from attnlens.errors import ParamsError, first_problem
from attnlens.filters.closed_form import closed_form
from attnlens.filters.entries import FilterEntry, FilterEntryOfVersion2, FilterMedians, carried_over
from attnlens.filters.fit import filter_medians
from attnlens.fit.entries import Entry, Heads, LayerSummary, Pooled, Source, pool, select
from attnlens.fit.entries import by_layer as entries_by_layer
from attnlens.fit.gain_transfer import GainTransfer
from attnlens.fit.gains import LEVELS, CircuitGains, GainsOption
from attnlens.heads import Array
from attnlens.layouts.depthwise.spec import Kernel
from attnlens.printable import printable_json
from attnlens.statistics.depth import _Part, relative_depth
from attnlens.statistics.table import StatsTable, Tabular
from attnlens.strict_json import parse_json
from attnlens.vocabulary import CIRCUIT, FOLD, GAINS, HEADS, index
from attnlens.words import counted, listed

if TYPE_CHECKING:
    from torch import nn

    from attnlens.figures.drawings import Drawing
    from attnlens.models.architecture import Architecture

SCHEMA = "attnlens.params"
VERSION = 4
Per = Literal["head", "layer", "model"]


class LayerRequest(_Part):
    """What to draw one layer with: (alpha, beta) pairs before truncation, in float64 arrays."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    layer: int
    qk: Any
    """``[num_heads, 2]``, None where the file has no QK product"""
    ov: Any
    """``[2]``, of the layer's summed OV; beta carries its sign; None where the file has none"""
    ov_heads: Any = None
    """``[num_heads, 2]`` of single heads, None where the file has none"""
    qk_gains: Any = None
    """`attnlens.fit.gains.LayerGains` of the heads' QK; None without gains"""
    ov_gains: Any = None
    """the same of the layer's summed OV"""
    ov_heads_gains: Any = None
    """the same of single OV heads"""


class InitParams(Drawn, Tabular, _Part):
    """Fitted parameters of one or more models; see the module's text for what carries over and how.

    Its rows are the entries with the names of their models; where there are none, those of depthwise filters.
    """

    schema_: Literal["attnlens.params"] = Field(alias="schema")
    schema_version: Literal[4]
    fold: Fold = Field(description="what an initialiser takes; entries of other folds stand beside for comparison")
    per: Per
    level: float = Field(gt=0, lt=1, description="of the intervals")
    created: dict[str, Any]
    sources: list[Source] = Field(min_length=1)
    entries: list[Entry]
    layers: list[LayerSummary]
    pooled: list[Pooled]
    gain_levels: list[float] = Field(description="levels of the gains' quantiles")
    gains: list[CircuitGains] = Field(description="of the balanced products; none where none were fitted")
    filters: list[FilterEntry]
    filter_medians: list[FilterMedians]

    def __init__(self, **fields: Any) -> None:
        """Check every field. Raises `ParamsError` for the first that is wrong."""
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ParamsError(first_problem(error)) from error

    @model_validator(mode="after")
    def _refer_to_sources(self) -> InitParams:
        rows: list[tuple[str, Entry | CircuitGains | FilterEntry]] = [
            *((f"entries.{index}", entry) for index, entry in enumerate(self.entries)),
            *((f"gains.{index}", gains) for index, gains in enumerate(self.gains)),
            *((f"filters.{index}", filters) for index, filters in enumerate(self.filters)),
        ]
        if not self.entries and not self.filters:
            raise ValueError("entries and filters are both empty")
        there = f"there {'is' if len(self.sources) == 1 else 'are'} {counted(len(self.sources), 'source')}"
        for name, row in rows:
            if row.source >= len(self.sources):
                raise ValueError(f"{name}.source is {row.source}, but {there}")
        if {entry.strided for entry in self.filters} != {found.strided for found in self.filter_medians}:
            raise ValueError("filters and filter_medians go together: one for each kind of stride")
        return self

    def _repr_html_(self) -> str:
        """Return what a notebook shows: attention, depthwise filters, or one after the other."""
        from attnlens.fit.notebook import filter_fits_html, fits_html

        parts = [fits_html(self.sources, self.entries, self.fold, self.level, self.created)] if self.entries else []
        if self.filters:
            parts.append(filter_fits_html(self.sources, self.filters, self.created))
        return "\n".join(parts)

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]  # pydantic's yields fields
        """Yield each row as a dictionary."""
        return Tabular.__iter__(self)

    def __str__(self) -> str:
        """Say what `repr` says."""
        return repr(self)

    def _table(self) -> StatsTable:
        rows: Sequence[Entry | FilterEntry] = self.entries or self.filters
        return StatsTable.of({"model": self.sources[row.source].model, **_flat(row)} for row in rows)

    def _headline(self) -> str:
        models = listed([source.model for source in self.sources], "model")
        parts = []
        if self.entries:
            parts.append(f"{counted(len(self.entries), 'fit')}, {self.fold} products a {self.per}")
        if self.filters:
            parts.append(f"{counted(len(self.filters), 'layer')} of depthwise filters")
        return f"InitParams of {models}: {'; '.join(parts)}"

    def _drawings(self) -> dict[str, Drawing]:
        """Return what draws ``fit_profile``, ``realised_requested`` and ``tails``, a colour, dash and mark a model.

        Where there are depthwise filters, also ``filter_fit`` of each model (numbered where there are several).
        """
        from attnlens.fit.figures import filter_drawings, fit_drawings

        filters = filter_drawings(self.sources, self.filters)
        return filters | (fit_drawings(self.sources, self.entries, self.fold, self.level) if self.entries else {})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> InitParams:
        """Read and validate a parameter file.

        Raises `ParamsError` that names the file and the field that is wrong, or the version that is not known.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:  # no text, or a null character in the name
            raise ParamsError(f"cannot read {path}: {error}") from error
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, where: str = "the parameter file") -> InitParams:
        """Validate the text of a parameter file; ``where`` names it in errors."""
        try:
            data = parse_json(text)
        except ValueError as error:
            raise ParamsError(f"{where} is not JSON ({error}): write it with `attnlens fit-params`") from error
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ParamsError(f"{where} is not a parameter file: its field 'schema' is not {SCHEMA!r}")
        try:
            current = _migrated(data, where)
        except ValidationError as error:
            raise ParamsError(f"{where}: {first_problem(error)}") from error
        try:
            return cls(**current)
        except ParamsError as error:
            raise ParamsError(f"{where}: {error}") from error

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the file atomically."""
        return write_text_atomic(Path(path), self.to_json())

    def to_json(self) -> str:
        """Return the file's text."""
        return printable_json(self.model_dump_json(indent=1, by_alias=True)) + "\n"

    def select(
        self, circuit: Kind, head: Heads = "each", layer: int | None = None, fold: Fold | None = None
    ) -> list[Entry]:
        """Return the entries of one circuit, of single heads (``each``) or of layer sums (``all``); of `fold`."""
        chosen = self.fold if fold is None else FOLD(fold)
        where = None if layer is None else index("layer", layer)
        return select(self.entries, CIRCUIT(circuit), HEADS(head), layer=where, fold=chosen)

    def for_model(self, module: nn.Module, gains: GainsOption = "none") -> tuple[LayerRequest, ...]:
        """Return the requests for every readable layer of a live module, by the transfer rule of `requests`."""
        from attnlens.models.live import open_live

        return self.requests(open_live(module).architecture, gains)

    def requests(self, architecture: Architecture, gains: GainsOption = "none") -> tuple[LayerRequest, ...]:
        """Return what to draw each readable layer of an architecture with.

        ``gains="none"``: the requests of the file's fold. Else those of the balanced products and, beside them, what to
        draw their gains with: ``quantiles``, carried over by the same rule, or ``channels``, each channel's own.

        Transfer rule, in requests (which do not depend on width, head count or head dim):

        - ``per="head"``: one source of the same depth: layer by layer; head by head where the head counts agree, the
          layer's mean request for every head where they do not.
        - ``per="layer"``: sources of the same depth: layer by layer, the mean over heads and models.
        - otherwise (another depth; several models under ``per="head"``): the depth trend at t = layer / (depth - 1).
        - ``per="model"``: the pooled mean for every layer.

        Raises `ParamsError` for gains that the file does not hold, `UsageError` for channels of another depth.
        """
        gains = GAINS(gains)
        places = [(layer, spec.q.heads, spec.o.heads if spec.o else 0) for layer, spec in architecture.indexed()]
        depth = len(architecture.order)
        depths = [source.num_layers for source in self.sources if source.num_layers]
        same_depth = all(layers == depth for layers in depths)
        by_layer = same_depth and (self.per == "layer" or (self.per == "head" and len(depths) == 1))
        fold: Fold = self.fold if gains == "none" else "balanced"
        transfer = GainTransfer.of(self.gains, gains, by_layer and self.per == "head", self.per)
        requests = []
        entries = entries_by_layer(self.entries) if by_layer else {}
        pooled = cache(lambda circuit, head: self._pooled(circuit, head, fold))
        for layer, heads, value_heads in places:
            t, own = relative_depth(layer, depth), layer if by_layer else None
            pairs = partial(self._pairs, entries.get(layer, ()), pooled, t, fold)
            qk = self._heads(pairs("qk", "each"), heads)
            ov = self._heads(pairs("ov", "each"), value_heads)
            total = pairs("ov", "all")
            requests.append(
                LayerRequest(
                    layer=layer,
                    qk=qk,
                    ov=total.mean(0) if len(total) else None,
                    ov_heads=ov,
                    **(transfer.layer(own, t, heads, value_heads) if transfer else {}),
                )
            )
        return tuple(requests)

    def _heads(self, pairs: Array, heads: int) -> Array | None:
        if not len(pairs) or not heads:
            return None
        if self.per == "head" and len(pairs) == heads:
            return pairs
        return np.tile(pairs.mean(0), (heads, 1))

    def _pooled(self, circuit: Kind, head: Heads, fold: Fold) -> Pooled | None:
        """Return what is pooled of one circuit under a fold; the file holds that of its own."""
        if fold == self.fold:
            return next((p for p in self.pooled if p.circuit == circuit and p.head == head), None)
        entries = self.select(circuit, head, fold=fold)
        return pool(circuit, head, entries) if entries else None

    def _pairs(
        self,
        of_layer: Sequence[Entry],
        pooled_of: Callable[[Kind, Heads], Pooled | None],
        t: float,
        fold: Fold,
        circuit: Kind,
        head: Heads,
    ) -> Array:
        """Return ``[n, 2]`` requests: those of a layer, or the one pair that trend or pooled mean give."""
        entries = select(of_layer, circuit, head, fold=fold)
        if entries:
            return np.array([[entry.request_alpha, entry.request_beta] for entry in entries])
        pooled = pooled_of(circuit, head)
        if pooled is None:
            return np.empty((0, 2))
        if self.per == "model":
            return np.array([[pooled.alpha.mean, pooled.beta.mean]])
        return np.array([pooled.at(t)])

    def filter_covariance(
        self, depth: float, kernel: Kernel, form: Literal["full", "parametric"], strided: bool = False
    ) -> Array | None:
        """Return the covariance, with trace 1, to draw a layer of depthwise filters with; None where there is none.

        ``full``: the measured ones, carried over to this relative depth and kernel by `filters.entries.carried_over`.
        ``parametric``: `filters.closed_form.closed_form` with the medians of the layers that are strided as this one
        is, of the others where there are none; s scaled with the square of the kernel's side.
        """
        if form == "full":
            return carried_over(self.filters, depth, kernel, strided)
        if not self.filter_medians:
            return None
        own = min(self.filter_medians, key=lambda found: found.strided != strided)
        return closed_form(kernel, own.relative().at(kernel))


def _flat(row: Entry | FilterEntry) -> dict[str, Any]:
    """Return the fields of an entry that are single numbers or words."""
    found = row.model_dump(exclude={"source", "depth"})
    first = ("layer", "head", "circuit", "fold", "alpha", "beta", "verdict")
    ordered = {name: found[name] for name in first if name in found} | found
    return {name: value for name, value in ordered.items() if not isinstance(value, list | dict)}


class _OfVersion2(BaseModel):
    """What a file of version 2 holds of filters; the rest of it is as today."""

    filters: list[FilterEntryOfVersion2]


def _refitted(data: dict[str, Any]) -> dict[str, Any]:
    """Fit today's closed form to the covariances of a file of version 2. Raises pydantic's `ValidationError`."""
    kept = {name: value for name, value in data.items() if name not in ("filters", "filter_trend")}
    found = [entry.refitted() for entry in _OfVersion2.model_validate(data).filters]
    dumped = {
        "filters": [e.model_dump() for e in found],
        "filter_medians": [m.model_dump() for m in filter_medians(found)],
    }
    return {**kept, **dumped, "schema_version": 3}


def _without_gains(data: dict[str, Any]) -> dict[str, Any]:
    """Give a file of version 3 the place for gains: it has none."""
    return {"gain_levels": LEVELS.tolist(), "gains": [], **data, "schema_version": 4}


# Version -> function that turns a file of that version into the next one.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: lambda data: {**data, "filters": [], "filter_trend": None, "schema_version": 2},
    2: _refitted,
    3: _without_gains,
}


def _migrated(data: dict[str, Any], where: str) -> dict[str, Any]:
    version = data.get("schema_version")
    while type(version) is int and version < VERSION and version in MIGRATIONS:
        data = MIGRATIONS[version](data)
        version = data.get("schema_version")
    if type(version) is not int or version != VERSION:  # JSON's true equals 1
        raise ParamsError(
            f"{where} has schema_version {version!r}; this attnlens reads {sorted([*MIGRATIONS, VERSION])}: "
            "update attnlens, or fit again"
        )
    return data
