"""Look inside pre-trained attention weights: how much of W_Q W_K^T and W_V W_proj is identity plus noise."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnlens.comparing import compare
    from attnlens.composition import Composition, compose
    from attnlens.errors import AttnlensError
    from attnlens.fitting import fit_params
    from attnlens.inits import create_model, init_, initialisers, verify_init
    from attnlens.inspection import Inspection, inspect
    from attnlens.params import InitParams
    from attnlens.scanning import Scan, scan

__version__ = "0.1.0"

# Public name -> the module it lives in: imported at first use, so that `import attnlens` costs nothing.
_PUBLIC = {
    "AttnlensError": "errors",
    "Composition": "composition",
    "InitParams": "params",
    "Inspection": "inspection",
    "Scan": "scanning",
    "compare": "comparing",
    "compose": "composition",
    "create_model": "inits",
    "fit_params": "fitting",
    "init_": "inits",
    "initialisers": "inits",
    "inspect": "inspection",
    "scan": "scanning",
    "verify_init": "inits",
}
__all__ = [
    "AttnlensError",
    "Composition",
    "InitParams",
    "Inspection",
    "Scan",
    "__version__",
    "compare",
    "compose",
    "create_model",
    "fit_params",
    "init_",
    "initialisers",
    "inspect",
    "scan",
    "verify_init",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'attnlens' has no attribute {name!r}")
    return getattr(import_module(f"attnlens.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
