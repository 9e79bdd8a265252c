"""Losses that need three numbers per sample however many classes there are, and the output layer that exploits it.

Public: `SphericalStats`, `spherical_stats`, `ZLoss`, `TaylorSoftmaxLoss`, `SphericalSoftmaxLoss`,
`FactoredOutputLayer`, `topk_error`.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion.checks import check_features, check_generator, check_in_range, check_labels, check_positive_int

__all__ = [
    "FactoredOutputLayer",
    "SphericalSoftmaxLoss",
    "SphericalStats",
    "TaylorSoftmaxLoss",
    "ZLoss",
    "spherical_stats",
    "topk_error",
]


class SphericalStats(NamedTuple):
    """What a loss of the spherical family sees of C logits o: the target's, their sum, and their scatter.

    `target` $o_y$, `total` $\\sum_c o_c$, `scatter` $\\sum_c (o_c - \\bar o)^2$, each (n,). The sum of squares is
    scatter + total² / C; the scatter is kept instead because the variance then needs no subtraction.
    """

    target: Tensor
    total: Tensor
    scatter: Tensor


def spherical_stats(logits: Any, labels: Any) -> SphericalStats:
    """Return the three numbers per sample that losses of the spherical family are functions of.

    Args:
        logits: o, (n, C).
        labels: y, (n,).

    Returns:
        `SphericalStats(target, total, scatter)`.

    Raises:
        ValueError: shapes that do not match, labels out of range, NaN or infinity.

    >>> spherical_stats([[1.0, 2.0, 3.0]], [2])
    SphericalStats(target=tensor([3.]), total=tensor([6.]), scatter=tensor([2.]))

    Paper: brebisson2016z
    Chapter: collapse/fixed-classifiers
    """
    logits = check_features(logits, "logits")
    labels = check_labels(labels, *logits.shape).to(logits.device)
    return _stats(logits, labels)


def _stats(logits: Tensor, labels: Tensor) -> SphericalStats:
    centred = logits - logits.mean(-1, keepdim=True)
    target = logits.gather(-1, labels[..., None]).squeeze(-1)
    return SphericalStats(target, logits.sum(-1), centred.square().sum(-1))


class _SphericalLoss(nn.Module):
    """A loss that is a function of `SphericalStats` and the number of classes."""

    def per_sample(self, stats: SphericalStats, n_classes: int) -> Tensor:
        """Return the loss of every sample (n,) from its three numbers."""
        raise NotImplementedError

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of dense logits (n, C) and labels (n,)."""
        return self.per_sample(_stats(logits, labels), logits.shape[-1]).mean()


class ZLoss(_SphericalLoss):
    r"""Ask for a target whose logit stands out: a soft margin on its z-score among all logits.

    $$L = \frac1a \log\big(1 + e^{a\,(b - z_y)}\big), \qquad z_y = \frac{o_y - \bar o}{\sigma},\quad
    \sigma^2 = \frac1C \sum_c (o_c - \bar o)^2$$

    Shifting all logits or multiplying them by a positive number changes nothing. $z_y$ is at most $\sqrt{C - 1}$.
    Logits that are all equal have no z-score; theirs counts as 0, without a gradient, so start a layer from weights
    that are not zero.

    Args:
        a: how sharp the margin is, above 0.
        b: the z-score that is enough.

    Raises:
        ValueError: a of at most 0.

    >>> loss, logits = ZLoss(a=1.0, b=2.0), torch.tensor([[0.0, 1.0, 5.0, 2.0]])
    >>> loss(logits, torch.tensor([2])).item() == loss(7 + 2 * logits, torch.tensor([2])).item()
    True

    Paper: brebisson2016z
    Chapter: collapse/fixed-classifiers
    """

    def __init__(self, a: float = 1.0, b: float = 4.0) -> None:
        super().__init__()
        self.a = check_in_range(a, "a", 0, inclusive="neither")
        self.b = check_in_range(b, "b")

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of dense logits (n, C) and labels (n,)."""
        centred = logits - logits.mean(-1, keepdim=True)  # so that a shift costs no digits
        target = centred.gather(-1, labels[..., None]).squeeze(-1)
        return self._margin(target, centred.square().mean(-1)).mean()

    def per_sample(self, stats: SphericalStats, n_classes: int) -> Tensor:
        """Return the loss of every sample (n,) from its three numbers."""
        return self._margin(stats.target - stats.total / n_classes, stats.scatter / n_classes)

    def _margin(self, deviation: Tensor, variance: Tensor) -> Tensor:
        varies = variance > 0
        z = torch.where(varies, deviation / torch.where(varies, variance, 1.0).sqrt(), 0.0)
        return F.softplus(self.a * (self.b - z)) / self.a

    def extra_repr(self) -> str:
        """Say a and b where the module is printed."""
        return f"a={self.a:g}, b={self.b:g}"


class TaylorSoftmaxLoss(_SphericalLoss):
    r"""Cross-entropy of the softmax with exp replaced by its second-order Taylor polynomial, which is positive.

    $$p_c = \frac{1 + o_c + o_c^2 / 2}{\sum_j 1 + o_j + o_j^2 / 2}$$

    >>> TaylorSoftmaxLoss()(torch.tensor([[0.0, 0.0]]), torch.tensor([0])).exp()
    tensor(2.)

    Paper: brebisson2016z
    Chapter: collapse/fixed-classifiers
    """

    def per_sample(self, stats: SphericalStats, n_classes: int) -> Tensor:
        """Return the loss of every sample (n,) from its three numbers."""
        o, total, scatter = stats
        square = scatter + total.square() / n_classes
        return (n_classes + total + square / 2).log() - (1 + o + o.square() / 2).log()


class SphericalSoftmaxLoss(_SphericalLoss):
    r"""Cross-entropy of probabilities that are proportional to squares.

    $$p_c = \frac{o_c^2 + \epsilon}{\sum_j o_j^2 + \epsilon}$$

    It cannot tell a logit from its negative.

    Args:
        epsilon: above 0.

    Raises:
        ValueError: an epsilon of at most 0.

    >>> SphericalSoftmaxLoss(1.0)(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([0])).exp()
    tensor(2.)

    Paper: brebisson2016z
    Chapter: collapse/fixed-classifiers
    """

    def __init__(self, epsilon: float = 1e-3) -> None:
        super().__init__()
        self.epsilon = check_in_range(epsilon, "epsilon", 0, inclusive="neither")

    def per_sample(self, stats: SphericalStats, n_classes: int) -> Tensor:
        """Return the loss of every sample (n,) from its three numbers."""
        o, total, scatter = stats
        square = scatter + total.square() / n_classes
        return (square + n_classes * self.epsilon).log() - (o.square() + self.epsilon).log()


class FactoredOutputLayer(nn.Module):
    r"""An output layer of C classes whose loss, gradient and update cost $O(d^2)$ per sample, whatever C is.

    For a loss of the spherical family and $o = W h$ it needs, per sample, $w_y^\top h$, $\bar w^\top h$ with the sum
    $\bar w$ of the rows of W, and $h^\top Q h$ with $Q = \sum_c (w_c - \bar w / C)(w_c - \bar w / C)^\top$. The step
    of gradient descent touches every row of W, so W is kept as

    $$W = V U + \mathbf{1}\,\omega^\top, \qquad V: C \times d,\; U: d \times d,\; \omega: d$$

    of which a step changes U, $\omega$ and only the rows of V that belong to targets in the batch. The inverse of U
    follows by the Sherman-Morrison-Woodbury identity, Q by expanding the square. What is d x d is kept in float64.
    The result is that of plain gradient descent on W, exactly.

    Call it, `backward()` the mean loss, then `step(lr)`:

        layer = FactoredOutputLayer(dim, n_classes, ZLoss())
        layer(network(x), y).backward()
        optimizer.step(); layer.step(lr)

    Args:
        dim: d.
        n_classes: C, at least 2.
        loss: of the spherical family: `ZLoss`, `TaylorSoftmaxLoss`, `SphericalSoftmaxLoss`, or anything with
            `per_sample(SphericalStats, n_classes)`; None takes `ZLoss()`.
        generator: draws the weights, normal with variance 1/d; a seed will do, None uses torch's default generator.

    Raises:
        ValueError: sizes below one (two for classes).

    >>> layer = FactoredOutputLayer(3, 5, generator=torch.Generator().manual_seed(0))
    >>> h, y = torch.eye(3), torch.tensor([4, 0, 4])
    >>> before = layer(h, y)
    >>> before.backward()
    >>> layer.step(0.1)
    >>> bool(layer(h, y) < before), bool(torch.allclose(layer.loss(layer.logits(h), y), layer(h, y)))
    (True, True)

    Paper: brebisson2016z
    Chapter: collapse/fixed-classifiers
    """

    def __init__(
        self,
        dim: int,
        n_classes: int,
        loss: nn.Module | None = None,
        *,
        generator: torch.Generator | int | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.n_classes = check_positive_int(dim, "dim"), check_positive_int(n_classes, "n_classes", minimum=2)
        self.loss = ZLoss() if loss is None else loss
        self.register_buffer("V", torch.randn(n_classes, dim, generator=check_generator(generator)) / dim**0.5)
        for name in ("U", "U_inverse", "Q"):
            self.register_buffer(name, torch.eye(dim, dtype=torch.float64))
        for name in ("omega", "row_sum"):
            self.register_buffer(name, torch.zeros(dim, dtype=torch.float64))
        self._last: tuple[Tensor, Tensor, Tensor] | None = None
        self.rebase()

    @property
    def weight(self) -> Tensor:
        """W = V U + 1 omega^T as a dense matrix (C, d): costs O(C d^2), for evaluation."""
        return (self.V.to(self.U.dtype) @ self.U + self.omega).to(self.V.dtype)

    @torch.no_grad()
    def set_weight(self, weight: Any) -> None:
        """Take W from a dense matrix (C, d).

        Raises:
            ValueError: another shape, NaN or infinity.
        """
        weight = check_features(weight, "weight")
        if weight.shape != self.V.shape:
            raise ValueError(f"expected weight of shape {tuple(self.V.shape)}, got {tuple(weight.shape)}")
        self.V.copy_(weight)
        self.U.copy_(torch.eye(self.dim))
        self.omega.zero_()
        self.rebase()

    @torch.no_grad()
    def rebase(self) -> None:
        """Fold U and omega back into V and recompute the sums: O(C d^2), worth it every few thousand steps."""
        self.V.copy_(self.weight)
        self.U.copy_(torch.eye(self.dim))
        self.U_inverse.copy_(torch.eye(self.dim))
        self.omega.zero_()
        self.row_sum.zero_()
        self.Q.zero_()
        for rows in self.V.split(4096):
            self.row_sum += rows.sum(0, dtype=self.Q.dtype)
        mean = self.row_sum / self.n_classes
        for rows in self.V.split(4096):
            centred = rows.to(self.Q.dtype) - mean
            self.Q += centred.T @ centred

    def _rows(self, labels: Tensor) -> Tensor:
        return self.V[labels].to(self.U.dtype) @ self.U + self.omega  # (n, d), of W

    def stats(self, features: Tensor, labels: Tensor) -> SphericalStats:
        """Return the three numbers of every sample, in float64, without looking at the other classes."""
        h = features.to(self.Q.dtype)
        return SphericalStats((h * self._rows(labels)).sum(1), h @ self.row_sum, ((h @ self.Q) * h).sum(1))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of features (n, d) and labels (n,); its gradient reaches the features in O(d^2).

        Raises:
            ValueError: shapes that do not match, labels out of range.
        """
        if features.dim() != 2 or features.shape[1] != self.dim:
            raise ValueError(f"expected features of shape (n, {self.dim}), got {tuple(features.shape)}")
        labels = check_labels(labels, len(features), self.n_classes).to(features.device)
        numbers = torch.stack(self.stats(features, labels))  # (3, n)
        if torch.is_grad_enabled():
            if not numbers.requires_grad:
                numbers.requires_grad_()
            numbers.retain_grad()
            self._last = features.detach().to(self.Q.dtype), labels, numbers
        return self.loss.per_sample(SphericalStats(*numbers), self.n_classes).mean().to(features.dtype)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Take the gradient step W <- W - lr dL/dW of the last loss that went backward.

        Raises:
            RuntimeError: no loss has gone backward since the last step.
        """
        if self._last is None or self._last[2].grad is None:
            raise RuntimeError("expected a loss to step on: call the layer, then backward(), then step()")
        h, labels, numbers = self._last
        self._last = None
        by_target, by_total, by_scatter = numbers.grad  # dL/d(o_y, sum, scatter), each (n,)
        targets = self._rows(labels)
        mean = self.row_sum / self.n_classes
        # the gradient in o is 2 s (o - mean o) + t 1 + u e_y: the first part shrinks W along h, the second
        # shifts all rows alike, the third changes the targets' rows only
        shrink = 2 * lr * by_scatter
        scaled = h * shrink[:, None]
        contract = torch.eye(self.dim, dtype=h.dtype, device=h.device) - h.T @ scaled  # A, symmetric
        small = torch.eye(len(h), dtype=h.dtype, device=h.device) - h @ scaled.T
        expand = scaled.T @ torch.linalg.solve(small, h @ self.U_inverse)  # A^-1 U^-1 = U^-1 + this
        shift = h.T @ (shrink * (h @ mean) - lr * by_total)
        pull = -lr * by_target[:, None] * h  # (n, d), what is added to the rows of the targets

        centred = contract @ (targets - mean).T @ pull
        alike = (labels[:, None] == labels).to(h.dtype)
        pulled = pull.sum(0)
        self.Q.copy_(contract @ self.Q @ contract + centred + centred.T + pull.T @ alike @ pull)
        self.Q.addr_(pulled, pulled, alpha=-1 / self.n_classes)
        self.row_sum.copy_(contract @ self.row_sum + self.n_classes * shift + pulled)
        self.U.copy_(self.U @ contract)
        self.U_inverse.add_(expand)
        self.omega.copy_(contract @ self.omega + shift)
        self.V.index_add_(0, labels, (pull @ self.U_inverse).to(self.V.dtype))

    def logits(self, features: Tensor) -> Tensor:
        """Return all logits (n, C): O(C d) per sample, for evaluation."""
        h = features.to(self.U.dtype)
        return ((h @ self.U.T).to(self.V.dtype) @ self.V.T + (h @ self.omega)[:, None].to(self.V.dtype)).to(
            features.dtype
        )

    def extra_repr(self) -> str:
        """Say the sizes where the module is printed."""
        return f"dim={self.dim}, n_classes={self.n_classes}"


def topk_error(logits: Any, labels: Any, k: int = 1) -> Tensor:
    """Return the share of samples whose class is not among the k largest logits.

    Args:
        logits: (n, C).
        labels: (n,).
        k: at most C.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: shapes that do not match, k above C.

    >>> topk_error([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]], [1, 2], k=2)
    tensor(0.5000)

    Paper: brebisson2016z
    Chapter: collapse/fixed-classifiers
    """
    logits = check_features(logits, "logits")
    labels = check_labels(labels, *logits.shape).to(logits.device)
    if check_positive_int(k, "k") > logits.shape[1]:
        raise ValueError(f"expected k of at most {logits.shape[1]} classes, got {k}")
    found = (logits.topk(k, dim=1).indices == labels[:, None]).any(1)
    return 1 - found.to(logits.dtype).mean()
