"""The arms of a comparison: what each starts from, given a seed and the pre-trained source model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnlens.training.families import build
from attnlens.training.network import DRAWING
from attnlens.training.shapes import AnyShape, Shape
from attnlens.training.source import Scratch, Source, source_weights
from attnlens.training.starts import PRETRAINED, start_of

if TYPE_CHECKING:
    from torch import Tensor


DEFAULT_ARMS = ("default", "mimetic", "fitted", "pretrained", "norm-matched", "norm-matched-mimetic")
CONTROLS = {"fitted": "norm-matched", "mimetic": "norm-matched-mimetic"}
"""The arm with another's singular values and random singular vectors."""


def initial_state(arm: str, seed: int, shape: AnyShape, source: Source | Scratch) -> dict[str, Tensor]:
    """Return the weights and buffers an arm starts from: those of its network under ``seed``, initialised.

    Arms of one architecture and seed differ in what their initialiser writes alone, except `PRETRAINED`, whose
    classifier alone is fresh.
    """
    from attnlens.inits import init_

    start = start_of(arm, source)
    with DRAWING:
        model = build(shape, seed, start.wiring)
        if start.init is not None:
            init_(model, start.init, seed=seed, **start.options)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if arm == PRETRAINED:
        assert isinstance(source, Source)
        assert isinstance(shape, Shape)
        state |= source_weights(source, shape, state)
    return state
