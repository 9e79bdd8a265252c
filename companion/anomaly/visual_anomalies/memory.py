"""The two baselines every learned detector has to beat: a memory of normal patches, and one Gaussian over them.

Public: `k_center`, `PatchMemory`, `PatchGaussian`.
"""

from typing import Any

import torch
from torch import Tensor

from companion.anomaly.visual_anomalies.detector import ImageDetector
from companion.checks import check_features, check_positive_int
from companion.neighbors import knn
from companion.statistics import ledoit_wolf

__all__ = ["PatchGaussian", "PatchMemory", "k_center"]


def k_center(x: Any, n: int, *, start: int | None = None) -> Tensor:
    r"""Return the indices of n rows that cover all rows: farthest-point selection.

    Each step takes $\arg\max_i \min_{j \in S} \lVert x_i - x_j \rVert$. The radius that is left is at most twice the
    best possible one. Per step one matrix-vector product on cached norms, so memory stays at two vectors of length N.

    Args:
        x: rows (N, d).
        n: how many to choose, at most N.
        start: the first row; None takes the one farthest from the mean.

    Returns:
        n different indices in the order they were chosen, int64.

    Raises:
        ValueError: n larger than the number of rows, or a start outside them.

    >>> k_center([[0.0], [1.0], [5.0], [6.0]], 2).tolist()
    [0, 3]

    Chapter: anomaly/visual-anomalies
    """
    x = check_features(x)
    check_positive_int(n, "n")
    if n > len(x):
        raise ValueError(f"expected n of at most {len(x)} rows, got {n}")
    if start is not None and not 0 <= start < len(x):
        raise ValueError(f"expected start among the {len(x)} rows, got {start}")
    x = x - x.mean(0)
    half = x.square().sum(1).div_(2)
    chosen = half.argmax() if start is None else torch.tensor(start, device=x.device)
    nearest = torch.full_like(half, torch.inf)
    distance = torch.empty_like(half)
    indices = torch.empty(n, dtype=torch.int64, device=x.device)
    for step in range(n):
        indices[step] = chosen
        # half the squared distance: |x|^2 / 2 - x.c + |c|^2 / 2
        torch.addmv(half, x, x[chosen], alpha=-1, out=distance)
        torch.minimum(nearest, distance.add_(half[chosen]), out=nearest)
        nearest[chosen] = -torch.inf  # never again, also among duplicates
        chosen = nearest.argmax()
    return indices


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
