"""What a parameter file holds of a circuit: its fit in a model, and what is pooled over layers and models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field

from attnlens.circuits import Fold, Kind
from attnlens.errors import ParamsError
from attnlens.heads import Array
from attnlens.statistics.depth import Trend, _Part
from attnlens.statistics.table import ALL_HEADS

Heads = Literal["each", "all"]
LARGEST_LOG = 700.0
"""Of the logarithm of alpha: beyond it float64 ends."""
_NO_NOISE = Trend(coefficients=[math.log(np.finfo(np.float64).tiny)], residual_sd=0.0)

# A product that is zero has no shares.
Share = Annotated[float | None, Field(ge=0, le=1 + 1e-9)]


class Entry(_Part):
    """The fit of one circuit: of a head's QK or OV product, or of a layer's summed OV (``head`` is ``all``).

    Statistics of another version of attnlens that have no field here are kept as they are and written back.
    """

    model_config = ConfigDict(extra="allow")

    source: int = Field(ge=0)
    layer: int = Field(ge=0)
    depth: float = Field(ge=0, le=1, description="relative position of the layer: layer / (depth - 1)")
    circuit: Kind
    head: int | Literal["all"]
    fold: Fold
    head_dim: int = Field(ge=1)
    embed_dim: int = Field(ge=2)
    alpha: float = Field(ge=0)
    alpha_stderr: float = Field(ge=0)
    alpha_low: float
    alpha_high: float
    beta: float
    beta_stderr: float = Field(ge=0)
    beta_low: float
    beta_high: float
    p_value: float = Field(
        ge=0, le=1, description="of the diagonal under the null, corrected over the source's entries of this fold"
    )
    p_value_alone: float = Field(ge=0, le=1, description="the same before correction")
    pairing_p_value: float = Field(ge=0, le=1, description="before correction, against random pairing of rows")
    rotation_p_value: float = Field(ge=0, le=1, description="before correction, against rotation of the factors")
    verdict: Literal[
        "identity",
        "negative identity",
        "identity + low rank",
        "negative identity + low rank",
        "mixed diagonal",
        "none",
        "not described by this model",
    ]
    reason: str = Field(description="the finding that decided the verdict")
    null_sd: float = Field(ge=0, description="of the mean diagonal under the null")
    share_identity: Share = Field(default=None, description="of ||M||_F^2 in beta * I")
    share_diagonal_spread: Share = Field(default=None, description="of ||M||_F^2 in the diagonal's deviation from beta")
    share_low_rank: Share = Field(
        default=None, description="of ||M||_F^2 in singular directions above the noise's edge"
    )
    offdiagonal_kurtosis: float | None = Field(default=None, description="excess kurtosis of the off-diagonal entries")
    diagonal_median: float | None = None
    top_channel_share: Share = Field(default=None, description="share of sum |M_ii| in the largest 1% of entries")
    request_alpha: float = Field(ge=0)
    request_beta: float
    reachable: bool = Field(description="False where no request realises the fit: the nearest reachable one is given")


class Source(_Part):
    """A model the parameters were measured in."""

    model: str
    provenance: dict[str, Any]
    num_layers: int = Field(ge=0, description="of attention")
    num_heads: list[int]
    num_filter_layers: int = Field(default=0, ge=0)
    not_read: list[str] = Field(description="attention modules that were left out, and why")
    left_out: dict[str, list[int]] = Field(description="what the network applies beside the products, and the layers")


class Summary(_Part):
    """Mean, spread over everything pooled, spread between models' means, and the number of values."""

    mean: float
    sd: float = Field(ge=0)
    between_model_sd: float | None = Field(description="None with one model")
    n: int = Field(ge=1)


class Pooled(_Part):
    """One circuit's requests, pooled over all layers (and heads) of all models, and their trend with depth.

    The trend of alpha is that of its logarithm: so it is positive at every depth.
    """

    circuit: Kind
    head: Heads
    alpha: Summary
    beta: Summary
    log_alpha_trend: Trend
    beta_trend: Trend

    def at(self, depth: float) -> tuple[float, float]:
        """Return the (alpha, beta) to request at a relative depth."""
        log_alpha, beta = self.log_alpha_trend(depth), self.beta_trend(depth)
        if not (log_alpha < LARGEST_LOG and math.isfinite(beta)):
            raise ParamsError(f"the trend of {self.circuit} ({self.head}) is no number at depth {depth:g}: fit again")
        return math.exp(log_alpha), beta


class LayerSummary(_Part):
    """One circuit's realised fit in one layer of one model: mean and spread over heads."""

    source: int = Field(ge=0)
    layer: int = Field(ge=0)
    circuit: Kind
    head: Heads
    alpha_mean: float
    alpha_sd: float
    beta_mean: float
    beta_sd: float
    n: int = Field(ge=1)


def select(
    entries: Iterable[Entry], circuit: Kind, head: Heads, *, layer: int | None = None, fold: Fold | None = None
) -> list[Entry]:
    """Return the entries of one circuit, of single heads (``each``) or of layer sums (``all``); None is any."""
    return [
        entry
        for entry in entries
        if entry.circuit == circuit
        and (entry.head == ALL_HEADS) == (head == ALL_HEADS)
        and fold in (None, entry.fold)
        and layer in (None, entry.layer)
    ]


def by_layer(entries: Iterable[Entry]) -> dict[int, list[Entry]]:
    """Return the entries by layer, in the order they come."""
    found: dict[int, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.layer, []).append(entry)
    return found


def pool(circuit: Kind, heads: Heads, entries: Sequence[Entry]) -> Pooled:
    """Pool the requests of one circuit over layers, heads and models."""
    noisy = [entry for entry in entries if entry.request_alpha > 0]
    return Pooled(
        circuit=circuit,
        head=heads,
        alpha=_summary(entries, "request_alpha"),
        beta=_summary(entries, "request_beta"),
        log_alpha_trend=_trend(noisy, "request_alpha", np.log) if noisy else _NO_NOISE,
        beta_trend=_trend(entries, "request_beta"),
    )


def _summary(entries: Sequence[Entry], name: str) -> Summary:
    values = np.array([getattr(entry, name) for entry in entries])
    sources = sorted({entry.source for entry in entries})
    means = np.array([np.mean([getattr(e, name) for e in entries if e.source == source]) for source in sources])
    between = sd(means) if len(means) > 1 else None
    return Summary(mean=float(values.mean()), sd=sd(values), between_model_sd=between, n=len(values))


def _trend(entries: Sequence[Entry], name: str, of: Callable[[Array], Array] = np.asarray) -> Trend:
    return Trend.fit([entry.depth for entry in entries], of(np.array([getattr(entry, name) for entry in entries])))


def sd(values: Array) -> float:
    """Return the standard deviation with n - 1, 0 for one value."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0
