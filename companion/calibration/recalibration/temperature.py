"""One number against overconfidence: temperature scaling, solved exactly.

Public: `nll_slope`, `TemperatureScaler`.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from companion.checks import check_in_range, check_labels, check_logits

__all__ = ["TemperatureScaler", "nll_slope"]

_CHUNK = 1 << 18  # logits per chunk: two buffers of this size stay in the cache
_SAMPLE = 4096  # rows that give Newton its start
_STEPS = 100  # bisection alone would be done by then


def like(values: Tensor, given: Any) -> Any:
    """Return values as the kind of thing that was given: a tensor for a tensor, an array for anything else."""
    return values if isinstance(given, Tensor) else values.detach().cpu().numpy()


def applied(fitted: nn.Module, x: Tensor) -> Tensor:
    """Return what a fitted module gives for x, in the dtype of x; the module itself stays as it was fitted."""
    parameter = next(fitted.parameters())
    wide = torch.promote_types(parameter.dtype, x.dtype)
    if (parameter.device, parameter.dtype) != (x.device, wide):
        fitted = copy.deepcopy(fitted).to(x.device, wide)
    return fitted(x.to(wide)).to(x.dtype)


def check_columns(logits: Tensor, n_classes: int) -> Tensor:
    """Return logits when they have as many columns as the estimator was fitted with, else raise ValueError."""
    if logits.shape[-1] != n_classes:
        raise ValueError(f"expected {n_classes} classes (columns), as in fit, got {logits.shape[-1]}")
    return logits


def _slopes(z: Tensor, y: Tensor, inverse: float, dtype: torch.dtype) -> tuple[float, float]:
    """Return the mean NLL's first and second derivative in b, each times its power of b, at b = `inverse`.

    With u = b z the first is b dNLL/db = mean(E_p[u] - u_y) and the second b^2 d^2NLL/db^2 = mean(Var_p[u]).
    """
    n, n_classes = z.shape
    rows = min(n, max(1, _CHUNK // n_classes))
    buffers = torch.empty(2, rows, n_classes, dtype=dtype, device=z.device)
    first = second = 0.0
    for start in range(0, n, rows):
        chunk = z[start : start + rows]
        u, weights = buffers[:, : len(chunk)]
        u.copy_(chunk).sub_(chunk.amax(1, keepdim=True)).mul_(inverse)  # (rows, C), at most 0
        u_y = u.gather(1, y[start : start + rows, None]).squeeze(1)
        torch.exp(u, out=weights)
        total = weights.sum(1)
        mean = weights.mul_(u).sum(1).div_(total)  # E_p[u]
        square = weights.mul_(u).sum(1).div_(total)  # E_p[u^2]
        first += (mean - u_y).sum(dtype=torch.float64).item()
        second += square.addcmul_(mean, mean, value=-1).sum(dtype=torch.float64).item()
    return first / n, second / n


def nll_slope(logits: Any, labels: Any, temperature: float = 1.0) -> float:
    r"""Return the derivative of the mean negative log-likelihood in the logarithm of the temperature.

    $$\frac{d\,\mathrm{NLL}}{d\log T} = \frac1n \sum_i \Big(u_{i,y_i} - \sum_c p_{ic}\,u_{ic}\Big),
    \qquad u = z / T,\quad p = \mathrm{softmax}(u)$$

    Negative means that a higher temperature would lower the loss: the logits are overconfident. It is accumulated in
    float64 whatever the input.

    Args:
        logits: (n, C).
        labels: (n,) true classes.
        temperature: where to take the slope, above 0.

    Returns:
        The slope; 0 at the temperature that `TemperatureScaler` finds.

    Raises:
        ValueError: not logits, labels outside 0..C-1, a temperature of at most 0.
        TypeError: not numbers.

    >>> logits = [[2.0, 0.0], [2.0, 0.0], [0.0, 2.0]]
    >>> round(nll_slope(logits, [0, 1, 1]), 4)  # one of three is wrong, and all are 88 % sure
    -0.4283

    Chapter: calibration/recalibration
    """
    z = check_logits(logits)
    y = check_labels(labels, z.shape[0], z.shape[1], device=z.device)
    temperature = check_in_range(temperature, "temperature", 0, inclusive="neither")
    return -_slopes(z.detach(), y, 1 / temperature, torch.float64)[0]


def _newton(
    slopes: Callable[[float], tuple[float, float]], start: float, tolerance: float, steps: int = _STEPS
) -> tuple[float, bool]:
    """Return where the convex NLL is flat, by Newton's method inside a bracket, and whether it got there."""
    low, high, b = 0.0, float("inf"), start
    for _ in range(steps):
        first, second = slopes(b)
        if abs(first) <= tolerance * min(1, second):  # the slope is small, and so is the next relative step
            return b, True
        low, high = (low, b) if first > 0 else (b, high)
        floor, ceiling = max(low, b / 8), min(high, b * 8)  # one-sided brackets grow by a factor of 8 at most
        proposal = b - b * first / second if second > 0 else 0.0
        # Newton squares the relative error: after a step this small there is nothing left to look at
        last = first * first <= 1e-2 * tolerance * min(second, 1) * second
        if not floor < proposal < ceiling:
            bracketed = low > 0 and high < float("inf")
            proposal, last = (low * high) ** 0.5 if bracketed else (floor if first > 0 else ceiling), False
        if last or proposal == b:
            return proposal, True
        b = proposal
    return b, False


class TemperatureScaler(BaseEstimator):
    r"""Divide all logits by the one temperature that makes held-out labels most likely.

    $$T = \arg\min_{T > 0} \; -\frac1n \sum_i \log \mathrm{softmax}(z_i / T)_{y_i}$$

    The loss is convex in the inverse temperature, so a safeguarded Newton iteration finds the minimum to rounding:
    the slope `nll_slope(logits, labels, temperature_)` is below 1e-6, in float64, for logits of any scale. Memory is
    that of a chunk of rows.

    Where the loss has no minimum, fit warns and takes a bound: the lower one when the logits rank the true class first
    in every row (any sharpening helps), the upper one when they are worse than a guess (no temperature helps). Logits
    that are constant within every row have nothing to scale: the temperature is 1, with the same warning.

    Args:
        bounds: lowest and highest temperature to fall back on, in units of the logits' spread (the root mean square
            of their deviation from the row's mean). A minimum that exists is returned even when it lies outside.

    Attributes:
        temperature_: the fitted temperature, above 0.
        n_classes_: how many classes (columns) the logits had.

    >>> logits = [[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [0.0, 4.0], [0.0, 4.0], [0.0, 4.0]]
    >>> scaler = TemperatureScaler().fit(logits, [0, 0, 1, 1, 1, 0])  # 98 % sure, right in 4 of 6
    >>> round(scaler.temperature_, 3)  # 4 / log 2: now 2/3 sure
    5.771
    >>> scaler.predict_proba([[4.0, 0.0]]).round(3)
    array([[0.667, 0.333]], dtype=float32)

    Paper: chidambaram2024limitations
    Chapter: calibration/recalibration
    """

    def __init__(self, bounds: tuple[float, float] = (1e-3, 1e3)) -> None:
        self.bounds = bounds

    def fit(self, logits: Any, labels: Any) -> "TemperatureScaler":
        """Find the temperature on held-out data, never on the data the network was trained on.

        Args:
            logits: (n, C), what the network gives before its softmax; a tensor or an array.
            labels: (n,) true classes.

        Returns:
            The fitted scaler.

        Raises:
            ValueError: not logits, labels outside 0..C-1, or bounds that are not 0 < low < high.
            TypeError: not numbers.
        """
        low, high = (check_in_range(bound, "bounds", 0, inclusive="neither") for bound in self.bounds)
        if not low < high:
            raise ValueError(f"expected bounds with low < high, got {self.bounds}")
        z = check_logits(logits).detach()
        y = check_labels(labels, z.shape[0], z.shape[1], device=z.device)
        temperature, trouble = _from_a_sample(z, y), ""
        if temperature is None:
            temperature, trouble = _from_all_rows(z, y, low, high)
        if trouble:
            warnings.warn(f"no finite temperature is best: {trouble}", ConvergenceWarning, stacklevel=2)
        self.n_classes_ = z.shape[1]
        self.temperature_ = temperature
        return self

    def transform(self, logits: Any) -> Any:
        """Return logits / temperature_, in the kind and dtype of the input (an array for a list).

        Args:
            logits: (n, C).

        Raises:
            NotFittedError: `fit` has not been called.
            ValueError: not logits, or another number of classes than in `fit`.
        """
        check_is_fitted(self)
        z = check_columns(check_logits(logits), self.n_classes_)
        return like(z / self.temperature_, logits)

    def predict_proba(self, logits: Any) -> Any:
        """Return softmax(logits / temperature_), in the kind and dtype of the input (an array for a list).

        Args:
            logits: (n, C).

        Raises:
            NotFittedError: `fit` has not been called.
            ValueError: not logits, or another number of classes than in `fit`.
        """
        check_is_fitted(self)
        z = check_columns(check_logits(logits), self.n_classes_)
        return like(torch.softmax(z / self.temperature_, dim=1), logits)


def _shape_of_the_loss(z: Tensor, y: Tensor) -> tuple[float, bool, float]:
    """Return the logits' spread, whether the true class is first in every row, and dNLL/db at b = 0 in that spread."""
    rows = max(1, _CHUNK // z.shape[1])
    square, right, slope, constant = 0.0, True, 0.0, True
    for start in range(0, z.shape[0], rows):
        chunk = z[start : start + rows].double()
        deviation = chunk - chunk.mean(1, keepdim=True)
        of_label = deviation.gather(1, y[start : start + rows, None]).squeeze(1)
        right = right and bool((of_label == deviation.amax(1)).all())
        constant = constant and bool((chunk == chunk[:, :1]).all())
        square += deviation.square().sum().item()
        slope -= of_label.sum().item()
    spread = 0.0 if constant else (square / z.numel()) ** 0.5
    return spread, right, slope


def _from_all_rows(z: Tensor, y: Tensor, low: float, high: float) -> tuple[float, str]:
    """Return the best temperature, or a bound and why there is no best one."""
    spread, right, at_zero = _shape_of_the_loss(z, y)
    if spread == 0:
        return 1.0, "all logits of a row are equal, so that every temperature is as good"
    if right:
        return low * spread, "the true class comes first in every row: lower is always better"
    if at_zero >= 0:
        return high * spread, "the logits are no better than a guess: higher is always better"
    return _solve(z, y, 1 / spread, spread)[0], ""


def _from_a_sample(z: Tensor, y: Tensor) -> float | None:
    """Return the best temperature, found from that of some rows, or None where these do not show that there is one.

    A slope that vanishes over all rows is proof enough: the loss is convex.
    """
    step = z.shape[0] // _SAMPLE
    if step < 2:
        return None
    some, labels = z[::step], y[::step]
    spread, right, at_zero = _shape_of_the_loss(some, labels)
    if right or at_zero >= 0:
        return None
    # their temperature is off by about a per cent, so that more digits would be wasted
    b, _ = _newton(lambda b: _slopes(some, labels, b, torch.float64), 1 / spread, tolerance=1e-2)
    temperature, there = _solve(z, y, b, spread, steps=10)
    return temperature if there else None


def _solve(z: Tensor, y: Tensor, b: float, spread: float, steps: int = _STEPS) -> tuple[float, bool]:
    """Return the temperature at which the slope vanishes, starting from 1 / b, and whether it was reached."""
    if z.dtype == torch.float32 and 1e-30 < spread < 1e30:
        b, _ = _newton(lambda b: _slopes(z, y, b, torch.float32), b, tolerance=1e-4, steps=5)
    b, there = _newton(lambda b: _slopes(z, y, b, torch.float64), b, tolerance=1e-8, steps=steps)
    return 1 / b, there
