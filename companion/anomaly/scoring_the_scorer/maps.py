"""What a map of anomaly scores is worth: recall per image at a tiny false-positive rate, and per region at a large one.

Public: `AUPIMO`, `pimo_curves` and what it returns, `PimoCurves`; `aupro`.

Everything is counted, nothing is put on a grid of thresholds: a pixel of a defect is found at the false-positive rate
F if no more than the share F of all normal pixels scores at least as high. That one number per defective pixel, its
`level`, gives every area in closed form.
"""

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from companion.checks import as_tensor, check_in_range, check_positive_int

__all__ = ["AUPIMO", "PimoCurves", "aupro", "pimo_curves"]

_GROUPS = 64  # values per group: the k largest of all lie in the k groups with the largest maxima


class PimoCurves(NamedTuple):
    """Recall of each defective image (n, m) at shared false-positive rates (m,), rising."""

    fpr: Tensor
    recall: Tensor


def _check_maps(maps: Any, masks: Any) -> tuple[Tensor, Tensor]:
    """Return maps and boolean masks, both (n, h, w)."""
    maps = as_tensor(maps, "maps").detach()
    masks = as_tensor(masks, "masks", maps.device)
    if not maps.is_floating_point():
        maps = maps.float()
    if maps.dtype in (torch.float16, torch.bfloat16):
        maps = maps.float()
    maps, masks = (t[:, 0] if t.dim() == 4 and t.shape[1] == 1 else t for t in (maps, masks))
    if maps.dim() != 3 or maps.numel() == 0 or maps.shape != masks.shape:
        raise ValueError(
            f"expected maps and masks of one shape (n, h, w) or (n, 1, h, w), got {tuple(maps.shape)} and "
            f"{tuple(masks.shape)}"
        )
    if bool(maps.sum().isnan()) and bool(maps.isnan().any()):  # infinities may cancel to NaN in the sum
        raise ValueError(f"expected maps without NaN, got {int(maps.isnan().sum())} of {maps.numel()} pixels")
    if masks.dtype != torch.bool:
        if not bool(((masks == 0) | (masks == 1)).all()):
            low, high = masks.min().item(), masks.max().item()
            raise ValueError(f"expected masks of 0 and 1 (or booleans), got values from {low} to {high}")
        masks = masks == 1
    return maps, masks


def _check_bounds(fpr_bounds: Any) -> tuple[float, float]:
    low, high = (check_in_range(bound, "fpr_bounds", 0, 1, inclusive="high") for bound in fpr_bounds)
    if low >= high:
        raise ValueError(f"expected fpr_bounds (low, high) with low < high, got {(low, high)}")
    return low, high


def _largest(values: Tensor, k: int) -> Tensor:
    """Return the k largest values, in any order; all of them if there are no more."""
    values = values.flatten()
    if k >= len(values):
        return values
    groups = len(values) // _GROUPS
    if groups <= 4 * k:
        return values.topk(k, sorted=False).values
    grouped = values[: groups * _GROUPS].view(_GROUPS, groups)  # strided groups: their maxima run at memory speed
    chosen = grouped.amax(0).topk(k, sorted=False).indices
    return torch.cat([grouped[:, chosen].flatten(), values[groups * _GROUPS :]]).topk(k, sorted=False).values


def _inside(maps: Tensor, masks: Tensor) -> Tensor:
    """Return the pixels of the masks, image by image."""
    if maps.device.type == "cpu":  # NumPy selects ten times faster than torch
        return torch.from_numpy(maps.numpy()[masks.numpy()])
    return maps[masks]


def _areas(masks: Tensor) -> Tensor:
    """Return how many pixels each mask has, (n,)."""
    flat = masks.flatten(1)
    if masks.device.type == "cpu":
        return torch.from_numpy(np.count_nonzero(flat.numpy(), axis=1))
    return flat.count_nonzero(1)


def _levels(scores: Tensor, normal: Tensor, n_normal: int) -> Tensor:
    """Return the share of normal pixels that score at least as high; `normal` holds the highest ones, ascending."""
    alarms = len(normal) - torch.searchsorted(normal, scores)
    return alarms.to(_wide(scores)) / n_normal


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def _one_size(sizes: Tensor) -> Tensor:
    """Merge image sizes (parts, 2): all that are known must agree."""
    known = sizes[sizes.any(1)]
    if len(known) and bool((known != known[0]).any()):
        raise ValueError(f"expected maps of one size, got {known.unique(dim=0).tolist()}")
    return sizes.amax(0)


class AUPIMO(Metric):
    r"""Area under the per-image recall curve over a small range of false-positive rates: one number per image.

    Normal images alone say what a threshold costs: $F(t)$ is the share of their pixels that score at least $t$. Let
    $R_i(F)$ be the largest recall on the defect of image $i$ that costs no more than $F$. Then

    $$\mathrm{AUPIMO}_i = \frac{1}{\log(U/L)} \int_{\log L}^{\log U} R_i(F)\, d\log F
    = \frac{1}{|D_i|} \sum_{p \in D_i} \frac{\log U - \log \tilde F(s_p)}{\log(U/L)},$$

    with $\tilde F$ clipped to $[L, U]$ and the sum over the pixels $p$ of the defect. The right side is what is
    computed: exact, without thresholds, unchanged by any strictly increasing map of the scores. A defective pixel
    that ties with a normal one costs that false alarm.

    Only the highest scores of normal pixels are kept, so that the memory of a stream stays bounded; batches,
    `merge_state` and processes give the answer of one pass. Images are those whose mask is empty (normal) or not.

    Args:
        fpr_bounds: (L, U), the false-positive rates between which to integrate.
        max_pixels: how many normal pixels the stream may have at most; U times as many scores are kept.
        **kwargs: for `torchmetrics.Metric`.

    Raises:
        ValueError: maps and masks that do not fit, maps of another size than before, NaN; more normal pixels than
            `max_pixels`; `compute` without images of both kinds, or with fewer than 1/U normal pixels.

    >>> metric = AUPIMO(fpr_bounds=(0.01, 0.1))
    >>> maps = torch.arange(300.0).view(3, 10, 10)
    >>> masks = torch.zeros(3, 10, 10, dtype=torch.bool)
    >>> masks[2, 5:] = True
    >>> metric.update(maps, masks)
    >>> metric.compute()
    tensor([   nan,    nan, 1.0000], dtype=torch.float64)

    Paper: bertoldo2024aupimo
    Chapter: anomaly/scoring-the-scorer
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    normal: list[Tensor]
    defect: list[Tensor]
    sizes: list[Tensor]
    n_normal: Tensor
    image_size: Tensor

    def __init__(self, fpr_bounds: tuple[float, float] = (1e-5, 1e-4), max_pixels: int = 2**27, **kwargs: Any):
        super().__init__(**kwargs)
        self.fpr_bounds = _check_bounds(fpr_bounds)
        self.max_pixels = check_positive_int(max_pixels, "max_pixels")
        self.kept = math.floor(self.fpr_bounds[1] * self.max_pixels) + 1
        self.add_state("normal", [], dist_reduce_fx="cat")
        self.add_state("defect", [], dist_reduce_fx="cat")
        self.add_state("sizes", [], dist_reduce_fx="cat")
        self.add_state("n_normal", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("image_size", torch.zeros(2, dtype=torch.int64), dist_reduce_fx=_one_size)

    def update(self, maps: Any, masks: Any) -> None:
        """Take in anomaly maps (n, h, w), higher = worse, and masks of their defects, in batches of any kind."""
        maps, masks = _check_maps(maps, masks)
        size = torch.tensor(maps.shape[1:], device=self.image_size.device)
        if bool(self.image_size.any()) and not torch.equal(self.image_size, size):
            raise ValueError(f"expected maps of size {self.image_size.tolist()} as before, got {size.tolist()}")
        self.image_size = size
        areas = _areas(masks)
        good = maps.index_select(0, (areas == 0).nonzero().squeeze(1))
        if self.n_normal + good.numel() > self.max_pixels:
            raise ValueError(
                f"expected at most max_pixels={self.max_pixels} normal pixels, got {int(self.n_normal) + good.numel()}"
            )
        self.sizes.append(areas)
        self.defect.append(_inside(maps, masks))
        if good.numel():
            self.n_normal = self.n_normal + good.numel()
            self.normal.append(_largest(good, self.kept))
            if sum(len(part) for part in self.normal) > 2 * self.kept:
                self.normal = [_largest(torch.cat(list(self.normal)), self.kept)]

    def compute(self) -> Tensor:
        """Return one number per image in the order they came, float64, NaN for normal images.

        After `merge_state` the images of the other metric come first.
        """
        low, high = self.fpr_bounds
        n, sizes = self._seen()
        top = _largest(dim_zero_cat(self.normal), math.floor(high * n) + 1).sort().values
        level = _levels(dim_zero_cat(self.defect), top, n).clamp(low, high)
        share = (math.log(high) - level.log()) / math.log(high / low)
        image = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
        total = torch.zeros(len(sizes), dtype=share.dtype, device=share.device).index_add_(0, image, share)
        return total / sizes  # 0 / 0 where there is no defect

    def _seen(self) -> tuple[int, Tensor]:
        """Return the number of normal pixels and the area of every defect; complain where that is not enough."""
        low, high = self.fpr_bounds
        n = int(self.n_normal)
        sizes = dim_zero_cat(self.sizes) if len(self.sizes) else torch.zeros(1, dtype=torch.int64)
        if n == 0 or not bool(sizes.any()):
            kinds = f"{int((sizes > 0).sum())} with a defect and {'some' if n else 'none'} without"
            raise ValueError(f"expected images with and without a defect before compute(), got {kinds}")
        if n > self.max_pixels:
            raise ValueError(f"expected at most max_pixels={self.max_pixels} normal pixels, got {n}")
        if n * high < 1:
            raise ValueError(f"expected at least {math.ceil(1 / high)} normal pixels for U = {high:g}, got {n}")
        if n * low < 1:
            warnings.warn(
                f"{n} normal pixels cannot tell false-positive rates below {1 / n:.1e}: L = {low:g} is out of reach",
                stacklevel=3,
            )
        return n, sizes


def pimo_curves(maps: Any, masks: Any, fpr: Any = None) -> PimoCurves:
    r"""Return the recall of each defective image at shared false-positive rates.

    $R_i(F)$ is the share of the defect's pixels that can be found while at most the share $F$ of all pixels of normal
    images raises an alarm.

    Args:
        maps: anomaly maps, (n, h, w), higher = worse.
        masks: true where the defect is; empty for a normal image.
        fpr: rates in (0, 1], rising; None: 121 of them from 1e-6 to 1.

    Returns:
        `PimoCurves(fpr, recall)`, one row per image that has a defect.

    Raises:
        ValueError: shapes that do not fit, NaN, no normal image, no defect.

    >>> maps = torch.tensor([[[0.0, 1.0, 2.0, 3.0]], [[0.0, 0.0, 2.5, 9.0]]])
    >>> masks = torch.tensor([[[0, 0, 0, 0]], [[0, 0, 1, 1]]])
    >>> pimo_curves(maps, masks, fpr=[0.1, 0.25]).recall
    tensor([[0.5000, 1.0000]], dtype=torch.float64)

    Paper: bertoldo2024aupimo
    Chapter: anomaly/scoring-the-scorer
    """
    maps, masks = _check_maps(maps, masks)
    bad = masks.flatten(1).any(1)
    if not bool(bad.any()) or bool(bad.all()):
        raise ValueError(f"expected images with and without a defect, got {int(bad.sum())} of {len(bad)} with one")
    wide = _wide(maps)
    fpr = torch.logspace(-6, 0, 121, dtype=wide) if fpr is None else as_tensor(fpr, "fpr").to(wide)
    fpr = fpr.to(maps.device)
    normal = maps[~bad].flatten()
    top = _largest(normal, math.floor(float(fpr.max()) * len(normal)) + 1).sort().values
    rows = [
        torch.searchsorted(_levels(m[d], top, len(normal)).sort().values, fpr, right=True).to(wide) / d.sum()
        for m, d in zip(maps[bad], masks[bad])
    ]
    return PimoCurves(fpr, torch.stack(rows))


def aupro(maps: Any, masks: Any, max_fpr: float = 0.3, *, connectivity: int = 8) -> Tensor:
    r"""Return the area under the per-region overlap, up to a false-positive rate, as a share of the largest possible.

    A region is a connected part of a mask. Its overlap at a threshold is the share of its pixels that score at least
    as much; PRO is the mean overlap over all regions, and the false-positive rate counts every pixel outside of a
    mask, on images with and without defects. With $r(p)$ the region of pixel $p$ and $m$ the largest rate,

    $$\mathrm{AUPRO} = \frac1m \int_0^m \mathrm{PRO}(F)\, dF
    = \frac{1}{n_\mathrm{regions}} \sum_p \frac{1}{|r(p)|} \Bigl(1 - \frac{F(s_p)}{m}\Bigr)_+,$$

    where ties between pixels inside and outside of masks draw a straight line, as in a ROC curve. Exact.

    Args:
        maps: anomaly maps, (n, h, w), higher = worse.
        masks: true where the defect is.
        max_fpr: m, in (0, 1].
        connectivity: 8 (pixels that touch at a corner belong together) or 4.

    Returns:
        A scalar in [0, 1] on the device of the maps.

    Raises:
        ValueError: shapes that do not fit, NaN, no defect or nothing but defects, another connectivity.

    >>> maps = torch.tensor([[[0.0, 1.0, 9.0, 0.0, 3.0, 2.0]]])
    >>> masks = torch.tensor([[[0, 0, 1, 0, 1, 0]]])
    >>> aupro(maps, masks)
    tensor(1., dtype=torch.float64)

    Paper: bertoldo2024aupimo
    Chapter: anomaly/scoring-the-scorer
    """
    maps, masks = _check_maps(maps, masks)
    m = check_in_range(max_fpr, "max_fpr", 0, 1, inclusive="high")
    if connectivity not in (4, 8):
        raise ValueError(f"expected connectivity 4 or 8, got {connectivity!r}")
    if not bool(masks.any()) or bool(masks.all()):
        raise ValueError("expected pixels inside and outside of masks, got one kind only")
    structure = np.zeros((3, 3, 3), dtype=bool)  # nothing above and below: images do not touch each other
    structure[1] = ndimage.generate_binary_structure(2, 2 if connectivity == 8 else 1)
    labels, n_regions = ndimage.label(masks.cpu().numpy(), structure)
    region = torch.from_numpy(labels).to(maps.device)[masks].long()  # (pixels in masks,), from 1
    weight = 1 / (torch.bincount(region)[region].to(_wide(maps)) * n_regions)
    normal = _inside(maps, ~masks)
    normal = torch.from_numpy(np.sort(normal.numpy())) if normal.device.type == "cpu" else normal.sort().values
    inside = _inside(maps, masks)
    above = (len(normal) - torch.searchsorted(normal, inside, right=r) for r in (True, False))
    before, after = (count.to(weight.dtype) / len(normal) for count in above)
    whole = m - (before + after) / 2
    cut = (m - before).clamp_min(0).square() / (2 * (after - before).clamp_min(1 / (2 * len(normal))))
    return (weight * torch.where(after <= m, whole, cut)).sum() / m
