"""Networks of diffusers: every attention module is named alike (``to_q``, ``to_k``, ``to_v``, ``to_out.0``).

A folder's ``config.json`` names the class. Where the head count is depends on the class; which norm feeds a layer is
told by the names around it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from attnlens.checkpoints import Checkpoint
from attnlens.errors import CheckpointError, ModelNotFoundError
from attnlens.layouts.spec import AttentionSpec, NormSpec, Refusal, Slot
from attnlens.models.architecture import Architecture
from attnlens.models.transformers.stack import Config

_NAMES = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def _of_blocks(config: Config, path: str, _width: int) -> Any:
    """Return the heads of a conditioned UNet's block: one number, or one for each block on the way down.

    The field ``attention_head_dim`` holds head counts where ``num_attention_heads`` is not given.
    """
    stated = (config.get("num_attention_heads"), config.get("attention_head_dim"), 8)
    counts = next(value for value in stated if value is not None)
    if not isinstance(counts, list | tuple):
        return counts
    side, _, place = path.partition("_")
    number = re.match(r"blocks\.(\d+)", place)
    index = int(number[1]) if number else 0
    return counts[index if side == "down" else -1 - index] if index < len(counts) else None


def _by_width(config: Config, _path: str, width: int) -> Any:
    size = config.get("attention_head_dim", 8)
    if size is None:
        return 1
    return width // size if type(size) is int and size > 0 else size


def _stated(config: Config, _path: str, _width: int) -> Any:
    return config.get("num_attention_heads")


CLASSES: dict[str, Callable[[Config, str, int], Any]] = {
    "UNet2DConditionModel": _of_blocks,
    "UNet2DModel": _by_width,
    "AutoencoderKL": lambda _config, _path, _width: 1,
    "DiTTransformer2DModel": _stated,
    "PixArtTransformer2DModel": _stated,
    "Transformer2DModel": _stated,
}
"""Class -> the number of heads of the attention at a path, whose queries have a width."""


def describe_diffusers(config: Config, class_name: str, stored: Checkpoint, where: str) -> Architecture:
    """Describe a network of diffusers by its configuration and the names of its tensors.

    Raises `ModelNotFoundError` for a class that is not known or a head count that is no number, `CheckpointError`
    where no attention is stored, or a weight is no matrix.
    """
    heads_of = CLASSES.get(class_name)
    if heads_of is None:
        raise ModelNotFoundError(
            f"{where} is of diffusers' class {class_name!r}, which is not known: give the weight file and --num-heads, "
            f"to read it by its tensors' names. Known are {', '.join(sorted(CLASSES))}"
        )
    paths = sorted((name.removesuffix(".to_q.weight") for name in stored if name.endswith(".to_q.weight")), key=_place)
    only = config.get("only_cross_attention")  # one for all blocks, or one a block
    crossed = any(only) if isinstance(only, list | tuple) else bool(only)
    found = [_describe(path, config, class_name, stored, where, crossed) for path in paths]
    if not found:
        raise CheckpointError(f"the weights are not of a {class_name}, which {where} names: no to_q.weight is stored")
    specs = tuple(one for one in found if isinstance(one, AttentionSpec))
    refused = tuple(one for one in found if isinstance(one, Refusal))
    shapes = {name: list(stored.shape(name)) for spec in specs for name in spec.tensors()}
    return Architecture(class_name, specs, refused, tuple(paths), shapes, {})


def _place(path: str) -> list[tuple[int, str]]:
    """Order paths as the modules stand: numbers by value, an encoder in front of its decoder."""
    parts = path.replace("encoder.", " encoder.").split(".")
    return [(int(part), "") if part.isascii() and part.isdigit() else (-1, part) for part in parts]


def _describe(
    path: str, config: Config, class_name: str, stored: Checkpoint, where: str, crossed: bool
) -> AttentionSpec | Refusal:
    module = f"diffusers.{class_name}"
    missing = [name for name in _NAMES.values() if f"{path}.{name}.weight" not in stored]
    if missing:
        return Refusal(path, module, "diffusers", f"has no {missing[0]}: its layout is not known")
    if crossed or f"{path}.add_k_proj.weight" in stored:
        return Refusal(path, module, "diffusers", "attends to two streams at once, which no layout here describes")
    shapes = {role: _matrix(f"{path}.{name}.weight", stored) for role, name in _NAMES.items()}
    rows, width = shapes["q"]
    heads = CLASSES[class_name](config, path, rows)
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1 or rows % heads:
        raise ModelNotFoundError(f"{where} gives {heads!r} as the heads of {path}, which is {rows} wide: fix the file")
    slots = {role: _slot(f"{path}.{name}", role, heads, rows // heads, stored) for role, name in _NAMES.items()}
    block, _, leaf = path.rpartition(".")
    second = leaf == "attn2" and bool(config.get("cross_attention_dim"))
    cross = second or shapes["k"][1] != width
    flags = [*(["cross"] if cross else [])]
    norms = _norms(path, f"{block}.norm{leaf[-1:]}.weight", "q" if cross else "qkv", stored)
    if not norms and leaf == "attn1" and any(name in stored for name in _modulations(block)):
        flags.append("modulated")
    if slots["q"].bias or slots["k"].bias:
        flags.append("qk_bias")
    return AttentionSpec(
        path=path,
        module_class=module,
        family="diffusers",
        q=slots["q"],
        k=slots["k"],
        v=slots["v"],
        o=slots["o"],
        scale=(rows // heads) ** -0.5,
        norms=norms,
        leaves_out=tuple(flags),
    )


def _matrix(name: str, stored: Checkpoint) -> tuple[int, int]:
    """Return a weight's shape as a matrix: 1x1 kernels are dropped. Raises `CheckpointError` for any other."""
    shape = stored.shape(name)
    if len(shape) < 2 or 0 in shape or any(size != 1 for size in shape[2:]):
        raise CheckpointError(
            f"{name} has shape {list(shape)}; a matrix with entries is needed: download the file again"
        )
    return shape[0], shape[1]


def _norms(path: str, beside: str, roles: str, stored: Checkpoint) -> tuple[NormSpec, ...]:
    """Describe the GroupNorm inside a module, or the LayerNorm of its number in its block."""
    if f"{path}.group_norm.weight" in stored:
        return (NormSpec(kind="group", roles=roles, weight=f"{path}.group_norm.weight"),)
    return (NormSpec(kind="layer", roles=roles, weight=beside),) if beside in stored else ()


def _modulations(block: str) -> tuple[str, ...]:
    return f"{block}.scale_shift_table", f"{block}.norm1.linear.weight"


def _slot(name: str, role: str, heads: int, width: int, stored: Checkpoint) -> Slot:
    bias = f"{name}.bias" if f"{name}.bias" in stored else None
    return Slot(tensor=f"{name}.weight", heads=heads, width=width, head_stride=width, axis=int(role == "o"), bias=bias)
