"""What stands around an attention module: read off the network's own forward pass on the meta device.

A forward pass on meta tensors costs milliseconds and no memory, and `tracing` follows through it which norm each
projection reads and which LayerScale the output meets. So both are found for any block class and any naming.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from attnlens.layouts.spec import AttentionSpec, NormSpec
from attnlens.layouts.tracing import Surroundings, Tracer, norm_kind

if TYPE_CHECKING:
    from torch import nn


def trace_surroundings(
    model: nn.Module, specs: Iterable[AttentionSpec], inputs: Iterable[tuple[Any, ...]]
) -> dict[str, Surroundings] | str:
    """Run one forward pass and say what stands around each attention module of ``specs``.

    ``model`` must be on the meta device; the first of ``inputs`` that it takes is used. Returns the first failure in
    words where it takes none (another input size, data-dependent code, an operation the meta device lacks).
    """
    import torch

    specs, failures = list(specs), []
    was_training = model.training
    model.eval()
    try:
        for given in inputs:
            tracer = Tracer(model, specs)
            try:
                with torch.no_grad(), tracer.watching():
                    model(*given)
            except Exception as error:  # noqa: BLE001  # whatever a network's own code may raise
                failures.append(_failure(given, error))
            else:
                return tracer.found()
    finally:
        model.train(was_training)
    return failures[0] if failures else "no input was given"


def _failure(given: tuple[Any, ...], error: Exception) -> str:
    """Say in one line which input a network did not take, and why."""
    shape, kind = "x".join(map(str, given[0].shape)), str(given[0].dtype).removeprefix("torch.")
    first = next(iter(str(error).splitlines()), "")
    return f"with an input of {shape} {kind} it raised {type(error).__name__}: {first}".removesuffix(": ")


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
