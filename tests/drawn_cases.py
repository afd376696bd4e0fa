"""Every initialiser with every option away from its default, and every mistake that is planted: what is stored of it.

A case returns JSON: digests of the tensors that changed, the report, and what `verify_init` says.
"""

import json
import math
from functools import cache

import numpy as np
import timm
import torch
from timm.layers.attention import AttentionRope
from timm.layers.attention2d import MultiQueryAttention2d
from torch import nn

from attnlens.errors import AttnlensError
from attnlens.fit.fit_params import fit_params
from attnlens.inits import init_, verify_init
from tests import test_inits_gains as gained
from tests import test_inits_mistakes as mistaken
from tests import test_inits_verify as recipes
from tests.filter_models import both, convmixer, convnext

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 26, "depth": 2, "num_heads": 2, "num_classes": 3}


@torch.no_grad()
def filled(model, seed=5):
    """Give a network gains, LayerScale and biases that are no ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            drawn = torch.rand(parameter.shape, generator=generator)
            parameter.copy_(drawn - 0.5 if name.endswith("bias") else 0.5 + drawn)
    return model.eval()


def vit(seed=1, **more):
    torch.manual_seed(seed)
    return filled(timm.create_model("vit_tiny_patch16_224", **{**SIZES, "init_values": 0.3, **more}), seed)


def rope(dim=23, heads=6, keys=2, width=5):
    torch.manual_seed(1)
    return filled(AttentionRope(dim, num_heads=heads, num_kv_heads=keys, attn_head_dim=width, qkv_fused=False))


def multi_query(dim=24, heads=4, key=5, value=7):
    torch.manual_seed(1)
    return filled(MultiQueryAttention2d(dim, num_heads=heads, key_dim=key, value_dim=value))


def unequal():
    torch.manual_seed(1)
    return filled(nn.MultiheadAttention(24, 3, kdim=16, vdim=24))


def encoder():
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(22, 2, 31, batch_first=True, norm_first=True)
    return filled(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


class Hooked(nn.Module):
    """Has no `init_weights`, as older networks of timm."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(22, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
        if isinstance(module, nn.MultiheadAttention):
            nn.init.uniform_(module.in_proj_weight)
            nn.init.uniform_(module.in_proj_bias)


def swin():
    torch.manual_seed(1)
    return filled(
        timm.create_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=12, depths=(1, 1), num_heads=(1, 2))
    )


NETWORKS = {
    "vit": vit,
    "grouped": rope,
    "wide heads": lambda: rope(11, 2, 2, 17),
    "narrow heads": lambda: rope(23, 3, 3, 5),
    "grouped wide": lambda: rope(7, 4, 2, 11),
    "one key head": multi_query,
    "q of another width": unequal,
    "swin": swin,
    "mixed": both,
    "convmixer": convmixer,
    "convnext": lambda: convnext(dims=(5, 7, 8, 11)),
}
PLAIN = ("vit", "grouped", "wide heads", "narrow heads", "grouped wide", "one key head", "q of another width", "swin")
MIMETIC = {"alpha_qk": 0.6, "beta_qk": -0.5, "alpha_ov": 0.3, "beta_ov": 0.2}


def digest(values, unsigned):
    """Return norm and three projections of a tensor; ``unsigned`` where the signs of its units are anyone's choice."""
    flat = np.ravel(values.detach().double().numpy())
    flat = np.abs(flat) if unsigned else flat
    norm = float(np.linalg.norm(flat))
    places = np.arange(1, len(flat) + 1)
    return [norm, *(float(flat @ np.sin(places * pace)) / (norm or 1.0) for pace in (1.1, 2.3, 0.17))]


def plain(data):
    """Return what JSON reads back, NaN and infinity as words, numbers to eight digits."""
    return json.loads(json.dumps(data, default=str), parse_constant=str, parse_float=lambda text: _short(float(text)))


def _short(value):
    return float(f"{value:.8g}")


def drawn(network, name, check=True, **options):
    """Draw, and return what changed, the report, and what is said of it with its seed, without, and with another."""
    model = NETWORKS[network]()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    try:
        report = init_(model, name, seed=7, **options)
    except AttnlensError as error:
        return f"{type(error).__name__}: {error}"
    changed = {
        key: digest(tensor, name == "impulse" or options.get("of") == "impulse")
        for key, tensor in model.state_dict().items()
        if not torch.equal(tensor, before[key])
    }
    found = {"changed": changed, "report": report.to_json(), "text": str(report)}
    if check:
        found["checks"] = [verified(model, name, seed, **options) for seed in (7, None, 8)]
    return plain(found)


def verified(model, name, seed=None, **options):
    """Return what `verify_init` says, whole."""
    try:
        return plain(verify_init(model, init=name, seed=seed, **options).to_json())
    except AttnlensError as error:
        return f"{type(error).__name__}: {error}"


@cache
def teacher(**more):
    return vit(9, **more)


@cache
def params(fold="effective"):
    return fit_params(teacher(), fold=fold)


def _initialisers():
    for network in PLAIN:
        for fold in ("raw", "effective"):
            if fold == "effective" and network not in ("vit", "swin"):
                continue
            yield f"mimetic {network} {fold}", lambda n=network, f=fold: drawn(n, "mimetic", fold=f)
            yield f"identity {network} {fold}", lambda n=network, f=fold: drawn(n, "identity", fold=f)
            yield f"conditioned {network} {fold}", lambda n=network, f=fold: drawn(n, "conditioned", fold=f, gain=1.3)
            yield f"norm-matched {network} {fold}", lambda n=network, f=fold: drawn(n, "norm-matched", fold=f)
    for network in ("vit", "grouped", "wide heads"):
        more = {"columns": "shuffled", "noise": "uniform", **MIMETIC}
        yield f"mimetic options {network}", lambda n=network, m=more: drawn(n, "mimetic", **m)
        still = {"alpha_qk": 0.0, "alpha_ov": 0.0}
        yield f"mimetic alpha 0 {network}", lambda n=network, m=still: drawn(n, "mimetic", **m)
        yield f"qk-only {network}", lambda n=network: drawn(n, "qk-only", alpha=0.2, beta=-0.3, noise="uniform")
        other = {"alpha": 0.2, "columns": "shuffled", "noise": "uniform"}
        yield f"ov-only {network}", lambda n=network, m=other: drawn(n, "ov-only", beta=0.3, **m)
        yield f"ov-positive {network}", lambda n=network: drawn(n, "ov-positive")
        yield f"identity options {network}", lambda n=network: drawn(n, "identity", qk=-0.5, ov=0.3, noise=0.4)
    for of in ("identity", "conditioned", "qk-only", "ov-only", "impulse", "norm-matched"):
        yield f"norm-matched of {of}", lambda o=of: drawn("vit", "norm-matched", of=o)
    yield "impulse", lambda: drawn("vit", "impulse")
    yield "impulse options", lambda: drawn("vit", "impulse", kernel=5, margin=2.5, grid=(2, 8), fold="effective")
    yield "impulse of one place", lambda: drawn("vit", "impulse", kernel=1, grid=(3, 5))
    yield "default vit", lambda: drawn("vit", "default")


def _kept():
    for keep in ("weights", "layers", "spectra", "norms"):
        for fold in ("effective", "raw"):
            given = {"keep": keep, "fold": fold}
            yield f"transfer {keep} {fold}", lambda g=given: drawn("vit", "transfer-attention", teacher=teacher(), **g)
    for network in ("grouped", "wide heads", "narrow heads", "grouped wide", "one key head"):
        for keep in ("layers", "norms", "spectra"):
            yield (
                f"transfer {keep} {network}",
                lambda k=keep, n=network: drawn(
                    n, "transfer-attention", teacher=filled(NETWORKS[n](), 3), keep=k, fold="raw"
                ),
            )
    larger = {"embed_dim": 45, "num_heads": 3, "depth": 5}
    for layers in ("first", "spaced"):
        for fold in ("effective", "raw"):
            given = {"layers": layers, "fold": fold}
            yield (
                f"selection {layers} {fold}",
                lambda g=given: drawn("vit", "weight-selection", teacher=teacher(**larger), **g),
            )
    yield "selection grouped", lambda: drawn("grouped", "weight-selection", teacher=rope(29, 6, 2, 7), fold="raw")


def _fitted():
    for fold in ("raw", "effective"):
        for ov in ("layer", "head"):
            more = {"ov": ov, "columns": "shuffled", "noise": "uniform"} if fold == "raw" else {"ov": ov}
            yield f"fitted {fold} {ov}", lambda f=fold, m=more: drawn("vit", "fitted", params=params(f), **m)
    for gains in ("quantiles", "channels"):
        for ov in ("layer", "head"):
            given = {"gains": gains, "ov": ov}
            yield f"fitted {gains} {ov}", lambda g=given: drawn("vit", "fitted", params=params(), **g)
    for network in ("grouped", "wide heads", "narrow heads", "grouped wide", "one key head", "swin"):
        for ov in ("layer", "head"):
            yield (
                f"fitted {network} {ov}",
                lambda n=network, o=ov: drawn(n, "fitted", params=params("raw"), ov=o, noise="uniform"),
            )
    for network in ("grouped", "narrow heads", "q of another width"):
        yield (
            f"fitted quantiles {network}",
            lambda n=network: drawn(n, "fitted", params=params("effective"), gains="quantiles"),
        )


def _filters():
    shape = {"relative_s": 0.2, "blur": 0.3, "slope": 0.2, "contrast": 0.1}
    for network in ("mixed", "convmixer", "convnext"):
        yield f"conv-covariance {network}", lambda n=network: drawn(n, "conv-covariance")
        for keep in ("weights", "layers", "norms"):
            given = {"keep": keep}
            yield (
                f"transfer-filters {keep} {network}",
                lambda n=network, g=given: drawn(n, "transfer-filters", teacher=filled(NETWORKS[n](), 3), **g),
            )
    yield "conv-covariance options", lambda: drawn("mixed", "conv-covariance", **shape)
    for form in ("parametric", "full"):
        yield (
            f"conv-covariance {form}",
            lambda f=form: drawn("mixed", "conv-covariance", params=fit_params(convmixer(3)), form=f),
        )
    yield (
        "norm-matched filters",
        lambda: drawn("mixed", "norm-matched", of="conv-covariance"),
    )


def _default():
    NETWORKS.update({"encoder": encoder, "hooked": lambda: filled(Hooked())})
    for network in ("encoder", "hooked", "one key head", "q of another width"):
        yield f"default {network}", lambda n=network: drawn(n, "default")


# Mistakes.


def _spoilt(how, seed):
    torch.manual_seed(2)
    model = mistaken.vit(**mistaken.WIDTH)
    init_(model, "mimetic", seed=3)
    (mistaken if how in mistaken.PLANTED else recipes).spoil(model, how)
    return verified(model, "mimetic", seed)


def _spoilt_filters(how, seed):
    model = both()
    init_(model, "conv-covariance", seed=3)
    with torch.no_grad():
        if how == "scaled":
            model.mix.weight *= 1.5
        elif how == "rounded":
            model.mix.weight *= 1 + 2e-5
        elif how == "nearly":
            model.mix.weight *= 1 + 5e-6
        elif how == "one direction":
            model.widen.weight[:, :, 1:] = 0
        else:
            model.mix.bias[3] = 0.25
    return verified(model, "conv-covariance", seed)


@cache
def _gained_source():
    return fit_params(gained.trained())


@torch.no_grad()
def _spoilt_gains(gains, how, seed):
    source = _gained_source()
    model = gained.network(6)
    given = source
    if how in ("in_another_order", "wider", "against", "heavier"):
        given = gained.other_gains(source, getattr(gained, how))
    init_(model, "fitted", params=given, gains=gains, seed=3)
    weight = model.blocks[0].attn.qkv.weight
    if how == "alpha":
        weight[: gained.D] *= 1.01
    elif how == "split":
        weight[: gained.D] *= 8
        weight[gained.D : 2 * gained.D] /= 8
    return verified(model, "fitted", seed, params=source, gains=gains)


def _mistakes():
    for how in (*mistaken.PLANTED, *recipes.RECIPE):
        for seed in (None, 3):
            yield f"mistake {how} {seed}", lambda h=how, s=seed: _spoilt(h, s)
    for how in ("scaled", "rounded", "nearly", "one direction", "bias"):
        for seed in (None, 3):
            yield f"filters {how} {seed}", lambda h=how, s=seed: _spoilt_filters(h, s)
    for gains in ("channels", "quantiles"):
        for how in ("", "in_another_order", "wider", "against", "heavier", "alpha", "split"):
            yield f"gains {gains} {how or 'intact'}", lambda g=gains, h=how: _spoilt_gains(g, h, None)


# Refusals.

WRONG = {
    "a name nearly right": ("vit", "norm_match", {}),
    "an option nearly right": ("vit", "mimetic", {"alpha_q": 1}),
    "an option of none": ("vit", "default", {"alpha": 1}),
    "a missing option": ("vit", "fitted", {}),
    "below zero": ("vit", "identity", {"noise": -0.1}),
    "no number": ("vit", "conditioned", {"gain": "1"}),
    "a truth value": ("vit", "conditioned", {"gain": True}),
    "infinite": ("vit", "identity", {"qk": math.inf}),
    "a wrong fold": ("vit", "mimetic", {"fold": "balanced"}),
    "a wrong fold of identity": ("vit", "identity", {"fold": "centred"}),
    "a wrong noise": ("vit", "mimetic", {"noise": "pink"}),
    "a wrong order": ("vit", "ov-only", {"columns": "sorted"}),
    "itself": ("vit", "norm-matched", {"of": "norm-matched"}),
    "an even kernel": ("vit", "impulse", {"kernel": 4}),
    "a kernel of 0": ("vit", "impulse", {"kernel": 0}),
    "a negative kernel": ("vit", "impulse", {"kernel": -1}),
    "half a kernel": ("vit", "impulse", {"kernel": 3.0}),
    "a negative margin": ("vit", "impulse", {"margin": -1.0}),
    "no embedding": ("grouped", "impulse", {}),
    "a large grid": ("vit", "impulse", {"grid": (5, 5)}),
    "no square": ("vit", "impulse", {"position": "blocks.0.attn.qkv.weight"}),
    "a negative seed": ("vit", "mimetic", {"seed": -1}),
    "no layer of the kind": ("convmixer", "mimetic", {}),
    "no filters": ("vit", "conv-covariance", {}),
    "full without params": ("mixed", "conv-covariance", {"form": "full"}),
    "too wide": ("mixed", "conv-covariance", {"relative_s": 40.0}),
    "no width": ("mixed", "conv-covariance", {"relative_s": 0.0}),
    "above 1": ("mixed", "conv-covariance", {"blur": 1.1}),
    "too much together": ("mixed", "conv-covariance", {"blur": 0.9, "slope": 0.3}),
    "a negative share": ("mixed", "conv-covariance", {"slope": -0.1}),
}
TEACHERS = {
    "a shallow teacher": ("weight-selection", {"depth": 1}),
    "a narrow teacher": ("weight-selection", {"embed_dim": 24}),
    "few heads": ("weight-selection", {"num_heads": 1, "embed_dim": 13}),
    "a deep teacher": ("transfer-attention", {"depth": 3}),
    "a wide teacher": ("transfer-attention", {"embed_dim": 52}),
}


def _refused(network, name, options):
    model, seed = NETWORKS[network](), options.get("seed", 0)
    try:
        init_(model, name, seed=seed, **{key: value for key, value in options.items() if key != "seed"})
    except AttnlensError as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError


def _refusals():
    for title, wrong in WRONG.items():
        yield f"refused: {title}", lambda w=wrong: _refused(*w)
    for title, (name, sizes) in TEACHERS.items():
        yield f"refused: {title}", lambda n=name, s=sizes: _refused("vit", n, {"teacher": teacher(**s)})
    yield "refused: shared keys", lambda: _refused("grouped", "weight-selection", {"teacher": rope(29, 6, 6, 7)})
    yield "refused: filters of another size", lambda: _refused("mixed", "transfer-filters", {"teacher": convmixer()})
    yield "refused: gains of channels", lambda: _refused("vit", "fitted", {"params": _other(), "gains": "channels"})
    yield (
        "refused: shares beside params",
        lambda: _refused("mixed", "conv-covariance", {"params": fit_params(convmixer(3)), "blur": 0.1, "slope": 0.1}),
    )
    yield (
        "refused: balanced without gains",
        lambda: _refused("vit", "fitted", {"params": params("balanced")}),
    )


def _other():
    return fit_params(teacher(embed_dim=39, num_heads=3))


CASES = dict(
    case for kind in (_initialisers, _kept, _fitted, _filters, _default, _mistakes, _refusals) for case in kind()
)
