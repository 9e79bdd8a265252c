"""What robustness costs a rare class: two Gaussian or Cauchy classes, the best linear classifiers in closed form.

Public: `gaussian_robust_classifier`, `cauchy_robust_classifier`, `class_accuracies`, `accuracy_disparity`,
`robust_logistic`, and what they return: `LinearClassifier`, `ClassAccuracies`.

The model: y = +1 with probability `prior`, x given y is y mu plus noise; the classifier says sign(w x + b); an attacker
may move x by eps in the chosen norm. Robust classifiers are trained against the attacker and judged on clean data.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from companion.checks import as_tensor, check_binary, check_features, check_in_range

__all__ = [
    "ClassAccuracies",
    "LinearClassifier",
    "accuracy_disparity",
    "cauchy_robust_classifier",
    "class_accuracies",
    "gaussian_robust_classifier",
    "robust_logistic",
]


class LinearClassifier(NamedTuple):
    """sign(x w + b): weights (d,) and bias ()."""

    weights: Tensor
    bias: Tensor


class ClassAccuracies(NamedTuple):
    """Accuracy on the class +1 and on the class -1."""

    positive: Tensor
    negative: Tensor


def _mean(mu: Any) -> Tensor:
    mu = as_tensor(mu, "mu")
    if mu.dim() != 1 or not len(mu) or not torch.isfinite(mu).all():
        raise ValueError(f"expected a finite mean mu of shape (d,), got shape {tuple(mu.shape)}")
    return mu.detach().double()


def _covariance(sigma: Any, d: int, like: Tensor) -> Tensor:
    if sigma is None:
        return torch.eye(d, dtype=like.dtype, device=like.device)
    sigma = as_tensor(sigma, "covariance", like.device).detach().to(like.dtype)
    if sigma.shape != (d, d) or not torch.allclose(sigma, sigma.T):
        raise ValueError(f"expected a symmetric covariance ({d}, {d}), got shape {tuple(sigma.shape)}")
    if int(torch.linalg.cholesky_ex(sigma).info):
        raise ValueError("expected a positive definite covariance, got one that is not")
    return sigma


def _closest_shift(mu: Tensor, sigma: Tensor, eps: float, norm: str) -> Tensor:
    """Return the attack z, within the budget, that leaves the least of (mu - z)^T Sigma^-1 (mu - z)."""
    precision = torch.cholesky_inverse(torch.linalg.cholesky(sigma))
    if norm == "l2":
        values, vectors = torch.linalg.eigh(sigma)
        along = vectors.T @ mu
        if float(mu.norm()) <= eps:
            return mu.clone()
        # z = (P + m I)^-1 P mu with the multiplier m for which |z| = eps; |z| falls with m
        low, high = 0.0, float(mu.norm() / (eps * values.min())) if eps > 0 else math.inf
        if eps == 0:
            return torch.zeros_like(mu)
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if float((along / (1 + middle * values)).norm()) > eps else (low, middle)
        return vectors @ (along / (1 + high * values))
    z = mu.clamp(-eps, eps)
    for _ in range(
        10_000
    ):  # coordinate descent on a strictly convex function over a box; one sweep where P is diagonal
        before = z.clone()
        for j in range(len(mu)):
            z[j] = 0  # the best value of one coordinate, given the others
            pull = precision[j] @ (mu - z) / precision[j, j]
            z[j] = pull.clamp(-eps, eps)
        if float((z - before).abs().max()) <= 1e-12 * max(eps, 1e-300):
            break
    return z


def _scale(weights: Tensor, sigma: Tensor) -> Tensor:
    return (weights @ sigma @ weights).sqrt()


def gaussian_robust_classifier(
    mu: Any, covariance: Any = None, prior: float = 0.5, eps: float = 0.0, norm: str = "linf"
) -> LinearClassifier:
    r"""Return the linear classifier of least robust error for two Gaussian classes, in closed form.

    $$w = \Sigma^{-1}(\mu - z^*), \qquad b = \tfrac12 \log\frac{\pi}{1 - \pi}, \qquad
    z^* = \arg\min_{\lVert z \rVert \le \varepsilon} (\mu - z)^\top \Sigma^{-1} (\mu - z)$$

    The attacker takes from the mean what hurts most, and the best classifier is the usual one for the mean that is
    left. For isotropic noise and an l-infinity budget that mean is soft-thresholded:
    $w_j = \mathrm{sign}(\mu_j) \max(|\mu_j| - \varepsilon, 0)$. The bias keeps its size while w shrinks, and so the
    boundary moves towards the rare class.

    Args:
        mu: mean of the class +1, (d,); the class -1 has -mu.
        covariance: Sigma (d, d), of both classes; None: the identity.
        prior: probability of the class +1, in (0, 1).
        eps: the attacker's budget, at least 0; 0 gives the Bayes classifier.
        norm: "linf" or "l2", in which the budget is measured.

    Returns:
        `LinearClassifier(weights, bias)`, float64.

    Raises:
        ValueError: shapes, a prior or budget out of range, a budget that erases the whole mean.

    >>> gaussian_robust_classifier([1.0, 0.2], prior=0.8, eps=0.5).weights
    tensor([0.5000, 0.0000], dtype=torch.float64)

    Paper: hu2023understanding
    Chapter: shortcuts/subgroups
    """
    mu = _mean(mu)
    sigma = _covariance(covariance, len(mu), mu)
    prior = check_in_range(prior, "prior", 0, 1, inclusive="neither")
    eps = check_in_range(eps, "eps", 0)
    if norm not in ("linf", "l2"):
        raise ValueError(f"expected norm 'linf' or 'l2', got {norm!r}")
    left = mu - _closest_shift(mu, sigma, eps, norm)
    if float(left.abs().max()) <= 1e-12 * float(mu.abs().max()):
        raise ValueError(
            f"expected a budget that leaves something of the mean, got eps={eps}: no classifier resists it"
        )
    # with v = Sigma^-1 left, the log odds of the shifted classes are 2 v x + log(prior / (1 - prior))
    weights = torch.linalg.solve(sigma, left)
    return LinearClassifier(weights, mu.new_tensor(0.5 * math.log(prior / (1 - prior))))


def cauchy_robust_classifier(mu: Any, prior: float = 0.5, eps: float = 0.0) -> LinearClassifier:
    r"""Return the linear classifier of least robust error for independent standard Cauchy noise, l-infinity budget.

    A sum of Cauchy variables is Cauchy with the scales added, so that $w x$ has location $\pm w \mu$ and scale
    $\lVert w \rVert_1$: mixing coordinates never helps, and the best direction is the coordinate with the largest
    $|\mu_j|$. With $\delta = \max_j |\mu_j| - \varepsilon$ and $R = \pi / (1 - \pi)$, the bias solves
    $(R - 1) b^2 - 2 \delta (R + 1) b + (R - 1)(1 + \delta^2) = 0$. Where that has no root, or where the root is
    no better, the best classifier always answers with the frequent class: its bias is infinite.

    Args:
        mu: location of the class +1, (d,); the class -1 has -mu.
        prior: probability of the class +1, in (0, 1).
        eps: the attacker's budget, at least 0.

    Returns:
        `LinearClassifier(weights, bias)`, float64; the bias may be infinite.

    Raises:
        ValueError: shapes, a prior or budget out of range, a budget that erases the whole mean.

    >>> [cauchy_robust_classifier([2.0, 0.5], prior).bias.item() for prior in (0.5, 0.95)]
    [0.0, inf]

    Paper: hu2023understanding
    Chapter: shortcuts/subgroups
    """
    mu = _mean(mu)
    prior = check_in_range(prior, "prior", 0, 1, inclusive="neither")
    eps = check_in_range(eps, "eps", 0)
    best = mu.abs().argmax()
    delta = float(mu[best].abs()) - eps
    if delta <= 0:
        raise ValueError(
            f"expected a budget that leaves something of the mean, got eps={eps}: no classifier resists it"
        )
    weights = torch.zeros_like(mu)
    weights[best] = mu[best].sign()
    if prior == 0.5:
        return LinearClassifier(weights, mu.new_zeros(()))
    frequent = max(prior, 1 - prior)
    ratio = frequent / (1 - frequent)
    root = delta**2 * (ratio + 1) ** 2 - (ratio - 1) ** 2 * (1 + delta**2)
    bias = math.inf
    if root >= 0:
        # the smaller root, written so that it stays exact as the ratio goes to one
        inner = (ratio - 1) * (1 + delta**2) / (delta * (ratio + 1) + math.sqrt(root))
        error = frequent * _cauchy_cdf(-delta - inner) + (1 - frequent) * _cauchy_cdf(inner - delta)
        if error < 1 - frequent:
            bias = inner
    return LinearClassifier(weights, mu.new_tensor(bias if prior > 0.5 else -bias))


def _cauchy_cdf(t: float) -> float:
    return 0.5 + math.atan(t) / math.pi


def class_accuracies(
    classifier: tuple[Any, Any], mu: Any, covariance: Any = None, dist: str = "gaussian"
) -> ClassAccuracies:
    r"""Return the clean accuracy of a linear classifier on each of the two classes, in closed form.

    $$P(\text{right} \mid y = \pm 1) = F\big((w^\top \mu \pm b) / s\big)$$

    with the normal distribution function and $s^2 = w^\top \Sigma w$, or Cauchy's and $s = \lVert w \rVert_1$.

    Args:
        classifier: (weights (d,), bias).
        mu: mean (or location) of the class +1, (d,).
        covariance: Sigma (d, d), Gaussian only; None: the identity.
        dist: "gaussian" or "cauchy" (independent, scale 1).

    Raises:
        ValueError: an unknown dist, shapes that do not fit.

    >>> class_accuracies(([1.0], 0.0), [0.0])
    ClassAccuracies(positive=tensor(0.5000, dtype=torch.float64), negative=tensor(0.5000, dtype=torch.float64))

    Paper: hu2023understanding
    Chapter: shortcuts/subgroups
    """
    mu = _mean(mu)
    weights = as_tensor(classifier[0], "weights", mu.device).detach().double()
    bias = as_tensor(classifier[1], "bias", mu.device).detach().double()
    if weights.shape != mu.shape or bias.numel() != 1:
        raise ValueError(f"expected weights {tuple(mu.shape)} and one bias, got shape {tuple(weights.shape)}")
    margin, bias = weights @ mu, bias.reshape(())
    if dist == "gaussian":
        scale = _scale(weights, _covariance(covariance, len(mu), mu))
        return ClassAccuracies(torch.special.ndtr((margin + bias) / scale), torch.special.ndtr((margin - bias) / scale))
    if dist == "cauchy" and covariance is None:
        scale = weights.abs().sum()
        right, left = (margin + bias) / scale, (margin - bias) / scale
        return ClassAccuracies(0.5 + right.atan() / math.pi, 0.5 + left.atan() / math.pi)
    raise ValueError(f"expected dist 'gaussian', or 'cauchy' without a covariance, got {dist!r}")


def accuracy_disparity(
    ratio: float, eps: float, mu: Any, covariance: Any = None, dist: str = "gaussian", norm: str = "linf"
) -> Tensor:
    r"""Return how much more accurate the best robust linear classifier is on the frequent class, on clean data.

    $$\mathrm{Acc}_{\text{frequent}} - \mathrm{Acc}_{\text{rare}}, \qquad R = \pi / (1 - \pi)$$

    Args:
        ratio: R, how many samples of the frequent class there are for one of the rare class; at least 1.
        eps: the attacker's budget in training.
        mu: mean (or location) of the frequent class, (d,).
        covariance: Sigma (d, d), Gaussian only; None: the identity.
        dist: "gaussian" or "cauchy" (independent, scale 1; l-infinity only).
        norm: "linf" or "l2".

    Returns:
        A float64 scalar in [0, 1].

    Raises:
        ValueError: as the functions it combines; a ratio below 1.

    >>> [round(accuracy_disparity(5.0, eps, [1.0, 0.3]).item(), 3) for eps in (0.0, 0.2, 0.4)]
    [0.358, 0.466, 0.624]

    Paper: hu2023understanding
    Chapter: shortcuts/subgroups
    """
    prior = check_in_range(ratio, "ratio", 1) / (1 + ratio)
    if dist == "cauchy" and covariance is None and norm == "linf":
        classifier = cauchy_robust_classifier(mu, prior, eps)
    elif dist == "gaussian":
        classifier = gaussian_robust_classifier(mu, covariance, prior, eps, norm)
    else:
        raise ValueError(f"expected dist 'gaussian', or 'cauchy' with norm 'linf' and no covariance, got {dist!r}")
    positive, negative = class_accuracies(classifier, mu, covariance, dist)
    return positive - negative


def robust_logistic(x: Any, y: Any, eps: float = 0.0, norm: str = "linf", steps: int = 200) -> LinearClassifier:
    r"""Return the linear classifier of least adversarial logistic loss on samples.

    $$\min_{w, b} \frac1n \sum_i \log\big(1 + \exp(-(y_i (w^\top x_i + b) - \varepsilon \lVert w \rVert_*))\big)$$

    The inner maximum over the attacker is exact: he takes $\varepsilon \lVert w \rVert_*$ from every margin, with the
    dual norm (l1 for an l-infinity budget). The problem is convex; w is written as a difference of two vectors that
    are at least 0 where the norm has corners.

    Args:
        x: (n, d).
        y: (n,) labels, 0 or 1; 1 is the class +1.
        eps: the attacker's budget, at least 0.
        norm: "linf" or "l2", in which the budget is measured.
        steps: of the solver.

    Returns:
        `LinearClassifier(weights, bias)`, float64.

    Raises:
        ValueError: shapes, one class only, a budget below 0, an unknown norm.

    >>> x = torch.tensor([[-2.0], [-1.0], [0.5], [-0.5], [1.0], [2.0]])
    >>> robust_logistic(x, [0, 0, 0, 1, 1, 1]).bias.abs().item() < 1e-3
    True

    Paper: hu2023understanding
    Chapter: shortcuts/subgroups
    """
    from scipy.optimize import minimize  # only here, because it is slow to import

    x = check_features(x, min_samples=2).detach().double()
    positive = check_binary(y, n=len(x), device=x.device)
    if bool(positive.all()) or not bool(positive.any()):
        raise ValueError("expected labels of both classes, got one only")
    eps = check_in_range(eps, "eps", 0)
    if norm not in ("linf", "l2"):
        raise ValueError(f"expected norm 'linf' or 'l2', got {norm!r}")
    sign = positive.double() * 2 - 1
    d = x.shape[1]

    def weights_of(theta: Tensor) -> Tensor:
        return theta[:d] - theta[d : 2 * d] if norm == "linf" else theta[:d]

    def loss(array: Any) -> tuple[float, Any]:
        theta = torch.tensor(array, dtype=x.dtype, device=x.device, requires_grad=True)
        with torch.enable_grad():
            w = weights_of(theta)
            size = theta[: 2 * d].sum() if norm == "linf" else (w.square().sum() + 1e-18).sqrt()
            value = F.softplus(-(sign * (x @ w + theta[-1]) - eps * size)).mean()
        value.backward()
        return value.item(), theta.grad.cpu().numpy()

    parts = 2 if norm == "linf" else 1
    bounds = [(0 if norm == "linf" else None, None)] * (parts * d) + [(None, None)]
    start = torch.full((parts * d + 1,), 1e-2, dtype=torch.float64).numpy()
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": steps, "ftol": 1e-12})
    theta = torch.tensor(found.x, dtype=x.dtype, device=x.device)
    return LinearClassifier(weights_of(theta), theta[-1])
