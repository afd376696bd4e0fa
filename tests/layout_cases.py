"""Small attention modules of every class that is read, options away from their defaults, and what is stored of them.

Sizes are as unlike as each class allows. Where a module's input is given, what is read of it is held against the
module's own forward pass before it is stored: see `tests.test_layouts_stored`.
"""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, util
from typing import Any

import numpy as np
import pytest
import timm
import torch
from packaging.version import Version
from torch import nn

from attnlens.layouts import AttentionSpec, read_heads, write_heads
from attnlens.layouts.describe import describe_attention
from tests.layout_forms import NEWEST, skipped_where_timm_is_older

Arrays = dict[str, np.ndarray]
PATH = "stages.1.attn"
"""Where each module is said to stand."""


OLDEST, FIXED = Version("1.0.24"), Version("1.0.26")
"""The oldest timm that is read, and the first whose parallel blocks do not add biases of their MLP to queries."""


@dataclass(frozen=True)
class Case:
    """A module by its class and arguments; ``inputs`` are the shapes its forward pass takes, pairs are grid sizes."""

    module_class: str
    args: tuple[Any, ...]
    options: dict[str, Any]
    inputs: tuple[tuple[int, ...], ...] = ()
    without: tuple[str, ...] = ()
    """Parts that stand between projection and product; the oracle replaces them by the identity."""
    since: Version = OLDEST
    """A version of timm known to build and use the module as it is stored."""

    @property
    def title(self) -> str:
        """Name the case: the class with its arguments."""
        given = [*map(str, self.args), *(f"{key}={_short(value)}" for key, value in self.options.items())]
        return f"{self.module_class}({', '.join(given)})"

    def arguments(self) -> list[Any]:
        """Return random inputs in float64; a shape that stands there twice is one tensor."""
        made = {id(shape): torch.randn(shape, dtype=torch.float64) for shape in self.inputs if len(shape) > 2}
        return [made.get(id(shape), shape) for shape in self.inputs]

    def build(self) -> nn.Module:
        """Return the module, its weights drawn by name; skips where this timm does not have it."""
        if Version(timm.__version__) < self.since:
            pytest.skip(f"timm {timm.__version__} builds or uses {self.title} otherwise")
        owner, _, name = self.module_class.rpartition(".")
        if util.find_spec(owner) is None or not hasattr(import_module(owner), name):
            pytest.skip(f"this timm has no {self.module_class}")
        torch.manual_seed(0)
        with skipped_where_timm_is_older():
            module = getattr(import_module(owner), name)(*self.args, **self.options)
        fill_(module)
        return module


def _short(value: Any) -> str:
    return getattr(value, "__name__", str(value))


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draw the tensor of a name: the same whatever stands beside it."""
    values = np.random.default_rng(zlib.crc32(name.encode())).uniform(0.5, 1.5, shape).astype(np.float32)
    return values if name.endswith("running_var") else np.asarray(values - 1)


@torch.no_grad()
def fill_(module: nn.Module) -> None:
    """Draw every weight, bias and statistic of a BatchNorm."""
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.from_numpy(drawn(name, tuple(value.shape))))
    nn.Module.train(module, False)


def arrays_of(module: nn.Module) -> Arrays:
    """Return a module's tensors in float32, under the names that they have in a network."""
    return {f"{PATH}.{name}": value.detach().numpy().copy() for name, value in module.state_dict().items()}


def digest(values: np.ndarray) -> list[Any]:
    """Return shape, norm and projections of an array: together they move with every entry and every swap of two."""
    flat = np.ravel(values).astype(np.float64)
    places = np.arange(1, len(flat) + 1)
    return [list(values.shape), *(float(f"{flat @ np.sin(places * pace):.9g}") for pace in (1.1, 2.3, 0.17))]


def stored_of(module: nn.Module) -> Any:
    """Return as JSON what is found, read and written of a module."""
    found = describe_attention(module, PATH)
    if not isinstance(found, AttentionSpec):
        return None if found is None else [found.path, found.module_class, found.family, found.reason]
    tensors = arrays_of(module)
    heads = read_heads(found, tensors)
    opt_in = found.opt_in_refusal()
    return plain(
        {
            "spec": found.to_json(),
            "tensors": found.tensors(),
            "on request": opt_in and opt_in.reason,
            "read": {name: digest(array) for name, array in heads.arrays().items()},
            "written": written(found, heads, tensors),
        }
    )


def written(spec: AttentionSpec, heads: Any, tensors: Arrays) -> dict[str, Any]:
    """Write half of what was read, and return a digest of every tensor that this changes."""
    halves = {name: array / 2 for name, array in heads.arrays().items() if name[:2] in ("W_", "b_")}
    after = {name: array.copy() for name, array in tensors.items()}
    write_heads(spec, heads.replace(**halves), after)
    again = read_heads(spec, after)
    for name, half in halves.items():
        np.testing.assert_allclose(getattr(again, name), half, rtol=0, atol=1e-6)
    return {name: digest(array) for name, array in after.items() if not np.array_equal(array, tensors[name])}


def plain(data: Any) -> Any:
    """Return what JSON reads back."""
    return json.loads(json.dumps(data))


def _tokens(width: int, number: int = 11) -> tuple[tuple[int, ...], ...]:
    return ((1, number, width),)


def _image(channels: int, side: int) -> tuple[tuple[int, ...], ...]:
    return ((1, channels, side, side),)


_QK = ("q_norm", "k_norm")


def _fused() -> Iterator[Case]:
    name = "timm.layers.attention.Attention"
    norm = {"norm_layer": nn.LayerNorm}
    yield Case(name, (15, 3), {}, _tokens(15))
    yield Case(name, (23, 3), {"attn_head_dim": 5, "dim_out": 29, "qkv_bias": True}, _tokens(23))
    yield Case(name, (14, 2), {"qk_norm": True, "proj_bias": False, **norm}, _tokens(14), _QK)
    yield Case(name, (14, 2), {"scale_norm": True, "gated": True, **norm}, _tokens(14), ("norm",))
    for name in ("timm.layers.attention.AttentionRope", "timm.models.eva.EvaAttention"):
        yield Case(name, (21, 3), {"scale_norm": False}, _tokens(21))
        yield Case(name, (21, 3), {"scale_norm": True, **norm}, _tokens(21), ("norm",))
        options = {"qkv_bias": False, "scale_norm": False}
        yield Case(name, (21, 3), {**options, "attn_head_dim": 5}, _tokens(21) if "Rope" in name else ())
        yield Case(name, (21, 3), {"qkv_fused": False, "scale_norm": False}, _tokens(21))
        yield Case(name, (21, 3), {**options, "qkv_fused": False, "qk_norm": True, **norm}, _tokens(21), _QK)
    grouped = {"num_heads": 6, "num_kv_heads": 2, "attn_head_dim": 5, "qkv_fused": False, "dim_out": 29}
    yield Case("timm.layers.attention.AttentionRope", (23,), grouped, _tokens(23))
    yield Case("timm.models.eva.EvaAttention", (21, 3), {"qkv_bias_separate": True, "scale_norm": False}, _tokens(21))
    beit = "timm.models.beit.Attention"
    yield Case(beit, (21, 3), {"qkv_bias": True, "window_size": (3, 5), "attn_head_dim": 5})
    yield Case(beit, (21, 3), {"qkv_bias": True, "window_size": (3, 5)}, _tokens(21, 16))
    yield Case(beit, (21, 3), {}, _tokens(21))
    for owner in (
        "cait.TalkingHeadAttn",
        "convit.MHSA",
        "volo.Attention",
        "nest.Attention",
        "twins.LocallyGroupedAttn",
    ):
        name = f"timm.models.{owner}"
        if "twins" in owner:
            yield Case(name, (21, 3), {"ws": 2}, ((1, 16, 21), (4, 4)))
            continue
        rank = {"volo.Attention": ((1, 3, 5, 21),), "nest.Attention": ((1, 2, 5, 21),)}.get(owner, _tokens(21))
        for biased in (False, True):
            yield Case(name, (21, 3), {"qkv_bias": biased}, rank)
    sam = "timm.models.vision_transformer_sam.Attention"
    for biased in (False, True):
        yield Case("timm.models.davit.WindowAttention", (21, (2, 3), 3), {"qkv_bias": biased}, ((2, 6, 21),))
        yield Case("timm.models.fastvit.Attention", (21,), {"head_dim": 7, "qkv_bias": biased}, _image(21, 3))
        options = {"head_dim": 5, "num_heads": 3, "qkv_bias": biased, "proj_bias": biased}
        yield Case("timm.models.metaformer.Attention", (15,), options, _tokens(15))
        options = {"window_size": 2, "qkv_bias": biased}
        yield Case("timm.models.swin_transformer.WindowAttention", (21, 3), options, ((2, 4, 21),))
        options = {"qkv_bias": biased}
        yield Case("timm.models.swin_transformer_v2.WindowAttention", (21, (2, 2), 3), options, ((2, 4, 21),))
        options = {"qkv_bias": biased, "qk_norm": biased}
        yield Case("timm.models.vision_transformer_relpos.RelPosAttention", (21, 3), options, _tokens(21), _QK * biased)
        options = {**options, "use_rel_pos": not biased, "input_size": (3, 4)}
        yield Case(sam, (21, 3), options, ((1, 3, 4, 21),), _QK * biased)
        options = {"use_global": False, "qkv_bias": biased}
        yield Case("timm.models.gcvit.WindowAttentionGlobal", (21, 3, (2, 2)), options, ((1, 4, 21),))
    yield Case(
        "timm.models.swin_transformer.WindowAttention", (21, 3), {"head_dim": 5, "window_size": 3}, ((2, 9, 21),)
    )
    yield Case(sam, (21, 3), {"rope": nn.Identity()})
    options = {"meta_hidden_dim": 7}
    name = "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention"
    yield Case(name, (21, 3, (2, 2)), options, ((2, 4, 21),))
    yield Case("timm.models.hieradet_sam2.MultiScaleAttention", (17, 21, 3), {}, ((1, 2, 5, 17),))
    yield Case("timm.models.hieradet_sam2.MultiScaleAttention", (17, 21, 3), {"q_pool": nn.MaxPool2d(2)})
    name, grid = "timm.models.mvitv2.MultiScaleAttention", ((1, 10, 21), (3, 3))
    pooled = tuple(f"{part}_{role}" for part in ("pool", "norm") for role in "qkv")
    yield Case(name, (21, 15, (3, 3)), {"num_heads": 3, "residual_pooling": False}, grid)
    options = {"num_heads": 3, "kernel_q": (3, 3), "kernel_kv": (3, 3), "stride_kv": (2, 2), "qkv_bias": False}
    yield Case(name, (21, 15, (3, 3)), options)
    yield Case(name, (21, 15, (3, 3)), {**options, "stride_kv": (1, 1)}, grid, pooled)
    options = {"mode": "avg", "rel_pos_type": "", "num_heads": 3, "stride_q": (2, 2), "kernel_q": (3, 3)}
    yield Case(name, (21, 15, (3, 3)), options)
    yield Case("timm.models.hiera.MaskUnitAttention", (17, 21, 3), {}, _tokens(17))
    options = {"q_stride": 2, "use_mask_unit_attn": True, "window_size": 2}
    yield Case("timm.models.hiera.MaskUnitAttention", (17, 21, 3), options)
    for first in (False, True):
        options = {"dim_head": 7, "head_first": first, "bias": not first}
        yield Case("timm.models.maxxvit.AttentionCl", (21,), options, ((1, 3, 5, 21),))
        options = {"dim_out": 29, "dim_head": 7, "head_first": first, "expand_first": False}
        yield Case("timm.models.maxxvit.Attention2d", (21,), options, _image(21, 3))
        options = {"num_heads": 3, "head_first": first, "bias": first}
        yield Case("timm.layers.attention2d.Attention2d", (21, 29), options, _image(21, 3))
    yield Case("timm.layers.attention2d.Attention2d", (22, 33), {"num_heads": 11, "expand_first": True}, _image(22, 3))


def _split() -> Iterator[Case]:
    for options in ({"num_kv_heads": 2, "use_clipped_linears": True}, {}):
        yield Case("timm.models.gemma4_vit.Gemma4Attention", (20, 4, 8), options)
    for biased in (False, True):
        options = {"head_dim": 7, "qkv_bias": biased, "sr_ratio": 1 + biased}
        yield Case("timm.models.nextvit.EfficientAttention", (21, 29), options, _tokens(21, 12))
        yield Case("timm.models.cait.ClassAttn", (21, 3), {"qkv_bias": biased}, _tokens(21))
        yield Case("timm.models.crossvit.CrossAttention", (21, 3), {"qkv_bias": biased}, _tokens(21))
        yield Case("timm.models.volo.ClassAttention", (21, 3), {"qkv_bias": biased, "head_dim": 5}, _tokens(21))
        options = {"qkv_bias": biased, "sr_ratio": 1 + biased}
        grid = ((1, 16, 21), (4, 4))
        yield Case("timm.models.pvt_v2.Attention", (21, 3), {**options, "linear_attn": biased}, grid)
        yield Case("timm.models.twins.GlobalSubSampleAttn", (21, 3), {"sr_ratio": 1 + biased}, grid)
        yield Case("timm.models.convit.GPSA", (21, 3), {"qkv_bias": biased}, _tokens(21, 9))
        yield Case("timm.models.tnt.Attention", (21, 12, 3), {"qkv_bias": biased}, _tokens(21))
    for name in ("timm.models.efficientformer.Attention", "timm.models.tiny_vit.Attention"):
        options = {"key_dim": 5, "num_heads": 3, "attn_ratio": 2, "resolution": (2, 2)}
        yield Case(name, (19,), options, _tokens(19, 4))
    for convolved in (False, True):
        options = {"num_heads": 3, "attn_ratio": 2.0, "resolution": 2, "use_conv": convolved}
        inputs = _image(17, 2) if convolved else _tokens(17, 4)
        yield Case("timm.models.levit.Attention", (17, 5), options, inputs, ("proj.act",))
        yield Case("timm.models.levit.AttentionDownsample", (17, 23, 5), options, inputs, ("proj.act",))


def _convolved() -> Iterator[Case]:
    yield Case("timm.models.visformer.Attention", (22, 2), {"head_dim_ratio": 0.5}, _image(22, 3))
    for biased in (False, True):
        options = {"num_heads": 2, "qkv_bias": biased, "dim_head": 7, "qk_ratio": 0.6, "scale_pos_embed": biased}
        options["feat_size"] = (4, 4)
        yield Case(
            "timm.layers.bottleneck_attn.BottleneckAttn", (12, 14), {**options, "stride": 1 + biased}, _image(12, 4)
        )
        options = {**options, "block_size": 2, "halo_size": 1, "avg_down": biased}
        yield Case("timm.layers.halo_attn.HaloAttn", (12, 14), {**options, "stride": 2 - biased}, _image(12, 4))
        yield Case(
            "timm.layers.halo_attn.HaloAttn", (12, 14), {**options, "stride": 2, "avg_down": not biased}, _image(12, 4)
        )
        options = {"feat_size": (4, 4), "num_heads": 2, "dim_head": 5, "qkv_bias": biased, "stride": 2 - biased}
        yield Case("timm.layers.lambda_layer.LambdaLayer", (14, 14), options, _image(14, 4))
    for options in (
        {"att_stride": 1, "head_dim_mul": 0.5},
        {"att_stride": 2, "fuse_out_proj": True},
        {"att_stride": 2, "fuse_out_proj": False},
    ):
        yield Case("timm.models.lowformer.ConvAttention", (64,), options, _image(64, 4))
        for mode in ("nearest", "transpose"):
            yield Case("timm.models.cpubone.ConvAttention", (64,), {**options, "upsample_mode": mode}, _image(64, 4))
    yield Case("timm.models.shvit.SHSA", (17, 5, 7), {}, _image(17, 3), ("proj.0",))
    name = "timm.layers.attention2d.MultiQueryAttention2d"
    options = {"num_heads": 3, "key_dim": 5, "value_dim": 7, "use_bias": True}
    yield Case(name, (22, 29), options, _image(22, 4))
    yield Case(name, (22,), {"num_heads": 2, "query_strides": 2, "kv_stride": 2}, _image(22, 4))
    for stride in (None, 2):
        options = {"key_dim": 5, "num_heads": 3, "attn_ratio": 2, "resolution": 4, "stride": stride}
        yield Case("timm.models.efficientformer_v2.Attention2d", (19,), options, _image(19, 4), ("act",))
    options = {"key_dim": 5, "num_heads": 3, "attn_ratio": 2, "resolution": 4, "out_dim": 23}
    yield Case("timm.models.efficientformer_v2.Attention2dDownsample", (19,), options, _image(19, 4), ("act",))
    yield Case("timm.models.iformer.SHMA", (22,), {"head_dim_reduction_ratio": 2}, _image(22, 3), ("gate_act",))
    name = "timm.models.efficientvit_msra.CascadedGroupAttention"
    options = {"num_heads": 3, "attn_ratio": 10 / 7, "resolution": 3, "kernels": (3, 3, 5)}
    yield Case(name, (30, 7), options, _image(30, 3), ("proj.0", "dws"))
    options = {"num_heads": 1, "attn_ratio": 13 / 7, "resolution": 3, "kernels": (3,)}
    yield Case(name, (13, 7), options, _image(13, 3), ("proj.0", "dws"))


def _others() -> Iterator[Case]:
    name = "timm.layers.attention_pool.AttentionPoolLatent"
    options = {
        "num_heads": 3,
        "latent_dim": 13,
        "latent_len": 2,
        "qkv_bias": False,
        "pos_embed": "abs",
        "feat_size": 11,
    }
    yield Case(name, (24, 29), options, _tokens(24), since=NEWEST)
    options = {"num_heads": 2, "embed_dim": 22, "qk_norm": True, "norm_layer": nn.LayerNorm}
    yield Case(name, (22, 0), options, _tokens(22), _QK, NEWEST)
    yield Case(name, (24,), {"num_heads": 2, "q_proj": False})
    for apart in (False, True):
        options = {"head_dim": 8, "qkv_separate": apart}
        yield Case("timm.layers.attention_pool2d.AttentionPool2d", (24, 3, 29), options, _image(24, 3))
        options = {**options, "ref_feat_size": 3, "qkv_bias": apart}
        name = "timm.layers.attention_pool2d.RotAttentionPool2d"
        yield Case(name, (24, 0), options, _image(24, 3), ("pos_embed",), NEWEST)
    name = "timm.models.vision_transformer.ParallelScalingBlock"
    for options in ({"qkv_bias": True, "fuse_out_proj": True, "mlp_ratio": 1.5}, {"qk_norm": True, "mlp_ratio": 0.5}):
        yield Case(name, (22, 2), options, _tokens(22), _QK if "qk_norm" in options else (), FIXED)
    for name in ("layers.diff_attention.DiffAttention", "models.vision_transformer.DiffParallelScalingBlock"):
        options = {"qkv_bias": "layers" in name, "depth": 2}
        yield Case(f"timm.{name}", (24, 3), options, _tokens(24), ("sub_norm",), FIXED)
    name = "torch.nn.modules.activation.MultiheadAttention"
    for options in (
        {"batch_first": True},
        {"bias": False, "add_bias_kv": True},
        {"add_zero_attn": True},
        {"kdim": 13, "vdim": 17, "bias": False},
    ):
        yield Case(name, (21, 3), options, _tokens(21) * 3 if "batch_first" in options else ())
    widths = (*_tokens(21), *_tokens(13), *_tokens(17))
    yield Case(name, (21, 3), {"kdim": 13, "vdim": 17, "batch_first": True}, widths)


def _on_request() -> Iterator[Case]:
    for biased in (False, True):
        yield Case("timm.models.davit.ChannelAttentionV2", (21, 3), {"qkv_bias": biased}, _tokens(21))
        for owner in ("xcit.XCA", "edgenext.CrossCovarianceAttn", "davit.ChannelAttention"):
            yield Case(f"timm.models.{owner}", (21, 3), {"qkv_bias": biased}, _tokens(21))
        yield Case("timm.models.coat.FactorAttnConvRelPosEnc", (21, 3), {"qkv_bias": biased})
    yield Case("timm.models.coat.FactorAttnConvRelPosEnc", (21, 3), {"shared_crpe": nn.Identity()})
    name = "timm.models.efficientvit_mit.LiteMLA"
    for options in ({"scales": ()}, {"heads": 3, "scales": (3, 5), "use_bias": True}):
        yield Case(
            name, (19, 23), {"dim": 5, **options}, _image(19, 3) if "heads" not in options else (), ("kernel_func",)
        )


def _refused() -> Iterator[Case]:
    yield Case("timm.models.gcvit.WindowAttentionGlobal", (21, 3, (2, 2)), {"use_global": True})
    yield Case("timm.models.mobilevit.LinearSelfAttention", (8,), {})
    yield Case("timm.models.swiftformer.EfficientAdditiveAttention", (8, 8), {})
    yield Case("timm.models.volo.OutlookAttention", (8, 2), {})
    yield Case("timm.models.csatv2.SpatialTransformerBlock", (), {})
    yield Case("timm.layers.attention2d.MultiQueryAttentionV2", (8,), {})
    yield Case("timm.layers.attention_pool.AttentionPoolPrr", (8, 2), {})


KINDS = (_fused, _split, _convolved, _others, _on_request, _refused)
CASES = {case.title: case for kind in KINDS for case in kind()}
