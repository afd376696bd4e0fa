"""Between a network's raw weights and the coordinates an initialiser works in.

In effective coordinates the norm's gain and LayerScale are part of the product:

    W_Q_eff = diag(g_q) W_Q,   W_K_eff = diag(g_k) W_K,   W_V_eff = diag(g_v) W_V,   W_O_eff = W_O diag(s)

so a network has the planned effective product when each planned weight is divided by its gain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnlens.circuits import Fold
from attnlens.errors import AttnlensError
from attnlens.heads import Array, HeadWeights, Role
from attnlens.layouts import AttentionSpec
from attnlens.layouts.read_write import Tensors

_USABLE = 1e-3
"""Share of the largest entry below which a gain or LayerScale entry is not divided by."""
_SMALL = 0.05
"""Largest entry below which a gain or LayerScale is worth a warning: a fresh network's 1e-5 is."""


_GAINS: dict[Role, str] = {"q": "norm gain", "k": "norm gain", "v": "norm gain", "o": "LayerScale"}


class UnusableScaleError(AttnlensError, ValueError):
    """A gain or LayerScale that an effective product would have to be divided by is zero."""


class Gain(NamedTuple):
    """What multiplies a weight along its input (q, k, v) or output (o) axis, and where it can be divided by."""

    values: Array
    usable: NDArray[np.bool_]

    def inverse(self) -> Array:
        """Return 1 / values, 0 where the entry is not usable."""
        return np.divide(1.0, self.values, out=np.zeros_like(self.values), where=self.usable)


def coordinates(fold: Fold) -> Fold:
    """Return the fold whose products a rule's factors multiply to: a rule of balanced products plans effective ones."""
    return "effective" if fold == "balanced" else fold


def gains(weights: HeadWeights, fold: Fold) -> dict[str, Gain]:
    """Return the gain of each role under a fold; roles without one are left out.

    Raises `UnusableScaleError` where a gain or LayerScale is zero all over, or where the preceding norm is not known.
    """
    if fold == "raw":
        return {}
    if "norm_unknown" in weights.leaves_out:
        raise UnusableScaleError(
            f"{weights.name}: fold = 'effective' needs the preceding norm, which is not known. Pass fold='raw'."
        )
    found: dict[str, Gain] = {}
    for role, label in _GAINS.items():
        values = weights.gain(role)
        if values is None:
            continue
        largest = np.abs(values).max()
        if largest == 0:
            raise UnusableScaleError(
                f"{weights.name}: its {label} is zero, so no weights give it the requested effective product. "
                f"Set it first, or pass fold='raw'."
            )
        found[role] = Gain(values, np.abs(values) >= _USABLE * largest)
    return found


def silent_roles(spec: AttentionSpec, tensors: Tensors) -> frozenset[str]:
    """Return the roles behind which a BatchNorm multiplies by zero: no weight can set their product."""
    silent = set()
    for role, slot in spec.slots().items():
        for name in slot.named(slot.batch_norm) if slot.batch_norm else ():
            if bool((tensors[f"{name}.weight"] == 0).any()):
                silent.add(role)
    return frozenset(silent)


def scaled(role: str, weight: Array, factor: Array) -> Array:
    """Multiply the side of a weight that its gain acts on: rows of W_Q, W_K, W_V, columns of W_O."""
    return weight * factor if role == "o" else weight * factor[:, None]


def folded(weights: HeadWeights, fold: Fold) -> dict[str, Array]:
    """Return a layer's weights by role in the coordinates of a fold."""
    by = gains(weights, fold)
    return {
        role: scaled(role, weight, by[role].values) if role in by else weight
        for role, weight in weights.by_role().items()
    }


def unfolded(planned: Mapping[str, Array], by: Mapping[str, Gain]) -> dict[str, Array]:
    """Return raw weights that have the planned ones in the fold's coordinates."""
    return {
        role: scaled(role, weight, by[role].inverse()) if role in by else weight for role, weight in planned.items()
    }


def folding_notes(by: Mapping[str, Gain], roles: Mapping[str, Array]) -> tuple[str, ...]:
    """Say which coordinates could not be set because their gain is too small."""
    notes = []
    for role, label in _GAINS.items():
        if role not in roles or role not in by:
            continue
        values, usable = by[role]
        if not usable.all():
            notes.append(
                f"{int((~usable).sum())} of {values.size} entries of the {label} of {role} are below {_USABLE} of the "
                "largest: the product is left at zero there"
            )
        largest = np.abs(values).max()
        if largest < _SMALL:
            notes.append(
                f"the {label} of {role} is at most {largest:.1g}: the stored weights are as much larger as it is "
                "smaller than 1. Set it near 1 before, or training it multiplies the product"
            )
    return tuple(notes)
