"""Figures: arrays and tables in, `matplotlib.figure.Figure` out.

pyplot is never imported and the caller's rc settings stay as they are.
"""

from attnlens.figures.saving import save_figures
from attnlens.figures.style import figure_style

__all__ = ["figure_style", "save_figures"]
