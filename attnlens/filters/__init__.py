"""Depthwise filters: their layers, their covariance, a closed form for it, and how both carry over."""

from attnlens.filters.find import filter_modules, filter_parameters
from attnlens.filters.read_write import read_filters, write_filters
from attnlens.filters.spec import FilterSpec

__all__ = ["FilterSpec", "filter_modules", "filter_parameters", "read_filters", "write_filters"]
