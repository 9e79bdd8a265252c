"""Many defects of many sizes: generated factory parts, recall by defect size, and a coarse-to-fine detector.

Public: `make_parts`, `SizeStratifiedRecall`, `irregular_defects`, `SmallUNet`, `CoarseToFine`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from companion.checks import check_in_range, check_positive_int
from companion.runtime import has_fused

__all__ = ["CoarseToFine", "Parts", "SizeStratifiedRecall", "SmallUNet", "irregular_defects", "make_parts"]


class Parts(NamedTuple):
    """`images` (n, 1, s, s) in [0, 1]; `regions` (n, s, s) int64: 0 where whole, k inside the k-th defect."""

    images: Tensor
    regions: Tensor


def make_parts(
    n: int,
    defects: int = 0,
    size: int = 64,
    area: tuple[float, float] = (2, 300),
    generator: torch.Generator | None = None,
) -> Parts:
    """Draw brushed plates with an edge and two holes, and 1 to `defects` spots, lines or rectangles each.

    The area of a defect is log-uniform, so that small ones are as many as large ones.

    Args:
        n: pictures.
        defects: most defects per picture; 0 for whole parts.
        size: side in pixels.
        area: smallest and largest defect in pixels.
        generator: a cpu generator; None means torch's default one.

    Raises:
        ValueError: a negative number of defects or a range of areas that is none.

    >>> parts = make_parts(3, defects=4, generator=torch.Generator().manual_seed(0))
    >>> parts.images.shape, bool((parts.regions.amax((1, 2)) >= 1).all())
    (torch.Size([3, 1, 64, 64]), True)

    Paper: yang20253cad
    Chapter: anomaly/visual-anomalies
    """
    check_positive_int(n, "n")
    if defects < 0 or not 1 <= area[0] < area[1]:
        raise ValueError(f"expected defects >= 0 and 1 <= area[0] < area[1], got {defects} and {area}")
    y, x = torch.meshgrid(torch.arange(size).float(), torch.arange(size).float(), indexing="ij")
    brushed = 0.03 * torch.randn(n, size, 1, generator=generator) + 0.02 * torch.randn(
        n, size, size, generator=generator
    )
    r = torch.rand(n, 8, 1, 1, generator=generator)
    images = 0.5 + 0.1 * (r[:, 0] - 0.5) + brushed
    images = images - 0.15 * (x < size * (0.08 + 0.06 * r[:, 1]))
    for i in (2, 5):
        cx, cy, radius = size * (0.25 + 0.6 * r[:, i]), size * (0.2 + 0.6 * r[:, i + 1]), size * (0.05 + 0.03 * r[:, 4])
        images = torch.where((x - cx).square() + (y - cy).square() <= radius.square(), 0.15 + 0.5 * brushed, images)
    regions = torch.zeros(n, size, size, dtype=torch.int64)
    for k in range(1, defects + 1):
        r = torch.rand(n, 7, 1, 1, generator=generator)
        present = (r[:, 0] * defects >= k - 1) if k > 1 else torch.ones(n, 1, 1, dtype=torch.bool)
        pixels = (math.log(area[0]) + (math.log(area[1]) - math.log(area[0])) * r[:, 1]).exp()
        aspect = torch.where(r[:, 2] < 1 / 3, 1.0, torch.where(r[:, 2] < 2 / 3, 5.0, 1.6))
        long, short = (pixels * aspect).sqrt() / 2, (pixels / aspect).sqrt() / 2
        cx, cy, turn = size * (0.15 + 0.7 * r[:, 3]), size * (0.15 + 0.7 * r[:, 4]), math.pi * r[:, 5]
        cx, cy = cx.floor(), cy.floor()
        u = (x - cx) * turn.cos() + (y - cy) * turn.sin()
        v = (y - cy) * turn.cos() - (x - cx) * turn.sin()
        disc = (u.square() + v.square()) * math.pi <= pixels
        box = (u.abs() <= long) & (v.abs() <= short.clamp(min=0.5))
        inside = torch.where(r[:, 2] < 1 / 3, disc, box) & present & (regions == 0)
        change = (0.3 + 0.2 * (2 * r[:, 6] % 1)) * torch.where(r[:, 6] < 0.5, -1.0, 1.0)
        images = images + change * inside
        regions = torch.where(inside, k, regions)
    return Parts(images.clamp(0, 1)[:, None], regions)


class SizeStratifiedRecall(Metric):
    r"""Share of each defect's area above a threshold, averaged within bins of defect size.

    The threshold is set on normal pixels at a false positive rate. Bins: defects with at most `bins[0]` pixels, at most
    `bins[1]`, ..., and larger. Streams: `update` may be called batch by batch, on many processes; the normal pixels
    are kept as a histogram-free list of their largest values, which is all the threshold needs.

    Args:
        bins: upper sizes of the bins but the last.
        fpr: share of normal pixels above the threshold.

    >>> recall = SizeStratifiedRecall(bins=(4,), fpr=0.1)
    >>> maps, regions = torch.zeros(1, 6, 6), torch.zeros(1, 6, 6, dtype=torch.int64)
    >>> regions[0, 0, 0] = 1; maps[0, 0, 0] = 1.0; regions[0, 3:6, 3:6] = 2
    >>> recall.update(maps, regions); recall.compute()
    tensor([1., 0.])

    Paper: yang20253cad
    Chapter: anomaly/visual-anomalies
    """

    full_state_update = False

    def __init__(self, bins: tuple[int, ...] = (4, 16, 64), fpr: float = 0.01, **kwargs):
        super().__init__(**kwargs)
        check_in_range(fpr, "fpr", 0.0, 1.0, inclusive="neither")
        if list(bins) != sorted(set(bins)) or not bins:
            raise ValueError(f"expected increasing bins, got {bins}")
        self.bins = tuple(bins)
        self.fpr = fpr
        self.add_state("normal", default=[], dist_reduce_fx="cat")
        self.add_state("values", default=[], dist_reduce_fx="cat")  # map values inside defects
        self.add_state("sizes", default=[], dist_reduce_fx="cat")  # and the size of the defect of each

    def update(self, maps: Tensor, regions: Tensor) -> None:
        """Add maps (n, h, w), higher = worse, and regions (n, h, w): 0 normal, k inside the k-th defect."""
        if maps.shape != regions.shape or maps.ndim != 3:
            raise ValueError(f"expected maps and regions of one shape (n, h, w), got {maps.shape} and {regions.shape}")
        inside = regions > 0
        self.normal.append(maps[~inside].float())
        image = torch.arange(len(maps), device=maps.device)[:, None, None]
        label = (image * (int(regions.max()) + 1) + regions)[inside]
        _, which, counts = label.unique(return_inverse=True, return_counts=True)
        self.values.append(maps[inside].float())
        self.sizes.append(counts[which])

    def compute(self) -> Tensor:
        """Return the mean coverage of each bin; NaN for a bin without defects."""
        normal = torch.cat(self.normal) if isinstance(self.normal, list) else self.normal
        values = torch.cat(self.values) if isinstance(self.values, list) else self.values
        sizes = torch.cat(self.sizes) if isinstance(self.sizes, list) else self.sizes
        threshold = normal.topk(max(1, round(self.fpr * len(normal)))).values[-1]
        weight = 1 / sizes.double()  # a defect of s pixels counts once, not s times
        bin_of = torch.bucketize(sizes, torch.tensor(self.bins, device=sizes.device))
        n = len(self.bins) + 1
        total = torch.bincount(bin_of, weight, minlength=n)
        hit = torch.bincount(bin_of, weight * (values > threshold), minlength=n)
        return (hit / total).float()


def irregular_defects(
    images: Tensor, area: tuple[float, float] = (2, 300), generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Paste one irregular blob of another brightness into each image: the training defects of the fine stage.

    Blobs are level sets of smooth noise, another family than the spots, lines and rectangles of `make_parts`.

    Args:
        images: whole parts (n, 1, h, w).
        area: smallest and largest blob in pixels.
        generator: a cpu generator.

    Returns:
        The damaged images and their masks (n, h, w) bool.

    >>> whole = make_parts(2, generator=torch.Generator().manual_seed(0)).images
    >>> damaged, masks = irregular_defects(whole, generator=torch.Generator().manual_seed(1))
    >>> bool(((damaged != whole)[:, 0] <= masks).all())
    True

    Paper: yang20253cad
    Chapter: anomaly/visual-anomalies
    """
    n, _, h, w = images.shape
    field = F.avg_pool2d(torch.randn(n, 1, h + 4, w + 4, generator=generator), 5, 1)[:, 0]
    r = torch.rand(n, 4, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.arange(h).float(), torch.arange(w).float(), indexing="ij")
    pixels = (math.log(area[0]) + (math.log(area[1]) - math.log(area[0])) * r[:, 0]).exp()
    distance = (x - w * r[:, 1]).square() + (y - h * r[:, 2]).square()
    height = (-distance * math.pi / pixels / 2).exp() + 0.8 * field
    height = height - 10 * (distance > 3 * pixels.clamp(min=2))  # stay near the centre
    order = height.flatten(1).sort(descending=True).values
    level = order.gather(1, (pixels.flatten().long() - 1).clamp(min=0)[:, None])
    masks = height >= level[:, :, None]
    change = (0.15 + 0.4 * (2 * r[:, 3] % 1)) * torch.where(r[:, 3] < 0.5, -1.0, 1.0)
    change, masks = change.to(images), masks.to(images.device)
    return (images + (change * masks)[:, None]).clamp(0, 1), masks


class SmallUNet(nn.Module):
    """Two levels down and up with skip connections: one logit per pixel.

    Args:
        in_channels: of the input.
        width: channels of the first level.
        seed: initialises the weights.

    >>> SmallUNet(2, 4, seed=0)(torch.zeros(1, 2, 16, 16)).shape
    torch.Size([1, 16, 16])

    Paper: yang20253cad
    Chapter: anomaly/visual-anomalies
    """

    def __init__(self, in_channels: int = 1, width: int = 8, seed: int | None = None):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            self.first = nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1), nn.LeakyReLU(0.1, inplace=True))
            self.second = nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.LeakyReLU(0.1, inplace=True))
            self.third = nn.Sequential(nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.LeakyReLU(0.1, inplace=True))
            self.up = nn.Sequential(nn.Conv2d(4 * width, width, 3, padding=1), nn.LeakyReLU(0.1, inplace=True))
            self.out = nn.Sequential(
                nn.Conv2d(2 * width, width, 3, padding=1),
                nn.LeakyReLU(0.1, inplace=True),
                nn.Conv2d(width, 1, 3, padding=1),
            )
        self.to(memory_format=torch.channels_last)  # a third less time on a processor

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, h, w)."""
        a = self.first(x)
        b = self.second(F.max_pool2d(a, 2))
        c = self.third(F.max_pool2d(b, 2))
        b = self.up(torch.cat([b, F.interpolate(c, b.shape[2:])], 1))
        return self.out(torch.cat([a, F.interpolate(b, a.shape[2:])], 1))[:, 0]


class CoarseToFine:
    """A fine segmenter over a coarse anomaly map, trained on pasted defects only.

    Args:
        coarse: a fitted detector; its `anomaly_map` is the guide.
        guide_scale: what the guide is multiplied with before the fine stage sees it; 0 leaves it out.
        steps: Adam steps.
        batch_size: crops per step.
        width: of the `SmallUNet`.
        random_state: seed for weights, pasted defects and batches.

    >>> from companion.anomaly.visual_anomalies.memory import PatchMemory
    >>> parts = make_parts(4, generator=torch.Generator().manual_seed(0)).images
    >>> coarse = PatchMemory(coreset=20, random_state=0).fit(parts)
    >>> CoarseToFine(coarse, steps=2, random_state=0).fit(parts).anomaly_map(parts).shape
    torch.Size([4, 64, 64])

    Paper: yang20253cad
    Chapter: anomaly/visual-anomalies
    """

    def __init__(
        self,
        coarse,
        guide_scale: float = 0.1,
        steps: int = 300,
        batch_size: int = 24,
        width: int = 8,
        random_state: int | None = None,
    ):
        self.coarse = coarse
        self.guide_scale = guide_scale
        self.steps = steps
        self.batch_size = batch_size
        self.width = width
        self.random_state = random_state

    @torch.enable_grad()
    def fit(self, images: Tensor, y=None) -> "CoarseToFine":
        """Train the fine stage on normal images with defects pasted into them."""
        images = images.detach()
        g = None if self.random_state is None else torch.Generator().manual_seed(self.random_state)
        damaged, masks = irregular_defects(images.repeat(2, 1, 1, 1), generator=g)
        if self.guide_scale != 0:
            normal_map = torch.as_tensor(self.coarse.anomaly_map(images))
            self.guide_mean_, self.guide_std_ = normal_map.mean(), normal_map.std().clamp(min=1e-9)
        x = self._input(damaged)
        sizes = masks.sum((1, 2), keepdim=True).clamp(min=1)
        weight = 1 + masks * 60 / sizes  # a small defect counts as much as a large one
        self.net_ = SmallUNet(x.shape[1], self.width, seed=int(torch.randint(2**31, (), generator=g))).to(x.device)
        optimizer = torch.optim.Adam(self.net_.parameters(), lr=1e-2, fused=has_fused(x.device))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=max(2, self.steps))
        half = x.shape[-1] // 2
        for _ in range(self.steps):
            rows = torch.randint(len(x), (self.batch_size,), generator=g)
            top, left = torch.randint(half + 1, (2,), generator=g).tolist()
            window = (slice(None), slice(top, top + half), slice(left, left + half))
            logits = self.net_(x[rows][:, :, top : top + half, left : left + half])
            loss = F.binary_cross_entropy_with_logits(logits, masks[rows][window].float(), weight[rows][window])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return self

    def _input(self, images: Tensor) -> Tensor:
        x = (images - 0.5) * 4
        if self.guide_scale == 0:
            return x
        guide = (torch.as_tensor(self.coarse.anomaly_map(images)) - self.guide_mean_) / self.guide_std_
        return torch.cat([x, self.guide_scale * guide[:, None]], 1)

    @torch.no_grad()
    def anomaly_map(self, images: Tensor) -> Tensor:
        """Return the fine map (n, h, w), higher = worse."""
        return torch.cat([self.net_(x) for x in self._input(images).split(32)])

    def score_samples(self, images: Tensor) -> Tensor:
        """Return minus the largest value of each map: higher = more normal."""
        return -self.anomaly_map(images).amax((1, 2))
