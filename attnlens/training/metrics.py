"""What runs are compared by: which number of a record, which way is better, and how it is written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """One measure of a trained network. Differences are always arm minus other arm, whichever way is better."""

    field: str
    """Its name in records, ``summary.json`` and ``summary.csv``."""
    title: str
    share: bool
    """Whether it is a share of 1, written in percent and its differences in points."""
    lower_is_better: bool
    better: str
    """Of an arm that has the better mean, after "was"."""
    worse: str
    unit: str
    """Of a difference."""
    nats: float | None = None
    """Nats of one, where it is the test loss in another unit; None where it is the share of targets guessed right."""

    @property
    def scale(self) -> float:
        """What a value is multiplied by when it is written or drawn."""
        return 100.0 if self.share else 1.0

    @property
    def digits(self) -> int:
        """Decimals of a written value."""
        return 1 if self.share else 3

    def of(self, record: Mapping[str, Any]) -> float | None:
        """Return the value of a record, None where the run had none that is finite."""
        value = record.get(self.field)
        return value if value is not None and math.isfinite(value) else None

    def reached(self, value: float, target: float) -> bool:
        """Whether a value is at least as good as the target."""
        return value <= target if self.lower_is_better else value >= target

    def favours(self, difference: float) -> bool:
        """Whether a difference speaks for the first arm."""
        return difference < 0 if self.lower_is_better else difference > 0

    def worst_first(self, value: float) -> float:
        """Return a key by which worse values come before better ones."""
        return -value if self.lower_is_better else value

    def number(self, value: float) -> str:
        """Write a value as a bare number."""
        return "none" if math.isnan(value) else f"{self.scale * value:.{self.digits}f}"

    def value(self, value: float) -> str:
        """Write a value with its unit."""
        return "none" if math.isnan(value) else f"{self.number(value)}{'%' if self.share else ''}"

    def difference(self, value: float) -> str:
        """Write a difference with its sign."""
        return "none" if math.isnan(value) else f"{self.scale * value:+.{self.digits}f}"


ACCURACY = Metric("accuracy", "test accuracy", True, False, "more accurate", "less accurate", "points")
BALANCED_ACCURACY = Metric(
    "balanced_accuracy", "balanced test accuracy", True, False, "more accurate", "less accurate", "points"
)
"""The mean, over the classes that are tested, of the share of a class that is guessed right."""
BITS_PER_BYTE = Metric(
    "bits_per_byte",
    "test bits per byte",
    False,
    True,
    "better at predicting",
    "worse at predicting",
    "bits per byte",
    math.log(2),
)
"""Mean -log2 of the probability given to the byte that came: the test loss in nats over ln 2. Lower is better."""
