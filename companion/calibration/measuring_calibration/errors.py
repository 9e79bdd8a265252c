"""Calibration error in bins: of the top class and of every class, streamed, and without the bias of small bins.

Public: `top_class`, `expected_calibration_error`, `binary_calibration_error`, `classwise_ece`, `debiased_ece`,
`ece_noise_floor`, and the same errors over a stream: `CalibrationError`, `ClasswiseECE`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from companion.checks import as_tensor, check_binary, check_labels, check_positive_int, check_probs, check_scores

__all__ = [
    "CalibrationError",
    "ClasswiseECE",
    "TopClass",
    "binary_calibration_error",
    "classwise_ece",
    "debiased_ece",
    "ece_noise_floor",
    "expected_calibration_error",
    "top_class",
]

_NORMS = ("l1", "l2", "max")
_STRATEGIES = ("width", "mass")
_SMALL = 1 << 16  # below this many probabilities the number of calls decides, not what they do
_CHUNK = 1 << 18  # probabilities looked at at a time: few calls, and buffers of a few megabytes


class TopClass(NamedTuple):
    """What a top-class calibration error sees: the largest probability, and whether its class is the true one."""

    confidence: Tensor
    correct: Tensor


def check_confidence(confidence: Any, name: str = "confidence", *, device: torch.device | None = None) -> Tensor:
    """Return confidence as a float tensor of shape (n,), n at least 1, with values in [0, 1], up to rounding above.

    Raises:
        ValueError: another shape, empty, NaN, or values outside [0, 1] (logits, log-probabilities, percentages).
        TypeError: not numbers.

    >>> check_confidence([0.2, 1.0])
    tensor([0.2000, 1.0000])
    """
    confidence = as_tensor(confidence, name, device)
    whole = not confidence.is_floating_point()
    if confidence.dim() == 2:
        raise ValueError(
            f"expected {name} of shape (n,), one number per sample, got shape {tuple(confidence.shape)}: "
            "looks like probabilities of several classes: pass top_class(probs, labels)"
        )
    confidence = check_scores(confidence, name, 1, device=device)
    low, high = (v.item() for v in torch.aminmax(confidence.detach()))
    slack = max(1e-4, 2 * torch.finfo(confidence.dtype).eps)  # the mean of ten models that are sure may be 1.0000001
    if low < 0 or high > 1 + slack:
        kind = "percentages: divide by 100" if low >= 0 and 1.5 < high <= 100 else f"logits: pass sigmoid({name})"
        if whole and low >= 0:
            kind = "labels (the order is confidences, then labels), or percentages: divide by 100"
        if high <= 0:
            kind = f"log-probabilities: pass exp({name})"
        raise ValueError(f"expected {name} in [0, 1], got values from {low:.4g} to {high:.4g}: looks like {kind}")
    return confidence


def check_outcome(correct: Any, n: int, device: torch.device) -> Tensor:
    """Return outcomes as a bool tensor of shape (n,), told apart from probabilities."""
    values = as_tensor(correct, "correct", device)
    if values.is_floating_point() and values.dim() == 1 and bool(((values > 0) & (values < 1)).any()):
        raise ValueError(
            "expected correct to be 0 or 1, got values between: looks like confidences; "
            "the order is (confidence, correct)"
        )
    return check_binary(values, n, "correct", device=device)


def top_class(probs: Any, labels: Any) -> TopClass:
    """Return the largest probability of each row and whether its class is the true one; ties go to the lowest index.

    Args:
        probs: (n, C) probabilities.
        labels: (n,) true classes.

    Returns:
        `TopClass(confidence (n,), correct (n,) bool)`.

    Raises:
        ValueError: not probabilities (logits, say), or labels outside 0..C-1.
        TypeError: not numbers.

    >>> top_class([[0.9, 0.1], [0.4, 0.6]], [0, 0]).correct
    tensor([ True, False])

    Chapter: calibration/measuring-calibration
    """
    p = check_probs(probs)
    y = check_labels(labels, p.shape[0], p.shape[1], device=p.device)
    tracked = torch.is_grad_enabled() and p.requires_grad
    if p.device.type != "cpu" or tracked or p.numel() < _SMALL:
        confidence, predicted = p.max(1)
        return TopClass(confidence, predicted == y)
    confidence = p.amax(1)  # on a processor ten times as fast as a maximum that also says where it is
    return TopClass(confidence, _is_first_of_largest(p, y, confidence))


def _is_first_of_largest(p: Tensor, y: Tensor, largest: Tensor) -> Tensor:
    """Return where class y has the largest probability of its row and no class before it has the same."""
    correct = p.gather(1, y[:, None]).squeeze(1) == largest
    # rows sum to one, so two classes can share the first place only with about a half or less each
    doubtful = (correct & (largest <= 0.6)).nonzero().squeeze(1)
    for rows in doubtful.split(max(1, _CHUNK // p.shape[1])):
        own = y.index_select(0, rows)
        others = p.index_select(0, rows).scatter_(1, own[:, None], -1)
        if bool((others.amax(1) == largest.index_select(0, rows)).any()):
            correct[rows] = p.index_select(0, rows).argmax(1) == own
    return correct


def check_options(n_bins: int, norm: str, strategy: str) -> int:
    """Return n_bins as an int when all three options are known, else raise ValueError."""
    if norm not in _NORMS:
        raise ValueError(f"expected norm to be one of {_NORMS}, got {norm!r}")
    if strategy not in _STRATEGIES:
        raise ValueError(f"expected strategy to be one of {_STRATEGIES}, got {strategy!r}")
    return check_positive_int(n_bins, "n_bins")


def _width_bins(p: Tensor, n_bins: int) -> Tensor:
    """Return the bin k of each p in (k / n_bins, (k + 1) / n_bins], int64; 0 belongs to the first.

    Rounding of p * n_bins can miss by one where p lies on an edge, so that p itself is compared with the edge.
    """
    if p.dtype in (torch.float16, torch.bfloat16):
        p = p.float()
    # a little less than p * n_bins, so that the whole part is the bin or the one before it
    bins = p.mul(n_bins * (1 - 8 * torch.finfo(p.dtype).eps)).floor_()
    bins += p > (bins + 1).div_(n_bins)
    return bins.clamp_(max=n_bins - 1).long()


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


def assign_bins(confidence: Tensor, n_bins: int, strategy: str) -> Tensor:
    """Return the bin of each confidence, int64 in 0..n_bins-1, by the "width" or the "mass" strategy."""
    assign: Callable[[Tensor, int], Tensor] = _width_bins if strategy == "width" else _mass_bins
    return assign(confidence.detach(), n_bins)


def _binned(confidence: Tensor, outcome: Tensor, n_bins: int, strategy: str) -> tuple[Tensor, Tensor]:
    """Return each bin's sum of (confidence - outcome), float64, and its number of samples."""
    bins = assign_bins(confidence, n_bins, strategy)
    gap = torch.zeros(n_bins, dtype=torch.float64, device=bins.device)
    gap.index_add_(0, bins, confidence.double() - outcome.double())
    return gap, torch.bincount(bins, minlength=n_bins)


def _binary_error(confidence: Tensor, outcome: Tensor, n_bins: int, norm: str, strategy: str) -> Tensor:
    gap, count = _binned(confidence, outcome, n_bins, strategy)
    return _combine(gap, count, confidence.shape[0], norm)


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
    n_bins = check_options(n_bins, norm, strategy)
    return _binary_error(*top_class(probs, labels), n_bins, norm, strategy)


def binary_calibration_error(
    confidence: Any, correct: Any, n_bins: int = 15, norm: str = "l1", strategy: str = "width"
) -> Tensor:
    r"""Return the calibration error of stated chances of one event: an answer is right, it rains, a test passes.

    $$\mathrm{ECE} = \sum_b \frac{n_b}{n}\,\Big|\frac{1}{n_b}\sum_{i \in b} (p_i - o_i)\Big|$$

    Args:
        confidence: (n,) stated probabilities p of the event.
        correct: (n,) outcomes o, 0 or 1.
        n_bins: how many bins of [0, 1].
        norm: "l1", "l2" or "max".
        strategy: "width" for bins of equal width, "mass" for bins of equally many samples (ties stay together).

    Returns:
        A float64 scalar, differentiable in confidence for a fixed assignment to bins.

    Raises:
        ValueError: values outside [0, 1], outcomes other than 0 and 1, lengths that differ, or an unknown option.

    >>> round(binary_calibration_error([0.9, 0.9, 0.2, 0.2], [1, 0, 0, 0]).item(), 3)
    0.3

    Paper: spiess2024calibration

    Chapter: calibration/measuring-calibration
    """
    n_bins = check_options(n_bins, norm, strategy)
    p = check_confidence(confidence)
    return _binary_error(p, check_outcome(correct, p.shape[0], p.device), n_bins, norm, strategy)


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
    n_bins = check_options(n_bins, norm, strategy)
    p = check_probs(probs).detach()
    n, n_classes = p.shape
    y = check_labels(labels, n, n_classes, device=p.device)
    if strategy == "mass":
        errors = [_binary_error(p[:, c], y == c, n_bins, norm, strategy) for c in range(n_classes)]
        return torch.stack(errors).mean()
    return _combine(*_classwise_sums(p, y, n_bins), n, norm).mean()


def _above(p: Tensor, edge: float) -> Tensor:
    """Return where the flat p exceeds the edge, as indices."""
    if p.device.type == "cpu" and p.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.flatnonzero(p.numpy() > p.new_tensor(edge).numpy()))  # five times as fast
    return (p > edge).nonzero().squeeze(1)


def _classwise_sums(p: Tensor, y: Tensor, n_bins: int) -> tuple[Tensor, Tensor]:
    """Return sums of (p - [y = c]) and counts, each (C, n_bins), for bins of equal width.

    A row of C probabilities has fewer than n_bins of them above 1 / n_bins, so most lie in the first bin. Only the
    others are put into bins one by one; the first bin gets what they leave of each column's total.
    """
    n, n_classes = p.shape
    if p.dtype in (torch.float16, torch.bfloat16):
        p = p.float()
    size = n_classes * n_bins
    gap = torch.zeros(size, dtype=torch.float64, device=p.device)
    count = torch.zeros(size, dtype=torch.int64, device=p.device)
    total = torch.zeros(n_classes, dtype=torch.float64, device=p.device)
    rows = max(1, _CHUNK // n_classes)
    for start in range(0, n, rows):
        chunk = p[start : start + rows]
        total += chunk.double().sum(0)
        flat = chunk.flatten()
        where = _above(flat, 0.9999 / n_bins)  # a little below the edge: the bin itself is decided exactly
        high = flat.index_select(0, where)
        cell = _width_bins(high, n_bins).add_(where.remainder_(n_classes), alpha=n_bins)
        gap += torch.bincount(cell, high.double(), minlength=size)
        count += torch.bincount(cell, minlength=size)
    # the outcomes: one cell per row
    own = p.gather(1, y[:, None]).squeeze(1)
    gap -= torch.bincount(_width_bins(own, n_bins).add_(y, alpha=n_bins), minlength=size)
    gap, count = gap.view(n_classes, n_bins), count.view(n_classes, n_bins)
    total -= torch.bincount(y, minlength=n_classes)
    gap[:, 0] += total - gap.sum(1)
    count[:, 0] += n - count.sum(1)
    return gap, count


def debiased_ece(probs: Any, labels: Any, n_bins: int = 15, strategy: str = "width") -> Tensor:
    r"""Return the *square* of the l2 calibration error without the bias of small bins.

    A squared mean of residuals r = p - o contains their noise. Leaving out the products of a residual with itself
    removes exactly that:

    $$\widehat{\mathrm{CE}^2} = \sum_b \frac{n_b}{n} \cdot \frac{1}{n_b (n_b - 1)} \sum_{i \ne j \in b} r_i r_j$$

    Its mean over data sets is the true value for the given bins, 0 for a calibrated model, so single values may be
    negative; taking the root, or the positive part, would bring a bias back. A bin with one sample has no pairs and
    counts as 0.

    Args:
        probs: (n, C) probabilities, judged by their top class, or (n,) confidences of one event.
        labels: (n,) true classes, or (n,) outcomes 0 and 1.
        n_bins: how many bins.
        strategy: "width" or "mass".

    Returns:
        A float64 scalar.

    Raises:
        ValueError: not probabilities, labels out of range, or an unknown option.

    >>> debiased_ece([0.5, 0.5, 0.5, 0.5], [1, 0, 1, 0], n_bins=1).item() < 0  # calibrated: below 0 by chance
    True

    Chapter: calibration/measuring-calibration
    """
    n_bins = check_options(n_bins, "l2", strategy)
    p, o = confidence_and_outcome(probs, labels)
    bins = assign_bins(p, n_bins, strategy)
    r = p.double() - o.double()
    zeros = torch.zeros(n_bins, dtype=torch.float64, device=p.device)
    total, square = zeros.index_add(0, bins, r), zeros.index_add(0, bins, r.square())
    count = torch.bincount(bins, minlength=n_bins).double()
    pairs = (total.square() - square) / (count * (count - 1)).clamp(min=1)  # mean of r_i r_j over i != j
    return (count * pairs).sum() / p.shape[0]


def ece_noise_floor(probs: Any, n_bins: int = 15, strategy: str = "width") -> Tensor:
    r"""Return the l1 ECE to expect from a perfectly calibrated model with these confidences.

    Were every p_i the true chance, each bin's sum of p_i - o_i would have mean 0 and variance $\sum_i p_i (1 - p_i)$;
    by the central limit theorem the mean of its absolute value is $\sqrt{2/\pi}$ of its standard deviation:

    $$\mathrm{E}\,[\mathrm{ECE}] \approx \frac1n \sum_b \sqrt{\frac{2}{\pi} \sum_{i \in b} p_i (1 - p_i)}
    \;\le\; \sqrt{\frac{B}{2 \pi n}}$$

    It falls with the root of n and grows with the root of the number of bins B.

    Args:
        probs: (n, C) probabilities, of which the largest count, or (n,) confidences of one event.
        n_bins: how many bins.
        strategy: "width" or "mass".

    Returns:
        A float64 scalar. An ECE of this size is what honesty looks like at this n.

    Raises:
        ValueError: not probabilities.

    >>> round(ece_noise_floor([0.5] * 100, n_bins=10).item(), 4)  # sqrt(2 / pi) * 5 / 100
    0.0399

    Chapter: calibration/measuring-calibration
    """
    n_bins = check_options(n_bins, "l1", strategy)
    p = check_probs(probs).amax(1) if as_tensor(probs, "probs").dim() == 2 else check_confidence(probs)
    wide = p.detach().double()
    bins = assign_bins(p, n_bins, strategy)
    spread = (wide * (1 - wide)).clamp(min=0)  # a confidence may be rounded to above 1
    variance = torch.zeros(n_bins, dtype=torch.float64, device=p.device).index_add(0, bins, spread)
    return (2 / torch.pi * variance).sqrt().sum() / p.shape[0]


def confidence_and_outcome(probs: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Return confidence and outcome of rows of probabilities with labels, or of confidences with outcomes."""
    if as_tensor(probs, "probs").dim() == 1:
        p = check_confidence(probs, "probs")
        return p, check_outcome(labels, p.shape[0], p.device)
    return top_class(probs, labels)


class _BinnedMetric(Metric):
    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    gap: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...], n_bins: int, norm: str, **kwargs: Any):
        super().__init__(**kwargs)
        self.n_bins, self.norm = check_options(n_bins, norm, "width"), norm
        self.add_state("gap", torch.zeros(*shape, n_bins, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(*shape, n_bins, dtype=torch.int64), dist_reduce_fx="sum")

    def _n(self) -> int:
        n = int(self.count.sum()) // (self.count.shape[0] if self.count.dim() == 2 else 1)
        if n == 0:
            raise ValueError("expected at least 1 sample before compute(), got none")
        return n

    def compute(self) -> Tensor:
        """Return the calibration error of everything seen, a float64 scalar."""
        return _combine(self.gap, self.count, self._n(), self.norm).mean()


class CalibrationError(_BinnedMetric):
    r"""Expected calibration error of a stream: the same number as `expected_calibration_error` of everything at once.

    $$\mathrm{ECE} = \sum_b \frac{n_b}{n}\,\big|\mathrm{conf}(b) - \mathrm{acc}(b)\big|$$

    The state is one sum and one count per bin, whatever the length of the stream. Batches, `merge_state` and processes
    under `torchrun` add up. Bins of equal mass are not offered: they need all confidences at once.

    Args:
        n_bins: how many bins of equal width.
        norm: "l1", "l2" or "max".
        **kwargs: for `torchmetrics.Metric`.

    Raises:
        ValueError: not probabilities, labels out of range, an unknown option; `compute` without a sample.

    >>> metric = CalibrationError()
    >>> metric.update([[0.9, 0.1], [0.9, 0.1]], [0, 1])
    >>> metric.update([[0.4, 0.6], [0.4, 0.6]], [1, 1])
    >>> round(metric.compute().item(), 3)
    0.4

    Chapter: calibration/measuring-calibration
    """

    def __init__(self, n_bins: int = 15, norm: str = "l1", **kwargs: Any):
        super().__init__((), n_bins, norm, **kwargs)

    def update(self, probs: Any, labels: Any) -> None:
        """Take in (n, C) probabilities and (n,) classes, or (n,) confidences of one event and (n,) outcomes."""
        gap, count = _binned(
            *confidence_and_outcome(as_tensor(probs, device=self.device), labels), self.n_bins, "width"
        )
        self.gap = self.gap + gap.detach()
        self.count = self.count + count


class ClasswiseECE(_BinnedMetric):
    r"""Class-wise calibration error of a stream: the same number as `classwise_ece` of everything at once.

    $$\mathrm{cwECE} = \frac1C \sum_c \sum_b \frac{n_{bc}}{n}\,\Big|\frac{1}{n_{bc}}\sum_{i \in b}
    \big(p_{ic} - [y_i = c]\big)\Big|$$

    Args:
        n_classes: C; the state holds C times n_bins sums and counts.
        n_bins: how many bins of equal width per class.
        norm: "l1", "l2" or "max", within each class.
        **kwargs: for `torchmetrics.Metric`.

    Raises:
        ValueError: not probabilities, labels or columns that do not fit; `compute` without a sample.

    >>> metric = ClasswiseECE(n_classes=2)
    >>> metric.update([[0.9, 0.1], [0.9, 0.1]], [0, 0])
    >>> round(metric.compute().item(), 3)
    0.1

    Chapter: calibration/measuring-calibration
    """

    def __init__(self, n_classes: int, n_bins: int = 15, norm: str = "l1", **kwargs: Any):
        self.n_classes = check_positive_int(n_classes, "n_classes", minimum=2)
        super().__init__((n_classes,), n_bins, norm, **kwargs)

    def update(self, probs: Any, labels: Any) -> None:
        """Take in (n, C) probabilities and (n,) true classes, on the device of the metric."""
        p = check_probs(probs, device=self.device).detach()
        if p.shape[1] != self.n_classes:
            raise ValueError(f"expected probs with {self.n_classes} classes (columns), got shape {tuple(p.shape)}")
        y = check_labels(labels, p.shape[0], self.n_classes, device=p.device)
        gap, count = _classwise_sums(p, y, self.n_bins)
        self.gap = self.gap + gap
        self.count = self.count + count
