"""The exercises on shortcuts: solutions are correct, stubs are not, and planted wrong answers get their hint."""

import math

import pytest
import torch

from companion.exercises import judge
from companion.exercises.shortcuts import CHECKS


def distance_sums(x):
    ordered, order = x.sort()
    n, below = len(x), ordered.cumsum(0)
    rank = torch.arange(1, n + 1)
    sums = (2 * rank - n) * ordered + below[-1] - 2 * below
    return torch.empty_like(x).index_copy(0, order, sums)


def sorted_sums(x):
    return distance_sums(x.sort().values)


def all_pairs(x):
    return (x[:, None] - x).abs().sum(1)


def crossed(weight=1.0, n=25):
    s = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).repeat(n, 1)
    return weight * (s[:, 0] - s[:, 1]).abs().float(), s


def receptive_field(layers):
    size, jump = 1, 1
    for kernel, stride in layers:
        size, jump = size + (kernel - 1) * jump, jump * stride
    return size


def without_strides(layers):
    return 1 + sum(kernel - 1 for kernel, _ in layers)


def own_stride_first(layers):
    size, jump = 1, 1
    for kernel, stride in layers:
        jump *= stride
        size += (kernel - 1) * jump
    return size


def share(h, f):
    h, f = h - h.mean(0), f - f.mean()
    return (h.T @ f).square().sum() / (f.square().sum() * h.square().sum())


def uncentred(h, f):
    return (h.T @ f).square().sum() / (f.square().sum() * h.square().sum())


def unweighted(h, f):
    return torch.corrcoef(torch.cat([h, f[:, None]], 1).T)[-1, :-1].square().mean()


SHORTCUT_LEARNING = {
    "shortcut-learning/1": 0.375,
    "shortcut-learning/2": receptive_field,
    "shortcut-learning/3": share,
}

SOLUTIONS = {**SHORTCUT_LEARNING, "subgroups/1": 0.35, "subgroups/2": distance_sums, "subgroups/3": crossed()}

WRONG = [
    ("shortcut-learning/1", 0.25, "counted the loudness once"),
    ("shortcut-learning/1", 0.0, "converged"),
    ("shortcut-learning/1", -0.375, "wrong sign"),
    ("shortcut-learning/1", 1.5, "at most 1"),
    ("shortcut-learning/1", 0.4, "r = w_s / w_c"),
    ("shortcut-learning/2", 7, "function itself"),
    ("shortcut-learning/2", lambda layers: 0, "it sees 1"),
    ("shortcut-learning/2", lambda layers: max([1, *(k for k, _ in layers)]), "Draw it"),
    ("shortcut-learning/2", without_strides, "no strides"),
    ("shortcut-learning/2", own_stride_first, "Multiply afterwards"),
    ("shortcut-learning/3", 0.5, "function itself"),
    ("shortcut-learning/3", uncentred, "Centre"),
    ("shortcut-learning/3", unweighted, "counts more"),
    ("shortcut-learning/3", lambda h, f: share(h, f).sqrt(), "squared norms"),
    ("shortcut-learning/3", lambda h, f: 1 - share(h, f), "Numerator"),
    ("subgroups/1", 0.4375, "Weigh each background"),
    ("subgroups/1", 0.1225, "variance"),
    ("subgroups/1", math.sqrt((0.175**2 + 0.49) / 2), "8/10"),
    ("subgroups/1", 0.7, "7 of 10"),
    ("subgroups/2", 3.0, "function itself"),
    ("subgroups/2", lambda x: ..., "nothing yet"),
    ("subgroups/2", lambda x: distance_sums(x) / len(x), "means"),
    ("subgroups/2", lambda x: distance_sums(x).sum(), "one sum per number"),
    ("subgroups/2", sorted_sums, "back where they came from"),
    ("subgroups/2", all_pairs, "Sort once"),
    ("subgroups/2", lambda x: x, "double loop"),
    ("subgroups/2", lambda x: distance_sums(x.sub_(1)), "work on a copy"),
    ("subgroups/3", 1.0, "two things"),
    ("subgroups/3", (torch.ones(4), torch.ones(3)), "attributes"),
    ("subgroups/3", (torch.ones(4), torch.full((4, 2), 2.0)), "bits"),
    ("subgroups/3", crossed(n=5), "at least 10"),
    ("subgroups/3", crossed(0.0), "equal"),
    ("subgroups/3", (crossed()[1][:, 0].float(), crossed()[1]), "Attribute 1"),
    ("subgroups/3", crossed(0.1), "differ by 0.10"),
]


def test_every_check_has_a_solution():
    assert set(SOLUTIONS) == set(CHECKS)


@pytest.mark.parametrize("key", SOLUTIONS)
def test_solutions_are_correct(key):
    verdict = judge(key, SOLUTIONS[key])
    assert verdict.state == "correct", verdict


@pytest.mark.parametrize("n", [100, 400, 4000])
@pytest.mark.parametrize("seed", range(5))
def test_bits_may_be_drawn(n, seed):
    bits = torch.randint(2, (n, 2), generator=torch.Generator().manual_seed(seed))
    either, both = (bits[:, 0] != bits[:, 1]).float(), (bits[:, 0] * bits[:, 1]).float()
    assert judge("subgroups/3", (either, bits)).state == "correct"
    assert "already gives" in judge("subgroups/3", (both, bits)).message


@pytest.mark.parametrize("key", SOLUTIONS)
@pytest.mark.parametrize("stub", [None, ...])
def test_stubs_are_not(key, stub):
    assert judge(key, stub).state == "not attempted"


@pytest.mark.parametrize(("key", "answer", "hint"), WRONG)
def test_wrong_answers_get_their_hint(key, answer, hint):
    verdict = judge(key, answer)
    assert verdict.state == "not yet"
    assert hint in verdict.message
