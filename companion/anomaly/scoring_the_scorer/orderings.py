"""AUROC and average precision as averages over positives, and which mistake in a ranking each would repair first.

Public: `auroc_as_expectation`, `auprc_as_expectation`, `Mistakes`, `atomic_mistakes`, `Repairs`, `repair_greedily`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from companion.checks import as_tensor, check_binary, check_generator, check_positive_int, check_scores

__all__ = [
    "Mistakes",
    "Repairs",
    "atomic_mistakes",
    "auprc_as_expectation",
    "auroc_as_expectation",
    "repair_greedily",
]


class Mistakes(NamedTuple):
    """Neighbours in the wrong order: rank of the negative (from 1), and what a swap adds to each metric."""

    rank: Tensor
    auroc_gain: Tensor
    average_precision_gain: Tensor


class Repairs(NamedTuple):
    """The ranking after repairs (sample numbers, best first) and the samples that were moved up, in order."""

    order: Tensor
    repaired: Tensor


def _split(scores: Any, labels: Any) -> tuple[Tensor, Tensor]:
    scores = check_scores(scores).detach()
    positive = check_binary(labels, n=len(scores), device=scores.device)
    if not bool(positive.any()) or bool(positive.all()):
        raise ValueError("expected labels of both classes, got one")
    return scores[positive], scores[~positive]


def _at_least(values: Tensor, thresholds: Tensor, strictly: bool = False) -> Tensor:
    """Return the share of the values that reach each threshold."""
    ordered = values.sort().values
    wide = torch.float32 if values.device.type == "mps" else torch.float64
    return (len(values) - torch.searchsorted(ordered, thresholds, right=strictly)).to(wide) / len(values)


def auroc_as_expectation(scores: Any, labels: Any) -> Tensor:
    r"""Return the AUROC as one minus the mean false-positive rate at the scores of the positives.

    $$\mathrm{AUROC} = 1 - \mathbb E_{t \sim s \mid y=1}\bigl[\mathrm{FPR}(t)\bigr],$$

    where a negative that ties with $t$ counts one half.

    Args:
        scores: one number per sample, higher for label 1.
        labels: 0 or 1, both present.

    Raises:
        ValueError: NaN, one class only, lengths that differ.

    >>> auroc_as_expectation([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
    tensor(0.7500, dtype=torch.float64)

    Paper: mcdermott2024closer
    Chapter: anomaly/scoring-the-scorer
    """
    positives, negatives = _split(scores, labels)
    fpr = (_at_least(negatives, positives) + _at_least(negatives, positives, strictly=True)) / 2
    return 1 - fpr.mean()


def auprc_as_expectation(scores: Any, labels: Any) -> Tensor:
    r"""Return the average precision as a mean over positives of FPR divided by how often the model fires.

    $$\mathrm{AP} = 1 - P(y=0)\; \mathbb E_{t \sim s \mid y=1}
    \left[\frac{\mathrm{FPR}(t)}{P(s \ge t)}\right]$$

    The same false-positive rates as in `auroc_as_expectation`, but weighted: a false alarm at a threshold where the
    model fires once in a thousand weighs a thousand times as much.

    Args:
        scores: one number per sample, higher for label 1.
        labels: 0 or 1, both present.

    Raises:
        ValueError: NaN, one class only, lengths that differ.

    >>> auprc_as_expectation([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
    tensor(0.8333, dtype=torch.float64)

    Paper: mcdermott2024closer
    Chapter: anomaly/scoring-the-scorer
    """
    positives, negatives = _split(scores, labels)
    fired = _at_least(torch.cat([positives, negatives]), positives)
    negative_share = len(negatives) / (len(negatives) + len(positives))
    return 1 - negative_share * (_at_least(negatives, positives) / fired).mean()


def atomic_mistakes(ranked_labels: Any) -> Mistakes:
    r"""Return every place where a negative stands directly above a positive, and what it is worth to swap them.

    With $n_+$ positives and $n_-$ negatives, a mistake at ranks $r$ (negative) and $r+1$ (positive), and $T$
    positives at ranks up to $r+1$,

    $$\Delta\mathrm{AUROC} = \frac{1}{n_+ n_-}, \qquad
    \Delta\mathrm{AP} = \frac{T}{n_+}\Bigl(\frac1r - \frac1{r+1}\Bigr).$$

    Args:
        ranked_labels: 0 or 1 from the highest score to the lowest, without ties.

    Returns:
        `Mistakes(rank, auroc_gain, average_precision_gain)`, highest-ranked first.

    Raises:
        ValueError: one class only.

    >>> atomic_mistakes([0, 1, 1, 0, 1]).average_precision_gain
    tensor([0.1667, 0.0500], dtype=torch.float64)

    Paper: mcdermott2024closer
    Chapter: anomaly/scoring-the-scorer
    """
    positive = check_binary(ranked_labels)
    n_pos = _count_both(positive)
    rank, gain = _mistakes(positive, n_pos)
    return Mistakes(rank, torch.full_like(gain, 1 / (n_pos * (len(positive) - n_pos))), gain)


def _count_both(positive: Tensor) -> int:
    """Return how many positives there are, after a look that there are negatives too."""
    n_pos = int(positive.sum())
    if n_pos in (0, len(positive)):
        raise ValueError("expected labels of both classes, got one")
    return n_pos


def _mistakes(positive: Tensor, n_pos: int) -> tuple[Tensor, Tensor]:
    """Return the rank of every mistake and what repairing it adds to the average precision."""
    rank = (positive[1:] > positive[:-1]).nonzero().squeeze(1) + 1
    wide = rank.double()
    return rank, positive.cumsum(0)[rank] / (n_pos * wide * (wide + 1))


def repair_greedily(
    scores: Any, labels: Any, n_repairs: int, prefer: str = "average_precision", *, generator: Any = None
) -> Repairs:
    """Repair one mistake after the other, always the one that raises a metric most.

    For AUROC all mistakes are worth the same, so it takes one at random; average precision takes the highest.

    Args:
        scores: one number per sample, higher for label 1, all distinct.
        labels: 0 or 1, both present.
        n_repairs: how many; fewer when no mistake is left.
        prefer: "auroc" or "average_precision".
        generator: draws among equals (None: torch's default generator).

    Returns:
        `Repairs(order, repaired)`: the sample numbers in their new order, and the positives that moved up.

    Raises:
        ValueError: ties, one class only, an unknown metric.

    >>> repair_greedily([4.0, 3.0, 2.0, 1.0], [0, 1, 0, 1], n_repairs=1).order
    tensor([1, 0, 2, 3])

    Paper: mcdermott2024closer
    Chapter: anomaly/scoring-the-scorer
    """
    scores = check_scores(scores).detach()
    positive = check_binary(labels, n=len(scores), device=scores.device)
    check_positive_int(n_repairs, "n_repairs", minimum=0)
    generator = check_generator(generator)
    if len(scores.unique()) < len(scores):
        raise ValueError("expected distinct scores: the order of ties is no mistake of the model")
    if prefer not in ("auroc", "average_precision"):
        raise ValueError(f"expected prefer to be 'auroc' or 'average_precision', got {prefer!r}")
    order, repaired, n_pos = scores.argsort(descending=True), [], _count_both(positive)
    ranked = positive[order]
    for _ in range(n_repairs):
        rank, gain = _mistakes(ranked, n_pos)
        if len(rank) == 0:
            break
        if prefer == "average_precision":
            rank = rank[gain >= gain.max() * (1 - 1e-12)]
        row = int(rank[int(torch.randint(len(rank), (), generator=generator))])  # the positive's row, from 0
        repaired.append(int(order[row]))
        order[row - 1 : row + 1] = order[row - 1 : row + 1].flip(0)
        ranked[row - 1], ranked[row] = True, False
    return Repairs(order, as_tensor(repaired, "repaired").long())
