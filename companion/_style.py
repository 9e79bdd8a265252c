"""The style of the book, lent for one drawing: whoever imports the companion keeps the style of all other pictures.

Public: `lent_style`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

__all__ = ["lent_style"]


@contextmanager
def lent_style(use: bool = True) -> Iterator[ModuleType]:
    """Give `companion.figures` for a while, with its style in force or without it; afterwards all is as it was.

    >>> import matplotlib
    >>> before = matplotlib.rcParams.copy()
    >>> with lent_style() as figures:
    ...     fig, ax = figures.subplots()
    >>> figures.plt.close(fig)
    >>> matplotlib.rcParams == before
    True
    """
    import matplotlib

    with matplotlib.rc_context():  # in a notebook the import sets the style for good
        from companion import figures
    with matplotlib.rc_context():
        if use:
            figures.use_style()
        yield figures
