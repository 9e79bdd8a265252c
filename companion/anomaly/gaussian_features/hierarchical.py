"""Several Gaussians per class, for classes that are not one cloud: fitted afterwards, or learned with the features.

Public: `HierarchicalGMM`, `aggregate_mahalanobis`, `MixturePrototypes`, `mixture_prototype_loss`.
"""

import math
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.cluster import kmeans_plusplus
from sklearn.utils.validation import check_is_fitted, check_random_state
from torch import Tensor, nn
from torch.nn import functional as F

from companion.anomaly.gaussian_features._streams import (
    ROWS,
    ClassLinear,
    as_matrix,
    as_targets,
    like,
    oas_share,
    shrink,
    whitening_of,
)
from companion.anomaly.gaussian_features.mahalanobis import _distances
from companion.checks import as_tensor, check_in_range, check_positive_int, check_same_length

__all__ = ["HierarchicalGMM", "MixturePrototypes", "aggregate_mahalanobis", "mixture_prototype_loss"]

RULES = ("logsumexp", "min")


def aggregate_mahalanobis(distances: Any, rule: str = "logsumexp", log_weights: Any = None) -> Tensor:
    r"""Return one score per class from squared distances to its components, higher = more normal.

    "min" looks at the nearest component, $-\tfrac12 \min_k d_{ck}^2$; "logsumexp" at all of them,
    $\log \sum_k w_{ck} e^{-d_{ck}^2 / 2}$, the log-density up to a constant.

    Args:
        distances: squared distances (n, C, K).
        rule: "logsumexp" or "min".
        log_weights: (C, K) for "logsumexp"; None: equal weights 1/K.

    Returns:
        (n, C).

    Raises:
        ValueError: another shape, or an unknown rule.

    >>> aggregate_mahalanobis([[[0.0, 8.0], [18.0, 2.0]]], "min")
    tensor([[-0., -1.]])

    Paper: li2023hierarchical
    Chapter: anomaly/gaussian-features
    """
    distances = as_tensor(distances, "distances")
    if distances.ndim != 3 or not distances.is_floating_point():
        raise ValueError(f"expected squared distances (n, C, K), got {tuple(distances.shape)} of {distances.dtype}")
    if rule == "min":
        return -distances.amin(2) / 2
    if rule != "logsumexp":
        raise ValueError(f"expected rule among {RULES}, got {rule!r}")
    if log_weights is None:
        log_weights = torch.full(distances.shape[1:], -math.log(distances.shape[2])).to(distances)
    return (as_tensor(log_weights, "log_weights").to(distances) - distances / 2).logsumexp(2)


class HierarchicalGMM(ClassLinear, ClassifierMixin, BaseEstimator):
    r"""A mixture of Gaussians for every class, with one covariance that all components share.

    $$p(x \mid c) = \sum_k w_{ck}\, N(x;\ \mu_{ck}, \Sigma), \qquad \text{score}(x) = \max_c\, \log p(x \mid c)$$

    up to a constant. Fitted by expectation and maximisation from k-means++ seeds; of several starts the one with the
    highest likelihood is kept. With one component per class it is `MahalanobisOOD`.

    Args:
        n_components: K, per class; a class with fewer samples gets as many components as it has samples.
        shrinkage: of the shared covariance: "oas", or a number in [0, 1].
        rule: how the components of a class make one score, see `aggregate_mahalanobis`.
        n_init: starts.
        max_iter: steps per start.
        tol: a start ends when the mean log-likelihood gains less than this.
        random_state: draws the seeds.
        device: where to compute arrays; "auto" leaves tensors where they are.

    Attributes:
        classes_: labels seen, sorted.
        means_: (C, K, d).
        weights_: (C, K).
        covariance_: the shrunk shared covariance (d, d).
        log_likelihood_: mean log-likelihood after each step of the start that was kept, up to a constant.
        n_iter_: its steps.
        n_features_in_: d.

    >>> g = torch.Generator().manual_seed(0)
    >>> lobes = torch.tensor([[-9.0, 0.0], [9.0, 0.0]])
    >>> x = lobes[torch.arange(200) % 2] + torch.randn(200, 2, generator=g)
    >>> model = HierarchicalGMM(n_components=2, random_state=0).fit(x, torch.zeros(200, dtype=torch.int64))
    >>> scores = model.score_samples(torch.tensor([[9.0, 0.0], [0.0, 0.0]]))  # in a lobe, and between them
    >>> bool(scores[0] > scores[1] + 10)
    True

    Paper: li2023hierarchical
    Chapter: anomaly/gaussian-features
    """

    def __init__(
        self,
        n_components: int = 3,
        shrinkage: str | float = "oas",
        rule: str = "logsumexp",
        n_init: int = 3,
        max_iter: int = 50,
        tol: float = 1e-4,
        random_state: Any = None,
        device: str = "auto",
    ):
        self.n_components = n_components
        self.shrinkage = shrinkage
        self.rule = rule
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state
        self.device = device

    def fit(self, X: Any, y: Any) -> "HierarchicalGMM":
        """Fit the mixtures to features (n, d) with labels (n,).

        Raises:
            ValueError: not features, labels that do not fit, a setting out of range, a singular covariance.
        """
        x, labels = as_matrix(self, X, reset=True, min_samples=2).detach(), as_targets(y)
        check_same_length(X=x, y=labels)
        k = check_positive_int(self.n_components, "n_components")
        if self.rule not in RULES:
            raise ValueError(f"expected rule among {RULES}, got {self.rule!r}")
        if self.shrinkage != "oas":
            check_in_range(self.shrinkage, "shrinkage", 0, 1)
        check_positive_int(self.max_iter, "max_iter"), check_in_range(self.tol, "tol", 0)
        self.classes_, codes = np.unique(labels, return_inverse=True)
        codes = torch.from_numpy(codes).to(x.device)
        self._centre = x.double().mean(0)
        rows = [x[codes == c].double() - self._centre for c in range(len(self.classes_))]
        state = check_random_state(self.random_state)
        starts = [self._run(rows, k, state) for _ in range(check_positive_int(self.n_init, "n_init"))]
        best = max(starts, key=lambda start: start[-1][-1])
        means, self.weights_, self.covariance_, self.whitening_, self.log_likelihood_ = best
        self.means_ = means + self._centre
        self.n_iter_ = len(self.log_likelihood_)
        return self

    def _run(self, rows: list[Tensor], k: int, state: np.random.RandomState) -> tuple:
        """One start of expectation and maximisation; rows are the samples class by class."""
        shares = [_seeded(part, k, state) for part in rows]
        history: list[float] = []
        for _ in range(self.max_iter):
            means, weights, covariance = self._maximise(rows, shares)
            whitening = whitening_of(covariance, f"{sum(map(len, rows))} samples")
            total = whitening.diagonal().log().sum() * sum(map(len, rows))
            for c, part in enumerate(rows):
                joint = weights[c].log() - _distances(part, means[c], whitening).view(len(part), -1) / 2
                total = total + joint.logsumexp(1).sum()
                shares[c] = joint.softmax(1)
            history.append(float(total) / sum(map(len, rows)))
            if len(history) > 1 and history[-1] - history[-2] < self.tol:
                break
        return means, weights, covariance, whitening, history

    def _maximise(self, rows: list[Tensor], shares: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        n, scatter, means, weights = sum(map(len, rows)), 0, [], []
        for part, share in zip(rows, shares):
            mass = share.sum(0)  # (K,)
            centre = share.T @ part / mass.clamp_min(1e-300)[:, None]
            means.append(centre), weights.append(mass / len(part))
            for j, column in enumerate(share.T):
                near = column > 1e-12  # most rows belong to one component
                off = (part[near] - centre[j]) * column[near, None].sqrt()
                scatter = scatter + off.T @ off
        covariance = scatter / n
        shrinkage = float(oas_share(covariance, n) if self.shrinkage == "oas" else self.shrinkage)
        return torch.stack(means), torch.stack(weights), shrink(covariance, shrinkage)

    def component_distances(self, x: Tensor) -> Tensor:
        """Return squared distances to every component, (n, C, K): differentiable, on the device of x."""
        check_is_fitted(self, "whitening_")
        return _distances(x, self.means_.flatten(0, 1).to(x), self.whitening_.to(x)).unflatten(1, self.weights_.shape)

    def _logits(self, x: Tensor) -> Tensor:
        log_weights = self.weights_.log()
        return aggregate_mahalanobis(self.component_distances(x), self.rule, log_weights)

    def score_samples(self, X: Any) -> Any:
        """Return the score of the best class, (n,): higher = more normal."""
        check_is_fitted(self, "whitening_")
        with torch.no_grad():
            x = as_matrix(self, X, reset=False)
            return like(torch.cat([self._logits(rows).amax(1) for rows in x.split(ROWS)]), X)

    def ood_score(self, X: Any) -> Any:
        """Return minus `score_samples`, (n,): higher = worse."""
        return -self.score_samples(X)


def _seeded(x: Tensor, k: int, state: np.random.RandomState) -> Tensor:
    """Return hard shares (n, K) of the nearest k-means++ seed; components beyond the number of samples stay empty."""
    seeds, _ = kmeans_plusplus(x.cpu().numpy(), min(k, len(x)), random_state=state)
    nearest = torch.cdist(x, torch.from_numpy(seeds).to(x)).argmin(1)
    return F.one_hot(nearest, k).to(x)


class MixturePrototypes(nn.Module):
    r"""A last layer of K learned prototypes per class; it returns squared distances (n, C, K) instead of logits.

    Args:
        dim: of the features.
        n_classes: C.
        n_components: K.
        scale: standard deviation of the initial prototypes.

    Raises:
        ValueError: a size below one.

    >>> MixturePrototypes(dim=8, n_classes=2, n_components=5)(torch.zeros(4, 8)).shape
    torch.Size([4, 2, 5])

    Paper: li2023hierarchical
    Chapter: anomaly/gaussian-features
    """

    def __init__(self, dim: int, n_classes: int, n_components: int = 3, scale: float = 1.0):
        super().__init__()
        shape = [check_positive_int(v, name) for v, name in ((n_classes, "n_classes"), (n_components, "n_components"))]
        self.prototypes = nn.Parameter(scale * torch.randn(*shape, check_positive_int(dim, "dim")))

    def forward(self, features: Tensor) -> Tensor:
        """Return squared distances (n, C, K) of features (n, d)."""
        return (features[:, None, None, :] - self.prototypes).square().sum(-1)


def mixture_prototype_loss(distances: Tensor, labels: Tensor, compactness: float = 0.05) -> Tensor:
    r"""Return the loss that learns features and prototypes together.

    $$-\log \frac{e^{z_y}}{\sum_c e^{z_c}} + \frac{\gamma}{2} \min_k d_{yk}^2,
      \qquad z_c = \log \frac1K \sum_k e^{-d_{ck}^2 / 2}$$

    The first part tells classes apart; the second pulls features to the nearest prototype of their own class, because
    classes can be told apart at any distance from all prototypes.

    Args:
        distances: squared distances (n, C, K), from `MixturePrototypes`.
        labels: (n,).
        compactness: gamma.

    >>> mixture_prototype_loss(torch.tensor([[[0.0], [0.0]]]), torch.tensor([0]))
    tensor(0.6931)

    Paper: li2023hierarchical
    Chapter: anomaly/gaussian-features
    """
    logits = aggregate_mahalanobis(distances)
    own = distances.gather(1, labels.view(-1, 1, 1).expand(-1, 1, distances.shape[2]))[:, 0]
    return F.cross_entropy(logits, labels) + compactness * own.amin(1).mean() / 2
