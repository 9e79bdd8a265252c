"""Checks of the anomaly chapters' exercises."""

from collections.abc import Callable
from typing import Any

import torch

from companion.exercises.core import Verdict, correct, not_yet

__all__ = ["CHECKS"]


def _coreset_by_hand(answer: Any) -> Verdict:
    chosen = [int(i) for i in answer]
    if chosen == [0, 3, 2]:
        return correct("First the far end; then the point with the largest distance to its nearest chosen one.")
    if len(chosen) != 3 or chosen[:1] != [0]:
        return not_yet("Three row numbers, in the order of choice, starting with row 0.")
    if chosen == [0, 3, 1]:
        return not_yet("Row 3 is right. For the others compare distances to the NEAREST chosen point: 2 and 3.")
    return not_yet("Which point is farthest from row 0? Give row numbers, not coordinates.")


def _hardest_positions(answer: Callable) -> Verdict:
    g = torch.Generator().manual_seed(11)
    for shape in ((200,), (3, 8, 10)):
        d = torch.rand(shape, generator=g)
        flat = d.flatten().sort(descending=True).values
        for share in (0.05, 0.5, 1.0, 1e-6):
            expected = flat[: max(1, round(share * len(flat)))].mean()
            got = torch.as_tensor(answer(d, share)).double()
            if got.shape != ():
                return not_yet(f"The result is one number, yours has shape {tuple(got.shape)}. Flatten, then average.")
            if (
                torch.isclose(got, flat.flip(0)[: max(1, round(share * len(flat)))].mean().double(), atol=1e-5)
                and share < 1
            ):
                return not_yet("These are the smallest values: the hard positions have the LARGEST errors.")
            if share == 1e-6 and not torch.isfinite(got):
                return not_yet("A tiny share leaves nothing to average: keep at least one value.")
            if share == 0.5 and torch.isclose(got, flat.mean().double(), atol=1e-5):
                return not_yet("This is the mean of all values: leave the easy ones out.")
            if not torch.isclose(got, expected.double(), atol=1e-4):
                return not_yet(
                    f"For a share of {share:g} the mean should be {float(expected):.4f}, got {float(got):.4f}."
                )
    return correct("Only the hardest positions teach: that keeps the student from learning what it is not shown.")


def _normal_threshold(answer: Callable) -> Verdict:
    g = torch.Generator().manual_seed(12)
    for rate in (0.02, 0.1, 0.3):
        scores = -3 + 2 * torch.randn(500, generator=g).abs()
        cut = float(answer(scores, rate))
        alarms = float((scores < cut).float().mean())
        if abs(alarms - (1 - rate)) < 0.02 and rate < 0.3:
            return not_yet("Almost everything raises an alarm: scores are higher = more normal, so cut the LOW end.")
        if alarms > rate + 0.01:
            return not_yet(f"{alarms:.0%} of the normal images raise an alarm, where {rate:.0%} may.")
        if alarms < rate - 0.01:
            return not_yet(f"Only {alarms:.0%} raise an alarm: the threshold could be higher and catch more.")
    return correct("A quantile of normal scores: no defect was needed, and none may be used.")


def _residual_by_hand(answer: Any) -> Verdict:
    value = [float(v) for v in answer]
    if value == [1.0, -1.0]:
        return correct("The nearest reference is (4, 4), at squared distance 2.")
    if value == [-1.0, 1.0]:
        return not_yet("Right reference, wrong sign: feature minus reference.")
    if value in ([5.0, 3.0], [-5.0, -3.0], [-1.0, 3.0]):
        return not_yet("Subtract the NEAREST reference: compare the squared distances 34, 2 and 10.")
    return not_yet("Two numbers: (5, 3) minus the nearest of (0, 0), (4, 4), (6, 0).")


def _planar_log_det(answer: Callable) -> Verdict:
    g = torch.Generator().manual_seed(13)
    for _ in range(3):
        u, w, z = 0.3 * torch.randn(3, 4, generator=g, dtype=torch.float64)
        b = torch.randn((), generator=g, dtype=torch.float64)
        got = torch.as_tensor(answer(z, u, w, b)).double()
        jacobian = torch.autograd.functional.jacobian(lambda x, u=u, w=w, b=b: x + u * torch.tanh(w @ x + b), z)
        expected = torch.linalg.slogdet(jacobian).logabsdet
        if got.shape != ():
            return not_yet(f"The log-determinant is one number, yours has shape {tuple(got.shape)}.")
        if torch.isclose(got, torch.linalg.det(jacobian), atol=1e-8):
            return not_yet("This is the determinant: take its logarithm.")
        if torch.isclose(got, torch.log((1 + u @ w).abs()), atol=1e-8):
            return not_yet("The slope of tanh is missing: 1 - tanh(w.z + b)^2.")
        if not torch.isclose(got, expected, atol=1e-6):
            return not_yet(f"Automatic differentiation gives {float(expected):.4f}, you give {float(got):.4f}.")
    return correct("One inner product instead of a determinant: that is why planar layers are cheap.")


def _misalignment(answer: Callable) -> Verdict:
    g = torch.Generator().manual_seed(14)
    a, b = torch.randn(2, 6, 5, generator=g)
    got = torch.as_tensor(answer(a, b))
    expected = 1 - torch.nn.functional.cosine_similarity(a, b, dim=1)
    if got.shape != (6,):
        return not_yet(f"One number per matched pair of rows, shape (6,); got {tuple(got.shape)}.")
    if torch.allclose(got, 1 - expected, atol=1e-5):
        return not_yet("This is agreement; misalignment is one minus it, so that higher = worse.")
    if torch.allclose(got, 1 - (a * b).sum(1), atol=1e-5):
        return not_yet("Divide each row by its length first: a long row must not look aligned.")
    if not torch.allclose(got, expected, atol=1e-5):
        return not_yet("Expected one minus the cosine of row i with row i.")
    return correct("Zero where the two sensors agree, up to two where they contradict each other.")


CHECKS: dict[str, Callable[[Any], Verdict]] = {
    "visual-anomalies/1": _coreset_by_hand,
    "visual-anomalies/2": _hardest_positions,
    "visual-anomalies/3": _normal_threshold,
    "visual-references/1": _residual_by_hand,
    "visual-references/2": _planar_log_det,
    "visual-references/3": _misalignment,
}
