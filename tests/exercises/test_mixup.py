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
    @pytest.mark.parametrize(("key", "answer"), [("1", (0.35, 0.65)), ("2", length), ("3", crowded())])
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
