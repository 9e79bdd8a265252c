"""One figure of a check-up: its value, how sure it is, what is normal, and what that says.

Public: `Finding`, `Skipped`, `Estimate`, `verdict`, `jackknife`, `chapter_link`.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from scipy.stats import t as student

from companion.show import REPOSITORY, number

__all__ = ["Estimate", "Finding", "Skipped", "chapter_link", "jackknife", "verdict"]

LEVEL = 0.95
TOLERANCE = 0.02  # two points, added to what chance explains
CONSTANT = "every row of the features is the same"
VERDICTS = ("ok", "watch", "alarm", "note")


class Estimate(NamedTuple):
    """A value with the ends of its interval, which are None where none can be given."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Finding:
    """One row of a check-up.

    Attributes:
        key: its name on the command line and in the JSON file, such as "ece" or "group_gap/colour".
        theme: which of the six questions it belongs to.
        name: what it is called in the table.
        value: what was measured.
        low: lower end of the 95 % interval, or None.
        high: its upper end, or None.
        normal_low: smallest normal value, or None where there is no lower end.
        normal_high: largest normal value, or None.
        normal: what is normal, in words, and where that comes from.
        verdict: "ok", "watch", "alarm", or "note" where nothing is called normal.
        meaning: a plain sentence about this value.
        chapter: "theme/chapter" that explains it.
        rows: how many rows it was computed from.
    """

    key: str
    theme: str
    name: str
    value: float
    low: float | None
    high: float | None
    normal_low: float | None
    normal_high: float | None
    normal: str
    verdict: str
    meaning: str
    chapter: str
    rows: int

    @property
    def link(self) -> str:
        """The address of the chapter."""
        return chapter_link(self.chapter)

    def shown(self) -> str:
        """The value with its interval, three significant digits."""
        if self.low is None or self.high is None:
            return number(self.value)
        return f"{number(self.value)} [{number(self.low)}, {number(self.high)}]"

    def record(self) -> dict[str, Any]:
        """Plain data for a JSON file, numbers with six significant digits."""
        plain = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in asdict(self).items()}
        return {**plain, "link": self.link}


class Skipped(NamedTuple):
    """What could not be computed, and why."""

    what: str
    reason: str


Found = Iterator[Finding | Skipped]


def make(key: str, theme: str, name: str, estimate: Estimate, normal: tuple, meaning: str, chapter: str, rows: int):
    """Return a `Finding`; `normal` is (low, high, in words).

    >>> make("x", "anomaly", "X", Estimate(2.0, 1.5, 2.5), (None, 1.0, "at most 1"), "Large.", "a/b", 9).verdict
    'alarm'
    """
    value, low, high = (None if v is None else float(v) for v in estimate)
    if value is None or not math.isfinite(value):
        raise ValueError(f"it came out as {value}")
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        low = high = None
    at_least, at_most, words = normal
    state = verdict(Estimate(value, low, high), at_least, at_most)
    return Finding(key, theme, name, value, low, high, at_least, at_most, words, state, meaning, chapter, rows)


def verdict(estimate: Estimate, at_least: float | None, at_most: float | None) -> str:
    """Return "ok" inside the normal range, "alarm" when the whole interval lies outside, "watch" in between.

    Without an interval a value outside is an alarm; without a range everything is a "note".

    >>> verdict(Estimate(0.5, 0.4, 0.6), None, 0.45), verdict(Estimate(0.5, 0.4, 0.6), None, 0.3)
    ('watch', 'alarm')
    """
    if at_least is None and at_most is None:
        return "note"
    value, low, high = estimate
    low, high = value if low is None else low, value if high is None else high
    if (at_least is None or value >= at_least) and (at_most is None or value <= at_most):
        return "ok"
    return "alarm" if (at_least is not None and high < at_least) or (at_most is not None and low > at_most) else "watch"


def jackknife(value: float, without: Sequence[float], floor: float = -math.inf, ceiling: float = math.inf) -> Estimate:
    r"""Return a value with the interval that leaving out one of G parts of the data gives.

    $$\mathrm{se}^2 = \frac{G-1}{G} \sum_g (\theta_{-g} - \bar\theta)^2, \qquad \theta \pm t_{G-1}\,\mathrm{se}$$

    Values that are all positive are treated on the logarithm, so that the interval stays positive.

    Args:
        value: from all data.
        without: the same from the data without part g, one for each g.
        floor: no interval reaches below.
        ceiling: no interval reaches above.

    >>> jackknife(2.0, [1.9, 2.0, 2.1])._replace(value=0) != Estimate(0)
    True
    >>> jackknife(2.0, [2.0, 2.0, 2.0])
    Estimate(value=2.0, low=2.0, high=2.0)
    """
    parts = [float(v) for v in without if math.isfinite(v)]
    if len(parts) < max(3, len(without)):
        return Estimate(value)
    logs = value > 0 and min(parts) > 0
    centre, parts = (math.log(value), [math.log(v) for v in parts]) if logs else (value, parts)
    mean = math.fsum(parts) / len(parts)
    half = math.sqrt((len(parts) - 1) / len(parts) * math.fsum((v - mean) ** 2 for v in parts))
    half *= float(student.ppf((1 + LEVEL) / 2, len(parts) - 1))
    low, high = centre - half, centre + half
    low, high = (math.exp(low), math.exp(min(high, 700.0))) if logs else (low, high)
    return Estimate(value, min(max(low, floor), value), max(min(high, ceiling), value))


def chapter_link(chapter: str) -> str:
    """Return the address of a chapter: in the repository, or on the site that `COMPANION_BOOK` names.

    >>> chapter_link("calibration/recalibration").rsplit("/", 2)[1:]
    ['calibration', 'recalibration.ipynb']
    """
    site = os.environ.get("COMPANION_BOOK", "").rstrip("/")
    return f"{site}/{chapter}.html" if site else f"{REPOSITORY}/blob/main/book/{chapter}.ipynb"
