"""The two baselines every learned detector has to beat: a memory of normal patches, and one Gaussian over them.

Public: `k_center`, `PatchMemory`, `PatchGaussian`.
"""

from typing import Any

import torch
from torch import Tensor

from companion._products import packed, product
from companion.anomaly.visual_anomalies.detector import ImageDetector
from companion.checks import check_features, check_positive_int
from companion.neighbors import knn
from companion.statistics import ledoit_wolf

__all__ = ["PatchGaussian", "PatchMemory", "k_center"]

_CANDIDATES = 1024  # rows among which k_center takes its steps: few enough to stay in the cache
_STRIDE = 16  # steps between looks at how far they have come, which on a graphics card are waits
_BLOCK = 4096  # rows per product on a processor


def k_center(x: Any, n: int, *, start: int | None = None) -> Tensor:
    r"""Return the indices of n rows that cover all rows: farthest-point selection.

    Each step takes $\arg\max_i \min_{j \in S} \lVert x_i - x_j \rVert$. The radius that is left is at most twice the
    best possible one.

    Most steps are taken among the thousand rows that are farthest from what was chosen so far. The distance of a row
    to the chosen ones never grows, so as long as the farthest of the thousand is farther than all the others were at
    the beginning, it is the farthest of all: the rows are those of the plain algorithm, in its order. Then one matrix
    product brings all distances up to date. Of equally far rows the first is taken; what differs by no more than
    rounding may go either way. Memory: one centred copy of x.

    Args:
        x: rows (N, d).
        n: how many to choose, at most N.
        start: the first row; None takes the one farthest from the mean.

    Returns:
        n different indices in the order they were chosen, int64.

    Raises:
        ValueError: n larger than the number of rows, a start outside them, or squares that overflow.

    >>> k_center([[0.0], [1.0], [5.0], [6.0]], 2).tolist()
    [0, 3]

    Chapter: anomaly/visual-anomalies
    """
    x = check_features(x).detach()
    check_positive_int(n, "n")
    if n > len(x):
        raise ValueError(f"expected n of at most {len(x)} rows, got {n}")
    if start is not None and not 0 <= start < len(x):
        raise ValueError(f"expected start among the {len(x)} rows, got {start}")
    rows = _CentredRows(x)
    chosen = rows.half.argmax(0, keepdim=True) if start is None else torch.tensor([start], device=x.device)
    nearest = rows.nearest(torch.full_like(rows.half, torch.inf), chosen)
    while len(chosen) < n:
        candidates, level, last = _farthest(nearest, min(_CANDIDATES, len(x) - len(chosen)))
        found, distances = _farthest_points(*rows[candidates], nearest[candidates], n - len(chosen), level)
        found = candidates[found]
        # farther than all that are no candidates; of those just as far all have higher indices than the last
        sure = (distances > level) | ((distances == level) & (found <= last))
        found = found[sure.cumprod(0).bool()]
        chosen, nearest = torch.cat([chosen, found]), rows.nearest(nearest, found)
    return chosen


class _CentredRows:
    """Rows around their mean, so that products of them keep their digits, and half the squares of their lengths."""

    def __init__(self, x: Tensor):
        self.x, self.dtype = x, torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        self.mean = x.mean(0, dtype=self.dtype)
        self.blocks, self.half = [], torch.empty(len(x), dtype=self.dtype, device=x.device)  # (N,)
        size = _BLOCK if x.device.type == "cpu" else 16 * _BLOCK
        for block, half in zip(x.split(size), self.half.split(size)):
            centred = block - self.mean
            torch.sum(centred.square(), 1, out=half)
            self.blocks.append(packed(centred))
        self.half.div_(2)
        if not bool(self.half.max() < torch.finfo(self.dtype).max / 4):
            raise ValueError("expected rows whose squared distances do not overflow")

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.x[indices].to(self.dtype) - self.mean, self.half[indices]

    def nearest(self, nearest: Tensor, chosen: Tensor) -> Tensor:
        """Return half the squared distance of each row to the nearest chosen one, once more were chosen."""
        centres, half = self[chosen]
        # |x - c|^2 / 2 = |x|^2 / 2 + (|c|^2 / 2 - x.c)
        to_centres = torch.cat([product(block, -centres, half).amin(1) for block in self.blocks])
        return torch.minimum(nearest, to_centres.add_(self.half).clamp_min_(0)).index_fill_(0, chosen, -torch.inf)


def _farthest(nearest: Tensor, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the m farthest rows in ascending order, the least of their distances, and the last row that has it."""
    level = nearest.topk(m).values[-1]
    above, tied = (nearest > level).nonzero().squeeze(1), (nearest == level).nonzero().squeeze(1)
    tied = tied[: m - len(above)]
    return torch.cat([above, tied]).sort().values, level, tied[-1]


def _farthest_points(rows: Tensor, half: Tensor, nearest: Tensor, n: int, level: Tensor) -> tuple[Tensor, Tensor]:
    """Return up to n rows by plain farthest-point selection, and how far each was, until that falls below a level."""
    order, distances, distance = [], [], torch.empty_like(half)
    for step in range(min(n, len(rows))):
        chosen = nearest.argmax(0, keepdim=True)
        order.append(chosen)
        distances.append(nearest.index_select(0, chosen))
        if step % _STRIDE == 0 and bool(distances[-1] < level):
            break
        torch.addmv(half, rows, rows.index_select(0, chosen)[0], alpha=-1, out=distance)
        torch.minimum(nearest, distance.add_(half.index_select(0, chosen)).clamp_min_(0), out=nearest)
        nearest.index_fill_(0, chosen, -torch.inf)  # never again, also among duplicates
    return torch.cat(order), torch.cat(distances)


class PatchMemory(ImageDetector):
    """Nearest-neighbour distance of each patch to a memory of normal patches.

    The memory is a k-center coreset, so that rare normal patches are kept while repeats are dropped.

    Args:
        backbone: images to a list of maps; None is the shipped network.
        patch: side of the averaged neighbourhood.
        coreset: how many patches the memory keeps; a share of them if below 1.
        n_neighbors: the score is the mean distance to this many.
        max_candidates: patches drawn at random before the coreset is chosen, which bounds the time.
        batch_size: images per pass.
        device: "auto", or a torch device.
        random_state: seed for the draw of the candidates; None uses torch's default generator.

    >>> g = torch.Generator().manual_seed(0)
    >>> normal = torch.rand(4, 1, 32, 32, generator=g) * 0.1
    >>> odd = normal.clone(); odd[:, :, 12:20, 12:20] = 1
    >>> memory = PatchMemory(coreset=50, random_state=0).fit(normal)
    >>> bool((memory.score_samples(odd) < memory.score_samples(normal)).all())
    True

    Chapter: anomaly/visual-anomalies
    """

    def __init__(
        self,
        backbone=None,
        patch: int = 3,
        coreset: int | float = 0.1,
        n_neighbors: int = 1,
        max_candidates: int = 20_000,
        batch_size: int = 64,
        device: str = "auto",
        random_state: int | None = None,
    ):
        self.backbone = backbone
        self.patch = patch
        self.coreset = coreset
        self.n_neighbors = n_neighbors
        self.max_candidates = max_candidates
        self.batch_size = batch_size
        self.device = device
        self.random_state = random_state

    def _fit_patches(self, grid: Tensor) -> None:
        patches = grid.flatten(0, 2)
        if len(patches) > self.max_candidates:
            rows = torch.randperm(len(patches), generator=self._generator())[: self.max_candidates]
            patches = patches[rows.to(patches.device)]
        if not self.coreset > 0:
            raise ValueError(f"expected a positive coreset, got {self.coreset}")
        size = int(self.coreset if self.coreset >= 1 else self.coreset * len(patches))
        self.memory_ = patches[k_center(patches, min(max(size, 1), len(patches)))]
        if self.n_neighbors > len(self.memory_):
            raise ValueError(f"expected n_neighbors of at most {len(self.memory_)} patches, got {self.n_neighbors}")

    def _score_patches(self, grid: Tensor) -> Tensor:
        distances, _ = knn(grid.flatten(0, 2), self.memory_, k=self.n_neighbors)
        return distances.mean(1).view(grid.shape[:3])


class PatchGaussian(ImageDetector):
    r"""Mahalanobis distance of each patch to one Gaussian over all normal patches.

    $m = \sqrt{(x - \mu)^\top \Sigma^{-1} (x - \mu)}$ with a Ledoit-Wolf covariance, so that few patches are enough.

    Args:
        backbone: images to a list of maps; None is the shipped network.
        patch: side of the averaged neighbourhood.
        batch_size: images per pass.
        device: "auto", or a torch device.
        random_state: unused; every detector has it.

    >>> normal = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    >>> PatchGaussian().fit(normal).anomaly_map(normal).shape
    torch.Size([4, 32, 32])

    Chapter: anomaly/visual-anomalies
    """

    def __init__(self, backbone=None, patch: int = 3, batch_size: int = 64, device: str = "auto", random_state=None):
        self.backbone = backbone
        self.patch = patch
        self.batch_size = batch_size
        self.device = device
        self.random_state = random_state

    def _fit_patches(self, grid: Tensor) -> None:
        patches = grid.flatten(0, 2).double()
        self.mean_ = patches.mean(0)
        covariance, self.shrinkage_ = ledoit_wolf(patches)
        # channels that never move would make the matrix singular
        floor = 1e-6 * covariance.diagonal().mean().clamp(min=1e-12)
        self.cholesky_ = torch.linalg.cholesky(covariance + floor * torch.eye(len(covariance)).to(covariance))

    def _score_patches(self, grid: Tensor) -> Tensor:
        centred = grid.flatten(0, 2).double() - self.mean_
        whitened = torch.linalg.solve_triangular(self.cholesky_, centred.T, upper=False)
        return whitened.square().sum(0).sqrt().to(grid.dtype).view(grid.shape[:3])
