"""Classes that overlap in one place and nowhere else: data on which one temperature cannot be right.

Public: `OverlapMixture`, `make_overlap_mixture`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from companion.checks import check_generator, check_in_range, check_positive_int

__all__ = ["OverlapMixture", "make_overlap_mixture"]


class OverlapMixture(NamedTuple):
    """Points, labels, where the overlap is, and the probabilities a perfect model would give.

    Attributes:
        x: (n, dim) points.
        y: (n,) classes.
        overlap: (n,) bool, whether the point was drawn where two classes coincide.
        posterior: (n, C) true probability of every class at every point.

    Chapter: calibration/recalibration
    """

    x: Tensor
    y: Tensor
    overlap: Tensor
    posterior: Tensor


def make_overlap_mixture(
    n: int,
    n_classes: int = 20,
    dim: int = 10,
    overlap: float = 0.5,
    *,
    spread: float = 3.0,
    noise: float = 0.5,
    generator: torch.Generator | int | None = None,
) -> OverlapMixture:
    r"""Draw classes coupled in pairs: each has a place of its own and one that it shares with its partner.

    A point of class c comes, with probability rho, from the place its pair shares, else from its own:

    $$x \mid c \;\sim\; (1-\rho)\,\mathcal N(\mu_c, \sigma^2 I)
    + \rho\,\mathcal N(\nu_{\lfloor c/2\rfloor}, \sigma^2 I), \qquad \mu, \nu \sim \mathcal N(0, s^2 I)$$

    At its own place a class is certain; at the shared place the best possible probability is one half, whatever the
    model. Where the places lie far apart the Bayes risk is therefore $\rho \log 2$ in log-loss and $\rho / 2$ in error.

    Args:
        n: how many points.
        n_classes: C, even.
        dim: dimension of the points.
        overlap: rho, the share of points drawn at shared places.
        spread: s, standard deviation of the places.
        noise: sigma, standard deviation around a place.
        generator: where the numbers come from; a seed will do, None is torch's default generator.

    Returns:
        An `OverlapMixture` on the cpu, in float32.

    Raises:
        ValueError: n_classes is odd, overlap lies outside [0, 1], or a size is not positive.

    >>> data = make_overlap_mixture(1000, generator=0)
    >>> clear, shared = data.posterior[~data.overlap].amax(1), data.posterior[data.overlap].amax(1)
    >>> round(clear.mean().item(), 2), round(shared.mean().item(), 2)
    (1.0, 0.5)

    Paper: chidambaram2024limitations
    Chapter: calibration/recalibration
    """
    check_positive_int(n, "n")
    check_positive_int(dim, "dim")
    if check_positive_int(n_classes, "n_classes", 2) % 2:
        raise ValueError(f"expected an even n_classes, since classes come in pairs, got {n_classes}")
    check_in_range(overlap, "overlap", 0, 1)
    check_in_range(spread, "spread", 0)
    check_in_range(noise, "noise", 0, inclusive="neither")
    generator = check_generator(generator)
    own = spread * torch.randn(n_classes, dim, generator=generator)
    shared = spread * torch.randn(n_classes // 2, dim, generator=generator)
    y = torch.randint(n_classes, (n,), generator=generator)
    in_overlap = torch.rand(n, generator=generator) < overlap
    place = torch.where(in_overlap[:, None], shared[y // 2], own[y])
    x = place + noise * torch.randn(n, dim, generator=generator)

    def log_density(places: Tensor) -> Tensor:  # up to the constant that all places have in common, (n, places)
        return -torch.cdist(x.double(), places.double()).square() / (2 * noise**2)

    rho = torch.tensor(overlap, dtype=torch.float64)
    log_likelihood = torch.logaddexp(
        torch.log1p(-rho) + log_density(own), rho.log() + log_density(shared).repeat_interleave(2, dim=1)
    )
    return OverlapMixture(x, y, in_overlap, torch.softmax(log_likelihood, dim=1).float())
