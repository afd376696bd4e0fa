"""Dispatch on module class: which rule describes which attention class, and which classes are refused and why.

A rule is a function of a live module that returns the four slots; it is registered under the full names of the
classes it is true of. Classes are named by text so that nothing is imported to look one up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from attnlens.layouts.spec import Slot

Slots = dict[str, Slot]
Describe = Callable[[Any], Slots | None]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How modules of one class are read.

    ``describe(module)`` gives slots whose tensor names are the module's own, None where the module takes another form
    of its class, or raises `UnsupportedAttentionError` where this form has no product to read. ``leaves_out`` is true
    of every such module; ``flags`` maps an attribute (a dotted path) to what its presence adds beside the product, or
    to None where the general table of attributes does not hold for the class. ``kind`` and ``label`` go into the
    spec; ``sdpa_scale`` says that scores are scaled by head_dim ** -0.5 though no attribute ``scale`` says so. With a
    ``refusal`` every module that ``describe`` gives slots for, an empty dict will do, is refused with that reason.
    """

    family: str
    describe: Describe
    leaves_out: tuple[str, ...] = ()
    flags: Mapping[str, str | None] = field(default_factory=dict)
    kind: str = "token"
    label: str = ""
    sdpa_scale: bool = False
    refusal: str = ""


@dataclass(frozen=True)
class RefusedClass:
    """A class that is known and not read, with the reason a user is told."""

    family: str
    reason: str


RULES: dict[str, list[Rule]] = {}
REFUSED: dict[str, RefusedClass] = {}


def rule(family: str, *classes: str, **about: Any) -> Callable[[Describe], Describe]:
    """Register a describe function for classes given by full name; the first rule of a class that applies is used.

    ``about`` holds the further fields of `Rule`.
    """

    def register(describe: Describe) -> Describe:
        for name in classes:
            RULES.setdefault(name, []).append(Rule(family=family, describe=describe, **about))
        return describe

    return register


def refuse(family: str, reason: str, *classes: str) -> None:
    """Register classes that are refused by name."""
    for name in classes:
        REFUSED[name] = RefusedClass(family, reason)


def class_name(cls: type) -> str:
    """Return the full name of a class, ``package.module.Class``."""
    return f"{cls.__module__}.{cls.__qualname__}"


def has(module: Any, name: str) -> bool:
    """Whether a module has an attribute that is not None."""
    return getattr(module, name, None) is not None
