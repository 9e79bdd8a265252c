"""Does progress on a benchmark reach everybody? Slopes over a family of models, gaps between regions, a new last layer.

Public: `progress_rate`, `progress_gap`, `region_gap`, `last_layer_retrain`, `make_regional_digits`, and what they
return: `ProgressRate`, `RegionalDigits`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import avg_pool2d

from companion.checks import check_features, check_generator, check_in_range, check_labels, check_scores
from companion.data.glyphs import load_digits_images
from companion.data.wrappers import stratified_split
from companion.geometry import single
from companion.ranking import Interval, bootstrap_interval

__all__ = [
    "ProgressRate",
    "RegionalDigits",
    "last_layer_retrain",
    "make_regional_digits",
    "progress_gap",
    "progress_rate",
    "region_gap",
]


class ProgressRate(NamedTuple):
    """Slope of a line over models with its bootstrap interval, and the intercept."""

    slope: Tensor
    low: Tensor
    high: Tensor
    intercept: Tensor


class RegionalDigits(NamedTuple):
    """Digits in four styles: `train` and `test`, each (images (n, 1, 8, 8), labels (n,), regions (n,)); `corrupted`.

    `test` shows the same digits in every region. `corrupted` is the test part of region 0 with noise and blur.
    """

    train: tuple[Tensor, Tensor, Tensor]
    test: tuple[Tensor, Tensor, Tensor]
    spare: tuple[Tensor, Tensor, Tensor]
    corrupted: tuple[Tensor, Tensor]


def _on_scale(accuracy: Any, name: str, scale: str) -> Tensor:
    x = check_scores(accuracy, name, min_samples=3).detach().double()
    if scale == "raw":
        return x
    if scale not in ("logit", "probit"):
        raise ValueError(f"expected scale 'raw', 'logit' or 'probit', got {scale!r}")
    if not bool(((x > 0) & (x < 1)).all()):
        raise ValueError(
            f"expected {name} inside (0, 1) on the {scale} scale, got {x.min().item()} to {x.max().item()}"
        )
    return torch.logit(x) if scale == "logit" else torch.special.ndtri(x)


def _line(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    centered = x - x.mean()
    slope = (centered * (y - y.mean())).sum() / centered.square().sum()
    return slope, y.mean() - slope * x.mean()


def progress_rate(
    reference: Any,
    target: Any,
    *,
    scale: str = "raw",
    n_resamples: int = 1000,
    level: float = 0.95,
    generator: torch.Generator | int | None = None,
) -> ProgressRate:
    r"""Return how much target accuracy rises per point of reference accuracy, over models.

    The least-squares slope $\sum_m (x_m - \bar x)(y_m - \bar y) / \sum_m (x_m - \bar x)^2$, with a bootstrap interval
    over models. Near floor and ceiling accuracies bend by themselves: compare scales before a slope is called slow.

    Args:
        reference: accuracy of each model on the benchmark, (m,), at least 3.
        target: its accuracy elsewhere, (m,).
        scale: "raw", or "logit" or "probit" of both (accuracies then have to be inside (0, 1)).
        n_resamples: bootstrap resamples of models.
        level: of the interval.
        generator: draws the resamples (None: torch's default generator; a whole number: a new one with that seed).

    Returns:
        `ProgressRate(slope, low, high, intercept)`.

    Raises:
        ValueError: fewer than 3 models, lengths that differ, one and the same reference for all, an unknown scale.

    >>> progress_rate([0.5, 0.6, 0.7, 0.8], [0.3, 0.35, 0.4, 0.45], generator=0).slope
    tensor(0.5000, dtype=torch.float64)

    Paper: richards2023progress
    Chapter: shortcuts/subgroups
    """
    x, y = _on_scale(reference, "reference", scale), _on_scale(target, "target", scale)
    _check_models(x, y)
    slope, intercept = _line(x, y)
    interval = bootstrap_interval(
        lambda a, b: _line(a, b)[0].nan_to_num(float(slope)),
        x,
        y,
        n_resamples=n_resamples,
        level=level,
        generator=generator,
    )
    return ProgressRate(slope, interval.low, interval.high, intercept)


def _check_models(x: Tensor, *others: Tensor) -> None:
    if any(len(y) != len(x) for y in others):
        raise ValueError(f"expected one accuracy per model everywhere, got {len(x)} and {[len(y) for y in others]}")
    if not float(x.max()) > float(x.min()):
        raise ValueError("expected models of different reference accuracy, got one and the same")


def progress_gap(
    reference: Any,
    standard: Any,
    real: Any,
    *,
    scale: str = "raw",
    n_resamples: int = 1000,
    level: float = 0.95,
    generator: torch.Generator | int | None = None,
) -> Interval:
    r"""Return how many times faster accuracy rises on a standard benchmark than where it matters.

    The ratio of the slopes of `progress_rate(reference, standard)` and `progress_rate(reference, real)`; above 1 the
    benchmark overstates progress. The bootstrap draws models, the same for both slopes.

    Args:
        reference: accuracy of each model on the reference, (m,).
        standard: on the standard generalisation benchmark, (m,).
        real: on the data that matter, (m,).
        scale: as in `progress_rate`.
        n_resamples: bootstrap resamples of models.
        level: of the interval.
        generator: draws the resamples (None: torch's default generator; a whole number: a new one with that seed).

    Returns:
        `Interval(estimate, low, high)`.

    Raises:
        ValueError: as `progress_rate`.

    >>> progress_gap([0.5, 0.6, 0.8], [0.4, 0.5, 0.7], [0.3, 0.35, 0.45], generator=0).estimate
    tensor(2.0000, dtype=torch.float64)

    Paper: richards2023progress
    Chapter: shortcuts/subgroups
    """
    x, a, b = (_on_scale(v, n, scale) for v, n in ((reference, "reference"), (standard, "standard"), (real, "real")))
    _check_models(x, a, b)

    def ratio(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        value = _line(x, a)[0] / _line(x, b)[0]
        return torch.where(torch.isfinite(value), value, whole)  # a resample of one and the same model has no slope

    whole = _line(x, a)[0] / _line(x, b)[0]
    return bootstrap_interval(ratio, x, a, b, n_resamples=n_resamples, level=level, generator=generator)


def region_gap(accuracy_by_region: Any) -> Tensor:
    """Return the accuracy of the best region minus that of the worst, per model.

    Args:
        accuracy_by_region: (regions,) or (m, regions); NaN for regions without images, which are left out.

    Returns:
        () or (m,), NaN for a model without two regions.

    Raises:
        ValueError: another shape.

    >>> region_gap([[0.9, 0.6, 0.7], [0.8, float("nan"), 0.8]])
    tensor([0.3000, 0.0000])

    Paper: richards2023progress
    Chapter: shortcuts/subgroups
    """
    x = torch.as_tensor(accuracy_by_region)
    if x.dim() not in (1, 2) or not x.is_floating_point() or not x.numel():
        raise ValueError(f"expected accuracies (regions,) or (m, regions), got shape {tuple(x.shape)}")
    known = ~torch.isnan(x)
    gap = x.nan_to_num(-torch.inf).amax(-1) - x.nan_to_num(torch.inf).amin(-1)
    return torch.where(known.sum(-1) > 1, gap, torch.nan)


def last_layer_retrain(
    features: Any,
    labels: Any,
    groups: Any,
    *,
    balanced: bool = True,
    C: float = 1.0,
    max_iter: int = 2000,
    generator: torch.Generator | int | None = None,
) -> LogisticRegression:
    """Fit a new linear head on frozen features, with every group the same weight in numbers.

    Args:
        features: penultimate features (n, h) of held-out samples, neither trained nor tested on.
        labels: (n,) classes.
        groups: (n,) groups.
        balanced: whether each group is cut to the size of the smallest that has samples.
        C: inverse strength of the l2 penalty, as in scikit-learn.
        max_iter: of the solver.
        generator: draws the samples that stay (None: torch's default generator; a whole number: a new one).

    Returns:
        A fitted `sklearn.linear_model.LogisticRegression`; `predict` takes features as arrays.

    Raises:
        ValueError: lengths that differ, one class only.

    >>> head = last_layer_retrain([[0.0], [1.0], [0.2], [0.8]], [0, 1, 0, 1], [0, 0, 1, 1])
    >>> head.predict([[0.1], [0.9]])
    array([0, 1])

    Paper: richards2023progress
    Chapter: shortcuts/subgroups
    """
    x = single(check_features(features, "features").detach()).cpu()
    y = check_labels(labels, n=len(x)).cpu()
    groups = check_labels(groups, n=len(x), name="groups").cpu()
    kept = torch.arange(len(x))
    if balanced:
        generator = check_generator(generator)
        counts = torch.bincount(groups)
        size = int(counts[counts > 0].min())
        shuffled = torch.randperm(len(x), generator=generator)
        kept = torch.cat([shuffled[groups[shuffled] == g][:size] for g in counts.nonzero().squeeze(1).tolist()])
    if len(y[kept].unique()) < 2:
        raise ValueError("expected at least two classes among the samples, got one")
    return LogisticRegression(C=C, max_iter=max_iter).fit(x[kept].numpy(), y[kept].numpy())


def _styles(images: Tensor) -> tuple[Tensor, ...]:
    return (
        images,
        0.35 + 0.65 * images,  # lifted contrast
        images.rot90(1, (2, 3)),
        1 - images.flip(3),  # mirrored and inverted
    )


def make_regional_digits(
    shares: Sequence[float] = (0.85, 0.10, 0.04, 0.01),
    spare: int = 50,
    noise: float = 0.3,
    generator: torch.Generator | int | None = None,
) -> RegionalDigits:
    """Return digits written in four regional styles, one of which dominates the training set.

    The styles: as they are, lifted contrast, turned by a quarter, mirrored and inverted.

    Args:
        shares: of the regions in training.
        spare: held-out images per region for `last_layer_retrain`, of digits that are in neither other part.
        noise: standard deviation of the pixel noise of the corrupted set, which is blurred as well.
        generator: a cpu generator or a seed; None means torch's default generator.

    Returns:
        `RegionalDigits(train, test, spare, corrupted)`.

    Raises:
        ValueError: shares that are not four positive numbers, too many spare images.

    >>> digits = make_regional_digits(generator=torch.Generator().manual_seed(0))
    >>> digits.test[2].bincount().unique().numel(), digits.spare[2].bincount().tolist()
    (1, [50, 50, 50, 50])

    Paper: richards2023progress
    Chapter: shortcuts/subgroups
    """
    weights = torch.tensor(shares, dtype=torch.float64)
    if len(weights) != 4 or not bool((weights > 0).all()):
        raise ValueError(f"expected four positive shares, got {tuple(shares)}")
    noise = check_in_range(noise, "noise", 0)
    images, labels = load_digits_images()
    if not 1 <= spare <= 75:
        raise ValueError(f"expected 1 to 75 spare images per region, got {spare}")
    generator = check_generator(generator)
    train, rest = stratified_split(labels, (0.6, 0.4), generator)
    held, test = rest[: 4 * spare], rest[4 * spare :]
    if len(test) < 100:
        raise ValueError(f"expected spare to leave at least 100 test digits, got {len(test)}")

    def rendered(rows: Tensor, regions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        all_styles = torch.stack(_styles(images[rows]))  # (4, n, 1, 8, 8)
        return all_styles[regions, torch.arange(len(rows))], labels[rows], regions

    drawn = torch.multinomial(weights, len(train), replacement=True, generator=generator)
    everywhere = torch.arange(4).repeat_interleave(len(test))
    blurred = avg_pool2d(images[test], 3, 1, 1, count_include_pad=False)
    corrupted = (0.5 * (blurred + images[test]) + noise * torch.randn(blurred.shape, generator=generator)).clamp(0, 1)
    return RegionalDigits(
        rendered(train, drawn),
        rendered(test.repeat(4), everywhere),
        rendered(held, torch.arange(4).repeat_interleave(spare)),
        (corrupted, labels[test]),
    )
