"""Matrix products on a processor as fast as torch can have them, and the usual ones elsewhere.

oneDNN multiplies float32 matrices up to twice as fast as the library behind `torch.mm`, to the same accuracy. torch
offers it for tensors in its own layout, which cannot be sliced, written to or differentiated without surprises: they
live from `packed` to `product` and nowhere else.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

_SIDE = 256  # columns per piece of a matrix whose other half is known or zero
_CACHED = 2**18  # numbers per block: larger temporaries go back to the system each time, and cost more than their use


def block_rows(x: Tensor) -> int:
    """Return how many rows of x to work on at a time: a block that stays in the cache, or enough for a card."""
    return max(512, min(4096, _CACHED // max(1, x.shape[1]))) if x.device.type == "cpu" else 8192


def packed(x: Tensor) -> Tensor:
    """Return a matrix as `product` multiplies it fastest: a copy in oneDNN's layout, or x itself where none helps."""
    return x.to_mkldnn() if _helps(x) else x


def _helps(x: Tensor) -> bool:
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return on_cpu and not x.requires_grad


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Return $a b^\top$, of (n, d) and (m, d), plus a bias (m,): (n, m). Either may be packed, or both.

    Gradients flow to what is not packed.

    >>> product(packed(torch.ones(2, 3)), torch.ones(1, 3), torch.tensor([0.5]))
    tensor([[3.5000],
            [3.5000]])
    """
    if any(part is not None and part.requires_grad for part in (a, b, bias)):
        a, b = (part.to_dense() if part.is_mkldnn else part for part in (a, b))
    if not (a.is_mkldnn or b.is_mkldnn):
        return a @ b.T if bias is None else torch.addmm(bias, a, b.T)
    parts = [part if part is None or part.is_mkldnn else part.to_mkldnn() for part in (a, b, bias)]
    return F.linear(*parts).to_dense()


def add_gram(total: Tensor, blocks: Iterable[Tensor]) -> None:
    r"""Add $\sum_b b^\top b$ of blocks (n, d) to a symmetric (d, d), in the dtype of that.

    >>> total = torch.zeros(2, 2, dtype=torch.float64)
    >>> add_gram(total, [torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0]])])
    >>> total
    tensor([[1., 2.],
            [2., 5.]], dtype=torch.float64)
    """
    halved = False
    for x in blocks:
        if len(total) <= _SIDE or len(x) < _SIDE // 2 or not _helps(x):
            total += x.T @ x
            continue
        halved, flipped = True, x.T.contiguous()  # what is multiplied lies in rows
        rows = [packed(piece) for piece in flipped.split(_SIDE)]
        for left, strip in zip(rows, total.split(_SIDE)):
            for right, into in zip(rows, strip.split(_SIDE, 1)):
                into += product(left, right)
                if left is right:
                    break
    if halved:  # the products right of the diagonal are those left of it
        for start in range(_SIDE, len(total), _SIDE):
            total[start - _SIDE : start, start:] = total[start:, start - _SIDE : start].T


class SquaredLengths:
    r"""$\lVert W z \rVert^2$ of the rows z of a matrix (n, d), for W (k, d): zeros right of its rows are skipped.

    A triangular W, such as comes from a Cholesky factor, takes three quarters of the work for d = 512.

    >>> SquaredLengths(torch.tensor([[1.0, 0.0], [3.0, 2.0]]))(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    tensor([26.,  4.])
    """

    def __init__(self, w: Tensor):
        columns = torch.arange(1, w.shape[1] + 1, device=w.device)
        self.pieces = []
        for piece in w.split(_SIDE if _helps(w) else max(1, len(w))):
            width = int((columns * piece.any(0)).amax())
            self.pieces.append((packed(piece[:, :width]), width))

    def __call__(self, z: Tensor) -> Tensor:
        """Return the squared lengths (n,)."""
        total = z.new_zeros(len(z))
        for piece, width in self.pieces:
            if width:
                total += product(packed(z[:, :width]), piece).square_().sum(1)
        return total
