"""Look inside pre-trained attention weights: how much of W_Q W_K^T and W_V W_proj is identity plus noise."""

from __future__ import annotations

TYPE_CHECKING = False  # as typing's: its import alone takes as long as Python's start

if TYPE_CHECKING:  # for type checkers; a test holds these names to `_PUBLIC`
    from attnlens.composition import Composition as Composition
    from attnlens.composition import compose as compose
    from attnlens.errors import AttnlensError as AttnlensError
    from attnlens.fit.comparison import Comparison as Comparison
    from attnlens.fit.comparison import compare as compare
    from attnlens.fit.fit_params import fit_params as fit_params
    from attnlens.fit.params import InitParams as InitParams
    from attnlens.inits import InitReport as InitReport
    from attnlens.inits import VerifyReport as VerifyReport
    from attnlens.inits import create_model as create_model
    from attnlens.inits import init_ as init_
    from attnlens.inits import initialisers as initialisers
    from attnlens.inits import verify_init as verify_init
    from attnlens.inspection import Inspection as Inspection
    from attnlens.inspection import inspect as inspect
    from attnlens.reports import report as report
    from attnlens.scans import Scan as Scan
    from attnlens.scans import scan as scan
    from attnlens.signal import RewireReport as RewireReport
    from attnlens.signal import rewire_ as rewire_
    from attnlens.signal.propagation import Propagation as Propagation
    from attnlens.signal.propagation import propagate as propagate
    from attnlens.statistics.table import StatsTable as StatsTable
    from attnlens.training import StructureTracker as StructureTracker
    from attnlens.training import TrainComparison as TrainComparison
    from attnlens.training import train_compare as train_compare

__version__ = "0.1.0"

# The module that public names live in: imported at first use, so that `import attnlens` costs nothing.
_PUBLIC = {
    "composition": ("Composition", "compose"),
    "errors": ("AttnlensError",),
    "fit.comparison": ("Comparison", "compare"),
    "fit.fit_params": ("fit_params",),
    "fit.params": ("InitParams",),
    "inits": ("InitReport", "VerifyReport", "create_model", "init_", "initialisers", "verify_init"),
    "inspection": ("Inspection", "inspect"),
    "reports": ("report",),
    "scans": ("Scan", "scan"),
    "signal": ("RewireReport", "rewire_"),
    "signal.propagation": ("Propagation", "propagate"),
    "statistics.table": ("StatsTable",),
    "training": ("StructureTracker", "TrainComparison", "train_compare"),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = ["__version__", *_HOME]  # noqa: PLE0604  # each is text


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'attnlens' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"attnlens.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
