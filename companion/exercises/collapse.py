"""Checks of the exercises on collapse: `neural-collapse`, `fixed-classifiers`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from companion.checks import as_tensor
from companion.collapse import ZLoss, frechet_predict, gof_solution, neural_collapse
from companion.exercises.core import Verdict, correct, not_yet

__all__ = ["CHECKS"]


def _simplex(answer: Callable[[int], Tensor]) -> Verdict:
    for n_classes in (2, 3, 7, 20):
        v = as_tensor(answer(n_classes)).double()
        if v.shape != (n_classes, n_classes):
            return not_yet(f"For C = {n_classes} the result should have shape ({n_classes}, {n_classes}).")
        if float((v.norm(dim=1) - 1).abs().max()) > 1e-4:
            return not_yet("Not all vectors have length one. Normalise the rows at the end.")
        cosines = (v @ v.T)[~torch.eye(n_classes, dtype=torch.bool)]
        if float((cosines - cosines.mean()).abs().max()) > 1e-4:
            return not_yet("The angles between the vectors are not all equal.")
        if float((cosines + 1 / (n_classes - 1)).abs().max()) > 1e-4:
            return not_yet(
                "All angles are equal, but they could be wider: do the vectors sum to zero? Subtract their mean first."
            )
    return correct("A simplex for every C: equal lengths, equal and widest angles.")


def _dead(answer: Callable[..., Any]) -> Verdict:
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        counts = torch.randint(1, 120, (6,), generator=generator).tolist()
        lam_w, lam_h = (0.03 * torch.rand(2, generator=generator) + 1e-3).tolist()
        expected = gof_solution(counts, lam_w, lam_h).collapsed.tolist()
        got = [bool(v) for v in answer(counts, lam_w, lam_h)]
        if len(got) != len(counts):
            return not_yet("There should be one value for every class.")
        if got == [not dies for dies in expected]:
            return not_yet("It is the other way round: True is for the classes that die.")
        if got == [n <= sum(counts) ** 2 * max(lam_w, lam_h) ** 2 for n in counts] != expected:
            return not_yet("Both weight decays matter, as a product.")
        if got != expected:
            return not_yet(
                f"For counts {counts} it should be {expected}. A class dies when its singular value, the root of its "
                "count, is not above the threshold `N * sqrt(lam_w * lam_h)`, with N the sum of all counts."
            )
    return correct("The same classes die as in the closed form.")


def _points_without_simplex(answer: tuple[Any, Any]) -> Verdict:
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        return not_yet("The answer should be a pair (features, labels).")
    features, labels = as_tensor(answer[0]), as_tensor(answer[1])
    counts = torch.bincount(labels)
    if features.dim() != 2 or features.shape[1] != 3 or len(counts) != 3 or int(counts.min()) < 100:
        return not_yet("Build three classes of at least 100 samples each in three dimensions.")
    measured = neural_collapse(features, labels)
    if float(measured["nc1"]) >= 1e-3:
        return not_yet("NC1 is still too large: make the classes tighter, or move them apart.")
    if float(measured["nc2_angles"]) <= 0.3:
        return not_yet("These classes are tight, but their means nearly form a simplex. Put one between the other two.")
    return correct("Tight classes, badly arranged: NC1 alone does not see it.")


def _four_lines(answer: tuple[float, float]) -> Verdict:
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        return not_yet("The answer should be a pair (bound, best).")
    bound, best = (float(v) for v in answer)
    if abs(bound - 2**-0.5) < 0.006 and abs(best - 3**-0.5) < 0.006:
        return not_yet("It is the other way round: the bound comes first, and nothing lies below it.")
    if abs(bound - 3**-0.5) > 0.006:
        return not_yet("The bound is the root of `(C - d) / (d * (C - 1))` with C = 4 and d = 2.")
    if abs(best - 0.5) < 0.006 or abs(best) < 0.006:
        return not_yet("A line points both ways: four lines divide 180 degrees, not 360.")
    if abs(best - 2**-0.5) > 0.006:
        return not_yet("What is the widest smallest angle that four lines in a plane can keep?")
    return correct("The bound cannot be met: no four lines in a plane have equal angles.")


def _z_loss(answer: Callable[..., Tensor]) -> Verdict:
    generator = torch.Generator().manual_seed(5)
    for a, b, n_classes in ((1.0, 2.0, 5), (0.5, 3.0, 4), (4.0, 1.0, 9)):
        logits = torch.randn(7, n_classes, generator=generator, dtype=torch.float64)
        labels = torch.randint(n_classes, (7,), generator=generator)
        got, loss = as_tensor(answer(logits, labels, a, b)).double(), ZLoss(a, b)
        expected = loss(logits, labels)
        if got.shape != ():
            return not_yet("The result should be one number, the mean over the batch.")
        if torch.isclose(got, expected):
            continue
        if a != 1 and torch.isclose(got, a * expected):
            return not_yet("The logarithm is divided by a.")
        z = (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True)
        z = z.gather(1, labels[:, None])[:, 0]
        if torch.isclose(got, (torch.nn.functional.softplus(a * (b - z)) / a).mean()):
            return not_yet("The variance divides by C, not by C - 1: pass `correction=0`.")
        return not_yet(f"For a = {a:g} and b = {b:g} it should be {expected:.4f}, not {got:.4f}.")
    return correct("The same value as `ZLoss`, for any a and b.")


def _frechet(answer: Callable[[Tensor, Tensor], Tensor]) -> Verdict:
    generator = torch.Generator().manual_seed(7)
    probs = (3 * torch.randn(200, 5, generator=generator)).softmax(1)
    points = torch.rand(30, 2, generator=generator)
    distances = torch.cdist(points[:5], points)
    got = as_tensor(answer(probs, distances))
    if got.shape != (200,):
        return not_yet("There should be one label per row of probabilities: shape (200,).")
    if torch.equal(got, frechet_predict(probs, distances)):
        return correct("The label with the least expected squared distance, seen or unseen.")
    if torch.equal(got, frechet_predict(probs, distances, power=1.0)):
        return not_yet("This minimises the expected distance. Square the distances first.")
    if torch.equal(got, probs.argmax(1)):
        return not_yet("This is argmax, which can only answer with the observed labels.")
    if torch.equal(got, (probs @ distances**2).argmax(1)):
        return not_yet("This label is the furthest away: take the minimum.")
    return not_yet("The labels differ from the minimum over y of `sum_k p_k * d(k, y)**2`.")


CHECKS: dict[str, Callable[[Any], Verdict]] = {
    "neural-collapse/2": _simplex,
    "neural-collapse/3": _dead,
    "neural-collapse/4": _points_without_simplex,
    "fixed-classifiers/1": _four_lines,
    "fixed-classifiers/2": _z_loss,
    "fixed-classifiers/3": _frechet,
}
