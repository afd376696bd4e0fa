"""What a model's layers look like: its attention and its depthwise filters, found on the meta device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from attnlens.errors import AttnlensError, ModelNotFoundError, UnsupportedAttentionError, UsageError
from attnlens.layouts.depthwise.spec import FilterSpec
from attnlens.layouts.spec import AttentionSpec, Refusal
from attnlens.models.forward_inputs import check_input_size, forward_inputs
from attnlens.models.undress import undress

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Architecture:
    """A model's attention and filter layers in module order, what was refused, and where timm says its weights are."""

    name: str
    specs: tuple[AttentionSpec, ...]
    refused: tuple[Refusal, ...]
    order: tuple[str, ...]
    """Path of every attention module, read or refused: a layer's index is its place here."""
    shapes: dict[str, list[int]]
    """Shape of every tensor the layers read: what a file must hold to be of this architecture."""
    weights: dict[str, Any]
    """timm's pretrained tags: ``{tag: {"hf_hub_id": ..., "url": ...}}``, the default tag first."""
    filters: tuple[FilterSpec, ...] = ()
    """Layers of depthwise filters: a layer's index is its place here."""
    refused_filters: tuple[Refusal, ...] = ()
    untraced: str = ""
    """Why no forward pass of the network could be followed, where that was tried."""

    def indexed(self) -> tuple[tuple[int, AttentionSpec], ...]:
        """Pair each readable layer with its index among all attention modules."""
        places = {path: index for index, path in reversed([*enumerate(self.order)])}
        return tuple((places[spec.path], spec) for spec in self.specs)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Architecture:
        """Rebuild from `to_json`."""
        return cls(
            data["name"],
            tuple(AttentionSpec.from_json(spec) for spec in data["specs"]),
            tuple(Refusal(**refusal) for refusal in data["refused"]),
            tuple(data["order"]),
            data["shapes"],
            data["weights"],
            tuple(FilterSpec.from_json(spec) for spec in data["filters"]),
            tuple(Refusal(**refusal) for refusal in data["refused_filters"]),
            data["untraced"],
        )


def describe_module(
    module: nn.Module, name: str | None = None, input_size: int | tuple[int, ...] | None = None
) -> Architecture:
    """Describe a live module: its depthwise filters, its attention layers, and the norms around them.

    Paths and names are those of the network without what is wrapped around it. The norms come from a forward pass of
    its copy on the meta device, in the module's own type and with the input it states, an ``input_size`` given, or the
    first of the usual ones it takes. Where no pass is possible the layers carry the flag ``norm_unknown`` and have no
    effective fold; ``untraced`` then says what failed.
    """
    return describe_skeleton(undress(module).skeleton, name, input_size)


def describe_skeleton(
    skeleton: nn.Module, name: str | None = None, input_size: int | tuple[int, ...] | None = None
) -> Architecture:
    """Describe a network on the meta device: see `describe_module`."""
    from attnlens.layouts.depthwise.find import filter_modules
    from attnlens.layouts.describe import attention_modules

    found = list(attention_modules(skeleton))
    specs = tuple(item for item in found if isinstance(item, AttentionSpec))
    refused = tuple(item for item in found if isinstance(item, Refusal))
    config = getattr(skeleton, "pretrained_cfg", None) or {}
    title = name or str(config.get("architecture") or type(skeleton).__name__)
    depthwise = list(filter_modules(skeleton))
    filters = tuple(item for item in depthwise if isinstance(item, FilterSpec))
    if not found and not depthwise:
        raise UnsupportedAttentionError(
            f"{title} holds no attention module that is known and no depthwise convolution: there is nothing to "
            "inspect. Attention of another class is read by its tensors' names with num_heads=N"
        )
    traced = Architecture(
        title,
        specs,
        refused,
        tuple(item.path for item in found),
        {},
        {},
        filters,
        tuple(item for item in depthwise if isinstance(item, Refusal)),
    )
    traced = with_norms(traced, skeleton, input_size)
    tensors = [name for spec in traced.specs for name in spec.tensors()] + [n for f in filters for n in f.tensors()]
    return replace(traced, shapes=tensor_shapes(skeleton, tensors))


def with_norms(
    architecture: Architecture, skeleton: nn.Module, input_size: int | tuple[int, ...] | None = None
) -> Architecture:
    """Complete an architecture with the norms and LayerScales that a forward pass of ``skeleton`` shows.

    Raises `UsageError` where ``input_size`` was given and the network does not take such an input.
    """
    from attnlens.layouts.norms import trace_surroundings, with_surroundings

    if not architecture.specs:
        return architecture
    size = check_input_size(input_size)
    around = trace_surroundings(skeleton, architecture.specs, forward_inputs(skeleton, size))
    if isinstance(around, str):
        if size is not None:
            raise UsageError(f"{architecture.name} does not take input_size={size}: {around}")
        specs = tuple(with_surroundings(spec, None, skeleton) for spec in architecture.specs)
        return replace(architecture, specs=specs, untraced=around)
    specs = tuple(with_surroundings(spec, around.get(spec.path), skeleton) for spec in architecture.specs)
    return replace(architecture, specs=specs)


def tensor_shapes(skeleton: nn.Module, tensors: Iterable[str]) -> dict[str, list[int]]:
    """Return the shapes of tensors of a network. Raises `UnsupportedAttentionError` for one that it does not hold."""
    stored = {**dict(skeleton.named_parameters(remove_duplicate=False)), **dict(skeleton.named_buffers())}
    for name in tensors:
        if name not in stored:
            owner = type(skeleton.get_submodule(name.rpartition(".")[0]))
            raise UnsupportedAttentionError(
                f"{name} is no tensor of the network, {owner.__module__}.{owner.__qualname__} keeps it otherwise: "
                "give the network from before it was quantised or sharded (FSDP: inside summon_full_params)"
            )
    return {name: list(stored[name].shape) for name in tensors}


def build(name: str, model_args: dict[str, Any]) -> Architecture:
    """Build a timm architecture on the meta device and describe it; see `described.describe_architecture`."""
    try:
        current, _, tag = _current_name(name).partition(".")
        model = on_meta(name, model_args)
        tags = pretrained_tags(current)
        first = {tag: tags[tag]} if tag in tags else {}
        return replace(describe_module(model, current), weights={**first, **tags})
    except AttnlensError:
        raise
    except Exception as error:  # any forward pass of timm's, with any arguments a file may name
        raise _cannot_build(name, model_args, error) from error


def on_meta(name: str, model_args: dict[str, Any]) -> nn.Module:
    """Build a timm architecture on the meta device. Raises `ModelNotFoundError`."""
    import timm
    import torch

    if not timm.is_model(name):
        raise ModelNotFoundError(f"timm has no architecture named {name!r}{suggest(name, timm.list_models())}")
    name, _, _ = _current_name(name).partition(".")
    try:
        with torch.device("meta"), modules_counted(name):
            return timm.create_model(name, pretrained=False, **model_args)
    except AttnlensError:
        raise
    except Exception as error:  # any constructor of timm's, with any arguments a file may name
        raise _cannot_build(name, model_args, error) from error


def _cannot_build(name: str, model_args: dict[str, Any], error: Exception) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"timm cannot build {name} with model_args {model_args} ({type(error).__name__}: {error}): fix the "
        "--model-arg, config.json or metadata they come from"
    )


def _current_name(name: str) -> str:
    """Return what timm calls an architecture it renamed, with the tag of the weights that the old name meant."""
    from timm.models import _registry

    renamed: dict[str, str | None] = _registry.get_deprecated_models()
    return renamed.get(name) or name


LARGEST_ARGUMENT = 1 << 16
"""Largest number among the arguments a file may hand to an architecture: widths, image sizes and classes lie below."""
MOST_ARGUMENTS = 1 << 10
MOST_MODULES = 20_000
"""Modules a network described by a file may have; the largest of timm have some three thousand."""


def check_model_args(model_args: Any, where: str) -> dict[str, Any]:
    """Return arguments for an architecture, as a file names them: plain data of sizes that networks have.

    What `timm.create_model` itself takes (a checkpoint's path, a folder, a pre-trained configuration) is no argument of
    an architecture, and is refused: a file names its sizes, and nothing that is read or run.

    Raises `ModelNotFoundError`.
    """
    reserved = ("model_name", "checkpoint_path", "cache_dir", "scriptable", "exportable", "no_jit", "block_fn")
    if not isinstance(model_args, dict):
        raise ModelNotFoundError(f"model_args of {where} is not an object: give names and values, as depth=6")
    for name in model_args:
        if not isinstance(name, str):
            raise ModelNotFoundError(f"model_args of {where} has a name {name!r}: give names and values, as depth=6")
        if name in reserved or name.startswith("pretrained"):
            raise ModelNotFoundError(f"model_args of {where} names {name}, which is no size of a network: take it out")
    level, count = [model_args], 0
    while level:
        value = level.pop()
        inner = (
            [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        )
        count += 1 + len(inner)
        level.extend(inner)
        if isinstance(value, int | float) and not -LARGEST_ARGUMENT <= value <= LARGEST_ARGUMENT:
            raise ModelNotFoundError(f"model_args of {where} names {value!s:.30}: at most {LARGEST_ARGUMENT} is read")
        if count > MOST_ARGUMENTS:
            raise ModelNotFoundError(f"model_args of {where} names more than {MOST_ARGUMENTS} values: fix the file")
        if not isinstance(value, str | int | float | list | tuple | dict | None):
            raise ModelNotFoundError(
                f"model_args of {where} holds a {type(value).__name__}: give numbers, text and lists, or a live network"
            )
    return model_args


@contextlib.contextmanager
def modules_counted(name: str) -> Iterator[None]:
    """Stop the building of a network that has more modules than any: its arguments come from a file."""
    from torch.nn.modules.module import register_module_module_registration_hook

    count = 0

    def counted(_module: Any, _name: str, _submodule: Any) -> None:
        nonlocal count
        count += 1
        if count > MOST_MODULES:
            raise ModelNotFoundError(f"{name} would have more than {MOST_MODULES} modules: fix its model_args")

    handle = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()


def pretrained_tags(name: str) -> dict[str, dict[str, str | None]]:
    """List the pretrained tags of an architecture with where timm finds each."""
    from timm.models import get_pretrained_cfg, list_pretrained

    default = get_pretrained_cfg(name, allow_unregistered=True)
    names = [default.tag or ""] if default is not None and default.has_weights else []
    names += [full.partition(".")[2] for full in list_pretrained(f"{name}.*")]
    found = {}
    for tag in dict.fromkeys(names):
        config = get_pretrained_cfg(f"{name}.{tag}" if tag else name)
        found[tag] = {
            "hf_hub_id": config.hf_hub_id,
            "hf_hub_filename": config.hf_hub_filename,
            "url": config.url or None,
        }
    return found


def suggest(name: str, known: list[str]) -> str:
    """Return the end of a message about an unknown architecture: the nearest names, else where all are listed.

    Names near as a whole come first, then those that begin alike: a short name is often the start of a long one.
    """
    from difflib import get_close_matches

    starts = {other[: len(name) + 2]: other for other in reversed(known)}
    alike = [starts[start] for start in get_close_matches(name, starts, n=3, cutoff=0.75)]
    close = get_close_matches(name, known, n=3, cutoff=0.85) or alike or get_close_matches(name, known, n=3, cutoff=0.5)
    return f": did you mean {', '.join(close)}?" if close else ": see `attnlens list-models`"
