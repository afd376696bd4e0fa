"""New networks of transformers: built from a folder's ``config.json``, written for ``from_pretrained``."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from attnlens.atomic import FileSet
from attnlens.errors import AttnlensError, ModelNotFoundError, UsageError
from attnlens.inits.apply import seeded
from attnlens.memory import free_memory, in_words
from attnlens.models.architecture import modules_counted
from attnlens.strict_json import read_json, there

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build_pretrained(folder: Path, seed: int) -> PreTrainedModel:
    """Build the network a folder's ``config.json`` describes, with the weights transformers draws under ``seed``.

    The class is the first of ``architectures``, else the bare model. No code of the folder is run. Raises
    `ModelNotFoundError` where transformers is missing or cannot build it, and where it does not fit into memory.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ModelNotFoundError(f"{folder} is a model of transformers: pip install transformers") from error
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        named: Any = getattr(transformers, (config.architectures or ["AutoModel"])[0], None)
        whole = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
        build = partial(named if whole else transformers.AutoModel.from_config, config)
        with seeded(seed), torch.device("meta"), modules_counted(str(folder / "config.json")):
            _check_fits(build(), folder)
        with seeded(seed):
            return cast("PreTrainedModel", build())
    except AttnlensError:
        raise
    except Exception as error:  # any constructor of transformers, with whatever a file may state
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelNotFoundError(f"transformers cannot build what {folder}/config.json describes ({reason})") from error


def _check_fits(model: PreTrainedModel, folder: Path) -> None:
    size, free = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())), free_memory()
    if free is not None and size > free:
        raise ModelNotFoundError(
            f"{folder}/config.json describes a model of {in_words(size)}, and {in_words(free)} of memory are free: "
            "make it smaller"
        )


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
    kept = there(beside.exists)
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
