"""Solutions are correct, stubs are not attempted, and planted wrong answers get the hint meant for them."""

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


SOLUTIONS = {
    "visual-anomalies/1": [0, 3, 2],
    "visual-anomalies/2": hard,
    "visual-anomalies/3": lambda s, rate: torch.quantile(s, rate),
    "visual-references/1": [1, -1],
    "visual-references/2": log_det,
    "visual-references/3": misalignment,
}

WRONG = [
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
