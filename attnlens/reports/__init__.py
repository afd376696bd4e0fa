"""One self-contained HTML page about a model: what `attnlens inspect` and `fit-params` found, to look at and share."""

from attnlens.reports.page import report

__all__ = ["report"]
