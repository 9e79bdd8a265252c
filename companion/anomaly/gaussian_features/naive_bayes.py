"""A generative classifier on frozen features, and how many samples it needs beside a discriminative one.

Public: `PooledNaiveBayes`, `excess_error_curve`, `samples_to_excess`, `two_regimes_crossing`.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from torch import Tensor

from companion.anomaly.gaussian_features._streams import ClassLinear
from companion.checks import check_generator, check_in_range, check_positive_int
from companion.data.mixtures import GaussianMixture

__all__ = ["PooledNaiveBayes", "excess_error_curve", "samples_to_excess", "two_regimes_crossing"]


class PooledNaiveBayes(ClassLinear, ClassifierMixin, BaseEstimator):
    r"""Naive Bayes whose classes share one variance per feature: a linear classifier that needs no optimisation.

    $$\log p(c \mid x) = \log \pi_c - \sum_j \frac{(x_j - \mu_{cj})^2}{2 \sigma_j^2} + \text{const}$$

    Args:
        priors: "empirical" shares of the classes, or "uniform".
        var_smoothing: this times the largest variance is added to all, as in scikit-learn's `GaussianNB`.
        device: where to compute arrays; "auto" leaves tensors where they are.

    Attributes:
        classes_: labels seen, sorted.
        means_: (C, d).
        variance_: (d,).
        counts_: samples per class (C,).
        coef_: (C, d), and `intercept_` (C,): the same classifier in linear form.
        n_features_in_: d.

    >>> x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [5.0, 6.0], [6.0, 5.0]])
    >>> model = PooledNaiveBayes().fit(x, ["low", "low", "high", "high"])
    >>> model.predict([[0.4, 0.4], [5.0, 5.0]]).tolist()
    ['low', 'high']

    Paper: zheng2023revisiting
    Chapter: anomaly/gaussian-features
    """

    _diagonal = True

    def __init__(self, priors: str = "empirical", var_smoothing: float = 1e-9, device: str = "auto"):
        self.priors = priors
        self.var_smoothing = var_smoothing
        self.device = device

    def fit(self, X: Any, y: Any) -> "PooledNaiveBayes":
        """Learn means, variances and priors of features (n, d) with labels (n,).

        Raises:
            ValueError: not features, labels that do not fit, a setting out of range, features that do not vary.
        """
        return self._take(X, y, None, reset=True)

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> "PooledNaiveBayes":
        """Take in more samples, of known classes or of new ones; the result is that of one `fit`.

        Args:
            X: features (n, d).
            y: labels (n,).
            classes: labels still to come, as scikit-learn has it; not needed.
        """
        return self._take(X, y, classes, reset=not hasattr(self, "stream_"))

    def _take(self, X: Any, y: Any, classes: Any, reset: bool) -> "PooledNaiveBayes":
        if self.priors not in ("empirical", "uniform"):
            raise ValueError(f"expected priors to be 'empirical' or 'uniform', got {self.priors!r}")
        check_in_range(self.var_smoothing, "var_smoothing", 0)
        self._learn(X, y, classes, reset=reset)
        stream = self.stream_
        variance = stream.covariance
        if bool((variance > 0).any()):
            self.variance_ = variance + self.var_smoothing * variance.max()
        else:  # one sample per class leaves no spread to estimate: the nearest mean decides
            self.variance_ = torch.ones_like(variance)
        if not bool((self.variance_ > 0).all()):
            raise ValueError("expected features that vary within classes, or a positive var_smoothing")
        self.means_, self.counts_ = stream.means, stream.counts.long()
        weights = stream.counts if self.priors == "empirical" else (stream.counts > 0).double()
        self.coef_ = self.means_ / self.variance_
        self.intercept_ = (weights / weights.sum()).log() - (self.means_ * self.coef_).sum(1) / 2
        return self

    def _logits(self, x: Tensor) -> Tensor:
        # the linear form about the middle of the classes: far from the origin `coef_` and `intercept_` cancel, and
        # what is left would have lost its digits
        middle = self.means_[self.counts_ > 0].mean(0)
        apart = self.means_ - middle
        prior = self.intercept_ + (self.means_ * self.coef_).sum(1) / 2
        bias = prior - (apart.square() / self.variance_).sum(1) / 2
        return torch.addmm(bias, x.double() - middle, (apart / self.variance_).T).to(x.dtype)


def excess_error_curve(
    estimator: Any,
    task: GaussianMixture,
    sizes: Sequence[int],
    *,
    n_test: int = 4000,
    n_repeats: int = 1,
    generator: torch.Generator | int | None = None,
) -> Tensor:
    """Return how far above the least possible error a classifier ends, per number of training samples.

    Error and least possible error (that of the true posterior) are both taken on the same test samples, so that the
    luck of the draw cancels.

    Args:
        estimator: a scikit-learn classifier; a clone is fitted for each size.
        task: where samples come from.
        sizes: numbers of training samples, increasing; a smaller set is the beginning of a larger one.
        n_test: test samples.
        n_repeats: how many training sets are averaged.
        generator: draws the samples; a seed will do, None means torch's default generator.

    Returns:
        Excess error (sizes,).

    Raises:
        ValueError: no sizes, or sizes that do not increase.

    >>> task = GaussianMixture([[-1.0, 0.0], [1.0, 0.0]])
    >>> excess_error_curve(PooledNaiveBayes(), task, [20, 2000], generator=torch.Generator().manual_seed(0)).shape
    torch.Size([2])

    Paper: zheng2023revisiting
    Chapter: anomaly/gaussian-features
    """
    sizes = [check_positive_int(size, "sizes", minimum=2) for size in sizes]
    if not sizes or any(b <= a for a, b in pairwise(sizes)):
        raise ValueError(f"expected increasing sizes, got {sizes}")
    generator = check_generator(generator)
    excess = torch.zeros(len(sizes), dtype=torch.float64)
    for _ in range(check_positive_int(n_repeats, "n_repeats")):
        x, y = task.sample(sizes[-1], generator)
        test_x, test_y = (part.numpy() for part in task.sample(n_test, generator))
        best = (task.posterior(test_x).argmax(1).numpy() != test_y).mean()
        for place, size in enumerate(sizes):
            model = clone(estimator).fit(x[:size].numpy(), y[:size].numpy())
            excess[place] += ((model.predict(test_x) != test_y).mean() - best) / n_repeats
    return excess


def samples_to_excess(sizes: Sequence[int], excess: Any, level: float) -> float:
    """Return how many samples bring the excess error down to a level, read between two sizes on logarithmic axes.

    Args:
        sizes: increasing numbers of samples.
        excess: excess error at each of them.
        level: the excess that is good enough, above 0.

    Returns:
        A number of samples; the first size where that suffices, infinity where none does.

    Raises:
        ValueError: lengths that differ, or a level that is not positive.

    >>> round(samples_to_excess([10, 100, 1000], [0.4, 0.2, 0.1], 0.1))
    1000

    Paper: zheng2023revisiting
    Chapter: anomaly/gaussian-features
    """
    check_in_range(level, "level", 0, inclusive="neither")
    sizes, excess = np.asarray(sizes, float), np.asarray(excess, float)
    if sizes.shape != excess.shape or sizes.ndim != 1 or not len(sizes):
        raise ValueError(f"expected one excess per size, got {excess.shape} and {sizes.shape}")
    reached = np.flatnonzero(excess <= level)
    if not len(reached):
        return math.inf
    place = reached[0]
    if place == 0:
        return float(sizes[0])
    above, below = np.log(excess[place - 1]), np.log(max(excess[place], 1e-12))
    share = (above - np.log(level)) / (above - below)
    return float(np.exp(np.log(sizes[place - 1]) + share * np.log(sizes[place] / sizes[place - 1])))


def two_regimes_crossing(sizes: Sequence[int], first: Any, second: Any) -> float:
    """Return the number of samples from which on the second curve stays below the first.

    Args:
        sizes: increasing numbers of samples.
        first: errors of the classifier that leads early.
        second: errors of the one that may overtake it.

    Returns:
        The smallest such size; infinity where the second is not below at the end, the first size where it always is.

    Raises:
        ValueError: lengths that differ.

    >>> two_regimes_crossing([10, 100, 1000], first=[0.2, 0.15, 0.14], second=[0.5, 0.2, 0.1])
    1000.0

    Paper: zheng2023revisiting
    Chapter: anomaly/gaussian-features
    """
    sizes, first, second = (np.asarray(part, float) for part in (sizes, first, second))
    if not sizes.shape == first.shape == second.shape or not sizes.size:
        raise ValueError(f"expected curves of one length, got {first.shape}, {second.shape} for {sizes.shape} sizes")
    above = np.flatnonzero(second >= first)
    if not len(above):
        return float(sizes[0])
    return math.inf if above[-1] == len(sizes) - 1 else float(sizes[above[-1] + 1])
