"""Checks of the exercises on mixup: `mixup-geometry`, `mixing-beyond-labels`."""

from collections.abc import Callable
from typing import Any

from companion.checks import as_tensor
from companion.exercises.core import Verdict, correct, not_yet

__all__ = ["CHECKS"]


def _lands(answer: tuple[float, float]) -> Verdict:
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        return not_yet("The answer should be a pair (low, high), the ends of the interval.")
    low, high = (float(v) for v in as_tensor(answer))
    if low > high:
        return not_yet("Write the smaller end first.")
    if abs(low - 0.35) < 0.005 and abs(high - 0.65) < 0.005:
        return correct("Three mixing weights in ten, and always the middle ones.")
    if abs(high - low - 0.2) < 0.005:
        return not_yet("The band is 0.2 wide, but lambda runs over the distance between the two points, which is 2/3.")
    return not_yet(
        "The mixed point lies at `lam * a + (1 - lam) * b`. Put that between -0.1 and 0.1 and solve for lam."
    )


CHECKS: dict[str, Callable[[Any], Verdict]] = {
    "mixup-geometry/1": _lands,
}
