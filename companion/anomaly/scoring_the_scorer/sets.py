"""Two sets of features, real and generated: how far apart, how faithful, how diverse, and how much was copied.

Public: `frechet_distance`, `gaussian_frechet`, `frechet_at_infinity`, `FrechetDistance`; `kernel_distance`; `prdc` and
what it returns, `PRDC`; `auth_pct`, `ct_score`.

Everything quadratic in the number of samples runs in blocks of bounded memory, sums are kept in float64, and results
live on the device of the features.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from companion.checks import as_tensor, check_features, check_generator, check_positive_int
from companion.neighbors import knn
from companion.ranking import auroc
from companion.statistics import Moments

__all__ = [
    "PRDC",
    "FrechetDistance",
    "auth_pct",
    "ct_score",
    "frechet_at_infinity",
    "frechet_distance",
    "gaussian_frechet",
    "kernel_distance",
    "prdc",
]

_BLOCK = 2**23  # entries of a block of pairs: 64 MB in float64


class PRDC(NamedTuple):
    """Fidelity (precision, density) and diversity (recall, coverage) of generated samples."""

    precision: Tensor
    recall: Tensor
    density: Tensor
    coverage: Tensor


def _check_pair(real: Any, generated: Any, min_samples: int = 1) -> tuple[Tensor, Tensor]:
    real = check_features(real, "real", min_samples).detach()
    generated = check_features(generated, "generated", min_samples, device=real.device).detach()
    if real.shape[1] != generated.shape[1]:
        raise ValueError(f"expected features of one width, got {real.shape[1]} and {generated.shape[1]}")
    return real, generated


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def _factor(covariance: Tensor) -> Tensor:
    """Return A with A A^T = covariance; what rounding left of directions without variance is set to 0."""
    values, vectors = torch.linalg.eigh(covariance)
    cut = values[-1].clamp_min(0) * len(values) * torch.finfo(values.dtype).eps
    return vectors * torch.where(values > cut, values, 0).clamp_min(0).sqrt()


def gaussian_frechet(mean_a: Any, covariance_a: Any, mean_b: Any, covariance_b: Any) -> Tensor:
    r"""Return the squared 2-Wasserstein distance between two Gaussians, the formula behind FID.

    $$\lVert \mu_a - \mu_b \rVert^2 + \operatorname{tr}\Sigma_a + \operatorname{tr}\Sigma_b
    - 2 \operatorname{tr}\bigl(\Sigma_a^{1/2} \Sigma_b \Sigma_a^{1/2}\bigr)^{1/2}$$

    With any factors $\Sigma_a = AA^\top$, $\Sigma_b = BB^\top$ the last trace is the sum of the singular values of
    $A^\top B$. That needs no square root of a non-symmetric matrix, gives no complex numbers, and does not mind
    covariances without full rank.

    Args:
        mean_a: shape (d,).
        covariance_a: shape (d, d), symmetric, not negative.
        mean_b: shape (d,).
        covariance_b: shape (d, d).

    Raises:
        ValueError: shapes that do not fit.

    >>> eye = torch.eye(2, dtype=torch.float64)
    >>> gaussian_frechet(torch.zeros(2), eye, torch.tensor([3.0, 0.0]), 4 * eye)
    tensor(11., dtype=torch.float64)

    Paper: stein2023exposing
    Chapter: anomaly/scoring-the-scorer
    """
    mean_a, covariance_a = as_tensor(mean_a, "mean_a"), as_tensor(covariance_a, "covariance_a")
    wide, d = _wide(mean_a), mean_a.numel()
    mean_b = as_tensor(mean_b, "mean_b", mean_a.device)
    covariance_b = as_tensor(covariance_b, "covariance_b", mean_a.device)
    if mean_a.shape != (d,) or mean_b.shape != (d,) or covariance_a.shape != (d, d) or covariance_b.shape != (d, d):
        shapes = [tuple(t.shape) for t in (mean_a, covariance_a, mean_b, covariance_b)]
        raise ValueError(f"expected means (d,) and covariances (d, d), got {shapes}")
    a, b = covariance_a.to(wide), covariance_b.to(wide)
    between = (mean_a.to(wide) - mean_b.to(wide)).square().sum()
    overlap = torch.linalg.svdvals(_factor(a).T @ _factor(b)).sum()
    return (between + a.trace() + b.trace() - 2 * overlap).clamp_min(0)


def frechet_distance(real: Any, generated: Any) -> Tensor:
    r"""Return the Fréchet distance between Gaussians fitted to two sets of features: FID, on features of your choice.

    It sees means and covariances (with $n-1$) and nothing else, and it is biased: with the same law on both sides it
    is positive, and falls like $1/n$. Compare equal sizes only, or use `frechet_at_infinity`.

    Args:
        real: features, shape (n, d), n at least 2.
        generated: features, shape (m, d), m at least 2.

    Returns:
        A float64 scalar, at least 0.

    Raises:
        ValueError: shapes that do not fit, too few, NaN or infinity.

    >>> x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    >>> frechet_distance(x, x + 1)
    tensor(2.0000, dtype=torch.float64)

    Paper: stein2023exposing
    Chapter: anomaly/scoring-the-scorer
    """
    real, generated = _check_pair(real, generated, min_samples=2)
    d, n, m = real.shape[1], len(real), len(generated)
    if n + m > d:
        a, b = (_moments(x) for x in (real, generated))
        return gaussian_frechet(a.mean, a.covariance, b.mean, b.covariance)
    # fewer samples than dimensions: the centred samples are factors already, and no (d, d) matrix is needed
    a, b = real.to(_wide(real)), generated.to(_wide(real))
    between = (a.mean(0) - b.mean(0)).square().sum()
    a, b = (a - a.mean(0)) / math.sqrt(n - 1), (b - b.mean(0)) / math.sqrt(m - 1)
    overlap = torch.linalg.svdvals(a @ b.T).sum()
    return (between + a.square().sum() + b.square().sum() - 2 * overlap).clamp_min(0)


def _moments(x: Tensor) -> Any:
    moments = Moments(x.shape[1], correction=1, dtype=_wide(x)).to(x.device)
    moments.update(x)
    return moments.compute()


def frechet_at_infinity(
    real: Any, generated: Any, n_sizes: int = 8, *, repeats: int = 4, generator: torch.Generator | int | None = None
) -> Tensor:
    """Return the Fréchet distance that equal sets of infinite size would have, by extrapolation.

    The distance is computed for subsets of several sizes n, from a quarter up, and a line in 1/n is drawn through.

    Args:
        real: features, shape (n, d).
        generated: features, shape (m, d).
        n_sizes: how many sizes.
        repeats: subsets per size.
        generator: draws the subsets (None: torch's default generator).

    Raises:
        ValueError: shapes that do not fit, fewer than 16 samples, NaN or infinity.

    >>> x = torch.randn(2, 400, 4, generator=torch.Generator().manual_seed(0))
    >>> bool(frechet_at_infinity(x[0], x[1], generator=0).abs() < frechet_distance(x[0], x[1]))
    True

    Paper: stein2023exposing
    Chapter: anomaly/scoring-the-scorer
    """
    real, generated = _check_pair(real, generated, min_samples=16)
    check_positive_int(n_sizes, "n_sizes", minimum=2)
    check_positive_int(repeats, "repeats")
    draws = check_generator(generator)
    largest = min(len(real), len(generated))
    sizes = torch.linspace(largest / 4, largest, n_sizes).round().long().repeat_interleave(repeats)
    values = []
    for size in sizes.tolist():
        pick = [torch.randperm(len(x), generator=draws)[:size].to(x.device) for x in (real, generated)]
        values.append(frechet_distance(real[pick[0]], generated[pick[1]]))
    y = torch.stack(values)
    design = torch.stack([torch.ones(len(sizes)), 1 / sizes], 1).to(y)
    return torch.linalg.lstsq(design, y[:, None]).solution[0, 0]


class FrechetDistance(Metric):
    """Fréchet distance between two streams of features, or of images with an encoder of your choice.

    Keeps a count, a mean and a scatter for either side: 16 d^2 bytes, however long the streams. Merges over batches,
    `merge_state` and processes.

    Args:
        dim: width d of the features.
        encoder: maps what `update` gets to features (n, d), for instance a network without its head; it runs in
            evaluation mode and without gradients if it is a `torch.nn.Module`. None: `update` gets features.
        dtype: of the accumulators; float32 only for devices without float64.
        **kwargs: for `torchmetrics.Metric`.

    Raises:
        ValueError: features of another width, NaN or infinity; `compute` with fewer than two samples on a side.

    >>> x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    >>> metric = FrechetDistance(dim=2)
    >>> metric.update(x, real=True)
    >>> metric.update(x + 1, real=False)
    >>> metric.compute()
    tensor(2.0000, dtype=torch.float64)

    Paper: stein2023exposing
    Chapter: anomaly/scoring-the-scorer
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    def __init__(
        self,
        dim: int,
        encoder: Callable[[Any], Tensor] | None = None,
        *,
        dtype: torch.dtype = torch.float64,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.encoder = encoder.eval() if isinstance(encoder, torch.nn.Module) else encoder
        self.real = Moments(dim, correction=1, dtype=dtype, **kwargs)
        self.generated = Moments(dim, correction=1, dtype=dtype, **kwargs)

    @torch.no_grad()
    def update(self, x: Any, real: bool) -> None:
        """Take in a batch of features (or of what the encoder takes), real ones or generated ones."""
        features = x if self.encoder is None else self.encoder(x)
        (self.real if real else self.generated).update(features)

    def compute(self) -> Tensor:
        """Return the distance, a scalar."""
        a, b = self.real.compute(), self.generated.compute()
        return gaussian_frechet(a.mean, a.covariance, b.mean, b.covariance)

    def forward(self, x: Any, real: bool) -> None:
        """Update; a batch of one side has no distance to return."""
        self.update(x, real)

    def reset(self) -> None:
        """Forget both streams."""
        super().reset()
        self.real.reset()
        self.generated.reset()

    def merge_state(self, incoming_state: "FrechetDistance") -> None:
        """Take in what another such metric has seen."""
        if not isinstance(incoming_state, FrechetDistance):
            raise TypeError(f"expected a FrechetDistance, got {type(incoming_state).__name__}")
        self.real.merge_state(incoming_state.real)
        self.generated.merge_state(incoming_state.generated)
        self._update_count += incoming_state._update_count
        self._computed = None


def _blocks(n: int, width: int) -> Iterator[slice]:
    size = max(1, _BLOCK // max(width, 1))
    yield from (slice(start, start + size) for start in range(0, n, size))


def kernel_distance(real: Any, generated: Any, kernel: str = "polynomial", *, bandwidth: float | None = None) -> Tensor:
    r"""Return the squared maximum mean discrepancy, without bias: KID, on features of your choice.

    $$\frac{1}{n(n-1)} \sum_{i \ne j} k(x_i, x_j) + \frac{1}{m(m-1)} \sum_{i \ne j} k(y_i, y_j)
    - \frac{2}{nm} \sum_{i,j} k(x_i, y_j)$$

    with $k(x, y) = (x^\top y / d + 1)^3$, or the Gaussian kernel. Its mean does not depend on the sample size, so it
    can be negative when the laws agree.

    Args:
        real: features, shape (n, d), n at least 2.
        generated: features, shape (m, d), m at least 2.
        kernel: "polynomial" or "rbf", $\exp(-\lVert x-y\rVert^2 / 2h^2)$.
        bandwidth: h of the Gaussian kernel; None: $\sqrt{d}$ times the standard deviation of the real features.

    Returns:
        A float64 scalar.

    Raises:
        ValueError: shapes that do not fit, too few, NaN or infinity, an unknown kernel.

    >>> kernel_distance([[0.0], [2.0]], [[0.0], [2.0]])
    tensor(-62., dtype=torch.float64)

    Paper: stein2023exposing
    Chapter: anomaly/scoring-the-scorer
    """
    real, generated = _check_pair(real, generated, min_samples=2)
    wide, d = _wide(real), real.shape[1]
    if kernel not in ("polynomial", "rbf"):
        raise ValueError(f"expected kernel to be 'polynomial' or 'rbf', got {kernel!r}")
    if kernel == "rbf":
        h = float(bandwidth) if bandwidth is not None else math.sqrt(d) * real.to(wide).std().item()
        if not h > 0:
            raise ValueError(f"expected a bandwidth above 0, got {h}")

    def total(a: Tensor, b: Tensor, without_diagonal: bool) -> Tensor:
        result = torch.zeros((), dtype=wide, device=a.device)
        wide_b = b.to(wide)
        for rows in _blocks(len(a), len(b)):
            if kernel == "polynomial":
                k = (a[rows].to(wide) @ wide_b.T).div_(d).add_(1).pow_(3)
            else:
                k = torch.cdist(a[rows].to(wide), wide_b).square_().mul_(-1 / (2 * h * h)).exp_()
            result += k.sum()
            if without_diagonal:
                result -= k.diagonal(rows.start).sum()
        return result

    n, m = len(real), len(generated)
    within = total(real, real, True) / (n * (n - 1)) + total(generated, generated, True) / (m * (m - 1))
    return within - 2 * total(real, generated, False) / (n * m)


def prdc(real: Any, generated: Any, k: int = 5, *, memory: str | int = "256MB") -> PRDC:
    r"""Return precision, recall, density and coverage, from balls that reach to the k-th nearest neighbour.

    With $B_i$ the ball around real sample $i$ that reaches to its k-th nearest other real sample, precision is the
    share of generated samples in any $B_i$; density counts in how many, divided by k; coverage is the share of $B_i$
    that hold a generated sample; recall is precision with the roles exchanged. Balls are open.

    Args:
        real: features, shape (n, d), n above k.
        generated: features, shape (m, d), m above k.
        k: which neighbour sets the radius.
        memory: working memory of the neighbour searches.

    Returns:
        `PRDC(precision, recall, density, coverage)`, float64 scalars.

    Raises:
        ValueError: shapes that do not fit, k too large, NaN or infinity.

    >>> x = torch.arange(6.0)[:, None]
    >>> prdc(x, x[:4] + 0.25, k=1).coverage
    tensor(0.8333, dtype=torch.float64)

    Paper: stein2023exposing
    Chapter: anomaly/scoring-the-scorer
    """
    real, generated = _check_pair(real, generated, min_samples=2)
    wide = _wide(real)
    real, generated = real.to(wide), generated.to(wide)
    radius = knn(real, k=k, memory=memory).distances[:, -1]
    other_radius = knn(generated, k=k, memory=memory).distances[:, -1]
    nearest = knn(real, generated, k=1, memory=memory).distances[:, 0]
    inside = torch.zeros(len(generated), dtype=torch.int64, device=real.device)  # balls around each generated sample
    found = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows in _blocks(len(real), len(generated)):
        distance = torch.cdist(real[rows], generated, compute_mode="donot_use_mm_for_euclid_dist")
        inside += (distance < radius[rows, None]).sum(0)
        found[rows] = (distance < other_radius[None]).any(1)
    return PRDC(
        precision=(inside > 0).to(wide).mean(),
        recall=found.to(wide).mean(),
        density=inside.to(wide).mean() / k,
        coverage=(nearest < radius).to(wide).mean(),
    )


def auth_pct(train: Any, generated: Any, *, memory: str | int = "256MB") -> Tensor:
    r"""Return how many per cent of the generated samples are authentic rather than near copies of training samples.

    A generated sample $g$ with nearest training sample $x$ is authentic if $x$ has another training sample nearer
    than $g$: $\lVert g - x \rVert > \min_{x' \ne x} \lVert x' - x \rVert$. Fresh samples of the true law come out
    near one half, or a little above, not at 100.

    Args:
        train: features of what the generator was trained on, shape (n, d), n at least 2.
        generated: features, shape (m, d).
        memory: working memory of the neighbour searches.

    Returns:
        A float64 scalar between 0 and 100.

    Raises:
        ValueError: shapes that do not fit, NaN or infinity.

    >>> auth_pct([[0.0], [1.0], [3.0]], [[0.1], [4.9], [3.0]])
    tensor(0., dtype=torch.float64)
    >>> auth_pct([[0.0], [1.0], [3.0]], [[-1.5], [4.9], [3.0], [7.0]])
    tensor(50., dtype=torch.float64)

    Paper: stein2023exposing
    Chapter: anomaly/scoring-the-scorer
    """
    train, generated = _check_pair(train, generated)
    wide = _wide(train)
    spacing = knn(train.to(wide), k=1, memory=memory).distances[:, 0]
    near = knn(generated.to(wide), train.to(wide), k=1, memory=memory)
    return 100 * (near.distances[:, 0] > spacing[near.indices[:, 0]]).to(wide).mean()


def ct_score(train: Any, test: Any, generated: Any, *, memory: str | int = "256MB") -> Tensor:
    r"""Return how much nearer to the training set generated samples lie than held-out ones, in standard deviations.

    The Mann-Whitney statistic of nearest-training-sample distances, generated against held-out, standardised: far
    below 0 means copying, around 0 none, far above 0 samples that stay away from the data. (The full test of its
    authors, quoted by the paper, sums this over cells of the space; this is its version with one cell.)

    Args:
        train: features of what the generator was trained on, shape (n, d).
        test: features it has not seen, shape (p, d).
        generated: features, shape (m, d).
        memory: working memory of the neighbour searches.

    Returns:
        A float64 scalar.

    Raises:
        ValueError: shapes that do not fit, NaN or infinity.

    >>> x = torch.arange(40.0)[:, None]
    >>> bool(ct_score(x[::2], x[1::2], x[::2] + 0.1) < -3)
    True

    Paper: stein2023exposing
    Chapter: anomaly/scoring-the-scorer
    """
    train, generated = _check_pair(train, generated)
    test, _ = _check_pair(check_features(test, "test", device=train.device), train)
    wide = _wide(train)
    held_out, made = (knn(x.to(wide), train.to(wide), k=1, memory=memory).distances[:, 0] for x in (test, generated))
    p, m = len(test), len(generated)
    labels = torch.arange(p + m, device=train.device) >= p
    area = auroc(torch.cat([held_out, made]), labels)
    return (area - 0.5) * math.sqrt(12 * p * m / (p + m + 1))
