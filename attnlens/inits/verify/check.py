"""One comparison of a network with what an initialiser makes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

MATRIX_TOLERANCE = 1e-5
"""||M - A|| / ||A|| at which a product still is the requested one, in float32; narrower types get 4 of their eps."""


@dataclass(frozen=True)
class Check:
    """One product, with circuit ``bias`` a layer's biases, with ``filters`` its depthwise filters, and what was found.

    ``matrix_error`` is ||M - A|| / ||A|| (for biases the largest deviation), NaN where no draw is known to compare
    with; then alpha and beta decide, within their tolerances of the expected ones, and for filters the error of their
    covariance, ||S - Sigma|| / ||Sigma||, within what draws of other seeds have. ``problem`` says what is wrong,
    empty where nothing is; ``mistake`` is one of `MISTAKES` where it is one of them.
    """

    layer: int
    name: str
    circuit: str
    head: int | str
    requested_alpha: float = math.nan
    requested_beta: float = math.nan
    expected_alpha: float = math.nan
    expected_beta: float = math.nan
    alpha: float = math.nan
    beta: float = math.nan
    alpha_tolerance: float = math.nan
    beta_tolerance: float = math.nan
    matrix_error: float = math.nan
    matrix_tolerance: float = math.nan
    requested_kurtosis: float = math.nan
    kurtosis: float = math.nan
    problem: str = ""
    mistake: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problem


def stored_eps(stored: Any) -> float:
    """Return the relative rounding error of the type an array or tensor is stored in."""
    import torch

    if isinstance(stored, torch.Tensor):
        return float(torch.finfo(stored.dtype).eps)
    import ml_dtypes

    return float(ml_dtypes.finfo(stored.dtype).eps)
