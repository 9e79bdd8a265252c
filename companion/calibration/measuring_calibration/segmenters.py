"""Two segmenters that fail in opposite ways, and scores that say which of them to believe.

Public: `make_referring_scenes` and `ReferringScenes`; `mask_iou`, `error_types`; `GaussianScorer`,
`gaussian_score_loss`, `win_probability`, `score_integration`, `probability_integral`.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from companion.checks import as_tensor, check_generator, check_in_range, check_positive_int

__all__ = [
    "GaussianScorer",
    "ReferringScenes",
    "error_types",
    "gaussian_score_loss",
    "make_referring_scenes",
    "mask_iou",
    "probability_integral",
    "score_integration",
    "win_probability",
]


class ReferringScenes(NamedTuple):
    """Scenes with three shapes, one of which is asked for, and what two segmenters answer.

    Attributes:
        target: (n, h, w) bool, the mask asked for.
        top_down: (n, h, w) in [0, 1]: exact, and sometimes of the wrong shape.
        bottom_up: (n, h, w) in [0, 1]: of the right shape, and ragged.
        cues: (n, 2) clutter and contrast as a scorer sees them, with noise.
    """

    target: Tensor
    top_down: Tensor
    bottom_up: Tensor
    cues: Tensor


def _smooth(n: int, size: int, generator: torch.Generator | None) -> Tensor:
    """Return smooth random fields (n, size, size) of unit variance."""
    white = torch.randn(n, size, size, generator=generator)
    f = torch.fft.fftfreq(size) * size
    gain = (-(f[:, None].square() + f[None].square()) / (2 * 4.0**2)).exp()
    field = torch.fft.ifft2(torch.fft.fft2(white) * gain).real
    return field / field.flatten(1).std(1)[:, None, None]


def make_referring_scenes(
    n: int, size: int = 32, *, slope: float = 25.0, generator: torch.Generator | int | None = None
) -> ReferringScenes:
    r"""Draw scenes and simulate a top-down and a bottom-up segmenter on them.

    Three discs lie apart. Top-down returns a disc with an almost exact edge, but the wrong one with probability
    $\sigma(s\,(\text{clutter} - 0.8))$; bottom-up returns the right disc with an edge that wanders, the more the lower
    the contrast. Clutter and contrast are uniform in [0, 1]; the cues are these two, with noise.

    Args:
        n: scenes.
        size: side in pixels, at least 16.
        slope: s, how sharply clutter decides.
        generator: a cpu generator or a seed (None: torch's default generator).

    Returns:
        `ReferringScenes(target, top_down, bottom_up, cues)`; masks hold soft values around 0.5 at their edges.

    Raises:
        ValueError: n or size out of range.

    >>> scenes = make_referring_scenes(50, generator=0)
    >>> bool(mask_iou(scenes.top_down, scenes.target).mean() > mask_iou(scenes.bottom_up, scenes.target).mean())
    True

    Paper: cheng2023wico

    Chapter: calibration/measuring-calibration
    """
    n, size = check_positive_int(n, "n"), check_positive_int(size, "size", minimum=16)
    slope, generator = check_in_range(slope, "slope", 0), check_generator(generator)
    clutter, contrast = torch.rand(2, n, generator=generator)
    radius = size * (0.12 + 0.06 * torch.rand(n, 3, generator=generator))
    # centres on a wheel, so that the discs never meet
    angle = 2 * math.pi * (torch.rand(n, 1, generator=generator) + torch.arange(3) / 3)
    cx, cy = (size / 2 + 0.29 * size * f(angle) for f in (torch.cos, torch.sin))
    t = torch.arange(size) + 0.5
    distance = radius[..., None, None] - torch.hypot(t[None] - cx[..., None, None], t[:, None] - cy[..., None, None])
    wrong = torch.rand(n, generator=generator) < torch.sigmoid(slope * (clutter - 0.8))
    rows, other = torch.arange(n), 1 + torch.randint(2, (n,), generator=generator)
    asked = distance[:, 0]  # signed: positive inside
    found = distance[rows, torch.where(wrong, other, 0)]
    wobble = 0.3 * _smooth(n, size, generator)
    ragged = (1.0 + 3.0 * (1 - contrast))[:, None, None] * _smooth(n, size, generator)
    noise = 0.1 * torch.randn(n, 2, generator=generator)
    return ReferringScenes(
        asked > 0, torch.sigmoid(found + wobble), torch.sigmoid(asked + ragged),
        torch.stack([clutter, contrast], dim=1) + noise,
    )  # fmt: skip


def mask_iou(predicted: Any, target: Any) -> Tensor:
    """Return the intersection over the union of masks, (...) for masks (..., h, w); two empty masks agree (1).

    Args:
        predicted: bool masks, or soft ones, of which at least 0.5 is inside.
        target: likewise, of the same shape.

    Returns:
        Values in [0, 1].

    Raises:
        ValueError: shapes that differ.

    >>> mask_iou(torch.tensor([[1, 1], [0, 0]]), torch.tensor([[1, 0], [0, 0]]))
    tensor(0.5000)

    Paper: cheng2023wico

    Chapter: calibration/measuring-calibration
    """
    a, b = as_tensor(predicted, "predicted"), as_tensor(target, "target")
    if a.shape != b.shape or a.dim() < 2:
        raise ValueError(f"expected masks (..., h, w) of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = a >= 0.5, b >= 0.5
    union = (a | b).sum((-2, -1))
    return torch.where(union > 0, (a & b).sum((-2, -1)) / union.clamp(min=1), 1.0)


def error_types(iou: Any) -> dict[str, Tensor]:
    """Return the shares of the two failures: polar negatives (the wrong thing) and inferior positives (a poor mask).

    Args:
        iou: (n,) in [0, 1].

    Returns:
        {"polar negative": share with IoU below 0.05, "inferior positive": share with IoU from 0.5 to 0.8}.

    >>> error_types([0.0, 0.6, 0.7, 0.95])["inferior positive"]
    tensor(0.5000)

    Paper: cheng2023wico

    Chapter: calibration/measuring-calibration
    """
    iou = as_tensor(iou, "iou")
    return {
        "polar negative": (iou < 0.05).float().mean(),
        "inferior positive": ((iou >= 0.5) & (iou < 0.8)).float().mean(),
    }


class GaussianScorer(nn.Module):
    r"""Predict, for each branch, a Gaussian over its own quality on this input.

    Args:
        n_features: what the scorer sees of an input.
        n_branches: how many segmenters.
        width: of two hidden layers.
        seed: of the weights (None: torch's default generator).

    >>> mean, std = GaussianScorer(2, seed=0)(torch.zeros(5, 2)).unbind(-1)
    >>> mean.shape, bool((std > 0).all())
    (torch.Size([5, 2]), True)

    Paper: cheng2023wico

    Chapter: calibration/measuring-calibration
    """

    def __init__(self, n_features: int, n_branches: int = 2, width: int = 32, seed: int | None = None):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            if seed is not None:
                torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Linear(n_features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
                nn.Linear(width, 2 * n_branches),
            )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, branches, 2): mean and standard deviation of each branch's quality."""
        mean, raw = self.body(x).unflatten(-1, (2, -1)).unbind(-2)
        return torch.stack([mean, 1e-2 + nn.functional.softplus(raw)], dim=-1)


def gaussian_score_loss(scores: Tensor, quality: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of qualities (n, branches) under scores (n, branches, 2).

    Raises:
        ValueError: shapes that do not fit.

    >>> round(gaussian_score_loss(torch.tensor([[[0.5, 1.0]]]), torch.tensor([[0.5]])).item(), 3)  # log(2 pi) / 2
    0.919

    Paper: cheng2023wico

    Chapter: calibration/measuring-calibration
    """
    if scores.shape != (*quality.shape, 2):
        raise ValueError(f"expected scores {(*quality.shape, 2)}, got {tuple(scores.shape)}")
    mean, std = scores.unbind(-1)
    return (0.5 * ((quality - mean) / std).square() + std.log() + 0.5 * math.log(2 * math.pi)).mean()


def win_probability(
    scores: Any, n_samples: int | None = None, generator: torch.Generator | int | None = None
) -> Tensor:
    r"""Return how probable it is that the first of two branches is the better one.

    $$P(s_A > s_B) = \Phi\!\Big(\frac{\mu_A - \mu_B}{\sqrt{\sigma_A^2 + \sigma_B^2}}\Big)$$

    or the share of `n_samples` draws of both Gaussians in which A is ahead. Above one half means $\mu_A > \mu_B$,
    whatever the spreads: a choice between two branches does not depend on them.

    Args:
        scores: (..., 2, 2), mean and standard deviation of both branches.
        n_samples: draws; None gives the exact value.
        generator: for the draws, on the device of the scores, or a seed (None: torch's default generator).

    Returns:
        (...) in [0, 1].

    Raises:
        ValueError: another shape.

    >>> win_probability(torch.tensor([[[0.9, 0.3], [0.6, 0.4]]])).round(decimals=3)
    tensor([0.7260])

    Paper: cheng2023wico

    Chapter: calibration/measuring-calibration
    """
    scores = as_tensor(scores, "scores")
    if scores.dim() < 2 or scores.shape[-2:] != (2, 2):
        raise ValueError(f"expected scores of shape (..., 2, 2), got {tuple(scores.shape)}")
    mean, std = scores.unbind(-1)
    if n_samples is None:
        return torch.special.ndtr((mean[..., 0] - mean[..., 1]) / std.square().sum(-1).sqrt())
    generator = check_generator(generator, device=mean.device)
    draws = torch.randn(
        check_positive_int(n_samples, "n_samples"), *mean.shape, generator=generator, device=mean.device
    )
    sampled = mean + std * draws.to(mean)
    return (sampled[..., 0] > sampled[..., 1]).to(mean.dtype).mean(0)


def score_integration(a: Tensor, b: Tensor, weight: Any) -> Tensor:
    r"""Return masks mixed by a weight per input, $w\,a + (1 - w)\,b$.

    For masks that are nearly hard the mixture, cut at one half, is a choice: a where w exceeds one half, else b.

    Args:
        a: masks (..., h, w) of the first branch.
        b: of the second.
        weight: (...) in [0, 1]; one half for all is plain averaging.

    Returns:
        Masks (..., h, w).

    >>> score_integration(torch.ones(1, 2, 2), torch.zeros(1, 2, 2), [0.25])[0, 0, 0]
    tensor(0.2500)

    Paper: cheng2023wico

    Chapter: calibration/measuring-calibration
    """
    w = as_tensor(weight, "weight").to(a)[..., None, None]
    return w * a + (1 - w) * b


def probability_integral(scores: Any, quality: Any) -> Tensor:
    r"""Return $\Phi((q - \mu)/\sigma)$: uniform on [0, 1] where the predicted Gaussians are calibrated.

    Args:
        scores: (..., 2), mean and standard deviation.
        quality: (...) what was observed.

    Returns:
        (...) in [0, 1]. Values heaped in the middle: spreads too wide; at the ends: too narrow.

    Raises:
        ValueError: shapes that do not fit.

    >>> probability_integral([[0.5, 0.1]], [0.5])
    tensor([0.5000])

    Paper: cheng2023wico

    Chapter: calibration/measuring-calibration
    """
    scores, quality = as_tensor(scores, "scores"), as_tensor(quality, "quality")
    if scores.shape != (*quality.shape, 2):
        raise ValueError(f"expected scores {(*quality.shape, 2)}, got {tuple(scores.shape)}")
    mean, std = scores.unbind(-1)
    return torch.special.ndtr((quality - mean) / std)
