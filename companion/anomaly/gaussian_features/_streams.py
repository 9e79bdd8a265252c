"""What the estimators of this chapter share: input and output, moments that stream, shrinkage from moments alone."""

import warnings
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import DataConversionWarning
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from companion import runtime
from companion.checks import as_tensor, check_features, check_same_length
from companion.geometry import single
from companion.statistics import ClassMoments, shrunk_covariance

ROWS = 8192  # rows that are whitened or compared at a time: memory does not grow with n
COVARIANCES = ("ledoit_wolf", "oas", "empirical")


def as_matrix(estimator: Any, X: Any, *, reset: bool, min_samples: int = 1) -> Tensor:
    """Return X as features (n, d) on the estimator's device, and hold their width against that of fit."""
    if not isinstance(X, Tensor):
        X = validate_data(estimator, X, reset=reset, dtype=[np.float64, np.float32], ensure_min_samples=min_samples)
    x = single(check_features(X, "X", min_samples=min_samples))  # covariances leave the range of a short float
    if reset:
        estimator.n_features_in_ = x.shape[1]
    elif x.shape[1] != estimator.n_features_in_:
        raise ValueError(f"expected X with {estimator.n_features_in_} features as in fit, got {x.shape[1]}")
    keep = isinstance(X, Tensor) and estimator.device == "auto"
    return x if keep else x.to(runtime.device(estimator.device))


def as_targets(y: Any) -> np.ndarray:
    """Return class labels as a flat array; anything but labels is refused."""
    if y is None:
        raise ValueError("requires y to be passed, but the target y is None")
    y = np.asarray(y.detach().cpu() if isinstance(y, Tensor) else y)
    if y.ndim == 2 and y.shape[1] == 1:
        warnings.warn("A column-vector y was passed when a 1d array was expected", DataConversionWarning, stacklevel=4)
        y = y.ravel()
    if y.ndim != 1:
        raise ValueError(f"expected y of shape (n,), one label per sample, got shape {y.shape}")
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        raise ValueError("expected y without NaN or infinity")
    check_classification_targets(y)
    return y


def like(result: Tensor, X: Any) -> Any:
    """Return a tensor where X is one, an array otherwise."""
    return result.to(X.device) if isinstance(X, Tensor) else result.detach().cpu().numpy()


def oas_share(covariance: Tensor, n: float) -> Tensor:
    """Return the shrinkage of `companion.statistics.oas`, which needs no more than the covariance and n."""
    d = len(covariance)
    mean_square, target = covariance.square().mean(), covariance.trace() / d
    below = (n + 1) * (mean_square - target**2 / d)
    if d == 1:
        return torch.zeros_like(target)
    return ((mean_square + target**2) / below).clamp_max(1) if below > 0 else torch.ones_like(target)


def ledoit_wolf_share(covariance: Tensor, n: float, fourth: Tensor) -> Tensor:
    """Return the shrinkage of `companion.statistics.ledoit_wolf`; fourth is the mean of the centred |x|^4."""
    d, norm = len(covariance), covariance.square().sum()
    distance = norm - covariance.trace() ** 2 / d
    error = torch.minimum((fourth - norm) / n, distance)
    return error / distance if d > 1 and error > 0 else torch.zeros_like(norm)


def shrink(covariance: Tensor, share: float) -> Tensor:
    """Return the shrunk covariance; a share that rounding pushed a hair out of [0, 1] is put back."""
    return shrunk_covariance(covariance, min(max(share, 0.0), 1.0))


def whitening_of(covariance: Tensor, what: str) -> Tensor:
    """Return W with W S W^T = I from a Cholesky factor, or say that there is none."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    scale = covariance.diagonal().mean()
    if failed or not scale > 0 or factor.diagonal().amin() ** 2 < 1e-13 * scale:
        raise ValueError(
            f"expected {what} with a covariance of full rank, got a singular one for {len(covariance)} features: take"
            " more samples, drop constant features, or shrink (covariance='ledoit_wolf' or 'oas')"
        )
    return torch.linalg.solve_triangular(factor, torch.eye(len(factor)).to(factor), upper=False)


class ClassStream:
    """Counts (C,), class means (C, d) and the scatter around them, (d, d) or its diagonal, of labelled batches.

    Classes may appear in any batch. Each batch goes through `companion.statistics.ClassMoments`.
    """

    def __init__(self, diagonal: bool):
        self.diagonal = diagonal
        self.classes: np.ndarray | None = None

    def update(self, x: Tensor, y: np.ndarray, classes: Any = None) -> None:
        """Take in features and labels; classes announces labels that are still to come."""
        known = [np.asarray(part) for part in (self.classes, classes, y) if part is not None]
        merged = np.unique(np.concatenate(known))
        codes = torch.from_numpy(np.searchsorted(merged, y)).to(x.device)
        self._grow(merged, x)
        batch = ClassMoments(len(merged), x.shape[1], "diagonal" if self.diagonal else "pooled").to(x.device)
        batch.update(x, codes)
        moments = batch.compute()  # torchmetrics squeezes what has one entry
        n, mean = moments.counts.double().view(-1), moments.mean.nan_to_num().view_as(self.means)
        covariance = moments.covariance.nan_to_num().view(-1, *self.scatter.shape)  # (C, d), or (1, d, d)
        total = (self.counts + n).clamp_min(1)
        delta, weight = mean - self.means, self.counts * n / total
        if self.diagonal:
            self.scatter += (n[:, None] * covariance + weight[:, None] * delta.square()).sum(0)
        else:
            self.scatter += covariance[0] * n.sum() + (weight[:, None] * delta).T @ delta
        self.means += delta * (n / total)[:, None]
        self.counts += n

    def _grow(self, merged: np.ndarray, x: Tensor) -> None:
        zeros = {"dtype": torch.float64, "device": x.device}
        d = x.shape[1]
        counts, means = torch.zeros(len(merged), **zeros), torch.zeros(len(merged), d, **zeros)
        if self.classes is None:
            self.scatter = torch.zeros(d if self.diagonal else (d, d), **zeros)
        else:
            places = torch.from_numpy(np.searchsorted(merged, self.classes)).to(x.device)
            counts[places], means[places] = self.counts, self.means
        self.classes, self.counts, self.means = merged, counts, means

    @property
    def covariance(self) -> Tensor:
        """The pooled covariance, or variances."""
        return self.scatter / self.counts.sum()


class ClassLinear:
    """Predictions of a classifier whose logits (n, C) `_logits` gives."""

    def _checked(self, X: Any) -> Tensor:
        check_is_fitted(self, "classes_")
        return as_matrix(self, X, reset=False)

    def _learn(self, X: Any, y: Any, classes: Any = None, *, reset: bool) -> None:
        """Check a batch and stream it."""
        x, y = as_matrix(self, X, reset=reset), as_targets(y)
        check_same_length(X=x, y=y)
        if reset:
            self.stream_ = ClassStream(self._diagonal)
        self.stream_.update(x, y, classes)
        self.classes_ = self.stream_.classes

    def _all_logits(self, X: Any) -> Tensor:
        with torch.no_grad():
            return torch.cat([self._logits(rows) for rows in self._checked(X).split(ROWS)])

    def decision_function(self, X: Any) -> Any:
        """Return the log-posterior of each class up to a constant, (n, C); for two classes their difference, (n,)."""
        z = self._all_logits(X)
        return like(z[:, 1] - z[:, 0] if z.shape[1] == 2 else z, X)

    def predict_proba(self, X: Any) -> Any:
        """Return the posterior of each class, (n, C)."""
        return like(self._all_logits(X).softmax(1), X)

    def predict(self, X: Any) -> Any:
        """Return the most probable class of each row."""
        places = self._all_logits(X).argmax(1).cpu().numpy()
        labels = self.classes_[places]
        return as_tensor(labels).to(X.device) if isinstance(X, Tensor) and labels.dtype.kind in "biuf" else labels
