"""A folder of PEFT: an adapter's tensors and its configuration, put beside those of its base."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attnlens.checkpoints.applied import as_applied
from attnlens.checkpoints.base import Checkpoint
from attnlens.checkpoints.low_rank import FRONT
from attnlens.checkpoints.open import open_stored
from attnlens.errors import CheckpointError
from attnlens.strict_json import read_json, there, within

_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_BASE_KEPT = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of ``init_lora_weights`` with which PEFT leaves the base model as it is."""
_MERGED = ("LORA", "IA3")
"""Methods of PEFT whose formula is known here."""
_VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
"""Options with which a LoRA of PEFT is no W + scale B A of the base's layers for every token."""


def base_of(folder: Path) -> str:
    """Return the name of an adapter's base model, empty where its configuration names none.

    Raises `CheckpointError` for a base that is an adapter itself: bases of bases may go in a circle.
    """
    base = _config(folder).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        return ""
    if there((Path(base) / "adapter_config.json").is_file) and not there((Path(base) / "config.json").is_file):
        raise CheckpointError(
            f"{folder} is a PEFT adapter of {base}, which is an adapter itself: merge that one first (peft's "
            "merge_and_unload), and name the merged model as the base"
        )
    return base


def _config(folder: Path) -> dict[str, Any]:
    path = within(folder, folder / "adapter_config.json", CheckpointError)
    try:
        data = read_json(path)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} holds broken JSON ({error})") from error
    return data if isinstance(data, dict) else {}


def with_adapter(base: Checkpoint, folder: Path) -> Checkpoint:
    """Return the weights of ``base`` with the adapter of a folder merged into them. Raises `CheckpointError`."""
    found = next((folder / name for name in _FILES if there((folder / name).is_file)), None)
    if found is None:
        raise CheckpointError(f"{folder} holds no {' or '.join(_FILES)}: give the whole folder of the adapter")
    config = _config(folder)
    method = config.get("peft_type") or "LORA"
    variant = next((name for name in _VARIANTS if config.get(name)), None)
    if method not in _MERGED or variant:
        raise CheckpointError(
            f"{folder} is a PEFT adapter of {f'LoRA with {variant}' if variant else method}, which is not merged here: "
            "merge it where that is possible (peft's merge_and_unload), save the result with save_pretrained, and give "
            "that folder"
        )
    adapter = open_stored(within(folder, found, CheckpointError))
    both = _Beside(base, adapter)
    strangers = [name for name, home in both.homes.items() if not home]
    if strangers:
        raise CheckpointError(
            f"{found} adapts {strangers[0]}, which its base does not have by that name: merge it (peft's "
            "merge_and_unload), save the result with save_pretrained, and give that folder"
        )
    drawn = config.get("init_lora_weights")
    if (drawn.lower() if isinstance(drawn, str) else drawn) not in _BASE_KEPT:
        raise CheckpointError(
            f"{folder} was trained with init_lora_weights {drawn!r}, which changes the base model: merge it (peft's "
            "merge_and_unload) and give the merged model, or save it as plain LoRA (save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
    return as_applied(both, lambda: {"adapter": config})


class _Beside(Checkpoint):
    """The tensors of a base and of its adapter, under the base's names."""

    def __init__(self, base: Checkpoint, adapter: Checkpoint) -> None:
        self.base, self.adapter, self.behind = base, adapter, (base, adapter)
        self.metadata, self.title = base.metadata, base.title
        modules = {name.rpartition(".")[0] for name in base}
        self.own = {name.removeprefix(FRONT): name for name in adapter}
        self.homes = {name: any(_prefixes(name, modules)) for name in self.own}

    def provenance(self) -> dict[str, Any]:
        """Return the base's provenance and the adapter's."""
        return {**self.base.provenance(), "adapter": self.adapter.provenance()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self.adapter.shape(self.own[name]) if name in self.own else self.base.shape(name)

    def __getitem__(self, name: str) -> Any:
        """Return a tensor."""
        return self.adapter[self.own[name]] if name in self.own else self.base[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of both."""
        return iter(dict.fromkeys((*self.base, *self.own)))

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len({*self.base, *self.own})


def _prefixes(name: str, modules: set[str]) -> Iterator[str]:
    """Yield the modules of the base that a name stands below."""
    while "." in name:
        name = name.rpartition(".")[0]
        if name in modules:
            yield name
