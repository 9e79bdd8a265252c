"""The checks of the collapse exercises: solutions pass, stubs wait, known mistakes get their hint."""

import pytest
import torch

from companion.exercises.core import judge


def simplex(n_classes):
    corners = torch.eye(n_classes) - 1 / n_classes
    return corners / corners.norm(dim=1, keepdim=True)


def dead(counts, lam_w, lam_h):
    return [n <= sum(counts) ** 2 * lam_w * lam_h for n in counts]


def three_points(corners, spread=1e-3):
    labels = torch.arange(600) % 3
    noise = torch.randn(600, 3, generator=torch.Generator().manual_seed(0))
    return torch.tensor(corners)[labels] + spread * noise, labels


LINE = [[-1.0, 0.0, 0.0], [0.0, 0.4, 0.0], [1.0, 0.0, 0.0]]


class TestNeuralCollapse:
    @pytest.mark.parametrize(("key", "answer"), [("2", simplex), ("3", dead), ("4", three_points(LINE))])
    def test_solutions_are_correct(self, key, answer):
        assert judge(f"neural-collapse/{key}", answer).state == "correct"

    @pytest.mark.parametrize("key", ["2", "3", "4"])
    def test_stubs_are_not_attempted(self, key):
        assert judge(f"neural-collapse/{key}", ...).state == "not attempted"

    @pytest.mark.parametrize(
        ("key", "answer", "hint"),
        [
            ("2", torch.eye, "sum to zero"),
            ("2", lambda c: torch.eye(c) - 1 / c, "length one"),
            ("2", lambda c: simplex(c)[:, :-1], "shape"),
            ("3", lambda n, w, h: [not d for d in dead(n, w, h)], "other way round"),
            ("3", lambda n, w, h: [k <= sum(n) * (w * h) ** 0.5 for k in n], "threshold"),
            ("3", lambda n, w, h: dead(n, max(w, h), max(w, h)), "as a product"),
            ("3", lambda n, w, h: [True], "one value for every class"),
            ("4", three_points(LINE, spread=0.5), "too large"),
            ("4", three_points([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), "simplex"),
            ("4", torch.zeros(3), "pair"),
        ],
    )
    def test_mistakes_get_their_hint(self, key, answer, hint):
        verdict = judge(f"neural-collapse/{key}", answer)
        assert verdict.state == "not yet"
        assert hint in verdict.message


def z_loss(logits, labels, a, b, correction=0, factor=1.0):
    z = (logits - logits.mean(1, keepdim=True)) / logits.std(1, correction=correction, keepdim=True)
    z = z.gather(1, labels[:, None])[:, 0]
    return factor * (torch.nn.functional.softplus(a * (b - z)) / a).mean()


def frechet(probs, distances, power=2):
    return (probs @ distances**power).argmin(1)


class TestFixedClassifiers:
    @pytest.mark.parametrize(("key", "answer"), [("1", (0.577, 0.707)), ("2", z_loss), ("3", frechet)])
    def test_solutions_are_correct(self, key, answer):
        assert judge(f"fixed-classifiers/{key}", answer).state == "correct"

    @pytest.mark.parametrize("key", ["1", "2", "3"])
    def test_stubs_are_not_attempted(self, key):
        assert judge(f"fixed-classifiers/{key}", ...).state == "not attempted"

    @pytest.mark.parametrize(
        ("key", "answer", "hint"),
        [
            ("1", (0.577, 0.0), "both ways"),
            ("1", (0.707, 0.577), "other way round"),
            ("1", (0.5, 0.707), "root of"),
            ("1", 0.577, "pair"),
            ("2", lambda z, y, a, b: z_loss(z, y, a, b, correction=1), "correction=0"),
            ("2", lambda z, y, a, b: z_loss(z, y, a, b, factor=a), "divided by a"),
            ("2", lambda z, y, a, b: z_loss(z, y, a, b + 1), "should be"),
            ("3", lambda p, d: frechet(p, d, 1), "Square"),
            ("3", lambda p, d: p.argmax(1), "argmax"),
            ("3", lambda p, d: (p @ d**2).argmax(1), "minimum"),
            ("3", lambda p, d: p @ d**2, "one label per row"),
        ],
    )
    def test_mistakes_get_their_hint(self, key, answer, hint):
        verdict = judge(f"fixed-classifiers/{key}", answer)
        assert verdict.state == "not yet"
        assert hint in verdict.message
