"""Means and covariances: streamed, mergeable, per class too, and shrunk where samples are few.

Public: `Moments`, `ClassMoments` and what they return, `MeanCovariance`; `ledoit_wolf`, `oas`, `shrunk_covariance`
and what the first two return, `ShrunkCovariance`.

The two metrics keep a count, a mean and the scatter around that mean, and merge them by the rule of Chan, Golub and
LeVeque. Nothing is ever computed as E[x^2] - E[x]^2, so a mean of 1e4 beside a variance of 1 costs no digits, and
batches, `merge_state` and processes under `torchrun` all merge by the same formula.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from companion._products import add_gram, block_rows
from companion.checks import as_tensor, check_features, check_in_range, check_labels, check_positive_int

__all__ = [
    "ClassMoments",
    "MeanCovariance",
    "Moments",
    "ShrunkCovariance",
    "ledoit_wolf",
    "oas",
    "shrunk_covariance",
]


class MeanCovariance(NamedTuple):
    """What moments come to: mean, covariance (None where it was not asked for) and counts."""

    mean: Tensor
    covariance: Tensor | None
    counts: Tensor


class ShrunkCovariance(NamedTuple):
    """A covariance (d, d) pulled towards a multiple of the identity, and how far (0 to 1)."""

    covariance: Tensor
    shrinkage: Tensor


class _Layout(NamedTuple):
    """How counts, means and scatter lie in one flat state: one state is what lets them be merged together."""

    classes: int
    dim: int
    scatter: tuple[int, ...]
    kind: str | None  # the shape does not tell: with as many classes as dimensions (C, d) and (d, d) are the same

    @classmethod
    def of(cls, classes: int, dim: int, covariance: str | None) -> "_Layout":
        shapes = {None: (0,), "full": (classes, dim, dim), "diagonal": (classes, dim), "pooled": (dim, dim)}
        return cls(classes, dim, shapes[covariance], covariance)

    def zeros(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self.classes * (1 + self.dim) + torch.Size(self.scatter).numel(), dtype=dtype)

    def unpack(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return views: counts (C,), means (C, d), scatter."""
        first, second = self.classes, self.classes * (1 + self.dim)
        mean = state[first:second].view(self.classes, self.dim)
        return state[:first], mean, state[second:].view(self.scatter)


def _merge(states: Tensor, layout: _Layout) -> Tensor:
    """Merge stacked states, shape (parts, ...), into one."""
    merged = states[0].clone()
    for part in states[1:]:
        _merge_into(merged, layout.unpack(part), layout)
    return merged


def _merge_into(state: Tensor, part: tuple[Tensor, Tensor, Tensor], layout: _Layout) -> None:
    r"""Merge a part into a state in place: $S = S_a + S_b + \frac{n_a n_b}{n_a + n_b} \delta\delta^\top$."""
    count, mean, scatter = layout.unpack(state)
    part_count, part_mean, part_scatter = part
    total = (count + part_count).clamp_min(1)
    delta = part_mean - mean  # (C, d)
    weight = count * part_count / total
    if scatter.numel():
        scatter += part_scatter
        if layout.kind == "diagonal":
            scatter += weight[:, None] * delta.square()
        elif layout.kind == "pooled":
            scatter += (weight[:, None] * delta).T @ delta
        else:
            for c in weight.nonzero().squeeze(1).tolist():  # one at a time: no second (C, d, d)
                scatter[c].addr_(delta[c], delta[c], alpha=float(weight[c]))
    # without a sample of its own the state takes the part's mean as it is, digit for digit
    mean += torch.where(count[:, None] == 0, delta, delta * (part_count / total)[:, None])
    count += part_count


def _product_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _add_scatter(scatter: Tensor, x: Tensor, y: Tensor | None, mean: Tensor, count: Tensor) -> None:
    r"""Add the scatter around the mean of each row's class, of the one class where y is None.

    Rows are centred at $r_c = \mu_c - \delta_c$, the mean in the dtype of products, which adds
    $\sum_c n_c \delta_c\delta_c^\top$: that is taken off again.
    """
    dtype, size = _product_dtype(x), block_rows(x)
    rounded = mean.to(dtype)
    if y is None:
        blocks = (rows.to(dtype) - rounded for rows in x.split(size))
    else:
        pairs = zip(x.split(size), y.split(size))
        blocks = (rows.to(dtype) - rounded.index_select(0, labels) for rows, labels in pairs)
    add_gram(scatter, blocks)
    rest = mean - rounded
    scatter -= (count[:, None] * rest).T @ rest


def _batch_moments(x: Tensor, y: Tensor, layout: _Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return counts, means and scatter of a batch, in two passes over it."""
    size = block_rows(x)
    count = torch.bincount(y, minlength=layout.classes).to(dtype)
    anchor = x[:size].to(dtype).mean(0)  # sums of small numbers: what lies far from zero is taken off first
    sums = torch.zeros(layout.classes, layout.dim, dtype=dtype, device=x.device)
    for rows, labels in zip(x.split(size), y.split(size)):
        sums.index_add_(0, labels, rows.to(dtype) - anchor)
    mean = torch.where(count[:, None] > 0, anchor + sums / count.clamp_min(1)[:, None], 0)
    scatter = torch.zeros(layout.scatter, dtype=dtype, device=x.device)
    if layout.kind == "diagonal":
        for rows, labels in zip(x.split(size), y.split(size)):
            scatter.index_add_(0, labels, (rows.to(dtype) - mean[labels]).square_())
    elif layout.kind == "pooled":
        _add_scatter(scatter, x, y, mean, count)
    elif layout.kind == "full":
        for c, rows in enumerate(y.argsort(stable=True).split(count.long().tolist())):
            for index in rows.split(size):
                _add_scatter(scatter[c], x[index], None, mean[c : c + 1], count.new_tensor([len(index)]))
    return count, mean, scatter


class _Streamed(Metric):
    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    state: Tensor

    def __init__(self, layout: _Layout, covariance: str | None, correction: int, dtype: torch.dtype, **kwargs: Any):
        super().__init__(**kwargs)
        self.layout, self.covariance = layout, covariance
        self.correction = check_positive_int(correction, "correction", minimum=0)
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"expected dtype to be torch.float32 or torch.float64, got {dtype}")
        self.add_state("state", layout.zeros(dtype), dist_reduce_fx=partial(_merge, layout=layout))

    def _add(self, x: Tensor, y: Tensor) -> None:
        if x.shape[1] != self.layout.dim:
            raise ValueError(f"expected x with {self.layout.dim} features, got shape {tuple(x.shape)}")
        self.state = self.state.clone()  # what was handed out before (metric_state) must not change under its owner
        _merge_into(self.state, _batch_moments(x, y, self.layout, self.state.dtype), self.layout)


def _check_covariance(covariance: str | None, allowed: tuple) -> None:
    if covariance not in allowed:
        raise ValueError(f"expected covariance to be one of {allowed}, got {covariance!r}")


class Moments(_Streamed):
    r"""Mean and covariance of a stream of features, in one pass.

    $$\mu = \frac1n \sum_i x_i, \qquad \Sigma = \frac{1}{n - c} \sum_i (x_i - \mu)(x_i - \mu)^\top$$

    Merges exactly over batches, over metrics (`merge_state`) and over processes.

    Args:
        dim: d.
        covariance: "full" (d, d), "diagonal" (d,), or None for the mean alone.
        correction: c, 0 for the maximum-likelihood covariance, 1 for the unbiased one.
        dtype: of the accumulators; float32 only for devices without float64.
        **kwargs: for `torchmetrics.Metric`.

    Raises:
        ValueError: features of another width, NaN or infinity; `compute` without more than c samples.

    >>> moments = Moments(dim=2)
    >>> moments.update([[1.0, 0.0], [3.0, 0.0]])
    >>> moments.update([[5.0, 3.0]])
    >>> moments.compute().mean
    tensor([3., 1.], dtype=torch.float64)
    """

    def __init__(
        self,
        dim: int,
        covariance: str | None = "full",
        *,
        correction: int = 0,
        dtype: torch.dtype = torch.float64,
        **kwargs: Any,
    ):
        _check_covariance(covariance, ("full", "diagonal", None))
        # of one class the pooled covariance is the full one
        layout = _Layout.of(1, check_positive_int(dim, "dim"), "pooled" if covariance == "full" else covariance)
        super().__init__(layout, covariance, correction, dtype, **kwargs)

    def update(self, x: Any) -> None:
        """Take in features, shape (n, d), on the device of the metric."""
        x = check_features(x, device=self.device).detach()
        self._add(x, torch.zeros(len(x), dtype=torch.int64, device=x.device))

    def compute(self) -> MeanCovariance:
        """Return `MeanCovariance(mean, covariance, counts)`: (d,), (d, d) or (d,) or None, and a whole number."""
        count, mean, scatter = self.layout.unpack(self.state)
        if count <= self.correction:
            raise ValueError(f"expected more than {self.correction} sample(s) before compute(), got {int(count)}")
        covariance = None
        if self.covariance is not None:
            shape = (self.layout.dim,) * (2 if self.covariance == "full" else 1)
            covariance = (scatter / (count - self.correction)).view(shape)
        return MeanCovariance(mean[0].clone(), covariance, count[0].long())


class ClassMoments(_Streamed):
    r"""Mean and covariance of each class of a stream of labelled features, in one pass.

    Args:
        num_classes: C.
        dim: d.
        covariance: "full" (C, d, d), "diagonal" (C, d), "pooled" (d, d), the covariance around the class means over
            all samples, or None. A full one takes 8 C d^2 bytes.
        correction: c, taken off each class's count (off n as often as there are classes, when pooled).
        dtype: of the accumulators; float32 only for devices without float64.
        **kwargs: for `torchmetrics.Metric`.

    Raises:
        ValueError: features of another width, NaN or infinity, labels outside 0..C-1; `compute` before any sample.

    >>> moments = ClassMoments(num_classes=2, dim=1, covariance="pooled")
    >>> moments.update([[1.0], [3.0], [7.0]], [0, 0, 1])
    >>> moments.compute().mean
    tensor([[2.],
            [7.]], dtype=torch.float64)
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        covariance: str | None = "full",
        *,
        correction: int = 0,
        dtype: torch.dtype = torch.float64,
        **kwargs: Any,
    ):
        _check_covariance(covariance, ("full", "diagonal", "pooled", None))
        classes, dim = check_positive_int(num_classes, "num_classes"), check_positive_int(dim, "dim")
        super().__init__(_Layout.of(classes, dim, covariance), covariance, correction, dtype, **kwargs)

    def update(self, x: Any, y: Any) -> None:
        """Take in features, shape (n, d), and labels, shape (n,), on the device of the metric."""
        x = check_features(x, device=self.device).detach()
        self._add(x, check_labels(y, n=len(x), n_classes=self.layout.classes, device=x.device))

    def compute(self) -> MeanCovariance:
        """Return `MeanCovariance(mean, covariance, counts)`, mean (C, d) and counts (C,).

        A class without a sample has a mean of NaN, and one with no more than c samples a covariance of NaN.
        """
        count, mean, scatter = self.layout.unpack(self.state)
        if not bool(count.any()):
            raise ValueError("expected at least 1 sample before compute(), got none")
        mean = torch.where(count[:, None] > 0, mean, torch.nan)
        covariance = None
        if self.covariance is not None:
            free = count - self.correction
            if self.covariance == "pooled":
                free = count.sum() - self.correction * (count > 0).sum()
            free = torch.where(free > 0, free, torch.nan)
            covariance = scatter / free.view(free.shape + (1,) * (scatter.dim() - free.dim()))
        return MeanCovariance(mean, covariance, count.long())


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def _empirical(x: Any, assume_centered: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return features as a tensor, their covariance, and the mean fourth power of the centred rows' lengths."""
    x = check_features(x, min_samples=1 if assume_centered else 2)
    size = block_rows(x)
    mean = torch.zeros(x.shape[1], dtype=_wide(x), device=x.device)
    if not assume_centered:
        mean = sum((rows.to(mean.dtype).sum(0) for rows in x.split(size)), mean) / len(x)
    scatter = torch.zeros(x.shape[1], x.shape[1], dtype=mean.dtype, device=x.device)
    _add_scatter(scatter, x, None, mean[None], mean.new_tensor([len(x)]))
    rounded = mean.to(_product_dtype(x))
    squares = (((rows.to(rounded.dtype) - rounded).square().sum(1)) for rows in x.split(size))
    return x, scatter / len(x), sum(square.to(mean.dtype).square().sum() for square in squares) / len(x)


def _shrunk(covariance: Tensor, shrinkage: Tensor, x: Tensor) -> ShrunkCovariance:
    return ShrunkCovariance(shrunk_covariance(covariance, shrinkage).to(x.dtype), shrinkage.to(x.dtype))


def ledoit_wolf(x: Any, *, assume_centered: bool = False) -> ShrunkCovariance:
    r"""Return the Ledoit-Wolf covariance: the shrinkage that minimises the expected squared error.

    With the empirical covariance $S$, $\mu = \operatorname{tr} S / d$ and centred rows $x_i$,

    $$\hat\Sigma = (1 - s) S + s \mu I, \qquad
      s = \min\left(1, \frac{\frac1{n^2} \sum_i \lVert x_i x_i^\top - S \rVert^2}{\lVert S - \mu I \rVert^2}\right).$$

    Args:
        x: features, shape (n, d).
        assume_centered: True takes x as it is, with mean zero.

    Returns:
        `ShrunkCovariance(covariance, shrinkage)` on the device and in the dtype of x.

    Raises:
        ValueError: another shape, fewer than 2 samples, NaN or infinity.

    >>> ledoit_wolf([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]]).shrinkage
    tensor(0.9444)
    """
    x, empirical, fourth = _empirical(x, assume_centered)
    n, d = x.shape
    target = empirical.trace() / d
    norm = empirical.square().sum()
    distance = norm - d * target**2  # |S - mu I|^2
    error = torch.minimum((fourth - norm) / n, distance)  # sum |x x^T|^2 = sum |x|^4
    if d == 1 or not error > 0:
        return _shrunk(empirical, torch.zeros_like(target), x)
    return _shrunk(empirical, error / distance, x)


def oas(x: Any, *, assume_centered: bool = False) -> ShrunkCovariance:
    r"""Return the oracle approximating shrinkage covariance, which assumes Gaussian features.

    With the empirical covariance $S$ and $\mu = \operatorname{tr} S / d$,

    $$\hat\Sigma = (1 - s) S + s \mu I, \qquad s = \min\left(1,
      \frac{\lVert S \rVert^2 / d^2 + \mu^2}{(n + 1) \left(\lVert S \rVert^2 / d^2 - \mu^2 / d\right)}\right).$$

    This is scikit-learn's form; the published one has factors $1 - 2/d$ and $n + 1 - 2/d$, which tend to it.

    Args:
        x: features, shape (n, d).
        assume_centered: True takes x as it is, with mean zero.

    Returns:
        `ShrunkCovariance(covariance, shrinkage)` on the device and in the dtype of x.

    Raises:
        ValueError: another shape, fewer than 2 samples, NaN or infinity.

    >>> oas([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]]).shrinkage
    tensor(1.)
    """
    x, empirical, _ = _empirical(x, assume_centered)
    n, d = x.shape
    target = empirical.trace() / d
    if d == 1:
        return _shrunk(empirical, torch.zeros_like(target), x)
    mean_square = empirical.square().mean()
    numerator, denominator = mean_square + target**2, (n + 1) * (mean_square - target**2 / d)
    if not denominator > 0:
        return _shrunk(empirical, torch.ones_like(target), x)
    return _shrunk(empirical, (numerator / denominator).clamp_max(1), x)


def shrunk_covariance(covariance: Any, shrinkage: float | Tensor = 0.1) -> Tensor:
    r"""Return $(1 - s) \Sigma + s \mu I$ with $\mu = \operatorname{tr} \Sigma / d$: the same trace, better conditioned.

    Args:
        covariance: one covariance (d, d) or many (..., d, d).
        shrinkage: s in [0, 1].

    Raises:
        ValueError: not square, or s out of range.

    >>> shrunk_covariance([[4.0, 1.0], [1.0, 2.0]], 0.5)
    tensor([[3.5000, 0.5000],
            [0.5000, 2.5000]])
    """
    covariance = as_tensor(covariance, "covariance")
    if not covariance.is_floating_point():
        covariance = covariance.to(torch.get_default_dtype())
    if covariance.dim() < 2 or covariance.shape[-1] != covariance.shape[-2] or covariance.shape[-1] == 0:
        raise ValueError(f"expected covariance of shape (..., d, d), got {tuple(covariance.shape)}")
    # scalar tensors are kept, so that gradients flow through a shrinkage that was computed
    check_in_range(shrinkage.detach() if isinstance(shrinkage, Tensor) else shrinkage, "shrinkage", 0, 1)
    target = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return (1 - shrinkage) * covariance + shrinkage * target[..., None, None] * identity
