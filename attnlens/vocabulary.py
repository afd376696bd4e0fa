"""The words that functions accept: one check for all of them, and errors that name what is accepted."""

from __future__ import annotations

import numbers
import operator
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import islice
from typing import Any

from attnlens.errors import UsageError

_AMERICAN = (
    (re.compile(r"centr(?=ed|ing)"), "center"),
    (re.compile(r"centre"), "center"),
    (re.compile(r"(?<=[a-z]{2})is(?=(e|ed|es|er|ers|ing|ation|ations)$)"), "iz"),
    (re.compile(r"colour"), "color"),
    (re.compile(r"grey"), "gray"),
    (re.compile(r"labell"), "label"),
)
_NEAR = 0.6
MOST_LAYERS = 20_000
"""Layers that may be chosen: no network has as many modules."""


def spelled_alike(word: str) -> str:
    """Return what words are compared by: lower case, hyphens for spaces and underscores, American spelling."""
    plain = re.sub(r"[\s_-]+", "-", word.strip().lower())
    for british, american in _AMERICAN:
        plain = "-".join(british.sub(american, part) for part in plain.split("-"))
    return plain


@dataclass(frozen=True)
class Vocabulary:
    """The words one argument accepts, whatever their case and of either spelling; ``also`` are other names of them."""

    name: str
    words: tuple[str, ...]
    also: Mapping[str, str] = field(default_factory=dict, hash=False)

    def find(self, value: Any) -> str | None:
        """Return the word as attnlens spells it; None for what is none of the words."""
        if not isinstance(value, str):
            return None
        return value if value in self.words else self._known().get(spelled_alike(value))

    def __call__(self, value: Any) -> Any:
        """Return the word as attnlens spells it. Raises `UsageError` with the accepted words."""
        found = self.find(value)
        if found is not None:
            return found
        known = self._known()
        close = get_close_matches(spelled_alike(value), known, n=1, cutoff=_NEAR) if isinstance(value, str) else ()
        hint = f" (did you mean {known[close[0]]}?)" if close else ""
        raise UsageError(f"{self.name} {value!r} is not known{hint}: choose {', '.join(self.words)}")

    def _known(self) -> dict[str, str]:
        own = {spelled_alike(word): word for word in self.words}
        return {spelled_alike(other): word for other, word in self.also.items()} | own


CIRCUIT = Vocabulary("circuit", ("qk", "ov"), {"W_QK": "qk", "W_OV": "ov"})
FOLD = Vocabulary("fold", ("raw", "effective", "centred", "balanced"))
FOLD_CHOICE = Vocabulary("fold", (*FOLD.words, "both", "all"))
PER = Vocabulary("per", ("head", "layer", "model"))
HEADS = Vocabulary("head", ("each", "all"))
COMPOSED = Vocabulary("kind", ("q", "k", "v"))
ON_REQUEST = Vocabulary("include", ("channel", "linear"))
GAINS = Vocabulary("gains", ("none", "quantiles", "channels"))
FIGURE_STYLE = Vocabulary("style", ("default", "paper"), {"screen": "default"})
FIGURE_WIDTH = Vocabulary("width", ("column", "page"), {"text": "page", "two-columns": "page", "one-column": "column"})
FIGURE_FORMAT = Vocabulary("format", ("png", "pdf", "svg"))
SHRINKAGE = Vocabulary("shrinkage", ("ledoit-wolf", "oas", "none"))


def one_of(option: str, value: Any, accepted: tuple[str, ...]) -> Any:
    """Return the word of an option of an initialiser or a network; raises `UsageError` where it is none of them."""
    found = Vocabulary(option, accepted).find(value)
    if found is None:
        raise UsageError(f"{option} = {value!r} is not accepted: pass {' or '.join(map(repr, accepted))}")
    return found


def index(name: str, value: Any) -> int:
    """Return a whole number of at least 0, numpy's among them. Raises `UsageError` for a truth value or a fraction."""
    try:
        found = operator.index(value)
    except TypeError:
        found = -1
    if isinstance(value, bool) or found < 0:
        raise UsageError(f"{name} {value!r} is no index: give a whole number of 0 or more")
    return found


def several(given: Sequence[Any]) -> tuple[Any, ...]:
    """Return what was given one by one, or all of one list or tuple."""
    return tuple(given[0]) if len(given) == 1 and isinstance(given[0], list | tuple) else tuple(given)


def layer_index(value: Any, known: Collection[int], missing: str = "was not read") -> int:
    """Return the index of a layer that is among those known; ``missing`` says what is wrong with another."""
    try:
        layer = index("layer", value)
    except UsageError:
        layer = -1
    if layer not in known:
        raise UsageError(f"layer {_shown(value)} {missing}: choose from {sorted(known)}")
    return layer


def head_index(value: Any, count: int, layer: int) -> int:
    """Return the index of one of a layer's ``count`` heads."""
    wrong = UsageError(f"head {_shown(value)} of layer {layer} does not exist: choose 0 to {count - 1}")
    try:
        head = index("head", value)
    except UsageError:
        raise wrong from None
    if head >= count:
        raise wrong
    return head


def layer_choice(layers: Any, name: str = "layers") -> list[int] | None:
    """Return the layers asked for: an index, several, or text as ``0-3,11``; None, all of them, stays None."""
    if layers is None:
        return None
    if isinstance(layers, str):
        return _parsed(layers, name)
    given = layers if isinstance(layers, Iterable) else [layers]
    found = [index("layer", layer) for layer in islice(given, MOST_LAYERS + 1)]
    if len(found) > MOST_LAYERS or max(found, default=0) >= MOST_LAYERS:
        raise _too_many(name)
    return found


def coverage(level: Any) -> float:
    """Return a coverage probability of intervals. Raises `UsageError` where it is none."""
    if isinstance(level, bool) or not isinstance(level, numbers.Real) or not 0 < float(level) < 1:
        percent = isinstance(level, numbers.Real) and 1 < float(level) < 100
        hint = f": {float(level):g} % is {float(level) / 100:g}" if percent else ", e.g. 0.95"
        raise UsageError(f"level {_shown(level)} is not a coverage probability: use a number between 0 and 1{hint}")
    return float(level)


def column(name: Any, columns: Sequence[str]) -> str:
    """Return the name of a column of a table, in either spelling."""
    return str(Vocabulary("column", tuple(columns))(name))


def _parsed(text: str, name: str) -> list[int]:
    layers: list[int] = []
    for piece in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", piece)
        if match is not None and any(len(digits.lstrip("0")) > len(str(MOST_LAYERS)) for digits in match.groups("")):
            raise _too_many(name)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise UsageError(f"{name} {text!r} is not understood: give indices and ranges, e.g. 0-3,11")
        piece_of = range(int(match[1]), int(match[2] or match[1]) + 1)
        if piece_of.stop > MOST_LAYERS or len(layers) + len(piece_of) > MOST_LAYERS:
            raise _too_many(name)
        layers += piece_of
    return layers


def _too_many(name: str) -> UsageError:
    return UsageError(f"{name} names more layers than a network has: give at most {MOST_LAYERS}, below {MOST_LAYERS}")


def _shown(value: Any) -> str:
    """Write a value as a person types it: numpy's numbers without their type."""
    return repr(value.item()) if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else repr(value)
