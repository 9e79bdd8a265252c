"""How far stated probabilities are from observed frequencies.

Public: `expected_calibration_error`, `classwise_ece`.
"""

from typing import Any

import torch
from torch import Tensor

from companion.checks import check_labels, check_positive_int, check_probs

__all__ = ["classwise_ece", "expected_calibration_error"]

_NORMS = ("l1", "l2", "max")
_STRATEGIES = ("width", "mass")
_CHUNK = 1 << 15  # probabilities binned at a time: the buffers of a chunk stay in cache


def _check_options(n_bins: int, norm: str, strategy: str) -> int:
    if norm not in _NORMS:
        raise ValueError(f"expected norm to be one of {_NORMS}, got {norm!r}")
    if strategy not in _STRATEGIES:
        raise ValueError(f"expected strategy to be one of {_STRATEGIES}, got {strategy!r}")
    return check_positive_int(n_bins, "n_bins")


def _width_bins(p: Tensor, n_bins: int) -> Tensor:
    """Return the bin k of each p in (k / n_bins, (k + 1) / n_bins], as whole floats; 0 belongs to the first.

    Rounding of p * n_bins can miss by one where p lies on an edge, so the two edges are compared with p itself.
    """
    if p.dtype in (torch.float16, torch.bfloat16):
        p = p.float()
    above = p.mul(n_bins).ceil_()
    above -= ((above - 1).div_(n_bins) >= p).to(p.dtype)
    above += (above / n_bins < p).to(p.dtype)
    return above.sub_(1).clamp_(0, n_bins - 1)


def _mass_bins(p: Tensor, n_bins: int) -> Tensor:
    """Return bins that hold equally many values, ties kept together: the edges are values, and upper ones belong."""
    n = p.shape[0]
    upper = (torch.arange(1, n_bins, device=p.device) * n).div(n_bins, rounding_mode="floor").sub(1).clamp(min=0)
    return torch.searchsorted(p.sort().values[upper], p.contiguous())


def _combine(gap: Tensor, count: Tensor, n: int, norm: str) -> Tensor:
    """Return the error from each bin's sum of (confidence - outcome) and its number of samples, on the last axis."""
    if norm == "l1":
        return gap.abs().sum(-1) / n
    mean = gap / count.clamp(min=1)
    if norm == "l2":
        return (mean.square() * count / n).sum(-1).sqrt()
    return mean.abs().amax(-1)


def _binary_error(confidence: Tensor, outcome: Tensor, n_bins: int, norm: str, strategy: str) -> Tensor:
    assign = _width_bins if strategy == "width" else _mass_bins
    bins = assign(confidence.detach(), n_bins).long()
    gap = torch.zeros(n_bins, dtype=torch.float64, device=bins.device)
    gap = gap.index_add(0, bins, (confidence - outcome.to(confidence)).double())
    count = torch.bincount(bins, minlength=n_bins)
    return _combine(gap, count, bins.shape[0], norm)


def expected_calibration_error(
    probs: Any, labels: Any, n_bins: int = 15, norm: str = "l1", strategy: str = "width"
) -> Tensor:
    r"""Return how far the top-class confidence is from the accuracy, bin by bin.

    $$\mathrm{ECE} = \sum_b \frac{n_b}{n}\,\big|\mathrm{conf}(b) - \mathrm{acc}(b)\big|$$

    for `norm="l1"`; "l2" is the root of the weighted mean of squares, "max" the largest gap. Bins are (lo, hi], and 0
    belongs to the first. Ties for the top class go to the lowest index. A calibrated model has an ECE above 0 at
    finite n: the gaps of single bins do not cancel.

    Args:
        probs: (n, C) probabilities.
        labels: (n,) true classes.
        n_bins: how many bins.
        norm: "l1", "l2" or "max".
        strategy: "width" for bins of equal width, "mass" for bins of equally many samples (ties stay together).

    Returns:
        A float64 scalar on the device of the input, differentiable in probs for a fixed assignment to bins.

    Raises:
        ValueError: not probabilities (logits, say), labels outside 0..C-1, or an unknown option.
        TypeError: not numbers.

    >>> probs = [[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]]
    >>> round(expected_calibration_error(probs, [0, 1, 1, 1]).item(), 3)  # |.9 - 1/2| / 2 + |.6 - 1| / 2
    0.4

    Chapter: calibration/measuring-calibration
    """
    n_bins = _check_options(n_bins, norm, strategy)
    p = check_probs(probs)
    y = check_labels(labels, p.shape[0], p.shape[1], device=p.device)
    confidence, predicted = p.max(1)
    return _binary_error(confidence, predicted == y, n_bins, norm, strategy)


def classwise_ece(probs: Any, labels: Any, n_bins: int = 15, norm: str = "l1", strategy: str = "width") -> Tensor:
    r"""Return the calibration error of "the class is c", averaged over the classes.

    $$\mathrm{cwECE} = \frac1C \sum_c \sum_b \frac{n_{bc}}{n}\,\Big|\frac{1}{n_{bc}}\sum_{i \in b}
    \big(p_{ic} - [y_i = c]\big)\Big|$$

    It sees what the top-class ECE cannot: a bias of single classes, and probabilities of classes that are not on top.

    Args:
        probs: (n, C) probabilities.
        labels: (n,) true classes.
        n_bins: how many bins per class.
        norm: "l1", "l2" or "max", within each class.
        strategy: "width" for bins of equal width, "mass" for bins of equally many samples (ties stay together).

    Returns:
        A float64 scalar on the device of the input.

    Raises:
        ValueError: not probabilities (logits, say), labels outside 0..C-1, or an unknown option.
        TypeError: not numbers.

    >>> round(classwise_ece([[0.9, 0.1], [0.9, 0.1]], [0, 0]).item(), 3)
    0.1

    Chapter: calibration/measuring-calibration
    """
    n_bins = _check_options(n_bins, norm, strategy)
    p = check_probs(probs).detach()
    n, n_classes = p.shape
    y = check_labels(labels, n, n_classes, device=p.device)
    if strategy == "mass":
        errors = [_binary_error(p[:, c], y == c, n_bins, norm, strategy) for c in range(n_classes)]
        return torch.stack(errors).mean()
    offset = torch.arange(n_classes, device=p.device) * n_bins
    gap = torch.zeros(n_classes * n_bins, dtype=torch.float64, device=p.device)
    count = torch.zeros(n_classes * n_bins, dtype=torch.int64, device=p.device)
    rows = max(1, _CHUNK // n_classes)
    for start in range(0, n, rows):
        chunk = p[start : start + rows]
        cell = (_width_bins(chunk, n_bins).long() + offset).flatten()  # (rows * C,)
        residual = chunk.double().scatter_add(
            1, y[start : start + rows, None], chunk.new_full((len(chunk), 1), -1, dtype=torch.float64)
        )
        gap += torch.bincount(cell, weights=residual.flatten(), minlength=len(gap))
        if norm != "l1":
            count += torch.bincount(cell, minlength=len(gap))
    shape = n_classes, n_bins
    return _combine(gap.view(shape), count.view(shape), n, norm).mean()
