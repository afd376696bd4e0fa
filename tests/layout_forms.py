"""One real module of every attention class and layout form of timm, with random weights, to hold readers against.

A form is taken from a small architecture: the model is built on the meta device, a forward pass there gives the shapes
of the module's inputs, and only the module itself gets storage. Forms no architecture holds are built directly.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module, util
from typing import Any

import pytest
import timm
import torch
from packaging.version import Version
from torch import nn

from attnlens.layouts.describe import attention_spec
from attnlens.layouts.spec import AttentionSpec

NEWEST = Version("1.0.31")
MISTAKES = {
    "vit_base_patch16_xp_224:blocks.0": ("1.0.26", "the MLP's bias is added to rows of q, k and v"),
}
"""Mistakes of timm's own forward passes, and a version known to be without each."""


@dataclass(frozen=True)
class Form:
    """Where a form is found: a submodule of an architecture, or a function that builds it with its inputs."""

    source: str | Callable[[], tuple[nn.Module, tuple[Any, ...]]]
    path: str = ""
    without: tuple[str, ...] = ()
    """Parts that stand between projection and product; the oracle replaces them by the identity."""
    crop: tuple[int, ...] = ()
    """Leading sizes the inputs are cut to, where the module does not mind how many windows or tokens it sees."""
    module_class: str = ""

    @property
    def id(self) -> str:
        return f"{self.source}:{self.path}" if isinstance(self.source, str) else self.source.__name__


class ReachedError(Exception):
    """The forward pass reached the module: its inputs are known."""


def build(form: Form) -> tuple[nn.Module, AttentionSpec, tuple[Any, ...], dict[str, Any]]:
    """Return a module with random float64 weights, its layout, and random inputs to call it with."""
    torch.manual_seed(0)
    _require(form)
    if callable(form.source):
        with skipped_where_timm_is_older():
            module, args = form.source()
        kwargs: dict[str, Any] = {}
    else:
        module, args, kwargs = _from_model(form)
    module.double().requires_grad_(False)
    module.eval()  # timm overrides train() without returning the module
    fill_(module)
    spec = attention_spec(module, "")
    assert spec is not None, f"{form.id} is not read"
    made: dict[int, Any] = {}
    return module, spec, _random(args, form.crop, made), _random(kwargs, form.crop, made)


@contextmanager
def skipped_where_timm_is_older() -> Iterator[None]:
    """Skip what a timm before the newest one these forms were written for cannot build: an option it does not have."""
    try:
        yield
    except (TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
        if Version(timm.__version__) >= NEWEST:
            raise
        pytest.skip(f"timm {timm.__version__}: {str(error).splitlines()[0]}")


def _require(form: Form) -> None:
    """Skip what the installed timm does not have yet, or has no more."""
    owner, _, name = form.module_class.rpartition(".")
    known = util.find_spec(owner) is not None and hasattr(import_module(owner), name)
    fixed, mistake = MISTAKES.get(form.id, (timm.__version__, ""))
    if Version(timm.__version__) < Version(fixed):
        pytest.skip(f"timm {timm.__version__}: {mistake}")
    if not known or (isinstance(form.source, str) and not timm.is_model(form.source)):
        pytest.skip(f"timm {timm.__version__} has no {form.module_class} in {form.id}")


def fill_(module: nn.Module) -> None:
    """Draw every weight, bias and BatchNorm statistic; index tables are made again by the module where it can."""
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if not value.is_floating_point():
            value.zero_()
        elif name.endswith(("_min", "_max")):
            value.fill_(-torch.inf if name.endswith("_min") else torch.inf)  # bounds of a clamp
        elif name.endswith("running_var"):
            value.uniform_(0.5, 2.0)
        else:
            value.normal_(0.0, 0.7)
    for part in module.modules():
        if hasattr(part, "init_non_persistent_buffers"):
            part.init_non_persistent_buffers()


def _from_model(form: Form) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    model = _on_meta(form.source)
    module, caught = model.get_submodule(form.path), {}

    def catch(_module, args, kwargs):
        caught.update(args=args, kwargs=kwargs)
        raise ReachedError

    handle = module.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        with torch.no_grad():
            model(torch.zeros(1, *model.pretrained_cfg["input_size"], device="meta"))
    except ReachedError:
        pass
    handle.remove()
    return copy.deepcopy(module).to_empty(device="cpu"), caught["args"], caught["kwargs"]


@lru_cache(maxsize=4)
def _on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        model = timm.create_model(name)
    model.eval()
    return model


def _random(value: Any, crop: tuple[int, ...], made: dict[int, Any]) -> Any:
    """Return the same structure with random tensors; a tensor that stands in it twice stays one tensor."""
    if isinstance(value, torch.Tensor):
        if id(value) not in made:
            shape = [min(size, limit) for size, limit in zip(value.shape, crop, strict=False)]
            made[id(value)] = torch.randn(*shape, *value.shape[len(shape) :], dtype=torch.float64)
        return made[id(value)]
    if isinstance(value, dict):
        return {key: _random(item, crop, made) for key, item in value.items()}
    return tuple(_random(item, crop, made) for item in value) if isinstance(value, tuple) else value


def _image(channels: int, size: int) -> tuple[torch.Tensor]:
    return (torch.zeros(1, channels, size, size),)


def _tokens(width: int, number: int = 11) -> tuple[torch.Tensor]:
    return (torch.zeros(1, number, width),)


def plain_attention_with_every_option():
    from timm.layers import Attention, LayerNorm

    options = {"qkv_bias": True, "qk_norm": True, "scale_norm": True, "gated": True, "norm_layer": LayerNorm}
    return Attention(23, num_heads=3, attn_head_dim=5, dim_out=29, **options), _tokens(23)


def grouped_rope_attention():
    from timm.layers import AttentionRope

    return AttentionRope(23, num_heads=6, num_kv_heads=2, attn_head_dim=5, dim_out=29, qkv_fused=False), _tokens(23)


def eva_attention_with_split_bias():
    from timm.models.eva import EvaAttention

    return EvaAttention(24, 3, qkv_fused=False, scale_norm=True, norm_layer=nn.LayerNorm), _tokens(24)


def attention_2d_by_role():
    from timm.layers.attention2d import Attention2d

    return Attention2d(22, 33, num_heads=11, expand_first=True), _image(22, 3)


def attention_2d_by_head():
    from timm.layers.attention2d import Attention2d

    return Attention2d(22, 29, num_heads=2, head_first=True), _image(22, 3)


def maxxvit_convolution_by_role():
    from timm.models.maxxvit import Attention2d

    return Attention2d(21, 29, dim_head=7, head_first=False, expand_first=False), _image(21, 3)


def multi_query_with_value_width():
    from timm.layers import MultiQueryAttention2d

    return MultiQueryAttention2d(22, 29, num_heads=3, key_dim=5, value_dim=7, use_bias=True), _image(22, 4)


def latent_pool_of_own_width():
    from timm.layers import AttentionPoolLatent

    return AttentionPoolLatent(24, 29, num_heads=3, latent_dim=13, latent_len=2), _tokens(24)


def latent_pool_without_output():
    from timm.layers import AttentionPoolLatent

    return AttentionPoolLatent(24, 0, num_heads=3), _tokens(24)


def rotary_pool():
    from timm.layers import RotAttentionPool2d

    return RotAttentionPool2d(24, 29, ref_feat_size=3, head_dim=8), _image(24, 3)


def absolute_pool_with_split_projections():
    from timm.layers import AttentionPool2d

    return AttentionPool2d(24, 3, 29, head_dim=8, qkv_separate=True), _image(24, 3)


def parallel_block_with_one_output():
    from timm.models.vision_transformer import ParallelScalingBlock

    return ParallelScalingBlock(24, 3, qkv_bias=True, fuse_out_proj=True), _tokens(24)


def lowformer_with_its_own_projection():
    from timm.models.lowformer import ConvAttention

    return ConvAttention(64, head_dim_mul=1.0, att_stride=1, fuse_out_proj=False), _image(64, 4)


def cpubone_projecting_before_upsampling():
    from timm.models.cpubone import ConvAttention

    return ConvAttention(64, att_stride=2, fuse_out_proj=True, upsample_mode="nearest"), _image(64, 4)


def torch_multihead():
    return nn.MultiheadAttention(24, 3, batch_first=True), _tokens(24) * 3


def torch_multihead_of_own_widths():
    module = nn.MultiheadAttention(24, 3, kdim=13, vdim=17, batch_first=True)
    return module, (*_tokens(24), *_tokens(13), *_tokens(17))


_ROPE = ("rope",)
_QK_NORM = ("q_norm", "k_norm")
_MVIT = ("pool_q", "pool_k", "pool_v", "norm_q", "norm_k", "norm_v")
FORMS_BY_CLASS = {
    "timm.layers.attention.Attention": [
        Form("test_vit", "blocks.0.attn"),
        Form("crossvit_tiny_240", "blocks.0.blocks.0.0.attn"),
        Form(plain_attention_with_every_option, without=(*_QK_NORM, "norm")),
        Form("beit3_base_patch16_224", "blocks.0.attn", ("norm",)),
    ],
    "timm.layers.attention.AttentionRope": [
        Form("vit_pe_core_tiny_patch16_384", "blocks.0.attn", _ROPE),
        Form("vit_base_patch16_sapiens2", "blocks.0.attn", (*_QK_NORM, *_ROPE), crop=(1, 97)),
        Form("vit_base_patch16_sapiens2", "blocks.6.attn", (*_QK_NORM, *_ROPE), crop=(1, 97)),
        Form(grouped_rope_attention),
    ],
    "timm.models.eva.EvaAttention": [
        Form("eva02_tiny_patch14_224", "blocks.0.attn", _ROPE),
        Form("vit_tiny_patch16_dinov3_qkvb", "blocks.0.attn", _ROPE),
        Form("eva02_base_patch14_224", "blocks.0.attn", ("norm", *_ROPE)),
        Form(eva_attention_with_split_bias, without=("norm",)),
    ],
    "timm.models.beit.Attention": [Form("beit_base_patch16_224", "blocks.0.attn")],
    "timm.models.cait.TalkingHeadAttn": [Form("cait_xxs24_224", "blocks.0.attn")],
    "timm.models.cait.ClassAttn": [Form("cait_xxs24_224", "blocks_token_only.0.attn")],
    "timm.models.convit.GPSA": [Form("convit_tiny", "blocks.0.attn")],
    "timm.models.convit.MHSA": [Form("convit_tiny", "blocks.10.attn")],
    "timm.models.davit.WindowAttention": [Form("davit_tiny", "stages.2.blocks.0.0.attn")],
    "timm.models.davit.ChannelAttention": [Form("davit_tiny", "stages.2.blocks.0.1.attn")],
    "timm.models.davit.ChannelAttentionV2": [
        Form("davit_base_fl", "stages.2.blocks.0.channel_block.attn", crop=(1, 97)),
    ],
    "timm.models.fastvit.Attention": [Form("fastvit_mci0", "stages.3.blocks.0.token_mixer")],
    "timm.models.gcvit.WindowAttentionGlobal": [Form("gcvit_xxtiny", "stages.2.blocks.0.attn")],
    "timm.models.hiera.MaskUnitAttention": [
        Form("hiera_tiny_224", "blocks.0.attn"),
        Form("hiera_tiny_224", "blocks.5.attn"),
    ],
    "timm.models.hieradet_sam2.MultiScaleAttention": [Form("sam2_hiera_tiny", "blocks.0.attn", crop=(3,))],
    "timm.models.maxxvit.AttentionCl": [
        Form("test_maxvit", "stages.2.blocks.0.attn_block.attn"),
        Form("maxvit_tiny_tf_224", "stages.3.blocks.0.attn_block.attn"),
    ],
    "timm.models.maxxvit.Attention2d": [
        Form("test_coatnet", "stages.2.blocks.0.attn"),
        Form(maxxvit_convolution_by_role),
    ],
    "timm.models.metaformer.Attention": [Form("caformer_s18", "stages.3.blocks.0.token_mixer")],
    "timm.models.mvitv2.MultiScaleAttention": [Form("mvitv2_tiny", "stages.2.blocks.0.attn", _MVIT)],
    "timm.models.nest.Attention": [Form("nest_tiny", "levels.2.transformer_encoder.0.attn")],
    "timm.models.swin_transformer.WindowAttention": [Form("swin_tiny_patch4_window7_224", "layers.3.blocks.0.attn")],
    "timm.models.swin_transformer_v2.WindowAttention": [Form("swinv2_tiny_window8_256", "layers.3.blocks.0.attn")],
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": [
        Form("swinv2_cr_tiny_224", "stages.3.blocks.0.attn"),
    ],
    "timm.models.twins.LocallyGroupedAttn": [Form("twins_svt_small", "blocks.2.0.attn")],
    "timm.models.twins.GlobalSubSampleAttn": [Form("twins_svt_small", "blocks.2.1.attn")],
    "timm.models.vision_transformer_relpos.RelPosAttention": [Form("test_vit_relpos", "blocks.0.attn")],
    "timm.models.vision_transformer_sam.Attention": [Form("samvit_base_patch16_224", "blocks.0.attn")],
    "timm.models.volo.Attention": [Form("volo_d1_224", "network.2.0.attn")],
    "timm.models.volo.ClassAttention": [Form("volo_d1_224", "post_network.0.attn")],
    "timm.models.nextvit.EfficientAttention": [Form("nextvit_small", "stages.2.blocks.4.e_mhsa")],
    "timm.models.crossvit.CrossAttention": [Form("crossvit_tiny_240", "blocks.0.fusion.0.attn")],
    "timm.models.pvt_v2.Attention": [
        Form("pvt_v2_b0", "stages.2.blocks.0.attn"),
        Form("pvt_v2_b2_li", "stages.2.blocks.0.attn"),
    ],
    "timm.models.tnt.Attention": [Form("tnt_s_patch16_224", "blocks.0.attn_in")],
    "timm.models.gemma4_vit.Gemma4Attention": [
        Form("gemma4_vit_167m", "encoder.blocks.0.attn", (*_QK_NORM, "v_norm", *_ROPE), crop=(1, 97)),
    ],
    "timm.models.efficientformer.Attention": [Form("efficientformer_l1", "stages.3.blocks.4.token_mixer")],
    "timm.models.tiny_vit.Attention": [Form("tiny_vit_5m_224", "stages.2.blocks.0.attn")],
    "timm.models.levit.Attention": [
        Form("levit_128s", "stages.0.blocks.0.attn", ("proj.act",)),
        Form("levit_conv_128s", "stages.0.blocks.0.attn", ("proj.act",)),
    ],
    "timm.models.levit.AttentionDownsample": [
        Form("levit_128s", "stages.1.downsample.attn_downsample", ("proj.act",)),
        Form("levit_conv_128s", "stages.1.downsample.attn_downsample", ("proj.act",)),
    ],
    "timm.models.vision_transformer.ParallelScalingBlock": [
        Form("vit_pwee_patch16_reg1_gap_256", "blocks.0"),
        Form("vit_base_patch16_xp_224", "blocks.0", _QK_NORM),
        Form(parallel_block_with_one_output),
    ],
    "timm.layers.diff_attention.DiffAttention": [Form("vit_dwee_patch16_reg1_gap_256", "blocks.0.attn", ("sub_norm",))],
    "timm.models.vision_transformer.DiffParallelScalingBlock": [
        Form("vit_dpwee_patch16_reg1_gap_256", "blocks.0", ("sub_norm",)),
    ],
    "timm.layers.bottleneck_attn.BottleneckAttn": [Form("botnet26t_256", "stages.3.1.self_attn")],
    "timm.layers.halo_attn.HaloAttn": [
        Form("halonet_h1", "stages.0.0.self_attn"),
        Form("eca_halonext26ts", "stages.3.0.self_attn"),
    ],
    "timm.layers.lambda_layer.LambdaLayer": [Form("lambda_resnet26rpt_256", "stages.3.1.self_attn")],
    "timm.models.cpubone.ConvAttention": [
        Form("cpubone_nano", "stages.2.1.total.0.0.main.1"),
        Form(cpubone_projecting_before_upsampling),
    ],
    "timm.models.lowformer.ConvAttention": [
        Form("lowformer_b0", "stages.3.1.attn.main.1"),
        Form(lowformer_with_its_own_projection),
    ],
    "timm.models.shvit.SHSA": [Form("shvit_s1", "stages.1.blocks.0.mixer.m", ("proj.0",))],
    "timm.models.visformer.Attention": [Form("visformer_tiny", "stage2.0.attn")],
    "timm.layers.attention2d.Attention2d": [Form(attention_2d_by_role), Form(attention_2d_by_head)],
    "timm.layers.attention2d.MultiQueryAttention2d": [
        Form("mobilenetv4_hybrid_medium", "blocks.2.4.attn"),
        Form("mobilenetv4_hybrid_medium", "blocks.3.8.attn"),
        Form(multi_query_with_value_width),
    ],
    "timm.models.efficientformer_v2.Attention2d": [
        Form("efficientformerv2_s0", "stages.3.blocks.2.token_mixer", ("act",)),
        Form("efficientformerv2_s0", "stages.2.blocks.4.token_mixer", ("act",)),
    ],
    "timm.models.efficientformer_v2.Attention2dDownsample": [
        Form("efficientformerv2_s0", "stages.3.downsample.attn", ("act",)),
    ],
    "timm.models.iformer.SHMA": [Form("iformer_t", "stages.2.blocks.7.mixer.module", ("gate_act",))],
    "timm.models.efficientvit_msra.CascadedGroupAttention": [
        Form("efficientvit_m0", "stages.0.blocks.0.mixer.m.attn", ("proj.0", "dws")),
    ],
    "timm.layers.attention_pool.AttentionPoolLatent": [
        Form("test_vit3", "attn_pool"),
        Form(latent_pool_of_own_width),
        Form(latent_pool_without_output),
    ],
    "timm.layers.attention_pool2d.AttentionPool2d": [
        Form("resnet50_clip", "head"),
        Form(absolute_pool_with_split_projections),
    ],
    "timm.layers.attention_pool2d.RotAttentionPool2d": [Form(rotary_pool, without=("pos_embed",))],
    "timm.models.xcit.XCA": [Form("xcit_nano_12_p16_224", "blocks.0.attn")],
    "timm.models.edgenext.CrossCovarianceAttn": [Form("edgenext_xx_small", "stages.1.blocks.1.xca")],
    "timm.models.coat.FactorAttnConvRelPosEnc": [Form("coat_lite_tiny", "serial_blocks1.0.factoratt_crpe")],
    "timm.models.efficientvit_mit.LiteMLA": [
        Form("efficientvit_b0", "stages.2.blocks.1.context_module.main", ("kernel_func",)),
    ],
    "torch.nn.modules.activation.MultiheadAttention": [Form(torch_multihead), Form(torch_multihead_of_own_widths)],
}

FORMS = [replace(form, module_class=name) for name, forms in FORMS_BY_CLASS.items() for form in forms]
