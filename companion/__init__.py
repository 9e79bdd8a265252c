"""The tested companion of the Feature Geometry book.

Six themes, one sub-package each, loaded when first used:

>>> import companion
>>> companion.THEMES
('dimensionality', 'collapse', 'mixup', 'calibration', 'shortcuts', 'anomaly')

The foundation they share lies directly in this package: `runtime`, `neighbors`, `statistics`, `geometry`,
`ranking`, `mixing`, `training`, `nets`, `layers`, `data`; `claims`, `exercises`, `papers`, `figures` and `show`
serve the book.
`companion.checkup(...)` asks all six of your own model, as `python -m companion checkup` does.
"""

from importlib import import_module
from typing import Any

from companion._version import __version__

THEMES = ("dimensionality", "collapse", "mixup", "calibration", "shortcuts", "anomaly")
FOUNDATION = (
    "runtime",
    "checks",
    "neighbors",
    "statistics",
    "geometry",
    "ranking",
    "mixing",
    "training",
    "nets",
    "layers",
    "data",
    "claims",
    "exercises",
    "papers",
    "figures",
    "show",
)

__all__ = ["FOUNDATION", "THEMES", "__version__"]


def __getattr__(name: str) -> Any:
    if name in THEMES or name in FOUNDATION or name == "report":
        return import_module(f"companion.{name}")
    if name == "checkup":
        return import_module("companion.report").checkup
    raise AttributeError(f"module 'companion' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *THEMES, *FOUNDATION, "checkup", "report"])
