"""Where the features of mixed samples settle: along the boundary between two classes, not on the chord.

Public: `mixup_ufm_features` solves for them, `channel_curve` says how far they run, `channel_projection` shows it.
"""

import math
from typing import Any

import numpy as np
import torch
from scipy.special import lambertw
from torch import Tensor

from companion.checks import as_tensor, check_features, check_in_range, check_positive_int

__all__ = ["channel_curve", "channel_projection", "mixup_ufm_features"]


def mixup_ufm_features(
    weight: Any, lam: Any, i: int, j: int, weight_decay: float, *, loss: str = "ce", max_iter: int = 200
) -> Tensor:
    r"""Return the free features that are best for mixed labels, with the classifier fixed.

    $$ h(\lambda) = \arg\min_h\; \ell\big(Wh,\; \lambda e_i + (1-\lambda)e_j\big) + \tfrac{\mu}{2}\lVert h\rVert^2 , $$

    with cross-entropy (damped Newton in float64) or squared error $\tfrac12\lVert\cdot\rVert^2$ (linear in the label,
    so that features of mixtures lie on the chord between those of the classes). Under cross-entropy the gap between the
    two logits tends to $\log\frac{\lambda}{1-\lambda}$ as $\mu \to 0$, while every other logit falls without bound: the
    features leave the chord and run out along the decision boundary.

    Args:
        weight: classifier W, (C, d).
        lam: label weights of class i, (m,) in [0, 1].
        i: first class.
        j: second class.
        weight_decay: mu, above 0.
        loss: "ce" or "mse".
        max_iter: of Newton's method.

    Returns:
        Features (m, d) in float64.

    Raises:
        ValueError: classes, lam or weight decay out of range, or an unknown loss.

    >>> weight = torch.tensor([[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]])
    >>> z = mixup_ufm_features(weight, [0.7], 0, 1, weight_decay=1e-4) @ weight.double().T
    >>> round(float(z[0, 0] - z[0, 1]), 2)
    0.85

    Paper: fisher2024pushing
    Chapter: mixup/mixup-geometry
    """
    weight = check_features(weight, "weight", min_samples=2).double()
    lam = as_tensor(lam, "lam").to(weight).flatten()
    if len(lam) == 0 or not bool(((lam >= 0) & (lam <= 1)).all()):
        raise ValueError("expected lam between 0 and 1")
    _check_pair(i, j, len(weight))
    if check_in_range(weight_decay, "weight_decay", low=0) == 0:
        raise ValueError("expected weight_decay above 0, got 0: without it the features run away")
    target = torch.zeros(len(lam), len(weight), dtype=weight.dtype, device=weight.device)
    target[:, i], target[:, j] = lam, 1 - lam
    ridge = weight_decay * torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    if loss == "mse":
        return torch.linalg.solve(weight.T @ weight + ridge, (target @ weight).T).T
    if loss != "ce":
        raise ValueError(f"expected loss 'ce' or 'mse', got {loss!r}")

    def objective(h: Tensor) -> Tensor:
        return -(target * (h @ weight.T).log_softmax(1)).sum(1) + weight_decay / 2 * (h**2).sum(1)

    h = target @ weight
    for _ in range(max_iter):
        p = (h @ weight.T).softmax(1)
        gradient = (p - target) @ weight + weight_decay * h  # (m, d)
        if float(gradient.norm(dim=1).max()) < 1e-12:
            break
        curvature = torch.einsum("mc,cd,ce->mde", p, weight, weight)
        mean = p @ weight
        hessian = curvature - mean[:, :, None] * mean[:, None] + ridge
        step = torch.linalg.solve(hessian, gradient)
        size = torch.ones(len(lam), 1, dtype=h.dtype, device=h.device)
        for _ in range(30):  # halve until every row improves: far from the optimum Newton overshoots
            worse = objective(h - size * step) > objective(h) + 1e-12  # rounding must not stop the last steps
            if not bool(worse.any()):
                break
            size = torch.where(worse[:, None], size / 2, size)
        h = h - size * step
    return h


def channel_curve(lam: Any, n_classes: int, weight_decay: float) -> Tensor:
    r"""Return where mixtures of two classes settle when the classifier is a simplex with rows of length one.

    Setting the gradient to zero gives logits that are proportional to the residuals, $z = \kappa\,(t - p)$ with
    $\kappa = \frac{C}{(C-1)\mu}$. For small $\mu$ the coordinates across and along the boundary are then

    $$ x = \sqrt{\tfrac{C-1}{2C}}\,\log\tfrac{\lambda}{1-\lambda}, \qquad
       y = \tfrac{\sqrt{2(C-1)(C-2)}}{C}\,\omega\Big(\tfrac{\kappa C}{2}\sqrt{\lambda(1-\lambda)}\Big), $$

    with Lambert's function: $\omega(s)$ solves $\omega e^\omega = s$ and grows like a logarithm. The exact minimum,
    at the ends of the curve too, is what `mixup_ufm_features` finds.

    Args:
        lam: shares of the first class, (m,) strictly between 0 and 1.
        n_classes: C, at least 3: with two there is nothing to run away from.
        weight_decay: mu, above 0.

    Returns:
        (m, 2) in float64: across, along, as `channel_projection` has them.

    Raises:
        ValueError: lam, classes or weight decay out of range.

    >>> channel_curve([0.5], n_classes=3, weight_decay=1e-2)
    tensor([[0.0000, 2.3179]], dtype=torch.float64)

    Paper: fisher2024pushing
    Chapter: mixup/mixup-geometry
    """
    lam = as_tensor(lam, "lam").detach().double().flatten()
    if len(lam) == 0 or not bool(((lam > 0) & (lam < 1)).all()):
        raise ValueError("expected lam strictly between 0 and 1: the curve has no ends")
    n = check_positive_int(n_classes, "n_classes", minimum=3)
    kappa = n / ((n - 1) * check_in_range(weight_decay, "weight_decay", low=0, inclusive="neither"))
    across = math.sqrt((n - 1) / (2 * n)) * torch.logit(lam)
    depth = lambertw((kappa * n / 2 * (lam * (1 - lam)).sqrt()).cpu().numpy()).real
    along = math.sqrt(2 * (n - 1) * (n - 2)) / n * torch.from_numpy(np.asarray(depth)).to(lam)
    return torch.stack([across, along], 1)


def channel_projection(features: Any, weight: Any, i: int, j: int) -> Tensor:
    r"""Return features in the plane of two classifier rows: across the boundary between i and j, and along it.

    The axes are $w_i - w_j$ and the part of $w_i + w_j$ orthogonal to it, both of unit length.

    Args:
        features: (n, d).
        weight: classifier (C, d).
        i: first class; it lies at positive first coordinates.
        j: second class.

    Returns:
        (n, 2).

    Raises:
        ValueError: shapes that do not fit, equal classes, or opposite rows, which span no plane.

    >>> channel_projection([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]], 0, 1)
    tensor([[ 0.7071,  0.7071],
            [-0.7071,  0.7071]])

    Paper: fisher2024pushing
    Chapter: mixup/mixup-geometry
    """
    features, weight = check_features(features, "features"), check_features(weight, "weight", min_samples=2)
    if features.shape[1] != weight.shape[1]:
        raise ValueError(f"expected weight (C, {features.shape[1]}), got {tuple(weight.shape)}")
    _check_pair(i, j, len(weight))
    across, along = weight[i] - weight[j], weight[i] + weight[j]
    if float(across.norm()) == 0:
        raise ValueError(f"expected two different rows of the classifier, got rows {i} and {j}, which are equal")
    across = across / across.norm()
    along = along - (along @ across) * across
    if float(along.norm()) <= 1e-6 * float(weight.norm()):
        raise ValueError(f"expected rows that span a plane, got opposite rows {i} and {j}")
    return features @ torch.stack([across, along / along.norm()], 1).to(features)


def _check_pair(i: int, j: int, n_classes: int) -> None:
    if i == j or not (0 <= i < n_classes and 0 <= j < n_classes):
        raise ValueError(f"expected two different classes below {n_classes}, got {i} and {j}")
