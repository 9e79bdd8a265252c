"""Recall by class and combination of attributes: where margins look even and a corner is dark.

Public: `IntersectionalRecall` (a `torchmetrics.Metric`), `recall_disparity`, `bootstrap_disparity`,
`recall_tests`, `make_attribute_population`, and what they return: `Recalls`, `AttributePopulation`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from companion.checks import as_tensor, check_generator, check_in_range, check_labels, check_positive_int
from companion.ranking import Interval
from companion.shortcuts.subgroups.intervals import wilson_interval
from companion.shortcuts.subgroups.metrics import _Counted, predicted_classes

__all__ = [
    "AttributePopulation",
    "IntersectionalRecall",
    "Recalls",
    "bootstrap_disparity",
    "make_attribute_population",
    "recall_disparity",
    "recall_tests",
]


class Recalls(NamedTuple):
    """Recall per class and attribute values (C, *levels), NaN where a cell is empty, with intervals and counts."""

    recall: Tensor
    low: Tensor
    high: Tensor
    right: Tensor
    counts: Tensor


class AttributePopulation(NamedTuple):
    """Predictions (n,), labels (n,) and attributes (n, A), whole numbers all."""

    predictions: Tensor
    labels: Tensor
    attributes: Tensor


class IntersectionalRecall(_Counted):
    """Recall of each class within each combination of attribute values, with its interval.

    Recall is compared between people of one class, so that a group that happens to hold more of the hard classes does
    not look worse than it is served. `compute(keep=...)` sums over the attributes that are not kept.

    Args:
        num_classes: C.
        levels: how many values each attribute has.
        level: of the Wilson intervals.
        **kwargs: for `torchmetrics.Metric`.

    Raises:
        ValueError: labels or attributes out of range, lengths that differ; `compute` before any sample.

    >>> metric = IntersectionalRecall(num_classes=2, levels=(2, 2))
    >>> metric.update([0, 1, 1, 1], [0, 0, 1, 1], attributes=[[0, 0], [0, 1], [1, 0], [1, 1]])
    >>> metric.compute().recall[0]
    tensor([[1., 0.],
            [nan, nan]], dtype=torch.float64)
    >>> metric.recalls(keep=[0]).recall[0]
    tensor([0.5000,    nan], dtype=torch.float64)

    Paper: gustafson2023facet
    Chapter: shortcuts/subgroups
    """

    higher_is_better = True

    def __init__(self, num_classes: int, levels: Sequence[int], *, level: float = 0.95, **kwargs: Any):
        sizes = (check_positive_int(num_classes, "num_classes"), *(check_positive_int(v, "levels") for v in levels))
        if len(sizes) < 2:
            raise ValueError("expected at least one attribute, got no levels")
        super().__init__(sizes, level, **kwargs)

    def update(self, predictions: Any, labels: Any, attributes: Any) -> None:
        """Take in predictions, classes (n,) or logits (n, C), labels (n,) and attributes (n, A)."""
        n_classes, *levels = self.shape
        predictions = predicted_classes(predictions, n_classes, self.device)
        cells = labels = check_labels(labels, len(predictions), n_classes, device=self.device)
        attributes = as_tensor(attributes, "attributes", self.device)
        if attributes.shape != (len(labels), len(levels)):
            shape = tuple(attributes.shape)
            raise ValueError(f"expected attributes ({len(labels)}, {len(levels)}), got shape {shape}")
        for a, size in enumerate(levels):
            cells = cells * size + check_labels(attributes[:, a], len(labels), size, f"attribute {a}")
        self._add(cells, predictions == labels)

    def compute(self) -> Recalls:
        """Return `Recalls(recall, low, high, right, counts)`, each (C, *levels)."""
        return self.recalls()

    def recalls(self, keep: Sequence[int] | None = None) -> Recalls:
        """Return the recalls by some attributes only, summed over the others.

        Args:
            keep: places of the attributes to keep, in order; None keeps all.

        Raises:
            ValueError: an attribute that does not exist, or before any sample.
        """
        n_attributes = len(self.shape) - 1
        kept = range(n_attributes) if keep is None else sorted(set(keep))
        if any(not 0 <= a < n_attributes for a in kept):
            raise ValueError(f"expected attributes to keep in 0..{n_attributes - 1}, got {list(keep or [])}")
        self._accuracy()  # raises when there is nothing
        gone = [a + 1 for a in range(n_attributes) if a not in kept]
        right, counts = (t.sum(gone) if gone else t.clone() for t in (self.right, self.total))
        low, high = wilson_interval(right, counts, self.level)
        return Recalls(right.to(low.dtype) / counts, low, high, right, counts)


def _rates(right: Tensor, counts: Tensor, min_count: int) -> Tensor:
    """Return recall averaged over classes (macro) per attribute cell; NaN unless every class has enough samples."""
    rates = right / counts
    return torch.where(counts >= min_count, rates, torch.nan).mean(-1)


def recall_disparity(recalls: Recalls, min_count: int = 20) -> Tensor:
    r"""Return the largest difference in class-averaged recall between two cells.

    $$\max_{a, b} \frac1C \sum_c (r_{ca} - r_{cb})$$

    over cells with at least `min_count` samples in every class that occurs at all. A maximum of noisy differences is
    positive even where nothing differs: read it beside `bootstrap_disparity`.

    Args:
        recalls: from `IntersectionalRecall`, with all attributes or `recalls(keep=[...])`.
        min_count: cells with fewer samples of some class do not take part.

    Returns:
        A float64 scalar in [0, 1], NaN when fewer than two cells take part.

    Raises:
        ValueError: a `min_count` below 1.

    >>> metric = IntersectionalRecall(num_classes=1, levels=(2,))
    >>> metric.update([0] * 40, [0] * 40, [[0]] * 20 + [[1]] * 20)
    >>> recall_disparity(metric.compute())
    tensor(0., dtype=torch.float64)

    Paper: gustafson2023facet
    Chapter: shortcuts/subgroups
    """
    check_positive_int(min_count, "min_count")
    right, counts = _flat(recalls)
    rates = _rates(right.T.double(), counts.T.double(), min_count)
    rates = rates[~torch.isnan(rates)]
    return rates.max() - rates.min() if len(rates) > 1 else torch.tensor(torch.nan, dtype=torch.float64)


def _flat(recalls: Recalls) -> tuple[Tensor, Tensor]:
    """Return right answers and counts as (C, cells), without classes that never occur."""
    right, counts = recalls.right.flatten(1), recalls.counts.flatten(1)
    present = counts.sum(1) > 0
    return right[present], counts[present]


def bootstrap_disparity(
    recalls: Recalls,
    min_count: int = 20,
    n_resamples: int = 1000,
    level: float = 0.95,
    generator: torch.Generator | int | None = None,
) -> Interval:
    """Return the disparity of `recall_disparity` with a bootstrap interval for the two cells it was found between.

    Samples are drawn again within each class and cell, which for counts means binomial draws: no loop over samples. The
    interval is that of the difference between the cells that were best and worst in the data; it does not undo that
    they were picked.

    Args:
        recalls: from `IntersectionalRecall`.
        min_count: cells with fewer samples of some class do not take part.
        n_resamples: how many resamples.
        level: how much of the bootstrap distribution the interval covers.
        generator: draws the resamples (None: torch's default generator; a whole number: a new one with that seed).

    Returns:
        `Interval(estimate, low, high)`.

    Raises:
        ValueError: fewer than two cells with enough samples, a setting out of range.

    >>> metric = IntersectionalRecall(num_classes=2, levels=(2,))
    >>> metric.update([0] * 40 + [0, 0, 0, 1] * 10, [0] * 80, [[0]] * 40 + [[1]] * 40)
    >>> bool(bootstrap_disparity(metric.compute(), generator=0).low > 0)
    True

    Paper: gustafson2023facet
    Chapter: shortcuts/subgroups
    """
    check_positive_int(min_count, "min_count")
    check_positive_int(n_resamples, "n_resamples")
    level, generator = check_in_range(level, "level", 0, 1, inclusive="neither"), check_generator(generator)
    right, counts = (t.double().cpu() for t in _flat(recalls))
    rates = _rates(right.T, counts.T, min_count)  # (cells,)
    if int((~torch.isnan(rates)).sum()) < 2:
        raise ValueError(f"expected at least two cells with {min_count} samples of every class, got fewer")
    best, worst = rates.nan_to_num(-torch.inf).argmax(), rates.nan_to_num(torch.inf).argmin()
    pair = torch.stack([best, worst])
    n, p = counts[:, pair], (right / counts)[:, pair]
    shape = (n_resamples, *n.shape)
    again = torch.binomial(n.expand(shape).contiguous(), p.expand(shape).contiguous(), generator=generator) / n
    difference = (again[..., 0] - again[..., 1]).mean(1)
    tail = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=difference.dtype)
    low, high = difference.quantile(tail)
    return Interval(rates[best] - rates[worst], low, high)


def recall_tests(recalls: Recalls, min_count: int = 20) -> Tensor:
    r"""Return a p-value per class and cell: is the recall there that of the rest of the class?

    The two-sided two-proportion z test of the cell against the other cells of its class, with the pooled variance.
    Judge all cells at once with `benjamini_hochberg`.

    Args:
        recalls: from `IntersectionalRecall`.
        min_count: cells with fewer samples, in themselves or in the rest, are not tested.

    Returns:
        (C, *levels) float64, NaN where there was no test.

    Raises:
        ValueError: a `min_count` below 1.

    >>> metric = IntersectionalRecall(num_classes=2, levels=(2,))
    >>> metric.update([0] * 40 + [0, 1] * 20, [0] * 80, [[0]] * 40 + [[1]] * 40)
    >>> recall_tests(metric.compute())[0] < 0.001
    tensor([True, True])

    Paper: gustafson2023facet
    Chapter: shortcuts/subgroups
    """
    check_positive_int(min_count, "min_count")
    right, counts = recalls.right.flatten(1).double(), recalls.counts.flatten(1).double()
    others, other_counts = right.sum(1, keepdim=True) - right, counts.sum(1, keepdim=True) - counts
    pooled = (right + others) / (counts + other_counts)
    variance = pooled * (1 - pooled) * (1 / counts + 1 / other_counts)
    difference = right / counts - others / other_counts
    # where all or none of a class are right, nothing differs and the variance is 0
    z = torch.where(variance > 0, difference / variance.sqrt(), 0)
    p = torch.special.erfc(z.abs() / 2**0.5)
    return torch.where((counts >= min_count) & (other_counts >= min_count), p, torch.nan).view(recalls.counts.shape)


def make_attribute_population(
    n: int,
    *,
    interaction: str = "none",
    effect: float = 0.1,
    recall: float = 0.75,
    n_classes: int = 5,
    marginals: Sequence[Sequence[float]] = ((0.5, 0.5), (1 / 3, 1 / 3, 1 / 3), (0.5, 0.5)),
    label_noise: float = 0.0,
    generator: torch.Generator | int | None = None,
) -> AttributePopulation:
    r"""Return predictions of a model whose recall depends on a combination of attributes in a known way.

    "crossover": +effect where the first attribute is 0 and the second 0, or 1 and 1, and -effect where it is 0 and 1,
    or 1 and 0, so that with even marginals no single attribute shows anything. "single_cell": -effect where the first
    is 0 and the second 0; this shows in the margins, by effect times the other attribute's share:
    $\Delta_A = d\,P(b), \Delta_B = d\,P(a)$. "none": nothing.

    Args:
        n: samples.
        interaction: "none", "crossover" or "single_cell".
        effect: d, in [0, 1].
        recall: without the effect.
        n_classes: classes, equally frequent; a wrong prediction is any of the others.
        marginals: probabilities of each attribute's values; attributes are independent.
        label_noise: share of attribute annotations that are replaced by a draw from the marginals.
        generator: a cpu generator or a seed; None means torch's default generator.

    Returns:
        `AttributePopulation(predictions, labels, attributes)`.

    Raises:
        ValueError: an unknown interaction, probabilities out of range, fewer than two attributes.

    >>> population = make_attribute_population(100, generator=torch.Generator().manual_seed(0))
    >>> population.attributes.shape
    torch.Size([100, 3])

    Paper: gustafson2023facet
    Chapter: shortcuts/subgroups
    """
    n, n_classes = check_positive_int(n, "n"), check_positive_int(n_classes, "n_classes", 2)
    effect, recall = check_in_range(effect, "effect", 0, 1), check_in_range(recall, "recall", 0, 1)
    label_noise, generator = check_in_range(label_noise, "label_noise", 0, 1), check_generator(generator)
    if interaction not in ("none", "crossover", "single_cell") or len(marginals) < 2:
        raise ValueError(
            f"expected 'none', 'crossover' or 'single_cell' and two attributes, got {interaction!r}, {len(marginals)}"
        )

    def draw() -> Tensor:
        columns = [torch.multinomial(torch.tensor(m), n, replacement=True, generator=generator) for m in marginals]
        return torch.stack(columns, 1)

    attributes, noise = draw(), draw()
    a, b = attributes[:, 0], attributes[:, 1]
    shift = torch.zeros(n)
    if interaction == "crossover":
        shift = torch.where((a < 2) & (b < 2), torch.where(a == b, effect, -effect), 0.0)
    elif interaction == "single_cell":
        shift = torch.where((a == 0) & (b == 0), -effect, 0.0)
    labels = torch.randint(n_classes, (n,), generator=generator)
    right = torch.rand(n, generator=generator) < recall + shift
    other = (labels + torch.randint(1, n_classes, (n,), generator=generator)) % n_classes
    replaced = torch.rand(attributes.shape, generator=generator) < label_noise
    return AttributePopulation(torch.where(right, labels, other), labels, torch.where(replaced, noise, attributes))
