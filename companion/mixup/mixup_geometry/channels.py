"""Where the features of mixed samples settle: along the boundary between two classes, not on the chord.

Public: `mixup_ufm_features`, `channel_projection`.
"""

from typing import Any

import torch
from torch import Tensor

from companion.checks import as_tensor, check_features, check_in_range

__all__ = ["channel_projection", "mixup_ufm_features"]


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
    if i == j or not (0 <= i < len(weight) and 0 <= j < len(weight)):
        raise ValueError(f"expected two different classes below {len(weight)}, got {i} and {j}")
    if check_in_range(weight_decay, "weight_decay", low=0) == 0:
        raise ValueError("expected weight_decay above 0: without it the features run away")
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
            worse = objective(h - size * step) > objective(h)
            if not bool(worse.any()):
                break
            size = torch.where(worse[:, None], size / 2, size)
        h = h - size * step
    return h


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
    across, along = weight[i] - weight[j], weight[i] + weight[j]
    if float(across.norm()) == 0:
        raise ValueError(f"expected two different rows of the classifier, got rows {i} and {j}, which are equal")
    across = across / across.norm()
    along = along - (along @ across) * across
    if float(along.norm()) <= 1e-6 * float(weight.norm()):
        raise ValueError(f"expected rows that span a plane, got opposite rows {i} and {j}")
    return features @ torch.stack([across, along / along.norm()], 1).to(features)
