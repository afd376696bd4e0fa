"""How far the tools' numbers lie apart: nothing is timed before they agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from benchmarks.suite.methods import TOOLS, Found

Apart = dict[str, float]


def limit(tool: str, task: str) -> float:
    """Return the largest difference accepted: half the digits of the type the tool rounds to."""
    return float(np.sqrt(np.finfo(np.float32 if task in TOOLS[tool].single else np.float64).eps))


def differences(found: Found, reference: Found, embed_dim: int) -> Apart:
    """Return the largest difference over heads of each quantity found, relative to the head's own scale.

    Scales: ||M||_F for the norm, ||M||_F / sqrt(d) for the mean diagonal (so that the quotient is an error in the
    identity cosine), the largest singular value, the largest modulus of an eigenvalue. Eigenvalues have no order: they
    are matched so that the sum of distances is least.
    """
    apart: dict[str, Any] = {}
    for name, values in found.items():
        wanted = reference[name]
        if name == "eigenvalues":
            pairs = zip(values, wanted, strict=True)
            apart[name] = max(unordered(ours, theirs) / np.abs(theirs).max() for ours, theirs in pairs)
        elif name == "singular":
            apart[name] = (np.abs(values - wanted[:, : values.shape[1]]) / wanted[:, :1]).max()
        else:
            scale = reference["norm"] / (np.sqrt(embed_dim) if name == "mean_diagonal" else 1)
            apart[name] = (np.abs(values - wanted) / scale).max()
    return {name: float(value) for name, value in apart.items()}


def unordered(ours: Any, theirs: Any) -> float:
    """Return the largest distance between two sets of complex numbers, matched."""
    distances = cdist(*(np.stack([values.real, values.imag], axis=1) for values in (ours, theirs)))
    return float(distances[linear_sum_assignment(distances)].max())


def disagreements(apart: Mapping[str, Mapping[str, Apart]]) -> list[str]:
    """Name, of what is known by task and tool, every quantity that is further apart than `limit` allows."""
    return [
        f"{task}, {tool}: {quantity} is {value:.1e} apart, more than {limit(tool, task):.1e}"
        for task, tools in apart.items()
        for tool, quantities in tools.items()
        for quantity, value in quantities.items()
        if not value <= limit(tool, task)  # NaN is a disagreement
    ]
