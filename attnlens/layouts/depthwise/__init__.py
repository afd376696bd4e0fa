"""Depthwise filters as they are stored: which tensor holds a layer's, and their only reader and writer."""

from attnlens.layouts.depthwise.find import filter_modules, filter_parameters
from attnlens.layouts.depthwise.read_write import read_filters, write_filters
from attnlens.layouts.depthwise.spec import FilterSpec

__all__ = ["FilterSpec", "filter_modules", "filter_parameters", "read_filters", "write_filters"]
