"""What opening a model gives, and how weights on a hub are reached."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from attnlens.checkpoints import Checkpoint
from attnlens.models.architecture import Architecture

StrPath = str | os.PathLike[str]
Weights = StrPath | Mapping[str, Any]
"""Where weights are: a file, or a state dict in memory."""


@dataclass(frozen=True)
class Access:
    """How weights are reached, and which of a file's are read.

    ``offline`` from the local cache alone, ``remote`` only the tensors needed. ``network`` names one of several networks
    in a file; ``row_order`` says how the rows of packed projections are ordered where only tensor names are known.
    """

    offline: bool = False
    remote: bool = False
    network: str | None = None
    row_order: str | None = None


ONLINE = Access()
"""Whole files, from the local cache or the hub."""


@dataclass(frozen=True)
class OpenedModel:
    """An architecture with weights that fit it."""

    name: str
    architecture: Architecture
    checkpoint: Checkpoint
    source: dict[str, str]
    timm_args: dict[str, Any] | None = field(default=None, kw_only=True)
    """Arguments timm builds the architecture with; None where it is not timm's, or timm need not be asked."""

    @property
    def untraced(self) -> str:
        """Why norms are not known, in brackets, where a live network's forward pass could not be followed."""
        reason = self.architecture.untraced
        return f" (no forward pass could be followed: {reason}; give input_size=)" if reason else ""

    def provenance(self) -> dict[str, Any]:
        """Return the architecture and where its weights are from: the name given and, for a file, size and hash."""
        return {"architecture": self.architecture.name, **self.source, **self.checkpoint.provenance()}
