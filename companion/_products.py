"""Matrix products on a processor as fast as torch can have them, and the usual ones elsewhere.

oneDNN multiplies float32 matrices up to twice as fast as the library behind `torch.mm`, to the same accuracy. torch
offers it for tensors in its own layout, which cannot be sliced, written to or differentiated without surprises: they
live from `packed` to `product` and nowhere else.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def packed(x: Tensor) -> Tensor:
    """Return a matrix as `product` multiplies it fastest: a copy in oneDNN's layout, or x itself where none helps."""
    helps = x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return x.to_mkldnn() if helps and not x.requires_grad else x


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Return $a b^\top$, of (n, d) and (m, d), plus a bias (m,): (n, m). Either may be packed, or both.

    >>> product(packed(torch.ones(2, 3)), torch.ones(1, 3), torch.tensor([0.5]))
    tensor([[3.5000],
            [3.5000]])
    """
    if not (a.is_mkldnn or b.is_mkldnn):
        return a @ b.T if bias is None else torch.addmm(bias, a, b.T)
    parts = [part if part is None or part.is_mkldnn else part.to_mkldnn() for part in (a, b, bias)]
    return F.linear(*parts).to_dense()
