"""How a family of transformers models is described: stacks of equal layers, their tensors named by templates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Config = Mapping[str, Any]
Role = Literal["q", "k", "v", "o"]


def unscaled(_config: Config, _layer: int, _head_dim: int) -> float:
    """Return the scale of scores that are not scaled."""
    return 1.0


def inverse_root(_config: Config, _layer: int, head_dim: int) -> float:
    """Return the usual scale of a score, 1 / sqrt(head_dim)."""
    return float(head_dim**-0.5)


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A stack of equal layers, as `config.json` and the tensors' names speak of it.

    ``path``, the tensors ``q``, ``k``, ``v``, ``o``, ``norm`` and ``layer_scale`` are names below a prefix that the
    file itself shows, with ``{layer}`` for a layer's index and ``{before}`` for the one in front of it. Where q, k
    and v are the same tensor its rows are ``[q | k | v][head][unit]``, in the order of ``roles`` and in ``parts``
    equal parts one behind the other; or, where ``head_first`` says so, ``[kv head][its query heads | k | v][unit]``. A
    projection is stored ``[out, in]``, or ``[in, out]`` where ``stored_in_out`` says so. Biases (named as the weight,
    ``bias`` for ``weight``), LayerScale and what ``flags_stored`` names are there if the file holds them for any layer.

    ``norm`` is the norm whose output reaches the projections of ``norm_roles``; ``first_norm`` that of layer 0 where
    it is another one, and "" where there is none. Where keys and values read another one, as cross attention does, it
    is ``kv_norm``, with ``{last}`` for the last of ``source_depth`` layers. With x = g * n + b its output (n
    normalised, g the weight, b the bias), q = x @ W_Q = n @ (diag(g) W_Q) + b @ W_Q, wherever in the network that norm
    stands.

    ``heads``, ``kv_heads``, ``depth``, ``width`` and ``head_dim`` are fields of the configuration, of its section
    ``section`` where one is named; ``defaults`` hold the values a configuration that leaves them out stands for.
    ``depth`` may name several fields, of which the first that is there counts. ``within`` ends the prefix where a model
    has several stacks of the same names. ``only_if`` holds what fields must be for the stack to be this one.
    """

    path: str
    q: str
    k: str
    v: str
    o: str
    norm: str
    first_norm: str | None = None
    norm_kind: str = "layer"
    norm_roles: str = "qkv"
    kv_norm: str | None = None
    source_depth: str | tuple[str, ...] | None = None
    gain_offset: float = 0.0
    layer_scale: str | None = None
    stored_in_out: bool = False
    head_first: bool = False
    roles: str = "qkv"
    parts: int = 1

    section: str | None = None
    within: str = ""
    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    depth: str | tuple[str, ...] | None = "num_hidden_layers"
    width: str = "hidden_size"
    head_dim: str = "head_dim"
    defaults: Config = field(default_factory=dict)
    scale: Callable[[Config, int, int], float] = inverse_root
    only_if: Config = field(default_factory=dict)

    flags: tuple[str, ...] = ()
    """True of every such layer."""
    flags_set: Mapping[str, str] = field(default_factory=dict)
    """Field of the configuration -> flag, where the field is true."""
    flags_unset: Mapping[str, str] = field(default_factory=dict)
    """Field of the configuration -> flag, where the field is false or not there."""
    flags_stored: Mapping[str, str] = field(default_factory=dict)
    """Template of a tensor -> flag, where the file holds it."""

    def of_config(self, config: Config) -> Config:
        """Return the part of a configuration that speaks of this stack, defaults filled in."""
        section = config.get(self.section) if self.section else config
        given = section if isinstance(section, Mapping) else {}
        return {**self.defaults, **{name: value for name, value in given.items() if value is not None}}

    def is_of(self, config: Config) -> bool:
        """Whether a configuration, as `of_config` returns it, asks for this form of the stack."""
        return all(config.get(name) == value for name, value in self.only_if.items())

    def projections(self) -> dict[Role, str]:
        """Return the templates of the four weights."""
        return {"q": self.q, "k": self.k, "v": self.v, "o": self.o}


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models of one kind: which ``model_type`` values they carry, and their stacks in the order they are read."""

    name: str
    model_types: tuple[str, ...]
    stacks: tuple[Stack, ...]
