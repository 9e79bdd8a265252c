"""The check-up of your own model: every question of the book that the data at hand can answer, in one call.

Public: `checkup`, and what it returns: `Checkup`, a list of `Finding` and of `Skipped`; `extract`, which writes the
features of a model to files. On the command line: `python -m companion checkup --help`.
"""

from companion.report.examination import Checkup, checkup
from companion.report.findings import Finding, Skipped
from companion.report.reading import extract

__all__ = ["Checkup", "Finding", "Skipped", "checkup", "extract"]
