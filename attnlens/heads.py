"""The weights of one attention layer, cut by head, in the one orientation used everywhere: row vectors, q = x @ W_Q."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from attnlens.errors import UnsupportedAttentionError
from attnlens.words import counted

if TYPE_CHECKING:  # the shapes are checked at every call while tests run: tests/conftest.py
    from jaxtyping import Float

Array = NDArray[np.float64]
Role = Literal["q", "k", "v", "o"]


@dataclass(frozen=True)
class InputNorm:
    """What a norm does to a projection's input: ``gain`` multiplies its coordinates, ``centres`` takes the mean out."""

    gain: Float[Array, " embed_dim"] | None = None
    centres: bool = False


@dataclass(frozen=True, kw_only=True, repr=False)
class HeadWeights:
    """Hold W_Q, W_K, W_V, W_O of one layer, one matrix per head.

    With x a row vector of the layer's normalised input, per head: q = x @ W_Q + b_Q, k = x @ W_K + b_K,
    logits = scale * q k^T, v = x @ W_V + b_V, and the layer returns sum_h (softmax(logits) v) @ W_O + b_O.

    Shapes: W_Q ``[head, embed_dim, head_dim]``, W_K ``[kv_head, embed_dim, head_dim]``,
    W_V ``[kv_head, embed_dim, value_dim]``, W_O ``[head, value_dim, out_dim]``; biases ``[head, width]``, b_O
    ``[out_dim]``, None where the layer has none. Query head h uses key/value head h // (num_heads / num_kv_heads); in
    differential attention W_V and W_O have half as many heads as W_Q and W_K, one for each pair of score heads.

    ``norm_gain`` ``[embed_dim]`` multiplies the input coordinates before the projections (weight of the norm
    before the layer), ``layer_scale`` ``[out_dim]`` the output coordinates. ``norm_gain`` is None where no norm
    precedes the layer; ``norm_centres`` says that norm also subtracts the mean (LayerNorm). Where q, k and v do not all
    read that norm, ``own_norms`` holds what the role ("q", "k" or "v") reads instead: see `input_norm`.

    ``W_O`` is None where no matrix maps a head's value to the output (the values are the output, or a spatial
    convolution is): there is no OV circuit. ``leaves_out`` names what the network applies beside these (``q_norm``,
    ``rope``, ...).
    """

    layer: int
    name: str
    W_Q: Float[Array, "head embed_dim head_dim"]
    W_K: Float[Array, "kv_head key_embed_dim head_dim"]
    W_V: Float[Array, "value_head value_embed_dim value_dim"]
    W_O: Float[Array, "out_head value_dim out_dim"] | None
    b_Q: Float[Array, "head head_dim"] | None = None
    b_K: Float[Array, "kv_head head_dim"] | None = None
    b_V: Float[Array, "value_head value_dim"] | None = None
    b_O: Float[Array, " out_dim"] | None = None
    norm_gain: Float[Array, " normed_dim"] | None = None
    norm_centres: bool = False
    own_norms: Mapping[str, InputNorm] = field(default_factory=dict)
    layer_scale: Float[Array, " out_dim"] | None = None
    scale: float = 1.0
    leaves_out: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        """Raise `UnsupportedAttentionError` for a weight without entries: no product can be formed of it."""
        for role, weight in self.by_role().items():
            if weight.size == 0:
                raise UnsupportedAttentionError(
                    f"{self.name or 'the layer'}: W_{role.upper()} has no entries, its shape is {list(weight.shape)}"
                )

    def __repr__(self) -> str:
        """Say the layer and its sizes."""
        sizes = f"{counted(self.num_heads, 'head')}, embed_dim {self.embed_dim}, head_dim {self.head_dim}"
        return f"<HeadWeights of layer {self.layer}, {self.name}: {sizes}>"

    @property
    def num_heads(self) -> int:
        """Number of query heads."""
        return int(self.W_Q.shape[0])

    @property
    def num_value_heads(self) -> int:
        """Number of heads of the output projection (half of ``num_heads`` in differential attention)."""
        return self.num_heads if self.W_O is None else int(self.W_O.shape[0])

    @property
    def num_kv_heads(self) -> int:
        """Number of key heads; below ``num_heads`` in grouped and multi-query attention."""
        return int(self.W_K.shape[0])

    @property
    def embed_dim(self) -> int:
        """Width of the input the projections act on."""
        return int(self.W_Q.shape[1])

    @property
    def head_dim(self) -> int:
        """Width of one head's query and key."""
        return int(self.W_Q.shape[2])

    @property
    def value_dim(self) -> int:
        """Width of one head's value."""
        return int(self.W_V.shape[2])

    @property
    def out_dim(self) -> int:
        """Width of the layer's output; without W_O, of the heads' values side by side."""
        return self.num_heads * self.value_dim if self.W_O is None else int(self.W_O.shape[2])

    def input_norm(self, role: Literal["q", "k", "v"]) -> InputNorm:
        """Return the norm whose output the projection of ``role`` reads."""
        return self.own_norms.get(role, InputNorm(self.norm_gain, self.norm_centres))

    def gain(self, role: Role) -> Array | None:
        """Return what multiplies a weight along its input (q, k, v: the norm's gain) or output (o: LayerScale) axis."""
        return self.layer_scale if role == "o" else self.input_norm(role).gain

    def by_role(self) -> dict[Role, Array]:
        """Return the weight of each role, without o where there is none."""
        found: dict[Role, Array] = {"q": self.W_Q, "k": self.W_K, "v": self.W_V}
        return found if self.W_O is None else {**found, "o": self.W_O}

    def replace(self, **changes: Any) -> HeadWeights:
        """Return a copy with some fields exchanged."""
        return replace(self, **changes)

    def arrays(self) -> dict[str, Array]:
        """Name every array that is present."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        found |= {f"norm_gain_{role}": norm.gain for role, norm in self.own_norms.items()}
        return {name: value for name, value in found.items() if isinstance(value, np.ndarray)}


def expand_groups(weights: Float[Array, "kv_head ..."], num_heads: int) -> Float[Array, "head ..."]:
    """Repeat key/value heads ``[kv_head, ...]`` so that row h is the one query head h uses: kv head h // (H / H_kv)."""
    groups = weights.shape[0]
    return weights if groups == num_heads else np.repeat(weights, num_heads // groups, axis=0)
