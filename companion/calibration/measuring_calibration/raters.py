"""What a panel of raters knows: scores with a spread, as a distribution over levels, and as odds between pairs.

Public: `discretize_gaussian`, `two_point_label`, `expected_score`, `score_spread`, `ThurstoneFidelityLoss`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from companion.checks import as_tensor, check_probs, check_same_length, check_scores

__all__ = ["ThurstoneFidelityLoss", "discretize_gaussian", "expected_score", "score_spread", "two_point_label"]

LEVELS = (1.0, 2.0, 3.0, 4.0, 5.0)


def _check_levels(levels: Any) -> Tensor:
    c = as_tensor(levels, "levels").double()
    if c.dim() != 1 or len(c) < 2 or not bool((c.diff() > 0).all()) or not bool(torch.isfinite(c).all()):
        raise ValueError(f"expected levels to be at least two rising numbers, got {c.tolist()}")
    if not torch.allclose(c.diff(), c[1] - c[0]):
        raise ValueError(f"expected levels at equal distances, got {c.tolist()}")
    return c


def _check_mean(mean: Any, c: Tensor, name: str = "mean") -> Tensor:
    mean = check_scores(mean, name, 1)
    low, high = (v.item() for v in torch.aminmax(mean.detach()))
    if low < c[0] or high > c[-1]:
        raise ValueError(
            f"expected {name} in [{c[0]:g}, {c[-1]:g}], the levels, got values from {low:.4g} to {high:.4g}"
        )
    return mean


def two_point_label(mean: Any, levels: Sequence[float] = LEVELS) -> Tensor:
    """Return the label that splits all its weight between the two levels next to the mean, so that its mean is exact.

    Args:
        mean: (n,) within the levels.
        levels: K rising numbers at equal distances.

    Returns:
        (n, K) probabilities in the dtype of mean.

    Raises:
        ValueError: a mean outside the levels.

    >>> two_point_label([2.25])
    tensor([[0.0000, 0.7500, 0.2500, 0.0000, 0.0000]])

    Paper: you2025teaching

    Chapter: calibration/measuring-calibration
    """
    c = _check_levels(levels)
    mean = _check_mean(mean, c)
    distance = (mean.double()[:, None] - c.to(mean.device)).abs() / (c[1] - c[0])
    return (1 - distance).clamp(min=0).to(mean.dtype)


def discretize_gaussian(mean: Any, std: Any, levels: Sequence[float] = LEVELS, fix_mean: bool = True) -> Tensor:
    r"""Return the soft label of a panel of raters: the mass of its Gaussian in a bin around each level.

    $$q_k = \Phi\!\Big(\frac{c_k + \delta/2 - \mu}{\sigma}\Big) - \Phi\!\Big(\frac{c_k - \delta/2 - \mu}{\sigma}\Big)$$

    for levels $c_k$ at distance $\delta$. The tails outside the bins are lost, so the q_k sum to less than one and
    their mean is off, most of all near the ends. The repair is $p_k = \alpha q_k + \beta$ with the two numbers that
    make $\sum_k p_k = 1$ and $\sum_k c_k p_k = \mu$. Probabilities that come out negative are set to 0; what this does
    to the mean is undone by a factor $e^{t c_k}$, or, where it is more than a tenth of a level (at the ends, or for a
    tiny spread), the label is `two_point_label`. The mean is exact in every case.

    Args:
        mean: (n,) mean opinion scores, within the levels.
        std: (n,) standard deviations, at least 0; 0 gives `two_point_label`.
        levels: K rising numbers at equal distances.
        fix_mean: False divides by the sum instead, which leaves the mean biased.

    Returns:
        (n, K) probabilities in the dtype of mean.

    Raises:
        ValueError: a mean outside the levels, a negative std, NaN, lengths that differ.

    >>> discretize_gaussian([3.0], [1.0]).round(decimals=3)
    tensor([[0.0470, 0.2500, 0.4080, 0.2500, 0.0470]])

    Paper: you2025teaching

    Chapter: calibration/measuring-calibration
    """
    c = _check_levels(levels)
    mean = _check_mean(mean, c)
    std = check_scores(std, "std", 1, device=mean.device)
    check_same_length(mean=mean, std=std)
    if std.min() < 0 or not bool(torch.isfinite(std).all()):
        raise ValueError(f"expected std to be finite and at least 0, got a smallest value of {std.min().item():.4g}")
    c = c.to(mean.device)
    half, mu, sigma = (c[1] - c[0]) / 2, mean.double()[:, None], std.double()[:, None].clamp(min=1e-12)
    q = torch.special.ndtr((c + half - mu) / sigma) - torch.special.ndtr((c - half - mu) / sigma)  # (n, K)
    if not fix_mean:
        return (q / q.sum(1, keepdim=True)).to(mean.dtype)
    middle = c.mean()
    mass, moment = q.sum(1, keepdim=True), (q * (c - middle)).sum(1, keepdim=True)
    # alpha from the mean, beta from the sum; at the middle, where it is 0 / 0, its limit
    density = [(-0.5 * ((c + side * half - mu) / sigma).square()).exp() for side in (-1, 1)]
    slope = ((c - middle) * (density[0] - density[1])).sum(1, keepdim=True) / (sigma * (2 * torch.pi) ** 0.5)
    at_middle = (mu - middle).abs() < 1e-6 * half
    alpha = torch.where(at_middle, 1 / slope, (mu - middle) / torch.where(moment == 0, 1, moment))
    p = (alpha * q + (1 - alpha * mass) / len(c)).clamp(min=0)
    p = p / p.sum(1, keepdim=True).clamp(min=1e-12)
    close = ((p * (c - mu)).sum(1).abs() < 0.1 * (c[1] - c[0])) & (alpha[:, 0] > 0)
    p = _tilted(p, c, mu)
    exact = close & ((p * (c - mu)).sum(1).abs() < 1e-7 * (c[1] - c[0]))
    return torch.where(exact[:, None], p, two_point_label(mu[:, 0], levels)).to(mean.dtype)


def _tilted(p: Tensor, c: Tensor, mu: Tensor) -> Tensor:
    """Return p_k e^(t c_k), normalised, with the t of each row that gives it the mean mu: the nearest label in KL."""
    x, t = (c - mu) / (c[1] - c[0]), torch.zeros_like(mu)
    for _ in range(20):  # Newton's method on a convex function whose gradient is the mean of x
        tilted = p * (t * x).exp()
        tilted = tilted / tilted.sum(1, keepdim=True).clamp(min=1e-300)
        first = (tilted * x).sum(1, keepdim=True)
        variance = (tilted * x.square()).sum(1, keepdim=True) - first.square()
        t = t - (first / variance.clamp(min=1e-3)).clamp(-2, 2)
    return tilted


def _decode(probs: Any, levels: Any) -> tuple[Tensor, Tensor]:
    c = _check_levels(levels)
    p = check_probs(probs)
    if p.shape[1] != len(c):
        raise ValueError(f"expected one column per level ({len(c)}), got probs of shape {tuple(p.shape)}")
    return p, c.to(p)


def expected_score(probs: Any, levels: Sequence[float] = LEVELS) -> Tensor:
    """Return the mean score (n,) of distributions over levels (n, K); differentiable.

    >>> expected_score([[0.0, 0.75, 0.25, 0.0, 0.0]])
    tensor([2.2500])

    Paper: you2025teaching

    Chapter: calibration/measuring-calibration
    """
    p, c = _decode(probs, levels)
    return p @ c


def score_spread(probs: Any, levels: Sequence[float] = LEVELS) -> Tensor:
    """Return the standard deviation (n,) of the score under distributions over levels (n, K); differentiable.

    >>> score_spread([[0.5, 0.0, 0.0, 0.0, 0.5]])
    tensor([2.])

    Paper: you2025teaching

    Chapter: calibration/measuring-calibration
    """
    p, c = _decode(probs, levels)
    mean = (p @ c)[:, None]
    return (p * (c - mean).square()).sum(1).clamp(min=torch.finfo(p.dtype).tiny).sqrt()


def _log_normal_cdf(z: Tensor) -> Tensor:
    """Return log Phi(z), accurate in both tails; unlike `torch.special.log_ndtr`, `vmap` has a rule for each step."""
    u = -z.clamp(max=0) / 2**0.5
    below = (torch.special.erfcx(u) / 2).log() - u.square()
    above = torch.log1p(-torch.special.erfc(z.clamp(min=0) / 2**0.5) / 2)
    return torch.where(z < 0, below, above)


class ThurstoneFidelityLoss(nn.Module):
    r"""Penalise pairs whose predicted odds differ from the raters' odds, within each data set only.

    Two images with scores $N(\mu_i, \sigma_i^2)$, $N(\mu_j, \sigma_j^2)$ are ranked i above j with probability

    $$p_{ij} = \Phi\!\Big(\frac{\mu_i - \mu_j}{\sqrt{\sigma_i^2 + \sigma_j^2}}\Big),$$

    and the loss is the mean over pairs of the infidelity of predicted $\hat p_{ij}$ and the raters' $p_{ij}$,

    $$1 - \sqrt{\hat p\, p} - \sqrt{(1 - \hat p)(1 - p)}.$$

    Multiplying all scores and spreads of a data set by one positive number, or shifting its scores, changes nothing:
    sets rated on different scales can be trained together. Computed through log-probabilities, so that the gradient
    stays finite for pairs that are far apart.

    Args:
        eps: added to the variances.

    >>> loss = ThurstoneFidelityLoss()
    >>> mean, std = torch.tensor([1.0, 2.0, 4.0]), torch.ones(3)
    >>> abs(loss(mean, std, 10 * mean + 5, 10 * std).item()) < 1e-6  # another scale, the same odds
    True

    Paper: you2025teaching

    Chapter: calibration/measuring-calibration
    """

    def __init__(self, eps: float = 1e-8):
        super().__init__()
        self.eps = eps

    def forward(
        self, mean: Tensor, std: Tensor, target_mean: Tensor, target_std: Tensor, group: Tensor | None = None
    ) -> Tensor:
        """Return the mean infidelity over pairs of one group (all pairs where group is None); 0 without a pair.

        Args:
            mean: predicted scores (n,).
            std: their predicted standard deviations (n,), or a scalar tensor for all.
            target_mean: the raters' means (n,).
            target_std: the raters' standard deviations (n,).
            group: the data set of each image (n,).
        """
        n = mean.shape[0]
        i, j = torch.triu_indices(n, n, 1, device=mean.device)
        kept = mean.new_ones(len(i)) if group is None else (group[i] == group[j]).to(mean.dtype)
        ours = self._odds(mean, std.expand(n), i, j)
        theirs = self._odds(target_mean, target_std.expand(n), i, j)
        fidelity = sum((0.5 * (a + b)).exp() for a, b in zip(ours, theirs))
        return ((1 - fidelity) * kept).sum() / kept.sum().clamp(min=1)

    def _odds(self, mean: Tensor, std: Tensor, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p_ij and log (1 - p_ij)."""
        z = (mean[i] - mean[j]) / (std[i].square() + std[j].square() + self.eps).sqrt()
        return _log_normal_cdf(z), _log_normal_cdf(-z)
