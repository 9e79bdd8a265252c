"""Prompt flows: a distribution over prompts instead of one, learned on some products and used on others.

Public: `PromptFlow`, `PromptScorer`, `elbo`, `fit_prompts`, `ensemble_map`, `ResidualCrossAttention`,
`make_prompt_task`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from companion.checks import check_positive_int
from companion.runtime import has_fused

__all__ = [
    "PromptFlow",
    "PromptScorer",
    "PromptTask",
    "ResidualCrossAttention",
    "elbo",
    "ensemble_map",
    "fit_prompts",
    "make_prompt_task",
]


class PromptFlow(nn.Module):
    r"""Planar layers that carry a Gaussian over prompts to any shape.

    $z_k = z_{k-1} + \hat u \tanh(w^\top z_{k-1} + b)$ with
    $\log |\det| = \log |1 + \hat u^\top w \,(1 - \tanh^2)|$ and
    $\hat u = u + (\mathrm{softplus}(w^\top u) - 1 - w^\top u)\, w / \lVert w \rVert^2$, which keeps every layer
    invertible. With `layers=0` it is the Gaussian posterior.

    Args:
        dim: length of a prompt.
        layers: planar layers K.
        context_dim: length of a context (an image's feature) that shifts the base Gaussian; 0 for one shared flow.
        seed: initialises the weights.

    >>> z, log_q = PromptFlow(4, layers=2, seed=0).sample(3, generator=torch.Generator().manual_seed(0))
    >>> z.shape, log_q.shape
    (torch.Size([3, 4]), torch.Size([3]))

    Paper: qu2025bayesian
    Chapter: anomaly/visual-references
    """

    def __init__(self, dim: int, layers: int = 4, context_dim: int = 0, seed: int | None = None):
        super().__init__()
        check_positive_int(dim, "dim")
        with torch.random.fork_rng(devices=[]):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            self.mean = nn.Parameter(0.5 * torch.randn(dim))
            self.log_std = nn.Parameter(torch.full((dim,), -1.0))
            self.u = nn.Parameter(0.3 * torch.randn(layers, dim))
            self.w = nn.Parameter(0.3 * torch.randn(layers, dim))
            self.b = nn.Parameter(torch.zeros(layers))
            self.shift = nn.Linear(context_dim, dim, bias=False) if context_dim else None
        if self.shift is not None:
            nn.init.zeros_(self.shift.weight)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the carried points (n, dim) and the log-determinant of each (n,)."""
        log_det = z.new_zeros(len(z))
        for u, w, b in zip(self.u, self.w, self.b, strict=True):
            inner = w @ u
            u_hat = u + (F.softplus(inner) - 1 - inner) * w / w.square().sum().clamp(min=1e-9)
            t = torch.tanh(z @ w + b)
            log_det = log_det + torch.log1p((u_hat @ w) * (1 - t.square()))
            z = z + t[:, None] * u_hat
        return z, log_det

    def sample(
        self, n: int, context: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return n prompts (n, dim) and their log density (n,), differentiable in the flow's weights."""
        noise = torch.randn(n, len(self.mean), generator=generator).to(self.mean)
        mean = self.mean if context is None or self.shift is None else self.mean + self.shift(context)
        z, log_det = self(mean + self.log_std.exp() * noise)
        log_base = (-0.5 * noise.square() - self.log_std - 0.5 * math.log(2 * math.pi)).sum(1)
        return z, log_base - log_det


class ResidualCrossAttention(nn.Module):
    """Prompts look at the patches of an image and move a little: text + attention(text, patches).

    >>> ResidualCrossAttention(8)(torch.rand(3, 8), torch.rand(5, 8)).shape
    torch.Size([3, 8])

    Paper: qu2025bayesian
    Chapter: anomaly/visual-references
    """

    def __init__(self, dim: int, heads: int = 1):
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        nn.init.zeros_(self.attention.out_proj.weight)  # starts as the identity
        nn.init.zeros_(self.attention.out_proj.bias)

    def forward(self, text: Tensor, patches: Tensor) -> Tensor:
        """Return the moved text embeddings (n, dim)."""
        return text + self.attention(text[None], patches[None], patches[None])[0][0]


class PromptTask(NamedTuple):
    """`patches` (n, p, d) of n images, `labels` (n, p) 1 where defective, `product` (n,)."""

    patches: Tensor
    labels: Tensor
    product: Tensor


def make_prompt_task(
    n: int,
    products: Tensor,
    directions: Tensor,
    n_patches: int = 16,
    noise: float = 0.3,
    generator: torch.Generator | None = None,
) -> PromptTask:
    """Draw images of products as patch vectors: a product's code, noise, and on some patches a defect direction.

    Args:
        n: images.
        products: codes (c, d).
        directions: defect directions (m, d); each defective patch has one of them.
        n_patches: patches per image.
        noise: standard deviation per coordinate.
        generator: a cpu generator.

    >>> task = make_prompt_task(5, torch.eye(4)[:2], torch.eye(4)[2:], generator=torch.Generator().manual_seed(0))
    >>> task.patches.shape, task.labels.shape
    (torch.Size([5, 16, 4]), torch.Size([5, 16]))

    Paper: qu2025bayesian
    Chapter: anomaly/visual-references
    """
    device = products.device  # drawn on the CPU, so that every device sees the same
    product = torch.randint(len(products), (n,), generator=generator).to(device)
    labels = (torch.rand(n, n_patches, generator=generator) < 0.25).long().to(device)
    mode = torch.randint(len(directions), (n, n_patches), generator=generator).to(device)
    patches = products[product][:, None] + labels[..., None] * directions[mode]
    return PromptTask(patches + noise * torch.randn(patches.shape, generator=generator).to(device), labels, product)


class PromptScorer(nn.Module):
    r"""A frozen text tower and a prompt that may be a point or a distribution.

    A prompt p becomes a text embedding $g(p)$ of length one; a patch x is scored by
    $\sigma(a \langle x / \lVert x \rVert, g(p) \rangle + b)$. `layers=None` learns one prompt.

    Args:
        dim: of the embeddings.
        prompt_dim: of the prompts.
        layers: planar layers of the flow; 0 for a Gaussian, None for a single prompt.
        seed: initialises the prompt; `tower_seed` the frozen tower, the same for all that are compared.
        tower_seed: see above.

    >>> PromptScorer(8, seed=0)(torch.rand(2, 5, 8), torch.zeros(3, 8)).shape
    torch.Size([3, 2, 5])

    Paper: qu2025bayesian
    Chapter: anomaly/visual-references
    """

    def __init__(self, dim: int, prompt_dim: int = 8, layers: int | None = 4, seed: int = 0, tower_seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(tower_seed)
            tower = nn.Sequential(nn.Linear(prompt_dim, 64), nn.Tanh(), nn.Linear(64, dim))
            for layer in tower:
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            self.tower = tower.requires_grad_(False)
        self.flow = PromptFlow(prompt_dim, layers or 0, seed=seed)
        self.is_point = layers is None
        self.scale = nn.Parameter(torch.tensor(5.0))
        self.bias = nn.Parameter(torch.tensor(-1.0))

    def prompts(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return n prompts and their log densities; a point prompt returns itself, with density 1."""
        if self.is_point:
            return self.flow.mean.expand(n, -1), self.flow.mean.new_zeros(n)
        return self.flow.sample(n, generator=generator)

    def forward(self, patches: Tensor, prompts: Tensor) -> Tensor:
        """Return defect logits (k, ...) of patches (..., dim) for k prompts."""
        text = F.normalize(self.tower(prompts), dim=-1)
        return self.scale * torch.einsum("...d,kd->k...", F.normalize(patches, dim=-1), text) + self.bias


def elbo(
    model: PromptScorer,
    patches: Tensor,
    labels: Tensor,
    n_samples: int = 4,
    kl_weight: float = 1e-3,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return $E_q \log p(y \mid x, z) - \beta\, KL(q(z) \Vert N(0, I))$, per patch, estimated from samples.

    $KL = E_q[\log q(z) + \tfrac12 \lVert z \rVert^2] + \tfrac d2 \log 2\pi$.

    Args:
        model: scorer with its prompt distribution.
        patches: (n, p, d).
        labels: (n, p).
        n_samples: prompts drawn.
        kl_weight: beta.
        generator: for the draws.

    >>> task = make_prompt_task(5, torch.eye(4)[:2], torch.eye(4)[2:], generator=torch.Generator().manual_seed(0))
    >>> bool(elbo(PromptScorer(4, seed=0), task.patches, task.labels) < 0)
    True

    Paper: qu2025bayesian
    Chapter: anomaly/visual-references
    """
    z, log_q = model.prompts(1 if model.is_point else n_samples, generator)
    logits = model(patches, z)
    log_likelihood = -F.binary_cross_entropy_with_logits(logits, labels.to(logits).expand_as(logits))
    if model.is_point:
        return log_likelihood
    kl = (log_q + 0.5 * z.square().sum(1) + 0.5 * z.shape[1] * math.log(2 * math.pi)).mean()
    return log_likelihood - kl_weight * kl


class _Objective(nn.Module):
    """Minus the evidence bound as a forward pass, which is what `torch.func` can call with other parameters."""

    def __init__(self, scorer: PromptScorer, kl_weight: float):
        super().__init__()
        self.scorer, self.kl_weight = scorer, kl_weight

    def forward(self, patches: Tensor, labels: Tensor) -> Tensor:
        return -elbo(self.scorer, patches, labels, kl_weight=self.kl_weight)


@torch.enable_grad()
def fit_prompts(
    tasks: Sequence[PromptTask],
    seeds: Sequence[int],
    layers: int | None = 4,
    kl_weight: float = 1e-3,
    steps: int = 300,
    batch_size: int = 32,
    lr: float = 1e-2,
) -> list[PromptScorer]:
    """Train one `PromptScorer` per task and seed by its evidence bound, all of them at once as one stacked model.

    Args:
        tasks: one per seed, all of the same shape.
        seeds: of the prompts, and of the images that each step draws.
        layers: as in `PromptScorer`.
        kl_weight: beta of `elbo`.
        steps: Adam steps.
        batch_size: images per step.
        lr: learning rate.

    >>> task = make_prompt_task(5, torch.eye(4)[:2], torch.eye(4)[2:], generator=torch.Generator().manual_seed(0))
    >>> [scorer.flow.mean.shape for scorer in fit_prompts([task, task], [0, 1], steps=2)]
    [torch.Size([8]), torch.Size([8])]

    Paper: qu2025bayesian
    Chapter: anomaly/visual-references
    """
    device, n, dim = tasks[0].patches.device, len(tasks[0].patches), tasks[0].patches.shape[-1]
    patches, labels = torch.stack([task.patches for task in tasks]), torch.stack([task.labels for task in tasks])
    scorers = [PromptScorer(dim, layers=layers, seed=seed).to(device) for seed in seeds]
    base = _Objective(scorers[0], kl_weight)
    parameters, _ = stack_module_state([_Objective(scorer, kl_weight) for scorer in scorers])
    learned = {name: p for name, p in parameters.items() if p.requires_grad}
    losses = vmap(lambda p, x, y: functional_call(base, p, (x, y)), randomness="different")
    optimizer = torch.optim.Adam(learned.values(), lr=lr, fused=has_fused(device))
    streams, rows_of = [torch.Generator().manual_seed(seed) for seed in seeds], torch.arange(len(seeds))[:, None]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seeds[0])
        for _ in range(steps):
            rows = torch.stack([torch.randint(n, (batch_size,), generator=g) for g in streams])
            loss = losses(parameters, patches[rows_of, rows], labels[rows_of, rows]).sum()  # nothing is shared
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        for i, scorer in enumerate(scorers):
            for name, p in scorer.named_parameters(prefix="scorer"):
                p.copy_(parameters[name][i])
    return scorers


@torch.no_grad()
def ensemble_map(model: PromptScorer, patches: Tensor, n: int = 10, generator: torch.Generator | None = None) -> Tensor:
    """Return the mean defect probability of each patch over n sampled prompts, higher = worse.

    >>> ensemble_map(PromptScorer(8, seed=0), torch.rand(2, 5, 8), n=3).shape
    torch.Size([2, 5])

    Paper: qu2025bayesian
    Chapter: anomaly/visual-references
    """
    return model(patches, model.prompts(n, generator)[0]).sigmoid().mean(0)
