"""Look inside pre-trained attention weights: how much of W_Q W_K^T and W_V W_proj is identity plus noise."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnlens.composition import Composition, compose
    from attnlens.errors import AttnlensError
    from attnlens.fit.comparison import compare
    from attnlens.fit.fit_params import fit_params
    from attnlens.fit.params import InitParams
    from attnlens.inits import create_model, init_, initialisers, verify_init
    from attnlens.inspection import Inspection, inspect
    from attnlens.scans import Scan, scan
    from attnlens.training import TrainComparison, train_compare

__version__ = "0.1.0"

# Public name -> the module it lives in: imported at first use, so that `import attnlens` costs nothing.
_PUBLIC = {
    "AttnlensError": "errors",
    "Composition": "composition",
    "InitParams": "fit.params",
    "Inspection": "inspection",
    "Scan": "scans",
    "TrainComparison": "training",
    "compare": "fit.comparison",
    "compose": "composition",
    "create_model": "inits",
    "fit_params": "fit.fit_params",
    "init_": "inits",
    "initialisers": "inits",
    "inspect": "inspection",
    "scan": "scans",
    "train_compare": "training",
    "verify_init": "inits",
}
__all__ = [
    "AttnlensError",
    "Composition",
    "InitParams",
    "Inspection",
    "Scan",
    "TrainComparison",
    "__version__",
    "compare",
    "compose",
    "create_model",
    "fit_params",
    "init_",
    "initialisers",
    "inspect",
    "scan",
    "train_compare",
    "verify_init",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'attnlens' has no attribute {name!r}")
    return getattr(import_module(f"attnlens.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
