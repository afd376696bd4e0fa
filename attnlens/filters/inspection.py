"""Inspecting the depthwise filters of an opened model: one row of statistics a layer, covariances on request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from attnlens.errors import UsageError
from attnlens.filters.covariance import second_moment
from attnlens.filters.statistics import COLUMNS, filter_row, fit_filters
from attnlens.heads import Array
from attnlens.layouts.depthwise.spec import FilterSpec
from attnlens.layouts.flags import layers_by_reason
from attnlens.layouts.spec import Refusal
from attnlens.statistics.table import Row, StatsTable, Tabular
from attnlens.threads import Progress, over_threads
from attnlens.words import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from attnlens.figures.drawings import Drawing
    from attnlens.models.architecture import Architecture

Reader = Callable[[int], Array]
"""Reads a layer's filters ``[filter, height, width]``."""
IndexedFilters = tuple[tuple[int, FilterSpec], ...]


@dataclass(frozen=True, repr=False)
class FilterInspection(Tabular):
    """What was found in a model's depthwise filters: ``stats`` has a row a layer, under `statistics.COLUMNS`."""

    stats: StatsTable
    specs: IndexedFilters
    depth: int
    """Number of layers of filters of the model, chosen or not."""
    refused: tuple[Refusal, ...]
    reader: Reader = field(repr=False)
    spectra: dict[int, Array] = field(repr=False)
    """Eigenvalues of every layer's covariance, descending."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers that were read, counted over layers of filters."""
        return tuple(layer for layer, _ in self.specs)

    def _table(self) -> StatsTable:
        return self.stats

    def _headline(self) -> str:
        return f"FilterInspection of {len(self.specs)} of {counted(self.depth, 'layer')} of depthwise filters"

    def read(self, layer: int) -> Array:
        """Read one layer's filters ``[filter, height, width]`` again."""
        if layer not in self.layers:
            raise UsageError(f"layer {layer} of filters was not read: choose from {list(self.layers)}")
        return self.reader(layer)

    def covariance(self, layer: int) -> Array:
        """Return a layer's covariance S = F^T F / n, ``[position, position]``."""
        return second_moment(self.read(layer))

    def left_out(self) -> dict[str, list[int]]:
        """Say in words what else acts on the filters, with the layers it is true of."""
        return layers_by_reason((layer, [spec.label]) for layer, spec in self.specs)

    def drawings(self, model: str) -> dict[str, Drawing]:
        """Return what draws ``filter_covariance``, ``filter_profile`` and ``filter_spectra`` of the layers read."""
        from attnlens.filters.figures import filter_drawings

        covariances = {layer: (self.covariance(layer), spec) for layer, spec in self.specs}
        return filter_drawings(self.stats, covariances, self.spectra, self.left_out(), model=model)

    def figures(self, model: str) -> dict[str, Figure]:
        """Draw ``filter_covariance``, ``filter_profile`` and ``filter_spectra`` of the layers that were read."""
        from attnlens.figures.drawings import draw_all

        return draw_all(self.drawings(model))

    def to_json(self) -> dict[str, Any]:
        """Return everything but the weights as JSON-ready data."""
        return {
            "stats": self.stats.json_rows(),
            "spectra": {str(layer): values.tolist() for layer, values in self.spectra.items()},
            "layers": [{"layer": layer, **spec.to_json()} for layer, spec in self.specs],
            "refused": [vars(refusal) for refusal in self.refused],
        }


def inspect_filters(
    architecture: Architecture, reader: Reader, layers: Sequence[int] | None, progress: Progress = iter
) -> FilterInspection:
    """Measure every layer of depthwise filters of an architecture, or those of ``layers`` that there are."""
    every = enumerate(architecture.filters)
    specs = tuple((layer, spec) for layer, spec in every if layers is None or layer in layers)

    def measure(indexed: tuple[int, FilterSpec]) -> tuple[Row, Array]:
        layer, spec = indexed
        fit, values = fit_filters(reader(layer), spec.stride, seed=layer)
        return filter_row(layer, spec, fit), values

    results = over_threads(measure, specs, progress) if specs else []
    return FilterInspection(
        stats=StatsTable(tuple(row for row, _ in results), COLUMNS),
        specs=specs,
        depth=len(architecture.filters),
        refused=architecture.refused_filters,
        reader=reader,
        spectra={layer: values for (layer, _), (_, values) in zip(specs, results, strict=True)},
    )
