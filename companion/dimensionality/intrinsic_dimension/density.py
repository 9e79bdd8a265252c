"""Kernel density estimates when the dimension is large: how many points a value really rests on.

Public: `log_kde`, `effective_points`, `rem_thresholds`, `best_bandwidth`.

The estimate is a sum over data points of terms $e^{-\\lVert x - y_i \\rVert^2 / 2h^2}$: the partition function of a
random energy model with inverse temperature $1/h^2$. Cool it too far and it freezes into a few points.
"""

import math
from typing import Any, NamedTuple

import torch
from scipy.optimize import brentq
from torch import Tensor

from companion.checks import check_features, check_in_range, check_positive_int, check_scores
from companion.geometry import single

__all__ = ["Thresholds", "best_bandwidth", "effective_points", "log_kde", "rem_thresholds"]


def _log_terms(x: Any, y: Any, h: float, chunk: int | None):
    x, y = check_features(x), check_features(y, "y")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"expected x and y with one number of features, got {x.shape[1]} and {y.shape[1]}")
    h = check_in_range(h, "h", 0, inclusive="neither")
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    y = y.to(x.device, wide)
    center = y.mean(0)  # distances do not change, and their squares keep the digits that an offset would take
    x, y = single((x.to(wide) - center).to(x.dtype)), single((y - center).to(x.dtype))
    if chunk is None:
        chunk = max(1, 8_000_000 // len(y))
    for rows in x.split(check_positive_int(chunk, "chunk")):
        yield -0.5 * (torch.cdist(rows, y) / h).square()  # (b, n)


def log_kde(x: Any, y: Any, h: float, *, chunk: int | None = None) -> Tensor:
    r"""Return the logarithm of the Gaussian kernel density estimate at x from data y.

    $$\log \hat\rho_h(x) = \log \frac{1}{n} \sum_i e^{-\lVert x - y_i \rVert^2 / 2 h^2} - \tfrac d2 \log 2\pi h^2$$

    Summed in the log domain: at d = 40 every single term underflows.

    Args:
        x: (q, d), where to estimate. Held-out points: a data point would be its own nearest neighbour.
        y: (n, d), the data.
        h: bandwidth, the standard deviation of the kernel.
        chunk: rows of x at a time; None keeps a block below about 64 MB.

    Returns:
        (q,).

    Raises:
        ValueError: shapes that do not fit, NaN, a bandwidth that is not positive.

    >>> log_kde([[0.0]], [[0.0]], h=1.0)
    tensor([-0.9189])

    Paper: biroli2024kernel
    Chapter: dimensionality/intrinsic-dimension
    """
    x, y = check_features(x), check_features(y, "y")
    n, d = y.shape
    parts = [terms.logsumexp(1) for terms in _log_terms(x, y, h, chunk)]
    return (torch.cat(parts) - math.log(n) - 0.5 * d * math.log(2 * math.pi * float(h) ** 2)).to(x.dtype)


def effective_points(x: Any, y: Any, h: float, *, chunk: int | None = None) -> Tensor:
    r"""Return how many data points carry the kernel density estimate at x.

    $$n_\text{eff}(x) = \frac{(\sum_i w_i)^2}{\sum_i w_i^2}, \qquad w_i = e^{-\lVert x - y_i \rVert^2 / 2h^2}$$

    n when all count alike, 1 when one point is all there is. (Physics calls it a participation ratio; in this book that
    name is kept for the covariance spectrum.)

    Args:
        x: (q, d).
        y: (n, d), the data.
        h: bandwidth.
        chunk: rows of x at a time; None keeps a block below about 64 MB.

    Returns:
        (q,), between 1 and n.

    Raises:
        ValueError: shapes that do not fit, NaN, a bandwidth that is not positive.

    >>> effective_points([[0.0]], [[1.0], [-1.0], [50.0]], h=1.0)
    tensor([2.])

    Paper: biroli2024kernel
    Chapter: dimensionality/intrinsic-dimension
    """
    x = check_features(x)
    parts = [(2 * t.logsumexp(1) - (2 * t).logsumexp(1)).exp() for t in _log_terms(x, y, h, chunk)]
    return torch.cat(parts).to(x.dtype)


class Thresholds(NamedTuple):
    """Two bandwidths: `h_g`, below which few points decide, and `h_clt`, above which the sum averages."""

    h_g: float
    h_clt: float


def rem_thresholds(alpha: float) -> Thresholds:
    r"""Return the two bandwidths at which a kernel density estimate of $\mathcal N(0, I_d)$ changes its nature.

    With $n = e^{\alpha d}$ points and $b = 1/h^2$, the number of points that matter at x is $e^{d\, s(b)}$ with

    $$s(b) = \alpha - \tfrac12 \log(1 + b) + \frac{b}{2 (1 + b)^2} .$$

    It reaches 1 at $h_G$, where the sum freezes. The variance of the sum is the same sum at 2b, so it freezes, and
    the central limit theorem ends, already at $h_\text{CLT} = \sqrt2\, h_G$. Exact as d grows at fixed $\alpha$.

    Args:
        alpha: $\log(n) / d$, positive.

    Returns:
        `Thresholds(h_g, h_clt)`.

    Raises:
        ValueError: alpha is not positive.

    >>> h_g, h_clt = rem_thresholds(0.35)
    >>> round(h_clt / h_g, 4)
    1.4142

    Paper: biroli2024kernel
    Chapter: dimensionality/intrinsic-dimension
    """
    alpha = check_in_range(alpha, "alpha", 0, 300, inclusive="high")

    def entropy(log_b: float) -> float:
        b = math.exp(log_b)
        return alpha - 0.5 * math.log1p(b) + b / (2 * (1 + b) ** 2)

    # s falls from alpha at b = 0 to minus infinity; in log b the root is well scaled for any alpha
    h_g = math.exp(-0.5 * brentq(entropy, -40.0, 2 * alpha + 2.0, xtol=1e-12))
    return Thresholds(h_g, math.sqrt(2) * h_g)


def best_bandwidth(y: Any, x_held_out: Any, bandwidths: Any, *, chunk: int | None = None) -> Tensor:
    r"""Return the bandwidth with the highest mean log density on held-out points.

    That is the one closest to the truth in Kullback-Leibler divergence, up to the noise of the held-out set.

    Args:
        y: (n, d), the data.
        x_held_out: (q, d), fresh points.
        bandwidths: the ones to try.
        chunk: rows of x at a time.

    Returns:
        A scalar, one of the bandwidths.

    Raises:
        ValueError: shapes that do not fit, NaN, bandwidths that are not positive.

    >>> g = torch.Generator().manual_seed(0)
    >>> y, x = torch.randn(500, 1, generator=g), torch.randn(200, 1, generator=g)
    >>> bool(0.1 < best_bandwidth(y, x, [0.01, 0.3, 3.0]) < 1)
    True

    Paper: biroli2024kernel
    Chapter: dimensionality/intrinsic-dimension
    """
    bandwidths = check_scores(bandwidths, "bandwidths")
    scores = [log_kde(x_held_out, y, float(h), chunk=chunk).mean() for h in bandwidths]
    return bandwidths[int(torch.stack(scores).argmax())]
