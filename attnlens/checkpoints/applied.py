"""The weights a network applies, where a file stores what they are made from: codes and scales, g and v, adapters.

Each form is a closed formula; what is no formula of the file alone (an adapter whose scale is not stored, packed codes)
is refused by name when the tensor is asked for. Each view hides what it used, so that views follow one another: codes
first, then parametrizations, then adapters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from attnlens.checkpoints.base import Checkpoint
from attnlens.checkpoints.codes import dequantised
from attnlens.checkpoints.low_rank import adapted
from attnlens.checkpoints.parametrized import reparametrised

_PLAIN = frozenset(("weight", "bias", "num_batches_tracked", "input_scale", "output_scale", "k_scale", "v_scale"))
"""Names inside a projection's module that do not change its weight."""
_ADAPTERS = re.compile(r"lora|ia3|hada_|lokr|oft_|vera_|adapter|dora", re.IGNORECASE)


def as_applied(stored: Checkpoint, about: Callable[[], Mapping[str, Any]] = dict) -> Checkpoint:
    """Return the weights the network applies.

    ``about`` gives what configurations beside the file say: ``quantization_config`` of a model, and the ``adapter`` of
    PEFT; it is called where it is needed. A checkpoint that stores its weights themselves is returned as it is.
    """
    return adapted(reparametrised(dequantised(stored, about)), about)


def unread_beside(checkpoint: Checkpoint, projections: Iterable[str], known: Iterable[str]) -> str | None:
    """Say what stands inside a projection's module, or is an adapter in its attention, and would not be looked at.

    ``known`` are the tensors that are read. None where there is nothing of the kind.
    """
    read = {*known}
    modules = {name.removesuffix(".weight"): name for name in projections if name.endswith(".weight")}
    blocks = {module.rpartition(".")[0]: name for module, name in modules.items()}
    around = {**blocks, **modules}
    lengths = sorted({len(path) for path in around}, reverse=True)
    for name in checkpoint:
        if name in read:
            continue
        module, _, leaf = name.rpartition(".")
        if module in modules and leaf in _PLAIN:
            continue
        adapter = _ADAPTERS.search(name.removeprefix(module.rpartition(".")[0])) is not None
        homes = around if adapter else modules
        above = (name[:length] for length in lengths if name[length : length + 1] == ".")
        inside = next((homes[path] for path in above if path in homes), None)
        if inside is not None:
            return f"{name} stands beside {inside} and may change what the network applies"
    return None
