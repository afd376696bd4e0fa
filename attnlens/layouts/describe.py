"""From a live module to its `AttentionSpec`: the rule of its class, a labelled guess, or a refusal by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from attnlens.errors import UnsupportedAttentionError
from attnlens.layouts.flags import ATTRIBUTE_FLAGS
from attnlens.layouts.registry import REFUSED, RULES, Rule, Slots, class_name
from attnlens.layouts.spec import AttentionSpec, Refusal, Slot

if TYPE_CHECKING:
    from torch import nn

_FAMILY_MODULES = ("fused", "split", "head_first", "convolution", "pooling", "other", "on_request", "refused")


def _load_rules() -> None:
    for name in _FAMILY_MODULES:
        import_module(f"attnlens.layouts.timm.{name}")


def rules_by_class() -> Mapping[str, list[Rule]]:
    """Return the rules of every class that is read, by its full name."""
    _load_rules()
    return RULES


def describe_attention(module: nn.Module, path: str) -> AttentionSpec | Refusal | None:
    """Describe a module if its class, or one it derives from, is a known attention class; None for any other module.

    A subclass is read by its parent's rule under the visible label ``layout of <parent>``.
    """
    _load_rules()
    class_path = class_name(type(module))
    for cls in type(module).__mro__:
        known = class_name(cls)
        if known in REFUSED:
            return Refusal(path, class_path, REFUSED[known].family, REFUSED[known].reason)
        for candidate in RULES.get(known, ()):
            try:
                slots = candidate.describe(module)
            except UnsupportedAttentionError as error:
                return Refusal(path, class_path, candidate.family, str(error))
            except (AttributeError, TypeError, ValueError, LookupError, ArithmeticError) as error:
                return Refusal(path, class_path, candidate.family, _changed(module, error))
            if slots is not None and candidate.refusal:
                return Refusal(path, class_path, candidate.family, candidate.refusal)
            if slots is not None:
                label = "" if cls is type(module) else f"layout of {known}"
                return _spec(module, path, class_path, candidate, slots, label)
    return None


def _changed(module: nn.Module, error: Exception) -> str:
    """Say why a module does not have the parts that its class has: quantised layers, or others put in their place."""
    kept = sorted({class_name(type(part)) for part in module.modules() if callable(getattr(part, "weight", None))})
    if kept:
        return f"holds quantised layers ({kept[0]}), which store codes: give the network from before it was quantised"
    return f"is not built as its class builds it ({type(error).__name__}: {error})"


def _spec(module: Any, path: str, class_path: str, matched: Rule, slots: Slots, label: str) -> AttentionSpec:
    flags = [flag for name, flag in {**ATTRIBUTE_FLAGS, **matched.flags}.items() if flag and _is_present(module, name)]
    biased = any(slots[role].bias or slots[role].batch_norm for role in "qk")
    scale = slots["q"].width ** -0.5 if matched.sdpa_scale else float(getattr(module, "scale", 1.0))
    return AttentionSpec(
        path=path,
        module_class=class_path,
        family=matched.family,
        scale=scale,
        leaves_out=tuple(dict.fromkeys((*matched.leaves_out, *flags, *(["qk_bias"] if biased else [])))),
        kind=matched.kind,
        label="; ".join(filter(None, (label, matched.label))),
        **{role: _at(slots[role], path) if role in slots else None for role in "qkvo"},  # type: ignore[arg-type]
    )


def attention_modules(model: nn.Module) -> Iterator[AttentionSpec | Refusal]:
    """Describe every attention module of a model, in module order; one of an unknown class is guessed or refused."""
    inside: list[str] = []
    for path, module in model.named_modules():
        described = describe_attention(module, path)
        if described is None and not any(path.startswith(known) for known in inside):
            described = _describe_unknown(module, path)
        if described is not None:
            inside.append(f"{path}." if path else "")
            yield described


def attention_spec(module: nn.Module, path: str) -> AttentionSpec | None:
    """Return the layout of the module at ``path``, known or guessed; None where it is refused or holds no attention."""
    described = describe_attention(module, path) or _describe_unknown(module, path)
    return described if isinstance(described, AttentionSpec) else None


def _describe_unknown(module: nn.Module, path: str) -> AttentionSpec | Refusal | None:
    """Guess the layout of a class without a rule, refuse one that looks like attention and does not fit."""
    from attnlens.layouts.guess import LABEL, guess, looks_like_attention

    if not looks_like_attention(module):
        return None
    class_path, slots = class_name(type(module)), guess(module)
    if slots is None:
        return Refusal(path, class_path, "unknown", "looks like attention, but its class and its layout are not known")
    scaled = not isinstance(getattr(module, "scale", None), int | float)
    return _spec(module, path, class_path, Rule(family="A", describe=guess, sdpa_scale=scaled), slots, LABEL)


def _at(slot: Slot, path: str) -> Slot:
    """Turn a slot's module-relative tensor names into names of the whole model."""
    prefix = f"{path}." if path else ""
    return replace(
        slot,
        tensor=prefix + slot.tensor,
        bias=prefix + slot.bias if slot.bias else None,
        batch_norm=prefix + slot.batch_norm if slot.batch_norm else None,
    )


def _is_present(module: Any, path: str) -> bool:
    """Whether the attribute at a dotted path adds something: not None, False, a stride of 1, or an Identity."""
    value = module
    for name in path.split("."):
        value = getattr(value, name, None)
    if value is None or isinstance(value, bool | int):
        return bool(value) if isinstance(value, bool) else value not in (None, 1)
    return type(value).__name__ != "Identity"
