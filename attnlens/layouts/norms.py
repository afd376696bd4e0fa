"""What stands around an attention module: read off the network's own forward pass on the meta device.

A forward pass on meta tensors costs milliseconds and no memory, and `tracing` follows through it which norm each
projection reads and which LayerScale the output meets. So both are found for any block class and any naming.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from attnlens.layouts.describe import attention_spec
from attnlens.layouts.spec import AttentionSpec, NormSpec
from attnlens.layouts.tracing import Surroundings, Tracer, norm_kind

if TYPE_CHECKING:
    from torch import nn


def trace_surroundings(
    model: nn.Module, paths: Iterable[str], input_shape: tuple[int, ...]
) -> dict[str, Surroundings] | None:
    """Run one meta forward pass and say what stands around each attention module of ``paths``.

    ``model`` must be on the meta device. Returns None when the forward pass cannot run there (data-dependent code).
    """
    import torch

    specs = (attention_spec(model.get_submodule(path), path) for path in paths)
    tracer = Tracer(model, [spec for spec in specs if spec is not None])
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), tracer.watching():
            model(torch.zeros(input_shape, device="meta"))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError):
        return None
    finally:
        model.train(was_training)
    return tracer.found()


def with_surroundings(spec: AttentionSpec, around: Surroundings | None, model: nn.Module) -> AttentionSpec:
    """Complete a layout with the norms and LayerScale around it; say so in ``leaves_out`` where they are unknown."""
    if around is None:
        takes_rope = "rope" in inspect.signature(model.get_submodule(spec.path).forward).parameters
        around = Surroundings(flags=("norm_unknown", "rope_unknown") if takes_rope else ("norm_unknown",))
    return spec.replace(
        norms=tuple(norm_spec(model, path, roles) for roles, path in around.norms),
        layer_scale=around.layer_scale,
        leaves_out=tuple(dict.fromkeys((*spec.leaves_out, *around.flags))),
    )


def norm_spec(model: nn.Module, path: str, roles: str = "qkv") -> NormSpec:
    """Describe the norm at ``path``, which ``roles`` read: its kind and the tensors of its gain."""
    module: Any = model.get_submodule(path)
    kind = norm_kind(module)
    assert kind is not None, f"{path} is a {type(module).__name__}, not a norm"
    return NormSpec(
        kind=kind,
        roles=roles,
        weight=f"{path}.weight" if getattr(module, "weight", None) is not None else None,
        variance=f"{path}.running_var" if kind == "batch" else None,
        eps=float(getattr(module, "eps", None) or 0.0),
    )
