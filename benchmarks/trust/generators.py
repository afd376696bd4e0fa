"""What writes cases for each reader: mutations of valid files, and files built whole around what is hostile."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from benchmarks.trust import built, built_data, built_state, seeds
from benchmarks.trust.guard import Case, Link
from benchmarks.trust.mutations import Mutator
from benchmarks.trust.payloads import NAMES

SHARES = {
    "safetensors": 5,
    "pth": 6,
    "legacy pickle": 4,
    "npz": 4,
    "packed": 4,
    "timm folder": 2,
    "transformers folder": 4,
    "shard index": 4,
    "params.json": 5,
    "results folder": 6,
    "scan folder": 4,
    "image folder": 3,
    "image tar": 4,
    "decoded cache": 2,
    "text folder": 1,
}
"""Of each format among the inputs: those that are read quickly are tried more often."""
BUILT = 0.5
"""Share of the inputs that are built; the others are mutations."""


def _shapes(rng: random.Random) -> built.Shapes:
    return built.spoiled(rng, built.family(rng)[1] if rng.random() < 0.4 else built.plain(rng))


def _safetensors(rng: random.Random) -> dict[str, bytes]:
    metadata = rng.choice(
        (
            None,
            None,
            {"format": "pt"},
            {name or "x": name for name in NAMES},
            {"architecture": "vit_tiny_patch16_224", "model_args": json.dumps(seeds.MODEL_ARGS)},
        )
    )
    return {"m.safetensors": built.safetensors(rng, _shapes(rng), metadata)}


def _named(made: tuple[str, bytes]) -> dict[str, bytes]:
    return dict([made])


_BUILDERS: dict[str, Callable[[random.Random], dict[str, bytes]]] = {
    "safetensors": _safetensors,
    "pth": lambda rng: {"m.pth": built.pth(rng, _shapes(rng))},
    "legacy pickle": lambda rng: {"m.pth": built.pth(rng, _shapes(rng), legacy=True)},
    "npz": lambda rng: {"m.npz": built.npz(rng, _shapes(rng))},
    "packed": lambda rng: _named(built.packed(rng, _shapes(rng))),
    "timm folder": built_data.configured,
    "transformers folder": built_data.transformers,
    "shard index": built_data.shards,
    "params.json": built_state.params,
    "results folder": built_state.results,
    "scan folder": built_state.scan,
    "image folder": built_data.pictures,
    "image tar": lambda rng: _named(built_data.tar(rng)),
    "decoded cache": lambda rng: {"cache.npz": built_state.decoded(rng)},
    "text folder": built_data.texts,
}
_FILES = ("safetensors", "pth", "legacy pickle", "npz", "packed", "params.json", "image tar", "decoded cache")
"""Formats whose reader is given a file; the others' is given the folder."""


class Generator:
    """Draws cases from a seed: the same seed, and the same sources, give the same cases."""

    def __init__(self, seed: int, valid: list[Case], values: list[object]) -> None:
        self.mutator = Mutator(seed, values)
        self.random = self.mutator.random
        self._valid = {name: [case for case in valid if case.format == name] for name in SHARES}

    def draw(self, inputs: int) -> list[Case]:
        """Return so many cases."""
        names = self.random.choices(list(SHARES), list(SHARES.values()), k=inputs)
        return [self._built(name) if self.random.random() < BUILT else self._mutated(name) for name in names]

    def _mutated(self, name: str) -> Case:
        return self.mutator.mutate(self.random.choice(self._valid[name]))

    def _built(self, name: str) -> Case:
        state = self.random.getrandbits(64)
        files: dict[str, bytes | Link] = dict(_BUILDERS[name](random.Random(state)))
        return Case(name, f"{state:x}", files, next(iter(files)) if name in _FILES else "", made="built")
