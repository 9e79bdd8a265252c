"""Gaussian mixtures with the exact posterior and the Bayes risk.

Public: `BayesRisk`, `GaussianMixture`.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from companion.checks import as_tensor, check_generator, check_labels, check_positive_int

__all__ = ["BayesRisk", "GaussianMixture"]


class BayesRisk(NamedTuple):
    """The least possible error rate, and the standard error of that number (0 where it is a closed form)."""

    risk: float
    standard_error: float


class GaussianMixture:
    r"""A mixture of Gaussians whose components belong to classes: $p(x) = \sum_j w_j N(x; \mu_j, \Sigma_j)$.

    Args:
        means: (m, d), one row per component.
        covariance: a variance shared by all directions and components; or (d, d), shared by all components; or
            (m,), one variance per component; or (m, d, d). A square (m, m) with m = d is read as (d, d).
        weights: (m,) component weights, positive; normalised to sum to one. None: all equal.
        labels: (m,) the class of each component. None: every component is a class of its own.

    Computations are in float64; `sample` returns torch's default dtype.

    >>> task = GaussianMixture([[-1.0, 0.0], [1.0, 0.0]])
    >>> x, y = task.sample(1000, torch.Generator().manual_seed(0))
    >>> round(task.bayes_risk().risk, 4)  # Phi(-1)
    0.1587
    """

    def __init__(self, means: Any, covariance: Any = 1.0, weights: Any = None, labels: Any = None) -> None:
        self.means = as_tensor(means, "means").to("cpu", torch.float64, copy=True)
        if self.means.ndim != 2 or not self.means.numel() or not self.means.isfinite().all():
            raise ValueError(f"expected finite means of shape (components, d), got {tuple(self.means.shape)}")
        m, d = self.means.shape
        covariance = as_tensor(covariance, "covariance").to("cpu", torch.float64)
        if covariance.ndim <= 1 and covariance.numel() in {1, m}:
            covariance = covariance.reshape(-1, 1, 1) * torch.eye(d, dtype=torch.float64)
        if (
            covariance.ndim not in {2, 3}
            or covariance.shape[-2:] != (d, d)
            or covariance.shape[:-2].numel() not in {1, m}
        ):
            raise ValueError(
                f"expected covariance (), ({m},), ({d}, {d}) or ({m}, {d}, {d}), got {tuple(covariance.shape)}"
            )
        self.covariances = covariance.expand(m, d, d).clone()
        self.weights = torch.ones(m, dtype=torch.float64)
        if weights is not None:
            self.weights = as_tensor(weights, "weights").to("cpu", torch.float64)
        if self.weights.shape != (m,) or not (self.weights > 0).all() or not self.weights.isfinite().all():
            raise ValueError(f"expected {m} positive weights, got {self.weights.tolist()}")
        self.weights = self.weights / self.weights.sum()
        self.labels = torch.arange(m) if labels is None else check_labels(labels, m).cpu()
        if not torch.equal(self.labels.unique(), torch.arange(int(self.labels.max()) + 1)):
            raise ValueError(f"expected labels that cover 0..C-1, got {self.labels.tolist()}")
        factor, info = torch.linalg.cholesky_ex(covariance)
        if info.any() or not torch.allclose(covariance, covariance.mT):
            raise ValueError("expected symmetric positive definite covariances")
        self._factor = factor.expand(m, d, d)

    @classmethod
    def random(
        cls,
        n_classes: int,
        dim: int,
        separation: float = 3.0,
        variance: float = 1.0,
        modes: int = 1,
        generator: torch.Generator | None = None,
    ) -> "GaussianMixture":
        """Draw a mixture: means are `separation` times standard normal vectors, `modes` of them per class.

        Args:
            n_classes: classes.
            dim: dimensions.
            separation: standard deviation of the means in each direction.
            variance: of every component, in every direction.
            modes: components per class.
            generator: a cpu generator; None means torch's default one.

        >>> GaussianMixture.random(5, 2, modes=3).n_classes
        5
        """
        generator = check_generator(generator)
        means = separation * torch.randn(n_classes * modes, dim, generator=generator, dtype=torch.float64)
        return cls(means, variance, labels=torch.arange(n_classes).repeat_interleave(modes))

    @property
    def n_classes(self) -> int:
        """How many classes there are."""
        return int(self.labels.max()) + 1

    @property
    def dim(self) -> int:
        """Dimensions of a point."""
        return self.means.shape[1]

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw n points and their classes.

        Args:
            n: points.
            generator: a cpu generator; None means torch's default one.

        Returns:
            x (n, d), labels (n,) int64.
        """
        n, generator = check_positive_int(n, "n"), check_generator(generator)
        component = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.dim, generator=generator, dtype=torch.float64)
        x = self.means[component]
        for j in range(len(self.means)):
            chosen = component == j
            x[chosen] += noise[chosen] @ self._factor[j].T
        return x.to(torch.get_default_dtype()), self.labels[component]

    def component_log_prob(self, x: Any) -> Tensor:
        r"""Return $\log w_j + \log N(x; \mu_j, \Sigma_j)$ for each point and component.

        Args:
            x: (n, d).

        Returns:
            (n, m) float64.
        """
        x = as_tensor(x).to("cpu", torch.float64)
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"expected points of shape (n, {self.dim}), got {tuple(x.shape)}")
        log_probs = []
        for weight, mean, factor in zip(self.weights, self.means, self._factor):
            white = torch.linalg.solve_triangular(factor, (x - mean).T, upper=False)  # (d, n)
            log_det = factor.diagonal().log().sum()
            log_probs.append(
                weight.log() - log_det - 0.5 * white.square().sum(0) - 0.5 * self.dim * math.log(2 * math.pi)
            )
        return torch.stack(log_probs, 1)

    def log_prob(self, x: Any) -> Tensor:
        """Return the log density of each point: (n, d) -> (n,) float64."""
        return self.component_log_prob(x).logsumexp(1)

    def posterior(self, x: Any) -> Tensor:
        """Return the probability of each class given x: (n, d) -> (n, C) float64, by Bayes' rule."""
        components = self.component_log_prob(x).softmax(1)
        return torch.zeros(len(components), self.n_classes, dtype=torch.float64).index_add_(1, self.labels, components)

    def bayes_risk(self, n: int = 100_000, generator: torch.Generator | None = None) -> BayesRisk:
        r"""Return the error rate of the best possible classifier, $E[1 - \max_c p(c | x)]$.

        Two classes of one component each and one covariance have a closed form: with the distance
        $\Delta^2 = (\mu_1-\mu_0)^\top \Sigma^{-1} (\mu_1-\mu_0)$ and $t = \log(\pi_0/\pi_1)$ the risk is
        $\pi_0 \Phi(-\Delta/2 - t/\Delta) + \pi_1 \Phi(-\Delta/2 + t/\Delta)$. Anything else is a Monte Carlo mean of
        the exact posterior's error over n draws, with its standard error.

        Args:
            n: draws, where there is no closed form.
            generator: for the draws; None means torch's default one.

        Returns:
            `BayesRisk(risk, standard_error)`; the standard error is 0 for the closed form.
        """
        if self.n_classes == 1:
            return BayesRisk(0.0, 0.0)
        if len(self.means) == 2 and torch.equal(*self.covariances):
            order = self.labels.argsort()
            difference = (self.means[1] - self.means[0]).unsqueeze(1)
            delta = torch.linalg.solve_triangular(self._factor[0], difference, upper=False).norm()
            first, second = self.weights[order]
            if delta == 0:
                return BayesRisk(float(min(first, second)), 0.0)
            t = (first / second).log() / delta
            phi = torch.special.ndtr
            return BayesRisk(float(first * phi(-delta / 2 - t) + second * phi(-delta / 2 + t)), 0.0)
        x, _ = self.sample(n, generator)
        error = 1 - self.posterior(x).amax(1)
        return BayesRisk(float(error.mean()), float(error.std() / math.sqrt(n)))
