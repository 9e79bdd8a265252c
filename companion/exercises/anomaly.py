"""Checks of the anomaly chapters' exercises."""

from collections.abc import Callable
from typing import Any

import torch

from companion.anomaly import auroc, average_precision, frechet_distance, prdc
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


def _aupimo_by_hand(answer: Any) -> Verdict:
    value = float(answer)
    if abs(value - 0.375) < 1e-6:
        return correct("One pixel beyond the cheap end, one halfway, two too dear.")
    if abs(value - 0.75) < 1e-6:
        return not_yet("This is the recall at U: three of four pixels. Their credits differ: what do they cost?")
    if abs(value - (1 + (0.1 - 0.01) / (0.1 - 0.001)) / 4) < 5e-3:
        return not_yet("Count on a logarithmic scale: 0.01 lies halfway between 0.001 and 0.1.")
    if abs(value - (4 - 0.01 - 0.1 - 0.5) / 4) < 5e-3:
        return not_yet("This is the AUROC. Credits of AUPIMO end at U.")
    return not_yet("Prices are 0, 0.01, 0.1 and 0.5. Clip them to [L, U]; a credit is log(U / price) / log(U / L).")


def _own_aupimo(answer: Callable) -> Verdict:
    g = torch.Generator().manual_seed(15)
    for tied in (False, True):
        for low, high in ((1e-3, 1e-1), (1e-2, 1.0)):
            normal, defect = torch.randn(2000, generator=g), torch.randn(40, generator=g) + 2
            if tied:
                normal, defect = normal.round(decimals=1), defect.round(decimals=1)
            at_least = (normal[None] >= defect[:, None]).double().mean(1)
            above = (normal[None] > defect[:, None]).double().mean(1)
            got = float(answer(normal, defect, low, high))

            def credit(price: torch.Tensor, low: float = low, high: float = high) -> float:
                price = price.clamp(low, high)
                return float((high / price).log().mean() / torch.tensor(high / low).log())

            if abs(got - credit(at_least)) < 1e-6:
                continue
            if tied and abs(got - credit(above)) < 1e-6:
                return not_yet("A threshold at the pixel's score also fires on normal pixels that TIE with it: use >=.")
            if abs(got - float(((high - at_least.clamp(low, high)) / (high - low)).mean())) < 1e-5:
                return not_yet("The axis is logarithmic: integrate over log F.")
            if not 0 <= got <= 1:
                return not_yet(f"An area between 0 and 1, got {got:.4g}: clip the price to [low, high].")
            return not_yet(f"Expected {credit(at_least):.4f} for bounds ({low:g}, {high:g}), got {got:.4f}.")
    return correct("Exact, with ties and without a single threshold.")


def _precision_area(answer: Callable) -> Verdict:
    g = torch.Generator().manual_seed(16)
    for decimals in (6, 1):
        labels = (torch.rand(500, generator=g) < 0.1).long()
        scores = (torch.randn(500, generator=g).double() + labels).round(decimals=decimals)
        got = float(answer(scores, labels))
        positive, negative = scores[labels == 1], scores[labels == 0]
        price = (negative[None] >= positive[:, None]).double().mean(1)
        fires = (scores[None] >= positive[:, None]).double().mean(1)
        if abs(got - float(average_precision(scores, labels))) < 1e-9:
            continue
        if abs(got - float(1 - (price / fires).mean())) < 1e-9:
            return not_yet("Almost: the factor P(y = 0), the share of negatives, is missing.")
        if abs(got - float(1 - price.mean())) < 1e-9 or abs(got - float(auroc(scores, labels))) < 1e-9:
            return not_yet("This is the AUROC: divide each price by how often the detector fires there.")
        if decimals == 1:
            return not_yet("Right without ties, wrong with them: both shares count scores AT or above the positive's.")
        return not_yet(f"scikit-learn says {float(average_precision(scores, labels)):.4f}, you say {got:.4f}.")
    return correct("Average precision, and no curve was drawn.")


def _fool_frechet(answer: Callable) -> Verdict:
    g = torch.Generator().manual_seed(17)
    real = 0.05 * torch.randn(400, 2, generator=g).double()
    real[::2, 0] += 8
    made = torch.as_tensor(answer(real.clone())).double()
    if made.shape != real.shape:
        return not_yet(f"As many samples as there are real ones, shape {tuple(real.shape)}; got {tuple(made.shape)}.")
    distance, spread = float(frechet_distance(real, made)), float(real.T.cov().trace())
    if prdc(real, made, k=5).precision >= 0.3:
        return not_yet("Too many samples lie near real ones: that is imitation, not deception. Leave the clusters.")
    if distance > 1e-3 * spread:
        return not_yet(
            f"The distance is {distance:.3g}, the variance of the real features {spread:.3g}: match the mean AND the "
            "covariance of your samples exactly, not only those of their law."
        )
    return correct("Same mean, same covariance, and the real features have nothing else to do with it.")


def _distances_by_hand(answer: Any) -> Verdict:
    wide, thin = (float(v) for v in answer)
    if abs(wide - 8 / 3) < 1e-2 and abs(thin - 8) < 1e-2:
        return correct("The same length, three times the distance: the second part breaks a rule that good parts obey.")
    if abs(wide - 8) < 1e-2 and abs(thin - 8 / 3) < 1e-2:
        return not_yet("The right numbers for the wrong parts: along (1, 1) the variance is the LARGE one.")
    if abs(wide - 8) < 1e-2 and abs(thin - 8) < 1e-2:
        return not_yet("This is the squared plain distance. Divide each coordinate by its own VARIANCE, 3 or 1.")
    if abs(wide - 4) < 1e-2 and abs(thin - 4) < 1e-2:
        return not_yet("This divides by the diagonal only: rotate to the EIGENVECTORS first.")
    return not_yet("Subtract the mean, take coordinates along the two eigenvectors, square, divide by 3 and by 1, add.")


def _gaussian_pair(seed: int, d: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    mix = torch.diag(torch.linspace(3, 0.2, d).double()) @ torch.randn(d, d, generator=g).double()
    return tuple(torch.randn(n, d, generator=g).double() @ mix + 4 for n in (60, 40))


def _mahalanobis_score(answer: Callable) -> Verdict:
    train, new = _gaussian_pair(21)
    off, mean = train - train.mean(0), train.mean(0)
    got = torch.as_tensor(answer(train, new)).double()

    def against(points: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
        return -(points * torch.linalg.solve(covariance, points.T).T).sum(1)

    covariance = off.T @ off / len(train)
    expected = against(new - mean, covariance)
    if got.shape != expected.shape:
        return not_yet(f"One score per row of new, shape (40,); got {tuple(got.shape)}.")
    if torch.allclose(got, -expected, rtol=1e-4):
        return not_yet("The SIGN: a score is higher for what is more normal.")
    if torch.allclose(got, against(new, covariance), rtol=1e-4):
        return not_yet("Subtract the MEAN of train from new as well.")
    if torch.allclose(got, expected * (len(train) - 1) / len(train), rtol=1e-6):
        return not_yet("Divide the scatter by n, not by n - 1.")
    if torch.allclose(got, -(new - mean).square().sum(1), rtol=1e-4):
        return not_yet("This is the plain distance: the COVARIANCE is missing.")
    if not torch.allclose(got, expected, rtol=1e-4):
        return not_yet(f"For the first row the score should be {float(expected[0]):.4f}, got {float(got[0]):.4f}.")
    return correct("Factorise once, solve a triangle, square: no inverse needed.")


def _thin_half(answer: Callable) -> Verdict:
    for seed, share in ((22, 0.5), (23, 0.9), (24, 0.99)):
        train, new = _gaussian_pair(seed)
        off = train - train.mean(0)
        values, vectors = torch.linalg.eigh(off.T @ off / len(train))
        terms = (((new - train.mean(0)) @ vectors).square() / values).flip(1)  # widest first
        used = values.flip(0).cumsum(0) / values.sum()
        leading = int((used < share).sum()) + 1
        got = torch.as_tensor(answer(train, new, share)).double()
        if got.shape != (len(new),):
            return not_yet(f"One score per row of new, shape ({len(new)},); got {tuple(got.shape)}.")
        if torch.allclose(got, -terms[:, :leading].sum(1), rtol=1e-4):
            return not_yet("These are the LEADING directions: keep the others.")
        if torch.allclose(got, -terms[:, leading - 1 :].sum(1), rtol=1e-4):
            return not_yet("One too many: the direction that REACHES the share belongs to the leading ones.")
        if torch.allclose(got, -(terms * values.flip(0))[:, leading:].sum(1), rtol=1e-4):
            return not_yet("Divide each square by its EIGENVALUE.")
        if torch.allclose(got, -terms[:, leading:].sum(1) * (len(train) - 1) / len(train), rtol=1e-6):
            return not_yet("Divide the scatter by n, not by n - 1.")
        if not torch.allclose(got, -terms[:, leading:].sum(1), rtol=1e-4):
            return not_yet(f"For a share of {share:g}, {leading} of {len(values)} directions have to go.")
    return correct("What good parts agree on: these directions hold little variance and most of the alarm.")


def _hole(answer: Any) -> Verdict:
    good, odd = (torch.as_tensor(part).double() for part in answer)
    if good.ndim != 2 or good.shape[1] != 2 or odd.ndim != 2 or odd.shape[1] != 2:
        return not_yet("Two sets of points in the plane, (n, 2) each.")
    if not 200 <= len(good) <= 2000 or len(odd) < 50:
        return not_yet(f"200 to 2000 good points and at least 50 odd ones; got {len(good)} and {len(odd)}.")
    apart = torch.cdist(good, good).fill_diagonal_(torch.inf).amin(1).median()
    if float(torch.cdist(odd, good).amin()) <= 10 * float(apart):
        return not_yet("An odd point lies too NEAR to a good one: leave more room, or add good points.")
    off = good - good.mean(0)
    factor = torch.linalg.cholesky(off.T @ off / len(good) + 1e-12 * torch.eye(2))
    scores = [
        torch.linalg.solve_triangular(factor, (part - good.mean(0)).T, upper=False).square().sum(0)
        for part in (good, odd)
    ]
    area = float((scores[1][:, None] > scores[0]).double().mean())
    if area >= 0.1:
        return not_yet(f"One Gaussian finds them: AUROC {area:.2f}. What if nobody lives at the MEAN?")
    return correct("The mean of a ring is the last place where anybody lives.")


CHECKS: dict[str, Callable[[Any], Verdict]] = {
    "gaussian-features/1": _distances_by_hand,
    "gaussian-features/2": _mahalanobis_score,
    "gaussian-features/3": _thin_half,
    "gaussian-features/4": _hole,
    "scoring-the-scorer/1": _aupimo_by_hand,
    "scoring-the-scorer/2": _own_aupimo,
    "scoring-the-scorer/3": _precision_area,
    "scoring-the-scorer/4": _fool_frechet,
    "visual-anomalies/1": _coreset_by_hand,
    "visual-anomalies/2": _hardest_positions,
    "visual-anomalies/3": _normal_threshold,
    "visual-references/1": _residual_by_hand,
    "visual-references/2": _planar_log_det,
    "visual-references/3": _misalignment,
}
