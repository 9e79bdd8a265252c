"""Low-rank updates of tensors: a Tucker core with one factor per axis, or a matrix of rank r in some layout.

Public: `TuckerDelta`, `FlatDelta`, `unfold`, `hosvd`, `unfolding_floor`.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from companion.checks import as_tensor, check_positive_int

__all__ = ["FlatDelta", "TuckerDelta", "hosvd", "unfold", "unfolding_floor"]


def unfold(tensor: Any, axes: tuple[int, ...]) -> Tensor:
    """Lay a tensor out as a matrix: the given axes become the rows, the others, in order, the columns.

    >>> unfold(torch.zeros(2, 3, 4, 5), (0,)).shape, unfold(torch.zeros(2, 3, 4, 5), (0, 2)).shape
    (torch.Size([2, 60]), torch.Size([8, 15]))

    Paper: si2025flora
    Chapter: dimensionality/subspace-training
    """
    tensor = as_tensor(tensor, "tensor")
    if not axes or len(set(axes)) != len(axes) or not all(0 <= a < tensor.ndim for a in axes):
        raise ValueError(f"expected distinct axes in 0..{tensor.ndim - 1}, got {axes}")
    others = [a for a in range(tensor.ndim) if a not in axes]
    rows = math.prod(tensor.shape[a] for a in axes)
    return tensor.permute(*axes, *others).reshape(rows, -1)


def _along(tensor: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Multiply one axis of a tensor by a matrix."""
    return torch.tensordot(matrix, tensor, dims=([1], [axis])).movedim(0, axis)


def hosvd(tensor: Any, ranks: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    r"""Approximate a tensor by a small core and one orthonormal factor per axis (truncated higher-order SVD).

    Factor $U_k$ holds the $r_k$ leading left singular vectors of the unfolding along axis k, and
    $G = T \times_1 U_1^\top \cdots \times_N U_N^\top$. The squared error is at most the sum over axes of the squared
    singular values that were cut, and zero when the ranks are those of the unfoldings.

    Args:
        tensor: $(n_1, \dots, n_N)$.
        ranks: $(r_1, \dots, r_N)$, each at most its axis.

    Returns:
        The core $(r_1, \dots, r_N)$ and the factors $(n_k, r_k)$.

    >>> core, factors = hosvd(torch.ones(3, 4, 5), (1, 1, 1))
    >>> core.shape, [tuple(u.shape) for u in factors]
    (torch.Size([1, 1, 1]), [(3, 1), (4, 1), (5, 1)])

    Paper: si2025flora
    Chapter: dimensionality/subspace-training
    """
    tensor = as_tensor(tensor, "tensor")
    _check_ranks(tuple(tensor.shape), ranks)
    factors = [torch.linalg.svd(unfold(tensor, (k,)), full_matrices=False).U[:, :rank] for k, rank in enumerate(ranks)]
    core = tensor
    for k, factor in enumerate(factors):
        core = _along(core, factor.T, k)
    return core, factors


def _check_ranks(shape: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    if len(ranks) != len(shape):
        raise ValueError(f"expected one rank per axis of shape {shape}, got {ranks}")
    for axis, (rank, length) in enumerate(zip(ranks, shape, strict=True)):
        rest = math.prod(shape) // max(length, 1)
        if check_positive_int(rank, f"ranks[{axis}]") > min(length, rest):
            raise ValueError(f"expected ranks[{axis}] of at most {min(length, rest)}, got {rank}")


class TuckerDelta(nn.Module):
    r"""A trainable update of a tensor of any order that keeps its axes apart.

    $\Delta W = s\, G \times_1 A_1 \times_2 A_2 \cdots \times_N A_N$ with a core $G$ of shape $(r_1, \dots, r_N)$ and
    one factor $A_k$ $(n_k, r_k)$ per axis: $\prod_k r_k + \sum_k n_k r_k$ numbers. The first factor is zero at first,
    so the update starts at zero and gradients still flow. Its mode-k unfolding has rank at most $r_k$; for a matrix
    it is LoRA with a small square core.

    Args:
        shape: shape of the tensor that is updated, such as `conv.weight.shape`.
        ranks: one per axis.
        scale: s.
        random_state: seed of the core and the other factors.

    Raises:
        ValueError: not one rank per axis, or a rank larger than its axis.

    >>> delta = TuckerDelta((16, 16, 3, 3), (4, 4, 2, 2))
    >>> sum(p.numel() for p in delta.parameters()), delta().shape
    (204, torch.Size([16, 16, 3, 3]))

    Paper: si2025flora
    Chapter: dimensionality/subspace-training
    """

    def __init__(self, shape: tuple[int, ...], ranks: tuple[int, ...], scale: float = 1.0, *, random_state: int = 0):
        super().__init__()
        shape, ranks = tuple(shape), tuple(ranks)
        _check_ranks(shape, ranks)
        generator = torch.Generator().manual_seed(random_state)
        self.scale = float(scale)
        self.core = nn.Parameter(torch.randn(ranks, generator=generator) / math.sqrt(math.prod(ranks[1:])))
        factors = [torch.randn(n, r, generator=generator) / math.sqrt(r) for n, r in zip(shape, ranks, strict=True)]
        factors[0].zero_()
        self.factors = nn.ParameterList(factors)

    def forward(self) -> Tensor:
        """Return the update, of the tensor's shape."""
        delta = self.core
        for axis, factor in enumerate(self.factors):
            delta = _along(delta, factor, axis)
        return self.scale * delta


class FlatDelta(nn.Module):
    r"""A trainable update of a tensor that is flattened into a matrix of rank r: what LoRA does to a convolution.

    $\mathrm{unfold}(\Delta W) = s\,B A$ with B zero at first. `rows=(0,)` is the layout $(C_{out}, C_{in} k k)$;
    `rows=(0, 2)` is $(C_{out} k, C_{in} k)$, the one most adapter libraries use for convolutions.

    Args:
        shape: shape of the tensor that is updated.
        rank: r.
        rows: the axes that form the rows of the matrix.
        scale: s.
        random_state: seed of A.

    >>> sum(p.numel() for p in FlatDelta((16, 16, 3, 3), rank=2).parameters())
    320

    Paper: si2025flora
    Chapter: dimensionality/subspace-training
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        rank: int,
        rows: tuple[int, ...] = (0,),
        scale: float = 1.0,
        *,
        random_state: int = 0,
    ):
        super().__init__()
        self.shape, self.rows, self.scale = tuple(shape), tuple(rows), float(scale)
        height, width = unfold(torch.empty(self.shape, device="meta"), self.rows).shape
        if check_positive_int(rank, "rank") > min(height, width):
            raise ValueError(f"expected a rank of at most {min(height, width)}, got {rank}")
        generator = torch.Generator().manual_seed(random_state)
        self.a = nn.Parameter(torch.randn(rank, width, generator=generator) / math.sqrt(rank))
        self.b = nn.Parameter(torch.zeros(height, rank))

    def forward(self) -> Tensor:
        """Return the update, of the tensor's shape."""
        order = [*self.rows, *(a for a in range(len(self.shape)) if a not in self.rows)]
        folded = (self.b @ self.a).reshape([self.shape[a] for a in order])
        back = [order.index(a) for a in range(len(self.shape))]
        return self.scale * folded.permute(back)


def unfolding_floor(tensor: Any, rank: int, rows: tuple[int, ...] = (0,)) -> float:
    r"""Return the smallest relative error any rank-r matrix reaches in one layout of a tensor.

    By Eckart and Young it is $\sqrt{\sum_{i > r} \sigma_i^2} \,/\, \sqrt{\sum_i \sigma_i^2}$ of the unfolding's
    singular values, however long one trains.

    Args:
        tensor: the tensor to approximate.
        rank: r.
        rows: the axes that form the rows.

    >>> unfolding_floor(torch.eye(4).reshape(2, 2, 4), rank=2, rows=(0, 1))
    0.707...

    Paper: si2025flora
    Chapter: dimensionality/subspace-training
    """
    values = torch.linalg.svdvals(unfold(tensor, rows).double())
    rank = check_positive_int(rank, "rank")
    return float(values[rank:].norm() / values.norm())
