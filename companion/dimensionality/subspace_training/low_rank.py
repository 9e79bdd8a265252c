"""Low-rank updates of a matrix and what they do to its singular vectors.

Public: `LoRALinear`, `singular_overlap`, `intruder_dimensions`, `scale_directions`, `detachment_threshold`.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from companion.checks import as_tensor, check_in_range, check_positive_int
from companion.geometry import single

__all__ = ["LoRALinear", "detachment_threshold", "intruder_dimensions", "scale_directions", "singular_overlap"]


class LoRALinear(nn.Module):
    r"""A frozen linear layer with a trainable update of rank r.

    $y = W_0 x + b + s\, B A x$ with A (r x in) random, B (out x r) zero at first, so that training starts at the
    frozen layer. The scale is $s = \alpha / r$, or $\alpha / \sqrt r$ when rank-stabilised: with $\alpha / r$ the
    update shrinks as the rank grows, which is one reason why small and large ranks behave differently.

    Args:
        linear: the layer to adapt; its weight and bias are kept as buffers of the same values.
        rank: r, at most the smaller side of the weight.
        alpha: the scale's numerator; 2r when left out.
        rank_stabilized: divide by the square root of r instead of r.
        random_state: seed of A.

    Raises:
        ValueError: the rank is larger than the weight allows.
        TypeError: `linear` is not an `nn.Linear`.

    >>> layer = LoRALinear(nn.Linear(8, 4), rank=2)
    >>> sum(p.numel() for p in layer.parameters())
    24

    Paper: shuttleworth2024lora
    Chapter: dimensionality/subspace-training
    """

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        alpha: float | None = None,
        *,
        rank_stabilized: bool = False,
        random_state: int = 0,
    ):
        super().__init__()
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"expected an nn.Linear, got {type(linear).__name__}")
        self.rank = check_positive_int(rank, "rank")
        if self.rank > min(linear.weight.shape):
            raise ValueError(f"expected a rank of at most {min(linear.weight.shape)}, got {rank}")
        self.alpha = 2.0 * rank if alpha is None else float(alpha)
        self.scale = self.alpha / (math.sqrt(rank) if rank_stabilized else rank)
        weight = linear.weight.detach()
        self.register_buffer("weight", weight.clone())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        out_features, in_features = weight.shape
        a = torch.randn(rank, in_features, generator=torch.Generator().manual_seed(random_state))
        self.a = nn.Parameter(a.to(weight) / math.sqrt(in_features))
        self.b = nn.Parameter(weight.new_zeros(out_features, rank))

    def delta(self) -> Tensor:
        """Return the update s B A, (out, in)."""
        return self.scale * self.b @ self.a

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return nn.functional.linear(x, self.weight, self.bias) + self.scale * (x @ self.a.T) @ self.b.T

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return an ordinary linear layer with the update added to its weight."""
        with torch.random.fork_rng(devices=[]):
            linear = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=self.bias is not None)
        linear = linear.to(self.weight)
        linear.weight.copy_(self.weight + self.delta())
        if self.bias is not None:
            linear.bias.copy_(self.bias)
        return linear


def _pair(before: Any, after: Any) -> tuple[Tensor, Tensor]:
    before, after = as_tensor(before, "before").detach(), as_tensor(after, "after").detach()
    if before.ndim != 2 or before.shape != after.shape or 0 in before.shape:
        raise ValueError(f"expected two matrices of one shape, got {tuple(before.shape)} and {tuple(after.shape)}")
    for name, matrix in (("before", before), ("after", after)):
        if not torch.isfinite(matrix).all():
            raise ValueError(f"expected {name} to be finite, got NaN or infinity in it")
    return (m if m.is_floating_point() else m.float() for m in (before, after))


def singular_overlap(before: Any, after: Any, k: int | None = None) -> Tensor:
    r"""Compare the left singular vectors of a matrix before and after a change.

    Entry (i, j) is $|\langle u_i(W), u_j(W_0) \rangle|$: row i tells which of the old directions the new direction i is
    made of. A diagonal of ones says that nothing turned; an empty row is a newcomer.

    Args:
        before: $W_0$, (m, n).
        after: $W$, (m, n).
        k: how many leading directions of `after` to compare (all when left out); columns cover all of `before`.

    Returns:
        (k, min(m, n)), entries in [0, 1]; float32 for matrices in half precision.

    >>> singular_overlap([[2.0, 0], [0, 1]], [[1.0, 0], [0, 2]])
    tensor([[0., 1.],
            [1., 0.]])

    Paper: shuttleworth2024lora
    Chapter: dimensionality/subspace-training
    """
    before, after = (single(matrix) for matrix in _pair(before, after))
    k = min(before.shape) if k is None else check_positive_int(k, "k")
    if k > min(before.shape):
        raise ValueError(f"expected k of at most {min(before.shape)}, the number of singular vectors, got {k}")
    old = torch.linalg.svd(before, full_matrices=False).U
    new = torch.linalg.svd(after, full_matrices=False).U
    return (new[:, :k].T @ old).abs()


def intruder_dimensions(before: Any, after: Any, k: int = 10, threshold: float = 0.5) -> Tensor:
    r"""Find the leading directions of a changed matrix that resemble none of the old ones.

    Direction i is an intruder when $\max_j |\langle u_i(W), u_j(W_0) \rangle| < \epsilon$ and i is among the k leading.

    Args:
        before: $W_0$, (m, n), such as the pretrained weight.
        after: $W$, (m, n), such as the fine-tuned one.
        k: leading directions that are looked at. The count depends on k and the threshold: vary both.
        threshold: $\epsilon$, in (0, 1].

    Returns:
        The indices of the intruders among the singular vectors of `after`, increasing, int64.

    Raises:
        ValueError: shapes differ, NaN, k larger than the matrix, or a threshold outside (0, 1].

    >>> before = torch.diag(torch.tensor([5.0, 4, 3, 0]))
    >>> intruder_dimensions(before, before + 20 * torch.full((4, 4), 0.25), k=1, threshold=0.6)
    tensor([0])

    Paper: shuttleworth2024lora
    Chapter: dimensionality/subspace-training
    """
    check_in_range(threshold, "threshold", 0, 1, inclusive="high")
    best = singular_overlap(before, after, k).amax(dim=1)
    return (best < threshold).nonzero().flatten()


def scale_directions(after: Any, indices: Any, factor: float) -> Tensor:
    r"""Multiply chosen singular values of a matrix: $W - (1 - c) \sum_{i \in I} \sigma_i u_i v_i^\top$.

    Args:
        after: (m, n).
        indices: which singular directions, such as the result of `intruder_dimensions`.
        factor: c; 1 changes nothing, 0 removes the directions.

    Returns:
        (m, n).

    >>> scale_directions([[2.0, 0], [0, 1]], [0], factor=0.5)
    tensor([[1., 0.],
            [0., 1.]])

    Paper: shuttleworth2024lora
    Chapter: dimensionality/subspace-training
    """
    after, _ = _pair(after, after)
    indices = as_tensor(indices, "indices").long().to(after.device).flatten()
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < min(after.shape):
        raise ValueError(f"expected indices in 0..{min(after.shape) - 1}, got {indices.tolist()}")
    u, s, vh = torch.linalg.svd(single(after), full_matrices=False)
    chosen = (u[:, indices] * s[indices]) @ vh[indices]
    return (single(after) - (1 - factor) * chosen).to(after.dtype)


def detachment_threshold(before: Any, k: int) -> float:
    r"""Return the spectral norm a random update of rank one needs to enter the k leading directions of a matrix.

    A rank-one update $s\,a b^\top$ in random directions is nearly orthogonal to everything that is there; it becomes
    singular value $\approx s$ of the sum (a little more: it also collects a share of the rest) and enters the top k
    as soon as $s$ passes $\sigma_k(W_0)$.

    Args:
        before: $W_0$, (m, n).
        k: how many leading directions are looked at.

    >>> detachment_threshold([[3.0, 0], [0, 1]], k=2)
    1.0

    Paper: shuttleworth2024lora
    Chapter: dimensionality/subspace-training
    """
    before, _ = _pair(before, before)
    values = torch.linalg.svdvals(single(before))
    if check_positive_int(k, "k") > values.numel():
        raise ValueError(f"expected k of at most {values.numel()}, got {k}")
    return float(values[k - 1])
