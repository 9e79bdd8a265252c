"""The checks of the mixup exercises: solutions pass, stubs wait, known mistakes get their hint."""

import math

import pytest
import torch

from companion.exercises.core import judge
from companion.mixup import channel_curve, make_bands


def length(mu):
    kappa, low, high = 1.5 / mu, 0.0, 1 / 3
    for _ in range(80):
        q = (low + high) / 2
        low, high = (q, high) if 1.5 * kappa * q < math.log((1 - q) / (2 * q)) else (low, q)
    return kappa * q


def pure_length(mu):
    kappa, low, high = 1.5 / mu, 0.0, 1 / 3
    for _ in range(80):
        q = (low + high) / 2
        low, high = (q, high) if 3 * kappa * q < math.log((1 - 2 * q) / q) else (low, q)
    return 2 * kappa * q


def crowded(gap=0.2, spread=1.5, n=21):
    between = torch.stack([torch.linspace(-spread, spread, n), torch.zeros(n)], 1)
    sides = torch.tensor([[-spread - gap, 0.0], [spread + gap, 0.0]]).repeat(120, 1)
    return torch.cat([between, sides]), torch.tensor([1] * n + [0] * 240)


class TestMixupGeometry:
    @pytest.mark.parametrize(
        ("key", "answer"), [("1", (0.35, 0.65)), ("1", torch.tensor([0.35, 0.65])), ("2", length), ("3", crowded())]
    )
    def test_solutions_are_correct(self, key, answer):
        assert judge(f"mixup-geometry/{key}", answer).state == "correct"

    @pytest.mark.parametrize("key", ["1", "2", "3"])
    def test_stubs_are_not_attempted(self, key):
        assert judge(f"mixup-geometry/{key}", ...).state == "not attempted"

    @pytest.mark.parametrize(
        ("key", "answer", "hint"),
        [
            ("1", (0.4, 0.6), "2/3"),
            ("1", (0.65, 0.35), "smaller end first"),
            ("1", 0.5, "pair"),
            ("2", lambda mu: pure_length(mu) / 2, "chord"),
            ("2", pure_length, "pure class"),
            ("2", lambda mu: float(channel_curve([0.5], 3, mu)[0, 1]), "limit"),
            ("2", lambda mu: 1.0, "Solve the equation"),
            ("3", make_bands(300, 7, generator=torch.Generator().manual_seed(0)), "much larger"),
            ("3", make_bands(300, 2, generator=torch.Generator().manual_seed(0)), "No blend intrudes"),
            ("3", crowded(gap=0.05), "apart"),
            ("3", (torch.zeros(5, 3), torch.arange(5)), "two classes"),
            ("3", torch.zeros(3), "pair"),
        ],
    )
    def test_mistakes_get_their_hint(self, key, answer, hint):
        verdict = judge(f"mixup-geometry/{key}", answer)
        assert verdict.state == "not yet"
        assert hint in verdict.message


def own_smote(x, n, k, generator, reach=1.0, lams=1, skip_self=True, everyone=False):
    distances = torch.cdist(x, x)
    if skip_self:
        distances.fill_diagonal_(math.inf)
    near = distances.topk(len(x) - 1 if everyone else k, largest=False).indices
    i = torch.randint(len(x), (n,), generator=generator)
    j = near[i, torch.randint(near.shape[1], (n,), generator=generator)]
    lam = reach * torch.rand(n, lams, generator=generator, dtype=x.dtype)
    return x[i] + lam * (x[j] - x[i])


def price_history(losses, eps, rate, low=0.0, sign=1.0):
    history, price = [], 0.0
    for loss in losses:
        price = max(low, price + sign * rate * (loss - eps))
        history.append(price)
    return history


def ring(inner=0.2, shift=0.0):
    angle = 2 * math.pi * torch.arange(400) / 400
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    return circle, inner * circle + shift


class TestMixingBeyondLabels:
    @pytest.mark.parametrize(
        ("key", "answer"),
        [("1", (0.225, 0.5)), ("1", torch.tensor([0.225, 0.5])), ("2", own_smote), ("3", price_history), ("4", ring())],
    )
    def test_solutions_are_correct(self, key, answer):
        assert judge(f"mixing-beyond-labels/{key}", answer).state == "correct"

    @pytest.mark.parametrize("key", ["1", "2", "3", "4"])
    def test_stubs_are_not_attempted(self, key):
        assert judge(f"mixing-beyond-labels/{key}", ...).state == "not attempted"

    @pytest.mark.parametrize(
        ("key", "answer", "hint"),
        [
            ("1", (0.275, 0.5), "wrong terms"),
            ("1", (0.35, 0.5), "margin"),
            ("1", (0.225, 0.75), "slope"),
            ("1", (0.1, 0.5), "The loss is"),
            ("1", 0.225, "pair"),
            ("2", lambda x, n, k, g: own_smote(x, n, k, g, reach=1.5), "beyond the ends"),
            ("2", lambda x, n, k, g: own_smote(x, n, k, g, lams=3), "one per column"),
            ("2", lambda x, n, k, g: own_smote(x, n, k, g, everyone=True), "k nearest"),
            ("2", lambda x, n, k, g: own_smote(x, n, k, g, skip_self=False), "its own neighbour"),
            ("2", lambda x, n, k, g: own_smote(x[:5], n, k, g), "k nearest"),
            ("2", lambda x, n, k, g: own_smote(x, 1, k, g).expand(n, -1), "Only some"),
            ("2", lambda x, n, k, g: own_smote(x, n // 2, k, g), "shape"),
            ("3", lambda *a: price_history(*a, low=-math.inf), "below zero"),
            ("3", lambda *a: [max(0.0, v) for v in price_history(*a, low=-math.inf)], "every step"),
            ("3", lambda *a: price_history(*a, sign=-1.0), "sign"),
            ("3", lambda *a: [0.0, *price_history(*a)], "after each loss"),
            ("3", lambda losses, eps, rate: price_history(losses, eps, 1.0), "rate"),
            ("4", ring(shift=1.0), "apart"),
            ("4", ring(inner=1.0), "overlap"),
            ("4", torch.zeros(3), "pair"),
            ("4", (torch.zeros(5, 2), torch.zeros(5, 2)), "200"),
            ("4", tuple(v.repeat(2, 1) for v in ring(inner=1.0)), "overlap"),
            ("4", tuple(v[::8].repeat(8, 1) for v in ring()), "different points"),
        ],
    )
    def test_mistakes_get_their_hint(self, key, answer, hint):
        verdict = judge(f"mixing-beyond-labels/{key}", answer)
        assert verdict.state == "not yet"
        assert hint in verdict.message
