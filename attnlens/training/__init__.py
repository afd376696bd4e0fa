"""Training the same network from several initialisations under the same conditions, and what the runs allow to say."""

from attnlens.training.comparison import Comparison, train_compare

__all__ = ["Comparison", "train_compare"]
