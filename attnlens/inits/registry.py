"""The initialisers by name: what each accepts, and errors that say so."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from attnlens.errors import UsageError
from attnlens.inits.plan import Network, Rule
from attnlens.vocabulary import Vocabulary, one_of

Make = Callable[..., Rule]
choose = one_of
"""What rules check a word with."""
_MODULES = (
    "mimetic",
    "fitted",
    "controls",
    "identity",
    "conditioned",
    "impulse",
    "teacher",
    "filters",
    "filter_teacher",
    "default",
)


@dataclass(frozen=True)
class Initialiser:
    """A named initialiser: ``make(network, **options)`` resolves its options and returns its rule."""

    name: str
    make: Make

    def __repr__(self) -> str:
        """Say the name and the options with their defaults."""
        return f"<Initialiser {', '.join([self.name, *(f'{name}={value!r}' for name, value in self._given())])}>"

    def _given(self) -> list[tuple[str, Any]]:
        return [(n, ... if v is inspect.Parameter.empty else v) for n, v in self.options.items()]

    @property
    def options(self) -> dict[str, Any]:
        """Return the accepted options with their defaults."""
        parameters = list(inspect.signature(self.make).parameters.values())[1:]
        return {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}

    @property
    def passes_on(self) -> bool:
        """Whether further options are those of another initialiser that this one is built on."""
        return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(self.make).parameters.values())

    def takes(self, option: str) -> bool:
        """Whether an option is accepted, or passed on to another initialiser."""
        return option in self.options or self.passes_on

    @property
    def summary(self) -> str:
        """Return the first sentence of its documentation."""
        return (inspect.getdoc(self.make) or "").split("\n\n")[0].replace("\n", " ")

    def rule(self, network: Network, options: Mapping[str, Any]) -> Rule:
        """Return the rule with its options resolved; raises `UsageError` naming one that is unknown or missing."""
        known = self.options
        unknown = [name for name in options if name not in known]
        if unknown and not self.passes_on:
            close = get_close_matches(unknown[0], known, n=1, cutoff=0.6)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise UsageError(
                f"initialiser {self.name!r} has no option {unknown[0]!r}{hint}: it accepts {', '.join(known) or 'none'}"
            )
        needed = [name for name, default in known.items() if default is inspect.Parameter.empty]
        missing = [name for name in needed if name not in options]
        if missing:
            raise UsageError(f"initialiser {self.name!r} needs the option {missing[0]!r}")
        return self.make(network, **options)


_KNOWN: dict[str, Initialiser] = {}


def initialiser(name: str) -> Callable[[Make], Make]:
    """Register ``make(network, *, option=default, ...) -> Rule`` under a name."""

    def register(make: Make) -> Make:
        _KNOWN[name] = Initialiser(name, make)
        return make

    return register


def initialisers() -> dict[str, Initialiser]:
    """Return every initialiser by name."""
    for module in _MODULES:
        import_module(f"attnlens.inits.rules.{module}")
    return dict(_KNOWN)


def find_initialiser(name: str) -> Initialiser:
    """Return an initialiser; raises `UsageError` with the nearest names where there is none of that name."""
    known = initialisers()
    name = Vocabulary("initialiser", tuple(known)).find(name) or name
    if name not in known:
        close = get_close_matches(str(name).replace("_", "-"), known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(known)}"
        raise UsageError(f"no initialiser is named {name!r}: {hint}")
    return known[name]


def number(option: str, value: Any, least: float | None = None) -> float:
    """Return the value of a numeric option; raises `UsageError` where it is none, not finite, or below ``least``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise UsageError(f"{option} = {value!r} is not accepted: pass a finite number")
    if least is not None and value < least:
        raise UsageError(f"{option} = {value!r} is not accepted: pass a number of at least {least:g}")
    return float(value)
