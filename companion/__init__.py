"""The tested companion of the Feature Geometry book.

Six themes, one sub-package each, loaded when first used:

>>> import companion
>>> companion.THEMES
('dimensionality', 'collapse', 'mixup', 'calibration', 'shortcuts', 'anomaly')

The foundation they share lies directly in this package: `runtime`, `neighbors`, `statistics`, `geometry`,
`ranking`, `mixing`, `training`, `nets`, `data`; `claims`, `exercises`, `papers`, `figures` and `show` serve the book.
"""

from importlib import import_module
from types import ModuleType

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
    "data",
    "claims",
    "exercises",
    "papers",
    "figures",
    "show",
)

__all__ = ["FOUNDATION", "THEMES", "__version__"]


def __getattr__(name: str) -> ModuleType:
    if name in THEMES or name in FOUNDATION:
        return import_module(f"companion.{name}")
    raise AttributeError(f"module 'companion' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *THEMES, *FOUNDATION])
