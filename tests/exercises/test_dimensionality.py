"""The checks of the dimensionality exercises: solutions pass, stubs wait, known mistakes get their hint."""

import math

import pytest
import torch

from companion.exercises.core import judge


def _state(key, answer):
    return judge(key, answer).state


def _lstsq(p, difference):
    return torch.linalg.lstsq(p, difference[:, None]).solution[:, 0]


def nearest(theta0, p, theta):
    return theta0 + p @ _lstsq(p, theta - theta0)


def intruders(before, after, k, threshold, side="U", absolute=True, all_old=True):
    old, new = (torch.linalg.svd(m, full_matrices=False) for m in (before, after))
    a, b = (new.U.T, old.U.T) if side == "U" else (new.Vh, old.Vh)
    cosine = a[:k] @ (b if all_old else b[:k]).T
    return int(((cosine.abs() if absolute else cosine).amax(1) < threshold).sum())


class TestSubspaceTraining:
    def test_solutions_are_correct(self):
        assert _state("subspace-training/1", 0.6 * 2 + 0.8 * 5) == "correct"
        assert _state("subspace-training/2", nearest) == "correct"
        assert _state("subspace-training/3", intruders) == "correct"

    def test_stubs_are_not_attempted(self):
        assert _state("subspace-training/1", ...) == "not attempted"
        assert _state("subspace-training/2", lambda theta0, p, theta: ...) == "not attempted"
        assert _state("subspace-training/3", lambda before, after, k, threshold: None) == "not attempted"

    @pytest.mark.parametrize(
        ("key", "answer", "hint"),
        [
            ("1", 6.6, "starts at"),
            ("1", math.sqrt(29), "distance"),
            ("1", 1.0, "orthogonal"),
            ("2", lambda t0, p, t: t0 + p @ (p.T @ (t - t0)), "orthogonal"),
            ("2", lambda t0, p, t: p @ _lstsq(p, t), "origin"),
            ("2", lambda t0, p, t: t0, "nearer"),
            ("2", lambda t0, p, t: t, "does not lie"),
            ("2", lambda t0, p, t: t[:3], "shape"),
            ("3", lambda a, b, k, e: intruders(a, b, k, e, absolute=False), "sign"),
            ("3", lambda a, b, k, e: intruders(a, b, k, e, side="V"), "right singular"),
            ("3", lambda a, b, k, e: intruders(a, b, k, e, all_old=False), "every old"),
            ("3", lambda a, b, k, e: 5, "not right"),
        ],
    )
    def test_mistakes_get_their_hint(self, key, answer, hint):
        verdict = judge(f"subspace-training/{key}", answer)
        assert verdict.state == "not yet"
        assert hint in verdict.message


def mle_of_set(distances):
    return 1 / (distances[:, -1:] / distances[:, :-1]).log().mean()


def wound_curve(noise=0.0, turns=2):
    t = 2 * math.pi * torch.rand(1000, generator=torch.Generator().manual_seed(0))
    x = torch.stack([t.cos(), t.sin(), (turns * t).cos(), (turns * t).sin()], 1)
    return x + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))


class TestIntrinsicDimension:
    def test_solutions_are_correct(self):
        assert _state("intrinsic-dimension/2", mle_of_set) == "correct"
        assert _state("intrinsic-dimension/3", wound_curve()) == "correct"

    def test_stubs_are_not_attempted(self):
        assert _state("intrinsic-dimension/2", lambda distances: ...) == "not attempted"
        assert _state("intrinsic-dimension/2", ...) == "not attempted"
        assert _state("intrinsic-dimension/3", ...) == "not attempted"

    @pytest.mark.parametrize(
        ("key", "answer", "hint"),
        [
            ("2", lambda r: 1 / mle_of_set(r), "Invert it"),
            ("2", lambda r: (1 / (r[:, -1:] / r[:, :-1]).log().mean(1)).mean(), "averaged the dimensions"),
            ("2", lambda r: 1 / (r[:, -1:] / r).log().mean(), "k - 1"),
            ("2", lambda r: 1 / (r[:, -1:] / r[:, :-1]).log().mean(1), "one number"),
            ("2", lambda r: 3.0, "last distance"),
            ("3", wound_curve(turns=0), "participation ratio is"),
            ("3", wound_curve(noise=0.1), "TwoNN says"),
            ("3", wound_curve()[:100], "at least 500"),
        ],
    )
    def test_mistakes_get_their_hint(self, key, answer, hint):
        verdict = judge(f"intrinsic-dimension/{key}", answer)
        assert verdict.state == "not yet"
        assert hint in verdict.message
