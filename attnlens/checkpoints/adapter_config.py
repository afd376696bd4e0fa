"""What the ``adapter_config.json`` of a PEFT folder says: the base, the method, and which modules are adapted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attnlens.checkpoints.base import _OnDisk
from attnlens.errors import CheckpointError
from attnlens.strict_json import read_json, there, within

NAMES = re.compile(r"(\^?[\w-]+(?:\\?\.[\w-]+)*)\$?", re.ASCII)
"""An expression of PEFT's that is the end of a module's name, or behind ``^`` the whole of it."""
ADAPTER_BESIDE = (
    "holds an adapter_config.json: an adapter is read from a folder without config.json and without a number of heads, "
    "a model from one without adapter_config.json; or merge the two (peft's merge_and_unload) and give the merged model"
)
"""What is said of a place that may hold both, of which libraries read one, or both, as they are installed."""
_EVERY_LINEAR = "all-linear"
_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")
"""Where PEFT finds a layer's number when no ``layers_pattern`` is given."""


class AdapterConfig(_OnDisk):
    """The configuration of an adapter's folder, read once, and held to be the file that was read.

    Which modules it names is PEFT's own rule for names. Expressions out of files are not run: where only one could
    tell, the answer is None.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = within(folder, folder / "adapter_config.json", CheckpointError)
        try:
            super().__init__(path)
            data = read_json(path)
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{path} holds broken JSON ({error})") from error
        self.check()
        self.data: dict[str, Any] = data if isinstance(data, dict) else {}
        self._targets = _Listed(self.data.get("target_modules"))
        self._excluded = _Listed(self.data.get("exclude_modules"))
        self._saved = {name: NAMES.fullmatch(name) is not None for name in _strings(self.data.get("modules_to_save"))}
        self._parameters = {name.rpartition(".")[0] for name in _strings(self.data.get("target_parameters"))}
        chosen = self.data.get("layers_to_transform")
        numbers = chosen if isinstance(chosen, list) else [] if chosen is None else [chosen]
        self._layers = frozenset(number for number in numbers if isinstance(number, int | float))
        self._any_layer = chosen is None or chosen == []
        self._patterns = _strings(self.data.get("layers_pattern"))

    def base(self) -> str:
        """Return the name of the adapter's base model, empty where none is named.

        Raises `CheckpointError` for a base that is an adapter itself: bases of bases may go in a circle.
        """
        base = self.data.get("base_model_name_or_path")
        if not base or not isinstance(base, str):
            return ""
        if there((Path(base) / "adapter_config.json").is_file) and not there((Path(base) / "config.json").is_file):
            raise CheckpointError(
                f"{self.folder} is a PEFT adapter of {base}, which is an adapter itself: merge that one first (peft's "
                "merge_and_unload), and name the merged model as the base"
            )
        return base

    def adapts(self, module: str) -> bool | None:
        """Whether PEFT adapts a module; None where an expression would have to be run to know."""
        answers = (self._is_target(module), _denied(self._excluded.holds(module)), _denied(self.saves(module)))
        return False if False in answers else None if None in answers else True

    def has_parameters(self, module: str) -> bool:
        """Whether ``target_parameters`` may name a parameter of a module."""
        while module.endswith(".base_layer"):
            module = module.removesuffix(".base_layer")
        return not self._parameters.isdisjoint(("", *_ends(module)))

    def is_feedforward(self, module: str) -> bool | None:
        """Whether IA3 scales a module's inputs; None where nothing or an expression tells."""
        names = self.data.get("feedforward_modules")
        return module.endswith(tuple(map(str, names))) if isinstance(names, list) else None

    def saves(self, module: str) -> bool | None:
        """Whether a module is one of ``modules_to_save``, or in one."""
        runs = (run for end in _ends(module) for run in _beginnings(end)) if self._saved else ()
        return True if any(map(self._saved.get, runs)) else False if all(self._saved.values()) else None

    def _is_target(self, module: str) -> bool | None:
        named = self._targets.holds(module)
        if not named or self._any_layer or module in self._targets.names:  # PEFT holds a whole name against no layers
            return named
        number = self._layer_of(module)
        return number if number is None else number in self._layers

    def _layer_of(self, module: str) -> int | None:
        """Return the number of a module's layer, -1 where it is in none, None where an expression tells."""
        if not self._patterns:
            found = _LAYER.match(module)
            return int(found[1]) if found else -1
        if not all(map(NAMES.fullmatch, self._patterns)):
            return None
        order = {name.replace("\\", ""): place for place, name in reversed([*enumerate(self._patterns)])}
        numbers = [
            (order[end], place, int(found[1]))
            for place, found in enumerate(re.finditer(r"\.(\d+)(?=\.)", module))
            for end in _ends(module[: found.start()])
            if end in order
        ]
        return min(numbers)[2] if numbers else -1


class _Listed:
    """Modules that a configuration lists: by names, each whole or the end of a name at a dot, or by an expression."""

    def __init__(self, stated: Any) -> None:
        plain = isinstance(stated, str) and stated.lower() != _EVERY_LINEAR and NAMES.fullmatch(stated)
        self.whole = plain[1].lstrip("^").replace("\\", "") if plain else None
        self.expression = bool(stated) and isinstance(stated, str) and not plain
        self.names = frozenset(map(str, stated)) if isinstance(stated, list) else frozenset()

    def holds(self, module: str) -> bool | None:
        """Whether a module is listed, None where only the expression tells."""
        if self.expression:
            return None
        return module == self.whole or not self.names.isdisjoint(_ends(module))


def _denied(answer: bool | None) -> bool | None:
    return answer if answer is None else not answer


def _ends(name: str) -> Iterator[str]:
    """Yield a module's name and what stands behind each of its dots."""
    yield name
    yield from (name[dot.end() :] for dot in re.finditer(r"\.", name))


def _beginnings(name: str) -> Iterator[str]:
    """Yield a module's name and what stands in front of each of its dots."""
    yield name
    yield from (name[: dot.start()] for dot in re.finditer(r"\.", name))


def _strings(stated: Any) -> list[str]:
    found = stated if isinstance(stated, list) else [stated]
    return [name for name in found if name and isinstance(name, str)]
