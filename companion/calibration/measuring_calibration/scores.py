"""Scores that a constant cannot win: Brier's score, its parts and its skill; kernels; ranking by confidence.

Public: `brier_decomposition` and what it returns, `BrierDecomposition`; `brier_skill_score`, `bucket_collapse`; `mmce`;
`risk_coverage` with `RiskCoverage`, and `aurc`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from companion.calibration.measuring_calibration.errors import (
    assign_bins,
    check_confidence,
    check_options,
    check_outcome,
    confidence_and_outcome,
)
from companion.checks import check_in_range, check_positive_int, check_scores

__all__ = [
    "BrierDecomposition",
    "RiskCoverage",
    "aurc",
    "brier_decomposition",
    "brier_skill_score",
    "bucket_collapse",
    "mmce",
    "risk_coverage",
]


class BrierDecomposition(NamedTuple):
    """The Brier score and its parts: brier = reliability - resolution + uncertainty + within_bins."""

    brier: Tensor
    reliability: Tensor
    resolution: Tensor
    uncertainty: Tensor
    within_bins: Tensor


def _pair(confidence: Any, correct: Any) -> tuple[Tensor, Tensor]:
    p = check_confidence(confidence)
    return p, check_outcome(correct, p.shape[0], p.device)


def brier_decomposition(confidence: Any, correct: Any, n_bins: int = 15, strategy: str = "width") -> BrierDecomposition:
    r"""Return the mean squared error of stated chances, taken apart into calibration and discrimination.

    With the mean confidence $\bar p_b$ and the rate $\bar o_b$ of each bin and the base rate $\bar o$,

    $$\frac1n \sum_i (p_i - o_i)^2 = \underbrace{\sum_b \tfrac{n_b}{n} (\bar p_b - \bar o_b)^2}_{\text{reliability}}
    - \underbrace{\sum_b \tfrac{n_b}{n} (\bar o_b - \bar o)^2}_{\text{resolution}}
    + \underbrace{\bar o (1 - \bar o)}_{\text{uncertainty}} + \text{within bins}.$$

    Reliability is the squared calibration error (lower is better); resolution is how far the rates of the bins lie
    apart (higher is better), and a constant has none; uncertainty is the outcomes' own. What forecasts do inside a bin,
    $\frac1n \sum_i \big[(p_i - \bar p_b)^2 - 2 (p_i - \bar p_b)(o_i - \bar o_b)\big]$, is the last part: it vanishes
    when each bin holds one value, and then this is Murphy's decomposition. Reliability and resolution are both too
    large at finite n, by the noise in $\bar o_b$.

    Args:
        confidence: (n,) stated chances.
        correct: (n,) outcomes, 0 or 1.
        n_bins: how many bins.
        strategy: "width" or "mass".

    Returns:
        `BrierDecomposition`, float64 scalars; the identity holds to rounding.

    Raises:
        ValueError: values outside [0, 1], outcomes other than 0 and 1, lengths that differ, an unknown option.

    >>> parts = brier_decomposition([0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0])  # the base rate: honest and useless
    >>> [round(part.item(), 4) for part in parts]
    [0.1875, 0.0, 0.0, 0.1875, 0.0]

    Paper: liu2022deep

    Paper: spiess2024calibration

    Chapter: calibration/measuring-calibration
    """
    n_bins = check_options(n_bins, "l2", strategy)
    p, o = _pair(confidence, correct)
    bins = assign_bins(p, n_bins, strategy)
    p, o = p.double(), o.double()
    zeros = torch.zeros(n_bins, dtype=torch.float64, device=p.device)
    count = torch.bincount(bins, minlength=n_bins)
    p_bin, o_bin = (zeros.index_add(0, bins, v) / count.clamp(min=1) for v in (p, o))  # (B,)
    weight, base = count.double() / p.shape[0], o.mean()
    p_in, o_in = p - p_bin[bins], o - o_bin[bins]
    return BrierDecomposition(
        brier=(p - o).square().mean(),
        reliability=(weight * (p_bin - o_bin).square()).sum(),
        resolution=(weight * (o_bin - base).square()).sum(),
        uncertainty=base * (1 - base),
        within_bins=(p_in.square() - 2 * p_in * o_in).mean(),
    )


def brier_skill_score(confidence: Any, correct: Any, base_rate: float | None = None) -> Tensor:
    r"""Return how much of the base rate's squared error the stated chances remove.

    $$\mathrm{BSS} = 1 - \frac{\sum_i (p_i - o_i)^2}{\sum_i (\bar o - o_i)^2}$$

    1 is clairvoyance, 0 is what the constant $\bar o$ achieves, negative is worse than saying the same to everybody.

    Args:
        confidence: (n,) stated chances.
        correct: (n,) outcomes, 0 or 1, both present unless base_rate is given.
        base_rate: the constant to compare with; None takes the mean of these outcomes, which no forecaster knows
            beforehand and is therefore the strict choice.

    Returns:
        A float64 scalar, differentiable in confidence.

    Raises:
        ValueError: values outside [0, 1], lengths that differ, or outcomes that are all the same (the constant makes no
            error that could be removed).

    >>> round(brier_skill_score([0.9, 0.9, 0.1, 0.1], [1, 1, 0, 0]).item(), 2)
    0.96
    >>> round(brier_skill_score([0.9, 0.9, 0.9, 0.9], [1, 1, 0, 0]).item(), 2)
    -0.64

    Paper: spiess2024calibration

    Chapter: calibration/measuring-calibration
    """
    p, o = _pair(confidence, correct)
    o = o.double()
    reference = o.mean() if base_rate is None else check_in_range(base_rate, "base_rate", 0, 1)
    error = (reference - o).square().mean()
    if error == 0:
        raise ValueError(
            f"expected outcomes of both kinds, got {len(o)} times {int(o[0])}: the base rate makes no error"
        )
    return 1 - (p.double() - o).square().mean() / error


def bucket_collapse(confidence: Any, n_bins: int = 10) -> Tensor:
    """Return the share of samples in the fullest bin: near 1, a low calibration error says nothing.

    Args:
        confidence: (n,) stated chances.
        n_bins: how many bins of equal width.

    Returns:
        A float64 scalar between 1 / n_bins and 1.

    Raises:
        ValueError: values outside [0, 1].

    >>> bucket_collapse([0.31, 0.32, 0.35, 0.8]).item()
    0.75

    Paper: spiess2024calibration

    Chapter: calibration/measuring-calibration
    """
    p, n_bins = check_confidence(confidence), check_positive_int(n_bins, "n_bins")
    return torch.bincount(assign_bins(p, n_bins, "width"), minlength=n_bins).max().double() / p.shape[0]


def mmce(probs: Any, labels: Any, bandwidth: float = 0.4) -> Tensor:
    r"""Return the maximum mean calibration error: a calibration error with a kernel in place of bins.

    With residuals $r_i = p_i - o_i$ of the top class and $k(p, q) = e^{-|p - q| / h}$,

    $$\mathrm{MMCE} = \frac1n \sqrt{\textstyle\sum_{i,j} r_i\, r_j\, k(p_i, p_j)}.$$

    Over sorted confidences the kernel factorises, $k(p_i, p_j) = e^{-p_i / h} e^{p_j / h}$ for $p_j \le p_i$, so that
    one cumulative sum replaces the n x n matrix. It is smooth in the confidences, as a penalty in training has to be.

    Args:
        probs: (n, C) probabilities, or (n,) confidences of one event.
        labels: (n,) true classes, or (n,) outcomes 0 and 1.
        bandwidth: h, at least 0.002 (below, the factors overflow).

    Returns:
        A float64 scalar, differentiable in probs (with a gradient of 0 where it is exactly 0).

    Raises:
        ValueError: not probabilities, labels out of range, bandwidth out of range.

    >>> round(mmce([[0.9, 0.1], [0.9, 0.1]], [0, 1]).item(), 3)  # equal confidences: |.9 - 1/2|
    0.4

    Chapter: calibration/measuring-calibration
    """
    h = check_in_range(bandwidth, "bandwidth", 0.002)
    p, o = confidence_and_outcome(probs, labels)
    p, order = p.double().sort()
    r = p - o[order].double()
    up = ((p - p.detach()[0]) / h).exp()  # between 1 and e^(1 / h)
    before = (r * up).cumsum(0) - r * up  # sum over j < i of r_j e^(p_j / h)
    total = r.square().sum() + 2 * (r * before / up).sum()
    return total.clamp(min=torch.finfo(torch.float64).tiny).sqrt() / p.shape[0]


class RiskCoverage(NamedTuple):
    """The error rate among the most confident share of the samples, at every share k / n."""

    coverage: Tensor
    risk: Tensor


def risk_coverage(confidence: Any, correct: Any) -> RiskCoverage:
    """Return the error rate among the k most confident samples, for k from 1 to n.

    Samples of equal confidence are in no order: within a tie the errors count as spread evenly, which is the mean over
    all orders.

    Args:
        confidence: (n,) stated chances, or any score without NaN that ranks like them.
        correct: (n,) outcomes, 0 or 1.

    Returns:
        `RiskCoverage(coverage (n,), risk (n,))`, float64.

    Raises:
        ValueError: NaN, outcomes other than 0 and 1, lengths that differ.

    >>> risk_coverage([0.9, 0.8, 0.7, 0.6], [1, 1, 0, 1]).risk
    tensor([0.0000, 0.0000, 0.3333, 0.2500], dtype=torch.float64)

    Chapter: calibration/measuring-calibration
    """
    score = check_scores(confidence, "confidence", 1).detach()
    wrong = (~check_outcome(correct, score.shape[0], score.device)).double()
    n = score.shape[0]
    ordered, order = score.sort(descending=True)
    _, tie, size = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
    share = torch.zeros(len(size), dtype=torch.float64, device=score.device).index_add(0, tie, wrong[order]) / size
    k = torch.arange(1, n + 1, device=score.device, dtype=torch.float64)
    return RiskCoverage(k / n, share[tie].cumsum(0) / k)


def aurc(confidence: Any, correct: Any) -> Tensor:
    r"""Return the area under the risk-coverage curve: the error rate among the most confident, over all shares.

    $$\mathrm{AURC} = \frac1n \sum_{k=1}^{n} \frac1k \sum_{j \le k} \mathrm{wrong}_{(j)}$$

    with samples in order of falling confidence. Lower is better. It sees only the order: any increasing map of the
    confidences, however badly calibrated, leaves it alone.

    Args:
        confidence: (n,) stated chances, or any score without NaN that ranks like them.
        correct: (n,) outcomes, 0 or 1.

    Returns:
        A float64 scalar; the error rate itself for a constant confidence.

    Raises:
        ValueError: NaN, outcomes other than 0 and 1, lengths that differ.

    >>> round(aurc([0.9, 0.8, 0.7, 0.6], [1, 1, 0, 1]).item(), 4)  # (0 + 0 + 1/3 + 1/4) / 4
    0.1458

    Chapter: calibration/measuring-calibration
    """
    return risk_coverage(confidence, correct).risk.mean()
