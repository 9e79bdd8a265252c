"""The exercises on calibration: solutions are correct, stubs are not, and planted wrong answers get their hint."""

import math

import pytest
import torch

from companion.calibration import TemperatureScaler, binary_calibration_error, nll_slope
from companion.exercises import judge
from companion.exercises.calibration import CHECKS


def bisect(logits, labels):
    scale = logits.double().std().item()
    low, high = math.log(scale) - 12, math.log(scale) + 12
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if nll_slope(logits, labels, math.exp(middle)) < 0 else (low, middle)
    return math.exp(middle)


def grid(logits, labels):
    candidates = torch.linspace(0.1, 10, 2000, dtype=torch.float64)
    losses = [torch.nn.functional.cross_entropy(logits / t, labels) for t in candidates]
    return candidates[torch.stack(losses).argmin()].item()


def miss(probs, labels):
    entropy = -(probs * probs.log()).sum(1)
    return (probs.argmax(1) != labels) & (probs.gather(1, labels[:, None]).squeeze(1) > (-entropy).exp())


def cancelling(n=4000, confidence=0.75, sure=1.0):
    probs = torch.tensor([[confidence, 1 - confidence]]).repeat(n, 1)
    group = torch.arange(n) < n // 2
    labels = torch.where(group, (torch.arange(n) >= sure * n // 2).long(), torch.arange(n) % 2)
    return probs, labels, group


def my_ece(confidence, correct, n_bins, closed="right", zero=True, weighted=True):
    gaps, sizes = [], []
    for k in range(n_bins):
        low, high = k / n_bins, (k + 1) / n_bins
        if closed == "right":
            inside = (confidence > low) & (confidence <= high)
        else:
            inside = (confidence >= low) & ((confidence < high) | (k == n_bins - 1))
        if k == 0 and zero:
            inside |= confidence == 0
        if inside.any():
            gaps.append((confidence[inside] - correct[inside].to(confidence)).mean().abs().item())
            sizes.append(int(inside.sum()) if weighted else 1)
    return sum(g * n for g, n in zip(gaps, sizes)) / sum(sizes)


def broken(high=0.49, n_right=454, n=1000, turned=False):
    right = torch.arange(n) < n_right
    return torch.where(right ^ turned, 0.41, high), right


SOLUTIONS = {
    "measuring-calibration/1": -1 / 6,
    "measuring-calibration/2": my_ece,
    "measuring-calibration/3": broken(),
    "measuring-calibration/4": 3600,
    "recalibration/1": 3 / math.log(9),
    "recalibration/2": bisect,
    "recalibration/3": miss,
    "recalibration/4": cancelling(),
}

WRONG = [
    ("measuring-calibration/1", 1 / 6, "sign"),
    ("measuring-calibration/1", 0.28, "This is the Brier score"),
    ("measuring-calibration/1", 0.2, "calibration error"),
    ("measuring-calibration/1", 0.7, "Six times"),
    ("measuring-calibration/2", 0.1, "function itself"),
    ("measuring-calibration/2", lambda c, o, b: None, "returns nothing"),
    ("measuring-calibration/2", lambda c, o, b: my_ece(c, o, b, zero=False), "belongs to the first"),
    ("measuring-calibration/2", lambda c, o, b: my_ece(c, o, b, closed="left"), "bin below it"),
    ("measuring-calibration/2", lambda c, o, b: my_ece(c, o, b, weighted=False), "weighted"),
    ("measuring-calibration/2", lambda c, o, b: binary_calibration_error(c, o, b, "max"), "largest gap"),
    ("measuring-calibration/3", torch.rand(5), "tuple of two"),
    ("measuring-calibration/3", broken(n=100), "thousand"),
    ("measuring-calibration/3", broken(n_right=300), "equal the mean statement"),
    ("measuring-calibration/3", (torch.full((1000,), 0.5), torch.arange(1000) % 2), "only"),
    ("measuring-calibration/3", broken(n_right=446, turned=True), "less often"),
    ("measuring-calibration/4", 60, "square"),
    ("measuring-calibration/4", 5968, "bound"),
    ("measuring-calibration/4", 100000, "Sum the roots"),
    ("recalibration/1", math.log(9) / 3, "1 / T"),
    ("recalibration/1", 3 / 0.9, "odds"),
    ("recalibration/1", 3 / math.log10(9), "natural"),
    ("recalibration/1", 0.5, "above 1"),
    ("recalibration/1", 7.0, "Which odds"),
    ("recalibration/1", "two", "raised ValueError"),
    ("recalibration/2", 2.0, "function itself"),
    ("recalibration/2", lambda logits, labels: None, "returns nothing"),
    ("recalibration/2", lambda logits, labels: 1 / bisect(logits, labels), "inverse"),
    ("recalibration/2", grid, "ordinary size"),
    ("recalibration/2", lambda logits, labels: 1.0, "higher"),
    ("recalibration/2", lambda logits, labels: 50.0, "lower"),
    ("recalibration/2", lambda logits, labels: -1.0, "positive"),
    ("recalibration/2", lambda logits, labels: bisect(logits.mul_(2), labels), "copy"),
    ("recalibration/3", torch.zeros(3), "function itself"),
    ("recalibration/3", lambda probs, labels: ..., "returns nothing"),
    ("recalibration/3", lambda probs, labels: probs.argmax(1) != labels, "threshold"),
    ("recalibration/3", lambda probs, labels: miss(probs, labels).float(), "boolean"),
    ("recalibration/3", lambda probs, labels: probs.gather(1, labels[:, None])[:, 0] > 0.4, "right predictions"),
    (
        "recalibration/3",
        lambda probs, labels: (probs.argmax(1) != labels) & ~miss(probs, labels),
        "turned around",
    ),
    (
        "recalibration/3",
        lambda probs, labels: probs.gather(1, labels[:, None])[:, 0] > (probs * probs.log()).sum(1).exp(),
        "wrong, too",
    ),
    ("recalibration/4", torch.rand(10, 2), "tuple of three"),
    ("recalibration/4", cancelling(n=100), "two thousand"),
    ("recalibration/4", cancelling(confidence=0.6), "cancel within each bin"),
    ("recalibration/4", (torch.full((2000, 3), 1 / 3), *cancelling(2000)[1:]), "Two classes"),
    ("recalibration/4", (*cancelling()[:2], torch.ones(4000, dtype=torch.bool)), "both groups have members"),
    ("recalibration/4", cancelling(confidence=0.65, sure=0.8), "exceed 0.2"),
]


@pytest.mark.parametrize("key", sorted(SOLUTIONS))
def test_solution_is_correct(key):
    assert judge(key, SOLUTIONS[key]).state == "correct"


@pytest.mark.parametrize("key", sorted(CHECKS))
@pytest.mark.parametrize("stub", [None, ...])
def test_stub_is_not_attempted(key, stub):
    assert judge(key, stub).state == "not attempted"


@pytest.mark.parametrize(("key", "answer", "hint"), WRONG)
def test_wrong_answers_get_their_hint(key, answer, hint):
    verdict = judge(key, answer)
    assert verdict.state == "not yet"
    assert hint in verdict.message


def test_every_check_has_a_solution_and_two_wrong_answers():
    assert set(SOLUTIONS) == set(CHECKS)
    for key in CHECKS:
        assert sum(key == wrong for wrong, *_ in WRONG) >= 2


def test_another_right_way():
    def with_the_scaler(logits, labels):
        return TemperatureScaler().fit(logits, labels).temperature_

    assert judge("recalibration/2", with_the_scaler).state == "correct"
