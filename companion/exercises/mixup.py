"""Checks of the exercises on mixup: `mixup-geometry`, `mixing-beyond-labels`."""

from collections.abc import Callable
from typing import Any

import torch

from companion.checks import as_tensor
from companion.exercises.core import Verdict, correct, not_yet
from companion.geometry import simplex_etf
from companion.mixup import channel_curve, intrusion_rate, mixup, mixup_ufm_features

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


def _even_length(answer: Callable[[float], float]) -> Verdict:
    weight = simplex_etf(3, 2, dtype=torch.float64)
    for mu in (0.1, 0.01, 0.001):
        got = float(as_tensor(answer(mu)))
        even, pure = (float(mixup_ufm_features(weight, [lam], 0, 1, mu)[0].norm()) for lam in (0.5, 1.0))
        if abs(got / even - 1) < 1e-3:
            continue
        if abs(got / (pure / 2) - 1) < 1e-2:
            return not_yet("This is half way on the chord. Cross-entropy sends the blend further out.")
        if abs(got / pure - 1) < 1e-2:
            return not_yet("This is the length of a pure class. The label of the blend is (1/2, 1/2, 0).")
        if abs(got / float(channel_curve([0.5], 3, mu)[0, 1]) - 1) < 1e-3:
            return not_yet("This is the limit for a small price. With `(1 - q) / 2` in place of 1/2 it becomes exact.")
        return not_yet(
            f"For mu = {mu:g} it should be {even:.4f}, not {got:.4f}. Solve the equation for q: the length is kappa * q"
        )
    return correct("The same length as Newton's method finds, for any price.")


def _crowded(answer: tuple[Any, Any]) -> Verdict:
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        return not_yet("The answer should be a pair (x, y).")
    x, y = as_tensor(answer[0]).float(), as_tensor(answer[1])
    if x.dim() != 2 or x.shape[1] != 2 or len(x) > 300 or len(y) != len(x) or len(y.unique()) != 2:
        return not_yet("Give at most 300 points in the plane, and labels of two classes for them.")
    if float(torch.cdist(x, x)[y[:, None] != y].min()) < 0.099:
        return not_yet("Points of different classes have to be at least 0.1 apart.")
    n = -(-20_000 // len(x))
    mixed = mixup(x.repeat(n, 1), y.repeat(n), per_sample=True, generator=torch.Generator().manual_seed(11))
    rate = float(intrusion_rate(mixed, x, y, 0.1))
    if rate >= 0.3:
        return correct(f"{100 * rate:.0f} % of the blends carry a label that denies the sample they land on.")
    if rate < 0.01:
        return not_yet(
            "No blend intrudes. Put one class between two groups of the other, within the radius of their blends."
        )
    return not_yet(
        f"The rate is {rate:.2f}. Only pairs of one class can intrude: make one class much larger, put it on both "
        "sides, and leave no gap between the few others."
    )


CHECKS: dict[str, Callable[[Any], Verdict]] = {
    "mixup-geometry/1": _lands,
    "mixup-geometry/2": _even_length,
    "mixup-geometry/3": _crowded,
}
