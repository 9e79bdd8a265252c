"""One Gaussian over the features of normal samples, and how far from it a new one is.

Public: `mahalanobis`, `MVGDetector`, `variance_ranked_auroc` and what it returns, `ComponentAuroc`.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from companion._products import SquaredLengths, block_rows, packed, product
from companion.anomaly.gaussian_features._streams import (
    COVARIANCES,
    as_matrix,
    ledoit_wolf_share,
    like,
    oas_share,
    shrink,
    whitening_of,
)
from companion.checks import as_tensor, check_features, check_in_range
from companion.geometry import single
from companion.ranking import auroc
from companion.statistics import Moments

__all__ = ["ComponentAuroc", "MVGDetector", "mahalanobis", "variance_ranked_auroc"]

COMPONENTS = ("all", "pca", "npca")


def mahalanobis(x: Any, mean: Any, covariance: Any) -> Tensor:
    r"""Return squared Mahalanobis distances, $(x - \mu)^\top \Sigma^{-1} (x - \mu)$.

    The covariance is factorised once; several means that share it, one per class say, cost one more matrix product.

    Args:
        x: features (n, d).
        mean: (d,), or (C, d) for several.
        covariance: (d, d), of full rank.

    Returns:
        (n,), or (n, C) for several means.

    Raises:
        ValueError: shapes that do not fit together, or a singular covariance.

    >>> mahalanobis([[3.0, 0.0], [0.0, 3.0]], mean=[0.0, 0.0], covariance=[[9.0, 0.0], [0.0, 1.0]])
    tensor([1., 9.])

    Paper: rippel2020modeling
    Chapter: anomaly/gaussian-features
    """
    x = check_features(x)
    dtype, x = x.dtype, single(x)
    means = as_tensor(mean, "mean").to(x)
    covariance = as_tensor(covariance, "covariance").to(x)
    d = x.shape[1]
    if means.shape[-1:] != (d,) or means.ndim not in (1, 2) or covariance.shape != (d, d):
        raise ValueError(
            f"expected mean ({d},) or (C, {d}) and covariance ({d}, {d}), got {tuple(means.shape)} and"
            f" {tuple(covariance.shape)}"
        )
    whitening = whitening_of(covariance.double(), "features").to(x)
    distances = _distances(x, means.view(-1, d), whitening).to(dtype)
    return distances[:, 0] if means.ndim == 1 else distances


def _distances(x: Tensor, means: Tensor, whitening: Tensor) -> Tensor:
    """Return squared distances (n, C): one product whitens, one more serves all means."""
    centre = means.mean(0)  # small numbers: |a - b|^2 = |a|^2 - 2 a.b + |b|^2 loses digits far from zero
    if len(means) == 1:
        lengths = SquaredLengths(whitening)
        return torch.cat([lengths(rows - centre) for rows in x.split(block_rows(x))])[:, None]
    whitening = packed(whitening)
    m = product(means - centre, whitening)  # (C, k)
    factor, bias = packed(-2 * m), m.square().sum(1)
    z = (product(rows - centre, whitening) for rows in x.split(block_rows(x)))  # (b, k)
    return torch.cat([(product(b, factor, bias) + b.square().sum(1, keepdim=True)).clamp_min(0) for b in z])


class MVGDetector(OutlierMixin, BaseEstimator):
    r"""One multivariate Gaussian over normal features; what lies far from it, in its own units, is odd.

    $$\text{score}(x) = -(x - \mu)^\top \Sigma^{-1} (x - \mu) = -\sum_j \frac{(v_j^\top (x - \mu))^2}{\lambda_j}$$

    with eigenvectors $v_j$ and eigenvalues $\lambda_j$ of $\Sigma$. "pca" keeps the leading terms of the sum, "npca"
    the others, so that the two scores add up to that of "all". Nothing but normal samples is used, for the threshold
    neither.

    Args:
        covariance: "ledoit_wolf", "oas", or "empirical", which needs many more samples than features.
        components: "all"; "pca", the leading components that hold the share `variance`; "npca", the rest.
        variance: that share.
        false_alarms: share of normal samples that `predict` may call odd, by the chi-square law.
        device: where to compute arrays; "auto" leaves tensors where they are.

    Attributes:
        location_: mean (d,).
        covariance_: the shrunk covariance (d, d).
        shrinkage_: how far it was shrunk.
        whitening_: W (k, d), with score $-\lVert W(x - \mu) \rVert^2$.
        n_components_: k.
        n_samples_seen_: n, over all calls of `partial_fit`.
        offset_: the threshold of `predict`.
        n_features_in_: d.

    >>> x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 1.0, 0.3])
    >>> detector = MVGDetector().fit(x)
    >>> odd = torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.0, 2.0]])  # four along the wide axis, two along the thin
    >>> detector.predict(odd).tolist()
    [1, -1]

    Paper: rippel2020modeling
    Chapter: anomaly/gaussian-features
    """

    def __init__(
        self,
        covariance: str = "ledoit_wolf",
        components: str = "all",
        variance: float = 0.99,
        false_alarms: float = 0.05,
        device: str = "auto",
    ):
        self.covariance = covariance
        self.components = components
        self.variance = variance
        self.false_alarms = false_alarms
        self.device = device

    def fit(self, X: Any, y: Any = None) -> "MVGDetector":
        """Learn mean and covariance of normal features (n, d).

        Args:
            X: array or tensor; rows are taken a block at a time, so a memory-mapped array stays on the disk.
            y: ignored.

        Raises:
            ValueError: not features, fewer than two samples, a setting out of range, a singular covariance.
        """
        return self._take(as_matrix(self, X, reset=True, min_samples=2), first=True)

    def partial_fit(self, X: Any, y: Any = None) -> "MVGDetector":
        """Take in more normal features; after all batches the result is that of one `fit`."""
        first = not hasattr(self, "moments_")
        return self._take(as_matrix(self, X, reset=first, min_samples=2 if first else 1), first)

    def _take(self, x: Tensor, first: bool) -> "MVGDetector":
        if self.covariance not in COVARIANCES:
            raise ValueError(f"expected covariance among {COVARIANCES}, got {self.covariance!r}")
        if self.components not in COMPONENTS:
            raise ValueError(f"expected components among {COMPONENTS}, got {self.components!r}")
        check_in_range(self.variance, "variance", 0, 1, inclusive="high")
        check_in_range(self.false_alarms, "false_alarms", 0, 1, inclusive="neither")
        x = x.detach()
        if first:
            self.moments_ = Moments(x.shape[1]).to(x.device)
            anchor = x[: block_rows(x)].double().mean(0)
            self._about = (anchor, torch.zeros_like(anchor), anchor.new_zeros(()))
        self.moments_.update(x)
        if self.covariance == "ledoit_wolf":
            self._fourth_powers(x)
        self._solve()
        return self

    def _fourth_powers(self, x: Tensor) -> None:
        """Add up |e|^2 e and |e|^4 of e = x - anchor: what the shrinkage needs beyond a covariance."""
        anchor, cubes, fourth = self._about
        for rows in x.split(block_rows(x)):
            e = rows - anchor.to(rows.dtype)
            square = e.square().sum(1)
            cubes = cubes + (square @ e).double()
            fourth = fourth + square.double().square().sum()
        self._about = (anchor, cubes, fourth)

    def _solve(self) -> None:
        mean, covariance, count = self.moments_.compute()
        n, mean = int(count), mean.view(-1)  # torchmetrics squeezes what has one entry
        covariance = covariance.view(len(mean), len(mean))
        self.shrinkage_ = float(self._share(mean, covariance, n))
        self.location_, self.covariance_ = mean, shrink(covariance, self.shrinkage_)
        self.n_samples_seen_ = n
        if self.components == "all":
            self.whitening_ = whitening_of(self.covariance_, f"{n} samples")
        else:
            self.whitening_ = self._directions(covariance)
        self.n_components_ = len(self.whitening_)
        self.offset_ = self.threshold(self.false_alarms)

    def _share(self, mean: Tensor, covariance: Tensor, n: int) -> Tensor:
        if self.covariance == "empirical":
            return mean.new_zeros(())
        if self.covariance == "oas":
            return oas_share(covariance, n)
        anchor, cubes, fourth = self._about
        shift = mean - anchor
        length = shift.square().sum()
        # sum |e - shift|^4, with the second moments around the anchor
        second = n * (covariance + torch.outer(shift, shift))
        fourth = fourth - 4 * shift @ cubes + 4 * shift @ second @ shift + 2 * length * second.trace()
        return ledoit_wolf_share(covariance, n, fourth / n - 3 * length.square())

    def _directions(self, covariance: Tensor) -> Tensor:
        """Return the chosen eigenvectors over the roots of their shrunk eigenvalues: (k, d)."""
        values, vectors = torch.linalg.eigh(covariance)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1).T
        if not values[0] > 0:
            raise ValueError("expected samples that vary, got copies of one point")
        share = values.cumsum(0) / values.sum()
        leading = int((share < self.variance - 1e-12).sum()) + 1
        chosen = slice(0, leading) if self.components == "pca" else slice(leading, None)
        shrunk = ((1 - self.shrinkage_) * values + self.shrinkage_ * values.mean())[chosen]
        if not len(shrunk):
            raise ValueError(f"expected components beyond the share {self.variance}, got none: all {leading} are in it")
        if not shrunk[-1] > 1e-13 * values[0]:
            raise ValueError("expected components that vary, got some that do not: shrink, or take components='pca'")
        return vectors[chosen] / shrunk.sqrt()[:, None]

    def score_samples(self, X: Any) -> Any:
        r"""Return minus the squared Mahalanobis distance of each row, (n,): higher = more normal."""
        check_is_fitted(self, "whitening_")
        x = as_matrix(self, X, reset=False)
        return like(-_distances(x, self.location_.to(x)[None], self.whitening_.to(x))[:, 0], X)

    def decision_function(self, X: Any) -> Any:
        """Return scores above the threshold of `predict`, (n,): below 0 is odd."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> np.ndarray:
        """Return 1 for rows that look normal and -1 for the others."""
        return np.where(np.asarray(torch.as_tensor(self.decision_function(X)).detach().cpu()) >= 0, 1, -1)

    def threshold(self, false_alarms: float, law: str = "chi2") -> float:
        r"""Return the score below which a share of normal samples should fall.

        "chi2" takes mean and covariance for exact: $\lVert W(x - \mu) \rVert^2 \sim \chi^2_k$. "hotelling" knows that
        both were estimated from n samples, without shrinkage:

        $$\lVert W(x - \mu) \rVert^2 \sim \frac{(n + 1)\,k}{n - k}\, F_{k,\,n-k}$$

        Args:
            false_alarms: that share, in (0, 1).
            law: "chi2" or "hotelling".

        Raises:
            ValueError: a share out of range, an unknown law, or no more samples than components for "hotelling".
        """
        check_is_fitted(self, "whitening_")
        share = check_in_range(false_alarms, "false_alarms", 0, 1, inclusive="neither")
        n, k = self.n_samples_seen_, self.n_components_
        if law == "chi2":
            return -float(stats.chi2.ppf(1 - share, k))
        if law != "hotelling":
            raise ValueError(f"expected law to be 'chi2' or 'hotelling', got {law!r}")
        if n <= k:
            raise ValueError(f"expected more samples than components, got {n} and {k}")
        return -float((n + 1) * k / (n - k) * stats.f.ppf(1 - share, k, n - k))


class ComponentAuroc(NamedTuple):
    """Variance of each principal component of the normal samples, and how well it alone tells odd ones: both (d,)."""

    variance: Tensor
    auroc: Tensor


def variance_ranked_auroc(train: Any, normal: Any, odd: Any) -> ComponentAuroc:
    r"""Return the AUROC of $|v_j^\top (x - \mu)|$ for each principal component j, the widest first.

    Args:
        train: normal features (n, d), which the components are taken from.
        normal: other normal features.
        odd: features of anomalies; they are only scored.

    Returns:
        `ComponentAuroc(variance, auroc)`.

    Raises:
        ValueError: not features of one width.

    >>> g = torch.Generator().manual_seed(0)
    >>> scale = torch.tensor([10.0, 0.1])
    >>> train, normal, odd = (torch.randn(300, 2, generator=g) * scale for _ in range(3))
    >>> variance_ranked_auroc(train, normal, odd + torch.tensor([0.0, 1.0])).auroc > 0.9
    tensor([False,  True])

    Paper: rippel2020modeling
    Chapter: anomaly/gaussian-features
    """
    train = check_features(train, "train", min_samples=2)
    scored = [check_features(part, name).to(train) for part, name in ((normal, "normal"), (odd, "odd"))]
    if any(part.shape[1] != train.shape[1] for part in scored):
        raise ValueError(f"expected {train.shape[1]} features, got {[part.shape[1] for part in scored]}")
    moments = Moments(train.shape[1]).to(train.device)
    moments.update(train)
    mean, covariance, _ = moments.compute()
    values, vectors = torch.linalg.eigh(covariance.view(2 * train.shape[1:]))
    off = [((part.double() - mean) @ vectors.flip(1)).abs() for part in scored]
    labels = torch.cat([torch.full((len(part),), i, device=train.device) for i, part in enumerate(off)])
    areas = [auroc(column, labels) for column in torch.cat(off).T]
    return ComponentAuroc(values.flip(0).clamp_min(0), torch.stack(areas).double())
