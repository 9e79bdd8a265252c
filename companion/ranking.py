"""How well scores rank: AUROC, average precision, ROC curves and hulls, quantiles, bootstrap intervals.

Public: `auroc`, `partial_auroc`, `average_precision`, `fpr_at_tpr`, `roc_curve`, `precision_recall_curve`,
`roc_convex_hull`, `weighted_quantile`, `bootstrap_interval`, and what they return: `RocCurve`,
`PrecisionRecallCurve`, `Interval`.

Ties count as ties: everything is computed from whole-number counts at the distinct scores, so that no order of equal
scores and no number of thresholds changes a result. A higher score means "more likely label 1".
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from companion.checks import (
    as_tensor,
    check_binary,
    check_generator,
    check_in_range,
    check_labels,
    check_positive_int,
    check_same_length,
    check_scores,
)

__all__ = [
    "Interval",
    "PrecisionRecallCurve",
    "RocCurve",
    "auroc",
    "average_precision",
    "bootstrap_interval",
    "fpr_at_tpr",
    "partial_auroc",
    "precision_recall_curve",
    "roc_convex_hull",
    "roc_curve",
    "weighted_quantile",
]


class RocCurve(NamedTuple):
    """Corners of a ROC curve, from (0, 0) to (1, 1); "positive" means score >= threshold."""

    fpr: Tensor
    tpr: Tensor
    thresholds: Tensor


class PrecisionRecallCurve(NamedTuple):
    """Precision and recall at every distinct score, from the highest score down."""

    precision: Tensor
    recall: Tensor
    thresholds: Tensor


class Interval(NamedTuple):
    """A statistic with its interval."""

    estimate: Tensor
    low: Tensor
    high: Tensor


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _check(scores: Any, labels: Any, weights: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    scores = check_scores(scores).detach()
    positive = check_binary(labels, n=len(scores), device=scores.device)
    n_positive = int(positive.sum())
    if n_positive in (0, len(positive)):
        raise ValueError(f"expected labels of both classes, got {len(positive)} times {int(n_positive > 0)}")
    if weights is None:
        return scores, positive, None
    weights = _check_weights(weights, len(scores), scores.device)
    for label, chosen in ((0, ~positive), (1, positive)):
        if not weights[chosen].sum() > 0:
            raise ValueError(f"expected a positive total weight for each class, got 0 for label {label}")
    return scores, positive, weights


def _check_weights(weights: Any, n: int, device: torch.device) -> Tensor:
    weights = check_scores(weights, "weights", device=device).detach().to(_wide(device))
    check_same_length(x=range(n), weights=weights)
    if not (weights.min() >= 0 and 0 < weights.sum() < torch.inf):
        raise ValueError("expected weights that are finite, at least 0 and not all 0")
    return weights


def _packed(scores: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Sort float32 scores and their labels as one int64 array: three times faster than an argsort."""
    # adding 0.0 turns -0.0 into 0.0; flipping the lower bits of negative floats makes their order that of integers
    bits = (scores + 0.0).view(torch.int32)
    bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))
    key = bits.to(torch.int64).mul_(-2).add_(positive)  # lowest bit: the label; the rest: minus the score
    key.numpy().sort()
    return key.bitwise_and(1), key.bitwise_right_shift_(1)


def _counts(scores: Tensor, positive: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the distinct scores, descending, and how many positives and negatives score at least that much."""
    if scores.dtype in (torch.float16, torch.bfloat16):
        values = scores.float()
    else:
        values = scores
    if weights is None and values.device.type == "cpu" and values.dtype == torch.float32:
        hits, key = _packed(values, positive)
        true = hits.cumsum(0)
        last = _last_of_ties(key)
        key = key.neg_().to(torch.int32) if last is None else key[last].neg_().to(torch.int32)
        distinct = key.bitwise_xor_((key >> 31).bitwise_and_(0x7FFFFFFF)).view(torch.float32)
        rank = torch.arange(1, len(true) + 1) if last is None else last + 1
        true = true if last is None else true[last]
        return distinct.to(scores.dtype), true, rank - true
    if values.device.type == "cpu":
        order = torch.from_numpy(np.argsort(-values.numpy(), kind="quicksort"))
    else:
        order = values.argsort(descending=True)
    ordered, hits = values[order], positive[order]
    if weights is None:
        true, false = hits.cumsum(0), (~hits).cumsum(0)
    else:
        weight = weights[order]
        true, false = (weight * hits).cumsum(0), (weight * ~hits).cumsum(0)
    last = _last_of_ties(ordered)
    if last is not None:
        ordered, true, false = ordered[last], true[last], false[last]
    return ordered.to(scores.dtype), true, false


def _last_of_ties(ordered: Tensor) -> Tensor | None:
    differs = ordered[1:] != ordered[:-1]
    if bool(differs.all()):
        return None
    end = torch.tensor([len(ordered) - 1], device=ordered.device)
    return torch.cat([differs.nonzero().squeeze(1), end])


def auroc(scores: Any, labels: Any, *, weights: Any = None) -> Tensor:
    r"""Return the area under the ROC curve: how often a positive outranks a negative, ties counting one half.

    $$\mathrm{AUROC} = P(s^+ > s^-) + \tfrac12 P(s^+ = s^-)$$

    Counted in whole numbers, hence exact for scores of any dtype.

    Args:
        scores: one number per sample, higher for label 1.
        labels: 0 or 1 (or booleans), both present.
        weights: one weight of at least 0 per sample.

    Returns:
        A float64 scalar on the device of the scores.

    Raises:
        ValueError: NaN, one class only, lengths that differ.

    >>> auroc([0.1, 0.4, 0.4, 0.8], [0, 0, 1, 1])
    tensor(0.8750, dtype=torch.float64)
    """
    scores, positive, weights = _check(scores, labels, weights)
    _, true, false = _counts(scores, positive, weights)
    # twice the area of the trapezoids, in whole numbers: width (new negatives) times the heights at both ends
    area = (false[0] * true[0] + ((false[1:] - false[:-1]) * (true[1:] + true[:-1])).sum()).item()
    value = area / (2 * true[-1].item() * false[-1].item())
    return torch.tensor(value, dtype=_wide(scores.device), device=scores.device)


def roc_curve(scores: Any, labels: Any, *, weights: Any = None) -> RocCurve:
    """Return the ROC curve at every distinct score.

    Args:
        scores: one number per sample, higher for label 1.
        labels: 0 or 1 (or booleans), both present.
        weights: one weight of at least 0 per sample.

    Returns:
        `RocCurve(fpr, tpr, thresholds)`: the first point is (0, 0) at an infinite threshold, the last (1, 1).

    Raises:
        ValueError: NaN, one class only, lengths that differ.

    >>> roc_curve([0.1, 0.4, 0.4, 0.8], [0, 0, 1, 1]).tpr
    tensor([0.0000, 0.5000, 1.0000, 1.0000], dtype=torch.float64)
    """
    scores, positive, weights = _check(scores, labels, weights)
    thresholds, true, false = _counts(scores, positive, weights)
    return _rates(thresholds, true, false)


def _rates(thresholds: Tensor, true: Tensor, false: Tensor) -> RocCurve:
    wide = _wide(true.device)
    tpr, fpr = true.to(wide) / true[-1], false.to(wide) / false[-1]
    return RocCurve(_after(0.0, fpr), _after(0.0, tpr), _after(torch.inf, thresholds))


def _after(first: float, x: Tensor) -> Tensor:
    return torch.cat([x.new_full((1,), first), x])


def partial_auroc(scores: Any, labels: Any, max_fpr: float, *, standardize: bool = True, weights: Any = None) -> Tensor:
    r"""Return the area under the ROC curve left of `max_fpr`.

    Standardised (McClish), the area $A$ over $[0, m]$ becomes
    $\tfrac12 \left(1 + \frac{A - m^2/2}{m - m^2/2}\right)$: 0.5 at chance and 1 for a perfect ranking.

    Args:
        scores: one number per sample, higher for label 1.
        labels: 0 or 1 (or booleans), both present.
        max_fpr: m, in (0, 1].
        standardize: False returns the bare area A.
        weights: one weight of at least 0 per sample.

    Raises:
        ValueError: NaN, one class only, lengths that differ, or `max_fpr` out of range.

    >>> partial_auroc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1], max_fpr=0.5)
    tensor(0.6667, dtype=torch.float64)
    """
    m = check_in_range(max_fpr, "max_fpr", 0, 1, inclusive="high")
    fpr, tpr, _ = roc_curve(scores, labels, weights=weights)
    stop = int((fpr <= m).sum())  # index of the first corner to the right of m
    if stop < len(fpr):
        share = (m - fpr[stop - 1]) / (fpr[stop] - fpr[stop - 1])
        tpr = torch.cat([tpr[:stop], torch.lerp(tpr[stop - 1], tpr[stop], share)[None]])
        fpr = torch.cat([fpr[:stop], fpr.new_full((1,), m)])
    area = torch.trapezoid(tpr, fpr)
    if not standardize:
        return area
    chance = m * m / 2
    return (1 + (area - chance) / (m - chance)) / 2


def fpr_at_tpr(scores: Any, labels: Any, tpr: float = 0.95, *, weights: Any = None) -> Tensor:
    """Return the smallest false positive rate of a threshold that reaches the true positive rate `tpr`.

    Args:
        scores: one number per sample, higher for label 1.
        labels: 0 or 1 (or booleans), both present.
        tpr: the rate to reach, in (0, 1].
        weights: one weight of at least 0 per sample.

    Raises:
        ValueError: NaN, one class only, lengths that differ, or `tpr` out of range.

    >>> fpr_at_tpr([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1], tpr=0.95)
    tensor(0.5000, dtype=torch.float64)
    """
    level = check_in_range(tpr, "tpr", 0, 1, inclusive="high")
    curve = roc_curve(scores, labels, weights=weights)
    reached = curve.tpr >= level - 1e-12  # a rate such as 19/20 must count as 0.95
    return curve.fpr[reached][0]


def precision_recall_curve(scores: Any, labels: Any, *, weights: Any = None) -> PrecisionRecallCurve:
    """Return precision and recall at every distinct score, from the highest down.

    Args:
        scores: one number per sample, higher for label 1.
        labels: 0 or 1 (or booleans), both present.
        weights: one weight of at least 0 per sample.

    Raises:
        ValueError: NaN, one class only, lengths that differ.

    >>> precision_recall_curve([0.1, 0.4, 0.4, 0.8], [0, 0, 1, 1]).precision
    tensor([1.0000, 0.6667, 0.5000], dtype=torch.float64)
    """
    scores, positive, weights = _check(scores, labels, weights)
    thresholds, true, false = _counts(scores, positive, weights)
    wide = _wide(true.device)
    chosen = (true + false).to(wide)
    # weights of 0 can leave nothing above the first thresholds: precision is then 1 by convention
    precision = torch.where(chosen > 0, true.to(wide) / chosen.clamp_min(torch.finfo(wide).tiny), 1.0)
    return PrecisionRecallCurve(precision, true.to(wide) / true[-1], thresholds)


def average_precision(scores: Any, labels: Any, *, weights: Any = None) -> Tensor:
    r"""Return the average precision: precision averaged over the steps of recall, without interpolation.

    $$\mathrm{AP} = \sum_i (R_i - R_{i-1})\, P_i$$

    Args:
        scores: one number per sample, higher for label 1.
        labels: 0 or 1 (or booleans), both present.
        weights: one weight of at least 0 per sample.

    Returns:
        A float64 scalar on the device of the scores.

    Raises:
        ValueError: NaN, one class only, lengths that differ.

    >>> average_precision([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
    tensor(0.8333, dtype=torch.float64)
    """
    precision, recall, _ = precision_recall_curve(scores, labels, weights=weights)
    return (precision * torch.diff(_after(0.0, recall))).sum()


def roc_convex_hull(scores: Any, labels: Any, *, weights: Any = None) -> RocCurve:
    """Return the corners of the upper convex hull of the ROC curve.

    Only its corners can be the best threshold for some prior and some pair of costs; the slopes of its edges are the
    likelihood ratios that isotonic regression of the labels on the scores finds.

    Args:
        scores: one number per sample, higher for label 1.
        labels: 0 or 1 (or booleans), both present.
        weights: one weight of at least 0 per sample.

    Returns:
        `RocCurve(fpr, tpr, thresholds)` from (0, 0) to (1, 1), without points on the inside of an edge.

    Raises:
        ValueError: NaN, one class only, lengths that differ.

    >>> roc_convex_hull([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]).fpr
    tensor([0.0000, 0.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    scores, positive, weights = _check(scores, labels, weights)
    thresholds, true, false = _counts(scores, positive, weights)
    new_true, new_false = (torch.diff(_after(0, count)) for count in (true, false))
    # a corner needs a step up on its left (or lies at the end) and a step to the right after it
    up, right = new_true > 0, _shifted(new_false > 0)
    candidates = (up & right).nonzero().squeeze(1).tolist()
    last = len(true) - 1
    if not candidates or candidates[-1] != last:
        candidates.append(last)
    x, y = ([0, *count[candidates].tolist()] for count in (false, true))
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) > 1 and _turns_left_or_not(x, y, hull[-2], hull[-1], i):
            hull.pop()
        hull.append(i)
    corners = torch.tensor([candidates[i - 1] for i in hull[1:]], device=true.device)
    return _rates(thresholds[corners], true[corners], false[corners])


def _shifted(mask: Tensor) -> Tensor:
    return torch.cat([mask[1:], mask.new_ones(1)])


def _turns_left_or_not(x: list, y: list, a: int, b: int, c: int) -> bool:
    return (x[b] - x[a]) * (y[c] - y[a]) >= (y[b] - y[a]) * (x[c] - x[a])


def weighted_quantile(x: Any, q: Any, weights: Any = None) -> Tensor:
    r"""Return the smallest value of x below or at which at least the share q of the weight lies.

    $$Q(q) = \min\{x_i : \textstyle\sum_{x_j \le x_i} w_j \ge q \sum_j w_j\}$$

    This is the inverse of the empirical distribution (NumPy's "inverted_cdf"): always one of the values, so that
    infinite values are allowed, as conformal prediction needs them.

    Args:
        x: values, shape (n,).
        q: levels in [0, 1], a number or any shape.
        weights: one weight of at least 0 per value; None weighs all the same.

    Returns:
        Quantiles in the shape of q and the dtype of x.

    Raises:
        ValueError: empty, NaN, levels outside [0, 1], weights that are negative or all 0.

    >>> weighted_quantile([1.0, 2.0, 3.0, 4.0], 0.5)
    tensor(2.)
    >>> weighted_quantile([1.0, 2.0, 3.0], [0.5, 1.0], weights=[1, 1, 8])
    tensor([3., 3.])
    """
    x = check_scores(x, "x")
    q = as_tensor(q, "q").to(x.device, _wide(x.device))
    if not bool(((q >= 0) & (q <= 1)).all()):
        raise ValueError(f"expected q in [0, 1], got values from {q.min().item():g} to {q.max().item():g}")
    if weights is None:
        weights = torch.ones(len(x), dtype=_wide(x.device), device=x.device)
    else:
        weights = _check_weights(weights, len(x), x.device)
    keep = weights > 0  # a value without weight is no value
    ordered, order = x[keep].sort()
    mass = weights[keep][order].cumsum(0)
    # 0.07 * 100 must reach the seventh value although it rounds to a little above 7
    target = q * mass[-1] - 1e-12 * mass[-1]
    return ordered[torch.searchsorted(mass, target).clamp_max(len(mass) - 1)]


def bootstrap_interval(
    statistic: Callable[..., Any],
    *arrays: Any,
    n_resamples: int = 1000,
    level: float = 0.95,
    generator: torch.Generator | int | None = None,
    stratify: Any = None,
) -> Interval:
    """Return a statistic with its percentile bootstrap interval: samples are drawn again, with replacement.

    Args:
        statistic: takes the resampled arrays and returns a number or a tensor.
        *arrays: arrays of one length n, resampled together.
        n_resamples: how many resamples.
        level: how much of the bootstrap distribution the interval covers, in (0, 1).
        generator: draws the resamples (None: torch's default generator; a whole number: a new one with that seed).
        stratify: labels, shape (n,); samples are then redrawn within each label, which keeps rare classes present.

    Returns:
        `Interval(estimate, low, high)`, the estimate from the arrays as they are.

    Raises:
        ValueError: no arrays, lengths that differ, a level out of range, or the statistic refuses a resample.

    >>> interval = bootstrap_interval(lambda x: x.mean(), torch.arange(100.0), n_resamples=200, generator=0)
    >>> bool(interval.low < interval.estimate < interval.high)
    True
    """
    check_positive_int(n_resamples, "n_resamples")
    level = check_in_range(level, "level", 0, 1, inclusive="neither")
    generator = check_generator(generator)
    if not arrays:
        raise ValueError("expected at least one array to resample, got none")
    tensors = [as_tensor(array, f"array {i}") for i, array in enumerate(arrays)]
    n = check_same_length(**{f"array {i}": tensor for i, tensor in enumerate(tensors)})
    if n == 0:
        raise ValueError("expected arrays of at least 1 sample, got none")
    strata = [torch.arange(n)]
    if stratify is not None:
        labels = check_labels(stratify, n=n, name="stratify").cpu()
        strata = [(labels == label).nonzero().squeeze(1) for label in labels.unique()]
    draws = []
    for _ in range(n_resamples):
        index = torch.cat([members[_draw(len(members), generator)] for members in strata])
        try:
            draws.append(_as_result(statistic(*(tensor[index.to(tensor.device)] for tensor in tensors))))
        except ValueError as error:
            hint = "" if stratify is not None else " (pass stratify=labels to keep every class in every resample)"
            raise ValueError(f"the statistic refused a resample: {error}{hint}") from error
    estimate, stacked = _as_result(statistic(*tensors)), torch.stack(draws)
    tail = (1 - level) / 2
    low, high = torch.quantile(stacked, torch.tensor([tail, 1 - tail]).to(stacked), dim=0)
    return Interval(estimate, low, high)


def _draw(n: int, generator: torch.Generator | None) -> Tensor:
    device = "cpu" if generator is None else generator.device
    return torch.randint(n, (n,), generator=generator, device=device).cpu()


def _as_result(value: Any) -> Tensor:
    value = torch.as_tensor(value).detach()
    return value if value.dtype in (torch.float32, torch.float64) else value.to(torch.get_default_dtype())
