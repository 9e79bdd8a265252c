"""Classes as subspaces instead of vectors, and the optimizer that keeps them orthonormal.

Public: `GrassmannHead`, `RiemannianSGD`, `grassmann_exp`, `grassmann_distance`, `intra_class_variability`.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion.checks import (
    as_tensor,
    check_features,
    check_generator,
    check_in_range,
    check_labels,
    check_positive_int,
)
from companion.geometry import class_means, random_orthonormal, subspace_angles

__all__ = ["GrassmannHead", "RiemannianSGD", "grassmann_distance", "grassmann_exp", "intra_class_variability"]


class GrassmannHead(nn.Module):
    r"""A last layer that gives every class a k-dimensional subspace: the logit is the length of the projection.

    $$z_c = \gamma\,\Big\lVert S_c^\top \frac{h}{\lVert h \rVert} \Big\rVert, \qquad S_c^\top S_c = I_k$$

    A feature may move inside the subspace of its class without changing its logit: turning the basis,
    $S_c \to S_c Q$, changes nothing either. With k = 1 a class is a line through the origin (h and -h agree).
    Train `weight` with `RiemannianSGD`: under any other optimizer its columns grow and the logits with them.

    Args:
        dim: d.
        n_classes: C, at least 2.
        k: dimension of each subspace, at most d.
        gamma: the largest logit, above 0.
        generator: draws the subspaces, uniformly; a seed will do, None uses torch's default generator.

    Raises:
        ValueError: sizes below one, k above d, gamma of at most 0.

    >>> head = GrassmannHead(8, n_classes=3, k=2, generator=torch.Generator().manual_seed(0))
    >>> inside = head.weight[1] @ torch.tensor([0.6, 0.8])  # a direction in the subspace of class 1
    >>> round(head(inside[None])[0, 1].item(), 4), head(inside[None]).argmax().item()
    (25.0, 1)

    Paper: wang2023get
    Chapter: collapse/fixed-classifiers
    """

    def __init__(
        self,
        dim: int,
        n_classes: int,
        k: int = 8,
        gamma: float = 25.0,
        *,
        generator: torch.Generator | int | None = None,
    ) -> None:
        super().__init__()
        check_positive_int(n_classes, "n_classes", minimum=2)
        generator = check_generator(generator)
        frames = [random_orthonormal(dim, k, generator=generator) for _ in range(n_classes)]
        self.weight = nn.Parameter(torch.stack(frames))  # (C, d, k)
        self.gamma = check_in_range(gamma, "gamma", 0, inclusive="neither")

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits (n, C) of features (n, d)."""
        n_classes, dim, k = self.weight.shape
        if features.shape[-1] != dim:
            raise ValueError(f"expected features of {dim} dimensions, got {features.shape[-1]}")
        columns = self.weight.transpose(0, 1).reshape(dim, n_classes * k)  # one product for all classes
        along = F.normalize(features, dim=-1) @ columns
        return self.gamma * torch.linalg.vector_norm(along.unflatten(-1, (n_classes, k)), dim=-1)

    def extra_repr(self) -> str:
        """Say the sizes where the module is printed."""
        return f"classes, dim, k = {tuple(self.weight.shape)}, gamma={self.gamma:g}"


def _tangent(s: Tensor, g: Tensor) -> Tensor:
    return g - s @ (s.mT @ g)


def grassmann_exp(s: Any, direction: Any) -> Tensor:
    r"""Follow the geodesic from a subspace in a tangent direction for unit time.

    With the thin singular value decomposition $\Delta = U \Sigma V^\top$ of the direction,

    $$\exp_S(\Delta) = S\,V \cos(\Sigma)\,V^\top + U \sin(\Sigma)\,V^\top$$

    Args:
        s: orthonormal columns (..., d, k).
        direction: tangent, $S^\top \Delta = 0$, (..., d, k); a part along S is taken off first.

    Returns:
        Orthonormal columns (..., d, k); the principal angles to S are the singular values, up to pi/2.

    Raises:
        ValueError: shapes that differ.

    >>> grassmann_exp([[1.0], [0.0]], [[0.0], [torch.pi / 2]]).round(decimals=3)
    tensor([[-0.],
            [1.]])

    Paper: wang2023get
    Chapter: collapse/fixed-classifiers
    """
    s, direction = as_tensor(s, "s"), as_tensor(direction, "direction")
    if s.shape != direction.shape or s.dim() < 2:
        raise ValueError(
            f"expected s and direction of the same shape (..., d, k), got {tuple(s.shape)} and {tuple(direction.shape)}"
        )
    u, sigma, vt = torch.linalg.svd(_tangent(s, direction), full_matrices=False)
    end = ((s @ vt.mT) * sigma.cos()[..., None, :] + u * sigma.sin()[..., None, :]) @ vt
    return _orthonormal(end)


def _orthonormal(s: Tensor) -> Tensor:
    """Take off the rounding: one Newton step towards the closest orthonormal columns, quadratic in the error."""
    return 1.5 * s - 0.5 * s @ (s.mT @ s)


def _qr(s: Tensor, direction: Tensor) -> Tensor:
    q, r = torch.linalg.qr(s + direction)
    # qr may flip columns; with the signs of r's diagonal a step of zero stays where it is
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    return _orthonormal(q * signs[..., None, :])


_RETRACTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"exp": grassmann_exp, "qr": _qr}


class RiemannianSGD(torch.optim.Optimizer):
    r"""Gradient descent with momentum for parameters that are subspaces, next to those that are not.

    For a parameter S of shape (..., d, k) with orthonormal columns and the gradient G of the loss:

    $$R = (I - S S^\top)\,G, \qquad B \leftarrow \mu B + R, \qquad S' = \mathrm{retract}_S(-\eta B), \qquad
    B \leftarrow (I - S' S'^\top)\,B$$

    The last line carries the momentum to the tangent space at the new point. Columns stay orthonormal to rounding.
    Parameter groups with `manifold="euclidean"` get plain SGD with momentum, as in `torch.optim.SGD`, so that one
    optimizer trains subspaces and backbone together:

        RiemannianSGD([{"params": head.parameters()},
                       {"params": body.parameters(), "manifold": "euclidean"}], lr=0.1)

    Args:
        params: parameters, or groups of them with settings of their own.
        lr: eta, at least 0.
        momentum: mu, in [0, 1).
        weight_decay: for euclidean groups; a subspace has no length to decay.
        manifold: "grassmann" or "euclidean".
        retraction: "exp" follows the geodesic, `grassmann_exp`; "qr" agrees with it to second order and is cheaper.

    Raises:
        ValueError: a setting out of range, an unknown name, or a grassmann parameter whose columns are not orthonormal.

    >>> s = nn.Parameter(torch.eye(3)[:, :1])  # a line, and a target direction
    >>> optimizer, target = RiemannianSGD([s], lr=0.5), torch.tensor([[0.6], [0.8], [0.0]])
    >>> for _ in range(50):
    ...     optimizer.zero_grad()
    ...     (-(s.mT @ target).square().sum()).backward()
    ...     optimizer.step()
    >>> s.detach().flatten().round(decimals=3)
    tensor([0.6000, 0.8000, 0.0000])

    Paper: wang2023get
    Chapter: collapse/fixed-classifiers
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        manifold: str = "grassmann",
        retraction: str = "exp",
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "manifold": manifold,
                "retraction": retraction,
            },
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own, checked as in the constructor."""
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @staticmethod
    def _check(group: dict[str, Any]) -> None:
        check_in_range(group["lr"], "lr", 0)
        check_in_range(group["momentum"], "momentum", 0, 1, inclusive="low")
        check_in_range(group["weight_decay"], "weight_decay", 0)
        if group["manifold"] not in ("grassmann", "euclidean"):
            raise ValueError(f"expected manifold 'grassmann' or 'euclidean', got {group['manifold']!r}")
        if group["retraction"] not in _RETRACTIONS:
            raise ValueError(f"expected retraction among {sorted(_RETRACTIONS)}, got {group['retraction']!r}")
        if group["manifold"] == "euclidean":
            return
        for p in group["params"]:
            if p.dim() < 2 or p.shape[-2] < p.shape[-1]:
                raise ValueError(f"expected columns (..., d, k) with k at most d, got shape {tuple(p.shape)}")
            gram = p.detach().mT @ p.detach()
            off = (gram - torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)).abs().amax()
            if not off < 1e-3:
                raise ValueError(f"expected orthonormal columns, got S^T S off the identity by {off.item():.2g}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step and return the loss of the closure, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            move = self._move if group["manifold"] == "grassmann" else self._shift
            for p in group["params"]:
                if p.grad is not None:
                    move(p, p.grad, group)
        return loss

    def _momentum(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        if not group["momentum"]:
            return gradient
        state = self.state[p]
        if "momentum_buffer" in state:
            state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        else:
            state["momentum_buffer"] = gradient.clone()
        return state["momentum_buffer"]

    def _shift(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if group["weight_decay"]:
            gradient = gradient + group["weight_decay"] * p
        p.sub_(self._momentum(p, gradient, group), alpha=group["lr"])

    def _move(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        step = self._momentum(p, _tangent(p, gradient), group)
        p.copy_(_RETRACTIONS[group["retraction"]](p, -group["lr"] * step))
        if "momentum_buffer" in self.state[p]:
            step.copy_(_tangent(p, step))


def grassmann_distance(a: Any, b: Any) -> Tensor:
    r"""Return the geodesic distance of two subspaces, $\sqrt{\sum_i \theta_i^2}$ over their principal angles.

    Args:
        a: (d, k), columns that span the first.
        b: (d, k), columns that span the second; both of the same rank.

    Returns:
        A scalar between 0 and $\sqrt{k}\,\pi/2$.

    Raises:
        ValueError: different shapes, a matrix of zeros, NaN or infinity.

    >>> round(grassmann_distance(torch.eye(3)[:, :2], torch.eye(3)[:, 1:]).item(), 4)  # one right angle
    1.5708

    Paper: wang2023get
    Chapter: collapse/fixed-classifiers
    """
    a, b = check_features(a, "a"), check_features(b, "b")
    if a.shape != b.shape:
        raise ValueError(f"expected subspaces of the same dimension, got shapes {tuple(a.shape)} and {tuple(b.shape)}")
    return torch.linalg.vector_norm(subspace_angles(a, b))


def intra_class_variability(features: Any, labels: Any) -> Tensor:
    r"""Return how much the directions of features vary inside their classes.

    $$\frac1C \sum_c \frac{1}{n_c} \sum_{i:\,y_i = c} \Big\lVert \frac{h_i}{\lVert h_i \rVert} - \mu_c \Big\rVert^2 =
    1 - \frac1C \sum_c \lVert \mu_c \rVert^2$$

    where $\mu_c$ is the mean direction of class c: 0 when a class is one ray, 1 when its directions cancel.

    Args:
        features: h, (n, d), rows that are not zero.
        labels: y, (n,).

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: shapes that do not match, a row of zeros.

    >>> intra_class_variability([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, -1.0]], [0, 0, 1, 1])
    tensor(0.5000)

    Paper: wang2023get
    Chapter: collapse/fixed-classifiers
    """
    features = check_features(features, "features")
    labels = check_labels(labels, len(features)).to(features.device)
    norms = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    if (norms == 0).any():
        raise ValueError("expected features with a direction, got a row of zeros")
    means, counts = class_means(features / norms, labels)
    return 1 - means[counts > 0].square().sum(1).mean()
