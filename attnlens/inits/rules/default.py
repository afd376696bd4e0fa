"""The network's own initialisation, run again for its attention alone."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from attnlens.errors import UsageError
from attnlens.inits.plan import Layer, Network, Plan, Rule
from attnlens.inits.registry import initialiser
from attnlens.layouts import read_heads

if TYPE_CHECKING:
    from torch import nn


@initialiser("default")
def default(network: Network) -> Rule:
    """Run the network's own initialisation again and take the attention weights and biases it gives.

    It runs on a copy of the network on the CPU, with torch's generator seeded and put back: `init_weights()` of the
    network where there is one (most of timm), else `_init_weights` on each of its modules (older timm), else
    `reset_parameters` of the layers inside each attention module (torch). timm's own for ViT: normal, truncated at two
    standard deviations of .02, biases zero. Only whole networks know their own initialisation; a part of one falls to
    what its layers do. Biases: whatever the network's own initialisation gives.
    """
    if network.build is None:
        raise UsageError("'default' needs the live network: it runs the network's own initialisation again")
    from attnlens.inits.apply import seeded
    from attnlens.models.live import open_live
    from attnlens.models.undress import undress

    fresh = copy.deepcopy(undress(network.build()).weights.network).cpu()
    with seeded(network.streams.seed):
        how = _reinitialise(fresh, [spec.path for spec in network.architecture.specs])
    tensors = open_live(fresh).weights

    def plan(layer: Layer) -> Plan:
        new = read_heads(layer.spec, tensors, layer.index)
        biases = {"q": new.b_Q, "k": new.b_K, "v": new.b_V, "o": new.b_O}
        return Plan(
            W_Q=new.W_Q,
            W_K=new.W_K,
            W_V=new.W_V,
            W_O=new.W_O,
            biases={role: bias for role, bias in biases.items() if bias is not None},
            notes=(how,),
        )

    return Rule(plan, replays=False)


def _reinitialise(fresh: nn.Module, paths: list[str]) -> str:
    """Initialise a network as it would do itself; say how."""
    network: Any = fresh
    title = type(fresh).__name__
    for name in ("init_weights", "_init_weights"):
        if not callable(getattr(network, name, None)):
            continue
        if name == "init_weights":
            network.init_weights()
            return f"as {title}.init_weights() does"
        fresh.apply(network._init_weights)  # noqa: SLF001  # timm's own hook, there under this name only
        return f"as {title}._init_weights does, module by module"
    for path in paths:
        try:
            attention: Any = fresh.get_submodule(path)
        except AttributeError as error:
            raise UsageError(
                f"'default' finds no {path} in the network as it is wrapped: initialise it before that is added"
            ) from error
        for part in attention.modules():
            if part is not attention and callable(getattr(part, "reset_parameters", None)):
                part.reset_parameters()
        if callable(getattr(attention, "_reset_parameters", None)):
            attention._reset_parameters()  # noqa: SLF001  # MultiheadAttention's, after that of its output projection
    return "as reset_parameters() of each layer does"
