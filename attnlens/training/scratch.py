"""A named network without pre-trained weights: its sizes, and the parameters it may be drawn with."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnlens.training import convmixer, gpt

if TYPE_CHECKING:
    from torch import nn

    from attnlens.params import InitParams


def is_scratch(model: str | None) -> bool:
    """Whether ``--model`` names a network that is trained from drawn weights alone."""
    return model is not None and model.startswith((convmixer.PREFIX, gpt.PREFIX))


@dataclass(frozen=True)
class Scratch:
    """Stands where `arms.Source` stands for a pre-trained model."""

    name: str
    sizes: dict[str, Any]
    params: InitParams | None
    params_file_sha256: str = ""
    model: None = None
    checkpoint: None = None
    opened: None = None

    @classmethod
    def of(cls, name: str, params: Path | None = None) -> Scratch:
        """Look the sizes up and load the parameters. Raises `ModelNotFoundError`, `ParamsError`."""
        from attnlens.params import InitParams

        sizes = gpt.sizes_of(name) if name.startswith(gpt.PREFIX) else convmixer.sizes_of(name)
        if params is None:
            return cls(name, sizes, None)
        return cls(name, sizes, InitParams.load(params), hashlib.sha256(params.read_bytes()).hexdigest())

    @property
    def reads_text(self) -> bool:
        """Whether it is trained on bytes, not on images."""
        return "context" in self.sizes

    def record(self) -> dict[str, Any]:
        """Return what a configuration says about it."""
        return {"model": self.name, "sha256": None}

    def fitted(self) -> tuple[str, dict[str, Any]]:
        """Return the initialiser, with its options, that draws from ``--params``."""
        return "fitted" if self.reads_text else "conv-covariance", {"params": self.params}

    def scale(self) -> dict[str, Any]:
        """Return the options of `norm-matched`: whose scale the control keeps."""
        if not self.reads_text:
            return {"of": "conv-covariance"}
        return {"of": "mimetic"} if self.params is None else {"of": "fitted", "params": self.params}

    def default_arms(self) -> tuple[str, ...]:
        """Return the arms that are trained when none are named."""
        if self.reads_text:
            return ("default", "mimetic", "mimetic-positive", "qk-only", "norm-matched")
        return ("default", "conv-covariance", "norm-matched")

    def params_sha256(self, _model: nn.Module) -> str:
        """Return the hash of the parameter file; empty where there is none."""
        return self.params_file_sha256
