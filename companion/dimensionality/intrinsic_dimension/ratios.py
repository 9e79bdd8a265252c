"""How fast a neighbourhood fills up: dimension from the ratios of neighbour distances.

Public: `twonn`, `mle_dimension`, `decimation`; and what the estimators build on: `neighbor_distances`.

Within a small ball the number of points grows like $r^d$. Both estimates read d off that growth, one from the first two
neighbours, one from the first k.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from companion.checks import check_features, check_generator, check_in_range, check_positive_int
from companion.geometry import single
from companion.neighbors import Neighbors, knn

__all__ = ["Decimation", "decimation", "mle_dimension", "neighbor_distances", "twonn"]


def neighbor_distances(x: Any, k: int, memory: str | int = "256MB") -> Neighbors:
    """Return the k nearest neighbours of each row within x, and refuse copies of a point.

    Ratios of distances mean nothing where a distance is zero. Distances carry gradients when x does.

    Args:
        x: (n, d), more than k rows.
        k: how many neighbours.
        memory: working memory of the search.

    Returns:
        `Neighbors(distances, indices)`, each (n, k), nearest first.

    Raises:
        ValueError: too few rows, NaN or infinity, rows that occur twice.

    >>> neighbor_distances([[0.0], [1.0], [3.0]], k=2).distances
    tensor([[1., 3.],
            [1., 2.],
            [2., 3.]])

    Chapter: dimensionality/intrinsic-dimension
    """
    x = check_features(x)
    k = check_positive_int(k, "k")
    if len(x) <= k:
        raise ValueError(f"expected more points than neighbours, got {len(x)} sample(s) for k={k} neighbours")
    distances, indices = knn(x, k=k, memory=memory)
    copies = int((distances[:, 0] == 0).sum())
    if copies:
        raise ValueError(
            f"expected distinct points, got {copies} of {len(x)} with a copy at distance zero: pass x.unique(dim=0), "
            "or use an estimator, which counts each point once"
        )
    if x.requires_grad:
        distances = torch.linalg.vector_norm(x[:, None] - x[indices], dim=2)  # (n, k)
    return Neighbors(distances, indices)


def twonn(x: Any, discard_fraction: float = 0.1, method: str = "linear", memory: str | int = "256MB") -> Tensor:
    r"""Return the dimension from the ratio of the second to the first neighbour distance.

    On d-dimensional points of locally constant density $\mu = r_2 / r_1$ has $P(\mu \le m) = 1 - m^{-d}$, whatever the
    density. "linear" fits $-\log(1 - F(\mu)) = d \log \mu$ through the origin, with $F = i/n$ for the i-th smallest
    ratio, and leaves the largest ratios out, where the empirical F is worst. "mle" takes the likelihood instead, the
    left-out ratios counted as at least the largest one kept.

    Args:
        x: (n, d), at least three distinct rows.
        discard_fraction: share of the largest ratios left out, in (0, 1); "mle" takes 0 too.
        method: "linear" or "mle".
        memory: working memory of the neighbour search.

    Returns:
        A scalar.

    Raises:
        ValueError: fewer than three rows, NaN, copies of a point, a fraction out of range.

    >>> x = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0))
    >>> bool((twonn(x) - 3).abs() < 0.3)
    True

    Chapter: dimensionality/intrinsic-dimension
    """
    x = check_features(x, min_samples=3)
    check_twonn(discard_fraction, method)
    log_ratio = log_ratios(neighbor_distances(single(x), 2, memory).distances)
    return twonn_from_ratios(log_ratio.sort().values, discard_fraction, method).to(x.dtype)


def check_twonn(discard_fraction: float, method: str) -> None:
    """Refuse settings of `twonn` that have no estimate."""
    if method not in ("linear", "mle"):
        raise ValueError(f"expected method to be 'linear' or 'mle', got {method!r}")
    low = "neither" if method == "linear" else "low"
    check_in_range(discard_fraction, "discard_fraction", 0, 1, inclusive=low)


def log_ratios(distances: Tensor) -> Tensor:
    """Return log r2/r1 in double precision."""
    wide = distances.to(torch.float32 if distances.device.type == "mps" else torch.float64)
    return wide[:, 1].log() - wide[:, 0].log()


def twonn_from_ratios(log_ratio: Tensor, discard_fraction: float, method: str) -> Tensor:
    """Return the TwoNN dimension of log ratios that are sorted, smallest first."""
    n = len(log_ratio)
    kept = max(2, int(n * (1 - discard_fraction)))
    left = log_ratio[:kept]
    if not left.detach()[-1] > 0:
        raise ValueError("expected first and second neighbours at different distances, got ties only: a lattice?")
    if method == "mle":
        return (kept - 1) / (left.sum() + (n - kept) * left[-1])
    rank = torch.arange(1, kept + 1, dtype=left.dtype, device=left.device)
    height = -torch.log1p(-rank / n)  # -log(1 - F), F = i/n
    return (left @ height) / (left @ left)


def mle_dimension(x: Any, k: int = 20, reduce: str = "mle", memory: str | int = "256MB") -> Tensor:
    r"""Return the maximum-likelihood dimension from the distances to the k nearest neighbours.

    $$\hat d_i = \Big(\frac{1}{k-1} \sum_{j<k} \log \frac{T_k(x_i)}{T_j(x_i)}\Big)^{-1}$$

    with $T_j$ the distance to the j-th neighbour: the local intrinsic dimension (LID). Points are combined by averaging
    the inverses, which is the likelihood's way and does not let few large values decide.

    Args:
        x: (n, d), more than k distinct rows.
        k: how many neighbours, at least 2. More is steadier, and reads the dimension at a larger scale.
        reduce: "mle" (harmonic mean), "mean", "median", or "none" for one value per row.
        memory: working memory of the neighbour search.

    Returns:
        A scalar, or (n,) with reduce="none"; infinite where all k distances are equal.

    Raises:
        ValueError: too few rows, NaN, copies of a point, an unknown `reduce`.

    >>> x = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0))
    >>> bool((mle_dimension(x) - 3).abs() < 0.3)
    True

    Chapter: dimensionality/intrinsic-dimension
    """
    x = check_features(x)
    k = check_positive_int(k, "k", minimum=2)
    inverse = inverse_dimensions(neighbor_distances(single(x), k, memory).distances)
    return combine_inverses(inverse, reduce).to(x.dtype)


def inverse_dimensions(distances: Tensor) -> Tensor:
    """Return the mean log ratio of the last distance to the earlier ones, per row, in double precision."""
    log = distances.to(torch.float32 if distances.device.type == "mps" else torch.float64).log()  # (n, k)
    return (log[:, -1:] - log[:, :-1]).mean(1)


def combine_inverses(inverse: Tensor, reduce: str) -> Tensor:
    """Return the dimension of a set from the inverse dimensions of its points."""
    if reduce == "mle":
        return 1 / inverse.mean()
    if reduce == "mean":
        return (1 / inverse).mean()
    if reduce == "median":
        return (1 / inverse).median()
    if reduce == "none":
        return 1 / inverse
    raise ValueError(f"expected reduce to be 'mle', 'mean', 'median' or 'none', got {reduce!r}")


class Decimation(NamedTuple):
    """TwoNN on ever smaller subsets: how many points, their mean neighbour distance, the dimension seen there."""

    sizes: Tensor
    scales: Tensor
    dimensions: Tensor


def decimation(
    x: Any, halvings: int = 5, discard_fraction: float = 0.1, generator: torch.Generator | None = None
) -> Decimation:
    r"""Return the TwoNN dimension at growing scales, by leaving points out.

    A random subset of $n / 2^j$ points has neighbours further apart, so it sees the set at a larger scale. To use every
    point, the $2^j$ disjoint subsets of each size are all estimated and averaged.

    Args:
        x: (n, d).
        halvings: how often to halve; every part keeps at least three points.
        discard_fraction: as in `twonn`.
        generator: shuffles the points (None: torch's default generator).

    Returns:
        `Decimation(sizes, scales, dimensions)`, from all points to the smallest parts.

    Raises:
        ValueError: too few points for so many halvings.

    >>> flat = torch.rand(512, 2, generator=torch.Generator().manual_seed(0))
    >>> decimation(flat, 2, generator=torch.Generator().manual_seed(1)).sizes
    tensor([512, 256, 128])

    Chapter: dimensionality/intrinsic-dimension
    """
    x = check_features(x)
    halvings = check_positive_int(halvings, "halvings", minimum=0)
    check_twonn(discard_fraction, "linear")
    if len(x) >> halvings < 3:
        raise ValueError(f"expected at least {3 << halvings} points for {halvings} halvings, got {len(x)}")
    order = torch.randperm(len(x), generator=check_generator(generator)).to(x.device)
    sizes, scales, dimensions = [], [], []
    for j in range(halvings + 1):
        parts = order[: (len(x) >> j) << j].view(1 << j, -1)
        seen = [neighbor_distances(single(x[part]), 2).distances for part in parts]
        sizes.append(parts.shape[1])
        scales.append(torch.stack([distances.mean() for distances in seen]).mean())
        estimates = [twonn_from_ratios(log_ratios(r).sort().values, discard_fraction, "linear") for r in seen]
        dimensions.append(torch.stack(estimates).mean())
    return Decimation(torch.tensor(sizes), torch.stack(scales).to(x.dtype), torch.stack(dimensions).to(x.dtype))
