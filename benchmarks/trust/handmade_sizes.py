"""Cases written by hand: headers of tar members, names of tensors, sizes of nothing, numbers in configurations.

Each took more than the time or the memory that are promised.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.trust import seeds
from benchmarks.trust.guard import Case

_KEYS = b"".join(b"%d key%05d=v\n" % (len(b"00 key00000=v\n"), number) for number in range(5000))
HEADERS: dict[str, bytes] = {
    "digits": b"1" * 300_000,
    "records inside of each other": b"2 " * 50_000 + b"=",
    "many keys": _KEYS,
    "nothing": b"",
}


def sized() -> Iterator[Case]:
    """Yield every case."""
    yield from _in_front()
    yield from _named()
    yield from _shown()
    yield from _empty()
    yield from _many_names()
    yield from _numbers()
    yield from _adapted()
    yield from _types()
    yield from _spread()
    yield from _resampled()


def _block(kind: bytes, content: bytes) -> bytes:
    info = tarfile.TarInfo("h")
    info.type, info.size = kind, len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)


def _in_front() -> Iterator[Case]:
    weights = seeds.safetensors(seeds.transformers_state())
    packed, images = seeds.tar({"model.safetensors": weights}), seeds.tar(seeds.images())
    kinds = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)
    for kind in (*kinds, tarfile.GNUTYPE_LONGLINK):
        for what, content in HEADERS.items():
            for times in (1, 2000) if len(content) < 1000 else (1, 3):
                front = _block(kind, content) * times
                name = f"{times} headers {kind.decode()}, {what}"
                yield Case("packed", name, {"m.tar": front + packed}, "m.tar")
                yield Case("packed", f"{name}, compressed", {"m.tar.gz": gzip.compress(front + packed)}, "m.tar.gz")
                yield Case("image tar", name, {"data.tar": front + images}, "data.tar")


def _named() -> Iterator[Case]:
    names = {
        "chunks": "blocks.1.1." * 27_272 + "\n\nx",
        "parametrizations": ".parametrizations.a" * 31_578 + ".\n\nx",
        "low rank": "a." * 100_000 + "lora_A\n",
        "numbers": ".1" * 100_000,
    }
    value = torch.ones(2, 2)
    for what, name in names.items():
        yield Case(
            "safetensors", f"long name, {what}", {"m.safetensors": seeds.safetensors({name: value})}, "m.safetensors"
        )
        state = {**seeds.timm_state(), name: value}
        files = {"config.json": json.dumps(seeds.TIMM).encode(), "model.safetensors": seeds.safetensors(state)}
        yield Case("timm folder", f"long name, {what}", files)


def _shown() -> Iterator[Case]:
    config = {"architecture": "tiny_vit_5m_224", "num_classes": 0, "model_args": {"window_sizes": [200] * 4}}
    for stages in (2, 4):
        state = {f"stages.{stage}.blocks.0.x": torch.ones(1) for stage in range(stages)}
        files = {"config.json": json.dumps(config).encode(), "model.safetensors": seeds.safetensors(state)}
        yield Case("timm folder", f"windows of 200 in {stages} stages", files)


def _empty() -> Iterator[Case]:
    """Tensors without entries whose other axes no byte of the file bounds."""
    for long in (40_000_000, 1 << 40):
        nothing = torch.empty((long, 0), device="meta").shape
        fused = {f"blocks.{layer}.attn.qkv.weight": nothing for layer in range(2)}
        apart = {f"encoder.0.{role}_proj.weight": nothing[::-1] for role in "qkvo"}
        for what, shapes in (("packed", fused), ("apart", apart)):
            header = {
                name: {"dtype": "F32", "shape": [*shape], "data_offsets": [0, 0]} for name, shape in shapes.items()
            }
            text = json.dumps(header).encode()
            content = len(text).to_bytes(8, "little") + text
            yield Case("safetensors", f"{what} of {long} x 0", {"m.safetensors": content}, "m.safetensors")
            if long < 1 << 32:
                state = {name: torch.empty(*shape) for name, shape in shapes.items()}
                yield Case("pth", f"{what} of {long} x 0", {"m.pth": seeds.pth(state)}, "m.pth")
                yield Case("npz", f"{what} of {long} x 0", {"m.npz": seeds.npz(state)}, "m.npz")


def _many_names() -> Iterator[Case]:
    """A thousand names of a thousand characters, of what projections are called."""
    for part in ("qkv", "c_attn", "query", "in_proj", "to_q", "lora_A", "a.0."):
        names = [f"{part * (990 // len(part))}-{number}"[-1000:] for number in range(1000)]
        state = dict.fromkeys(names, torch.ones(1))
        own = {name: value.clone() for name, value in state.items()}
        yield Case("safetensors", f"long names of {part}", {"m.safetensors": seeds.safetensors(own)}, "m.safetensors")


def _folder(config: object, state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {"config.json": json.dumps(config).encode(), "model.safetensors": seeds.safetensors(state)}


def _numbers() -> Iterator[Case]:
    """Head counts and widths that are none, or beyond all arrays."""
    values = (10**4200, -(10**4200), 1 << 40, 0, -1, 5.0, 1e300, True, "8", [], [2, []], {}, None)
    roles = {role: torch.ones(8, 8) for role in ("to_q", "to_k", "to_v", "to_out.0")}
    unet = {f"mid_block.attentions.0.transformer_blocks.0.attn1.{role}.weight": x for role, x in roles.items()}
    for value in values:
        for field in ("attention_head_dim", "num_attention_heads", "block_out_channels"):
            config = {"_class_name": "UNet2DConditionModel", "block_out_channels": [8], field: value}
            yield Case("transformers folder", f"diffusers, {field} {str(value)[:9]}", _folder(config, unet))
        for field in ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "head_dim"):
            own = {**seeds.GEMMA, field: value}
            yield Case("transformers folder", f"{field} {str(value)[:9]}", _folder(own, seeds.gemma_state()))
    for role in roles:
        for shape in ((8,), (0, 8), (8, 0), (8, 8, 2), ()):
            odd = {name: torch.ones(shape) if f".{role}." in name else value for name, value in unet.items()}
            config = {"_class_name": "UNet2DConditionModel", "block_out_channels": [8]}
            yield Case("transformers folder", f"diffusers, {role} of {shape}", _folder(config, odd))
    place = {name.replace(".0.", ".\u00b2.", 1): value for name, value in unet.items()}
    yield Case("transformers folder", "diffusers, a raised number", _folder({"_class_name": "UNet2DModel"}, place))


def _adapted() -> Iterator[Case]:
    """Adapters beside their base, and what their configuration states."""
    low = "model.layers.0.self_attn.q_proj.lora_"
    state = {**seeds.gemma_state(), f"{low}A.weight": torch.ones(2, 8), f"{low}B.weight": torch.ones(8, 2)}
    many = {f"layers.{number}.q_proj": 2 for number in range(20_000)}
    patterns = (many, {"(a+)+$": 2}, {"^q_proj": 2}, {"": 1}, {"q_proj": 10**4000}, {"q_proj": [2]}, [], "q_proj")
    for pattern in patterns:
        adapter = {"lora_alpha": 4, "r": 2, "alpha_pattern": pattern}
        files = {**_folder(seeds.GEMMA, state), "adapter_config.json": json.dumps(adapter).encode()}
        yield Case("transformers folder", f"adapter, alpha_pattern {str(pattern)[:20]}", files)
    for shapes in (((0, 8), (8, 0)), ((2, 0), (0, 2)), ((2, 8, 1), (8, 2)), ((), ())):
        odd = {**state, f"{low}A.weight": torch.ones(shapes[0]), f"{low}B.weight": torch.ones(shapes[1])}
        files = {**_folder(seeds.GEMMA, odd), "adapter_config.json": b'{"lora_alpha": 4}'}
        yield Case("transformers folder", f"adapter of {shapes}", files)


def _types() -> Iterator[Case]:
    """Numbers that torch does not hold, in a file that timm converts."""
    state = {f"visual.trunk.{name}": value.numpy() for name, value in seeds.timm_state().items()}
    for kind in (">f4", ">f2", "longdouble", "U8", "S8", "M8[s]", ">c8", "?", ">u8"):
        buffer = io.BytesIO()
        with np.errstate(all="ignore"):
            np.savez(buffer, **{name: value.astype(kind) for name, value in state.items()})
        files = {"config.json": json.dumps(seeds.TIMM).encode(), "model.npz": buffer.getvalue()}
        yield Case("timm folder", f"numbers of type {kind}", files)
        yield Case("npz", f"numbers of type {kind}", {"m.npz": buffer.getvalue()}, "m.npz")


def _spread() -> Iterator[Case]:
    """Parts of a weight whose shapes broadcast to their product, 400 million numbers and more."""
    long = 20_000
    old = "blocks.0.attn.qkv.weight_{}"
    new = "blocks.0.attn.qkv.parametrizations.weight.{}"
    scaled, bias = "blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias"
    kinds: dict[str, dict[str, tuple[int, ...]]] = {
        "a mask": {old.format("orig"): (3 * long, 1), old.format("mask"): (1, 3 * long)},
        "a mask of the bias": {f"{bias}_orig": (long, 1), f"{bias}_mask": (1, long)},
        "lengths": {old.format("g"): (3 * long,), old.format("v"): (3 * long, 1)},
        "lengths, new": {new.format("original0"): (3 * long,), new.format("original1"): (3 * long, 1)},
        "v": {old.format("orig"): (3 * long, 1), old.format("u"): (3 * long,), old.format("v"): (1, 3 * long)},
        "a zero point": {scaled: (192, 64), f"{scaled}_scale": (1,), f"{scaled}_zero_point": (4, long)},
        "an IA3 vector": {scaled: (3 * long, 1), bias: (3 * long, 1), "blocks.0.attn.qkv.ia3_l": (3 * long, 1)},
    }
    for what, shapes in kinds.items():
        state = {"blocks.0.attn.proj.weight": torch.ones(1, long)}
        if not {scaled, old.format("orig"), old.format("g"), new.format("original0")} & {*shapes}:
            state[scaled] = torch.ones(3 * long, 1)
        state |= {name: torch.ones(shape) for name, shape in shapes.items()}
        if "zero" in what:
            state[scaled] = state[scaled].to(torch.int8)
        yield Case("safetensors", f"{what} that spreads", {"m.safetensors": seeds.safetensors(state)}, "m.safetensors")


def _resampled() -> Iterator[Case]:
    """Files that timm's conversions resample to, or by, tensors of gigabytes."""
    kinds: tuple[tuple[str, tuple[int, ...], dict[str, int]], ...] = (
        ("patch_embed.proj.weight", (1, 1, 96, 96), {}),
        ("patch_embed.proj.weight", (1, 1, 160, 160), {}),
        ("pos_embed", (1, 2, 250_000), {"img_size": 1024}),
        ("visual.trunk.pos_embed", (1, 2, 250_000), {"img_size": 1024}),
    )
    for name, shape, arguments in kinds:
        state = {name: torch.ones(shape), "blocks.0.attn.qkv.weight": torch.ones(4, 4)}
        config = {"architecture": "vit_tiny_patch16_224", "model_args": arguments}
        yield Case("timm folder", f"{name} of {shape} resampled", _folder(config, state))
