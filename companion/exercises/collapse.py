"""Checks of the exercises on collapse: `neural-collapse`, `fixed-classifiers`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from companion.checks import as_tensor
from companion.collapse import gof_solution, neural_collapse
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
        if got == [n <= sum(counts) ** 2 * max(lam_w, lam_h) ** 2 for n in counts] != expected or lam_w == lam_h:
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


CHECKS: dict[str, Callable[[Any], Verdict]] = {
    "neural-collapse/2": _simplex,
    "neural-collapse/3": _dead,
    "neural-collapse/4": _points_without_simplex,
}
