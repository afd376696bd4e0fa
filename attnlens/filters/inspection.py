"""Inspecting the depthwise filters of an opened model: one row of statistics a layer, covariances on request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any

from attnlens.errors import UsageError
from attnlens.filters.covariance import second_moment
from attnlens.filters.read_write import read_filters
from attnlens.filters.spec import FilterSpec
from attnlens.filters.statistics import COLUMNS, filter_row, fit_filters
from attnlens.heads import Array
from attnlens.layouts.spec import Refusal
from attnlens.statistics.table import Row, StatsTable
from attnlens.threads import over_threads

if TYPE_CHECKING:
    from attnlens.checkpoints import Checkpoint
    from attnlens.models.open import OpenedModel

IndexedFilters = tuple[tuple[int, FilterSpec], ...]


@dataclass(frozen=True)
class FilterInspection:
    """What was found in a model's depthwise filters: ``stats`` has a row a layer, under `statistics.COLUMNS`."""

    stats: StatsTable
    specs: IndexedFilters
    depth: int
    """Number of layers of filters of the model, chosen or not."""
    refused: tuple[Refusal, ...]
    checkpoint: Checkpoint = field(repr=False)
    spectra: dict[int, Array] = field(repr=False)
    """Eigenvalues of every layer's covariance, descending."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers that were read, counted over layers of filters."""
        return tuple(layer for layer, _ in self.specs)

    def read(self, layer: int) -> Array:
        """Read one layer's filters ``[filter, height, width]`` again."""
        for index, spec in self.specs:
            if index == layer:
                return read_filters(spec, self.checkpoint)
        raise UsageError(f"layer {layer} of filters was not read: choose from {list(self.layers)}")

    def covariance(self, layer: int) -> Array:
        """Return a layer's covariance S = F^T F / n, ``[position, position]``."""
        return second_moment(self.read(layer))

    def left_out(self) -> dict[str, list[int]]:
        """Say in words what else acts on the filters, with the layers it is true of."""
        found: dict[str, list[int]] = {}
        for layer, spec in self.specs:
            if spec.label:
                found.setdefault(spec.label, []).append(layer)
        return found

    def to_json(self) -> dict[str, Any]:
        """Return everything but the weights as JSON-ready data."""
        return {
            "stats": self.stats.json_rows(),
            "spectra": {str(layer): values.tolist() for layer, values in self.spectra.items()},
            "layers": [{"layer": layer, **spec.to_json()} for layer, spec in self.specs],
            "refused": [vars(refusal) for refusal in self.refused],
        }


def inspect_filters(
    opened: OpenedModel, layers: Sequence[int] | None, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter
) -> FilterInspection:
    """Measure every layer of depthwise filters of an opened model, or those of ``layers`` that there are."""
    every = enumerate(opened.architecture.filters)
    specs = tuple((layer, spec) for layer, spec in every if layers is None or layer in layers)
    reading = Lock()

    def measure(indexed: tuple[int, FilterSpec]) -> tuple[Row, Array]:
        layer, spec = indexed
        with reading:  # a checkpoint serves one reader at a time
            filters = read_filters(spec, opened.checkpoint)
        fit, values = fit_filters(filters, spec.stride, seed=layer)
        return filter_row(layer, spec, fit), values

    results = over_threads(measure, specs, progress) if specs else []
    return FilterInspection(
        stats=StatsTable(tuple(row for row, _ in results), COLUMNS),
        specs=specs,
        depth=len(opened.architecture.filters),
        refused=opened.architecture.refused_filters,
        checkpoint=opened.checkpoint,
        spectra={layer: values for (layer, _), (_, values) in zip(specs, results, strict=True)},
    )
