"""Calibration that asks whether the prediction was right: the correctness-aware loss, its slopes, and a calibrator that
looks at several views of each sample.

Public: `correctness_aware_loss`, `sharpening_slopes`, `shifted_views` and `rotate`, `ViewTemperature`,
`CorrectnessCalibrator`.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from companion.calibration.recalibration.temperature import TemperatureScaler, applied, check_columns, like
from companion.checks import (
    as_tensor,
    check_binary,
    check_generator,
    check_in_range,
    check_labels,
    check_logits,
    check_positive_int,
    check_probs,
    check_scores,
)
from companion.geometry import single

__all__ = [
    "CorrectnessCalibrator",
    "SharpeningSlopes",
    "ViewTemperature",
    "correctness_aware_loss",
    "rotate",
    "sharpening_slopes",
    "shifted_views",
]

_LARGEST = 3.0  # of |log temperature|: a loss that rewards certainty would send it to infinity
_LOSSES = ("correctness", "squared", "nll", "brier")


def correctness_aware_loss(confidence: Any, correct: Any, squared: bool = False) -> Tensor:
    r"""Return the mean distance between confidence and whether the prediction was right.

    $$\frac1n \sum_i |c_i - \hat p_i| \qquad\text{or, squared,}\qquad \frac1n \sum_i (c_i - \hat p_i)^2$$

    Where a fraction q of predictions is right, the first is smallest at confidence 1 if q > 1/2 and 0 if q < 1/2 (a
    median), the second at q itself (a mean). Only the second is a proper score.

    Args:
        confidence: (n,) probability given to the predicted class.
        correct: (n,) whether the prediction was right.
        squared: take the square.

    Returns:
        A scalar, differentiable in the confidence.

    Raises:
        ValueError: confidences outside [0, 1], or correct that is not 0 or 1.

    >>> right = torch.tensor([True, True, False])
    >>> for c in 2 / 3, 1.0:
    ...     print([round(correctness_aware_loss([c] * 3, right, squared).item(), 3) for squared in (False, True)])
    [0.444, 0.222]
    [0.333, 0.333]

    Paper: liu2024optimizing
    Chapter: calibration/recalibration
    """
    confidence = check_scores(confidence, "confidence")
    if confidence.min() < 0 or confidence.max() > 1 + 1e-6:
        raise ValueError("expected confidence in [0, 1], one probability per sample: pass probs.amax(1)")
    correct = check_binary(correct, confidence.shape[0], "correct", device=confidence.device)
    distance = (correct.to(confidence) - confidence).abs()
    return (distance.square() if squared else distance).mean()


class SharpeningSlopes(NamedTuple):
    """What each loss says about sharpening a prediction a little; above 0 means: do not.

    Attributes:
        nll: slope of the negative log-likelihood of the true class.
        brier: slope of the sum of squared errors.
        correctness: slope of |correct - confidence|.

    Chapter: calibration/recalibration
    """

    nll: Tensor
    brier: Tensor
    correctness: Tensor


def sharpening_slopes(probs: Any, labels: Any) -> SharpeningSlopes:
    r"""Return the slope of three losses in the inverse temperature s, at s = 1, sample by sample.

    With $p_s \propto p^s$ and the entropy $H = -\sum_c p_c \log p_c$, each probability moves as
    $\dot p_c = p_c (\log p_c + H)$, and so

    $$\frac{d}{ds}(-\log p_y) = -\log p_y - H, \qquad
    \frac{d}{ds}\sum_c (p_c - [c = y])^2 = 2 \sum_c (p_c - [c = y])\, \dot p_c, \qquad
    \frac{d}{ds}|c - p_{\max}| = \pm p_{\max} (\log p_{\max} + H).$$

    The last is below 0 for a right prediction and above 0 for a wrong one. The first is below 0, which sharpens,
    whenever $p_y > e^{-H}$: also for some wrong predictions.

    Args:
        probs: (n, C), all above 0.
        labels: (n,) true classes.

    Returns:
        `SharpeningSlopes` of (n,) tensors.

    Raises:
        ValueError: not probabilities, one of them 0, or labels out of range.

    >>> slopes = sharpening_slopes([[0.45, 0.40, 0.15]], [1])  # a narrow miss
    >>> [round(slope.item(), 3) for slope in slopes]
    [-0.094, 0.001, 0.095]

    Paper: liu2024optimizing
    Chapter: calibration/recalibration
    """
    p = check_probs(probs)
    y = check_labels(labels, p.shape[0], p.shape[1], device=p.device)
    if p.min() <= 0:
        raise ValueError("expected probs above 0, since log p is part of the slope, got a 0")
    entropy = -(p * p.log()).sum(1)
    velocity = p * (p.log() + entropy[:, None])  # (n, C)
    p_y = p.gather(1, y[:, None]).squeeze(1)
    top, predicted = p.max(1)
    sign = torch.where(predicted == y, -1.0, 1.0).to(p)
    return SharpeningSlopes(
        nll=-p_y.log() - entropy,
        brier=2 * ((p - F.one_hot(y, p.shape[1])) * velocity).sum(1),
        correctness=sign * top * (top.log() + entropy),
    )


def shifted_views(images: Any, shift: int = 1, angle: float = 10.0) -> Tensor:
    """Return six views of each image: itself, shifted right and down, turned both ways, and blurred.

    Args:
        images: (n, c, h, w) in [0, 1].
        shift: by how many pixels.
        angle: by how many degrees.

    Returns:
        (n, 6, c, h, w); the first view is the image itself.

    Raises:
        ValueError: not (n, c, h, w).

    >>> shifted_views(torch.rand(5, 1, 8, 8)).shape
    torch.Size([5, 6, 1, 8, 8])

    Paper: liu2024optimizing
    Chapter: calibration/recalibration
    """
    x = as_tensor(images, "images")
    if x.dim() != 4:
        raise ValueError(f"expected images of shape (n, c, h, w), got {tuple(x.shape)}")
    check_positive_int(shift, "shift")
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    right = F.pad(x, (shift, 0, 0, 0))[..., : x.shape[3]]
    down = F.pad(x, (0, 0, shift, 0))[..., : x.shape[2], :]
    return torch.stack([x, right, down, rotate(x, angle), rotate(x, -angle), blurred], dim=1)


def rotate(images: Tensor, angle: float) -> Tensor:
    """Return images (n, c, h, w) turned by `angle` degrees about their centre, with zeros coming in.

    Raises:
        ValueError: an angle that is not finite.

    >>> rotate(torch.eye(3)[None, None], 90).round().squeeze()
    tensor([[0., 0., 1.],
            [0., 1., 0.],
            [1., 0., 0.]])

    Chapter: calibration/recalibration
    """
    turn = math.radians(check_in_range(angle, "angle"))
    matrix = images.new_tensor([[math.cos(turn), -math.sin(turn), 0], [math.sin(turn), math.cos(turn), 0]])
    grid = F.affine_grid(matrix.expand(images.shape[0], 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


class ViewTemperature(nn.Module):
    """Read the class probabilities of all views of a sample, and give the sample a temperature.

    The inputs are, per view, its highest probabilities and the one it gives to the class the first view predicts. The
    temperature is 1 everywhere before training, and stays between $e^{-3}$ and $e^3$.

    Args:
        n_views: how many views.
        n_top: how many of the highest probabilities of each view are read.
        hidden: width of the network.

    >>> ViewTemperature(n_views=2, n_top=3)(torch.randn(5, 2, 10)).detach()
    tensor([1., 1., 1., 1., 1.])

    Paper: liu2024optimizing
    Chapter: calibration/recalibration
    """

    def __init__(self, n_views: int, n_top: int = 4, hidden: int = 16) -> None:
        super().__init__()
        self.n_top = n_top
        self.net = nn.Sequential(nn.Linear(n_views * (n_top + 1), hidden), nn.ReLU(), nn.Linear(hidden, 1))
        nn.init.zeros_(self.net[2].weight)
        nn.init.zeros_(self.net[2].bias)

    def forward(self, views: Tensor) -> Tensor:
        """Return the temperatures (n,) of view logits (n, V, C)."""
        p = torch.softmax(views, dim=2)
        predicted = p[:, :1].argmax(2, keepdim=True).expand(-1, p.shape[1], 1)
        inputs = torch.cat([p.topk(self.n_top, dim=2).values, p.gather(2, predicted)], dim=2)  # (n, V, n_top + 1)
        return (_LARGEST * torch.tanh(self.net(inputs.flatten(1)).squeeze(1) / _LARGEST)).exp()


class CorrectnessCalibrator(BaseEstimator):
    """Give every sample its own temperature, from the network's outputs on several views of it.

    The order of the classes, and so the accuracy, stays what it was. The logits are temperature-scaled first. The
    default loss is the paper's aim, |correct - confidence|, which is not a proper score: see the chapter before you
    trust the confidences it gives. "squared", "nll" and "brier" are proper.

    Args:
        loss: "correctness" or "squared" (`correctness_aware_loss`), "nll" or "brier".
        n_top: how many of each view's highest probabilities the network reads (at most C).
        hidden: its width.
        steps: how many full-batch Adam steps.
        lr: their size.
        random_state: seed for its first weights (None: torch's default generator).

    Attributes:
        net_: the trained `ViewTemperature`.
        temperature_: the global temperature that comes first.
        loss_curve_: the loss at every step, a list.
        n_views_: how many views there were in fit.
        n_classes_: how many classes (columns) the logits had.

    >>> views = torch.randn(50, 6, 3, generator=torch.Generator().manual_seed(0))
    >>> calibrator = CorrectnessCalibrator(steps=5, random_state=0).fit(views, views.mean(1).argmax(1))
    >>> calibrator.predict_proba(views).shape
    torch.Size([50, 3])

    Paper: liu2024optimizing
    Chapter: calibration/recalibration
    """

    def __init__(
        self,
        loss: str = "correctness",
        n_top: int = 4,
        hidden: int = 16,
        steps: int = 300,
        lr: float = 0.01,
        random_state: int | None = None,
    ) -> None:
        self.loss = loss
        self.n_top = n_top
        self.hidden = hidden
        self.steps = steps
        self.lr = lr
        self.random_state = random_state

    def fit(self, logits: Any, labels: Any) -> "CorrectnessCalibrator":
        """Train the temperature network on held-out data.

        Args:
            logits: (n, V, C), the classifier's logits on V views of each sample, the sample itself first; (n, C) is
                taken as one view.
            labels: (n,) true classes.

        Returns:
            The fitted calibrator.

        Raises:
            ValueError: not logits, labels outside 0..C-1, or an unknown loss.
            TypeError: not numbers.
        """
        if self.loss not in _LOSSES:
            raise ValueError(f"expected loss to be one of {_LOSSES}, got {self.loss!r}")
        views = _check_views(logits).detach()
        n, n_views, n_classes = views.shape
        y = check_labels(labels, n, n_classes, device=views.device)
        n_top = min(check_positive_int(self.n_top, "n_top"), n_classes)
        hidden, steps = check_positive_int(self.hidden, "hidden"), check_positive_int(self.steps, "steps")
        temperature = TemperatureScaler().fit(views[:, 0], y).temperature_
        views = single(views) / temperature
        seed = check_generator(self.random_state, "random_state")
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed.initial_seed())
            net = ViewTemperature(n_views, n_top, hidden).to(views)
        optimizer = torch.optim.Adam(net.parameters(), lr=check_in_range(self.lr, "lr", 0))
        curve = []
        with torch.enable_grad():
            for _ in range(steps):
                loss = self._loss(views[:, 0] / net(views)[:, None], y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                curve.append(loss.item())
        self.n_views_, self.n_classes_ = n_views, n_classes
        self.temperature_ = temperature
        self.net_ = net.eval().requires_grad_(False)
        self.loss_curve_ = curve
        return self

    def transform(self, logits: Any) -> Any:
        """Return the first view's logits (n, C), each row divided by its temperature.

        Args:
            logits: (n, V, C), with as many views as in fit; (n, C) where fit had one.

        Raises:
            NotFittedError: `fit` has not been called.
            ValueError: not logits, or another number of views or classes than in `fit`.
        """
        return like(self._apply(logits), logits)

    def predict_proba(self, logits: Any) -> Any:
        """Return recalibrated probabilities (n, C), in the kind and dtype of the input (an array for a list).

        Args:
            logits: (n, V, C), with as many views as in fit; (n, C) where fit had one.

        Raises:
            NotFittedError: `fit` has not been called.
            ValueError: not logits, or another number of views or classes than in `fit`.
        """
        return like(torch.softmax(self._apply(logits), dim=1), logits)

    def _apply(self, logits: Any) -> Tensor:
        check_is_fitted(self)
        views = check_columns(_check_views(logits), self.n_classes_)
        if views.shape[1] != self.n_views_:
            raise ValueError(f"expected {self.n_views_} views, as in fit, got {views.shape[1]}")
        views = views / self.temperature_
        return views[:, 0] / applied(self.net_, views)[:, None]

    def _loss(self, z: Tensor, y: Tensor) -> Tensor:
        if self.loss == "nll":
            return F.cross_entropy(z, y)
        probs = torch.softmax(z, 1)
        if self.loss == "brier":
            return (probs - F.one_hot(y, z.shape[1])).square().sum(1).mean()
        confidence, predicted = probs.max(1)
        return correctness_aware_loss(confidence, predicted == y, squared=self.loss == "squared")


def _check_views(logits: Any) -> Tensor:
    """Return logits as (n, V, C)."""
    z = as_tensor(logits, "logits")
    if z.dim() == 2:
        return check_logits(z)[:, None]
    if z.dim() != 3 or z.shape[1] == 0:
        raise ValueError(f"expected logits of shape (n, V, C), or (n, C) for one view, got {tuple(z.shape)}")
    return check_logits(z.flatten(0, 1)).unflatten(0, z.shape[:2])
