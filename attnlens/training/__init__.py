"""Training the same network from several initialisations under the same conditions, and what the runs allow to say."""

from attnlens.training.comparison import train_compare
from attnlens.training.found import TrainComparison
from attnlens.training.tracking import StructureTracker

__all__ = ["StructureTracker", "TrainComparison", "train_compare"]
