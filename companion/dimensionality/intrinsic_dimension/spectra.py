"""One number for how compressed a matrix of features is: exact from its spectrum, or cheap from its columns.

Public: `nuclear_norm`, `column_norm`, `matrix_nuclear_norm`, `matrix_entropy`, `MatrixNuclearNorm`.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from companion.checks import check_features, check_positive_int
from companion.geometry import single

__all__ = ["MatrixNuclearNorm", "column_norm", "matrix_entropy", "matrix_nuclear_norm", "nuclear_norm"]


def nuclear_norm(x: Any) -> Tensor:
    r"""Return the sum of the singular values, $\lVert X \rVert_* = \sum_i \sigma_i$.

    Args:
        x: a matrix (n, d).

    Raises:
        ValueError: NaN or infinity.

    >>> nuclear_norm(torch.diag(torch.tensor([3.0, 4.0])))
    tensor(7.)

    Paper: li2025large
    Chapter: dimensionality/intrinsic-dimension
    """
    x = check_features(x)
    return torch.linalg.svdvals(single(x)).sum().to(x.dtype)


def column_norm(x: Any, top: int | None = None) -> Tensor:
    r"""Return the sum of the column lengths, $\lVert X \rVert_{1,2} = \sum_j \sqrt{\sum_i X_{ij}^2}$.

    At least the nuclear norm, and equal to it when the columns are orthogonal: writing $X = \sum_j x_j e_j^\top$, the
    triangle inequality says so. No decomposition is needed, only a pass over the entries. It depends on the axes: turn
    the features and it changes, which the nuclear norm does not.

    Args:
        x: a matrix (n, d).
        top: only the longest `top` columns. That is no bound any more.

    Raises:
        ValueError: NaN or infinity, `top` below one.

    >>> column_norm([[3.0, 0.0], [0.0, 4.0]])
    tensor(7.)

    Paper: li2025large
    Chapter: dimensionality/intrinsic-dimension
    """
    lengths = torch.linalg.vector_norm(check_features(x), dim=0)
    if top is not None:
        lengths = lengths.topk(min(check_positive_int(top, "top"), len(lengths))).values
    return lengths.sum()


def matrix_nuclear_norm(x: Any, *, center: bool = True, top: int | None = None) -> Tensor:
    r"""Return the column norm of centred rows of length one, per row: $\lVert \hat X \rVert_{1,2} / n$.

    The cheap stand-in for the nuclear norm of hidden states. Between $1/\sqrt n$ and $\sqrt{d/n}$; smaller is more
    compressed, at the same n: values at different lengths do not compare.

    Args:
        x: hidden states (n, d), one row per token.
        center: subtract the mean row before the rows are scaled.
        top: only the longest `top` columns; the paper takes min(n, d).

    Raises:
        ValueError: NaN, infinity, or a row of zeros (after centring).

    >>> matrix_nuclear_norm(torch.eye(4), center=False)
    tensor(1.)

    Paper: li2025large
    Chapter: dimensionality/intrinsic-dimension
    """
    x = _unit_rows(check_features(x), center)
    return column_norm(x, top) / len(x)


def matrix_entropy(x: Any, *, center: bool = True) -> Tensor:
    r"""Return the von Neumann entropy of the covariance of rows of length one.

    $-\sum_i \lambda_i \log \lambda_i$ with $\lambda$ the eigenvalues of $\hat X^\top \hat X / n$, which sum to one: the
    exact, slower companion of `matrix_nuclear_norm`. Its exponential is a number of directions.

    Args:
        x: hidden states (n, d).
        center: subtract the mean row before the rows are scaled.

    Returns:
        A scalar between 0 and log min(n, d), in nats.

    Raises:
        ValueError: NaN, infinity, or a row of zeros (after centring).

    >>> matrix_entropy(torch.eye(4), center=False).exp()
    tensor(4.)

    Paper: li2025large
    Chapter: dimensionality/intrinsic-dimension
    """
    x = _unit_rows(check_features(x), center)
    wide = x.to(torch.float32 if x.device.type == "mps" else torch.float64)
    gram = (wide @ wide.T if x.shape[1] > x.shape[0] else wide.T @ wide) / len(x)
    values = torch.linalg.eigvalsh(gram)
    return torch.special.entr(torch.where(values > 0, values, 1.0)).sum().to(x.dtype)


def _unit_rows(x: Tensor, center: bool) -> Tensor:
    x = x - x.mean(0) if center else x
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    if not bool((length > 0).all()):
        where = "equals the mean row" if center else "is zero"
        raise ValueError(f"expected rows with a direction, got a row that {where}")
    return x / length


class MatrixNuclearNorm(Metric):
    """`matrix_nuclear_norm` averaged over prompts, as a metric: each update is one prompt's hidden states.

    Args:
        center: subtract the mean row of each prompt.
        top: only the longest `top` columns.
        **keywords: of `torchmetrics.Metric`.

    >>> metric = MatrixNuclearNorm(center=False)
    >>> metric.update(torch.eye(4))
    >>> metric.compute()
    tensor(1., dtype=torch.float64)

    Paper: li2025large
    Chapter: dimensionality/intrinsic-dimension
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    def __init__(self, *, center: bool = True, top: int | None = None, **keywords: Any):
        super().__init__(**keywords)
        self.center, self.top = center, top
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("prompts", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, x: Any) -> None:
        """Add hidden states: (n, d) for one prompt, (b, n, d) for several of one length."""
        x = torch.as_tensor(x, device=self.device)
        for rows in x if x.dim() == 3 else [x]:
            self.total += matrix_nuclear_norm(rows, center=self.center, top=self.top).to(self.total)
            self.prompts += 1

    def compute(self) -> Tensor:
        """Return the mean over prompts.

        Raises:
            ValueError: no prompt was seen.
        """
        if not self.prompts:
            raise ValueError("expected at least one prompt before compute, got none")
        return self.total / self.prompts
