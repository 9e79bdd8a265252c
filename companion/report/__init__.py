"""The check-up of your own model: every question of the book that the data at hand can answer, in one call.

Public: `checkup`, and what it returns: `Checkup`, with a list of `Finding` and one of `Skipped`, shown as a `Table`;
`extract`, which writes the features of a model to files, and what it returns: `Extracted`. On the command line:
`python -m companion checkup --help`.
"""

from companion.report.examination import Checkup, checkup
from companion.report.findings import Finding, Skipped
from companion.report.reading import Extracted, extract
from companion.report.rendering import Table

__all__ = ["Checkup", "Extracted", "Finding", "Skipped", "Table", "checkup", "extract"]
