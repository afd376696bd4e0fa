"""The layout families in words, for tables and help."""

from __future__ import annotations

FAMILIES = {
    "A": "fused `qkv` with rows q, k, v, each head by head, and `proj`: the standard",
    "A-nest": "as A, but the columns of `proj` are interleaved over heads",
    "B1": "`q_proj`, `k_proj`, `v_proj`, with grouped heads among them",
    "B2": "three projections of other names, class attention among them",
    "B3": "`q` and a fused `kv`",
    "B4": "a fused `qk` and `v`",
    "P": "attention pooling: the query is a learned latent or the mean token",
    "C1": "fused `qkv` with each head's q, k, v together: the names of A, other rows",
    "C2": "parallel block: one projection for the MLP and q, k, v",
    "C3": "fused 1x1 convolution",
    "C4": "1x1 convolutions of their own for q, k, v, multi-query among them",
    "C5": "channel attention: the product acts between channels, never between tokens",
    "C6": "linear attention: no softmax over the product",
    "C7": "no pairwise product of queries and keys",
    "C8": "differential attention: two score maps a head",
    "C9": "cascaded group attention: a head reads the one before it",
    "C10": "GCViT's global blocks: queries come from a feature generator",
    "MHA": "`torch.nn.MultiheadAttention`, as torchvision's `vit_*` use it",
}
"""Every family of `layouts`, in the order of the tables."""
