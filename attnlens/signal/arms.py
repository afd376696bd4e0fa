"""The networks whose signal is measured: an architecture of a given depth and number of tokens, and an arm's start."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnlens.errors import UsageError
from attnlens.printable import utf8_text
from attnlens.signal.rewire import Rewired, rewire_with_theory_, tokens_of
from attnlens.signal.variants import KEEP, VARIANTS, accepted_options

if TYPE_CHECKING:
    from torch import nn

ARMS = ("default", "mimetic", *VARIANTS)
"""What is measured unless arms are named."""


@dataclass(frozen=True)
class BuiltArm:
    """An arm's network in float64, and what was done to it."""

    module: nn.Module
    model: str
    embed_dim: int
    rewired: Rewired


def resolved_options(arms: Sequence[str], options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return each arm's share of the options; raises `UsageError` for an unknown arm, or an option no arm has."""
    from attnlens.inits import initialisers

    if not arms:
        raise UsageError("no arm is named: there is nothing to measure")
    bare = {
        name
        for name, one in initialisers().items()
        if not any(default is inspect.Parameter.empty for default in one.options.values())
    }
    for arm in arms:
        if arm not in VARIANTS and arm not in bare:
            names = ", ".join([*VARIANTS, *sorted(bare)])
            raise UsageError(f"--arms names {arm}, which is no arm: choose from {names}")
    known = {arm: accepted_options(arm) if arm in VARIANTS else {} for arm in arms}
    for name in options:
        if not any(name in accepted for accepted in known.values()):
            every = sorted({option for accepted in known.values() for option in accepted})
            raise UsageError(f"no arm has an option {name!r}: these arms accept {', '.join(every) or 'none'}")
    return {arm: {name: value for name, value in options.items() if name in known[arm]} for arm in known}


def build_arm(
    model: str | None, arm: str, seed: int, depth: int | None, tokens: int | None, rewiring: Mapping[str, Any]
) -> BuiltArm:
    """Build a network under a seed, initialise or rewire it; ``rewiring`` goes to `rewire_`.

    Arms of a seed share all that neither changes. Raises `UsageError` for sizes that the architecture cannot have.
    """
    from attnlens.inits import init_

    module, name = build_network(model, seed, depth, tokens)
    if arm not in VARIANTS and arm != "default":
        init_(module, arm, seed=seed)
    rewired = rewire_with_theory_(module, arm if arm in VARIANTS else KEEP, seed=seed, **rewiring)
    blocks: Any = module.blocks
    return BuiltArm(module, name, int(blocks[0].attn.qkv.in_features), rewired)


def build_network(model: str | None, seed: int, depth: int | None, tokens: int | None) -> tuple[nn.Module, str]:
    """Return a float64 network under a seed, and its name; None is the shipped ViT's architecture."""
    from attnlens.gpt import PRESETS, create_gpt
    from attnlens.inits.file import build

    if not isinstance(model, str | os.PathLike | None):
        raise UsageError(f"a {type(model).__name__} is no name: give one, or change the network itself with rewire_")
    sizes: dict[str, Any] = {} if depth is None else {"depth": depth}
    if model in PRESETS:
        assert model is not None
        sizes |= {} if tokens is None else {"context": tokens}
        return create_gpt(model, seed, **sizes).double(), model
    built = build(model, seed, {})
    plain = tokens_of(built.module)  # refuses what cannot be measured before arguments it may not take are passed
    if tokens is not None and tokens != plain.count - plain.prefix:
        side = math.isqrt(tokens)
        if side * side != tokens or tokens < 1:
            raise UsageError(f"--tokens {tokens} is no square: the patches of a ViT form one, as in 64 or 196")
        network: Any = built.module
        sizes["img_size"] = side * int(network.patch_embed.patch_size[0])
    if sizes:
        built = build(model, seed, sizes)
    return built.module.double(), "embedded" if model is None else utf8_text(os.fspath(model))
