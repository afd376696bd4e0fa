"""Which gains a layer of another network gets from a parameter file: by the rule that its requests follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from attnlens.circuits import Kind
from attnlens.errors import ParamsError, UsageError
from attnlens.fit.entries import Heads
from attnlens.fit.gains import ChannelGains, CircuitGains, GainLaw, GainsOption, LayerGains

_ADVICE = "pass gains='quantiles'"


@dataclass(frozen=True)
class GainTransfer:
    """The gains of a file, and what is taken of them: those of every channel, or their law, by layer or pooled."""

    gains: Sequence[CircuitGains]
    channels: bool
    per: str
    """As of the file: ``model`` gives every layer the mean of all"""

    @classmethod
    def of(cls, gains: Sequence[CircuitGains], option: GainsOption, by_head: bool, per: str) -> GainTransfer | None:
        """Return the rule for a choice of ``gains``, None for ``none``; ``by_head``: layers and heads are the source's.

        Raises `ParamsError` where there are no gains, `UsageError` where channels have no layer to go to.
        """
        if option == "none":
            return None
        if not gains:
            raise ParamsError(
                "the parameters hold no gains: fit again with fold='effective' or 'balanced', or pass gains='none'"
            )
        if option == "channels" and not by_head:
            raise UsageError(
                "gains='channels' needs the parameters of one model under per='head', and a network with its number "
                f"of layers: {_ADVICE}"
            )
        return cls(gains, option == "channels", per)

    def layer(self, own: int | None, depth: float, heads: int, value_heads: int) -> dict[str, LayerGains | None]:
        """Return the gains of one layer by field of `LayerRequest`; ``own`` is the source's layer, or None."""
        return {
            "qk_gains": self._of("qk", "each", own, depth, heads),
            "ov_gains": self._of("ov", "all", own, depth, 1),
            "ov_heads_gains": self._of("ov", "each", own, depth, value_heads),
        }

    def _of(self, circuit: Kind, head: Heads, own: int | None, depth: float, heads: int) -> LayerGains | None:
        rows = [each for each in self.gains if (each.circuit, each.head) == (circuit, head)]
        if self.channels:
            return next((ChannelGains.of(each) for each in rows if each.layer == own), None)
        mine = [each for each in rows if each.layer == own]
        if self.per == "head" and len(mine) == 1 and mine[0].num_heads == heads:
            return replace(mine[0].law(), by_head=np.array(mine[0].kurtosis, dtype=np.float64))
        if mine:
            return GainLaw.mean([each.law() for each in mine])
        if not rows:
            return None
        if self.per == "model":
            return GainLaw.mean([each.law() for each in rows])
        models = [[each for each in rows if each.source == source] for source in sorted({e.source for e in rows})]
        return GainLaw.mean([GainLaw.at(depth, [e.depth for e in of], [e.law() for e in of]) for of in models])
