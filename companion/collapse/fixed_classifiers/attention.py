"""Attention at linear cost, and what it loses: the length of the query, which says how sharply to look.

Public: `attention_entropy`, `softmax_weights`, `positive_feature`, `norm_aware_query`, `norm_aware_key`,
`linear_weights`, `linear_attention`, `entropy_vs_norm`, `KernelAttention`, `NormAwareLinearAttention`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion.checks import as_tensor, check_in_range, check_positive_int

__all__ = [
    "KernelAttention",
    "NormAwareLinearAttention",
    "attention_entropy",
    "entropy_vs_norm",
    "linear_attention",
    "linear_weights",
    "norm_aware_key",
    "norm_aware_query",
    "positive_feature",
    "softmax_weights",
]


def attention_entropy(weights: Any) -> Tensor:
    r"""Return how widely each query looks, $-\sum_j a_{ij} \log a_{ij}$ in nats: log n for all keys alike, 0 for one.

    Args:
        weights: a, (..., n), at least 0, rows summing to one.

    Returns:
        (...,), one entropy per query.

    Raises:
        ValueError: rows that are not probabilities.

    >>> attention_entropy([[0.5, 0.5], [1.0, 0.0]])
    tensor([0.6931, 0.0000])

    Paper: meng2025nalaformer
    Chapter: collapse/fixed-classifiers
    """
    weights = as_tensor(weights, "weights")
    if not weights.is_floating_point():
        weights = weights.to(torch.get_default_dtype())
    slack = max(1e-3, 2 * torch.finfo(weights.dtype).eps)  # each weight of a half-precision softmax is rounded
    total = weights.detach().sum(-1, dtype=torch.promote_types(weights.dtype, torch.float32))
    if weights.dim() == 0 or not bool(((total - 1).abs() < slack).all()) or bool((weights < 0).any()):
        raise ValueError("expected weights of at least 0 whose rows sum to one: pass attention weights, not scores")
    return torch.special.entr(weights).sum(-1)


def softmax_weights(q: Tensor, k: Tensor) -> Tensor:
    r"""Return softmax attention, $a_{ij} \propto \exp(\langle q_i, k_j \rangle / \sqrt d)$: (..., n, m).

    Args:
        q: queries (..., n, d).
        k: keys (..., m, d).

    >>> softmax_weights(torch.zeros(1, 4), torch.eye(4))
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]])

    Paper: meng2025nalaformer
    Chapter: collapse/fixed-classifiers
    """
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)


def positive_feature(x: Tensor) -> Tensor:
    r"""Return the ReLU feature map of plain linear attention, $\phi(x) = \max(x, 0)$.

    It is homogeneous, $\phi(s x) = s\,\phi(x)$ for s > 0, so that the length of a query cancels.

    >>> positive_feature(torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])

    Paper: meng2025nalaformer
    Chapter: collapse/fixed-classifiers
    """
    return F.relu(x)


def _signs(x: Tensor) -> Tensor:
    return torch.cat([F.relu(x), F.relu(-x)], -1)


def norm_aware_query(q: Tensor, power: float = 3.0, offset: float = 0.5, reach: float = 1.0) -> Tensor:
    r"""Return query features whose sharpness follows the length of the query.

    $$\phi(q) = \Big[\max(\hat q, 0)^{p},\ \max(-\hat q, 0)^{p}\Big], \qquad \hat q = \frac{q}{\lVert q \rVert},\quad
    p = \lambda\,\Big(c + \tanh \frac{\lVert q \rVert}{r}\Big)$$

    Positive and negative coordinates go to features of their own: coordinates of the same sign add, opposite signs
    meet a zero, and nothing is thrown away as in a plain ReLU. The defaults are those of the authors' released code.
    As tanh saturates, lengths well above r look alike.

    Args:
        q: (..., d).
        power: lambda, above 0.
        offset: c, above 0.
        reach: r, above 0.

    Returns:
        (..., 2d), at least 0.

    >>> norm_aware_query(torch.tensor([3.0, -4.0]), power=2.0).round(decimals=3)  # tanh(5) is 1: cubes
    tensor([0.2160, 0.0000, 0.0000, 0.5120])

    Paper: meng2025nalaformer
    Chapter: collapse/fixed-classifiers
    """
    norm = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
    exponent = power * (offset + (norm / reach).tanh())
    return _signs(q / norm.clamp_min(torch.finfo(q.dtype).tiny)) ** exponent


def norm_aware_key(k: Tensor, power: float = 3.0) -> Tensor:
    r"""Return the key features that belong to `norm_aware_query`, $[\max(k, 0)^\lambda, \max(-k, 0)^\lambda]$.

    The length of a key stays in its features: long keys are heard more, as under softmax.

    Args:
        k: (..., d).
        power: lambda, at least 1.

    Returns:
        (..., 2d), at least 0.

    >>> norm_aware_key(torch.tensor([2.0, -1.0]))
    tensor([8., 0., 0., 1.])

    Paper: meng2025nalaformer
    Chapter: collapse/fixed-classifiers
    """
    return _signs(k) ** power


def _kernel_weights(query: Tensor, key: Tensor) -> Tensor:
    # the floor lets a query that meets no key (all products zero) look everywhere alike
    scores = query @ key.mT + torch.finfo(query.dtype).eps
    return scores / scores.sum(-1, keepdim=True)


def linear_weights(
    q: Tensor, k: Tensor, query_map: Callable = positive_feature, key_map: Callable = positive_feature
) -> Tensor:
    r"""Return the weights that linear attention never forms, $a_{ij} \propto \langle \phi_q(q_i), \phi_k(k_j) \rangle$.

    For looking at: this costs n times m. Their rank is at most the number of features, whatever the number of tokens.

    Args:
        q: queries (..., n, d).
        k: keys (..., m, d).
        query_map: feature map of the queries, at least 0.
        key_map: feature map of the keys, at least 0.

    Returns:
        (..., n, m), rows summing to one.

    >>> linear_weights(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0], [1.0, 1.0]])).round(decimals=3)
    tensor([[0.7500, 0.2500]])

    Paper: meng2025nalaformer
    Chapter: collapse/fixed-classifiers
    """
    return _kernel_weights(query_map(q), key_map(k))


def linear_attention(query: Tensor, key: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    r"""Return linear attention of non-negative features, without an n x n matrix.

    $$o_i = \frac{\phi(q_i)^\top \sum_j \phi(k_j)\, v_j^\top}{\phi(q_i)^\top \sum_j \phi(k_j)}$$

    The sums run over all tokens, or over $j \le i$ when causal; either way the cost is linear in the number of tokens.

    Args:
        query: features (..., n, f), at least 0.
        key: features (..., m, f), at least 0; m = n when causal.
        v: values (..., m, e).
        causal: let tokens see only those before them and themselves.

    Returns:
        (..., n, e).

    >>> v = torch.tensor([[1.0], [3.0]])
    >>> linear_attention(torch.ones(2, 1), torch.ones(2, 1), v).flatten().tolist()
    [2.0, 2.0]
    >>> linear_attention(torch.ones(2, 1), torch.ones(2, 1), v, causal=True).flatten().tolist()
    [1.0, 2.0]

    Paper: meng2025nalaformer
    Chapter: collapse/fixed-classifiers
    """
    # the same floor as in the dense weights: a query that meets no key averages the values
    floor = torch.finfo(query.dtype).eps
    if causal:
        steps = torch.arange(1, v.shape[-2] + 1, device=v.device, dtype=v.dtype)[:, None]
        state = (key[..., :, None] * v[..., None, :]).cumsum(-3)  # (..., n, f, e)
        top = (query[..., None, :] @ state).squeeze(-2) + floor * v.cumsum(-2)
        return top / ((query * key.cumsum(-2)).sum(-1, keepdim=True) + floor * steps)
    top = query @ (key.mT @ v) + floor * v.sum(-2, keepdim=True)
    return top / (query @ key.sum(-2)[..., None] + floor * v.shape[-2])


def entropy_vs_norm(
    weights: Callable[[Tensor, Tensor], Tensor], q: Any, k: Any, scales: Sequence[float] | Tensor
) -> Tensor:
    """Return the mean entropy of attention when all queries have a given length.

    Args:
        weights: `weights(q, k) -> (n, m)`, such as `softmax_weights`.
        q: queries (n, d), of which only the directions count.
        k: keys (m, d).
        scales: the lengths, above 0.

    Returns:
        One entropy per length, in nats.

    Raises:
        ValueError: a length of at most 0.

    >>> q, k = torch.eye(4), torch.eye(4)
    >>> entropy_vs_norm(softmax_weights, q, k, [0.1, 10.0]).round(decimals=2)
    tensor([1.3900, 0.1200])

    Paper: meng2025nalaformer
    Chapter: collapse/fixed-classifiers
    """
    q, k = as_tensor(q, "q"), as_tensor(k, "k")
    lengths = [check_in_range(scale, "scales", 0, inclusive="neither") for scale in torch.as_tensor(scales).tolist()]
    direction = F.normalize(q, dim=-1)
    return torch.stack([attention_entropy(weights(length * direction, k)).mean() for length in lengths])


class KernelAttention(nn.Module):
    """Multi-head attention with a choice of kernel, everything else alike: what comparisons need.

    Args:
        dim: of the tokens.
        heads: a divisor of dim.
        kernel: "softmax", "relu" or "norm_aware".
        causal: let tokens see only those before them and themselves.
        power: lambda of `norm_aware_query`.
        offset: c of `norm_aware_query`.
        reach: r of `norm_aware_query`.

    Raises:
        ValueError: heads that do not divide dim, an unknown kernel.

    >>> attention = KernelAttention(8, heads=2, kernel="softmax")
    >>> attention(torch.zeros(3, 5, 8)).shape
    torch.Size([3, 5, 8])

    Paper: meng2025nalaformer
    Chapter: collapse/fixed-classifiers
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        kernel: str = "softmax",
        causal: bool = False,
        power: float = 3.0,
        offset: float = 0.5,
        reach: float = 1.0,
    ) -> None:
        super().__init__()
        check_positive_int(dim, "dim")
        if dim % check_positive_int(heads, "heads"):
            raise ValueError(f"expected heads that divide dim={dim}, got {heads}")
        if kernel not in ("softmax", "relu", "norm_aware"):
            raise ValueError(f"expected kernel 'softmax', 'relu' or 'norm_aware', got {kernel!r}")
        self.heads, self.kernel, self.causal = heads, kernel, causal
        self.power = check_in_range(power, "power", 1)
        self.offset = check_in_range(offset, "offset", 0, inclusive="neither")
        self.reach = check_in_range(reach, "reach", 0, inclusive="neither")
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return the kernel features of queries and keys (not for softmax, which has no finite ones)."""
        if self.kernel == "relu":
            return positive_feature(q), positive_feature(k)
        return norm_aware_query(q, self.power, self.offset, self.reach), norm_aware_key(k, self.power)

    def weights(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the attention weights (..., heads, n, m), for looking at, without the causal mask."""
        context = x if context is None else context
        q, k = self._split(self.q(x)), self._split(self.k(context))
        return softmax_weights(q, k) if self.kernel == "softmax" else _kernel_weights(*self.features(q, k))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return tokens (..., n, dim) of x (..., n, dim) that look at context (..., m, dim), by default at x."""
        context = x if context is None else context
        q, k, v = self._split(self.q(x)), self._split(self.k(context)), self._split(self.v(context))
        if self.kernel == "softmax":
            scores = q @ k.mT / math.sqrt(q.shape[-1])
            if self.causal:
                future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
                scores = scores.masked_fill(future, -math.inf)
            mixed = scores.softmax(-1) @ v
        else:
            mixed = linear_attention(*self.features(q, k), v, causal=self.causal)
        return self.out(mixed.transpose(-3, -2).flatten(-2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)  # (..., heads, n, d)


class NormAwareLinearAttention(KernelAttention):
    r"""Linear attention in which the length of a query decides how sharply it looks.

    Queries go through `norm_aware_query`, keys through `norm_aware_key`, and `linear_attention` does the rest at a
    cost that is linear in the number of tokens. It drops in for self-attention: (..., n, dim) in, (..., n, dim) out.
    Gate, convolution and rotary positions of the paper's vision backbone are left to the network around it.

    Args:
        dim: of the tokens.
        heads: a divisor of dim.
        causal: let tokens see only those before them and themselves.
        power: lambda.
        offset: c.
        reach: r; lengths well above it look alike.

    Raises:
        ValueError: heads that do not divide dim, a setting out of range.

    >>> attention = NormAwareLinearAttention(8, heads=2)
    >>> attention(torch.zeros(3, 5, 8)).shape
    torch.Size([3, 5, 8])

    Paper: meng2025nalaformer
    Chapter: collapse/fixed-classifiers
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        causal: bool = False,
        power: float = 3.0,
        offset: float = 0.5,
        reach: float = 1.0,
    ) -> None:
        super().__init__(dim, heads, "norm_aware", causal, power, offset, reach)
