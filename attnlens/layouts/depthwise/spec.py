"""What a layer of depthwise filters is: plain data that says which tensor holds them. JSON in, JSON out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

Kernel = tuple[int, int]
"""Height and width of a filter."""


@dataclass(frozen=True, kw_only=True)
class FilterSpec:
    """One depthwise convolution: every filter sees one input channel, ``filters // channels`` filters each.

    ``tensor`` is stored as ``[filters, 1, height, width]``. ``label`` says in words what else a reader must know.
    """

    path: str
    module_class: str
    tensor: str
    bias: str | None
    filters: int
    channels: int
    kernel: Kernel
    stride: tuple[int, int]
    dilation: tuple[int, int]
    label: str = ""

    @property
    def positions(self) -> int:
        """Number of entries of a filter: the side of its covariance."""
        return self.kernel[0] * self.kernel[1]

    @property
    def strided(self) -> bool:
        """Whether the layer reads fewer places than there are."""
        return max(self.stride) > 1

    def tensors(self) -> tuple[str, ...]:
        """Name every tensor of the layer: its filters, then its bias."""
        return (self.tensor, self.bias) if self.bias else (self.tensor,)

    def to_json(self) -> dict[str, Any]:
        """Return the spec as JSON-ready data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> FilterSpec:
        """Rebuild a spec from `to_json`."""
        return cls(**{**data, **{name: tuple(data[name]) for name in ("kernel", "stride", "dilation")}})
