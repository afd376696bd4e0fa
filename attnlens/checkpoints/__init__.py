"""Where weights come from: files, hubs and live modules, opened lazily and never executed."""

from attnlens.checkpoints.files import Checkpoint, ModuleWeights, SafetensorsFile, TorchFile, open_checkpoint

__all__ = ["Checkpoint", "ModuleWeights", "SafetensorsFile", "TorchFile", "open_checkpoint"]
