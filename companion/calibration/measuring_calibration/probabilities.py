"""Probabilities of events that stay uncertain: coins with a hidden bias, and training that does not learn the flips.

Public: `make_latent_probability` and `LatentProbability`, `empirical_probability`, `EmpiricalTargets`, `CaPETrainer`.
"""

import copy
from fractions import Fraction
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from companion.calibration.measuring_calibration.errors import check_outcome
from companion.checks import (
    as_tensor,
    check_features,
    check_generator,
    check_in_range,
    check_positive_int,
    check_scores,
)
from companion.training import fit

__all__ = ["CaPETrainer", "EmpiricalTargets", "LatentProbability", "empirical_probability", "make_latent_probability"]

_CHUNK = 1 << 20  # kernel values at a time


class LatentProbability(NamedTuple):
    """Inputs x (n, d), the chance p (n,) that nobody observes, and the outcome y (n,), 0. or 1."""

    x: Tensor
    p: Tensor
    y: Tensor


def make_latent_probability(
    n: int,
    dim: int = 20,
    *,
    amplitude: float = 2.5,
    frequency: float = 1.5,
    generator: torch.Generator | int | None = None,
) -> LatentProbability:
    r"""Draw outcomes of coins whose bias is a smooth function of the input.

    $$p(x) = \sigma\big(a \sin(f\, w^\top x)\big), \qquad x \sim N(0, I), \quad y \sim \mathrm{Bernoulli}(p(x))$$

    with $w$ the unit vector along the first axis. Nobody can predict y better than p does; p is there to be compared
    with.

    Args:
        n: samples.
        dim: d; all axes but the first are irrelevant.
        amplitude: a; 0 makes every coin fair.
        frequency: f, how fast the chance changes.
        generator: a cpu generator or a seed (None: torch's default generator).

    Returns:
        `LatentProbability(x, p, y)`.

    Raises:
        ValueError: n or dim below 1, a negative amplitude.

    >>> data = make_latent_probability(1000, generator=0)
    >>> data.x.shape, abs(data.y.mean() - data.p.mean()).item() < 0.05
    (torch.Size([1000, 20]), True)

    Paper: liu2022deep

    Chapter: calibration/measuring-calibration
    """
    n, dim = check_positive_int(n, "n"), check_positive_int(dim, "dim")
    amplitude = check_in_range(amplitude, "amplitude", 0)
    frequency, generator = check_in_range(frequency, "frequency"), check_generator(generator)
    x = torch.randn(n, dim, generator=generator)
    p = torch.sigmoid(amplitude * torch.sin(frequency * x[:, 0]))
    return LatentProbability(x, p, torch.bernoulli(p, generator=generator))


def empirical_probability(scores: Any, outcomes: Any, n_bins: int = 10, bandwidth: float | None = None) -> Tensor:
    r"""Return, for each sample, how often the event happened among samples with similar scores.

    $$\hat p_i = \frac{1}{|B(i)|} \sum_{j \in B(i)} y_j \qquad\text{or}\qquad
    \hat p_i = \frac{\sum_j K_h(s_i - s_j)\, y_j}{\sum_j K_h(s_i - s_j)}$$

    B(i) is the bin of i among bins of equally many samples (by rank: ties are split in the order given, so that no bin
    is empty); K is a Gaussian kernel of width h.

    Args:
        scores: (..., n), probabilities or anything that ranks like them; leading dimensions are separate models.
        outcomes: (..., n), 0 or 1 for each.
        n_bins: how many bins.
        bandwidth: h; None uses the bins. The kernel takes O(n^2) time and bounded memory.

    Returns:
        (..., n) in the dtype of the scores. It does not follow scores back: a target, not a prediction.

    Raises:
        ValueError: NaN, shapes that differ, outcomes other than 0 and 1, more bins than samples.

    >>> empirical_probability([0.1, 0.2, 0.8, 0.9], [0, 1, 1, 1], n_bins=2)
    tensor([0.5000, 0.5000, 1.0000, 1.0000])

    Paper: liu2022deep

    Chapter: calibration/measuring-calibration
    """
    s = as_tensor(scores, "scores").detach()
    check_scores(s.flatten())
    s = s if s.is_floating_point() else s.to(torch.get_default_dtype())
    y = as_tensor(outcomes, "outcomes", s.device)
    if s.dim() == 0 or y.shape != s.shape:
        raise ValueError(f"expected scores and outcomes of one shape, got {tuple(s.shape)} and {tuple(y.shape)}")
    y = check_outcome(y.flatten(), y.numel(), s.device).view_as(y).to(s.dtype)
    n = s.shape[-1]
    if bandwidth is not None:
        h = check_in_range(bandwidth, "bandwidth", 0, inclusive="neither")
        return _smoothed(s, y, h)
    n_bins = check_positive_int(n_bins, "n_bins")
    if n_bins > n:
        raise ValueError(f"expected at most as many bins as samples, got n_bins={n_bins} for n={n}")
    rank = s.argsort(dim=-1, stable=True).argsort(dim=-1)
    bins = rank * n_bins // n
    shape = (*s.shape[:-1], n_bins)
    total = y.new_zeros(shape).scatter_add(-1, bins, y)
    count = y.new_zeros(shape).scatter_add(-1, bins, torch.ones_like(y))
    return (total / count).gather(-1, bins)


def _smoothed(s: Tensor, y: Tensor, h: float) -> Tensor:
    out = torch.empty_like(s)
    rows = max(1, _CHUNK // s.numel())
    for start in range(0, s.shape[-1], rows):
        part = slice(start, start + rows)
        kernel = (-0.5 * ((s[..., part, None] - s[..., None, :]) / h).square()).exp()
        out[..., part] = (kernel * y[..., None, :]).sum(-1) / kernel.sum(-1)
    return out


class EmpiricalTargets:
    """Targets that alternate between the outcomes and the rates among similar predictions: CaPE in anyone's loop.

    Train on `(x, targets.index)` with `batch_transform=targets.batch` and `callback=targets.refresh`, in
    `companion.training.fit` or, for several models at once, in `fit_many`.

    Args:
        x: training inputs (n, ...), or (m, n, ...) for m models.
        y: outcomes (n,) or (m, n).
        n_bins: bins of equally many samples, built anew from the current predictions before each calibrated epoch.
        ratio: calibrated epochs per ordinary one; below 1, ordinary ones prevail (the published code: 1 / 5), and 0
            trains on the outcomes only.
        bandwidth: uses a kernel of this width in place of bins.

    Attributes:
        index: what takes the place of y in training: the number of each sample.
        targets: the current targets, in the shape of y.

    Raises:
        ValueError: shapes that differ, outcomes other than 0 and 1.

    >>> targets = EmpiricalTargets([[-2.0], [-1.0], [1.0], [2.0]], [0, 1, 1, 1], n_bins=2)
    >>> targets.refresh(0, lambda x: x)  # after an ordinary epoch: the rates in two bins of the predictions
    >>> targets.targets
    tensor([0.5000, 0.5000, 1.0000, 1.0000])

    Paper: liu2022deep

    Chapter: calibration/measuring-calibration
    """

    def __init__(self, x: Any, y: Any, n_bins: int = 10, ratio: float = 3, bandwidth: float | None = None):
        self.x = as_tensor(x, "x")
        y = as_tensor(y, "y")
        check_outcome(y.flatten(), y.numel(), y.device)
        if self.x.shape[: y.dim()] != y.shape:
            raise ValueError(f"expected one outcome per input, got x {tuple(self.x.shape)} and y {tuple(y.shape)}")
        self.y = y.to(torch.get_default_dtype())
        self.n_bins, self.ratio = check_positive_int(n_bins, "n_bins"), check_in_range(ratio, "ratio", 0)
        self.bandwidth = bandwidth
        self.targets = self.y
        self.index = torch.arange(y.shape[-1]).expand(y.shape).contiguous()

    def batch(self, x: Tensor, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return the batch with the current targets of its samples."""
        return x, torch.take_along_dim(self.targets.to(x.device), index, -1)

    def refresh(self, epoch: int, model: Any) -> None:
        """Set the targets of the next epoch; calibrated ones come evenly spaced, after an ordinary first."""
        ratio = Fraction(self.ratio).limit_denominator(1000)
        share, following = ratio / (1 + ratio), epoch + 1
        if int(share * (following + 1)) == int(share * following):  # the count of calibrated epochs does not grow
            self.targets = self.y
            return
        with torch.no_grad():
            x = _for_model(self.x, model) if isinstance(model, nn.Module) else self.x
            scores = torch.sigmoid(model(x).squeeze(-1)).cpu()
        self.targets = empirical_probability(scores, self.y.cpu(), self.n_bins, self.bandwidth).to(self.y)


def _logistic(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs.squeeze(-1), targets)


def _for_model(x: Tensor, model: nn.Module) -> Tensor:
    """Return x on the device of a model, and floats in its dtype: arrays come in float64, networks in float32."""
    parameter = next(model.parameters())
    return x.to(parameter.device, parameter.dtype if x.is_floating_point() else x.dtype)


class CaPETrainer(BaseEstimator):
    r"""Train a network to state chances: cross-entropy until it starts to memorise, then calibrated targets.

    First, ordinary training on the outcomes; the weights with the lowest validation loss are kept. From there, epochs
    alternate: `ratio` epochs whose targets are `empirical_probability` of the current predictions for each one on the
    outcomes. Again the weights with the lowest validation loss are kept.

    Args:
        model: a module with one output, the logit of the event. A copy is trained.
        n_bins: bins of the empirical probabilities.
        ratio: calibrated epochs per ordinary one, as in `EmpiricalTargets`.
        bandwidth: uses a kernel of this width in place of bins.
        warmup: epochs of the first phase, at most.
        epochs: epochs of the second phase; 0 is early stopping and nothing else.
        lr: learning rate of the first phase; the second takes half of it.
        batch_size: of both.
        validation: share of the samples kept for validation, in (0, 1).
        keep: "best" keeps the weights of the lowest validation loss in the second phase, "last" the last ones.
        device: see `companion.runtime.device`.
        random_state: splits, shuffles; None means torch's default generator.

    Attributes:
        model_: the trained copy.
        validation_loss_: its log-loss on the validation part.
        early_loss_: the log-loss that the first phase ended with.

    >>> from companion.nets import MLP
    >>> x, p, y = make_latent_probability(400, 3, generator=0)
    >>> trainer = CaPETrainer(MLP((3, 16, 1), seed=0), warmup=5, epochs=4, random_state=0).fit(x, y)
    >>> trainer.predict_proba(x).shape
    torch.Size([400, 2])

    Paper: liu2022deep

    Chapter: calibration/measuring-calibration
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        n_bins: int = 10,
        ratio: float = 3,
        bandwidth: float | None = None,
        warmup: int = 60,
        epochs: int = 60,
        lr: float = 1e-3,
        batch_size: int = 128,
        validation: float = 0.2,
        keep: str = "best",
        device: str = "auto",
        random_state: Any = None,
    ):
        self.model = model
        self.n_bins = n_bins
        self.ratio = ratio
        self.bandwidth = bandwidth
        self.warmup = warmup
        self.epochs = epochs
        self.lr = lr
        self.batch_size = batch_size
        self.validation = validation
        self.keep = keep
        self.device = device
        self.random_state = random_state

    def fit(self, x: Any, y: Any) -> "CaPETrainer":
        """Train on inputs x (n, d) and outcomes y (n,), 0 or 1; return self."""
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"expected model to be a torch.nn.Module, got {type(self.model).__name__}")
        if self.keep not in ("best", "last"):
            raise ValueError(f"expected keep to be 'best' or 'last', got {self.keep!r}")
        share = check_in_range(self.validation, "validation", 0, 1, inclusive="neither")
        check_positive_int(self.epochs, "epochs", minimum=0)
        x = check_features(x, min_samples=10)
        y = check_outcome(y, x.shape[0], x.device).to(x.dtype)
        generator = check_generator(self.random_state, "random_state")
        order = torch.randperm(x.shape[0], generator=generator).to(x.device)
        n_val = max(1, round(share * x.shape[0]))
        val, train = order[:n_val], order[n_val:]
        model = copy.deepcopy(self.model)
        shared = {"batch_size": self.batch_size, "device": self.device, "generator": generator, "loss": _logistic}

        best = _Best(x[val], y[val])
        fit(model, x[train], y[train], epochs=self.warmup, lr=self.lr, callback=best, **shared)
        model.load_state_dict(best.state)
        self.early_loss_ = best.loss
        if self.epochs:
            targets = EmpiricalTargets(x[train], y[train], self.n_bins, self.ratio, self.bandwidth)
            last = _Best(x[val], y[val], always=self.keep == "last", start=best)

            def after(epoch: int, model: nn.Module) -> None:
                last(epoch, model)
                targets.refresh(epoch, model)

            fit(
                model, x[train], targets.index, epochs=self.epochs, lr=self.lr / 2, batch_transform=targets.batch,
                callback=after, **shared,
            )  # fmt: skip
            model.load_state_dict(last.state)
            best = last
        self.model_, self.validation_loss_ = model, best.loss
        return self

    def predict_proba(self, x: Any) -> Tensor:
        """Return (n, 2): the chances that the event does not happen, and that it does."""
        check_is_fitted(self)
        x = check_features(x)
        with torch.no_grad():
            p = torch.sigmoid(self.model_(_for_model(x, self.model_)).squeeze(-1)).to(x)
        return torch.stack([1 - p, p], dim=1)


class _Best:
    """A callback that keeps the weights with the lowest validation loss, or always the last ones."""

    def __init__(self, x: Tensor, y: Tensor, always: bool = False, start: "_Best | None" = None):
        self.x, self.y, self.always = x, y, always
        self.loss, self.state = (start.loss, start.state) if start else (float("inf"), {})

    def __call__(self, epoch: int, model: nn.Module) -> None:
        with torch.no_grad():
            loss = _logistic(model(_for_model(self.x, model)), _for_model(self.y, model)).item()
        if self.always or loss < self.loss or not self.state:
            self.loss, self.state = loss, copy.deepcopy(model.state_dict())
