"""Are two things independent? Distance covariance of any number of variables, and a penalty made of it.

Public: `distance_covariance`, `distance_correlation`, `joint_distance_covariance`, `DistanceCovariancePenalty`,
`js_divergence_groups`.

In one dimension nothing quadratic is ever formed; otherwise the distance matrices exist in blocks of rows that stay
within a memory limit, in the backward pass too.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from companion.checks import as_tensor, check_features, check_in_range, check_labels, check_positive_int, check_scores

__all__ = [
    "DistanceCovariancePenalty",
    "distance_correlation",
    "distance_covariance",
    "joint_distance_covariance",
    "js_divergence_groups",
]

_BLOCK = 1 << 22  # distances per matrix and block: 32 MB in float64


def _sample(x: Any, name: str, device: torch.device | None = None) -> Tensor:
    x = as_tensor(x, name, device)
    return check_features(x[:, None] if x.dim() == 1 else x, name, min_samples=2)


def _wide(x: Tensor) -> Tensor:
    x = x if x.device.type == "mps" else x.double()
    return x - x.mean(0)  # distances do not change, sums of large numbers are avoided


def _distances(rows: Tensor, x: Tensor) -> Tensor:
    if x.shape[1] == 1:
        return (rows - x.T).abs()
    return torch.cdist(rows, x, compute_mode="donot_use_mm_for_euclid_dist")


def _line_row_sums(x: Tensor) -> Tensor:
    """Return sum_j |x_i - x_j| for each i, from one sort: (n,)."""
    ordered, order = x.sort()
    n, below = len(x), ordered.cumsum(0)
    place = torch.arange(1, n + 1, device=x.device, dtype=x.dtype)
    sums = (2 * place - n) * ordered + below[-1] - 2 * below
    return torch.empty_like(x).index_copy(0, order, sums)


def _line_product(x: Tensor, y: Tensor) -> Tensor:
    r"""Return sum_ij |x_i - x_j| |y_i - y_j| in O(n log n).

    With the samples in the order of x, a pair i < j counts (x_j - x_i)(y_j - y_i), with a minus unless y_i < y_j. So
    each j needs, over the i before it with smaller y, the sums of 1, x, y and xy. Samples whose y-ranks first differ
    in a given bit meet at that bit's level: there, rows hold the samples that share all higher bits, in the order of
    x, and those with bit 1 read off the running sums of those with bit 0.
    """
    n = len(x)
    order = x.argsort(stable=True)
    x, y = x[order], y[order]
    rank = torch.empty_like(order).index_copy(0, y.argsort(stable=True), torch.arange(n, device=x.device))
    levels = max(1, math.ceil(math.log2(n)))
    padding = (1 << levels) - n  # samples of weight 0, last in both orders
    rank = torch.cat([rank, torch.arange(n, n + padding, device=x.device)])
    weights = torch.stack([torch.ones_like(x), x, y, x * y])  # (4, n)
    weights = torch.cat([weights, weights.new_zeros(4, padding)], 1)
    place = torch.arange(n + padding, device=x.device)  # where each sample stands now
    smaller = torch.zeros_like(weights)
    for bit in reversed(range(levels)):
        size = 2 << bit
        high = (rank >> bit & 1).view(-1, size)  # (rows, size): which half of its row a sample goes to
        running = torch.where(high == 0, weights.view(4, -1, size), 0).cumsum(2)
        smaller = smaller + torch.where(high == 1, running, 0).view(4, -1)
        ahead = torch.where(high == 1, (size >> 1) + high.cumsum(1), (1 - high).cumsum(1)) - 1
        target = (ahead + size * torch.arange(len(high), device=x.device)[:, None]).flatten()
        source = torch.empty_like(target).index_copy(0, target, place)
        rank, weights, smaller = rank[source], weights[:, source], smaller[:, source]
    # now the samples stand in the order of y, as rank says
    count, sum_x, sum_y, sum_xy = smaller[:, :n]
    x, y = weights[1, :n], weights[2, :n]
    concordant = (x * y * count - x * sum_y - y * sum_x + sum_xy).sum()
    # over all pairs i < j: (x_j - x_i)(y_j - y_i) sums to n sum xy - sum x sum y
    return 2 * (2 * concordant - (n * (x * y).sum() - x.sum() * y.sum()))


def _block_sums(start: int, stop: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a, b = _distances(x[start:stop], x), _distances(y[start:stop], y)
    return (a * b).sum(), a.sum(1), b.sum(1)


def _sums(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return sum_ij a_ij b_ij and the row sums of both distance matrices."""
    n = len(x)
    if x.shape[1] == y.shape[1] == 1:
        x, y = x[:, 0], y[:, 0]
        return _line_product(x, y), _line_row_sums(x), _line_row_sums(y)
    step = max(1, _BLOCK // n)
    parts = []
    for start in range(0, n, step):
        block = start, min(start + step, n), x, y
        again = step < n and torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
        # a checkpoint computes its block again in the backward pass instead of keeping it
        parts.append(checkpoint(_block_sums, *block, use_reentrant=False) if again else _block_sums(*block))
    products, rows_a, rows_b = zip(*parts)
    return torch.stack(products).sum(), torch.cat(rows_a), torch.cat(rows_b)


def _covariance(x: Tensor, y: Tensor, unbiased: bool) -> Tensor:
    n = len(x)
    product, a, b = _sums(x, y)  # (), (n,), (n,)
    if unbiased:
        centered = product - 2 / (n - 2) * (a * b).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2))
        return centered / (n * (n - 3))
    return product / n**2 - 2 * (a * b).sum() / n**3 + (a.sum() / n**2) * (b.sum() / n**2)


def distance_covariance(x: Any, y: Any, *, unbiased: bool = False) -> Tensor:
    r"""Return the squared sample distance covariance, which is 0 in the limit only under independence.

    $$\mathrm{dCov}^2_n(x, y) = \frac{1}{n^2} \sum_{ij} A_{ij} B_{ij}, \qquad
    A_{ij} = a_{ij} - \bar a_{i\cdot} - \bar a_{\cdot j} + \bar a_{\cdot\cdot}, \quad a_{ij} = \lVert x_i - x_j \rVert$$

    and B likewise from y. This V-statistic is at least 0, and positive by chance: about 1/n under independence. The
    unbiased version (U-centred, n of at least 4) has mean 0 there, and may be negative.

    Where x and y both have one column it takes O(n log n) time and memory; otherwise O(n^2 d) time and the memory of a
    block of rows. Sums are in float64. It is differentiable in x and y.

    Args:
        x: (n,) or (n, p). Columns count by their scale: standardise them where that is not meant.
        y: (n,) or (n, q).
        unbiased: whether to return the U-statistic.

    Returns:
        A scalar in the dtype of x. It is the square; `distance_correlation` is a ratio of such squares.

    Raises:
        ValueError: lengths that differ, NaN or infinity, fewer than 2 samples (4 when unbiased).

    >>> x = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    >>> distance_covariance(x, x**2)  # uncorrelated and yet dependent
    tensor(0.0988, dtype=torch.float64)

    Paper: lee2025machine
    Chapter: shortcuts/subgroups
    """
    x = _sample(x, "x")
    y = _sample(y, "y", x.device)
    _check_pairs(x, y, unbiased)
    return _covariance(_wide(x), _wide(y), unbiased).to(x.dtype)


def _check_pairs(x: Tensor, y: Tensor, unbiased: bool) -> None:
    if len(x) != len(y):
        raise ValueError(f"expected x and y of the same length, got {len(x)} and {len(y)}")
    if unbiased and len(x) < 4:
        raise ValueError(f"expected at least 4 samples when unbiased, got {len(x)}")


def distance_correlation(x: Any, y: Any, *, unbiased: bool = False) -> Tensor:
    r"""Return the squared distance correlation: the distance covariance without its units.

    $$\mathrm{dCor}^2 = \mathrm{dCov}^2(x, y) \big/ \sqrt{\mathrm{dCov}^2(x, x)\,\mathrm{dCov}^2(y, y)}$$

    It does not depend on the scale of x or y, lies in [0, 1] (the V-version), and is 1 for a similarity transform.

    Args:
        x: (n,) or (n, p).
        y: (n,) or (n, q).
        unbiased: whether to use the U-statistics, whose ratio has a mean near 0 under independence.

    Returns:
        A scalar in the dtype of x; 0 when x or y is constant.

    Raises:
        ValueError: as `distance_covariance`.

    >>> x = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    >>> distance_correlation(x, 3 - 2 * x)
    tensor(1., dtype=torch.float64)

    Paper: lee2025machine
    Chapter: shortcuts/subgroups
    """
    x = _sample(x, "x")
    y = _sample(y, "y", x.device)
    _check_pairs(x, y, unbiased)
    a, b = _wide(x), _wide(y)
    scale = (_covariance(a, a, unbiased) * _covariance(b, b, unbiased)).clamp_min(0).sqrt()
    ratio = _covariance(a, b, unbiased) / torch.where(scale > 0, scale, 1)
    return torch.where(scale > 0, ratio, 0).to(x.dtype)


def _row_sums(x: Tensor) -> Tensor:
    if x.shape[1] == 1:
        return _line_row_sums(x[:, 0])
    step = max(1, _BLOCK // len(x))
    return torch.cat([_distances(rows, x).sum(1) for rows in x.split(step)])


def _block_joint(start: int, stop: int, c: float, xs: tuple[Tensor, ...], means: tuple[Tensor, ...]) -> Tensor:
    product = None
    for x, mean in zip(xs, means):
        centered = mean[start:stop, None] + mean - _distances(x[start:stop], x) - mean.mean()
        product = centered + c if product is None else product * (centered + c)
    return product.sum()


def _joint(xs: tuple[Tensor, ...], c: float) -> Tensor:
    n = len(xs[0])
    means = tuple(_row_sums(x) / n for x in xs)
    step = max(1, _BLOCK // n)
    total = xs[0].new_zeros(())
    for start in range(0, n, step):
        block = start, min(start + step, n), c, xs, means
        again = step < n and torch.is_grad_enabled() and any(x.requires_grad for x in xs)
        total = total + (checkpoint(_block_joint, *block, use_reentrant=False) if again else _block_joint(*block))
    return total / n**2 - c ** len(xs)


def joint_distance_covariance(*xs: Any, c: float = 1.0) -> Tensor:
    r"""Return the squared joint distance covariance of two or more variables: 0 only under mutual independence.

    $$\frac{1}{n^2} \sum_{ij} \prod_{k=1}^{d} \big(c - A^{(k)}_{ij}\big) - c^d$$

    with the doubly centred distances A of `distance_covariance`. It is a weighted sum over all subsets of at least two
    variables: pairs with weight $c^{d-2}$, triples with $c^{d-3}$, and so on, so that a small c stresses dependence
    that shows only jointly. For two variables it is the distance covariance, whatever c.

    Args:
        *xs: two or more variables, each (n,) or (n, p).
        c: above 0.

    Returns:
        A scalar in the dtype of the first variable; it may be slightly negative for three variables or more.

    Raises:
        ValueError: fewer than two variables, lengths that differ, NaN or infinity.

    >>> a = torch.tensor([0.0, 0.0, 1.0, 1.0])
    >>> b = torch.tensor([0.0, 1.0, 0.0, 1.0])
    >>> xor = (a - b).abs()  # independent in pairs, not jointly
    >>> distance_covariance(xor, a).item(), joint_distance_covariance(xor, a, b).abs().item()
    (0.0, 0.125)

    Paper: lee2025machine
    Chapter: shortcuts/subgroups
    """
    if len(xs) < 2:
        raise ValueError(f"expected at least two variables, got {len(xs)}")
    c = check_in_range(c, "c", 0, inclusive="neither")
    first = _sample(xs[0], "x")
    samples = (first, *(_sample(x, "x", first.device) for x in xs[1:]))
    if len({len(x) for x in samples}) != 1:
        raise ValueError(f"expected variables of the same length, got {[len(x) for x in samples]}")
    return _joint(tuple(_wide(x) for x in samples), c).to(first.dtype)


class DistanceCovariancePenalty(nn.Module):
    r"""Dependence of predictions on protected attributes, to be added to a loss.

    With predictions f and attributes $s_1, \dots, s_K$: "sum" is $\sum_k \mathrm{dCov}^2(f, s_k)$, "concat" is
    $\mathrm{dCov}^2(f, (s_1, \dots, s_K))$, "joint" is the joint distance covariance of all. The sum is blind to
    unfairness that cancels in every margin; the other two see it. Add it as `loss + strength * penalty(f, s)`.

    Only shapes are checked, so that it also works under `torch.func.vmap` (in `fit_many`, say). Memory is that of a
    batch squared. The V-statistic is biased upwards by about 1/n: take large batches.

    Args:
        kind: "sum", "concat" or "joint".
        c: of the joint distance covariance.
        standardize: whether each attribute is divided by its standard deviation; otherwise the one with the largest
            scale dominates "concat".

    Raises:
        ValueError: an unknown kind, shapes that do not fit.

    >>> penalty = DistanceCovariancePenalty("concat")
    >>> f, s = torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    >>> bool(penalty(f, s) > DistanceCovariancePenalty("sum")(f, s))
    True

    Paper: lee2025machine
    Chapter: shortcuts/subgroups
    """

    def __init__(self, kind: str = "concat", *, c: float = 1.0, standardize: bool = True):
        super().__init__()
        if kind not in ("sum", "concat", "joint"):
            raise ValueError(f"expected kind 'sum', 'concat' or 'joint', got {kind!r}")
        self.kind, self.c, self.standardize = kind, check_in_range(c, "c", 0, inclusive="neither"), standardize

    def forward(self, predictions: Tensor, attributes: Tensor) -> Tensor:
        """Return the penalty of predictions (n,) or (n, p) and attributes (n,) or (n, K), a scalar."""
        f = predictions[:, None] if predictions.dim() == 1 else predictions
        s = (attributes[:, None] if attributes.dim() == 1 else attributes).to(f.dtype)
        if f.dim() != 2 or s.dim() != 2 or f.shape[0] != s.shape[0]:
            shapes = f"{tuple(predictions.shape)} and {tuple(attributes.shape)}"
            raise ValueError(f"expected predictions (n, p) and attributes (n, K), got {shapes}")
        if self.standardize:
            s = s / s.std(0, correction=0).clamp_min(torch.finfo(s.dtype).tiny)
        if self.kind == "joint":
            return _joint((f, *s.split(1, 1)), self.c)
        a = _centered_distances(f)
        targets = [s] if self.kind == "concat" else s.split(1, 1)
        # centring one matrix is enough: it is then orthogonal to all that is constant along rows or columns
        return sum((a * _distances(t, t)).mean() for t in targets)

    def extra_repr(self) -> str:
        """Return the settings, for `print`."""
        return f"{self.kind!r}, c={self.c}, standardize={self.standardize}"


def _centered_distances(x: Tensor) -> Tensor:
    a = _distances(x, x)
    return a - a.mean(0) - a.mean(1, keepdim=True) + a.mean()


def js_divergence_groups(predictions: Any, groups: Any, bins: int = 20) -> Tensor:
    r"""Return the Jensen-Shannon divergence between the groups' distributions of predictions, in bits.

    $$\mathrm{JSD} = H\Big(\sum_g w_g P_g\Big) - \sum_g w_g H(P_g), \qquad w_g = n_g / n$$

    with $P_g$ the histogram of group g over bins that all groups share. 0 when all groups get the same predictions, at
    most the entropy of the groups; small groups raise it by chance, by about $(G-1)(\mathrm{bins}-1) / (2 n \ln 2)$.

    Args:
        predictions: (n,).
        groups: (n,) whole numbers.
        bins: of equal width between the smallest and the largest prediction.

    Returns:
        A float64 scalar.

    Raises:
        ValueError: lengths that differ, NaN or infinity.

    >>> js_divergence_groups([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1], bins=2)
    tensor(1., dtype=torch.float64)

    Paper: lee2025machine
    Chapter: shortcuts/subgroups
    """
    f = check_scores(predictions, "predictions").detach()
    if not torch.isfinite(f).all():
        raise ValueError("expected finite predictions, got infinite ones")
    groups = check_labels(groups, n=len(f), name="groups", device=f.device)
    bins = check_positive_int(bins, "bins")
    width = (f.max() - f.min()).double()
    index = ((f - f.min()).double() / torch.where(width > 0, width, 1) * bins).long().clamp_max(bins - 1)
    counts = torch.bincount(groups * bins + index, minlength=(int(groups.max()) + 1) * bins).view(-1, bins).double()
    counts = counts[counts.sum(1) > 0]
    shares = counts / counts.sum(1, keepdim=True)
    weights = counts.sum(1) / len(f)
    return (_entropy(counts.sum(0) / len(f)) - (weights * _entropy(shares)).sum()).clamp_min(0)


def _entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(-1) / math.log(2)
