"""Features as free variables: what the last layer and the loss ask of features when nothing else holds them back.

Public: `UnconstrainedFeatureModel` (minimise by L-BFGS), `gof_solution` (the same minimum in closed form),
`FrameSolution`, and the tethered model, in which features may move only at a price: `tethered_features`,
`central_path_weight`, `central_path_flow`.

Throughout, with N samples of which n_k belong to class k, features h_i in the rows of H (N, d), a linear classifier W
(C, d) and one-hot targets Y (N, C), the loss is

    1/(2N) ||H W^T + 1 b^T - Y||^2 + lam_w/2 ||W||^2 + lam_h/2 ||H||^2.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion.checks import as_tensor, check_features, check_in_range, check_labels, check_positive_int

__all__ = [
    "FrameSolution",
    "UnconstrainedFeatureModel",
    "central_path_flow",
    "central_path_weight",
    "gof_solution",
    "tethered_features",
]


class FrameSolution(NamedTuple):
    """The closed-form minimum that `gof_solution` returns.

    Attributes:
        strength: how much of its target each class reaches, w_k . h_k: (C,), between 0 and 1.
        weight_norms: length of each row of the classifier: (C,).
        feature_norms: length of each class's feature: (C,).
        weight: classifier (C, d), up to a rotation of the feature space.
        means: class features (C, d), in the same coordinates.
        bias: (C,), zero for a model without one.
        collapsed: the classes whose feature is zero: (C,) bool.
        loss: the value of the objective at the minimum.
    """

    strength: Tensor
    weight_norms: Tensor
    feature_norms: Tensor
    weight: Tensor
    means: Tensor
    bias: Tensor
    collapsed: Tensor
    loss: Tensor


def _check_counts(counts: Any) -> Tensor:
    counts = as_tensor(counts, "counts")
    if counts.dim() != 1 or len(counts) < 2:
        raise ValueError(f"expected counts of at least two classes, (C,), got shape {tuple(counts.shape)}")
    if not bool((counts > 0).all()):
        raise ValueError(f"expected every class to have samples, got counts {counts.tolist()}")
    return counts.double()


def gof_solution(
    counts: Any,
    lam_w: float | Sequence[float],
    lam_h: float,
    *,
    dim: int | None = None,
    bias: bool = False,
) -> FrameSolution:
    r"""Minimise the unconstrained-feature loss in closed form, for any class counts and any number of linear layers.

    All samples of a class share one feature, so with $\tilde h_k = \sqrt{n_k}\,h_k$ the problem is to approximate
    $\mathrm{diag}(\sqrt{n_k})$ (with a free bias: its part orthogonal to $\sqrt n$) by $Z = W\tilde H$ at the price
    $\sqrt{\lambda_W\lambda_H}\,\lVert Z\rVert_*$: every singular value is lowered by $N\sqrt{\lambda_W\lambda_H}$,
    and vanishes when it is smaller than that. Without a bias the singular vectors are the classes themselves, which
    makes the class features orthogonal, a general orthogonal frame:

    $$ s_k = \max\Big(0,\; 1 - N\sqrt{\lambda_W\lambda_H/n_k}\Big), \quad
       \lVert w_k\rVert^2 = s_k\sqrt{n_k\lambda_H/\lambda_W}, \quad
       \lVert h_k\rVert^2 = s_k\sqrt{\lambda_W/(n_k\lambda_H)} . $$

    A class dies when $n_k \le N^2\lambda_W\lambda_H$: minority collapse. With a bias and equal counts the frame is a
    simplex. With M linear layers the price of a singular value z is $\tfrac{m}{2}(\prod\lambda)^{1/m} z^{2/m}$ with
    m = M + 1 factors; its scalar problem is solved numerically, and zero wins when it is the cheaper of the two.

    Args:
        counts: samples per class, (C,).
        lam_w: weight decay of the classifier, or of each of M linear layers.
        lam_h: weight decay of the features, per sample.
        dim: width of the features (of all hidden layers); default C. Below C, only the strongest directions fit.
        bias: whether there is a bias without weight decay. The formula for s_k above is for False.

    Returns:
        A `FrameSolution` in float64; `weight` is the product of all layers.

    Raises:
        ValueError: a count or a weight decay that is not positive.

    >>> solution = gof_solution([100, 40, 10, 2], lam_w=3e-3, lam_h=3e-3)
    >>> [round(float(s), 4) for s in solution.strength]
    [0.9544, 0.9279, 0.8558, 0.6776]

    Paper: dang2023neural
    Chapter: collapse/neural-collapse
    """
    counts = _check_counts(counts)
    layers = [float(lam_w)] if isinstance(lam_w, int | float) else [float(v) for v in lam_w]
    for value, name in [(v, "lam_w") for v in layers] + [(float(lam_h), "lam_h")]:
        if check_in_range(value, name, low=0) == 0:
            raise ValueError(f"expected {name} above 0: without weight decay the features grow without bound")
    n_classes, total = len(counts), float(counts.sum())
    dim = n_classes if dim is None else check_positive_int(dim, "dim")

    target = counts.sqrt().diag()  # (C, C): row = output, column = class
    if bias:
        q = (counts / total).sqrt()
        target = target - (target @ q).outer(q)
    left, values, right = torch.linalg.svd(target)
    z = _shrink(values, total, [*layers, float(lam_h)])
    z[dim:] = 0

    price = (math.prod(layers) * lam_h) ** (1 / (len(layers) + 1))
    share = price * z ** (2 / (len(layers) + 1))  # what each factor pays for a singular value, lam_j sigma_j^2
    feature_scale = (share / lam_h).sqrt()
    weight_scale = torch.where(z > 0, z / feature_scale, torch.zeros_like(z))
    width = max(dim, n_classes)
    weight = F.pad(left * weight_scale, (0, width - n_classes))[:, :dim]
    means = F.pad(right.T * feature_scale, (0, width - n_classes))[:, :dim] / counts.sqrt()[:, None]
    offset = counts / total - weight @ (counts / total @ means) if bias else torch.zeros_like(counts)

    outputs = means @ weight.T + offset  # (C, C): row = class
    residual = ((outputs - torch.eye(n_classes, dtype=outputs.dtype)) ** 2).sum(1)
    loss = (counts * residual).sum() / (2 * total) + (len(layers) + 1) / 2 * share.sum()
    return FrameSolution(
        strength=(means * weight).sum(1),
        weight_norms=weight.norm(dim=1),
        feature_norms=means.norm(dim=1),
        weight=weight,
        means=means,
        bias=offset,
        collapsed=means.norm(dim=1) < 1e-9,
        loss=loss,
    )


def _shrink(values: Tensor, total: float, lams: Sequence[float]) -> Tensor:
    """Return the z >= 0 that minimises (z - value)^2 / (2 N) + m/2 (prod lam)^(1/m) z^(2/m), for every value."""
    m = len(lams)
    threshold = total * math.prod(lams) ** (1 / m)
    if m == 2:
        return (values - threshold).clamp(min=0)
    # The derivative, times N, is z - value + threshold z^(2/m - 1): convex in z, so Newton from the right meets its
    # larger root, which is a minimum; it does not exist when the derivative never falls to zero.
    power = 2 / m - 1
    lowest = (threshold * -power) ** (1 / (1 - power))
    z = values.clone()
    exists = lowest - values + threshold * lowest**power < 0
    for _ in range(60):
        step = (z - values + threshold * z**power) / (1 + threshold * power * z ** (power - 1))
        z = torch.where(exists, z - step, z).clamp(min=lowest)
    alive = (z - values) ** 2 / 2 + threshold * m / 2 * z ** (2 / m) < values**2 / 2
    return torch.where(exists & alive, z, torch.zeros_like(z))


class UnconstrainedFeatureModel(nn.Module):
    r"""A linear classifier, or a stack of linear layers, whose input features are free parameters.

    $$ \tfrac{1}{2N}\lVert H W_1^\top\cdots W_M^\top + 1 b^\top - Y\rVert^2
       + \tfrac12\sum_j \lambda_W\lVert W_j\rVert^2 + \tfrac{\lambda_H}{2}\lVert H\rVert^2 $$

    or the same with cross-entropy in place of the squared error.

    Args:
        counts: samples per class, (C,).
        dim: width of the features and of all hidden layers.
        lam_w: weight decay of every layer.
        lam_h: weight decay of the features, per sample.
        bias: whether there is a bias, which has no weight decay.
        n_layers: M, the number of linear layers after the features.
        loss: "mse" or "cross_entropy".
        seed: of the initial values.

    Raises:
        ValueError: counts, sizes or weight decays out of range, or an unknown loss.

    >>> model = UnconstrainedFeatureModel([30, 10], dim=4, lam_w=1e-2, lam_h=1e-2, seed=0).minimise()
    >>> closed = gof_solution([30, 10], lam_w=1e-2, lam_h=1e-2)
    >>> bool(abs(model.loss() - closed.loss) < 1e-8)
    True

    Paper: dang2023neural
    Chapter: collapse/neural-collapse
    """

    def __init__(
        self,
        counts: Any,
        dim: int,
        lam_w: float,
        lam_h: float,
        *,
        bias: bool = False,
        n_layers: int = 1,
        loss: str = "mse",
        seed: int = 0,
    ):
        super().__init__()
        counts = _check_counts(counts)
        if not torch.equal(counts, counts.round()):
            raise ValueError(f"expected whole counts, got {counts.tolist()}")
        if loss not in ("mse", "cross_entropy"):
            raise ValueError(f"expected loss 'mse' or 'cross_entropy', got {loss!r}")
        self.lam_w, self.lam_h = check_in_range(lam_w, "lam_w", low=0), check_in_range(lam_h, "lam_h", low=0)
        check_positive_int(dim, "dim")
        self.kind, n_classes = loss, len(counts)
        generator = torch.Generator().manual_seed(seed)

        def start(rows: int, columns: int) -> nn.Parameter:
            values = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
            return nn.Parameter(values / math.sqrt(columns))

        self.register_buffer("labels", torch.repeat_interleave(torch.arange(n_classes), counts.long()))
        self.features = start(int(counts.sum()), dim)
        widths = [dim] * check_positive_int(n_layers, "n_layers") + [n_classes]
        self.layers = nn.ParameterList([start(n_out, n_in) for n_in, n_out in pairwise(widths)])
        self.bias = nn.Parameter(torch.zeros(n_classes, dtype=torch.float64)) if bias else None

    @property
    def weight(self) -> Tensor:
        """The product of all layers: (C, d)."""
        product = self.layers[0]
        for layer in self.layers[1:]:
            product = layer @ product
        return product

    def forward(self) -> Tensor:
        """Return the outputs for every sample: (N, C)."""
        outputs = self.features
        for layer in self.layers:
            outputs = outputs @ layer.T
        return outputs if self.bias is None else outputs + self.bias

    def loss(self) -> Tensor:
        """Return the objective, penalties included."""
        outputs = self()
        if self.kind == "mse":
            targets = F.one_hot(self.labels, outputs.shape[1]).to(outputs)
            fit = ((outputs - targets) ** 2).sum() / (2 * len(outputs))
        else:
            fit = F.cross_entropy(outputs, self.labels)
        squares = sum((layer**2).sum() for layer in self.layers)
        return fit + self.lam_w / 2 * squares + self.lam_h / 2 * (self.features**2).sum()

    def minimise(self, max_iter: int = 2000, tolerance: float = 1e-10) -> "UnconstrainedFeatureModel":
        """Run L-BFGS with a strong-Wolfe line search until the gradient is below the tolerance; return self.

        Plain gradient descent needs about a hundred thousand steps here, because the directions of rare classes are
        nearly flat.
        """
        optimizer = torch.optim.LBFGS(
            self.parameters(),
            max_iter=max_iter,
            tolerance_grad=tolerance,
            tolerance_change=0,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = self.loss()
            value.backward()
            return value

        optimizer.step(closure)
        return self

    @torch.no_grad()
    def class_features(self) -> Tensor:
        """Return the mean feature of each class: (C, d)."""
        counts = torch.bincount(self.labels)
        sums = torch.zeros(len(counts), self.features.shape[1], dtype=self.features.dtype, device=self.features.device)
        return sums.index_add_(0, self.labels, self.features) / counts[:, None]


def _targets(labels: Any, n: int, n_classes: int, like: Tensor) -> Tensor:
    """Return one-hot targets (n, C) with the dtype and on the device of `like`."""
    return F.one_hot(check_labels(labels, n, n_classes).to(like.device), n_classes).to(like)


def tethered_features(weight: Any, labels: Any, start: Any, lam_h: float, beta: float) -> Tensor:
    r"""Return the features that serve a fixed classifier best when moving away from where they start costs something.

    $$ H^* = \arg\min_H \lVert HW^\top - Y\rVert^2 + \lambda_H\lVert H\rVert^2 + \beta\lVert H - H_0\rVert^2
           = (YW + \beta H_0)\,(W^\top W + (\lambda_H+\beta)I)^{-1} . $$

    Two samples of one class have the same Y, so their difference is the old one times
    $\beta\,(W^\top W + (\lambda_H+\beta)I)^{-1}$: no direction keeps more than $\beta/(\beta+\lambda_H)$ of its
    within-class spread, and what the classifier looks at keeps less. (All terms may carry a common factor such as
    $1/(2N)$.)

    Args:
        weight: classifier W, (C, d).
        labels: (n,) in 0..C-1.
        start: features H_0 handed over by the layers below, (n, d).
        lam_h: weight decay of the features, at least 0.
        beta: price of the squared distance from the start, above 0.

    Returns:
        H*, (n, d).

    Raises:
        ValueError: shapes that do not fit, a label out of range, beta not above 0.

    >>> tethered_features([[1.0], [-1.0]], [0, 1], [[3.0], [0.0]], lam_h=0.0, beta=2.0)
    tensor([[ 1.7500],
            [-0.2500]])

    Paper: tirer2023perturbation
    Chapter: collapse/neural-collapse
    """
    start, weight = check_features(start, "start"), check_features(weight, "weight")
    if weight.shape[1] != start.shape[1]:
        raise ValueError(f"expected weight (C, {start.shape[1]}) for features of that width, got {tuple(weight.shape)}")
    check_in_range(lam_h, "lam_h", low=0)
    if check_in_range(beta, "beta", low=0) == 0:
        raise ValueError("expected beta above 0: without a tether use gof_solution")
    weight = weight.to(start)
    targets = _targets(labels, len(start), len(weight), start)
    ridge = weight.T @ weight + (lam_h + beta) * torch.eye(weight.shape[1], dtype=start.dtype, device=start.device)
    return torch.linalg.solve(ridge, (targets @ weight + beta * start).T).T


def central_path_weight(features: Any, labels: Any, lam_w: float, n_classes: int | None = None) -> Tensor:
    r"""Return the ridge classifier for the features as they are, $W^*(H) = Y^\top H\,(H^\top H + N\lambda_W I)^{-1}$.

    The set of pairs (H, W*(H)) is the central path.

    Args:
        features: H, (n, d).
        labels: (n,).
        lam_w: weight decay, above 0.
        n_classes: C; default one more than the largest label.

    Returns:
        W*, (C, d).

    Raises:
        ValueError: shapes that do not fit, lam_w not above 0.

    >>> central_path_weight([[2.0], [-2.0]], [0, 1], lam_w=1.0)
    tensor([[ 0.2000],
            [-0.2000]])

    Paper: tirer2023perturbation
    Chapter: collapse/neural-collapse
    """
    features = check_features(features, "features")
    labels = check_labels(labels, len(features), n_classes)
    if check_in_range(lam_w, "lam_w", low=0) == 0:
        raise ValueError("expected lam_w above 0, got 0")
    targets = _targets(labels, len(features), n_classes or int(labels.max()) + 1, features)
    n, d = features.shape
    ridge = features.T @ features + n * lam_w * torch.eye(d, dtype=features.dtype, device=features.device)
    return torch.linalg.solve(ridge, features.T @ targets).T


def central_path_flow(
    features: Any, labels: Any, lam_w: float, lam_h: float, *, step: float = 0.1, n_steps: int = 200
) -> Tensor:
    r"""Follow the features down the gradient while the classifier is always the best one for them.

    $$ \dot H = -\nabla_H\Big[\tfrac12\lVert HW^\top-Y\rVert^2+\tfrac{\lambda_H}{2}\lVert H\rVert^2\Big]_{W=W^*(H)} $$

    in Euler steps. (Time is measured per sample: the factor 1/N of the loss is left out.)

    Args:
        features: where they start, (n, d).
        labels: (n,).
        lam_w: weight decay of the classifier, above 0.
        lam_h: weight decay of the features.
        step: length of an Euler step; the theorem is about the flow, so keep it small.
        n_steps: how many.

    Returns:
        The path (n_steps + 1, n, d), starting point included.

    Raises:
        ValueError: shapes that do not fit, a setting out of range.

    >>> central_path_flow([[1.0], [-1.0]], [0, 1], lam_w=0.1, lam_h=0.01, n_steps=3).shape
    torch.Size([4, 2, 1])

    Paper: tirer2023perturbation
    Chapter: collapse/neural-collapse
    """
    h = check_features(features, "features")
    labels = check_labels(labels, len(h))
    check_in_range(lam_h, "lam_h", low=0)
    if check_in_range(step, "step", low=0) == 0:
        raise ValueError("expected a step above 0, got 0")
    targets = _targets(labels, len(h), int(labels.max()) + 1, h)
    path = [h]
    for _ in range(check_positive_int(n_steps, "n_steps")):
        weight = central_path_weight(h, labels, lam_w, targets.shape[1])
        h = h - step * ((h @ weight.T - targets) @ weight + lam_h * h)
        path.append(h)
    return torch.stack(path)
