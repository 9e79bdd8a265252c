"""How dimension and label sharpness set the learning curve: a rate and a constant.

Public: `label_sharpness`, `PowerLaw`, `fit_power_law`, `nearest_neighbor_error`.

With n points in d dimensions the nearest one is about $n^{-1/d}$ away, and a label that moves by at most K per unit of
distance is off by at most K times that.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from companion.checks import (
    as_tensor,
    check_features,
    check_generator,
    check_in_range,
    check_positive_int,
    check_same_length,
    check_scores,
)
from companion.neighbors import knn

__all__ = ["PowerLaw", "fit_power_law", "label_sharpness", "nearest_neighbor_error"]


def label_sharpness(
    x: Any,
    y: Any,
    n_pairs: int = 100_000,
    quantile: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return the largest change of the label per unit of distance, over random pairs.

    $$\hat K_F = \max_{i \ne j} \frac{\lvert y_i - y_j \rvert}{\lVert x_i - x_j \rVert}$$

    An estimate of a Lipschitz constant from below: the maximum grows with the number of pairs, so compare sets only at
    the same `n_pairs`. Where all pairs are fewer than that, all are taken. Pairs of copies with one label say nothing
    and are left out.

    Args:
        x: (n, d).
        y: (n,), a number or a class label 0 and 1; or (n, m), with the Euclidean distance between rows.
        n_pairs: how many pairs are drawn.
        quantile: 1 for the maximum; a little less is steadier.
        generator: draws the pairs (None: torch's default generator).

    Returns:
        A scalar; infinite when copies of a point carry different labels.

    Raises:
        ValueError: fewer than two distinct points, NaN, lengths that differ.

    >>> label_sharpness([[0.0], [1.0], [3.0]], [0.0, 2.0, 3.0])
    tensor(2.)

    Paper: konz2024effect
    Chapter: dimensionality/intrinsic-dimension
    """
    x = check_features(x, min_samples=2)
    y = as_tensor(y, "y", x.device)
    y = check_features(y[:, None] if y.dim() == 1 else y, "y").to(x.dtype)
    n = check_same_length(x=x, y=y)
    n_pairs, quantile = check_positive_int(n_pairs, "n_pairs"), check_in_range(quantile, "quantile", 0, 1)
    if n * (n - 1) // 2 <= n_pairs:
        i, j = torch.triu_indices(n, n, 1, device=x.device)
    else:
        pairs = torch.randint(n * (n - 1), (n_pairs,), generator=check_generator(generator)).to(x.device)
        i, j = pairs // (n - 1), pairs % (n - 1)
        j = j + (j >= i)  # never i itself
    parts = []
    step = max(1, 8_000_000 // x.shape[1])
    for a, b in zip(i.split(step), j.split(step)):
        distance = torch.linalg.vector_norm(x[a] - x[b], dim=1)
        change = torch.linalg.vector_norm(y[a] - y[b], dim=1)
        parts.append((change / distance)[(distance > 0) | (change > 0)])
    ratio = torch.cat(parts)
    if not len(ratio):
        raise ValueError("expected at least two distinct points, got copies of one")
    if quantile == 1:
        return ratio.max()
    return ratio.kthvalue(max(1, round(quantile * len(ratio)))).values


class PowerLaw(NamedTuple):
    """$c\\, n^{s}$: the exponent s and the logarithm of c, natural."""

    exponent: Tensor
    log_constant: Tensor


def fit_power_law(n: Any, loss: Any) -> PowerLaw:
    r"""Return the straight line through $(\log n, \log \text{loss})$, by least squares.

    The theory of a K-Lipschitz target in d dimensions says exponent $-1/d$ and constant proportional to K.

    Args:
        n: sample sizes, at least two different ones.
        loss: a positive loss for each.

    Returns:
        `PowerLaw(exponent, log_constant)`.

    Raises:
        ValueError: sizes or losses that are not positive, fewer than two different sizes.

    >>> law = fit_power_law([10.0, 100.0, 1000.0], [1.0, 0.1, 0.01])
    >>> round(float(law.exponent), 4)
    -1.0

    Paper: konz2024effect
    Chapter: dimensionality/intrinsic-dimension
    """
    n, loss = check_scores(n, "n", min_samples=2).double(), check_scores(loss, "loss").double()
    check_same_length(n=n, loss=loss)
    if not (n.min() > 0 and loss.min() > 0 and torch.isfinite(n + loss).all()):
        raise ValueError("expected positive finite sizes and losses: their logarithm is fitted")
    log_n, log_loss = n.log(), loss.log()
    centred = log_n - log_n.mean()
    if not centred.any():
        raise ValueError("expected at least two different sizes, got one")
    exponent = (centred @ log_loss) / (centred @ centred)
    return PowerLaw(exponent, log_loss.mean() - exponent * log_n.mean())


def nearest_neighbor_error(x_train: Any, y_train: Any, x_test: Any, y_test: Any) -> Tensor:
    r"""Return the mean absolute error of predicting each test label by that of the nearest training point.

    The learner the bound is about: its error is at most K times the distance to that point.

    Args:
        x_train: (n, d).
        y_train: (n,) numbers, or (n, m) for several targets, whose errors are averaged.
        x_test: (m, d).
        y_test: labels of the test points, in the same form.

    Returns:
        A scalar.

    Raises:
        ValueError: shapes that do not fit, NaN.

    >>> nearest_neighbor_error([[0.0], [1.0]], [0.0, 1.0], [[0.2], [0.9]], [0.0, 2.0])
    tensor(0.5000)

    Paper: konz2024effect
    Chapter: dimensionality/intrinsic-dimension
    """
    x_test, x_train = check_features(x_test, "x_test"), check_features(x_train, "x_train")
    y_train, y_test = as_tensor(y_train, "y_train"), as_tensor(y_test, "y_test")
    y_train, y_test = (check_features(y[:, None] if y.dim() == 1 else y, "y") for y in (y_train, y_test))
    check_same_length(x_train=x_train, y_train=y_train)
    check_same_length(x_test=x_test, y_test=y_test)
    if y_train.shape[1] != y_test.shape[1]:
        raise ValueError(f"expected targets of one width, got {y_train.shape[1]} in training and {y_test.shape[1]}")
    nearest = knn(x_test, x_train, k=1).indices.squeeze(1)
    return (y_train[nearest] - y_test).abs().mean()
