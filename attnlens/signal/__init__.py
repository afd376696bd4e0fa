"""Faithful signal propagation: attention that keeps tokens apart in deep networks, and how to see whether it does."""

from attnlens.signal.kernels import NegativeAttentionError
from attnlens.signal.mixing import VARIANTS
from attnlens.signal.rewiring import RewireReport, rewire_

__all__ = ["VARIANTS", "NegativeAttentionError", "RewireReport", "rewire_"]
