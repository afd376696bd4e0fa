"""The weights a network applies, where a file stores what they are made from: codes and scales, g and v, adapters.

Each form is a closed formula; what is no formula of the file alone (an adapter whose scale is not stored, packed codes)
is refused by name when the tensor is asked for. A view hides what it used, so that views follow one another: codes
first, then parametrizations, then adapters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnlens.checkpoints.base import Checkpoint
from attnlens.errors import CheckpointError

Values = NDArray[np.float64]
_PLAIN = frozenset(("weight", "bias", "num_batches_tracked", "input_scale", "output_scale", "k_scale", "v_scale"))
"""Names inside a projection's module that do not change its weight."""
_ADAPTERS = re.compile(r"lora|ia3|hada_|lokr|oft_|vera_|adapter|dora", re.IGNORECASE)


@dataclass(frozen=True)
class Recipe:
    """A tensor made from stored ones: their names, its shape, the formula."""

    parts: tuple[str, ...]
    shape: tuple[int, ...]
    formula: Callable[..., Values]


@dataclass
class _Plan:
    """What a view changes: tensors that are made, refused with a reason, renamed, hidden."""

    stored: Checkpoint
    made: dict[str, Recipe] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)

    def make(self, name: str, parts: tuple[str, ...], shape: tuple[int, ...], formula: Callable[..., Values]) -> None:
        self.made[name] = Recipe(parts, shape, formula)
        self.hidden |= {*parts} - {name}

    def view(self, how: str) -> Checkpoint:
        return AppliedWeights(self, how) if self.made or self.refused else self.stored


class AppliedWeights(Checkpoint):
    """A checkpoint some of whose tensors are computed, in float64; its provenance says how."""

    def __init__(self, plan: _Plan, how: str) -> None:
        self._stored, self._made, self._refused, self._how = plan.stored, plan.made, plan.refused, how
        gone = plan.hidden
        self._names = dict.fromkeys([*(n for n in plan.stored if n not in gone), *plan.made, *plan.refused])
        self.metadata = plan.stored.metadata
        self.computed = (*plan.stored.computed, *([how] if plan.made else []))
        fronts = {name.rpartition(".")[0]: front for name, front in plan.stored.keys_in_front.items()}
        new = {name: fronts.get(name.rpartition(".")[0], "") for name in plan.refused}
        new |= {name: plan.stored.keys_in_front.get(made.parts[0], "") for name, made in plan.made.items()}
        self.keys_in_front = {**new, **plan.stored.keys_in_front} if fronts else {}

    def provenance(self) -> dict[str, Any]:
        """Return the origin's provenance, and how tensors were computed."""
        return {**self._stored.provenance(), **({"computed": list(self.computed)} if self.computed else {})}

    def size(self) -> int:
        """Return the bytes on disk."""
        return self._stored.size()

    def expect(self, names: Iterable[str]) -> None:
        """Tell the origin which of its tensors will be asked for."""
        parts = [self._made[name].parts if name in self._made else (name,) for name in names]
        self._stored.expect([part for several in parts for part in several])

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape. Raises `CheckpointError` for one that cannot be computed."""
        self._check(name)
        return self._made[name].shape if name in self._made else self._stored.shape(name)

    def _check(self, name: str) -> None:
        if name in self._refused:
            raise CheckpointError(f"{name} {self._refused[name]}")

    def __getitem__(self, name: str) -> Any:
        """Return a tensor, computed where it must be. Raises `CheckpointError` for one that cannot be computed."""
        self._check(name)
        if name not in self._made:
            return self._stored[name]
        recipe = self._made[name]
        try:
            with np.errstate(all="ignore"):  # what is not finite is told by the reader of heads, with the name
                values = recipe.formula(*(_values(self._stored[part]) for part in recipe.parts))
            return np.ascontiguousarray(np.broadcast_to(values, recipe.shape))
        except (ValueError, IndexError) as error:
            shapes = ", ".join(f"{part} {self._stored.shape(part)}" for part in recipe.parts)
            raise CheckpointError(f"{name} cannot be computed ({self._how}): the shapes of {shapes} differ") from error

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of that name; nothing is read."""
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._names)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._names)


def _values(stored: Any) -> Values:
    """Widen to float64, integer codes too."""
    if not isinstance(stored, np.ndarray):
        stored = stored.detach().cpu().double().numpy()
    return np.asarray(stored, dtype=np.float64)


def as_applied(stored: Checkpoint, about: Callable[[], Mapping[str, Any]] = dict) -> Checkpoint:
    """Return the weights the network applies.

    ``about`` gives what configurations beside the file say: ``quantization_config`` of a model, and the ``adapter`` of
    PEFT; it is called where it is needed. A checkpoint that stores its weights themselves is returned as it is.
    """
    return _adapted(_reparametrised(_dequantised(stored, about)), about)


DEQUANTISED = "de-quantised by the scales beside the codes"

# Codes. The scale's name, what codes are divided by beside it, and what wrote it.
_SCALES = {
    "SCB": (127.0, "int8 codes * SCB / 127 (bitsandbytes)"),
    "weight_scale": (1.0, "codes * weight_scale"),
    "weight_scale_inv": (1.0, "codes * weight_scale_inv"),
    "scale_weight": (1.0, "codes * scale_weight"),
}
_PACKED = {
    "qweight": "is stored as packed codes (GPTQ or AWQ)",
    "weight_packed": "is stored as packed codes (compressed-tensors)",
    "weight.absmax": "is stored as 4-bit codes (bitsandbytes)",
    "weight.quant_map": "is stored as 4-bit codes (bitsandbytes)",
    "codebooks": "is stored as codes of a codebook (AQLM)",
    "weight_scale_2": "is stored as 4-bit codes with scales of two levels",
    "weight_global_scale": "is stored as 4-bit codes with scales of two levels",
    "weight._data": "is stored as codes (quanto)",
}
_ORIGINAL = ": give the model it was quantised from, or de-quantise and save it with the library that wrote it"


def _dequantised(stored: Checkpoint, about: Callable[[], Mapping[str, Any]]) -> Checkpoint:
    plan = _Plan(stored)
    for name in stored:
        module, _, leaf = name.rpartition(".")
        for packed, what in _PACKED.items():
            if name.endswith(f".{packed}"):
                plan.refused[name.removesuffix(packed) + "weight"] = what + _ORIGINAL
        if leaf not in _SCALES or f"{module}.weight" not in stored:
            continue
        codes = f"{module}.weight"
        shape, scales = stored.shape(codes), stored.shape(name)
        divisor, how = _SCALES[leaf]
        if f"{module}.weight_scale_2" in stored:
            continue
        quantised = about().get("quantization_config")
        block = quantised.get("weight_block_size") if isinstance(quantised, dict) else None
        sizes = _block_sizes(shape, scales, block)
        if sizes is None:
            plan.refused[codes] = f"has shape {shape} and its {leaf} shape {scales}, of which no rule is known{_ORIGINAL}"
            continue
        parts = (codes, name)
        zero = f"{module}.weight_zero_point"
        form = f"{module}.weight_format"
        if leaf == "SCB" and (form not in stored or float(_values(stored[form]).max(initial=-1.0)) != 0.0):
            plan.refused[codes] = (
                "is stored as codes with SCB, and without the weight_format 0 beside it by which bitsandbytes says that its "
                f"rows are divided by 127{_ORIGINAL}"
            )
            continue
        if zero in stored:
            plan.make(codes, (*parts, zero), shape, lambda w, s, z, n=shape, b=sizes: (w - _spread(z, n, b)) * _spread(s, n, b))
        else:
            plan.make(codes, parts, shape, lambda w, s, n=shape, b=sizes, d=divisor: w * _spread(s, n, b) / d)
        plan.hidden |= {form} if form in stored else set()
        plan.refused.pop(codes, None)
    return plan.view(DEQUANTISED)


def _block_sizes(shape: tuple[int, ...], scales: tuple[int, ...], block: Any) -> tuple[int, int] | None:
    """Return the rows and columns of a matrix that share a scale; None where the shapes leave it open."""
    if len(shape) != 2:
        return None
    rows, columns = shape
    if not scales or np.prod(scales) == 1:
        return rows, columns
    if scales in ((rows,), (rows, 1)):
        return 1, columns
    if len(scales) != 2 or 0 in scales:
        return None
    known = block if isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block) else None
    fits = (known or [128, 128],)
    for high, wide in fits:
        if (-(-rows // high), -(-columns // wide)) == scales:
            return high, wide
    if known is None and rows % scales[0] == 0 and columns % scales[1] == 0:
        return rows // scales[0], columns // scales[1]
    return None


def _spread(scales: Values, shape: tuple[int, ...], block: tuple[int, int]) -> Values:
    """Return scales of blocks for every entry; the last blocks may be cut."""
    grid = scales.reshape(-1, 1) if scales.ndim < 2 else scales
    return np.repeat(np.repeat(grid, block[0], 0), block[1], 1)[: shape[0], : shape[1]]


_PARAMETRIZED = re.compile(r"^(?P<stem>.*\.parametrizations\.\w+)\.(?P<part>.+)$")


def _reparametrised(stored: Checkpoint) -> Checkpoint:
    plan = _Plan(stored)
    listed: dict[str, set[str]] = {}
    for name in stored:
        if found := _PARAMETRIZED.match(name):
            listed.setdefault(found["stem"], set()).add(found["part"])
    for name in stored:
        if name.endswith("weight_g") and f"{name[:-1]}v" in stored:
            _weight_norm(plan, name.removesuffix("_g"), name, f"{name[:-1]}v")
        elif ".parametrizations." in name and name.endswith((".original0", ".original")):
            _parametrised(plan, name, listed)
        elif name.endswith("_orig"):
            _wrapped(plan, name.removesuffix("_orig"))
    return plan.view("weight_norm, spectral_norm and masks applied")


def _weight_norm(plan: _Plan, target: str, g: str, v: str) -> None:
    """weight = g v / |v|, the norm taken over every axis along which g has one entry."""
    shape = plan.stored.shape(v)
    axes = tuple(axis for axis, size in enumerate(plan.stored.shape(g)) if size == 1)
    if len(plan.stored.shape(g)) != len(shape):
        axes = tuple(range(len(shape)))
    plan.make(target, (g, v), shape, lambda g, v: g * v / np.sqrt((v * v).sum(axis=axes, keepdims=True)))


def _parametrised(plan: _Plan, name: str, listed: Mapping[str, set[str]]) -> None:
    """Apply torch's own parametrizations that are one formula: weight_norm and spectral_norm."""
    stem, _, leaf = name.rpartition(".")
    target, others = stem.replace(".parametrizations.", "."), listed.get(stem, set())
    if leaf == "original0" and others == {"original0", "original1"}:
        _weight_norm(plan, target, name, f"{stem}.original1")
    elif others == {"original", "0._u", "0._v"}:
        _spectral_norm(plan, target, name, f"{stem}.0._u", f"{stem}.0._v")
    else:
        plan.refused[target] = (
            f"is computed from {', '.join(sorted(others))[:100]} by a parametrization that the file does not name: save "
            "the network after torch.nn.utils.parametrize.remove_parametrizations"
        )


def _spectral_norm(plan: _Plan, target: str, original: str, u: str, v: str) -> None:
    """weight = W / (u^T W v), as in evaluation: u and v are stored."""
    shape = plan.stored.shape(original)
    if len(shape) < 2 or plan.stored.shape(u) != shape[:1]:
        plan.refused[target] = "is under spectral_norm of another axis than the first: remove it before saving"
        return
    plan.make(target, (original, u, v), shape, lambda w, u, v: w / (u @ w.reshape(len(u), -1) @ v))


def _wrapped(plan: _Plan, target: str) -> None:
    """Apply what keeps the stored weight as ``_orig``: masks of pruning, torch's older spectral_norm."""
    original, mask, u, v = (f"{target}_{end}" for end in ("orig", "mask", "u", "v"))
    held = {name for name in (mask, u, v) if name in plan.stored}
    if held == {mask}:
        plan.make(target, (original, mask), plan.stored.shape(original), lambda w, m: w * m)
    elif held == {u, v}:
        _spectral_norm(plan, target, original, u, v)
    else:
        plan.refused[target] = f"is stored as {original} and what it is made of is not: save the network's own weights"


# Adapters of low rank: ends of the names of A and B, in loralib, PEFT and kohya's files.
_LOW_RANK = re.compile(r"^(?P<stem>.+?)\.(?P<end>lora_A|lora_down)(?P<kind>(\.\w+)?\.weight|)$")
_MERGE = ": merge it (peft's merge_and_unload, loralib's eval()) and save the merged weights without it"


def _adapted(stored: Checkpoint, about: Callable[[], Mapping[str, Any]]) -> Checkpoint:
    plan = _Plan(stored)
    stated: Any = None
    bases: dict[str, str] = {}
    for name in stored:
        if name.endswith((".base_layer.weight", ".base_layer.bias")):
            own = name.replace(".base_layer.", ".")
            bases[own] = name
            plan.make(own, (name,), stored.shape(name), lambda w: w)
    seen: dict[str, str] = {}
    for name in stored:
        low = _LOW_RANK.match(name)
        target = f"{low['stem']}.weight" if low else ""
        if low and target in seen:
            plan.made.pop(target, None)
            plan.refused[target] = f"has several adapters beside it ({seen[target]}, {name}){_MERGE}"
        elif low:
            seen[target] = name
            stated = about().get("adapter") if stated is None else stated
            config = stated if isinstance(stated, dict) else {}
            _low_rank(plan, low, bases.get(target, target), config)
    for name in stored:
        if ".ia3_l" in name:
            _ia3(plan, name, bases)
    return plan.view("adapters merged")


def _low_rank(plan: _Plan, found: re.Match[str], base: str, config: Mapping[str, Any]) -> None:
    """weight = W + scale B A; with a magnitude (DoRA) its rows are rescaled to that length."""
    stored, stem, a = plan.stored, found["stem"], found[0]
    b = f"{stem}.{found['end'].replace('_A', '_B').replace('down', 'up')}{found['kind']}"
    target, layer = f"{stem}.weight", stem
    if base not in stored or b not in stored:
        plan.refused[target] = f"has an adapter {a} beside it, and not all that belongs to it{_MERGE}"
        return
    shape, low, high = stored.shape(base), stored.shape(a), stored.shape(b)
    alpha = next((n for n in (f"{stem}.alpha", f"{stem}.lora_alpha") if n in stored), None)
    scaling = f"{stem}.scaling" if f"{stem}.scaling" in stored else None
    rank = low[0] if low else 0
    scale = _stated_scale(config, layer, rank)
    if alpha is None and scaling is None and scale is None:
        plan.refused[target] = (
            f"has an adapter beside it ({a}, {b}) whose scale alpha / r is not in the file{_MERGE}; a PEFT folder with its "
            "adapter_config.json states the scale"
        )
        return
    turned = bool(config.get("fan_in_fan_out"))
    rows, columns = shape[::-1] if turned and len(shape) == 2 else shape if len(shape) == 2 else (0, 0)
    if len(low) != 2 or len(high) != 2 or (high[0], high[1], low[1]) != (rows, low[0], columns):
        plan.refused[target] = f"has shape {shape}, and its adapter shapes {high} and {low}, which do not multiply{_MERGE}"
        return
    ends = ("", ".weight", found["kind"].removesuffix(".weight"), found["kind"])
    magnitude = next((n for end in ends if (n := f"{stem}.lora_magnitude_vector{end}") in stored), None)
    extra = scaling or alpha
    parts = (base, a, b, *([extra] if extra else []), *([magnitude] if magnitude else []))
    by_rank = extra == alpha and extra is not None

    def merged(w: Values, a: Values, b: Values, *more: Values) -> Values:
        factor = float(more[0].reshape(-1)[0]) / (rank if by_rank else 1) if extra else scale
        change = factor * (b @ a)
        found = w + (change.T if turned else change)
        if not magnitude:
            return found
        lengths = np.sqrt((found * found).sum(axis=0 if turned else 1, keepdims=True))
        return found * more[-1].reshape(lengths.shape) / lengths

    plan.make(target, parts, shape, merged)


def _stated_scale(config: Mapping[str, Any], layer: str, rank: int) -> float | None:
    """Return alpha / r, or alpha / sqrt(r), that an ``adapter_config.json`` states for a layer; None without one."""
    alpha: Any = config.get("lora_alpha")
    patterns = config.get("alpha_pattern")
    for pattern, own in patterns.items() if isinstance(patterns, dict) else ():
        alpha = own if layer == pattern or layer.endswith(f".{pattern}") else alpha
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or rank < 1:
        return None
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _ia3(plan: _Plan, name: str, bases: Mapping[str, str]) -> None:
    """Scale rows (and the bias) by an IA3 vector ``[out, 1]``, or columns by one ``[1, in]``."""
    stem = name.partition(".ia3_l")[0]
    target, bias = f"{stem}.weight", f"{stem}.bias"
    base, vector = bases.get(target, target), plan.stored.shape(name)
    if target in plan.refused or base not in plan.stored:
        return
    shape = plan.stored.shape(base)
    already = plan.made.get(target)
    several = already is not None and already.parts != (base,)
    if several or len(shape) != 2 or vector not in ((shape[0], 1), (1, shape[1])):
        plan.refused[target] = f"has an adapter {name} of shape {vector} beside it{_MERGE}"
        return
    plan.make(target, (base, name), shape, lambda w, scale: w * scale)
    own_bias = bases.get(bias, bias)
    if vector == (shape[0], 1) and own_bias in plan.stored:
        plan.make(bias, (own_bias, name), plan.stored.shape(own_bias), lambda b, scale: b * scale[:, 0])


def unread_beside(checkpoint: Checkpoint, projections: Iterable[str], known: Iterable[str]) -> str | None:
    """Say what stands inside a projection's module, or is an adapter in its attention, and would not be looked at.

    ``known`` are the tensors that are read. None where there is nothing of the kind.
    """
    read = {*known}
    modules = {name.removesuffix(".weight"): name for name in projections if name.endswith(".weight")}
    blocks = {module.rpartition(".")[0]: name for module, name in modules.items()}
    for name in checkpoint:
        if name in read:
            continue
        module, _, leaf = name.rpartition(".")
        inside, path = modules.get(module), module
        adapter = _ADAPTERS.search(name.removeprefix(module.rpartition(".")[0])) is not None
        while adapter and path and inside is None:
            inside = modules.get(path) or blocks.get(path)
            path = path.rpartition(".")[0]
        if inside is not None and (adapter or leaf not in _PLAIN):
            return f"{name} stands beside {inside} and may change what the network applies"
    return None
