"""Faithful signal propagation: attention that keeps tokens apart in deep networks, and how to see whether it does."""

from attnlens.signal.kernels import NegativeAttentionError
from attnlens.signal.rewire import RewireReport, rewire_
from attnlens.signal.variants import VARIANTS

__all__ = ["VARIANTS", "NegativeAttentionError", "RewireReport", "rewire_"]
