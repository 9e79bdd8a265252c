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
