"""Checks of the exercises on mixup: `mixup-geometry`, `mixing-beyond-labels`."""

from collections.abc import Callable
from typing import Any

import torch

from companion.checks import as_tensor
from companion.exercises.core import Verdict, correct, not_yet
from companion.geometry import simplex_etf
from companion.mixup import channel_curve, intrusion_rate, mixup, mixup_ufm_features, modality_gap
from companion.neighbors import knn

__all__ = ["CHECKS"]


def _lands(answer: tuple[float, float]) -> Verdict:
    ends = as_tensor(answer).flatten().tolist()
    if len(ends) != 2:
        return not_yet("The answer should be a pair (low, high), the ends of the interval.")
    low, high = ends
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


def _blended_pair(answer: tuple[float, float]) -> Verdict:
    pair = as_tensor(answer).flatten()
    if len(pair) != 2:
        return not_yet("The answer should be a pair (loss, label).")
    loss, label = pair.tolist()
    if abs(loss - 0.225) < 0.002 and abs(label - 0.5) < 0.002:
        return correct("The pair pays in proportion, and equal parts cancel.")
    if abs(loss - 0.275) < 0.002:
        return not_yet("The label weighs the wrong terms: 0.75 goes with pulling, 0.25 with pushing.")
    if abs(loss - 0.35) < 0.002:
        return not_yet("Pushing starts at the margin: it costs `s - 0.5`, not s.")
    if abs(loss - 0.225) >= 0.002:
        return not_yet("The loss is `y * (1 - s) + (1 - y) * (s - 0.5)`.")
    return not_yet("The loss is right. For the label, set the slope in s, `-y + (1 - y)`, to zero.")


def _own_smote(answer: Callable[..., Any]) -> Verdict:
    generator = torch.Generator().manual_seed(12)
    x = torch.randn(25, 3, generator=generator, dtype=torch.float64)
    n, k = 400, 3
    points = as_tensor(answer(x, n, k, generator)).double()
    if points.shape != (n, 3):
        return not_yet(f"There should be n points with the columns of x: shape ({n}, 3), not {tuple(points.shape)}.")
    near = knn(x, k=k).indices
    start, step = x[:, None].expand(-1, k, -1).reshape(-1, 3), (x[near] - x[:, None]).reshape(-1, 3)
    along = ((points[:, None] - start) * step).sum(2) / step.square().sum(1)  # (n, segments)
    off = (points[:, None] - start - along[..., None] * step).norm(dim=2)
    on_line, inside = off < 1e-6, (along > -1e-6) & (along < 1 + 1e-6)
    if not bool((on_line & inside).any(1).all()):
        if bool(on_line.any(1).all()):
            return not_yet("Some points lie beyond the ends of their segments: lam should be between 0 and 1.")
        if not bool(torch.isfinite(points).all()):
            return not_yet("Some points are not finite: does a row count as its own neighbour?")
        everywhere = (x[None] - x[:, None]).reshape(-1, 3)
        base = x[:, None].expand(-1, len(x), -1).reshape(-1, 3)
        length = everywhere.square().sum(1).clamp_min(1e-12)
        along = ((points[:, None] - base) * everywhere).sum(2) / length
        between = (points[:, None] - base - along[..., None] * everywhere).norm(dim=2) < 1e-6
        if bool(between.any(1).all()):
            return not_yet("Some points lie between rows that are not near neighbours: choose among the k nearest.")
        return not_yet("Some points lie on no segment. Draw one lam per point, not one per column.")
    if len((points[:, None] - x).norm(dim=2).amin(1).lt(1e-9).nonzero()) > n // 10:
        return not_yet("Many points are copies of rows of x: is a row among its own neighbours?")
    if len((on_line & inside).any(0).nonzero()) < 0.8 * len(start):
        return not_yet("Only some of the segments are used: draw the row and the neighbour anew for every point.")
    return correct("Every point lies between a row and one of its nearest, and all segments are used.")


def _price_history(answer: Callable[..., Any]) -> Verdict:
    losses, eps, rate = [1.5, 0.2, 0.1, 0.0, 0.3, 2.0, 0.6], 0.5, 0.4
    got = [float(v) for v in answer(losses, eps, rate)]
    expected, free, price = [], [], 0.0
    for loss in losses:
        price = max(0.0, price + rate * (loss - eps))
        expected.append(price)
        free.append((free[-1] if free else 0.0) + rate * (loss - eps))
    if len(got) != len(losses):
        return not_yet("There should be one price after each loss, without the zero at the start.")

    def is_close(other: list[float]) -> bool:
        return max(abs(a - b) for a, b in zip(got, other)) < 1e-6

    if is_close(expected):
        return correct("The price rises while the constraint is violated and stops at zero when it is met.")
    if is_close(free):
        return not_yet("The price goes below zero. A constraint that is met must not be rewarded: stop at zero.")
    if is_close([max(0.0, v) for v in free]):
        return not_yet("Stop at zero in every step, not at the end: a debt must not be carried on.")
    if got[0] <= 0:
        return not_yet("The first loss violates the constraint, so its price should rise: check the sign of the slack.")
    return not_yet("Each step adds `rate * (loss - eps)` to the price and clamps it at zero.")


def _same_means(answer: tuple[Any, Any]) -> Verdict:
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        return not_yet("The answer should be a pair of clouds.")
    a, b = (as_tensor(v).double() for v in answer)
    if any(v.dim() != 2 or v.shape[1] != 2 or len(v) < 200 for v in (a, b)):
        return not_yet("Each cloud should have at least 200 points in the plane.")
    if float(modality_gap(a, b).distance) >= 0.05:
        return not_yet("The means are still apart. Subtract from each cloud its mean.")
    a, b = a.unique(dim=0), b.unique(dim=0)  # a copy is a neighbour that proves nothing
    if min(len(a), len(b)) < 200:
        return not_yet("Each cloud should have at least 200 different points.")
    kind = torch.arange(len(a) + len(b)) < len(a)
    told = (kind[knn(torch.cat([a, b]), k=1).indices[:, 0]] == kind).double().mean()
    if float(told) < 0.98:
        return not_yet("The means agree, but the clouds overlap: a neighbour is often of the other kind.")
    return correct("One mean, two clouds: a gap of zero is no proof that they are one.")


CHECKS: dict[str, Callable[[Any], Verdict]] = {
    "mixup-geometry/1": _lands,
    "mixup-geometry/2": _even_length,
    "mixup-geometry/3": _crowded,
    "mixing-beyond-labels/1": _blended_pair,
    "mixing-beyond-labels/2": _own_smote,
    "mixing-beyond-labels/3": _price_history,
    "mixing-beyond-labels/4": _same_means,
}
