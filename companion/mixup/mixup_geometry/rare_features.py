"""Features that only a few samples carry, a network simple enough to watch, and mixing that makes it look.

Public: `FeatureNoise`, `make_feature_noise`, `QuadraticPatchCNN`, `mix_apart`, `EarlyStoppedMixup`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from companion.checks import check_generator, check_in_range, check_positive_int
from companion.mixing import Mixed, mixup

__all__ = ["EarlyStoppedMixup", "FeatureNoise", "QuadraticPatchCNN", "make_feature_noise", "mix_apart"]


class FeatureNoise(NamedTuple):
    """Samples from the feature-noise model.

    Attributes:
        x: (n, n_patches, dim); one patch holds the feature, the others noise.
        y: labels in {0, 1}, (n,).
        is_rare: whether the sample carries its class's rare feature, (n,) bool.
        directions: unit vectors (4, dim): common of class 0 and 1, rare of class 0 and 1.
    """

    x: Tensor
    y: Tensor
    is_rare: Tensor
    directions: Tensor


def make_feature_noise(
    n: int,
    dim: int = 600,
    *,
    n_patches: int = 3,
    rare: float = 0.15,
    noise: float = 0.2,
    generator: torch.Generator | None = None,
) -> FeatureNoise:
    """Draw from a model in which each class has a common and a rare feature, beside patches of noise.

    The noise is orthogonal to all features, and in high dimension long: a network can fit a rare sample by its noise
    instead of its feature.

    Args:
        n: samples, half of each class.
        dim: of a patch, at least 5.
        n_patches: at least 2.
        rare: share of the samples of each class that carry its rare feature.
        noise: standard deviation of each noise coordinate.
        generator: None uses torch's default generator.

    Raises:
        ValueError: sizes or shares out of range.

    >>> data = make_feature_noise(10, dim=20, generator=torch.Generator().manual_seed(0))
    >>> data.x.shape, data.directions.shape
    (torch.Size([10, 3, 20]), torch.Size([4, 20]))

    Paper: zou2023benefits
    Chapter: mixup/mixup-geometry
    """
    check_positive_int(n, "n")
    check_positive_int(dim, "dim", minimum=5)
    check_positive_int(n_patches, "n_patches", minimum=2)
    check_in_range(rare, "rare", low=0, high=1)
    check_in_range(noise, "noise", low=0)
    generator = check_generator(generator)
    directions = torch.eye(4, dim)
    y = torch.arange(n) % 2
    is_rare = torch.zeros(n, dtype=torch.bool)
    for k in (0, 1):
        members = (y == k).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generator)
        is_rare[members[order[: round(rare * len(members))]]] = True
    x = noise * torch.randn(n, n_patches, dim, generator=generator)
    x[..., :4] = 0
    place = torch.randint(n_patches, (n,), generator=generator)
    x[torch.arange(n), place] = directions[y + 2 * is_rare]
    return FeatureNoise(x, y, is_rare, directions)


class QuadraticPatchCNN(nn.Module):
    r"""A two-layer network with squared activations that looks at every patch alike.

    $F_k(x) = \sum_{r}\sum_{p} \langle w_{k,r}, x_p\rangle^2$: what a filter picks up first grows fastest, because its
    gradient is proportional to what it has already.

    Args:
        dim: of a patch.
        n_filters: r, filters per class.
        n_classes: k.
        init: standard deviation of the initial weights; the theorem needs it small.

    >>> QuadraticPatchCNN(20)(torch.zeros(5, 3, 20)).shape
    torch.Size([5, 2])

    Paper: zou2023benefits
    Chapter: mixup/mixup-geometry
    """

    def __init__(self, dim: int, n_filters: int = 8, n_classes: int = 2, init: float = 0.01):
        super().__init__()
        shape = [check_positive_int(v, name) for v, name in ((n_classes, "n_classes"), (n_filters, "n_filters"))]
        self.filters = nn.Parameter(init * torch.randn(*shape, check_positive_int(dim, "dim")))

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (n, n_classes) for patches (n, P, dim)."""
        responses = x @ self.filters.flatten(0, 1).T  # (n, P, k r)
        return (responses**2).sum(1).unflatten(1, self.filters.shape[:2]).sum(2)

    @torch.no_grad()
    def learned(self, directions: Tensor) -> Tensor:
        """Return how strongly each class responds to each direction (m, dim): (n_classes, m)."""
        return ((self.filters @ directions.T) ** 2).sum(1)


def mix_apart(
    x: Tensor, y: Tensor, lam_x: float, lam_y: float, generator: torch.Generator | None = None, *, dim: int = 0
) -> Mixed:
    r"""Mix inputs with one weight, $\lambda_x x + (1-\lambda_x)x'$, and labels with another, $\lambda_y$.

    If linearity between samples were why mixup works, this should not.

    Args:
        x: inputs (n, ...).
        y: targets (n, ...).
        lam_x: share of the first input, in [0, 1].
        lam_y: share of its label.
        generator: draws the partners; None uses torch's default generator.
        dim: where samples lie. With 1, x and y are the batches of many models, (m, n, ...), as `fit_many` hands them to
            a batch transform: every model mixes its own samples, with partners at the same places, and there is one
            label weight per model.

    Raises:
        ValueError: a share outside [0, 1], or a dim that is neither 0 nor 1.

    >>> mix_apart(torch.ones(2, 3), torch.tensor([0, 1]), 0.6, 0.9).lam
    tensor(0.9000)

    Paper: zou2023benefits
    Chapter: mixup/mixup-geometry
    """
    check_in_range(lam_x, "lam_x", low=0, high=1)
    check_in_range(lam_y, "lam_y", low=0, high=1)
    if dim not in (0, 1):
        raise ValueError(f"expected dim 0, or 1 for the stacked batches of many models, got {dim!r}")
    home = "cpu" if generator is None else generator.device
    partner = torch.randperm(x.shape[dim], generator=generator, device=home).to(x.device)
    mixed = x.index_select(dim, partner).lerp_(x, lam_x)
    y_b = y.index_select(dim, partner.to(y.device))
    return Mixed(mixed, y, y_b, torch.full(x.shape[:dim], float(lam_y), device=x.device))


class EarlyStoppedMixup:
    """A batch transform that mixes for a number of steps and then leaves batches as they are.

    Args:
        stop_at: how many steps to mix; 0 never mixes, None always does.
        mix: `(x, y, generator) -> Mixed`; default `mixup` with `alpha`.
        alpha: of the default.
        n_models: how many models `fit_many` trains at once: with `per_model` it is called once for each in every step.

    >>> early = EarlyStoppedMixup(stop_at=1)
    >>> _ = early(torch.ones(2, 3), torch.tensor([0, 1]))
    >>> early(torch.ones(2, 3), torch.tensor([0, 1]))[1].lam
    tensor(1.)

    Paper: zou2023benefits
    Chapter: mixup/mixup-geometry
    """

    def __init__(
        self,
        stop_at: int | None,
        mix: Callable[[Tensor, Tensor, torch.Generator | None], Mixed] | None = None,
        *,
        alpha: float = 1.0,
        n_models: int = 1,
    ):
        if stop_at is not None:
            check_positive_int(stop_at, "stop_at", minimum=0)
        self.stop_at, self.n_models, self.calls = stop_at, check_positive_int(n_models, "n_models"), 0
        self.mix = mix or (lambda x, y, generator: mixup(x, y, alpha, generator=generator))

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Mixed]:
        """Return the inputs to train on and the `Mixed` for `mixup_loss`; counts as one call."""
        self.calls += 1
        if self.stop_at is None or self.calls <= self.stop_at * self.n_models:
            mixed = self.mix(x, y, generator)
        else:
            mixed = Mixed(x, y, y, torch.tensor(1.0, device=x.device))
        return mixed.x, mixed
