"""A live network without what is wrapped around it: its own modules and names, and the weights it applies.

Wrappers (DataParallel, DDP, FSDP, torch.compile, activation checkpointing, PEFT) add names and no weights. A weight
that a module computes at each forward pass (a parametrization, weight_norm, spectral_norm, a pruning mask, adapters)
is computed here by the code that the module itself calls.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from attnlens.checkpoints import Checkpoint
from attnlens.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import nn

# Class of a wrapper -> the attribute that holds the network, dotted. Named by text: nothing is imported to look.
_WRAPPERS = {
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": "_checkpoint_wrapped_module",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "_fsdp_wrapped_module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "timm.utils.model_ema.ModelEmaV2": "module",
    "timm.utils.model_ema.ModelEmaV3": "module",
    "lightning.fabric.wrappers._FabricModule": "_original_module",
    "lightning_fabric.wrappers._FabricModule": "_original_module",
    "deepspeed.runtime.engine.DeepSpeedEngine": "module",
    "peft.peft_model.PeftModel": "base_model",
    "peft.tuners.tuners_utils.BaseTuner": "model",
}
_ADAPTED = "peft.tuners.tuners_utils.BaseTunerLayer"
_EXCHANGED = "peft.utils.other.AuxiliaryTrainingWrapper"
_SHARDED = "torch.distributed.fsdp.FSDPModule"
# Attributes of a trainer's that lead out of the network, to data sets and loggers.
_OUTSIDE = ("_trainer", "_fabric")

Source = Any
"""A tensor of the live network, or a function that computes the one its module applies."""


class Undressed(NamedTuple):
    """A network on the meta device without wrappers, and its weights by the names they have there."""

    skeleton: nn.Module
    weights: LiveWeights


class LiveWeights(Checkpoint):
    """The weights a live network applies, as they are at each read, under the names it has without wrappers."""

    def __init__(self, module: nn.Module, sources: dict[str, Source], wrappers: tuple[str, ...] = ()) -> None:
        self._module = module
        self._sources = sources
        self._wrappers = wrappers

    def provenance(self) -> dict[str, Any]:
        """Return the module's class and what was wrapped around it; weights in memory have no file to hash."""
        cls = type(self._module)
        found: dict[str, Any] = {"module": f"{cls.__module__}.{cls.__qualname__}"}
        return {**found, "wrappers": list(self._wrappers)} if self._wrappers else found

    @property
    def network(self) -> nn.Module:
        """The live network inside what is wrapped around it as a whole."""
        return self._module

    def renamed(self, names: dict[str, str]) -> LiveWeights:
        """Return the same weights under other names: ``names`` holds the new name of each old one that is kept."""
        return LiveWeights(
            self._module,
            {new: self._sources[old] for old, new in names.items() if old in self._sources},
            self._wrappers,
        )

    def by_head(self) -> LiveWeights:
        """Return the same weights, with each part of a three-dimensional one, or of its bias, under ``name[head]``."""
        parts: dict[str, Source] = {}
        for name, source in self._sources.items():
            if not callable(source) and source.ndim in (2, 3) and re.search(r"\._?[Wb]_[QKVO]$", name):
                parts |= {f"{name}[{head}]": part for head, part in enumerate(source.detach())}
        return LiveWeights(self._module, {**self._sources, **parts}, self._wrappers)

    def why_not_written(self, name: str) -> str:
        """Say why a tensor cannot be written in place, to follow its name; empty where it can."""
        source = self._sources[name]
        if callable(source):
            return (
                "is computed from other tensors (a parametrization, a mask or an adapter), so that nothing written to "
                "it stays: initialise before that is added, or merge it first"
            )
        if hasattr(source, "full_tensor"):
            return "is spread over processes: initialise before sharding"
        if source.is_meta:
            return (
                "is on the meta device and holds no numbers: materialise it first, as with "
                "module.to_empty(device='cpu') and its own initialisation"
            )
        return "" if source.is_floating_point() else f"is stored as {source.dtype}: initialise before quantising"

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        source = self._sources[name]
        return tuple(source.shape) if hasattr(source, "shape") else tuple(self[name].shape)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a tensor, detached; it is the network's own storage unless it is computed."""
        source = self._sources[name]
        try:
            tensor: torch.Tensor = (source() if callable(source) else source).detach()
            tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        except CheckpointError:
            raise
        except Exception as error:  # what a parametrization, an adapter or a backend of sharding may raise
            raise CheckpointError(
                f"{name} cannot be computed ({_first(error)}): give the network without it"
            ) from error
        if tensor.is_meta:
            raise CheckpointError(
                f"{name} is on the meta device and holds no numbers: load the weights first, or give a checkpoint"
            )
        if tensor.is_quantized or not (tensor.is_floating_point() or tensor.is_complex()):
            raise CheckpointError(
                f"{name} is stored as {tensor.dtype}: codes of a quantised network, and no weights. Give the network "
                "from before it was quantised"
            )
        return tensor

    def __contains__(self, name: object) -> bool:
        """Whether a tensor of that name is there; nothing is computed."""
        return name in self._sources

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the tensors."""
        return iter(self._sources)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._sources)


def undress(module: nn.Module) -> Undressed:
    """Copy a network to the meta device without its wrappers, and find the tensors it applies. It is left as it is.

    Raises `CheckpointError` where its modules cannot be taken apart (TorchScript).
    """
    import torch

    if isinstance(module, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        raise CheckpointError(
            f"{type(module).__name__} is TorchScript, whose modules have no class: give what it was made from, or "
            "its state_dict() and num_heads"
        )
    copied = _Copy()
    skeleton = copied.shell(module)
    copied.fill()
    sources: dict[str, Source] = {}
    for path, shell in skeleton.named_modules(remove_duplicate=False):
        for leaf, source in copied.sources.get(id(shell), {}).items():
            sources[f"{path}.{leaf}" if path else leaf] = source
    inner = copied.originals[id(skeleton)]
    return Undressed(skeleton, LiveWeights(inner, sources, tuple(copied.wrappers)))


def names_of(cls: type) -> Iterator[str]:
    """Yield the full name of a class and of each it derives from."""
    for base in cls.__mro__:
        yield f"{base.__module__}.{base.__qualname__}"


@dataclass
class _Copy:
    """A copy that is being made: shells first, so that attributes may point to any module, then what is in them."""

    memo: dict[int, Any] = field(default_factory=dict)
    originals: dict[int, Any] = field(default_factory=dict)
    adapters: dict[int, Any] = field(default_factory=dict)
    sources: dict[int, dict[str, Source]] = field(default_factory=dict)
    wrappers: dict[str, None] = field(default_factory=dict)
    shells: list[Any] = field(default_factory=list)

    def shell(self, module: Any) -> Any:
        """Return an empty module for the one inside ``module``, those of its children with it."""
        inner = module
        while (below := self._below(inner)) is not None:
            if _ADAPTED in names_of(type(inner)):
                self.adapters[id(below)] = inner
            else:
                self.wrappers[type(inner).__name__] = None
            inner = below
        if id(inner) not in self.memo:
            shell: Any = object.__new__(_plain_class(inner))
            self.memo[id(inner)] = shell
            self.originals[id(shell)] = inner
            self.shells.append(shell)
            for name, child in inner._modules.items():  # noqa: SLF001  # None among them: named_children leaves it out
                if child is not None and name != "parametrizations":
                    self.shell(child)
        self.memo[id(module)] = self.memo[id(inner)]
        return self.memo[id(inner)]

    @staticmethod
    def _below(module: Any) -> Any:
        """Return the module that a wrapper stands around, None where it is no wrapper."""
        for name in names_of(type(module)):
            if name == _ADAPTED:
                return module.base_layer
            if name == _EXCHANGED:
                return _exchanged(module)
            if name in _WRAPPERS:
                return getattr(module, _WRAPPERS[name])
        return None

    def fill(self) -> None:
        """Give each shell what its module holds: tensors on the meta device, no hooks, all else copied."""
        for shell in self.shells:
            inner = self.originals[id(shell)]
            for tensor in (*inner.__dict__["_parameters"].values(), *inner.__dict__["_buffers"].values()):
                if tensor is not None and id(tensor) not in self.memo:
                    self.memo[id(tensor)] = _on_meta(tensor)
        for shell in self.shells:
            self._fill(shell, self.originals[id(shell)])

    def _fill(self, shell: Any, inner: Any) -> None:
        import torch

        own, fresh = inner.__dict__, torch.nn.Module().__dict__
        computed = dict(_computed(inner, self.adapters.get(id(inner))))
        parts = {name: leaf for leaf in computed for name in _parts(leaf)}
        parameters = {k: self.memo.get(id(v)) for k, v in own["_parameters"].items() if k not in parts}
        buffers = {k: self.memo.get(id(v)) for k, v in own["_buffers"].items() if k not in parts}
        stored = {**own["_parameters"], **own["_buffers"]}
        sources = {k: v for k, v in stored.items() if v is not None and k not in parts}
        for leaf, source in computed.items():
            shape_of = stored.get(leaf)
            like = source() if shape_of is None else shape_of
            parameters[leaf] = torch.nn.Parameter(_on_meta(like), requires_grad=False)
            sources[leaf] = source
        self.sources[id(shell)] = sources
        modules = {k: self.memo.get(id(v)) for k, v in own["_modules"].items() if k != "parametrizations"}
        state = {**fresh, "training": own.get("training", True)}
        for name, value in own.items():
            if name in fresh or name in ("_forward_pre_hooks", *computed) or (name == "forward" and "_hf_hook" in own):
                continue
            state[name] = None if name in _OUTSIDE else self._copied(value)
        state |= {
            "_parameters": parameters,
            "_buffers": buffers,
            "_modules": modules,
            "_non_persistent_buffers_set": set(own["_non_persistent_buffers_set"]),
        }
        state.pop("_compiled_call_impl", None)
        shell.__dict__.update(state)

    def _copied(self, value: Any) -> Any:
        """Copy what a module holds beside its tensors; what cannot be copied, such as a lock, is shared."""
        import torch

        if isinstance(value, torch.Tensor):
            return self.memo.setdefault(id(value), _on_meta(value))
        with contextlib.suppress(Exception):  # any class may forbid it in any way
            return copy.deepcopy(value, self.memo)
        return value


def _plain_class(module: Any) -> type:
    """Return the class a module had before torch made a subclass of it for parametrizations or sharding."""
    cls: type = type(module)
    if "parametrizations" in module._modules:  # noqa: SLF001
        cls = cls.__bases__[0]
    names = list(names_of(cls))
    if _SHARDED in names[1:]:
        cls = cls.__mro__[names.index(_SHARDED) + 1]
    return cls


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    found = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return torch.nn.Parameter(found, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else found


def _parts(leaf: str) -> tuple[str, ...]:
    """Name what weight_norm, spectral_norm and pruning keep in place of a weight, and the weight itself."""
    return (leaf, *(f"{leaf}_{part}" for part in ("g", "v", "orig", "mask", "u")))


def _computed(module: Any, adapter: Any) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Yield the tensors that a module does not hold but computes, with what computes each."""
    for leaf in module._modules.get("parametrizations") or ():  # noqa: SLF001
        yield leaf, partial(_parametrized, module, leaf)
    for hook in module.__dict__["_forward_pre_hooks"].values():
        names = set(names_of(type(hook)))
        if "torch.nn.utils.weight_norm.WeightNorm" in names:
            yield hook.name, partial(hook.compute_weight, module)
        elif "torch.nn.utils.spectral_norm.SpectralNorm" in names:
            yield hook.name, partial(hook.compute_weight, module, do_power_iteration=False)
        elif "torch.nn.utils.prune.BasePruningMethod" in names:
            yield hook._tensor_name, partial(hook.apply_mask, module)  # noqa: SLF001
    if adapter is not None and bool(adapter.merged) == bool(adapter.disable_adapters or not adapter.active_adapters):
        for leaf in module._parameters:  # noqa: SLF001  # held without what is applied, or with what is not
            yield leaf, partial(_merged, adapter, leaf)


def _parametrized(module: Any, leaf: str) -> torch.Tensor:
    """Return a parametrized tensor; spectral_norm would take a step of its power iteration in training mode."""
    import torch

    steps = module.parametrizations[leaf]
    was_training = steps.training
    steps.eval()
    try:
        with torch.no_grad():
            tensor: torch.Tensor = getattr(module, leaf)
            return tensor
    finally:
        steps.train(was_training)


def _merged(adapter: Any, leaf: str) -> torch.Tensor:
    """Return a tensor of the layer below an adapter as PEFT itself merges it, or takes it out, in a copy."""
    import torch

    merged = copy.deepcopy(adapter)
    with torch.no_grad():
        if merged.merged:
            merged.unmerge()
        else:
            merged.merge()
    tensor: torch.Tensor = getattr(merged.get_base_layer(), leaf)
    return tensor


def _exchanged(wrapper: Any) -> Any:
    """Return the module that PEFT runs: the one trained beside the original where its adapter is active."""
    trained: Any = getattr(wrapper, "modules_to_save", None) or {}
    active = [name for name in wrapper.active_adapters if name in trained]
    return trained[active[0]] if active and not wrapper.disable_adapters else wrapper.original_module


def _first(error: Exception) -> str:
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
