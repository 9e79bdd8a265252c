"""The questions asked of a model, in the order of the book.

Public: `LENSES`. A lens is a function `(summary, seed) -> iterator of Finding or Skipped`. What each calls normal is
derived in its own docstring or said to be a convention; the numbers are constants at the head of its module.
"""

from collections.abc import Callable

from companion.report.answers import calibration, groups, strangers
from companion.report.findings import Found
from companion.report.shapes import collapse, dimensions
from companion.report.streaming import Summary

__all__ = ["LENSES"]

LENSES: tuple[Callable[[Summary, int], Found], ...] = (dimensions, collapse, calibration, groups, strangers)
