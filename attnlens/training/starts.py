"""What an arm starts from: an initialiser with its options, and how its network is wired."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from attnlens.errors import UsageError
from attnlens.inits.registry import initialisers
from attnlens.training.families import PLAIN, Wiring

if TYPE_CHECKING:
    from attnlens.training.source import Scratch, Source

BASELINE = "default"
PRETRAINED = "pretrained"
MATCHED = "norm-matched"
WIRINGS = {
    "value-skipinit": Wiring("value-skipinit", skips=False, norms=False),
    "e-spa-no-norms": Wiring("e-spa", norms=False),
    "e-spa-no-skips-no-norms": Wiring("e-spa", skips=False, norms=False),
    "no-skips-no-norms": Wiring(skips=False, norms=False),
}
"""Arms whose network differs, each with the weights that go with its wiring."""


@dataclass(frozen=True)
class Start:
    """``init`` with its options; None where every weight stays as the family or the wiring draws it."""

    init: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    wiring: Wiring = PLAIN

    def describe(self) -> str:
        """Write it as one line."""
        options = [f"{name}={value}" for name, value in self.options.items() if isinstance(value, str | int | float)]
        drawn = "as drawn" if self.wiring == PLAIN else "as rewired"
        parts = [" ".join([self.init or drawn, *options]), self.wiring.describe()]
        return ", ".join(part for part in parts if part)


def start_of(arm: str, source: Source | Scratch) -> Start:
    """Return what an arm starts from. Any initialiser that needs no option is an arm under its own name.

    Raises `UsageError` for a name that is none, and for one that needs what the source does not have.
    """
    named = {
        BASELINE: Start(),
        "mimetic-positive": Start("mimetic", {"beta_ov": 0.4}),
        MATCHED: Start(MATCHED, source.scale()),
        "norm-matched-mimetic": Start(MATCHED, {"of": "mimetic"}),
        **{name: Start(wiring=wiring) for name, wiring in WIRINGS.items()},
    }
    if source.params is not None:
        named["fitted"] = Start(*source.fitted())
    if source.opened is not None:
        named[PRETRAINED] = Start()
        teacher = {"teacher": source.model, "checkpoint": source.checkpoint}
        named["pretrained-attention"] = Start("transfer-attention", teacher)
    known = initialisers()
    bare = [name for name, one in known.items() if not any(map(_needed, one.options.values()))]
    if arm in named:
        return named[arm]
    if arm == "fitted":
        raise UsageError(
            f"--arms names fitted, and {source.name} has no weights it could be fitted in: give --params a file of "
            "attnlens fit-params, or leave it out"
        )
    if arm in (PRETRAINED, "pretrained-attention"):
        raise UsageError(f"--arms names {arm}, and {source.name} has no pre-trained weights: leave it out")
    if arm not in bare:
        raise UsageError(
            f"--arms names {arm}, which is no arm: choose from {', '.join(dict.fromkeys([*named, *bare]))}"
        )
    return Start(arm)


def _needed(value: Any) -> bool:
    return value is inspect.Parameter.empty
