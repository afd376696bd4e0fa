"""A folder of PEFT: an adapter's tensors and its configuration, put beside those of its base."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from attnlens.checkpoints.adapter_config import AdapterConfig
from attnlens.checkpoints.applied import as_applied
from attnlens.checkpoints.base import Checkpoint
from attnlens.checkpoints.low_rank import FRONT
from attnlens.checkpoints.open import open_stored
from attnlens.errors import CheckpointError
from attnlens.strict_json import there, within

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

_PART = re.compile(r"(?P<module>.+?)\.(?P<part>(?:lora|ia3)_\w+|alpha|scaling)(?P<rest>(?:\.\w+)*)")
"""A tensor of an adapter: its module, what it is, and what PEFT puts behind that."""
_MATRIX = (".weight", ".default.weight")
_RESTS: dict[str, dict[str, tuple[str, ...]]] = {
    "LORA": {
        "lora_A": _MATRIX,
        "lora_B": (*_MATRIX, ".bias", ".default.bias"),
        "lora_embedding_A": ("", ".default"),
        "lora_embedding_B": ("", ".default"),
        "lora_magnitude_vector": ("", ".weight", ".default.weight"),
    },
    "IA3": {"ia3_l": ("", ".default")},
}
"""By method the tensors that PEFT reads; ``default`` is the name it gives the adapter."""
_WRAPPED = re.compile(r"\.base_layer\.(weight|bias)$")
"""What PEFT puts in front of the tensors that an adapted module had before."""
_AGREE = ": take it out or mend the configuration if that is meant, or merge it by what trained it and give that model"


def with_adapter(base: Checkpoint, stated: AdapterConfig, *, inputs_first: bool | None = None) -> Checkpoint:
    """Return the weights of ``base`` with the adapter of a folder merged into them. Raises `CheckpointError`.

    ``inputs_first`` says whether the base's projections are stored ``[in, out]``, which outranks ``fan_in_fan_out`` as
    the layers' classes do in PEFT; None where it is not known.
    """
    folder, config = stated.folder, stated.data
    found = next((folder / name for name in _FILES if there((folder / name).is_file)), None)
    if found is None:
        raise CheckpointError(f"{folder} holds no {' or '.join(_FILES)}: give the whole folder of the adapter")
    method = config.get("peft_type") or "LORA"
    variant = next((name for name in _VARIANTS if config.get(name)), None)
    if method not in _MERGED or variant:
        raise CheckpointError(
            f"{folder} is a PEFT adapter of {f'LoRA with {variant}' if variant else method}, which is not merged here: "
            "merge it where that is possible (peft's merge_and_unload), save the result with save_pretrained, and give "
            "that folder"
        )
    both = _Beside(base, open_stored(within(folder, found, CheckpointError)), stated)
    strangers = [name for name, home in both.homes.items() if not home]
    if strangers:
        raise CheckpointError(
            f"{found} adapts {strangers[0]}, which its base does not have by that name: merge it (peft's "
            "merge_and_unload), save the result with save_pretrained, and give that folder"
        )
    ignored = next(_ignored(both, stated, method), None)
    if ignored is not None:
        raise CheckpointError(f"{found} does not agree with its adapter_config.json: {ignored}{_AGREE}")
    drawn = config.get("init_lora_weights")
    if (drawn.lower() if isinstance(drawn, str) else drawn) not in _BASE_KEPT:
        raise CheckpointError(
            f"{folder} was trained with init_lora_weights {drawn!r}, which changes the base model: merge it (peft's "
            "merge_and_unload) and give the merged model, or save it as plain LoRA (save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
    turned = {} if inputs_first is None else {"fan_in_fan_out": inputs_first}
    return as_applied(both, lambda: {"adapter": {**config, **turned}})


def _ignored(both: _Beside, stated: AdapterConfig, method: str) -> Iterator[str]:
    """Say of the adapter's tensors which PEFT would not read, and which it would miss."""
    found = {name: None if name in both.base else _PART.fullmatch(name) for name in both.own}
    adapted = {part["module"]: name for name, part in found.items() if part}
    magnitudes = {part["module"] for part in found.values() if part and part["part"] == "lora_magnitude_vector"}
    for name, stored in both.own.items():
        part = found[name]
        module = part["module"] if part else name.rpartition(".")[0]
        if not stored.startswith(FRONT):
            yield f"PEFT does not read {stored}, whose name does not begin with {FRONT}"
        elif part and part["rest"] not in _RESTS[method].get(part["part"], ()):
            yield f"PEFT reads no {name} for {method}"
        elif part and not stated.has_parameters(module) and stated.adapts(module) is False:
            yield f"PEFT does not read {name}, as target_modules, exclude_modules or layers_to_transform leave it out"
        elif not part and module in adapted:
            if stored.removeprefix(FRONT) == name or name not in both.base:
                yield f"PEFT does not read {name} beside {adapted[module]}"
        elif not part and (stored.removeprefix(FRONT) != name or (stated.adapts(module) and name in both.base)):
            yield f"PEFT does not read {stored} without an adapter beside it"
        elif not part and name not in both.base and f"{module}.weight" in both.base:
            yield f"PEFT does not read {name}, which the base does not have"
        elif (
            part
            and part["part"] == "ia3_l"
            and stated.is_feedforward(module) not in (None, both.shape(name)[:1] == (1,))
        ):
            yield f"{name} has shape {both.shape(name)}, which feedforward_modules contradicts"
    for name in both.base:
        if name.endswith(".weight") and name not in both.own and stated.saves(name.removesuffix(".weight")):
            yield f"modules_to_save names the module of {name}, which is not in the file"
    if method == "LORA" and stated.data.get("use_dora"):
        yield from (f"use_dora is set, and {name} has no magnitudes" for name in adapted if name not in magnitudes)
    elif magnitudes:
        yield f"{min(magnitudes)} has magnitudes, and use_dora is not set"


class _Beside(Checkpoint):
    """The tensors of a base and of its adapter, under the base's names."""

    def __init__(self, base: Checkpoint, adapter: Checkpoint, config: AdapterConfig) -> None:
        self.base, self.adapter, self.config, self.behind = base, adapter, config, (base, adapter)
        self.metadata, self.title = base.metadata, base.title
        modules = {name.rpartition(".")[0] for name in base}
        self.own = {_WRAPPED.sub(r".\1", name.removeprefix(FRONT)): name for name in adapter}
        self.homes = {name: any(_prefixes(name, modules)) for name in self.own}

    def provenance(self) -> dict[str, Any]:
        """Return the base's provenance, the adapter's and that of its configuration."""
        beside = {"adapter": self.adapter.provenance(), "adapter_config": self.config.provenance()}
        return {**self.base.provenance(), **beside}

    def check(self) -> None:
        """Raise `CheckpointError` where a file of either, or the configuration, is not what was opened."""
        super().check()
        self.config.check()

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
