"""Files under other names than timm's for the same network: torchvision's, and DINOv2's with its chunks of blocks."""

from __future__ import annotations

import re
from typing import Any

from attnlens.checkpoints import Checkpoint
from attnlens.checkpoints.base import View

_VIT = (
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.self_attention\.in_proj_", r".attn.qkv."),
    (r"\.self_attention\.out_proj\.", r".attn.proj."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.mlp\.(?:linear_1|0)\.", r".mlp.fc1."),
    (r"\.mlp\.(?:linear_2|3)\.", r".mlp.fc2."),
    (r"^class_token$", r"cls_token"),
    (r"^encoder\.pos_embedding$", r"pos_embed"),
    (r"^encoder\.ln\.", r"norm."),
    (r"^conv_proj\.", r"patch_embed.proj."),
    (r"^heads\.head\.", r"head."),
)
_SWIN = (
    (r"\.mlp\.0\.", r".mlp.fc1."),
    (r"\.mlp\.3\.", r".mlp.fc2."),
    (r"^features\.0\.0\.", r"patch_embed.proj."),
    (r"^features\.0\.2\.", r"patch_embed.norm."),
    (r"^head\.", r"head.fc."),
)
_SIGNS = ("encoder.layers.encoder_layer_0.self_attention.in_proj_weight", "features.1.0.attn.qkv.weight")


class RenamedWeights(View):
    """The tensors of a checkpoint, or blocks of their rows, under other names; each is read when it is asked for."""

    def __init__(self, origin: Checkpoint, names: dict[str, tuple[str, slice]], how: str) -> None:
        self._origin, self.behind = origin, (origin,)
        self._names = names
        self._how = how
        self.metadata, self.title = origin.metadata, origin.title

    def provenance(self) -> dict[str, Any]:
        """Return the origin's provenance, and how its tensors were renamed."""
        return {**self._origin.provenance(), "converted": self._how}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        old, rows = self._names[name]
        whole = self._origin.shape(old)
        return (len(range(*rows.indices(whole[0]))), *whole[1:]) if whole else whole

    def __getitem__(self, name: str) -> Any:
        """Return a tensor."""
        old, rows = self._names[name]
        stored = self._origin[old]
        return stored[rows] if stored.ndim else stored


def as_timm_names(checkpoint: Checkpoint) -> RenamedWeights | None:
    """Return the file of a torchvision ViT or Swin under timm's names; None for any other file."""
    if not any(sign in checkpoint for sign in _SIGNS):
        return None
    swin = _SIGNS[1] in checkpoint
    whole = slice(None)
    names = {_renamed(name, swin): (name, whole) for name in checkpoint}
    if swin and "layers.0.blocks.0.attn.logit_scale" in names:  # Swin v2: timm keeps no bias of k, torchvision zeros it
        for name in [name for name in names if name.endswith("attn.qkv.bias")]:
            old, _ = names.pop(name)
            third = checkpoint.shape(old)[0] // 3
            names[name.replace("qkv.bias", "q_bias")] = (old, slice(0, third))
            names[name.replace("qkv.bias", "v_bias")] = (old, slice(2 * third, 3 * third))
    return RenamedWeights(checkpoint, names, "from torchvision's names to timm's")


_CHUNKED = re.compile(r"^(?P<front>(?:.*\.)?)blocks\.(?P<chunk>\d{1,6})\.(?P<block>\d{1,6})\.(?P<rest>.*)$")


def without_chunks(checkpoint: Checkpoint) -> RenamedWeights | None:
    """Return a file of DINOv2's training, ``blocks.CHUNK.BLOCK...``, with ``blocks.BLOCK...``; None for any other.

    Blocks are counted through the chunks there, where stages begin at 0 each.
    """
    found = {name: _CHUNKED.match(name) for name in checkpoint}
    chunked = [match for match in found.values() if match]
    homes = {(match["front"], match["block"]): match["chunk"] for match in chunked}
    if not chunked or any(homes[match["front"], match["block"]] != match["chunk"] for match in chunked):
        return None
    names = {
        (f"{m['front']}blocks.{m['block']}.{m['rest']}" if m else name): (name, slice(None))
        for name, m in found.items()
    }
    return RenamedWeights(checkpoint, names, "numbers of block chunks taken off")


def _renamed(name: str, swin: bool) -> str:
    """Return timm's name for torchvision's: ``features`` hold stem, stage, merging, stage, ... in turn."""
    for pattern, new in _SWIN if swin else _VIT:
        name = re.sub(pattern, new, name)
    found = re.match(r"features\.(\d+)\.(.*)", name)
    if found is None:
        return name
    place, rest = int(found[1]), found[2]
    return f"layers.{place // 2}.blocks.{rest}" if place % 2 else f"layers.{place // 2}.downsample.{rest}"
