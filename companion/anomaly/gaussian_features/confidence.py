"""A softmax network read as discriminant analysis: the distance to the nearest class is its confidence.

Public: `MahalanobisOOD`, `tied_covariance`, `sharpen_input`, `LayerSum`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from companion.anomaly.gaussian_features._streams import (
    ROWS,
    ClassLinear,
    as_matrix,
    like,
    oas_share,
    shrink,
    whitening_of,
)
from companion.anomaly.gaussian_features.mahalanobis import _distances
from companion.checks import as_tensor, check_features, check_in_range, check_labels
from companion.statistics import ClassMoments, MeanCovariance

__all__ = ["LayerSum", "MahalanobisOOD", "sharpen_input", "tied_covariance"]


def tied_covariance(x: Any, y: Any) -> MeanCovariance:
    r"""Return class means and the one covariance around them.

    $$\Sigma = \frac1n \sum_i (x_i - \mu_{y_i})(x_i - \mu_{y_i})^\top$$

    Args:
        x: features (n, d).
        y: labels (n,) in 0..C-1.

    Returns:
        `MeanCovariance(mean, covariance, counts)`: (C, d), (d, d), (C,).

    Raises:
        ValueError: not features, or labels that do not fit them.

    >>> tied_covariance([[0.0, 0.0], [2.0, 0.0], [9.0, 9.0]], [0, 0, 1]).covariance[0]
    tensor([0.6667, 0.0000], dtype=torch.float64)

    Paper: lee2018simple
    Chapter: anomaly/gaussian-features
    """
    x = check_features(x)
    y = check_labels(y, n=len(x), device=x.device)
    moments = ClassMoments(int(y.max()) + 1, x.shape[1], "pooled").to(x.device)
    moments.update(x, y)
    return moments.compute()


class MahalanobisOOD(ClassLinear, ClassifierMixin, BaseEstimator):
    r"""One Gaussian per class with a covariance that all share; what is far from every class is out of distribution.

    $$\text{score}(x) = -\min_c\, (x - \mu_c)^\top \Sigma^{-1} (x - \mu_c)$$

    The nearest class is also a prediction, that of linear discriminant analysis with equal priors. A new class is one
    more mean: give its samples to `partial_fit`, without training anything.

    Args:
        shrinkage: of the shared covariance: "oas", or a number in [0, 1].
        device: where to compute arrays; "auto" leaves tensors where they are.

    Attributes:
        classes_: labels seen, sorted.
        means_: (C, d).
        counts_: samples per class (C,).
        covariance_: the shrunk shared covariance (d, d).
        shrinkage_: how far it was shrunk.
        whitening_: W (d, d), with distance $\lVert W(x - \mu_c) \rVert^2$.
        n_features_in_: d.

    >>> g = torch.Generator().manual_seed(0)
    >>> x = torch.cat([torch.randn(100, 2, generator=g), 10 + torch.randn(100, 2, generator=g)])
    >>> detector = MahalanobisOOD().fit(x, [0] * 100 + [1] * 100)
    >>> points = torch.tensor([[0.0, 0.0], [10.0, 10.0], [5.0, 5.0]])  # two class centres, and nowhere
    >>> detector.predict(points[:2]).tolist(), detector.score_samples(points) > -9
    ([0, 1], tensor([ True,  True, False]))

    Paper: lee2018simple
    Chapter: anomaly/gaussian-features
    """

    _diagonal = False

    def __init__(self, shrinkage: str | float = "oas", device: str = "auto"):
        self.shrinkage = shrinkage
        self.device = device

    def fit(self, X: Any, y: Any) -> "MahalanobisOOD":
        """Learn the class means and the shared covariance of features (n, d) with labels (n,).

        Raises:
            ValueError: not features, labels that do not fit, a setting out of range, a singular covariance.
        """
        return self._take(X, y, None, reset=True)

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> "MahalanobisOOD":
        """Take in more samples, of known classes or of new ones; the result is that of one `fit`.

        The first batch has to give a covariance already, as for `fit`; one that does not is refused and forgotten.

        Args:
            X: features (n, d).
            y: labels (n,).
            classes: labels still to come, as scikit-learn has it; not needed.
        """
        first = not hasattr(self, "stream_")
        try:
            return self._take(X, y, classes, reset=first)
        except ValueError:
            if first and hasattr(self, "stream_"):
                del self.stream_
            raise

    def _take(self, X: Any, y: Any, classes: Any, reset: bool) -> "MahalanobisOOD":
        if self.shrinkage != "oas":
            check_in_range(self.shrinkage, "shrinkage", 0, 1)
        self._learn(X, y, classes, reset=reset)
        stream = self.stream_
        covariance, n = stream.covariance, float(stream.counts.sum())
        if n < 2:
            raise ValueError("expected at least 2 samples, got 1 sample")
        self.shrinkage_ = float(oas_share(covariance, n) if self.shrinkage == "oas" else self.shrinkage)
        self.covariance_ = shrink(covariance, self.shrinkage_)
        self.whitening_ = whitening_of(self.covariance_, f"{int(n)} samples")
        self.means_, self.counts_ = stream.means, stream.counts.long()
        return self

    def distances(self, x: Tensor) -> Tensor:
        """Return the squared distance to each class seen, (n, C): differentiable, on the device of x."""
        check_is_fitted(self, "whitening_")
        return _distances(x, self._seen_means().to(x), self.whitening_.to(x))

    def _seen_means(self) -> Tensor:
        return self.means_[self.counts_ > 0]

    def _logits(self, x: Tensor) -> Tensor:
        z = torch.full((len(x), len(self.classes_)), -torch.inf, dtype=x.dtype, device=x.device)
        z[:, (self.counts_ > 0).to(x.device)] = -self.distances(x) / 2
        return z

    def confidence(self, x: Tensor) -> Tensor:
        """Return minus the squared distance to the nearest class, (n,): differentiable in the features x."""
        return -self.distances(x).amin(1)

    def score_samples(self, X: Any) -> Any:
        """Return minus the squared distance to the nearest class, (n,): higher = more normal."""
        check_is_fitted(self, "whitening_")
        with torch.no_grad():
            x = as_matrix(self, X, reset=False)
            return like(torch.cat([self.confidence(rows) for rows in x.split(ROWS)]), X)

    def ood_score(self, X: Any) -> Any:
        """Return the squared distance to the nearest class, (n,): higher = worse."""
        return -self.score_samples(X)


def sharpen_input(x: Tensor, confidence: Callable[[Tensor], Tensor], epsilon: float) -> Tensor:
    r"""Return inputs after one small step towards more confidence, $x + \epsilon\,\mathrm{sign}\,\nabla_x M(x)$.

    Inputs of a known kind gain more from such a step than others, which is what makes it useful, where it is.

    Args:
        x: inputs (n, ...), of any shape.
        confidence: maps inputs to M (n,), higher = more normal: `lambda x: detector.confidence(net.features(x))`.
        epsilon: the step, at least 0.

    Returns:
        Inputs of the same shape, detached.

    Raises:
        ValueError: a negative epsilon.

    >>> sharpen_input(torch.tensor([[2.0, -1.0]]), lambda x: -x.square().sum(1), 0.5)
    tensor([[ 1.5000, -0.5000]])

    Paper: lee2018simple
    Chapter: anomaly/gaussian-features
    """
    check_in_range(epsilon, "epsilon", 0)
    x = as_tensor(x, "x").detach().clone().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(confidence(x).sum(), x)
    return x.detach() + epsilon * gradient.sign()


class LayerSum(BaseEstimator):
    r"""One score from the scores of several layers: standardise each on normal samples, then add them up.

    $$s(x) = \sum_\ell \alpha_\ell \frac{s_\ell(x) - m_\ell}{\sigma_\ell}$$

    `fit` needs normal scores only and takes $\alpha_\ell = 1$. With known outliers it learns the weights by logistic
    regression, as the paper does; those outliers must not be the ones you report on.

    Attributes:
        location_: m (layers,).
        scale_: the standard deviations (layers,).
        weights_: alpha (layers,).

    >>> normal = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 100.0])
    >>> LayerSum().fit(normal).score_samples([[0.0, 0.0], [-5.0, -500.0]]) > -6
    array([ True, False])

    Paper: lee2018simple
    Chapter: anomaly/gaussian-features
    """

    def fit(self, scores: Any, outliers: Any = None) -> "LayerSum":
        """Learn the scale of each layer.

        Args:
            scores: (n, layers) of held-out normal samples, higher = more normal.
            outliers: (m, layers) of validation outliers, or None.

        Raises:
            ValueError: not scores (n, layers), or a layer whose scores do not vary.
        """
        scores = check_features(scores, "scores", min_samples=2).double()
        self.location_, self.scale_ = scores.mean(0), scores.std(0)
        if not bool((self.scale_ > 0).all()):
            raise ValueError("expected scores that vary in every layer")
        self.weights_ = torch.ones_like(self.scale_)
        if outliers is not None:
            outliers = check_features(outliers, "outliers").to(scores)
            z = (torch.cat([scores, outliers]) - self.location_) / self.scale_
            labels = np.repeat([1, 0], [len(scores), len(outliers)])
            model = LogisticRegression(max_iter=1000).fit(z.cpu().numpy(), labels)
            self.weights_ = torch.from_numpy(model.coef_[0]).to(scores)
        return self

    def score_samples(self, scores: Any) -> Any:
        """Return the weighted sum (n,): higher = more normal."""
        check_is_fitted(self, "weights_")
        x = check_features(scores, "scores").double()
        if x.shape[1] != len(self.weights_):
            raise ValueError(f"expected scores of {len(self.weights_)} layers, got {x.shape[1]}")
        return like(((x - self.location_.to(x)) / self.scale_.to(x)) @ self.weights_.to(x), scores)
