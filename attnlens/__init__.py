"""Look inside pre-trained attention weights: how much of W_Q W_K^T and W_V W_proj is identity plus noise."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnlens.errors import AttnlensError
    from attnlens.inspection import Inspection, inspect

__version__ = "0.1.0"

# Public name -> the module it lives in: imported at first use, so that `import attnlens` costs nothing.
_PUBLIC = {
    "AttnlensError": "errors",
    "Inspection": "inspection",
    "inspect": "inspection",
}
__all__ = ["AttnlensError", "Inspection", "__version__", "inspect"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'attnlens' has no attribute {name!r}")
    return getattr(import_module(f"attnlens.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
