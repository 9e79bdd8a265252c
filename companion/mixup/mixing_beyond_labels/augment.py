"""Augmentation as a constraint: small loss on transformed data, at a price that training itself finds.

Public: `AffineFamily`, `TransformSampler`, `PrimalDualAugment`, `fit_constrained`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion import runtime
from companion._stacked import stacked_forward
from companion.checks import as_tensor, check_generator, check_in_range, check_positive_int, check_same_length
from companion.training import ManyModels

__all__ = ["AffineFamily", "PrimalDualAugment", "TransformSampler", "Transformed", "fit_constrained"]


class AffineFamily:
    """A family of image transformations: turns, shifts and zooms up to given sizes, the same to both sides.

    Args:
        name: for tables and figures.
        degrees: largest turn.
        shift: largest shift along either side, as a fraction of the image.
        zoom: largest relative change of size; 0.25 goes from 1/1.25 to 1.25.

    Raises:
        ValueError: a size below zero.

    >>> turn = AffineFamily("turns", degrees=45)
    >>> image = torch.rand(1, 1, 8, 8)
    >>> torch.allclose(turn(image, torch.zeros(1, 4)), image, atol=1e-5)  # the middle of the family changes nothing
    True

    Paper: hounie2023automatic
    Chapter: mixup/mixing-beyond-labels
    """

    def __init__(self, name: str, degrees: float = 0.0, shift: float = 0.0, zoom: float = 0.0):
        self.name = name
        self.degrees, self.shift = check_in_range(degrees, "degrees", 0), check_in_range(shift, "shift", 0)
        self.zoom = check_in_range(zoom, "zoom", 0)

    def draw(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """Draw parameters uniformly: (*shape, 4), each in [-1, 1]."""
        return 2 * torch.rand(*shape, 4, generator=generator) - 1

    def __call__(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Transform images, bilinearly and with black outside; gradients flow to images and parameters.

        Args:
            images: (..., c, h, w).
            parameters: (..., 4) in [-1, 1]: turn, shift right, shift down, zoom.
        """
        lead, (c, h, w) = images.shape[:-3], images.shape[-3:]
        turn, right, down, size = parameters.to(images).reshape(-1, 4).T
        angle = turn * math.radians(self.degrees)
        scale = torch.exp(-size * math.log1p(self.zoom))
        cos, sin = scale * angle.cos(), scale * angle.sin()
        # affine_grid maps places of the result to places of the image, in units of half a side
        rows = torch.stack([cos, -sin * h / w, -2 * self.shift * right, sin * w / h, cos, -2 * self.shift * down], 1)
        grid = F.affine_grid(rows.view(-1, 2, 3), [len(rows), c, h, w], align_corners=False)
        moved = F.grid_sample(images.reshape(-1, c, h, w), grid, align_corners=False)
        return moved.view(*lead, c, h, w)

    def __repr__(self) -> str:
        return f"AffineFamily({self.name!r}, degrees={self.degrees}, shift={self.shift}, zoom={self.zoom})"


class Transformed(NamedTuple):
    """What a sampler returns: images (..., c, h, w), their parameters (..., 4), and the share of moves accepted."""

    images: Tensor
    parameters: Tensor
    acceptance: float


class TransformSampler:
    r"""Draws transformations where the loss is large, by Metropolis-Hastings.

    The density wanted is proportional to the loss itself, $q(g) \propto \ell(f(gx), y)$, which needs $\ell \ge 0$ and
    no normalisation: propose a uniform $g'$, and move there with probability $\min(1, \ell(g')/\ell(g))$.

    Args:
        family: what to draw from.
        n_steps: proposals per image; 0 draws uniformly.

    >>> sampler = TransformSampler(AffineFamily("turns", degrees=90), n_steps=3)
    >>> drawn = sampler.sample(lambda x: x.sum((1, 2, 3)), torch.rand(5, 1, 8, 8))
    >>> drawn.images.shape, drawn.parameters.shape
    (torch.Size([5, 1, 8, 8]), torch.Size([5, 4]))

    Paper: hounie2023automatic
    Chapter: mixup/mixing-beyond-labels
    """

    def __init__(self, family: AffineFamily, n_steps: int = 2):
        self.family, self.n_steps = family, check_positive_int(n_steps, "n_steps", 0)

    @torch.no_grad()
    def sample(
        self, losses: Callable[[Tensor], Tensor], images: Tensor, generator: torch.Generator | None = None
    ) -> Transformed:
        """Return one transformation of each image.

        Args:
            losses: images (..., c, h, w) -> losses (...), at least 0.
            images: (..., c, h, w).
            generator: a cpu generator; None uses torch's default one.
        """
        lead = images.shape[:-3]
        current = self.family.draw(lead, generator)
        best = self.family(images, current)
        accepted = 0.0
        height = losses(best) if self.n_steps else None
        for _ in range(self.n_steps):
            proposal = self.family.draw(lead, generator)
            moved = self.family(images, proposal)
            new = losses(moved)
            accept = torch.rand(lead, generator=generator).to(new) * height < new
            current = torch.where(accept.cpu()[..., None], proposal, current)
            best = torch.where(accept[..., None, None, None], moved, best)
            height = torch.where(accept, new, height)
            accepted += float(accept.double().mean()) / self.n_steps
        return Transformed(best, current, accepted)


class PrimalDualAugment:
    r"""Minimise the clean loss subject to a bound on the loss under each family of transformations.

    $$\min_\theta\ \mathbb{E}\,\ell(f_\theta(x), y) \quad\text{s.t.}\quad
      \mathbb{E}_{g \sim q_k}\,\ell(f_\theta(gx), y) \le \epsilon \ \text{ for every family } k$$

    with $q_k$ the sampler's worst-case density. Descend in $\theta$ on the Lagrangian
    $\ell + \sum_k \mu_k(\ell_k - \epsilon)$, ascend in the prices,
    $\mu_k \leftarrow [\mu_k + \eta(\ell_k - \epsilon)]_+$.
    A price grows while its constraint is violated and falls to zero where it is met for free. With `dual_lr=0` and an
    `initial` price it is plain augmentation with fixed weights; with no families it is plain training.

    Args:
        families: the transformations, one constraint each.
        eps: the bound, one number or one per family.
        dual_lr: $\eta$.
        initial: prices at the start, one number or one per family.
        cap: largest price; a constraint that cannot be met drives its price there.
        n_steps: proposals of the sampler per image and batch; 0 draws uniformly.

    Attributes:
        duals_: prices, (K,), or (m, K) for m models trained at once.
        dual_history_: the prices after every update, a list of such tensors.

    Raises:
        ValueError: settings out of range.

    >>> learner = PrimalDualAugment([AffineFamily("turns", degrees=45)], eps=0.5, dual_lr=0.1)
    >>> learner.update(torch.tensor([1.5])).tolist(), learner.update(torch.tensor([0.0])).tolist()
    ([0.1...], [0.05...])

    Paper: hounie2023automatic
    Chapter: mixup/mixing-beyond-labels
    """

    def __init__(
        self,
        families: Sequence[AffineFamily],
        eps: float | Sequence[float] = 0.5,
        dual_lr: float = 0.01,
        initial: float | Sequence[float] = 0.0,
        cap: float = 10.0,
        n_steps: int = 2,
    ):
        self.samplers = [TransformSampler(family, n_steps) for family in families]
        self.eps = _one_each(eps, len(self.samplers), "eps")
        self.initial = _one_each(initial, len(self.samplers), "initial")
        self.dual_lr, self.cap = check_in_range(dual_lr, "dual_lr", 0), check_in_range(cap, "cap", 0)
        self.duals_, self.dual_history_ = self.initial.clone(), []

    def lagrangian(
        self, losses: Callable[[Tensor], Tensor], images: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what the model should descend on, and the losses under each family.

        Args:
            losses: images (..., b, c, h, w) -> losses (..., b), at least 0.
            images: a batch (b, c, h, w), or (m, b, c, h, w) for m models.
            generator: draws the transformations; a cpu generator, None uses torch's default one.

        Returns:
            (Lagrangian (...), losses (..., K)).
        """
        clean = losses(images).mean(-1)
        if not self.samplers:
            return clean, clean.new_zeros(*clean.shape, 0)
        moved = [sampler.sample(losses, images, generator).images for sampler in self.samplers]
        constrained = torch.stack([losses(x).mean(-1) for x in moved], -1)  # (..., K)
        return clean + (self.duals_.to(clean) * (constrained - self.eps.to(clean))).sum(-1), constrained

    def update(self, constrained: Tensor) -> Tensor:
        """Move the prices along the slack of their constraints and return them.

        Args:
            constrained: losses under each family, (..., K).
        """
        slack = constrained.detach().cpu() - self.eps
        self.duals_ = (self.duals_ + self.dual_lr * slack).clamp(0, self.cap)
        self.dual_history_.append(self.duals_)
        return self.duals_

    def step(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        x: Tensor,
        y: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Take one step of a classifier and of the prices on a batch, and return the Lagrangian."""
        check_same_length(x=x, y=y)

        def losses(images: Tensor) -> Tensor:
            return F.cross_entropy(model(images), y, reduction="none")

        value, constrained = self.lagrangian(losses, x, generator)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        self.update(constrained)
        return value.detach()


def _one_each(value: float | Sequence[float], n: int, name: str) -> Tensor:
    values = [value] * n if isinstance(value, int | float) else as_tensor(value, name).tolist()
    if len(values) != n:
        raise ValueError(f"expected one {name}, or one per family ({n}), got {len(values)}")
    return torch.tensor([check_in_range(v, name, 0) for v in values], dtype=torch.get_default_dtype())


@torch.enable_grad()
def fit_constrained(
    make_model: Callable[[], nn.Module],
    seeds: Sequence[int],
    x: Any,
    y: Any,
    learner: PrimalDualAugment,
    *,
    n_steps: int = 400,
    batch_size: int = 64,
    lr: float = 3e-3,
    generator: torch.Generator | int | None = None,
    device: str | torch.device = "auto",
) -> ManyModels:
    """Train one classifier per seed under the constraints of a learner, all at once, each with its own prices.

    Args:
        make_model: called once per seed, under that seed.
        seeds: one per model; m of them.
        x: images (n, c, h, w), shared, or (m, n, c, h, w); cast to the dtype of the models.
        y: classes (n,) or (m, n).
        learner: `PrimalDualAugment`; its `duals_` become (m, K).
        n_steps: batches.
        batch_size: images per model and batch, drawn anew for each.
        lr: of Adam, which falls to zero along a cosine.
        generator: draws batches and transformations; a seed will do, None makes one from the seeds.
        device: see `companion.runtime.device`.

    Returns:
        `ManyModels`.

    >>> from companion.nets import MLP
    >>> learner = PrimalDualAugment([AffineFamily("turns", degrees=45)])
    >>> x, y = torch.rand(32, 1, 8, 8), torch.arange(32) % 2
    >>> many = fit_constrained(lambda: MLP((64, 8, 2)), [0, 1, 2], x, y, learner, n_steps=3, device="cpu")
    >>> len(many), learner.duals_.shape
    (3, torch.Size([3, 1]))

    Paper: hounie2023automatic
    Chapter: mixup/mixing-beyond-labels
    """
    where, models = runtime.device(device), []
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(seed))
            models.append(make_model().to(where))
    many = ManyModels(models)
    m = len(many)
    generator = check_generator(generator)
    if generator is None:
        generator = torch.Generator().manual_seed(hash(tuple(seeds)) & 0x7FFFFFFF)
    x, y = as_tensor(x).to(where), as_tensor(y).to(where)
    x = x.to(next(iter(many.params.values())).dtype)
    x, y = x.expand(m, *x.shape) if x.dim() == 4 else x, y.expand(m, -1) if y.dim() == 1 else y
    params = {name: p.detach().clone().requires_grad_() for name, p in many.params.items()}
    optimizer = torch.optim.Adam(params.values(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    forward = stacked_forward(models[0].train())
    learner.duals_, learner.dual_history_ = learner.initial.expand(m, -1).clone(), []
    for _ in range(n_steps):
        rows = torch.randint(x.shape[1], (m, batch_size), generator=generator).to(where)
        place = torch.arange(m, device=where)[:, None]
        batch, labels = x[place, rows], y[place, rows]

        def losses(images: Tensor, labels: Tensor = labels) -> Tensor:
            logits = forward(params, many.buffers, images)  # (m, b, C)
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)

        value, constrained = learner.lagrangian(losses, batch, generator)
        optimizer.zero_grad()
        value.sum().backward()
        optimizer.step()
        schedule.step()
        learner.update(constrained)
    many.params.update({name: p.detach() for name, p in params.items()})
    return many
