"""Solutions are correct, stubs are not attempted, and planted wrong answers get the hint meant for them."""

import math

import pytest
import torch

from companion.exercises import judge


def hard(d, share):
    flat = d.flatten()
    return flat.topk(max(1, round(share * len(flat)))).values.mean()


def log_det(z, u, w, b):
    return torch.log((1 + (u @ w) * (1 - torch.tanh(w @ z + b) ** 2)).abs())


def misalignment(a, b):
    return 1 - torch.nn.functional.cosine_similarity(a, b, dim=1)


def prices(normal, defect):
    return (normal[None] >= defect[:, None]).double().mean(1)


def aupimo(normal, defect, low, high, price=prices):
    return float((high / price(normal, defect).clamp(low, high)).log().mean() / math.log(high / low))


def linear_aupimo(normal, defect, low, high):
    return float((high - prices(normal, defect).clamp(low, high)).mean() / (high - low))


def precision_area(scores, labels, share=True):
    positive = scores[labels == 1]
    fires = (scores[None] >= positive[:, None]).double().mean(1)
    factor = (labels == 0).double().mean() if share else 1
    return 1 - factor * (prices(scores[labels == 0], positive) / fires).mean()


def fool(real):
    z = torch.randn(real.shape, generator=torch.Generator().manual_seed(0), dtype=real.dtype)
    z = z - z.mean(0)
    z = torch.linalg.solve_triangular(torch.linalg.cholesky(z.T.cov()), z.T, upper=False)
    return (torch.linalg.cholesky(real.T.cov()) @ z).T + real.mean(0)


def normal_score(train, new, correction=0, centre=True):
    off = train - train.mean(0)
    z = new - train.mean(0) if centre else new
    return -(z * torch.linalg.solve(off.T @ off / (len(train) - correction), z.T).T).sum(1)


def thin_score(train, new, variance, extra=0, weigh=True, leading_only=False, correction=0):
    off = train - train.mean(0)
    values, vectors = torch.linalg.eigh(off.T @ off / (len(train) - correction))
    values, vectors = values.flip(0), vectors.flip(1)
    k = int((values.cumsum(0) / values.sum() < variance).sum()) + 1 - extra
    kept = slice(0, k) if leading_only else slice(k, None)
    z = ((new - train.mean(0)) @ vectors).square()
    return -(z / values if weigh else z)[:, kept].sum(1)


def ring(n=1000, radius=1.0):
    angle = 2 * torch.pi * torch.arange(n) / n
    return radius * torch.stack([angle.cos(), angle.sin()], 1)


SOLUTIONS = {
    "gaussian-features/1": (8 / 3, 8),
    "gaussian-features/2": normal_score,
    "gaussian-features/3": thin_score,
    "gaussian-features/4": (ring(), ring(60, 0.05)),
    "scoring-the-scorer/1": 0.375,
    "scoring-the-scorer/2": aupimo,
    "scoring-the-scorer/3": precision_area,
    "scoring-the-scorer/4": fool,
    "visual-anomalies/1": [0, 3, 2],
    "visual-anomalies/2": hard,
    "visual-anomalies/3": lambda s, rate: torch.quantile(s, rate),
    "visual-references/1": [1, -1],
    "visual-references/2": log_det,
    "visual-references/3": misalignment,
}

WRONG = [
    ("gaussian-features/1", (8, 8 / 3), "LARGE"),
    ("gaussian-features/1", (8, 8), "VARIANCE"),
    ("gaussian-features/1", (4, 4), "EIGENVECTORS"),
    ("gaussian-features/1", (1, 2), "coordinates along"),
    ("gaussian-features/2", lambda train, new: -normal_score(train, new), "SIGN"),
    ("gaussian-features/2", lambda train, new: normal_score(train, new, centre=False), "MEAN"),
    ("gaussian-features/2", lambda train, new: normal_score(train, new, correction=1), "n - 1"),
    ("gaussian-features/2", lambda train, new: -(new - train.mean(0)).square().sum(1), "COVARIANCE"),
    ("gaussian-features/2", lambda train, new: normal_score(train, new).mean(), "One score per row"),
    ("gaussian-features/3", lambda train, new, v: thin_score(train, new, v, leading_only=True), "LEADING"),
    ("gaussian-features/3", lambda train, new, v: thin_score(train, new, v, extra=1), "REACHES"),
    ("gaussian-features/3", lambda train, new, v: thin_score(train, new, v, weigh=False), "EIGENVALUE"),
    ("gaussian-features/3", lambda train, new, v: thin_score(train, new, v, correction=1), "n - 1"),
    ("gaussian-features/4", (ring(), ring(60, 3.0)), "MEAN"),
    ("gaussian-features/4", (ring(), ring(60, 0.99)), "NEAR"),
    ("gaussian-features/4", (ring(50), ring(60, 0.1)), "200 to 2000"),
    ("scoring-the-scorer/1", 0.75, "recall at U"),
    ("scoring-the-scorer/1", 0.477, "logarithmic"),
    ("scoring-the-scorer/1", 0.8475, "AUROC"),
    ("scoring-the-scorer/2", linear_aupimo, "logarithmic"),
    ("scoring-the-scorer/2", lambda n, d, a, b: aupimo(n, d - 1e-6, a, b, lambda n, d: prices(n, d + 2e-6)), "TIE"),
    ("scoring-the-scorer/2", lambda n, d, a, b: float((b / prices(n, d)).log().mean() / math.log(b / a)), "clip"),
    ("scoring-the-scorer/3", lambda s, y: precision_area(s, y, share=False), "P(y = 0)"),
    ("scoring-the-scorer/3", lambda s, y: 1 - prices(s[y == 0], s[y == 1]).mean(), "divide"),
    ("scoring-the-scorer/4", lambda real: real.clone(), "imitation"),
    ("scoring-the-scorer/4", lambda real: real + torch.tensor([0.0, 3.0]), "match the mean"),
    ("visual-anomalies/1", [0, 3, 1], "NEAREST"),
    ("visual-anomalies/1", [0, 10, 3], "row numbers"),
    ("visual-anomalies/2", lambda d, share: hard(-d, share).neg(), "LARGEST"),
    ("visual-anomalies/2", lambda d, share: d.mean(), "mean of all|should be"),
    ("visual-anomalies/2", lambda d, share: d.flatten().topk(round(share * d.numel())).values.mean(), "at least one"),
    ("visual-anomalies/3", lambda s, rate: torch.quantile(s, 1 - rate), "LOW end"),
    ("visual-anomalies/3", lambda s, rate: s.min(), "could be higher"),
    ("visual-references/1", [-1, 1], "sign"),
    ("visual-references/1", [5, 3], "NEAREST"),
    ("visual-references/2", lambda z, u, w, b: log_det(z, u, w, b).exp(), "logarithm"),
    ("visual-references/2", lambda z, u, w, b: torch.log((1 + u @ w).abs()), "slope"),
    ("visual-references/3", lambda a, b: 1 - misalignment(a, b), "higher = worse"),
    ("visual-references/3", lambda a, b: 1 - (a * b).sum(1), "length"),
]


@pytest.mark.parametrize("key", SOLUTIONS)
def test_solution_is_correct_and_stub_is_not(key):
    assert judge(key, SOLUTIONS[key]).state == "correct"
    assert judge(key, ...).state == "not attempted"


@pytest.mark.parametrize(("key", "answer", "hint"), WRONG)
def test_wrong_answers_get_their_hint(key, answer, hint):
    verdict = judge(key, answer)
    assert verdict.state == "not yet"
    assert any(h in verdict.message for h in hint.split("|")), verdict.message
