"""A live network as an opened model: timm's and torch's by their classes, transformers' as its folder would be read.

A network of another kind is read by its tensors' names once its head count is given; the norms are those of its own
forward pass in any case.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from attnlens.checkpoints import Checkpoint
from attnlens.errors import UnsupportedAttentionError, UsageError
from attnlens.layouts.spec import AttentionSpec, Refusal
from attnlens.models.architecture import Architecture, describe_skeleton, tensor_shapes, with_norms
from attnlens.models.bare import check_heads
from attnlens.models.by_tensor_names import describe_names, in_order
from attnlens.models.diffusers import CLASSES, describe_diffusers
from attnlens.models.named import describe_lens, describe_named, lens_layers
from attnlens.models.transformers import describe_transformers, known_model_types
from attnlens.models.undress import LiveWeights, undress

if TYPE_CHECKING:
    from torch import nn


class Live(NamedTuple):
    """A live network's layers and the weights it applies, under the same names."""

    architecture: Architecture
    weights: LiveWeights


def open_live_by_names(
    module: nn.Module,
    num_heads: int,
    *,
    row_order: str | None = None,
    input_size: int | tuple[int, ...] | None = None,
) -> tuple[Architecture, Checkpoint]:
    """Describe a live network by its tensors' names, every layer with ``num_heads`` heads, and find its weights.

    ``row_order`` and ``input_size`` are those of `attnlens.inspect`. Raises what `describe_names` and `in_order` raise.
    """
    _check_is_module(module)
    skeleton, weights = undress(module)
    lens = lens_layers(weights)
    if lens:
        found, parts = _of_lens(skeleton, weights, lens)
        check_heads(found, num_heads, type(skeleton).__name__)
        return found, parts
    ordered = weights if row_order is None else in_order(weights, num_heads, row_order)
    named = describe_named(ordered, num_heads)
    found = named or describe_names(ordered, num_heads, type(skeleton).__name__, row_order)
    return _traced_where_it_can_be(found, skeleton, input_size), ordered


def open_live(module: nn.Module, *, input_size: int | tuple[int, ...] | None = None) -> Live:
    """Describe a live network and find the weights it applies, whatever is wrapped around it.

    ``input_size`` is that of one forward pass on the meta device, where the network does not state it. Raises what
    `describe_module` raises.
    """
    _check_is_module(module)
    skeleton, weights = undress(module)
    lens = lens_layers(weights)
    if lens:
        return _of_lens(skeleton, weights, lens)
    roots = list(_transformers_models(skeleton))
    if len(roots) > 1:
        raise UsageError(
            f"{type(skeleton).__name__} holds several models of transformers: give one of them, as its "
            + " or ".join(path for path, _ in roots)
        )
    if roots:
        return _of_transformers(skeleton, weights, *roots[0])
    title = type(skeleton).__name__
    if title in CLASSES and type(skeleton).__module__.startswith("diffusers."):
        config: Any = skeleton.config
        return Live(describe_diffusers(config, title, weights, f"the configuration of {title}"), weights)
    try:
        return Live(describe_skeleton(skeleton, None, input_size), weights)
    except UnsupportedAttentionError as error:
        unknown = getattr(getattr(skeleton, "config", None), "model_type", None)
        if unknown is None:
            raise
        raise UnsupportedAttentionError(f"model_type {unknown!r} is not among those that are read. {error}") from error


def _of_lens(skeleton: nn.Module, weights: LiveWeights, paths: list[str]) -> Live:
    """Describe a HookedTransformer; its configuration says what a file of it does not."""
    config: Any = getattr(skeleton, "cfg", None)
    found = describe_lens(weights, paths)
    rotary = ("rope",) if getattr(config, "positional_embedding_type", "") == "rotary" else ()
    masked = ("causal",) if getattr(config, "attention_dir", "") == "causal" else ()
    scale = 1.0 / float(config.attn_scale) if config is not None and config.use_attn_scale else 1.0
    specs = tuple(
        spec.replace(scale=scale, leaves_out=(*spec.leaves_out, *rotary, *masked), label="")
        if config is not None
        else spec
        for spec in found.specs
    )
    return Live(replace(found, specs=specs), weights.by_head())


def _check_is_module(module: Any) -> None:
    from torch import nn

    if not isinstance(module, nn.Module):
        raise UsageError(
            f"a {type(module).__name__} is no model: give a name, a file, a folder, a torch.nn.Module or a state dict"
        )


def _transformers_models(skeleton: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the outermost modules that transformers' kind of configuration describes, with their paths."""
    known, inside = known_model_types(), None
    for path, module in skeleton.named_modules():
        config = getattr(module, "config", None)
        if inside is not None and (path.startswith(inside) or not inside):
            continue
        if getattr(config, "model_type", None) in known and callable(getattr(config, "to_dict", None)):
            inside = f"{path}." if path else ""
            yield path, module


def _of_transformers(skeleton: nn.Module, weights: LiveWeights, path: str, model: Any) -> Live:
    """Describe a model of transformers by its configuration, under the names it would be saved with."""
    prefix = f"{path}." if path else ""
    own = {name.removeprefix(prefix): name for name in weights if name.startswith(prefix)}
    shapes = {name: weights.shape(live) for name, live in own.items()}
    saved = weights.renamed({own[name]: prefix + new for name, new in _saved_names(model, shapes).items()})
    where = f"the configuration of {type(model).__name__}"
    found = describe_transformers({**model.config.to_dict(), "architectures": [type(model).__name__]}, saved, where)
    beside = [one for one in _attention_paths(skeleton) if not one.startswith(prefix)]
    refused = tuple(Refusal(one, "", "unknown", f"stands beside {path}: give it alone") for one in beside)
    return Live(replace(found, refused=(*found.refused, *refused), order=(*found.order, *beside)), saved)


def _attention_paths(skeleton: nn.Module) -> list[str]:
    from attnlens.layouts.describe import attention_modules

    return [found.path for found in attention_modules(skeleton)]


def _saved_names(model: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """Return, by its live name, the name each tensor is saved under: transformers 5 renames in both directions."""
    import torch

    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before transformers 5 both are the same
        return {name: name for name in shapes}
    marks = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    live = {id(mark): name for name, mark in marks.items()}
    saved = revert_weight_conversion(model, marks)
    return {live[id(mark)]: name for name, mark in saved.items() if id(mark) in live}


def _traced_where_it_can_be(
    named: Architecture, skeleton: nn.Module, input_size: int | tuple[int, ...] | None
) -> Architecture:
    """Give layers told by their names the norms of the forward pass; what names said of norms stays without one."""
    paths = {path for path, _ in skeleton.named_modules()}
    layers = tuple(spec for spec in named.specs if spec.path in paths)
    if not layers:
        return named
    traced = with_norms(replace(named, specs=tuple(_without_norms(spec) for spec in layers)), skeleton, input_size)
    if traced.untraced:
        return replace(named, untraced=traced.untraced)
    found = {spec.path: _with_own_norm(spec) for spec in traced.specs}
    specs = tuple(found.get(spec.path, spec) for spec in named.specs)
    return replace(named, specs=specs, shapes=tensor_shapes(skeleton, [n for spec in specs for n in spec.tensors()]))


def _without_norms(spec: AttentionSpec) -> AttentionSpec:
    kept = tuple(flag for flag in spec.leaves_out if flag != "norm_unknown")
    return spec.replace(norms=(), layer_scale=None, leaves_out=kept)


def _with_own_norm(spec: AttentionSpec) -> AttentionSpec:
    """Take back what the name of a norm inside a module said where it is the norm of the module's input."""
    inside = any(norm.weight == f"{spec.path}.norm.weight" for norm in spec.norms)
    kept = tuple(flag for flag in spec.leaves_out if not (inside and flag == "norm_before_proj"))
    return spec.replace(leaves_out=kept)
