"""Is one detector better than another, on the same images? A paired test, and the interval that goes with it.

Public: `compare_paired`, and what it returns: `PairedComparison`, `CategoryComparison`.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from companion.checks import as_tensor, check_generator, check_in_range, check_positive_int, check_same_length
from companion.ranking import bootstrap_interval

__all__ = ["CategoryComparison", "PairedComparison", "compare_paired"]


class CategoryComparison(NamedTuple):
    """One category: images, mean difference, and a p-value corrected for the number of categories (Holm)."""

    category: Any
    n: int
    difference: float
    p_value: float


class PairedComparison(NamedTuple):
    """Mean difference a - b with intervals, p-value, how often each wins, and the categories one by one.

    `low` and `high` hold for these categories and new (defective) images of them; `low_new` and `high_new` for new
    categories (NaN where there is only one).
    """

    difference: float
    low: float
    high: float
    p_value: float
    wins: int
    ties: int
    losses: int
    low_new: float
    high_new: float
    categories: tuple[CategoryComparison, ...]


def _wilcoxon(differences: Tensor) -> float:
    """Return the two-sided p-value of the signed-rank test; zeros are ranked and then left out (Pratt)."""
    if len(differences) == 0 or not bool(differences.any()):
        return 1.0
    # the exact law needs ranks without ties; scipy's normal approximation corrects for them
    sizes = differences.abs()
    exact = len(sizes) <= 50 and len(sizes.unique()) == len(sizes) and bool((sizes > 0).all())
    method = "exact" if exact else "asymptotic"
    return float(stats.wilcoxon(differences.numpy(), zero_method="pratt", method=method).pvalue)


def _holm(p_values: list[float]) -> list[float]:
    order = np.argsort(p_values)
    steps = np.maximum.accumulate([(len(order) - i) * p_values[j] for i, j in enumerate(order)])
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(steps, 1)
    return corrected.tolist()


def compare_paired(
    a: Any,
    b: Any,
    categories: Any = None,
    *,
    level: float = 0.95,
    n_resamples: int = 1000,
    generator: torch.Generator | int | None = None,
) -> PairedComparison:
    r"""Compare two detectors by their scores on the same images.

    Pairing removes what makes an image hard for both. Without categories the estimate is the mean difference over
    images, $\frac1n \sum_i (a_i - b_i)$, with a bootstrap interval over images and the Wilcoxon signed-rank test. With
    categories it is the mean over categories of their mean differences, and the test is over categories: images of
    one category succeed and fail together, so that a thousand images of one category are not a thousand pieces of
    evidence about the next category.

    Args:
        a: one number per image, higher = better, as `AUPIMO` returns them.
        b: the same for the other detector. Images that are NaN in both (normal ones) are left out.
        categories: the category of each image, any hashable.
        level: of the intervals.
        n_resamples: resamples of the bootstrap.
        generator: draws them (None: torch's default generator).

    Returns:
        `PairedComparison`; a positive difference says that `a` is better.

    Raises:
        ValueError: lengths that differ, fewer than two images, NaN in one of the two only, infinity.

    >>> a, b = torch.tensor([0.9, 0.8, 0.7, 0.9, 0.6]), torch.tensor([0.5, 0.6, 0.6, 0.4, 0.3])
    >>> result = compare_paired(a, b, generator=0)
    >>> round(result.difference, 3), result.wins, round(result.p_value, 4)
    (0.3, 5, 0.0625)

    Paper: bertoldo2024aupimo
    Chapter: anomaly/scoring-the-scorer
    """
    a, b = (as_tensor(v, name).detach().cpu().double() for v, name in ((a, "a"), (b, "b")))
    n = check_same_length(a=a, b=b, categories=categories)
    if a.dim() != 1 or b.dim() != 1:
        raise ValueError(f"expected one number per image, got shapes {tuple(a.shape)} and {tuple(b.shape)}")
    level = check_in_range(level, "level", 0, 1, inclusive="neither")
    check_positive_int(n_resamples, "n_resamples")
    generator = check_generator(generator)
    if bool((a.isnan() != b.isnan()).any()):
        raise ValueError(f"expected NaN for the same images, got {int((a.isnan() != b.isnan()).sum())} in one only")
    kept = ~a.isnan()
    d = (a - b)[kept]
    if len(d) < 2 or not bool(d.isfinite().all()):
        raise ValueError(f"expected at least 2 images with finite scores, got {int(d.isfinite().sum())} of {n}")
    names = ["all"] * n if categories is None else [c.item() if hasattr(c, "item") else c for c in categories]
    names = [name for name, keep in zip(names, kept.tolist()) if keep]
    place = {name: i for i, name in enumerate(dict.fromkeys(names))}
    distinct, code = list(place), torch.tensor([place[name] for name in names])
    count = torch.bincount(code)
    weight = 1 / (count[code] * len(distinct)).double()  # every category weighs the same
    means = torch.bincount(code, d) / count
    settings = {"n_resamples": n_resamples, "level": level, "generator": generator}
    # within each category, so that the weights stay right
    images = bootstrap_interval(lambda x, w: (x * w).sum(), d, weight, stratify=code, **settings)
    low_new = high_new = float("nan")
    if len(distinct) > 1:
        _, low_new, high_new = map(float, bootstrap_interval(lambda x: x.mean(), means, **settings))
    each = [_wilcoxon(d[code == c]) for c in range(len(distinct))]
    return PairedComparison(
        *map(float, images),
        p_value=_wilcoxon(means) if len(distinct) > 1 else each[0],
        wins=int((d > 0).sum()),
        ties=int((d == 0).sum()),
        losses=int((d < 0).sum()),
        low_new=low_new,
        high_new=high_new,
        categories=tuple(
            CategoryComparison(name, int(count[c]), float(means[c]), p)
            for c, (name, p) in enumerate(zip(distinct, _holm(each)))
        ),
    )
