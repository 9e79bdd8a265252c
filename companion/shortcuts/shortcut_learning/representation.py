"""How much room a feature takes in a hidden layer, which is not how well it is computed.

Public: `BooleanFeatures`, `make_boolean_features`, `variance_explained`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from companion.checks import as_tensor, check_features, check_generator, check_in_range, check_positive_int

__all__ = ["BooleanFeatures", "make_boolean_features", "variance_explained"]


class BooleanFeatures(NamedTuple):
    """Signs and two functions of them. `x` (n, dim), `easy` (n,), `hard` (n,): all -1 or +1."""

    x: Tensor
    easy: Tensor
    hard: Tensor


def make_boolean_features(
    n: int, dim: int = 16, *, parity: int = 3, prevalence: float = 0.5, generator: torch.Generator | None = None
) -> BooleanFeatures:
    r"""Draw random signs with an easy and a hard feature: $x_1$, and the parity $x_2 x_3 \cdots x_{k+1}$.

    Both are balanced, independent of each other, and deterministic given x: they differ in how hard they are to
    compute, and in nothing else.

    Args:
        n: samples.
        dim: signs per sample, at least parity + 1.
        parity: how many signs the hard feature multiplies, k; from 4 on training takes long.
        prevalence: how often the easy feature is +1.
        generator: a cpu generator; None means torch's default one.

    Returns:
        `BooleanFeatures(x, easy, hard)`.

    Raises:
        ValueError: a setting out of range.

    >>> data = make_boolean_features(1000, generator=torch.Generator().manual_seed(0))
    >>> bool((data.hard == data.x[:, 1] * data.x[:, 2] * data.x[:, 3]).all())
    True

    Paper: lampinen2024learned
    Chapter: shortcuts/shortcut-learning
    """
    n, parity = check_positive_int(n, "n"), check_positive_int(parity, "parity")
    dim = check_positive_int(dim, "dim", parity + 1)
    prevalence = check_in_range(prevalence, "prevalence", 0, 1, inclusive="neither")
    x = 2.0 * torch.randint(2, (n, dim), generator=check_generator(generator)) - 1
    if prevalence != 0.5:
        x[:, 0] = 2.0 * (torch.rand(n, generator=generator) < prevalence) - 1
    return BooleanFeatures(x, x[:, 0].clone(), x[:, 1 : parity + 1].prod(1))


def variance_explained(features: Any, target: Any) -> Tensor:
    r"""Return the share of a layer's variance that goes along with a feature.

    $$\frac{\|H^\top f\|^2}{\|f\|^2\,\|H\|_F^2} \qquad \text{(both centred)}$$

    It is what one learns about all units together when told the feature; the shares of independent features add up to
    at most 1. It measures room, not decodability: a share of one in a thousand can be decoded without an error.

    Args:
        features: (n, d), or (m, n, d) for m models.
        target: (n,), or (n, k) for k features, each on its own.

    Returns:
        A scalar in [0, 1]; (k,) for k features, with m in front for m models.

    Raises:
        ValueError: different lengths, fewer than 2 samples, constant features or a constant target.

    >>> f = torch.tensor([1.0, 1.0, -1.0, -1.0])
    >>> g = torch.tensor([1.0, -1.0, 1.0, -1.0])
    >>> h = torch.stack([3 * f, g], dim=1)
    >>> [round(variance_explained(h, one).item(), 3) for one in (f, g)]
    [0.9, 0.1]

    Paper: lampinen2024learned
    Chapter: shortcuts/shortcut-learning
    """
    h = as_tensor(features, "features")
    if h.dim() == 3:
        return torch.stack([variance_explained(one, target) for one in h])
    h = check_features(h, "features", min_samples=2)
    f = as_tensor(target, "target", h.device)
    if f.dim() not in (1, 2) or len(f) != len(h) or not torch.isfinite(f).all():
        raise ValueError(f"expected a finite target ({len(h)},) or ({len(h)}, k), got shape {tuple(f.shape)}")
    wide_h, wide_f = h.double(), (f if f.dim() == 2 else f[:, None]).double()
    wide_h, wide_f = wide_h - wide_h.mean(0), wide_f - wide_f.mean(0)
    total, size = wide_h.square().sum(), wide_f.square().sum(0)
    if total == 0 or (size == 0).any():
        raise ValueError("expected features and a target that vary from sample to sample, got constant ones")
    share = ((wide_h.T @ wide_f).square().sum(0) / (size * total)).to(h.dtype)
    return share[0] if f.dim() == 1 else share
