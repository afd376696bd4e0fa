"""Figures: arrays and tables in, `matplotlib.figure.Figure` out.

pyplot is never imported and the caller's rc settings stay as they are.
"""

from attnlens.figures.saving import save_figures

__all__ = ["save_figures"]
