"""Where weights come from: files, hubs and live modules, opened lazily and never executed."""

from attnlens.checkpoints.base import Checkpoint, ModuleWeights
from attnlens.checkpoints.files import SafetensorsFile
from attnlens.checkpoints.open import open_checkpoint
from attnlens.checkpoints.torch_files import TorchFile

__all__ = ["Checkpoint", "ModuleWeights", "SafetensorsFile", "TorchFile", "open_checkpoint"]
