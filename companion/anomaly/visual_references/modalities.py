"""Two modalities: defects that break only the relation between what is seen and what is measured.

Public: `make_height_pairs`, `height_patches`, `alignment_loss`, `compactness_loss`, `ModalAdaptor`, `TwoModalMemory`.
"""

from typing import Any, NamedTuple

import torch
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.nn import functional as F

from companion.anomaly.visual_anomalies.detector import upsample_map
from companion.anomaly.visual_anomalies.memory import k_center
from companion.checks import check_positive_int
from companion.neighbors import knn
from companion.runtime import device as pick_device

__all__ = [
    "HeightPairs",
    "ModalAdaptor",
    "TwoModalMemory",
    "alignment_loss",
    "compactness_loss",
    "height_patches",
    "make_height_pairs",
]


class HeightPairs(NamedTuple):
    """`intensity` (n, 1, s, s) and `height` (n, 1, s, s), aligned pixel by pixel; `masks` (n, s, s) bool."""

    intensity: Tensor
    height: Tensor
    masks: Tensor


def make_height_pairs(
    n: int, kind: str = "normal", size: int = 32, generator: torch.Generator | None = None
) -> HeightPairs:
    """Draw bumpy surfaces as a height map and as the shaded picture a camera takes of them.

    Every surface has 4 to 6 bumps and dents. In kind "paint" one of them is only in the picture, in "ghost" only in
    the height map, in "deep" it is in both and too deep. Each map alone looks normal in the first two.

    Args:
        n: surfaces.
        kind: "normal", "paint", "ghost" or "deep".
        size: side in pixels.
        generator: a cpu generator; None means torch's default one.

    Raises:
        ValueError: an unknown kind.

    >>> pairs = make_height_pairs(2, "paint", generator=torch.Generator().manual_seed(0))
    >>> pairs.intensity.shape == pairs.height.shape == (2, 1, 32, 32)
    True

    Paper: tu2024self
    Chapter: anomaly/visual-references
    """
    if kind not in ("normal", "paint", "ghost", "deep"):
        raise ValueError(f"expected kind to be normal, paint, ghost or deep, got {kind!r}")
    check_positive_int(n, "n")
    y, x = torch.meshgrid(torch.arange(size).float(), torch.arange(size).float(), indexing="ij")
    r = torch.rand(n, 6, 5, 1, 1, generator=generator)
    centre = 5 + (size - 10) * r[:, :, :2]
    sigma = 1.8 + 0.8 * r[:, :, 2]
    amplitude = (0.8 + 0.6 * r[:, :, 3]) * torch.where(r[:, :, 4] < 0.5, -1.0, 1.0)
    distance = (x - centre[:, :, 0]).square() + (y - centre[:, :, 1]).square()
    bumps = amplitude * (-distance / (2 * sigma.square())).exp()  # (n, 6, s, s)
    count = torch.randint(4, 7, (n, 1, 1, 1), generator=generator)
    bumps = bumps * (torch.arange(6).view(1, 6, 1, 1) < count)
    albedo = 0.9 + 0.2 * torch.rand(n, 1, 1, generator=generator)
    noise = 0.03 * torch.randn(n, 2, size, size, generator=generator)
    if kind == "deep":
        bumps[:, 0] *= 2.5
    both = bumps[:, 1:].sum(1)
    shaded, measured = both + bumps[:, 0] * (kind != "ghost"), both + bumps[:, 0] * (kind != "paint")
    dy, dx = torch.gradient(shaded, dim=(1, 2))
    normal = torch.stack([-dx, -dy, torch.ones_like(dx)], 1)
    light = torch.tensor([0.5, 0.35, 0.8])
    lambert = (F.normalize(normal, dim=1) * F.normalize(light, dim=0).view(1, 3, 1, 1)).sum(1).clamp(min=0)
    intensity = (0.8 * albedo * lambert + noise[:, 0]).clamp(0, 1)
    height = (0.5 + 0.12 * measured + 0.12 * noise[:, 1]).clamp(0, 1)
    masks = (bumps[:, 0].abs() > 0.15) & (kind != "normal")
    return HeightPairs(intensity[:, None], height[:, None], masks)


def height_patches(maps: Tensor, patch: int = 5, stride: int = 2) -> Tensor:
    """Return the pixel patches of one modality, (n, rows, columns, patch^2), without their mean's global level.

    >>> height_patches(torch.zeros(1, 1, 32, 32)).shape
    torch.Size([1, 14, 14, 25])

    Paper: tu2024self
    Chapter: anomaly/visual-references
    """
    n, c, h, _ = maps.shape
    centred = maps - maps.flatten(1).median(1).values.view(n, 1, 1, 1)
    columns = F.unfold(centred, patch, stride=stride)
    rows = (h - patch) // stride + 1
    return columns.transpose(1, 2).reshape(n, rows, -1, c * patch * patch)


def alignment_loss(z_a: Tensor, z_b: Tensor, tau: float = 0.1) -> Tensor:
    r"""Return the symmetric InfoNCE of matched rows: row i of one modality belongs to row i of the other.

    Args:
        z_a: unit rows (n, d) of one modality.
        z_b: unit rows (n, d) of the other.
        tau: temperature.

    >>> alignment_loss(torch.eye(3), torch.eye(3), tau=0.01)
    tensor(0.)

    Paper: tu2024self
    Chapter: anomaly/visual-references
    """
    logits = z_a @ z_b.T / tau
    target = torch.arange(len(z_a), device=z_a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def compactness_loss(z: Tensor, prototypes: Tensor) -> Tensor:
    r"""Return the mean of $1 - \max_k \langle z, p_k \rangle$: how far patches are from their nearest prototype.

    Args:
        z: unit rows (n, d).
        prototypes: unit rows (k, d).

    >>> compactness_loss(torch.eye(2), torch.eye(2))
    tensor(0.)

    Paper: tu2024self
    Chapter: anomaly/visual-references
    """
    return (1 - (z @ prototypes.T).amax(1)).mean()


class ModalAdaptor(nn.Sequential):
    """Two layers from the frozen features of one modality to unit vectors both modalities share.

    >>> ModalAdaptor(25, 16)(torch.rand(3, 25)).norm(dim=1).round(decimals=3)
    tensor([1., 1., 1.], grad_fn=...)

    Paper: tu2024self
    Chapter: anomaly/visual-references
    """

    def __init__(self, in_dim: int, dim: int = 16, hidden: int = 64):
        super().__init__(nn.Linear(in_dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return unit rows (..., dim)."""
        return F.normalize(super().forward(x), dim=-1)


class TwoModalMemory(BaseEstimator):
    r"""Adaptors that make two modalities agree patch by patch on normal data; disagreement is the score.

    The map of `which="misalignment"` is $1 - \langle z^a_{ij}, z^b_{ij} \rangle$; that of "memory" is the distance of
    the joined adapted patches to a coreset of normal ones; "first", "second" and "joined" are memories of the raw
    patches of one modality, or of both without adaptation: the baselines.

    Signs: `anomaly_map` higher = worse, `score_samples` higher = more normal (minus the mean of the three largest).

    Args:
        patches: maps (n, c, h, w) to a grid (n, rows, columns, d), for both modalities; None is `height_patches`. At
            real scale a backbone of each modality, given as a pair of functions.
        dim: of the shared space.
        tau: temperature of the alignment.
        compactness: weight of the pull towards prototypes.
        steps: Adam steps.
        pairs_per_step: patch pairs per step.
        coreset: patches each memory keeps.
        which: "misalignment", "memory", "first", "second" or "joined".
        device: "auto", or a torch device.
        random_state: seed; None uses torch's default generator.

    >>> pairs = make_height_pairs(8, generator=torch.Generator().manual_seed(0))
    >>> memory = TwoModalMemory(steps=2, random_state=0).fit(pairs.intensity, pairs.height)
    >>> memory.score_samples(pairs.intensity, pairs.height).shape
    torch.Size([8])

    Paper: tu2024self
    Chapter: anomaly/visual-references
    """

    def __init__(
        self,
        patches=None,
        dim: int = 16,
        tau: float = 0.1,
        compactness: float = 0.0,
        steps: int = 300,
        pairs_per_step: int = 256,
        coreset: int = 1000,
        which: str = "misalignment",
        device: str = "auto",
        random_state: int | None = None,
    ):
        self.patches = patches
        self.dim = dim
        self.tau = tau
        self.compactness = compactness
        self.steps = steps
        self.pairs_per_step = pairs_per_step
        self.coreset = coreset
        self.which = which
        self.device = device
        self.random_state = random_state

    def _grids(self, first: Any, second: Any) -> tuple[Tensor, Tensor]:
        where = pick_device(self.device)
        maps = [torch.as_tensor(m).float().to(where) for m in (first, second)]
        if any(m.ndim != 4 or not torch.isfinite(m).all() for m in maps) or len(maps[0]) != len(maps[1]):
            raise ValueError(f"expected two batches of finite maps (n, c, h, w), got {[tuple(m.shape) for m in maps]}")
        functions = self.patches if isinstance(self.patches, tuple) else (self.patches or height_patches,) * 2
        a, b = (function(m) for function, m in zip(functions, maps, strict=True))
        if a.shape[:3] != b.shape[:3]:
            raise ValueError(f"expected one patch grid for both modalities, got {a.shape[:3]} and {b.shape[:3]}")
        return a, b

    @torch.enable_grad()
    def fit(self, first: Any, second: Any) -> "TwoModalMemory":
        """Train the adaptors and fill the memories with aligned normal maps of both modalities."""
        if self.which not in ("misalignment", "memory", "first", "second", "joined"):
            raise ValueError(f"expected which to be a kind of map, got {self.which!r}")
        g = None if self.random_state is None else torch.Generator().manual_seed(int(self.random_state))
        grids = [grid.detach() for grid in self._grids(first, second)]
        self.mean_ = [x.mean((0, 1, 2)) for x in grids]
        self.std_ = [x.std((0, 1, 2)).clamp(min=1e-6) for x in grids]
        a, b = ((x.flatten(0, 2) - m) / s for x, m, s in zip(grids, self.mean_, self.std_, strict=True))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(torch.randint(2**31, (), generator=g)))
            self.adaptors_ = nn.ModuleList([ModalAdaptor(x.shape[1], self.dim) for x in (a, b)]).to(a.device)
        self._train(a, b, g)
        self.memories_ = {}
        for name, rows in self._views(a, b).items():
            some = rows[torch.randperm(len(rows), generator=g)[:8000].to(rows.device)]
            self.memories_[name] = some[k_center(some, min(self.coreset, len(some)))]
        return self

    def _train(self, a: Tensor, b: Tensor, g: torch.Generator | None) -> None:
        optimizer = torch.optim.Adam(self.adaptors_.parameters(), lr=3e-3)
        # flat patches all look alike, hence are false negatives of each other: most pairs come from the liveliest third
        energy = a.square().sum(1) + b.square().sum(1)
        lively = energy.argsort(descending=True)[: len(a) // 3]
        n_lively = 3 * self.pairs_per_step // 4
        for _ in range(self.steps):
            some = lively[torch.randint(len(lively), (n_lively,), generator=g).to(a.device)]
            rest = torch.randint(len(a), (self.pairs_per_step - n_lively,), generator=g).to(a.device)
            rows = torch.cat([some, rest])
            z_a, z_b = self.adaptors_[0](a[rows]), self.adaptors_[1](b[rows])
            loss = alignment_loss(z_a, z_b, self.tau)
            if self.compactness:
                prototypes = z_a.detach()[:: max(1, self.pairs_per_step // 32)]
                loss = loss + self.compactness * (compactness_loss(z_a, prototypes) + compactness_loss(z_b, prototypes))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def _views(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        adapted = torch.cat([self.adaptors_[0](a), self.adaptors_[1](b)], 1)
        return {"memory": adapted, "first": a, "second": b, "joined": torch.cat([a, b], 1)}

    @torch.no_grad()
    def patch_map(self, first: Any, second: Any) -> Tensor:
        """Return the map on the patch grid, (n, rows, columns), higher = worse."""
        check_is_fitted(self, "memories_")
        grids = self._grids(first, second)
        a, b = ((x.flatten(0, 2) - m) / s for x, m, s in zip(grids, self.mean_, self.std_, strict=True))
        if self.which == "misalignment":
            odd = 1 - (self.adaptors_[0](a) * self.adaptors_[1](b)).sum(1)
        else:
            odd = knn(self._views(a, b)[self.which], self.memories_[self.which], k=1)[0][:, 0]
        return odd.view(grids[0].shape[:3])

    def anomaly_map(self, first: Any, second: Any) -> Tensor:
        """Return the map at the size of the inputs, (n, h, w), higher = worse."""
        return upsample_map(self.patch_map(first, second), torch.as_tensor(first).shape[2:])

    def score_samples(self, first: Any, second: Any) -> Tensor:
        """Return minus the mean of the three largest patches, (n,): higher = more normal."""
        odd = self.patch_map(first, second).flatten(1)
        return -odd.topk(min(3, odd.shape[1]), dim=1).values.mean(1)
