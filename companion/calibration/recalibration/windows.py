"""Calibration checked in sliding windows: the h-loss, and a recalibrator that minimises it over several maps.

Public: `h_calibration_loss`, `running_gap`, `HCalibrator` and its maps `GlobalTemperature`, `MonotoneLogitMap`,
`MarginTemperature`, `VectorScaling`.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from companion.calibration.recalibration.temperature import TemperatureScaler, applied, check_columns, like
from companion.checks import (
    check_generator,
    check_in_range,
    check_labels,
    check_logits,
    check_positive_int,
    check_probs,
)
from companion.geometry import single

__all__ = [
    "GlobalTemperature",
    "HCalibrator",
    "MarginTemperature",
    "MonotoneLogitMap",
    "VectorScaling",
    "h_calibration_loss",
    "running_gap",
]

_CLUSTERS = 15
_LLOYD_STEPS = 20


def running_gap(probs: Any, labels: Any) -> tuple[Tensor, Tensor]:
    r"""Return all class probabilities in ascending order, and the running sum of prediction minus outcome.

    Every sample contributes C events, "the class is c", each predicted with probability $p_{ic}$ and with outcome
    $o_{ic} \in \{0, 1\}$. Sorted by p, the sum over the first k of $(p - o) / n$ stays near zero for calibrated
    predictions, climbs where they promise too much, and falls where they promise too little.

    Args:
        probs: (n, C).
        labels: (n,) true classes.

    Returns:
        Two (n C,) tensors: the sorted probabilities and the running sum.

    Raises:
        ValueError: not probabilities, or labels out of range.

    >>> p, gap = running_gap([[0.8, 0.2], [0.7, 0.3]], [0, 1])  # sorted: .2 (no), .3 (yes), .7 (no), .8 (yes)
    >>> [round(value, 3) for value in gap[:3].tolist()]
    [0.1, -0.25, 0.1]

    Paper: huang2025h
    Chapter: calibration/recalibration
    """
    p = check_probs(probs)
    y = check_labels(labels, p.shape[0], p.shape[1], device=p.device)
    outcome = F.one_hot(y, p.shape[1]).to(p)
    p, order = p.flatten().sort(stable=True)
    gap = p - outcome.flatten()[order]
    return p, gap.cumsum(0, dtype=torch.float64).to(p) / y.shape[0]


def _clusters(p: Tensor) -> Tensor:
    """Return the cluster of each sorted probability: one-dimensional k-means, on prefix sums."""
    p = p.double()
    total = F.pad(p.cumsum(0), (1, 0))
    centres = p[torch.linspace(0, len(p) - 1, _CLUSTERS, device=p.device).long()]
    for _ in range(_LLOYD_STEPS):
        cuts = torch.searchsorted(p, (centres[1:] + centres[:-1]) / 2)
        cuts = F.pad(F.pad(cuts, (1, 0)), (0, 1), value=len(p))
        size = cuts.diff()
        mean = (total[cuts[1:]] - total[cuts[:-1]]) / size.clamp(min=1)
        centres = torch.where(size > 0, mean, centres)
    return torch.repeat_interleave(torch.arange(_CLUSTERS, device=p.device), size)


def _windowed(p: Tensor, outcome: Tensor, cluster: Tensor | None, window: int, eps: float) -> Tensor:
    """Return the mean excess of the windowed gaps over eps: p sorted, cluster of each or None for equal weights."""
    window = min(window, len(p))
    running = F.pad((p - outcome).cumsum(0, dtype=torch.float64), (1, 0))
    gap = (running[window:] - running[:-window]).abs() / window  # (events - window + 1,)
    excess = F.relu(gap - eps)
    if cluster is None:
        return excess.mean()
    middle = cluster[(window - 1) // 2 :][: len(excess)]
    size = torch.zeros(_CLUSTERS, dtype=excess.dtype, device=p.device).index_add(0, middle, torch.ones_like(excess))
    total = torch.zeros_like(size).index_add(0, middle, excess)
    return (total / size.clamp(min=1)).sum() / (size > 0).sum()


def h_calibration_loss(
    probs: Any,
    labels: Any,
    window: int = 200,
    eps: float = 0.0,
    weighting: str = "cluster",
    leave_one_class_out: bool = False,
) -> Tensor:
    r"""Return how far predictions and outcomes drift apart in windows of similar predictions.

    All n C events are sorted by their probability. In each window W of consecutive events the predictions should add up
    to the outcomes:

    $$\ell = \operatorname{mean}_W \; \Big[\,\Big|\frac{1}{|W|}\sum_{e \in W} (p_e - o_e)\Big| - \varepsilon\,\Big]_+$$

    The order is held fixed and the gradient flows through p. It needs no bins, and it does not reward sharpness: a
    constant prediction of the base rate has no gap, so minimise it over maps that keep the order of the classes.

    Args:
        probs: (n, C).
        labels: (n,) true classes.
        window: how many neighbouring events are compared at a time (all of them, where there are fewer).
        eps: a gap up to this size costs nothing.
        weighting: "uniform" takes the mean over windows; most events have a probability near 0, and dominate it.
            "cluster" takes the mean within each of 15 clusters of similar probability, then over clusters.
        leave_one_class_out: take the mean of the loss on all data and of the loss without the samples of each true
            class in turn. The authors' code averages the latter; it chooses samples by their label, so that honest
            probabilities are not its minimum class by class, and it made no map better here.

    Returns:
        A float64 scalar, differentiable in probs. It costs a sort of n C numbers, and C sweeps more where classes are
        left out.

    Raises:
        ValueError: not probabilities, labels out of range, an unknown weighting, or a window below 1.

    >>> generator = torch.Generator().manual_seed(0)
    >>> honest = torch.softmax(2 * torch.randn(500, 3, generator=generator), 1)
    >>> labels = honest.multinomial(1, generator=generator).squeeze(1)
    >>> bold = torch.softmax(2 * honest.log(), 1)  # twice the logits: overconfident
    >>> print(f"{h_calibration_loss(honest, labels):.2f} {h_calibration_loss(bold, labels):.2f}")
    0.02 0.09

    Paper: huang2025h
    Chapter: calibration/recalibration
    """
    p = check_probs(probs)
    n, n_classes = p.shape
    y = check_labels(labels, n, n_classes, device=p.device)
    window = check_positive_int(window, "window")
    eps = check_in_range(eps, "eps", 0)
    if weighting not in ("cluster", "uniform"):
        raise ValueError(f"expected weighting to be 'cluster' or 'uniform', got {weighting!r}")
    order = p.detach().flatten().argsort(stable=True)
    sorted_p = p.flatten()[order]
    outcome = F.one_hot(y, n_classes).to(p).flatten()[order]
    cluster = _clusters(sorted_p.detach()) if weighting == "cluster" else None
    loss = _windowed(sorted_p, outcome, cluster, window, eps)
    if not leave_one_class_out:
        return loss
    true_class = y.repeat_interleave(n_classes)[order]
    losses = [loss]
    for c in y.unique().tolist():
        keep = true_class != c
        if keep.any():
            losses.append(
                _windowed(sorted_p[keep], outcome[keep], None if cluster is None else cluster[keep], window, eps)
            )
    return torch.stack(losses).mean()


class GlobalTemperature(nn.Module):
    """Divide all logits by one temperature, exp of the one parameter: the smallest order-preserving map.

    >>> GlobalTemperature()(torch.tensor([[2.0, 0.0]])).detach()
    tensor([[2., 0.]])

    Chapter: calibration/recalibration
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:
        """Return z / T."""
        return z * torch.exp(-self.log_temperature)


class MonotoneLogitMap(nn.Module):
    r"""Apply one increasing piecewise-linear function to all log-probabilities of a sample.

    $$f(\ell) = -\sum_k s_k \min\big([t_k - \ell]_+,\; t_k - t_{k+1}\big), \qquad s_k > 0,\quad \ell = \log p \le 0$$

    With knots $0 = t_0 > t_1 > \dots$ and slopes $s_k$, all 1 at the start: the identity. Because f increases, the
    order of the classes, and so the accuracy, stays what it was.

    Args:
        knots: where the slope may change, from 0 downwards.

    >>> MonotoneLogitMap()(torch.tensor([[0.0, 0.0]])).detach()  # log(1/2), twice
    tensor([[-0.6931, -0.6931]])

    Paper: huang2025h
    Chapter: calibration/recalibration
    """

    def __init__(self, knots: tuple[float, ...] = (0.0, -0.1, -0.3, -1.0, -2.0, -4.0, -8.0)) -> None:
        super().__init__()
        if len(knots) < 1 or knots[0] != 0 or any(a <= b for a, b in pairwise(knots)):
            raise ValueError(f"expected knots that start at 0 and descend, got {knots}")
        self.register_buffer("knots", torch.tensor(knots))
        self.log_slopes = nn.Parameter(torch.zeros(len(knots)))

    def forward(self, z: Tensor) -> Tensor:
        """Return f(log_softmax(z)), logits of the same order as z."""
        below = self.knots[:, None, None] - torch.log_softmax(z, 1)  # (knots, n, C)
        lengths = torch.cat([-self.knots.diff(), self.knots.new_full((1,), float("inf"))])
        inside = torch.minimum(below.clamp(min=0), lengths[:, None, None])
        return -(self.log_slopes.exp()[:, None, None] * inside).sum(0)


class MarginTemperature(nn.Module):
    """Give every sample a temperature of its own, from its margin and its highest log-probability.

    A small network reads log(1 + margin between the two highest logits) and log(1 - log p_max), and starts at
    temperature 1 everywhere. Order-preserving, since each row is only divided by a number.

    Args:
        hidden: width of the network.

    >>> MarginTemperature()(torch.tensor([[2.0, 0.0], [1.0, 5.0]])).detach()
    tensor([[2., 0.],
            [1., 5.]])

    Chapter: calibration/recalibration
    """

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, 1))
        nn.init.zeros_(self.net[2].weight)
        nn.init.zeros_(self.net[2].bias)

    def forward(self, z: Tensor) -> Tensor:
        """Return each row of z divided by its temperature."""
        top = z.topk(2, dim=1).values
        surprise = -torch.log_softmax(z, 1).amax(1)
        inputs = torch.stack([torch.log1p(top[:, 0] - top[:, 1]), torch.log1p(surprise)], dim=1)  # (n, 2)
        return z * torch.exp(-self.net(inputs))


class VectorScaling(nn.Module):
    """Scale and shift each class's logit by numbers of its own. It can change which class comes first.

    Args:
        n_classes: C.

    >>> VectorScaling(2)(torch.tensor([[2.0, 0.0]])).detach()
    tensor([[2., 0.]])

    Chapter: calibration/recalibration
    """

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(n_classes))
        self.shift = nn.Parameter(torch.zeros(n_classes))

    def forward(self, z: Tensor) -> Tensor:
        """Return scale * z + shift."""
        return self.scale * z + self.shift


_LOSSES = ("h", "nll", "brier")
_MAPS = ("order_preserving", "temperature", "margin", "vector")


class HCalibrator(BaseEstimator):
    """Recalibrate logits by a map that makes windowed predictions match outcomes.

    The logits are temperature-scaled first; then the map, which starts as the identity, is trained on all of the data
    at once with Adam. `loss="nll"` and `"brier"` fit the same map by a proper score, for comparison.

    Args:
        map: "order_preserving" (`MonotoneLogitMap`), "temperature" (one number), "margin" (`MarginTemperature`) keep
            the order of the classes; "vector" (`VectorScaling`) does not, and with the h-loss can drift to the base
            rates.
        loss: "h" (`h_calibration_loss`), "nll" or "brier".
        window: as in `h_calibration_loss`; at most a tenth of the n C events is used.
        eps: as in `h_calibration_loss`.
        weighting: as in `h_calibration_loss`.
        leave_one_class_out: as in `h_calibration_loss`.
        steps: how many Adam steps.
        lr: their size.
        random_state: seed for the "margin" network's first weights (None: torch's default generator).

    Attributes:
        map_: the trained map, a `torch.nn.Module` from scaled logits to logits.
        temperature_: what the logits are divided by before the map.
        loss_curve_: the loss at every step, a list.
        n_classes_: how many classes (columns) the logits had.

    >>> generator = torch.Generator().manual_seed(0)
    >>> true = 2 * torch.randn(300, 3, generator=generator)
    >>> labels = torch.softmax(true, 1).multinomial(1, generator=generator).squeeze(1)
    >>> calibrator = HCalibrator(map="temperature", steps=20).fit(3 * true, labels)
    >>> bool((calibrator.predict_proba(3 * true).argmax(1) == true.argmax(1)).all())  # accuracy untouched
    True

    Paper: huang2025h
    Chapter: calibration/recalibration
    """

    def __init__(
        self,
        map: str = "order_preserving",
        loss: str = "h",
        window: int = 100,
        eps: float = 0.0,
        weighting: str = "cluster",
        leave_one_class_out: bool = False,
        steps: int = 300,
        lr: float = 0.02,
        random_state: int | None = None,
    ) -> None:
        self.map = map
        self.loss = loss
        self.window = window
        self.eps = eps
        self.weighting = weighting
        self.leave_one_class_out = leave_one_class_out
        self.steps = steps
        self.lr = lr
        self.random_state = random_state

    def fit(self, logits: Any, labels: Any) -> "HCalibrator":
        """Train the map on held-out data.

        Args:
            logits: (n, C), a tensor or an array.
            labels: (n,) true classes.

        Returns:
            The fitted calibrator.

        Raises:
            ValueError: not logits, labels outside 0..C-1, or an unknown map or loss.
            TypeError: not numbers.
        """
        if self.map not in _MAPS:
            raise ValueError(f"expected map to be one of {_MAPS}, got {self.map!r}")
        if self.loss not in _LOSSES:
            raise ValueError(f"expected loss to be one of {_LOSSES}, got {self.loss!r}")
        z = check_logits(logits).detach()
        y = check_labels(labels, z.shape[0], z.shape[1], device=z.device)
        steps = check_positive_int(self.steps, "steps")
        temperature = TemperatureScaler().fit(z, y).temperature_
        z = single(z) / temperature
        calibration_map = self._make_map(z.shape[1]).to(z)
        optimizer = torch.optim.Adam(calibration_map.parameters(), lr=check_in_range(self.lr, "lr", 0))
        curve = []
        with torch.enable_grad():
            for _ in range(steps):
                loss = self._loss(calibration_map(z), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                curve.append(loss.item())
        self.n_classes_ = z.shape[1]
        self.temperature_ = temperature
        self.map_ = calibration_map.eval().requires_grad_(False)
        self.loss_curve_ = curve
        return self

    def transform(self, logits: Any) -> Any:
        """Return recalibrated logits, in the kind and dtype of the input (an array for a list).

        Args:
            logits: (n, C).

        Raises:
            NotFittedError: `fit` has not been called.
            ValueError: not logits, or another number of classes than in `fit`.
        """
        return like(self._apply(logits), logits)

    def predict_proba(self, logits: Any) -> Any:
        """Return recalibrated probabilities, in the kind and dtype of the input (an array for a list).

        Args:
            logits: (n, C).

        Raises:
            NotFittedError: `fit` has not been called.
            ValueError: not logits, or another number of classes than in `fit`.
        """
        return like(torch.softmax(self._apply(logits), dim=1), logits)

    def _apply(self, logits: Any) -> Tensor:
        check_is_fitted(self)
        z = check_columns(check_logits(logits), self.n_classes_)
        return applied(self.map_, z / self.temperature_)

    def _make_map(self, n_classes: int) -> nn.Module:
        if self.map == "margin":
            seed = check_generator(self.random_state, "random_state")
            with torch.random.fork_rng(devices=[], enabled=seed is not None):
                if seed is not None:
                    torch.manual_seed(seed.initial_seed())
                return MarginTemperature()
        if self.map == "vector":
            return VectorScaling(n_classes)
        return GlobalTemperature() if self.map == "temperature" else MonotoneLogitMap()

    def _loss(self, z: Tensor, y: Tensor) -> Tensor:
        if self.loss == "nll":
            return F.cross_entropy(z, y)
        probs = torch.softmax(z, 1)
        if self.loss == "brier":
            return (probs - F.one_hot(y, z.shape[1])).square().sum(1).mean()
        window = min(self.window, max(1, z.numel() // 10))
        return h_calibration_loss(probs, y, window, self.eps, self.weighting, self.leave_one_class_out)
