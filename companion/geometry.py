"""What several themes measure on features: frames, class means, scatter, angles between subspaces, similarity, spectra.

Public: `simplex_etf`, `random_orthonormal`, `class_means`, `scatter_matrices`, `pairwise_cosine`, `subspace_angles`,
`cka`, `covariance_spectrum`, `participation_ratio`, `effective_rank`, `stable_rank`.

Plain functions on tensors: rows are samples, results keep the device and dtype of the input and are differentiable.
Half precision is computed in float32.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from companion.checks import check_features, check_generator, check_in_range, check_labels, check_positive_int

__all__ = [
    "cka",
    "class_means",
    "covariance_spectrum",
    "effective_rank",
    "pairwise_cosine",
    "participation_ratio",
    "random_orthonormal",
    "scatter_matrices",
    "simplex_etf",
    "stable_rank",
    "subspace_angles",
]

CHUNK = 4096  # rows at a time wherever something is copied to float64 or grows with n squared
MEDIAN_SAMPLES = 2000


def simplex_etf(
    n_classes: int,
    dim: int | None = None,
    *,
    generator: torch.Generator | int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Return a simplex equiangular tight frame: C unit vectors that are as far from each other as C vectors can be.

    $\langle v_i, v_j \rangle = -1/(C-1)$ for $i \ne j$, $\sum_i v_i = 0$ and $V^\top V = \frac{C}{C-1} P$ with a
    projection P of rank C - 1: where the class means of a collapsed network point.

    Args:
        n_classes: C, at least 2.
        dim: d, at least C - 1; None takes C - 1. The frame fills the first C - 1 coordinates.
        generator: with one, or a seed, the frame is turned by a random rotation drawn from it.
        dtype: of the result; None takes torch's default.
        device: of the result.

    Returns:
        Unit rows (C, d).

    Raises:
        ValueError: fewer than two classes, or fewer than C - 1 dimensions.

    >>> v = simplex_etf(3, 2)
    >>> (v @ v.T).round(decimals=3)
    tensor([[ 1.0000, -0.5000, -0.5000],
            [-0.5000,  1.0000, -0.5000],
            [-0.5000, -0.5000,  1.0000]])

    Chapter: collapse/neural-collapse
    """
    check_positive_int(n_classes, "n_classes", minimum=2)
    rank = n_classes - 1
    dim = rank if dim is None else check_positive_int(dim, "dim")
    if dim < rank:
        raise ValueError(f"expected dim of at least n_classes - 1 = {rank}, got {dim}: {n_classes} vectors do not fit")
    k = torch.arange(1, n_classes, dtype=torch.float64)
    # Helmert's basis of the vectors that sum to zero: column k has k entries 1, then -k, then zeros
    basis = torch.ones(n_classes, rank, dtype=torch.float64).triu()
    basis[torch.arange(1, n_classes), torch.arange(rank)] = -k
    frame = basis / (k * (k + 1)).sqrt() * math.sqrt(n_classes / rank)  # (C, C-1)
    frame = torch.nn.functional.pad(frame, (0, dim - rank))
    if generator is not None:
        frame = frame[:, :rank] @ random_orthonormal(dim, rank, generator=generator, dtype=torch.float64).T
    return frame.to(dtype=dtype or torch.get_default_dtype(), device=device)


def random_orthonormal(
    dim: int,
    k: int | None = None,
    *,
    generator: torch.Generator | int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Return k orthonormal columns in d dimensions, uniform over all such frames (Haar): $Q^\top Q = I$.

    Args:
        dim: d.
        k: how many columns, at most d; None takes d, a random orthogonal matrix.
        generator: draws them; a seed will do, None uses torch's default generator.
        dtype: of the result; None takes torch's default.
        device: of the result; the numbers are drawn where the generator lives.

    Returns:
        Columns (d, k).

    Raises:
        ValueError: k above d.

    >>> q = random_orthonormal(5, 2, generator=torch.Generator().manual_seed(0))
    >>> torch.allclose(q.T @ q, torch.eye(2), atol=1e-6)
    True
    """
    check_positive_int(dim, "dim")
    k = dim if k is None else check_positive_int(k, "k")
    if k > dim:
        raise ValueError(f"expected at most dim={dim} columns, got k={k}")
    generator = check_generator(generator)
    where = "cpu" if generator is None else generator.device
    q, r = torch.linalg.qr(torch.randn(dim, k, generator=generator, dtype=torch.float64, device=where))
    # qr alone prefers some signs; with those of the diagonal of r the columns are uniform
    q = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    return q.to(dtype=dtype or torch.get_default_dtype(), device=device or where)


def class_means(features: Any, labels: Any, n_classes: int | None = None) -> tuple[Tensor, Tensor]:
    r"""Return the mean of every class and how many samples it has: $\mu_c = \frac{1}{n_c} \sum_{i: y_i = c} h_i$.

    Summed in float64, in chunks.

    Args:
        features: h, (n, d).
        labels: y, (n,), whole numbers from 0.
        n_classes: C; None takes the largest label plus one.

    Returns:
        Means (C, d) and counts (C,); the mean of a class without samples is NaN.

    Raises:
        ValueError: shapes that do not match, labels out of range, NaN or infinite features.

    >>> class_means([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]], [0, 0, 1])
    (tensor([[2., 0.],
            [0., 5.]]), tensor([2, 1]))

    Chapter: collapse/neural-collapse
    """
    features = check_features(features, "features")
    labels = check_labels(labels, n=len(features), n_classes=n_classes).to(features.device)
    n_classes = int(labels.max()) + 1 if n_classes is None else n_classes
    counts = torch.bincount(labels, minlength=n_classes)
    sums = torch.zeros(n_classes, features.shape[1], dtype=_wide(features), device=features.device)
    for rows, y in zip(features.split(CHUNK), labels.split(CHUNK)):
        sums = sums.index_add(0, y, rows.to(sums.dtype))
    return (sums / counts[:, None]).to(features.dtype), counts


def scatter_matrices(features: Any, labels: Any, *, balanced: bool = False) -> tuple[Tensor, Tensor]:
    r"""Return the within-class and the between-class scatter.

    $\Sigma_W = \frac1n \sum_i (h_i - \mu_{y_i})(h_i - \mu_{y_i})^\top$ and
    $\Sigma_B = \sum_c \frac{n_c}{n} (\mu_c - \mu)(\mu_c - \mu)^\top$ with the mean $\mu$ of all samples; their sum is
    the covariance of all samples.

    Args:
        features: h, (n, d).
        labels: y, (n,); classes without samples are left out.
        balanced: every class counts the same, whatever its size: weights $1/C$ instead of $n_c/n$, and $\mu$ is
            the mean of the class means.

    Returns:
        Within (d, d) and between (d, d).

    Raises:
        ValueError: as `class_means`.

    >>> within, between = scatter_matrices([[0.0], [2.0], [10.0], [12.0]], [0, 0, 1, 1])
    >>> within.item(), between.item()
    (1.0, 25.0)

    Chapter: collapse/neural-collapse
    """
    features = check_features(features, "features")
    dtype, features = features.dtype, _centred(single(features))  # neither scatter changes
    means, counts = class_means(features, labels)
    labels = check_labels(labels).to(features.device)
    present = counts > 0
    weight = (present if balanced else counts).to(features.dtype)
    share = weight / weight.sum()
    means = torch.where(present[:, None], means, 0.0)
    residuals = features - means[labels]
    per_sample = (share / counts.clamp(min=1))[labels]  # (n,)
    within = residuals.T @ (residuals * per_sample[:, None])
    centred = means - share @ means
    between = centred.T @ (centred * share[:, None])
    return within.to(dtype), between.to(dtype)


def pairwise_cosine(x: Any, y: Any = None) -> Tensor:
    r"""Return the cosine of the angle between every two rows, $\frac{\langle x_i, y_j\rangle}{\|x_i\| \|y_j\|}$.

    Args:
        x: (n, d).
        y: (m, d); None takes x.

    Returns:
        (n, m), between -1 and 1.

    Raises:
        ValueError: different dimensions, a row of zeros (which has no direction), NaN or infinity.

    >>> pairwise_cosine([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])[0]
    tensor([1., 1., 0.])
    """
    x = _unit_rows(check_features(x), "x")
    y = x if y is None else _unit_rows(check_features(y, "y"), "y")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"expected x and y of the same dimension, got {x.shape[1]} and {y.shape[1]}")
    dtype = torch.promote_types(x.dtype, y.dtype)
    return (x.to(dtype) @ y.to(dtype).T).clamp(-1, 1)


def subspace_angles(a: Any, b: Any) -> Tensor:
    r"""Return the principal angles between the column spaces of two matrices, in radians, largest first.

    $\cos\theta_k$ are the singular values of $Q_a^\top Q_b$ for orthonormal bases; small angles come from the sines,
    $\|(I - Q_a Q_a^\top) Q_b\|$, because the cosine cannot tell them from zero.

    Args:
        a: (d, p), columns that span the first subspace; they need not be independent.
        b: (d, q), columns that span the second.

    Returns:
        min(rank a, rank b) angles in [0, pi/2].

    Raises:
        ValueError: different d, a matrix of zeros, NaN or infinity.

    >>> a, b = torch.eye(3)[:, :2], torch.eye(3)[:, 1:]
    >>> torch.rad2deg(subspace_angles(a, b)).round()
    tensor([90.,  0.])
    """
    a, b = check_features(a, "a"), check_features(b, "b")
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"expected columns in the same space, got {a.shape[0]} and {b.shape[0]} dimensions")
    dtype = torch.promote_types(a.dtype, b.dtype)
    q_a, q_b = (_column_basis(single(columns.to(dtype)), name) for columns, name in ((a, "a"), (b, "b")))
    if q_a.shape[1] < q_b.shape[1]:
        q_a, q_b = q_b, q_a
    overlap = q_a.T @ q_b
    cosines = torch.linalg.svdvals(overlap).flip(0).clamp(max=1)  # ascending, as the sines descend
    sines = torch.linalg.svdvals(q_b - q_a @ overlap).clamp(max=1)
    small = cosines.square() >= 0.5
    # both branches get a harmless argument where the other one is taken: arcsin and arccos have infinite slope at 1
    from_sine = torch.asin(torch.where(small, sines, 0.0))
    from_cosine = torch.acos(torch.where(small, 0.0, cosines))
    return torch.where(small, from_sine, from_cosine).to(dtype)


def cka(x: Any, y: Any, kernel: str = "linear", *, unbiased: bool = False, bandwidth: float = 1.0) -> Tensor:
    r"""Return the centred kernel alignment of two sets of features: 1 = the same up to rotation and scale.

    $\mathrm{CKA} = \frac{\mathrm{HSIC}(K, L)}{\sqrt{\mathrm{HSIC}(K, K)\,\mathrm{HSIC}(L, L)}}$; for the linear kernel
    $\mathrm{HSIC} = \|X^\top Y\|_F^2$ of the centred features. No n x n matrix is ever held: the
    linear kernel works on d x d where that is smaller, and both go through chunks of rows otherwise.

    Args:
        x: (n, d).
        y: (n, e), the same samples in the same order.
        kernel: "linear" or "rbf", $\exp(-\|x_i - x_j\|^2 / 2\sigma^2)$.
        unbiased: use the U-statistic, which is 0 on average for independent features however few samples there are,
            and may be negative; the plain estimate is pushed towards 1 when n is not much larger than d. Needs n >= 4.
        bandwidth: $\sigma$ as a multiple of the median distance between samples (of at most 2,000 evenly spaced ones;
            gradients take it as a constant).

    Returns:
        A scalar.

    Raises:
        ValueError: different n, too few samples, constant features, an unknown kernel.

    >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 3.0], [4.0, 1.0]])
    >>> round(cka(x, 3 * x.flip(1) + 7).item(), 4)
    1.0
    """
    least = 4 if unbiased else 2
    x, y = check_features(x, "x", min_samples=least), check_features(y, "y", min_samples=least)
    if len(x) != len(y):
        raise ValueError(f"expected the same samples in x and y, got {len(x)} and {len(y)} rows")
    check_in_range(bandwidth, "bandwidth", low=0, inclusive="neither")
    dtype = torch.promote_types(x.dtype, y.dtype)
    x, y = (_centred(single(features.to(dtype))) for features in (x, y))
    for features, name in ((x, "x"), (y, "y")):
        if not features.detach().any():
            raise ValueError(f"expected {name} to vary from sample to sample, got constant features")
    if kernel == "linear":
        sums = _linear_sums
    elif kernel == "rbf":
        sums = _kernel_sums(bandwidth)
    else:
        raise ValueError(f"expected kernel 'linear' or 'rbf', got {kernel!r}")
    n = len(x)
    xy, xx, yy, rows_x, rows_y = sums(x, y, unbiased)
    total_x, total_y = rows_x.sum(), rows_y.sum()

    def hsic(products: Tensor, rows_a: Tensor, rows_b: Tensor, total_a: Tensor, total_b: Tensor) -> Tensor:
        if unbiased:
            return products + total_a * total_b / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows_a @ rows_b)
        return products + total_a * total_b / n**2 - 2 / n * (rows_a @ rows_b)

    between = hsic(xy, rows_x, rows_y, total_x, total_y)
    within_x = hsic(xx, rows_x, rows_x, total_x, total_x)
    within_y = hsic(yy, rows_y, rows_y, total_y, total_y)
    return (between / (within_x.sqrt() * within_y.sqrt())).to(dtype)


Sums = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _linear_sums(x: Tensor, y: Tensor, unbiased: bool) -> Sums:
    """Return <K, L>, <K, K>, <L, L> and the row sums of K and L, for K = xx' and L = yy' of centred features."""
    # scaled so that fourth powers stay inside the range of float32
    x, y = x / x.detach().abs().amax(), y / y.detach().abs().amax()
    wide = _wide(x)

    def product(a: Tensor, b: Tensor) -> Tensor:
        if a.shape[1] * b.shape[1] <= len(a) ** 2:
            return (a.T @ b).to(wide).square().sum()
        parts = [((rows_a @ a.T) * (rows_b @ b.T)).to(wide).sum() for rows_a, rows_b in zip(a.split(512), b.split(512))]
        return torch.stack(parts).sum()

    products = [product(x, y), product(x, x), product(y, y)]
    zero = torch.zeros(len(x), dtype=wide, device=x.device)
    if not unbiased:
        return (*products, zero, zero)  # centred rows sum to zero
    diagonal_x, diagonal_y = x.to(wide).square().sum(1), y.to(wide).square().sum(1)
    pairs = ((diagonal_x, diagonal_y), (diagonal_x, diagonal_x), (diagonal_y, diagonal_y))
    without = [value - (a @ b) for value, (a, b) in zip(products, pairs)]
    return (*without, -diagonal_x, -diagonal_y)


def _kernel_sums(bandwidth: float) -> Callable[[Tensor, Tensor, bool], Sums]:
    """Return the same sums for rbf kernels, in chunks of rows."""

    def sums(x: Tensor, y: Tensor, unbiased: bool) -> Sums:
        wide = _wide(x)
        scale_x, scale_y = _median_distance(x) * bandwidth, _median_distance(y) * bandwidth
        xy = xx = yy = torch.zeros((), dtype=wide, device=x.device)
        rows_x, rows_y = [], []
        for start, stop in _chunks(len(x), max(1, 2**23 // len(x))):
            k = (-0.5 * (_squared_distances(x[start:stop], x) / scale_x**2)).exp().to(wide)
            l = (-0.5 * (_squared_distances(y[start:stop], y) / scale_y**2)).exp().to(wide)
            # the diagonal is one but for rounding; the U-statistic leaves it out
            own = torch.arange(start, stop, device=x.device) - start, torch.arange(start, stop, device=x.device)
            value = torch.zeros((), dtype=wide, device=x.device) if unbiased else xy.new_ones(())
            k, l = k.index_put(own, value), l.index_put(own, value)
            xy, xx, yy = xy + (k * l).sum(), xx + k.square().sum(), yy + l.square().sum()
            rows_x.append(k.sum(1))
            rows_y.append(l.sum(1))
        return xy, xx, yy, torch.cat(rows_x), torch.cat(rows_y)

    return sums


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * (a @ b.T)).clamp(min=0)


def _median_distance(x: Tensor) -> Tensor:
    x = x.detach()[:: math.ceil(len(x) / MEDIAN_SAMPLES)]
    median = torch.pdist(x).median()
    if median <= 0:
        raise ValueError("expected fewer duplicates: the median distance between samples is zero, so rbf has no width")
    return median


def covariance_spectrum(x: Any) -> Tensor:
    r"""Return the eigenvalues of the covariance $\frac{1}{n-1} X_c^\top X_c$ of the samples, largest first.

    The Gram matrix of the smaller side is accumulated in float64.

    Args:
        x: (n, d), at least two samples.

    Returns:
        min(n, d) eigenvalues, at least 0; the other d - n, if any, are 0.

    Raises:
        ValueError: fewer than two samples, NaN or infinity.

    >>> covariance_spectrum([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [2.0, 4.0]])
    tensor([5.3333, 1.3333])
    """
    x = check_features(x, min_samples=2)
    return _spectrum(single(x)).to(x.dtype)


def participation_ratio(x: Any) -> Tensor:
    r"""Return how many directions the variance is spread over: $\frac{(\sum_i \lambda_i)^2}{\sum_i \lambda_i^2}$.

    Between 1 (a line) and d (the same variance in every direction); $\lambda$ are the eigenvalues of the covariance.

    Args:
        x: (n, d), at least two samples.

    Raises:
        ValueError: fewer than two samples, constant features, NaN or infinity.

    >>> participation_ratio([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    tensor(2.)
    """
    x = check_features(x, min_samples=2)
    values = _nonzero(_spectrum(single(x)), "features that vary")
    values = values / values.sum()
    return (1 / values.square().sum()).to(x.dtype)


def effective_rank(x: Any, *, center: bool = False) -> Tensor:
    r"""Return the exponential of the entropy of the normalised singular values.

    $\exp\left(-\sum_i p_i \log p_i\right)$ with $p_i = \sigma_i / \sum_j \sigma_j$: a rank that discounts weak ones.
    Singular values, not their squares; `participation_ratio` is the count for variances.

    Args:
        x: a matrix (n, d), of features or of weights.
        center: subtract the mean of the rows first.

    Returns:
        A scalar between 1 and the rank.

    Raises:
        ValueError: a matrix of zeros, NaN or infinity.

    >>> effective_rank(torch.eye(4))
    tensor(4.)
    """
    x = check_features(x)
    matrix = single(x)
    sigma = _nonzero(torch.linalg.svdvals(_centred(matrix) if center else matrix), "a matrix that is not zero")
    p = sigma / sigma.sum()
    return torch.special.entr(torch.where(p > 0, p, 1.0)).sum().exp().to(x.dtype)


def stable_rank(x: Any, *, center: bool = False) -> Tensor:
    r"""Return $\|X\|_F^2 / \|X\|_2^2$, the sum of the squared singular values over the largest.

    Args:
        x: a matrix (n, d), of features or of weights.
        center: subtract the mean of the rows first.

    Returns:
        A scalar between 1 and the rank.

    Raises:
        ValueError: a matrix of zeros, NaN or infinity.

    >>> stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0])))
    tensor(1.5000)
    """
    x = check_features(x)
    matrix = _centred(single(x)) if center else single(x)
    values = _nonzero(_squared_singular_values(matrix), "a matrix that is not zero")
    return (values / values[0]).sum().to(x.dtype)


def single(x: Tensor) -> Tensor:
    """Return x, in float32 where it is in half precision, which has no decompositions and too short sums.

    >>> single(torch.ones(2, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _centred(x: Tensor) -> Tensor:
    """Return x without its mean row: far from the origin a first mean is rounded, and a second takes what is left."""
    x = x - x.mean(0)
    return x - x.mean(0)


def _spectrum(x: Tensor) -> Tensor:
    return _squared_singular_values(_centred(x)) / (len(x) - 1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def _chunks(n: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, n, size):
        yield start, min(start + size, n)


def _squared_singular_values(x: Tensor) -> Tensor:
    """Return the min(n, d) squared singular values, largest first, from the smaller Gram matrix in float64."""
    rows = x if x.shape[0] >= x.shape[1] else x.T
    gram = torch.zeros(rows.shape[1], rows.shape[1], dtype=_wide(x), device=x.device)
    for part in rows.split(CHUNK):
        part = part.to(gram.dtype)
        gram = gram + part.T @ part
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).to(x.dtype)


def _nonzero(values: Tensor, what: str) -> Tensor:
    if not values.detach().any():
        raise ValueError(f"expected {what}, got a spectrum of zeros")
    return values


def _unit_rows(x: Tensor, name: str) -> Tensor:
    norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    if (norms == 0).any():
        raise ValueError(f"expected rows of {name} with a direction, got a row of zeros")
    return x / norms


def _column_basis(a: Tensor, name: str) -> Tensor:
    u, sigma, _ = torch.linalg.svd(a, full_matrices=False)
    rank = int((sigma > sigma[0] * max(a.shape) * torch.finfo(a.dtype).eps).sum())
    if rank == 0:
        raise ValueError(f"expected {name} to span something, got a matrix of zeros")
    return u[:, :rank]
