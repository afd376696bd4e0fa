"""New networks of transformers: built from a folder's ``config.json``, written for ``from_pretrained``."""

from __future__ import annotations

import json
import os
import re
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from attnlens.atomic import FileSet
from attnlens.errors import AttnlensError, ModelNotFoundError, UsageError
from attnlens.inits.apply import seeded
from attnlens.memory import check_fits
from attnlens.models.architecture import modules_counted
from attnlens.models.weights import config_in
from attnlens.strict_json import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HOW = re.compile(r"_?(attn|experts)_implementation(_internal|_autoset)?|auto_map|transformers_weights|_name_or_path")
"""Fields that say how a network is computed, or where it came from: some name code, or a file. None is a size."""
_ELSEWHERE = ("backbone", "use_pretrained_backbone", "quantization_config")
_OF_TIMM = ("timm_backbone", "timm_wrapper")
"""Types of model whose fields are names and arguments of timm's."""


def build_pretrained(folder: Path, seed: int) -> PreTrainedModel:
    """Build the network a folder's ``config.json`` describes, with the weights transformers draws under ``seed``.

    The class is the first of ``architectures``, where that is one of the configuration's, else the bare model. No code
    of the folder is run, and nothing is read that its configuration names. Raises `ModelNotFoundError` where
    transformers is missing or cannot build it, and where it does not fit into memory.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ModelNotFoundError(f"{folder} is a model of transformers: pip install transformers") from error
    described = _sizes(config_in(folder), folder / "config.json")
    try:
        with tempfile.TemporaryDirectory() as alone:
            Path(alone, "config.json").write_text(json.dumps(described), encoding="utf-8")
            config = transformers.AutoConfig.from_pretrained(alone, local_files_only=True)
        config.name_or_path = str(folder)
        named: Any = getattr(transformers, (config.architectures or ["AutoModel"])[0], None)
        whole = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
        whole = whole and isinstance(config, named.config_class or ())
        build = partial(named if whole else transformers.AutoModel.from_config, config)
        with seeded(seed), torch.device("meta"), modules_counted(str(folder / "config.json")):
            check_fits(build(), f"what {folder}/config.json describes")
        with seeded(seed):
            return cast("PreTrainedModel", build())
    except AttnlensError:
        raise
    except Exception as error:  # any constructor of transformers, with whatever a file may state
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelNotFoundError(f"transformers cannot build what {folder}/config.json describes ({reason})") from error


def _sizes(stated: Any, where: Path) -> Any:
    """Return a configuration without what says how it is computed. Refuses one that names another model or its code."""
    if isinstance(stated, list):
        return [_sizes(value, where) for value in stated]
    if not isinstance(stated, dict):
        return stated
    if named := next((name for name in _ELSEWHERE if stated.get(name)), None):
        raise ModelNotFoundError(f"{where} names {named}, which is no size of a network: take it out")
    if stated.get("model_type") in _OF_TIMM:
        raise ModelNotFoundError(f"{where} holds a {stated['model_type']}: give timm's name of that network instead")
    return {name: _sizes(value, where) for name, value in stated.items() if not _HOW.fullmatch(name)}


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
    kept = os.path.lexists(beside)
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
