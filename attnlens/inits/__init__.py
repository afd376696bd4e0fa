"""Initialisers of attention weights: one registry, one signature, and a report of what was realised."""

from attnlens.inits.apply import create_model, init_
from attnlens.inits.file import init_file
from attnlens.inits.folding import UnusableScaleError
from attnlens.inits.registry import initialisers
from attnlens.inits.report import InitReport, ProductReport, Skipped
from attnlens.inits.verify.check import Check
from attnlens.inits.verify.verify import VerifyReport, verify_init

__all__ = [
    "Check",
    "InitReport",
    "ProductReport",
    "Skipped",
    "UnusableScaleError",
    "VerifyReport",
    "create_model",
    "init_",
    "init_file",
    "initialisers",
    "verify_init",
]
