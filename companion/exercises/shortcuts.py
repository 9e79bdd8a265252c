"""Checks of the exercises on shortcuts.

Public: `CHECKS`, from "<chapter>/<number>" to the function that judges an answer.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from companion.exercises.core import Verdict, correct, not_yet
from companion.shortcuts import distance_covariance, variance_explained

__all__ = ["CHECKS"]

# --- subgroups ---------------------------------------------------------------------------------------------


def _spread_by_hand(answer: Any) -> Verdict:
    value = float(answer)
    if math.isclose(value, 0.35, abs_tol=2e-3):
        return correct("The class mean is 0.7, and a fifth of the images carries four fifths of the variance.")
    if math.isclose(value, 0.4375, abs_tol=2e-3):
        return not_yet("This is the plain spread of 7/8 and 0. Weigh each background by its number of images.")
    if math.isclose(value, 0.35**2, abs_tol=2e-3):
        return not_yet("This is the variance. Take the root.")
    if math.isclose(value, math.sqrt((0.175**2 + 0.7**2) / 2), abs_tol=2e-3):
        return not_yet("The distances to the class mean are right. Weigh them by 8/10 and 2/10, not by one half each.")
    return not_yet("First the accuracy of the whole class, 7 of 10. Then how far is each background from it?")


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation writes."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                self.size = max(self.size, t.numel())
        return out


def _sums_of_distances(answer: Any) -> Verdict:
    if not callable(answer):
        return not_yet('Pass the function itself: `check("subgroups/2", distance_sums)`.')
    generator = torch.Generator().manual_seed(5)
    for x in (torch.randn(50, generator=generator), torch.tensor([3.0, 1.0, 1.0, 2.0]), torch.tensor([4.0, -1.0])):
        x = x.double()
        given, wanted = x.clone(), (x[:, None] - x).abs().sum(1)
        found = answer(given)
        if found is None or found is Ellipsis:
            return not_yet("Your function returns nothing yet.")
        found = torch.as_tensor(found).double()
        if not torch.equal(given, x):
            return not_yet("Your function changes the numbers it is given: work on a copy.")
        if found.shape != x.shape:
            return not_yet(f"Return one sum per number: shape {tuple(x.shape)}, yours has {tuple(found.shape)}.")
        if torch.allclose(found, wanted):
            continue
        if torch.allclose(found, wanted / len(x)):
            return not_yet("These are means. Return sums.")
        if torch.allclose(found.sort().values, wanted.sort().values):
            return not_yet(
                "The sums are right, in the order of the sorted numbers. Put them back where they came from."
            )
        return not_yet("Compare with the double loop on four numbers. How many numbers lie below the i-th smallest?")
    with _Largest() as seen:
        answer(torch.randn(2000, generator=generator, dtype=torch.float64))
    if seen.size > 100_000:
        return not_yet("Right, and you wrote a table of n x n distances. Sort once; the sums follow from running sums.")
    return correct("One sort and one running sum: this is the first half of distance covariance in O(n log n).")


def _fair_in_every_margin(answer: Any) -> Verdict:
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        return not_yet("Return two things: scores of shape (n,) and attributes of shape (n, 2).")
    scores, s = (torch.as_tensor(part).double() for part in answer)
    if scores.dim() != 1 or s.shape != (len(scores), 2):
        return not_yet(
            f"Expected scores (n,) and attributes (n, 2), yours have {tuple(scores.shape)}, {tuple(s.shape)}."
        )
    if not bool(((s == 0) | (s == 1)).all()):
        return not_yet("The attributes are bits: only 0 and 1.")
    cell = (2 * s[:, 0] + s[:, 1]).long()
    counts = torch.bincount(cell, minlength=4)
    if int(counts.min()) < 10:
        return not_yet(f"Every combination needs at least 10 people, one of yours has {int(counts.min())}.")
    if not distance_covariance(scores, scores) > 0:
        return not_yet("All scores are equal: that is fair everywhere. Let some combination be worse off.")
    g = torch.Generator().manual_seed(0)
    for k in (0, 1):
        # in a sample there is some dependence by chance: no more than when the bits are dealt out anew
        dealt = [distance_covariance(scores, s[torch.randperm(len(s), generator=g), k]) for _ in range(99)]
        if distance_covariance(scores, s[:, k]) > 1.5 * max(dealt):
            return not_yet(f"Attribute {k + 1} alone already gives the unfairness away. What must cancel, and how?")
    means = torch.stack([scores[cell == c].mean() for c in range(4)])
    gap = float(means.max() - means.min())
    if gap < 0.5:
        return not_yet(f"The margins are even, and so are the combinations: their means differ by {gap:.2f} only.")
    return correct("Each attribute alone looks fair, and one pair of combinations pays for the other.")


SUBGROUPS = {
    "subgroups/1": _spread_by_hand,
    "subgroups/2": _sums_of_distances,
    "subgroups/3": _fair_in_every_margin,
}

# --- shortcut-learning ---------------------------------------------------------------------------------------


def _one_loud_step(answer: Any) -> Verdict:
    value = float(answer)
    if math.isclose(value, 0.375, abs_tol=2e-3):
        return correct("Loudness counts twice, in the gradient and in the input: a factor of 2 has become 4.")
    if math.isclose(value, 0.25, abs_tol=2e-3):
        return not_yet("You counted the loudness once. It is in the weight and, once more, in the input it multiplies.")
    if math.isclose(value, 0.0, abs_tol=2e-3):
        return not_yet("This is the converged rule. One step from zero follows the mean of y x.")
    if math.isclose(value, -0.375, abs_tol=2e-3):
        return not_yet("Right size, wrong sign: a positive reliance means the shortcut.")
    if math.isclose(value, 1.5, abs_tol=2e-3):
        return not_yet("You took (r - 1) / 2. That is for r of at most 1; here r is 4.")
    return not_yet("Write the step as a rule on the cues, w_s z_s + w_c z_c. What is r = w_s / w_c?")


def _field(layers: Any) -> int:
    size, jump = 1, 1
    for kernel, stride in layers:
        size, jump = size + (kernel - 1) * jump, jump * stride
    return size


def _receptive_field(answer: Any) -> Verdict:
    if not callable(answer):
        return not_yet("Give the function itself, not a number: `check(..., receptive_field)`.")
    if answer([]) != 1:
        return not_yet("Without any layer an output is a pixel: it sees 1.")
    if answer([(3, 1), (3, 1)]) != 5:
        return not_yet("Two layers of kernel 3: the second looks at three neighbours, each of which saw 3. Draw it.")
    chains = [
        [(3, 1), (2, 2), (3, 1)],
        [(7, 2), (3, 2), (3, 1), (3, 1)],
        [(3, 1), (3, 1), (3, 1), (2, 2), (3, 1), (3, 1)],
    ]
    for chain in chains:
        found, wanted = answer(chain), _field(chain)
        if found == 1 + sum(kernel - 1 for kernel, _ in chain):
            return not_yet(
                "You add the kernels as if there were no strides: after a stride of 2 neighbours are 2 apart."
            )
        after = 1
        jump = 1
        for kernel, stride in chain:
            jump *= stride
            after += (kernel - 1) * jump
        if found == after:
            return not_yet(
                "A layer's own stride moves the next layer's inputs apart, not its own. Multiply afterwards."
            )
        if found != wanted:
            return not_yet(f"For {chain} the answer is {wanted}, yours is {found}.")
    return correct("A seven-pixel unit cannot compare two glyphs in different halves, however long you train it.")


def _share_of_variance(answer: Any) -> Verdict:
    if not callable(answer):
        return not_yet("Give the function itself, not a number: `check(..., share)`.")
    generator = torch.Generator().manual_seed(5)
    f = torch.randn(200, generator=generator, dtype=torch.float64) + 2
    h = torch.randn(200, 3, generator=generator, dtype=torch.float64) * torch.tensor([5.0, 1.0, 0.2]).double() + 3
    h[:, 1] += 2 * f
    found, wanted = float(answer(h, f)), float(variance_explained(h, f))
    if math.isclose(found, wanted, rel_tol=1e-6):
        return correct(
            "A share of variance, weighed by how large each unit is: it does not ask whether f can be decoded."
        )
    raw = float((h.T @ f).square().sum() / (f.square().sum() * h.square().sum()))
    if math.isclose(found, raw, rel_tol=1e-6):
        return not_yet("Centre the layer and the feature first: variance is about deviations from the mean.")
    squared = torch.corrcoef(torch.cat([h, f[:, None]], 1).T)[-1, :-1].square()
    if math.isclose(found, float(squared.mean()), rel_tol=1e-6):
        return not_yet(
            "This is the mean over units of the squared correlation. A large unit counts more than a small one."
        )
    if math.isclose(found, wanted**0.5, rel_tol=1e-6):
        return not_yet("You have norms where the formula has squared norms.")
    return not_yet("Numerator: the squared norm of h.T @ f. Denominator: the squared norms of f and of h. All centred.")


SHORTCUT_LEARNING: dict[str, Callable[[Any], Verdict]] = {
    "shortcut-learning/1": _one_loud_step,
    "shortcut-learning/2": _receptive_field,
    "shortcut-learning/3": _share_of_variance,
}

CHECKS = {**SHORTCUT_LEARNING, **SUBGROUPS}
