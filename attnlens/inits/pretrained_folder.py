"""New networks of transformers: built from a folder's ``config.json``, written for ``from_pretrained``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnlens.atomic import FileSet
from attnlens.errors import ModelNotFoundError, UsageError
from attnlens.inits.apply import seeded
from attnlens.strict_json import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build_pretrained(folder: Path, seed: int) -> PreTrainedModel:
    """Build the network a folder's ``config.json`` describes, with the weights transformers draws under ``seed``.

    The class is the first of ``architectures``, else the bare model. No code of the folder is run. Raises
    `ModelNotFoundError` where transformers is missing or does not know it.
    """
    try:
        import transformers
    except ImportError as error:
        raise ModelNotFoundError(f"{folder} is a model of transformers: pip install transformers") from error
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        named: Any = getattr(transformers, (config.architectures or ["AutoModel"])[0], None)
        with seeded(seed):
            if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
                return named(config)
            return transformers.AutoModel.from_config(config)
    except (ValueError, OSError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ModelNotFoundError(f"transformers cannot build what {folder}/config.json describes ({reason})") from error


def save_pretrained(model: PreTrainedModel, output: str | os.PathLike[str], metadata: dict[str, str]) -> None:
    """Write weights under the names `save_pretrained` gives them, and ``config.json`` beside them, as one set.

    A ``config.json`` that is there already stays as it is. Raises `UsageError` where it is another.
    """
    from safetensors.torch import save
    from transformers.core_model_loading import revert_weight_conversion

    path = Path(output)
    beside = path.parent / "config.json"
    model.config.architectures = [type(model).__name__]
    config = model.config.to_json_string()
    kept = beside.exists()
    if kept and not _same(beside, config):
        raise UsageError(f"{beside} is there and describes another model: name a file in another folder with --output")
    state = revert_weight_conversion(model, dict(model.state_dict()))
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    with FileSet() as files:
        files.write(path, lambda file: file.write(save(tensors, metadata)))
        if not kept:
            files.write(beside, lambda file: file.write(config.encode()))


def _same(path: Path, config: str) -> bool:
    try:
        return read_json(path) == json.loads(config)
    except (OSError, ValueError):
        return False
