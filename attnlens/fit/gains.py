"""What a parameter file holds of gains: those of every channel, and their law, which carries over to other widths.

A balanced product is N = diag(r)^-1 M diag(c)^-1 (`attnlens.balance`). Per layer and circuit the file holds log r and
log c channel by channel for every head, and of them what does not depend on the width: quantiles, averaged over the
heads, the correlation of r with c over channels, and how far the heads share them.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np
from pydantic import Field, field_validator, model_validator

from attnlens.circuits import FactoredProduct, Kind
from attnlens.fit.entries import Heads
from attnlens.heads import Array
from attnlens.statistics.depth import _Part
from attnlens.statistics.pairs import offdiagonal_kurtosis
from attnlens.strict_json import finite_or_none
from attnlens.words import counted

GainsOption = Literal["none", "quantiles", "channels"]
LOGITS = np.arange(-34, 35) / 4
"""log(p / (1 - p)) of the quantiles' levels p: .0002 to .9998, closest at both ends."""
LEVELS = (1 / (1 + np.exp(-LOGITS))).round(6)
_WEIGHTS = np.diff(np.concatenate([[0.0], (LEVELS[1:] + LEVELS[:-1]) / 2, [1.0]]))
"""Share of the channels that each level stands for."""
_STORED = np.dtype("<f2")


class Side(_Part):
    """The gains of one side of a layer's circuit: r of the rows, or c of the columns."""

    quantiles: list[float] = Field(description="of log gain over channels, at `gain_levels`, averaged over heads")
    shared: float = Field(ge=0, le=1, description="mean correlation of two heads' normal scores over channels")
    dead: float = Field(ge=0, le=1, description="share of channels with nothing off the diagonal, without a gain")
    channels: str = Field(description="base64 of float16, little-endian: log gain [head, channel], -inf where dead")

    @field_validator("quantiles")
    @classmethod
    def _rise(cls, quantiles: list[float]) -> list[float]:
        if len(quantiles) != len(LEVELS) or (np.diff(quantiles) < 0).any():
            raise ValueError(f"holds {len(quantiles)} numbers, where {len(LEVELS)} that do not fall are expected")
        return quantiles

    @classmethod
    def of(cls, logs: Array) -> Side:
        """Describe log gains ``[head, channel]``, -inf where dead; heads that are zero are left out."""
        alive = np.isfinite(logs)
        heads = [row[there] for row, there in zip(logs, alive, strict=True) if there.any()]
        typical = np.mean([_quantiles(row) for row in heads], 0) if heads else np.zeros(len(LEVELS))
        return cls(
            quantiles=unit_mean_square(typical, _WEIGHTS).tolist(),
            shared=float(np.clip(_mean_correlation(normal_scores(logs)), 0, 1)),
            dead=float(1 - np.mean(alive[alive.any(1)])) if heads else 1.0,
            channels=base64.b64encode(logs.astype(_STORED).tobytes()).decode(),
        )

    def by_channel(self, heads: int, width: int) -> Array:
        """Return log gain ``[head, channel]``."""
        return np.frombuffer(base64.b64decode(self.channels), _STORED).reshape(heads, width).astype(np.float64)


class CircuitGains(_Part):
    """The gains of one circuit in one layer of one model: of each head, or of the layer's sum."""

    source: int = Field(ge=0)
    layer: int = Field(ge=0)
    depth: float = Field(ge=0, le=1)
    circuit: Kind
    head: Heads
    num_heads: int = Field(ge=1)
    embed_dim: int = Field(ge=2)
    rows: Side
    cols: Side
    correlation: float = Field(ge=-1, le=1, description="of r with c: normal scores over channels, mean over heads")
    kurtosis: list[float | None] = Field(description="of each head's product before balancing, off the diagonal")

    @model_validator(mode="after")
    def _hold_every_channel(self) -> CircuitGains:
        for name, side in (("rows", self.rows), ("cols", self.cols)):
            try:
                logs = side.by_channel(self.num_heads, self.embed_dim)
            except ValueError as error:  # of base64 too
                raise ValueError(
                    f"{name}.channels is not {self.num_heads} x {self.embed_dim} float16: {error}"
                ) from error
            if np.isnan(logs).any() or np.isposinf(logs).any():
                raise ValueError(f"{name}.channels holds a gain that is no number")
        if len(self.kurtosis) != self.num_heads:
            raise ValueError(f"kurtosis holds {len(self.kurtosis)} numbers for {counted(self.num_heads, 'head')}")
        return self

    @classmethod
    def of(cls, product: FactoredProduct, place: dict[str, object], head: Heads) -> CircuitGains:
        """Describe the gains of a stack of balanced products, ``[head, rows, cols]`` or one."""
        gains = product.gains
        assert gains is not None
        width = product.shape[-1]
        rows, cols = (
            np.where(alive, np.log(each), -np.inf).reshape(-1, width)
            for each, alive in ((gains.rows, gains.alive_rows), (gains.cols, gains.alive_cols))
        )
        tails = np.ravel(offdiagonal_kurtosis(product.scaled(gains.rows, gains.cols)))
        together = [correlation(*pair) for pair in zip(normal_scores(rows), normal_scores(cols), strict=True)]
        return cls(
            **place,  # type: ignore[arg-type]
            head=head,
            num_heads=len(rows),
            embed_dim=width,
            rows=Side.of(rows),
            cols=Side.of(cols),
            correlation=float(np.clip(np.mean(together), -1, 1)),
            kurtosis=[finite_or_none(float(value)) for value in tails],
        )

    def law(self) -> GainLaw:
        """Return what of it carries over to another width."""
        tails = np.array([value for value in self.kurtosis if value is not None])
        mean = float(np.mean(np.log(tails + 3))) if len(tails) else math.nan
        parts = (self.rows.shared, self.cols.shared, self.rows.dead, self.cols.dead, self.correlation, mean)
        return GainLaw(np.array([*self.rows.quantiles, *self.cols.quantiles, *parts]))


class LayerGains(Protocol):
    """What to draw the gains of one layer's circuit with."""

    by_channel: ClassVar[bool]
    """Whether each channel's gain is settled; else only which gains there are"""

    @property
    def kurtosis(self) -> Array:
        """Of the products with their gains, ``[head]`` or ``[1]``, excess; NaN where none is asked for."""

    def draw(self, heads: int, width: int, generator: np.random.Generator) -> tuple[Array, Array]:
        """Return r and c, ``[head, channel]``, with mean square 1 over channels; 0 where a channel is dead."""


@dataclass(frozen=True)
class ChannelGains:
    """The gains of a source, channel by channel."""

    log_rows: Array
    log_cols: Array
    kurtosis: Array
    by_channel: ClassVar[bool] = True

    @classmethod
    def of(cls, gains: CircuitGains) -> ChannelGains:
        """Take them from a file."""
        rows, cols = (side.by_channel(gains.num_heads, gains.embed_dim) for side in (gains.rows, gains.cols))
        return cls(rows, cols, np.array(gains.kurtosis, dtype=np.float64))

    def draw(self, heads: int, width: int, generator: np.random.Generator) -> tuple[Array, Array]:  # noqa: ARG002
        """Return r and c, ``[head, channel]``; nothing is drawn."""
        return gains_of(self.log_rows), gains_of(self.log_cols)


@dataclass(frozen=True)
class GainLaw:
    """Quantiles of both sides, and how r, c and the heads go together, as one vector that can be averaged.

    Normal scores of log gain are those of a Gaussian copula: with z of the layer and e of the head,
    sqrt(shared) z + sqrt(1 - shared) e on either side, z and e correlated between the sides.
    """

    values: Array
    """quantiles of rows and of columns, then shared (2), dead (2), correlation, mean log(excess kurtosis + 3)"""
    by_channel: ClassVar[bool] = False
    by_head: Array | None = None
    """excess kurtosis of each head, where heads stand for heads"""

    @classmethod
    def mean(cls, laws: Sequence[GainLaw]) -> GainLaw:
        """Average several."""
        return cls(np.mean([law.values for law in laws], 0))

    @classmethod
    def at(cls, depth: float, depths: Sequence[float], laws: Sequence[GainLaw]) -> GainLaw:
        """Interpolate linearly between the layers of one model."""
        values = np.stack([law.values for law in laws])
        return cls(np.array([np.interp(depth, depths, column) for column in values.T]))

    @property
    def kurtosis(self) -> Array:
        """Of each head, else the mean of all for any head."""
        return np.array([math.exp(self.values[-1]) - 3]) if self.by_head is None else self.by_head

    @property
    def correlation(self) -> float:
        """Of normal scores of r with those of c."""
        return float(self.values[-2])

    def log_gains(self, side: int, width: int) -> Array:
        """Return log r (side 0) or log c (side 1) of ``width`` channels in rising order, -inf of dead ones first."""
        dead = round(self.values[2 * len(LEVELS) + 2 + side] * width)
        alive = width - dead
        at = (np.arange(alive) + 0.5) / max(alive, 1)
        quantiles = self.values[side * len(LEVELS) : (side + 1) * len(LEVELS)]
        rising = np.interp(np.log(at / (1 - at)), LOGITS, quantiles)
        return np.concatenate([np.full(dead, -np.inf), unit_mean_square(rising) if alive else rising])

    def draw(self, heads: int, width: int, generator: np.random.Generator) -> tuple[Array, Array]:
        """Draw r and c, ``[head, channel]``: the quantiles exactly, which channel has which by the copula."""
        first, second = self.values[2 * len(LEVELS) : 2 * len(LEVELS) + 2]
        reach = math.sqrt(first * second) + math.sqrt((1 - first) * (1 - second))
        together = float(np.clip(self.correlation / max(reach, 1e-9), -1, 1))
        of_layer, of_heads = (generator.standard_normal((2, count, width)) for count in (1, heads))
        drawn = []
        for side, shared in enumerate((first, second)):
            z, e = (
                x[0] if side == 0 else together * x[0] + math.sqrt(1 - together**2) * x[1] for x in (of_layer, of_heads)
            )
            order = np.argsort(np.argsort(math.sqrt(shared) * z + math.sqrt(1 - shared) * e, -1), -1)
            drawn.append(gains_of(self.log_gains(side, width)[order]))
        return drawn[0], drawn[1]


def gains_of(logs: Array) -> Array:
    """Return gains of mean square 1 over the channels that are alive, 0 elsewhere, from their logarithms."""
    gains = np.exp(logs)
    alive = np.maximum(np.count_nonzero(gains, axis=-1)[..., None], 1)
    size = np.sqrt((gains**2).sum(-1, keepdims=True) / alive)
    return np.divide(gains, size, out=np.zeros_like(gains), where=size > 0)


def unit_mean_square(logs: Array, weights: Array | None = None) -> Array:
    """Return log gains shifted to a mean square of 1, weighted where they are quantiles."""
    return np.asarray(logs - np.log(np.average(np.exp(2 * logs), weights=weights)) / 2)


def normal_scores(values: Array) -> Array:
    """Return the normal quantile of each channel's rank, (rank + 1/2) / channels."""
    from scipy.special import ndtri

    ranks = np.argsort(np.argsort(values, -1, kind="stable"), -1)
    return np.asarray(ndtri((ranks + 0.5) / values.shape[-1]))


def _quantiles(logs: Array) -> Array:
    """Return quantiles at `LEVELS`; channel i of n in rising order stands at (i + 1/2) / n."""
    at = (np.arange(len(logs)) + 0.5) / len(logs)
    return np.interp(LOGITS, np.log(at / (1 - at)), np.sort(logs))


def correlation(one: Array, other: Array) -> float:
    """Return the correlation of two sets of scores of mean zero."""
    return float(one @ other / math.sqrt((one @ one) * (other @ other)))


def _mean_correlation(scores: Array) -> float:
    if len(scores) < 2:
        return 0.0
    pairs = np.triu_indices(len(scores), 1)
    return float(np.atleast_2d(np.corrcoef(scores))[pairs].mean())
