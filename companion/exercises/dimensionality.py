"""Checks of the exercises of the theme dimensionality."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from companion.checks import as_tensor
from companion.dimensionality import intruder_dimensions, participation_ratio, twonn
from companion.exercises.core import Verdict, correct, not_attempted, not_yet

__all__ = ["CHECKS"]


def _best_step(answer: Any) -> Verdict:
    z = float(answer)
    if math.isclose(z, 5.2, abs_tol=0.01):
        return correct("The remainder, (-1.12, 0.84), is orthogonal to the direction.")
    if math.isclose(z, 6.6, abs_tol=0.01):
        return not_yet("You projected the target itself. The walk starts at (1, 1): project the difference.")
    if math.isclose(z, math.sqrt(29), abs_tol=0.01):
        return not_yet("This is the distance to the target, which the line does not pass through.")
    return not_yet("At the best z the remainder target - point is orthogonal to the direction p.")


def _nearest(answer: Callable[[Tensor, Tensor, Tensor], Any]) -> Verdict:
    draw = torch.Generator().manual_seed(5)
    theta0, theta = torch.randn(2, 30, generator=draw)
    p = torch.nn.functional.normalize(torch.randn(30, 6, generator=draw) + 1, dim=0)
    given = answer(theta0, p, theta)
    if given is None or given is Ellipsis:
        return not_attempted()
    given = as_tensor(given, "the returned point").to(theta)
    if given.shape != (30,):
        return not_yet(f"Return a point of shape (30,), as theta0 has; got {tuple(given.shape)}.")
    best = theta0 + p @ torch.linalg.lstsq(p, (theta - theta0)[:, None]).solution[:, 0]
    if torch.allclose(given, best, atol=1e-3):
        return correct("The remainder is orthogonal to every column of P.")
    if torch.allclose(given, theta0 + p @ (p.T @ (theta - theta0)), atol=1e-3):
        return not_yet("P^T gives the coordinates only when the columns are orthogonal. Solve P z = theta - theta0.")
    if torch.allclose(given, p @ torch.linalg.lstsq(p, theta[:, None]).solution[:, 0], atol=1e-3):
        return not_yet("Your subspace passes through the origin; this one passes through theta0.")
    if torch.allclose(given - theta0, p @ torch.linalg.lstsq(p, (given - theta0)[:, None]).solution[:, 0], atol=1e-3):
        return not_yet("Your point lies in the subspace, but a nearer one exists.")
    return not_yet("Your point does not lie in the subspace theta0 + P z.")


def _intruders(answer: Callable[[Tensor, Tensor, int, float], Any]) -> Verdict:
    draw = torch.Generator().manual_seed(7)
    left, right = (torch.linalg.qr(torch.randn(40, 40, generator=draw)).Q for _ in range(2))
    before = left @ torch.diag(1 / torch.arange(1.0, 41)) @ right.T
    # a newcomer on the left that was an old direction on the right, and old directions whose sign has turned
    fresh = torch.nn.functional.normalize(torch.randn(40, generator=draw), dim=0)
    newcomer = before + 2 * torch.outer(fresh, right[:, 30])
    promoted = before + 2 * torch.outer(left[:, 30], right[:, 30])
    for after, k in ((newcomer, 8), (-before, 8), (promoted, 8)):
        given = answer(before, after, k, 0.6)
        if given is None or given is Ellipsis:
            return not_attempted()
        if int(given) == len(intruder_dimensions(before, after, k, 0.6)):
            continue
        old, new = (torch.linalg.svd(m, full_matrices=False) for m in (before, after))
        if int(given) == int(((new.U[:, :k].T @ old.U).amax(1) < 0.6).sum()):
            return not_yet("A singular vector may come out with the opposite sign: compare absolute cosines.")
        if int(given) == int(((new.Vh[:k] @ old.Vh.T).abs().amax(1) < 0.6).sum()):
            return not_yet("You compared right singular vectors; the exercise asks for the left ones.")
        if int(given) == int(((new.U[:, :k].T @ old.U[:, :k]).abs().amax(1) < 0.6).sum()):
            return not_yet("Compare with every old direction, not only with the k leading ones.")
        return not_yet(f"For one matrix you found {int(given)} intruders among the {k} leading directions, not right.")
    return correct("Newcomers are counted, turned signs and mere exchanges of rank are not.")


def _mle_of_set(answer: Callable[[Tensor], Any]) -> Verdict:
    draw = torch.Generator().manual_seed(11)
    distances = torch.rand(50, 8, generator=draw, dtype=torch.float64).add(0.1).sort(1).values
    given = answer(distances)
    if given is None or given is Ellipsis:
        return not_attempted()
    given = as_tensor(given, "the returned dimension").double()
    if given.numel() != 1:
        return not_yet(f"Return one number for the whole set, got shape {tuple(given.shape)}: average over the points.")
    logs = (distances[:, -1:] / distances[:, :-1]).log()
    inverse = logs.mean(1)

    def close(value: Tensor) -> bool:
        return math.isclose(float(given), float(value), rel_tol=1e-4)

    if close(1 / inverse.mean()):
        return correct("Averaging the inverses keeps a few points with large values from deciding.")
    if close(inverse.mean()):
        return not_yet("This is the mean inverse dimension. Invert it.")
    if close((1 / inverse).mean()):
        return not_yet("You averaged the dimensions of the points. Average their inverses, then invert.")
    if close(8 / logs.sum(1).mean()) or close(1 / (logs.sum(1) / 8).mean()):
        return not_yet("The sum has k - 1 terms, not k: the k-th ratio is one and its logarithm zero.")
    return not_yet("The inverse at a point is the mean of log(T_k / T_j) over j < k, with T_k the last distance.")


def _broken_linear_count(answer: Any) -> Verdict:
    x = as_tensor(answer, "answer").double()
    if x.dim() != 2 or x.shape[0] < 500 or x.shape[1] < 3:
        return not_yet(f"Give at least 500 points in at least three columns, got shape {tuple(x.shape)}.")
    local, linear = float(twonn(x)), float(participation_ratio(x))
    if linear <= 2.5:
        return not_yet(f"The participation ratio is {linear:.2f}. Let the set turn more: a wound curve.")
    if local >= 1.3:
        return not_yet(f"TwoNN says {local:.2f}: nearby points must lie along a line. Take noise away or add points.")
    return correct(f"TwoNN says {local:.2f}, the participation ratio {linear:.2f}: one coordinate, many directions.")


CHECKS: dict[str, Callable[[Any], Verdict]] = {
    "intrinsic-dimension/2": _mle_of_set,
    "intrinsic-dimension/3": _broken_linear_count,
    "subspace-training/1": _best_step,
    "subspace-training/2": _nearest,
    "subspace-training/3": _intruders,
}
