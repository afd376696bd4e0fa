"""Changing a network in place: its attention modules, its skips, norms and MLPs, and the weights they start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from attnlens.errors import UnsupportedAttentionError
from attnlens.signal.activation import TailoredLeakyReLU, scaled_orthogonal, similarity, tailored_slope
from attnlens.signal.kernels import Tokens
from attnlens.signal.variants import Mixes, make_mixes, predicted_kernels
from attnlens.statistics.table import StatsTable, Tabular
from attnlens.vocabulary import one_of
from attnlens.words import counted

if TYPE_CHECKING:
    from timm.layers import Attention

    from attnlens.heads import Array
    from attnlens.inits.random import Streams

MLPS = ("keep", "tailored", "none")


@dataclass(frozen=True, repr=False)
class RewireReport(Tabular):
    """What `rewire_` did to a network; its rows are the layers, with the ends of their row sums."""

    attention: str
    skips: bool
    norms: bool
    mlp: str
    options: Mapping[str, Any]
    seed: int
    depth: int
    tokens: int
    causal: bool
    slope: float | None
    """alpha of the MLPs' leaky ReLU; None where the MLPs were not tailored."""
    row_sums: tuple[tuple[float, float], ...]
    """Smallest and largest row sum of each layer's mixing matrix at the start."""
    product_error: float | None
    """||A A^T - Sigma_L|| / ||Sigma_L|| of the product A of all layers' matrices; None without a Sigma."""
    least: float | None
    """Smallest entry of the attention matrices before rounding errors were lifted to 1e-15, relative to the largest."""
    notes: tuple[str, ...]

    def _table(self) -> StatsTable:
        rows = tuple((layer, low, high) for layer, (low, high) in enumerate(self.row_sums))
        return StatsTable(rows, ("layer", "smallest_row_sum", "largest_row_sum"))

    def _headline(self) -> str:
        return f"RewireReport: {str(self).splitlines()[0]}"

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return asdict(self)

    def __str__(self) -> str:
        """Say in a few lines what was done."""
        which = "causal" if self.causal else "bidirectional"
        parts = f"{with_or_without(self.skips)} skips and {with_or_without(self.norms)} norms"
        lines = [
            f"{self.attention}, seed {self.seed}: {counted(self.depth, 'block')} {parts}, {self.tokens} tokens, {which}"
        ]
        if self.product_error is not None:
            lines.append(f"product of the attention matrices: {self.product_error:.1e} from its kernel")
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True)
class Rewired:
    """A report, and the numbers behind it that theory goes on from."""

    report: RewireReport
    mixes: Mixes | None
    """None where attention was kept."""

    def predicted(self) -> list[Array] | None:
        """Return `predicted_kernels` of the network; None where attention or a standing MLP is not in the theory."""
        report = self.report
        if self.mixes is None or report.mlp == "keep":
            return None
        slope = report.slope
        return predicted_kernels(
            self.mixes,
            skips=report.skips,
            norms=report.norms,
            attend_only=report.mlp == "none",
            bend=None if slope is None else lambda covariance: similarity(slope, covariance),
        )


def rewire_(
    module: nn.Module,
    attention: str = "e-spa",
    *,
    skips: bool = True,
    norms: bool = True,
    mlp: str | None = None,
    eta: float = 0.2,
    seed: int = 0,
    **options: Any,
) -> RewireReport:
    """Rewire the attention, skips and norms of a timm ViT or a `GPT` in place; return what was changed and drawn.

    ``attention``: ``softmax``, ``value-skipinit``, ``shaped``, ``e-spa`` (``gamma``, ``distance``), ``u-spa``
    (``rho``), see `attnlens.signal.variants`; or ``keep``, which leaves attention alone. Each but that starts from
    W_Q = 0 and W_V, W_proj uniform among orthogonal matrices, W_K as it was, biases of q, v and proj zero.

    ``skips=False`` takes both skips of every block out, with LayerScale and stochastic depth. ``norms=False`` takes out
    both norms of every block; the norm behind the last block stays, and a LayerNorm without parameters in front of the
    first gives all tokens a mean square of one, whatever the embedding's. ``mlp`` is ``keep``, the default with skips;
    ``tailored``, the default without: `TailoredLeakyReLU` with the slope at which all MLPs together take cosine 0 to
    ``eta``, fc1 and fc2 scaled orthogonal, biases zero; or ``none``: no MLP.

    The same seed gives the same weights; torch's global generators are not used. Everything is checked before anything
    is changed. Raises `UsageError` for a value that is not accepted, `NegativeAttentionError` where no softmax gives
    the attention matrices, `UnsupportedAttentionError` for a network that is neither a plain timm ViT nor a `GPT`.
    """
    return rewire_with_theory_(
        module, attention, skips=skips, norms=norms, mlp=mlp, eta=eta, seed=seed, **options
    ).report


def rewire_with_theory_(
    module: nn.Module,
    attention: str,
    *,
    skips: bool,
    norms: bool,
    mlp: str | None = None,
    eta: float = 0.2,
    seed: int = 0,
    **options: Any,
) -> Rewired:
    """Do what `rewire_` does, and return with its report what its theory needs."""
    from attnlens.inits.random import Streams

    streams = Streams(seed)  # checks it
    chosen = ("keep" if skips else "tailored") if mlp is None else mlp
    chosen = one_of("mlp", chosen, MLPS)
    tokens = tokens_of(module)
    blocks: Any = module.blocks
    depth = len(blocks)
    if chosen == "tailored":
        _check_mlps(blocks)
    mixes = make_mixes(attention, tokens, depth, options)
    slope = tailored_slope(eta, depth) if chosen == "tailored" else None

    for layer, block in enumerate(blocks):
        if mixes is not None:
            _start_attention(block.attn, streams, layer)
            block.attn = _mixed(block.attn, mixes, layer, tokens)
        if slope is not None:
            _start_mlp(block.mlp, streams, depth + layer)
            block.mlp.act = TailoredLeakyReLU(slope)
        parts = None if chosen == "none" else block.mlp
        if not (skips and norms and parts is not None):
            blocks[layer] = _block(block, skips, norms, parts)
    notes = []
    if not norms:
        width = blocks[0].attn.qkv.in_features
        weight = blocks[0].attn.qkv.weight
        module.norm_pre = nn.LayerNorm(width, elementwise_affine=False).to(weight).train(module.training)
        notes.append("a LayerNorm without parameters in front of the first block; the norm behind the last one stays")
    if slope is not None:
        notes.append(f"MLPs: leaky ReLU of slope {slope:.4f}, scaled orthogonal weights (eta {eta:g})")
    sums = () if mixes is None else tuple(_ends(mix.matrix().sum(1)) for mix in mixes.layers)
    report = RewireReport(
        attention=attention,
        skips=skips,
        norms=norms,
        mlp=chosen,
        options=dict(options),
        seed=seed,
        depth=depth,
        tokens=tokens.count,
        causal=tokens.causal,
        slope=slope,
        row_sums=sums,
        product_error=None if mixes is None else mixes.product_error(),
        least=None if mixes is None else mixes.least,
        notes=tuple(notes),
    )
    return Rewired(report, mixes)


def tokens_of(module: nn.Module) -> Tokens:
    """Return the tokens that meet in a network's attention; raises `UnsupportedAttentionError` where none are known."""
    from timm.layers import Attention
    from timm.models.vision_transformer import Block, VisionTransformer

    from attnlens.gpt import GPT, CausalAttention

    title = type(module).__name__
    if not isinstance(module, VisionTransformer | GPT):
        raise UnsupportedAttentionError(f"{title} cannot be rewired: pass a timm VisionTransformer or attnlens' GPT")
    wanted = CausalAttention if isinstance(module, GPT) else Attention
    for index, block in enumerate(module.blocks):
        if type(block) is not Block or type(block.attn) is not wanted:
            raise UnsupportedAttentionError(
                f"blocks.{index} is a {type(block).__name__} with {type(getattr(block, 'attn', None)).__name__}: only "
                "plain blocks are rewired, and only once; build the network again"
            )
        odd = [name for name in ("q_norm", "k_norm", "norm", "gate") if _is_present(getattr(block.attn, name, None))]
        if odd or block.attn.qkv.out_features != 3 * block.attn.num_heads * block.attn.head_dim:
            raise UnsupportedAttentionError(
                f"blocks.{index}.attn has {odd[0] if odd else 'grouped heads'}, which the theory does not know: build "
                "the network without it"
            )
    if isinstance(module, GPT):
        return Tokens(module.context, causal=True)
    patches: Any = module.patch_embed
    if getattr(patches, "dynamic_img_pad", False) or module.dynamic_img_size or _is_present(module.patch_drop):
        raise UnsupportedAttentionError(
            f"{title} sees a number of tokens that changes: build it without dynamic image sizes and patch dropout"
        )
    prefix = int(module.num_prefix_tokens)
    return Tokens(int(patches.num_patches) + prefix, causal=False, prefix=prefix, grid=tuple(patches.grid_size))


def _is_present(module: object) -> bool:
    return module is not None and not isinstance(module, nn.Identity)


def _check_mlps(blocks: Any) -> None:
    from timm.layers import Mlp

    for index, block in enumerate(blocks):
        if type(block.mlp) is not Mlp or _is_present(block.mlp.norm):
            raise UnsupportedAttentionError(
                f"blocks.{index}.mlp is a {type(block.mlp).__name__} that cannot be tailored: pass mlp='keep' or "
                "mlp='none'"
            )


def _start_attention(attention: Attention, streams: Streams, layer: int) -> None:
    """Write W_Q = 0, W_V and W_proj orthogonal, through the layout that reads them."""
    from attnlens.checkpoints import ModuleWeights
    from attnlens.layouts import read_heads, write_heads
    from attnlens.layouts.describe import attention_spec

    spec = attention_spec(attention, "")
    assert spec is not None
    tensors = ModuleWeights(attention)
    heads = read_heads(spec, tensors, layer)
    d, (H, _, k) = heads.embed_dim, heads.W_V.shape
    values = scaled_orthogonal(d, H * k, streams.generator("ov_left", layer)).numpy()
    outputs = scaled_orthogonal(H * k, heads.out_dim, streams.generator("ov_right", layer)).numpy()

    def zero(bias: Array | None) -> Array | None:
        return None if bias is None else np.zeros_like(bias)

    new = heads.replace(
        W_Q=np.zeros_like(heads.W_Q),
        W_V=values.reshape(d, H, k).transpose(1, 0, 2),
        W_O=outputs.reshape(H, k, -1),
        b_Q=zero(heads.b_Q),
        b_V=zero(heads.b_V),
        b_O=zero(heads.b_O),
    )
    write_heads(spec, new, tensors)  # type: ignore[arg-type]


def _start_mlp(mlp: Any, streams: Streams, index: int) -> None:
    for linear, purpose in ((mlp.fc1, "ov_left"), (mlp.fc2, "ov_right")):
        weight = scaled_orthogonal(linear.in_features, linear.out_features, streams.generator(purpose, index))
        with torch.no_grad():
            linear.weight.copy_(weight.mT)  # torch's Linear holds the transpose of x @ W
            if linear.bias is not None:
                linear.bias.zero_()


def _mixed(attention: Attention, mixes: Mixes, layer: int, tokens: Tokens) -> nn.Module:
    from attnlens.signal.attention import MixedAttention

    return MixedAttention(attention, mixes.layers[layer], causal=tokens.causal)


def _block(block: nn.Module, skips: bool, norms: bool, mlp: nn.Module | None) -> nn.Module:
    from attnlens.signal.attention import RewiredBlock

    return RewiredBlock(block, skips=skips, norms=norms, mlp=mlp)


def with_or_without(present: bool) -> str:
    """Return the word."""
    return "with" if present else "without"


def _ends(values: Array) -> tuple[float, float]:
    return float(values.min()), float(values.max())
