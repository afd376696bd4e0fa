"""Follow a forward pass: which norm reaches each projection, and which parameter scales an attention output.

Each tensor carries a tag saying which norm, attention module or parameter it came out of. Operations that only move
data (views, windows, padding, copies) hand the tag on, and so does what commutes with a gain per channel; anything
else drops it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnlens.layouts.spec import AttentionSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

# Operations of ATen whose output holds the same numbers in another order or place. Clamping stands among them: where a
# class clamps its inputs its rule says so.
_MOVES_TEXT = """
    view _unsafe_view reshape permute transpose t expand slice select split split_with_sizes unbind squeeze unsqueeze
    clone contiguous _to_copy roll constant_pad_nd as_strided alias detach flatten unfold narrow chunk index
    index_select gather pixel_shuffle pixel_unshuffle copy native_dropout channel_shuffle im2col movedim repeat
    lift_fresh unsafe_chunk unsafe_split index_put masked_fill clamp
"""
_MOVES = frozenset(_MOVES_TEXT.split())
_POOLS = frozenset(["avg_pool1d", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool2d"])
_NONLINEAR = frozenset(
    ["relu", "gelu", "silu", "sigmoid", "tanh", "hardswish", "hardtanh", "max_pool2d_with_indices", "_softmax"]
)
_JOINS = frozenset(["cat", "stack"])
# Operations that multiply a weight: the position of their input and of the weight.
_PRODUCTS = {
    "mm": (0, 1),
    "bmm": (0, 1),
    "addmm": (1, 2),
    "baddbmm": (1, 2),
    "convolution": (0, 1),
}

# Parts of class names of norms -> kind. SimpleNorm divides by the standard deviation and does not centre.
_KINDS = {"layernorm": "layer", "rmsnorm": "rms", "simplenorm": "rms", "batchnorm": "batch", "groupnorm": "group"}

Tag = tuple[str, str]
"""What a tensor is, and the path of that.

``norm``: a norm's output; ``mixed``: the same behind a convolution or pooling per channel, which commutes with the
gain; ``part``: the same beside other tokens; ``lost``: the same behind an activation; ``attention``: an attention
module's output; ``projected``: the same, still inside the module; ``parameter``.
"""
_NORMED = ("norm", "mixed", "part", "lost")
_FLAG_OF = {"mixed": "tokens_mixed", "part": "norm_mixed", "lost": "norm_not_folded"}


@dataclass(frozen=True)
class Surroundings:
    """The norms that q, k and v of an attention module read, the LayerScale behind it, and what its call shows."""

    norms: tuple[tuple[str, str], ...] = ()
    """Roles and the norm they read: ``(("qkv", "blocks.0.norm1"),)``."""
    layer_scale: str | None = None
    flags: tuple[str, ...] = ()


def norm_kind(module: nn.Module) -> str | None:
    """Return layer, rms, batch or group for a norm by its class name, None for any other module."""
    name = type(module).__name__.lower()
    kind = next((kind for part, kind in _KINDS.items() if part in name), None)
    return kind if hasattr(module, "weight") and hasattr(module, "eps") else None


def _is_plain(norm: nn.Module) -> bool:
    """Whether a norm is without an activation inside (BatchNormAct2d): its output is a scaled normalised input."""
    return all(type(child).__name__ in ("Identity", "Dropout") for child in norm.children())


class Tracer:
    """Watch one forward pass of ``model`` around the attention modules of ``specs``."""

    def __init__(self, model: nn.Module, specs: Iterable[AttentionSpec]) -> None:
        self.model = model
        self.specs = {spec.path: spec for spec in specs}
        self.tags: dict[int, Tag] = {}
        self.alive: list[Any] = []  # ids are reused once a tensor dies, so every tagged tensor is kept
        self.roles: dict[str, list[tuple[str, str]]] = {}
        self.folded: set[str] = set()
        self.inside: list[str] = []
        self.inputs: dict[str, set[int]] = {}
        self.residual: set[str] = set()
        self.seen: set[str] = set()
        self.reads: dict[tuple[str, str], Tag | None] = {}
        self.scales: dict[str, str] = {}
        self.flags: dict[str, list[str]] = {}
        for name, parameter in model.named_parameters():
            self.tag(parameter, ("parameter", name))
        for path, spec in self.specs.items():
            for role, slot in spec.slots().items():
                for name in slot.named(slot.tensor):
                    self.roles.setdefault(name, []).append((path, role))
                self.folded.update(slot.named(slot.batch_norm) if slot.batch_norm else ())

    def found(self) -> dict[str, Surroundings]:
        """Return what was seen around each module that the pass went through."""
        return {path: self._around(path) for path in self.seen}

    def _around(self, path: str) -> Surroundings:
        flags = list(self.flags.get(path, ()))
        norms: dict[str, str] = {}
        for role in "qkv":
            if (path, role) not in self.reads:
                flags.append("norm_unknown")
                continue
            kind, source = self.reads[path, role] or ("", "")
            if kind in ("norm", "mixed"):
                norms[source] = norms.get(source, "") + role
            if kind in _FLAG_OF:
                flags.append(_FLAG_OF[kind])
        pairs = tuple((roles, source) for source, roles in norms.items())
        return Surroundings(pairs, self.scales.get(path), tuple(dict.fromkeys(flags)))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow every operation while the context is open."""
        handles = self._hook()
        try:
            with self._mode():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def tag(self, value: Any, tag: Tag) -> None:
        """Tag every tensor in ``value``."""
        for tensor in _tensors(value):
            self.tags[id(tensor)] = tag
            self.alive.append(tensor)

    def of(self, value: Any) -> Tag | None:
        """Return the tag of the first tensor in ``value``."""
        return next((self.tags.get(id(tensor)) for tensor in _tensors(value)), None)

    def _hook(self) -> list[Any]:
        handles: list[Any] = []
        for path, module in self.model.named_modules():
            if path in self.specs:
                handles.append(module.register_forward_pre_hook(self._enter(path), with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave(path)))
            elif norm_kind(module):
                handles.append(module.register_forward_hook(self._norm(path)))
        return handles

    def _enter(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.seen.add(path)
            self.inside.append(path)
            self.inputs[path] = {id(tensor) for tensor in _tensors((args, kwargs))}
            given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
            for name, value in given.items():
                if value is not None and name.startswith(("rope", "shared_rel_pos")):
                    self.flags.setdefault(path, []).append("rope" if name.startswith("rope") else "rel_pos_bias")

        return enter

    def _leave(self, path: str) -> Callable[..., None]:
        def leave(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            self.inside.remove(path)
            if path not in self.residual:
                self.tag(output, ("attention", path))

        return leave

    def _norm(self, path: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            tag = self.of(args)
            if path in self.folded:
                if tag is not None:
                    self.tag(output, tag)
                return
            if tag is not None and tag[0] == "attention":
                self.flags.setdefault(tag[1], []).append("norm_after")
            self.tag(output, ("norm" if _is_plain(module) else "lost", path))

        return leave

    def _mode(self) -> Any:
        from torch.utils._python_dispatch import TorchDispatchMode

        tracer = self

        class Follow(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                with self:  # in inference mode operations arrive whole: linear, conv2d, dropout
                    parts = func.decompose(*args, **(kwargs or {}))
                if parts is not NotImplemented:
                    return parts
                output = func(*args, **(kwargs or {}))
                tracer.follow(func.overloadpacket.__name__.rstrip("_"), args, output)
                return output

        return Follow()

    def follow(self, operation: str, args: tuple[Any, ...], output: Any) -> None:
        """Take note of one operation and tag what it returns."""
        if operation in _PRODUCTS:
            self._project(operation, args, output)
        elif operation in _JOINS:
            self._join(args[0], output)
        elif operation == "mul" and len(args) == 2:
            self._multiply(args, output)
        elif operation == "add":
            self._add(args, output)
        else:
            self._hand_on(operation, self.of(args), output)

    def _hand_on(self, operation: str, tag: Tag | None, output: Any) -> None:
        if tag is None:
            return
        if operation in _MOVES:
            self.tag(output, tag)
        elif operation in _POOLS:
            self.tag(output, ("mixed", tag[1]) if tag[0] == "norm" else tag)
        elif operation in _NONLINEAR and tag[0] in _NORMED:
            self.tag(output, ("lost", tag[1]))

    def _join(self, parts: Any, output: Any) -> None:
        """Hand on the tag that all parts share, an attention output's though other tokens stand beside it."""
        tags = [self.of(part) for part in parts]
        attended = [tag for tag in tags if tag is not None and tag[0] == "attention"]
        normed = [tag for tag in tags if tag is not None and tag[0] in _NORMED]
        if attended:
            self.tag(output, attended[0])
        elif normed:
            whole = all(tag == normed[0] for tag in tags)
            self.tag(output, normed[0] if whole else ("part", normed[0][1]))

    def _project(self, operation: str, args: tuple[Any, ...], output: Any) -> None:
        """Note what a projection reads, and tag what an output projection returns."""
        source, weight = (self.of(args[position]) for position in _PRODUCTS[operation])
        names = [weight[1]] if weight is not None and weight[0] == "parameter" else []
        if source is not None and source[0] in _NORMED and not self._fits(source[1], operation, args):
            source = ("part", source[1])
        for path, role in (place for name in names for place in self.roles.get(name, ())):
            if role == "o":
                self.tag(output, ("projected", path))
            else:
                self.reads[path, role] = source
        depthwise = operation == "convolution" and 1 < args[-1] == args[0].shape[1]
        if depthwise and source is not None and source[0] in _NORMED:
            self.tag(output, ("mixed" if source[0] == "norm" else source[0], source[1]))

    def _fits(self, norm: str, operation: str, args: tuple[Any, ...]) -> bool:
        """Whether a projection reads all channels of a norm, and no slice of them."""
        gain = getattr(self.model.get_submodule(norm), "weight", None)
        value = args[_PRODUCTS[operation][0]]
        return gain is None or gain.numel() == value.shape[1 if operation == "convolution" else -1]

    def _multiply(self, args: tuple[Any, ...], output: torch.Tensor) -> None:
        """Recognise LayerScale: an attention output times a parameter vector, whoever owns it."""
        for value, other in (args, args[::-1]):
            tag, scale = self.of(value), self.of(other)
            if tag is None or tag[0] not in ("attention", "projected") or scale is None or scale[0] != "parameter":
                continue
            if other.numel() in value.shape:
                self.scales[tag[1]] = scale[1]
                self.tag(output, tag)

    def _add(self, args: tuple[Any, ...], output: Any) -> None:
        """Keep the tag of a sum whose terms share it, and of a projected output inside its module.

        What multiplies a sum multiplies its terms, so the scale of an MLP beside the attention is the attention's
        too; a module that adds its own input returns the residual stream, and no attention output.
        """
        first, second = (self.of(value) for value in args[:2])
        if first and second and first[1] == second[1] and {first[0], second[0]} <= {"norm", "mixed"}:
            self.tag(output, max(first, second, key=lambda tag: tag[0] == "mixed"))
        for tag, other in ((first, args[1]), (second, args[0])):
            if tag is None or tag[0] != "projected" or tag[1] not in self.inside:
                continue
            if id(other) in self.inputs[tag[1]]:
                self.residual.add(tag[1])
            else:
                self.tag(output, tag)


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if _is_tensor(value):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
