"""A figure one column wide for a paper of two, as ICML's: two panels of the shipped model's fit, as PDF and as PNG.

    python docs/paper_figure.py [FOLDER]

needs no network and no GPU; the files go to FOLDER, by default docs/gallery/paper.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

import attnlens
from attnlens.figures import figure_style, save_figures

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/gallery/paper")
inspection = attnlens.inspect()

with figure_style("paper", "column", dpi=300):  # 3.25 inches wide, text of 8 points, no title, no prose
    # Axes of your own: two of the nine panels of the depth profile.
    figure = Figure(figsize=(3.25, 1.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    inspection.figure("depth_profile", ax={"beta sum": right, "beta qk": left})  # the legend goes into the first
    left.set_title("(a) QK, every head")
    right.set_title("(b) OV, sum")
    right.set_ylabel("")

    # Or a figure as attnlens lays it out, of the same width.
    spectra = inspection.figure("spectra")

    for format_ in ("pdf", "png"):
        for path in save_figures({"column": figure, "spectra": spectra}, folder, format_):
            print(f"wrote {path.name}")
