"""The arms of a comparison: what each starts from, given a seed and what the network starts from."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from attnlens.errors import UsageError
from attnlens.inits.registry import initialisers
from attnlens.training.ladder import LADDER, steps
from attnlens.training.networks.base import DRAWING, PLAIN, Network, Wiring
from attnlens.training.source import Source

if TYPE_CHECKING:
    from torch import Tensor

BASELINE = "default"
PRETRAINED = "pretrained"
MATCHED = "norm-matched"
CONTROLS = {"fitted": MATCHED, "mimetic": "norm-matched-mimetic"}
"""The arm with another's singular values and random singular vectors."""
RUNGS = ("scale", "spectrum", "fitted-gains", "permuted", "pretrained-filters")
"""Arms that came with the ladder: what they keep of the source stands in the configuration."""
FROM_WEIGHTS = ("permuted", "pretrained-attention", "pretrained-filters", PRETRAINED)
"""Arms that hold weights of the source, and with them what it has seen."""
OF_SOURCE = ("scale", "spectrum", *FROM_WEIGHTS)
"""Arms that need the source's weights."""
WIRINGS = {
    "value-skipinit": Wiring("value-skipinit", skips=False, norms=False),
    "e-spa-no-norms": Wiring("e-spa", norms=False),
    "e-spa-no-skips-no-norms": Wiring("e-spa", skips=False, norms=False),
    "no-skips-no-norms": Wiring(skips=False, norms=False),
}
"""Arms whose network differs, each with the weights that go with its wiring."""


@dataclass(frozen=True)
class Start:
    """``init`` with its options; None where every weight stays as the network or the wiring draws it."""

    init: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    wiring: Wiring = PLAIN

    def describe(self) -> str:
        """Write it as one line."""
        options = [f"{name}={value}" for name, value in self.options.items() if isinstance(value, str | int | float)]
        drawn = "as drawn" if self.wiring == PLAIN else "as rewired"
        parts = [" ".join([self.init or drawn, *options]), self.wiring.describe()]
        return ", ".join(part for part in parts if part)


def start_of(arm: str, source: Source) -> Start:
    """Return what an arm starts from. Any initialiser that needs no option is an arm under its own name.

    Raises `UsageError` for a name that is none, and for one that needs what the source does not have.
    """
    named = {
        BASELINE: Start(),
        "mimetic-positive": Start("mimetic", {"beta_ov": 0.4}),
        MATCHED: Start(MATCHED, source.network.control(source.params)),
        "norm-matched-mimetic": Start(MATCHED, {"of": "mimetic"}),
        **{name: Start(wiring=wiring) for name, wiring in WIRINGS.items()},
    }
    rungs = [rung.arm for rung in source.network.ladder]
    if source.params is not None:
        named["fitted"] = Start(*source.network.fitted(source.params))
        if "fitted-gains" in rungs:
            named["fitted-gains"] = Start(*source.network.fitted(source.params, gains="channels"))
    if source.opened is not None:
        named[PRETRAINED] = Start()
        init, parts = source.network.transfer, source.network.parts
        named |= {name: Start(init, {**source.teacher, "keep": keep}) for name, keep in parts.items()}
    known = initialisers()
    bare = [name for name, one in known.items() if not any(map(_needed, one.options.values()))]
    if arm in named:
        return named[arm]
    if arm == "fitted" or (arm == "fitted-gains" and arm in rungs):
        raise UsageError(
            f"--arms names {arm}, and {source.name} has no weights it could be fitted in: give --params a file of "
            "attnlens fit-params, or leave it out"
        )
    if arm in (*source.network.parts, PRETRAINED):
        raise UsageError(f"--arms names {arm}, and {source.name} has no pre-trained weights: leave it out")
    if arm not in bare:
        raise UsageError(
            f"--arms names {arm}, which is no arm: choose from {', '.join(dict.fromkeys([*named, *bare]))}"
        )
    return Start(arm)


def named_arms(given: Sequence[str] | None, network: type[Network]) -> list[str]:
    """Return the arms of a comparison in order, without repeats: `LADDER` stands for every rung of the network."""
    arms = network.default_arms if given is None else given
    rungs = [rung.arm for rung in network.ladder]
    return list(dict.fromkeys(one for arm in arms for one in (rungs if arm == LADDER else [arm])))


def _needed(value: Any) -> bool:
    return value is inspect.Parameter.empty


def default_contrasts(arms: Sequence[str], source: Source | None = None) -> list[tuple[str, str]]:
    """Return each arm against the default, and what has a control of its own scale against that.

    Where every rung of the ladder is there, its steps come first.
    """
    rungs = [] if source is None else [rung.arm for rung in source.network.ladder]
    pairs = steps(rungs) if rungs and set(rungs) <= set(arms) else []
    pairs += [(arm, BASELINE) for arm in arms if arm != BASELINE and BASELINE in arms]
    controls = dict(CONTROLS)
    if source is not None:
        controls[source.network.control(source.params)["of"]] = MATCHED
    pairs += [(arm, control) for arm, control in controls.items() if arm in arms and control in arms]
    if "mimetic" in arms and MATCHED in arms and CONTROLS["mimetic"] not in arms and ("mimetic", MATCHED) not in pairs:
        pairs.append(("mimetic", MATCHED))
    if {"mimetic", "mimetic-positive"} <= set(arms):
        pairs.append(("mimetic", "mimetic-positive"))
    return list(dict.fromkeys(pairs))


def initial_state(arm: str, seed: int, network: Network, source: Source) -> dict[str, Tensor]:
    """Return the weights and buffers an arm starts from: those of its network under ``seed``, initialised.

    Arms of one architecture and seed differ in what their initialiser writes alone, except `PRETRAINED`, whose
    classifier alone is fresh.
    """
    from attnlens.inits import init_

    start = start_of(arm, source)
    with DRAWING:
        model = network.build(seed, start.wiring)
        if start.init is not None:
            init_(model, start.init, seed=seed, **start.options)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if arm == PRETRAINED:
        assert source.opened is not None
        state |= network.pretrained(source.opened, state)
    return state
