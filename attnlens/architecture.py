"""What a model's layers look like: its attention and its depthwise filters, found once on the meta device and cached.

Describing an architecture needs torch and timm; reading its weights does not. The description is plain JSON in the
user's cache folder by timm version, so the second inspection of an architecture imports neither.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnlens.errors import ModelNotFoundError, OutputError, UnsupportedAttentionError
from attnlens.files import write_text_atomic
from attnlens.filters.spec import FilterSpec
from attnlens.layouts.spec import AttentionSpec, Refusal

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

    def indexed(self) -> tuple[tuple[int, AttentionSpec], ...]:
        """Pair each readable layer with its index among all attention modules."""
        return tuple((self.order.index(spec.path), spec) for spec in self.specs)

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
        )


def describe_architecture(name: str, model_args: dict[str, Any] | None = None) -> Architecture:
    """Describe a timm architecture, with ``model_args`` passed to its constructor; from the cache where it can be.

    Raises `ModelNotFoundError` with the nearest names when timm does not know it, `UnsupportedAttentionError` when
    it holds neither attention nor depthwise filters.
    """
    cached = _cache_file(name, model_args or {})
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return Architecture.from_json(json.loads(cached.read_text()))
    found = _build(name, model_args or {})
    with contextlib.suppress(OutputError):  # a read-only cache costs time, nothing else
        write_text_atomic(cached, json.dumps(found.to_json()))
    return found


def describe_module(module: nn.Module, name: str | None = None) -> Architecture:
    """Describe a live module: its depthwise filters, its attention layers, and the norms around them.

    The norms come from the forward pass of a copy on the meta device.

    The input size comes from the module's patch embedding or ``pretrained_cfg`` (timm), else 3 x 224 x 224 is tried;
    where no forward pass is possible the layers carry the flag ``norm_unknown`` and have no effective fold.
    """
    from attnlens.filters.finding import filter_modules
    from attnlens.layouts.rules import attention_modules
    from attnlens.layouts.surroundings import trace_surroundings, with_surroundings

    found = list(attention_modules(module))
    specs = [item for item in found if isinstance(item, AttentionSpec)]
    refused = tuple(item for item in found if isinstance(item, Refusal))
    config = getattr(module, "pretrained_cfg", None) or {}
    title = name or str(config.get("architecture") or type(module).__name__)
    depthwise = list(filter_modules(module))
    filters = tuple(item for item in depthwise if isinstance(item, FilterSpec))
    if not found and not depthwise:
        raise UnsupportedAttentionError(
            f"{title} holds no attention module that is known and no depthwise convolution: there is nothing to inspect"
        )
    stored = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    if specs:
        skeleton = _on_meta(module)
        around = trace_surroundings(skeleton, [spec.path for spec in specs], _input_shape(module))
        specs = [with_surroundings(spec, around.get(spec.path) if around else None, skeleton) for spec in specs]
    tensors = [name for spec in specs for name in spec.tensors()] + [name for f in filters for name in f.tensors()]
    shapes = {name: list(stored[name].shape) for name in tensors}
    return Architecture(
        title,
        tuple(specs),
        refused,
        tuple(item.path for item in found),
        shapes,
        {},
        filters,
        tuple(item for item in depthwise if isinstance(item, Refusal)),
    )


def _input_shape(module: Any) -> tuple[int, ...]:
    """Return the shape of one image batch the module takes: what its patch embedding says, else timm's config."""
    channels, *size = (getattr(module, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))
    own = getattr(getattr(module, "patch_embed", None), "img_size", None)
    first = getattr(getattr(getattr(module, "patch_embed", None), "proj", None), "in_channels", channels)
    return (1, first, *(own if isinstance(own, tuple) else size))


def _on_meta(module: nn.Module) -> nn.Module:
    """Copy a module without its storage: every parameter and buffer becomes a meta tensor."""
    import copy

    import torch

    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(module, memo)


def _build(name: str, model_args: dict[str, Any]) -> Architecture:
    import timm
    import torch

    if not timm.is_model(name):
        raise ModelNotFoundError(f"timm has no architecture named {name!r}{suggest(name, timm.list_models())}")
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, **model_args)
    described = describe_module(model, name)
    return replace(described, weights=pretrained_tags(name))


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


@cache
def rules_digest() -> str:
    """Hash the code that finds layers, so that a description made by other rules is never believed."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    filters = [package / "filters" / name for name in ("finding.py", "spec.py")]
    for path in (*sorted((package / "layouts").glob("*.py")), *filters):
        digest.update(path.read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()[:12]


def cache_folder() -> Path:
    """Return the user's folder for what is known about this timm version under these layout rules."""
    import platformdirs

    return platformdirs.user_cache_path("attnlens") / f"timm-{version('timm')}" / rules_digest()


def _cache_file(name: str, model_args: dict[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps([name, model_args], sort_keys=True).encode()).hexdigest()[:12]
    return cache_folder() / f"{name.replace('/', '_')}-{key}.json"
