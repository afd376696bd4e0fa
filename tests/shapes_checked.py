"""Import the core of the package with the array shapes in its types checked at every call, by jaxtyping and beartype.

The package itself never imports either: the names stand below ``if TYPE_CHECKING``, which is true while it is imported
here. Whatever is imported first stays as it is, so `tests/conftest.py` imports this module before any other.
"""

import typing
from importlib import import_module

import beartype  # noqa: F401
import numpy as np  # noqa: F401
import scipy.linalg  # noqa: F401
import threadpoolctl  # noqa: F401
from jaxtyping import install_import_hook

import attnlens  # noqa: F401

CHECKED = ("attnlens.heads", "attnlens.circuits", "attnlens.statistics.diagonal")

with install_import_hook(CHECKED, "beartype.beartype"):
    typing.TYPE_CHECKING = True
    try:
        for name in CHECKED:
            import_module(name)
    finally:
        typing.TYPE_CHECKING = False
