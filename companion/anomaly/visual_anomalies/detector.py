"""What every image detector here shares: fit on normal images, map, score, and a threshold set on normal images.

Public: `ImageDetector`, `upsample_map`.
"""

from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from torch.nn import functional as F

from companion.anomaly.visual_anomalies.backbone import check_images, local_patch_features
from companion.checks import as_tensor, check_in_range
from companion.runtime import device as pick_device

__all__ = ["ImageDetector", "upsample_map"]


def upsample_map(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a patch map (n, rows, columns) at the size of the images, bilinearly.

    >>> upsample_map(torch.ones(1, 2, 2), (4, 4)).shape
    torch.Size([1, 4, 4])

    Chapter: anomaly/visual-anomalies
    """
    return F.interpolate(grid[:, None], size, mode="bilinear", align_corners=False)[:, 0]


class ImageDetector(BaseEstimator):
    r"""A detector that learns from normal images only and points at what is new.

    A child sets `backbone`, `patch`, `device`, `random_state` and `batch_size` in `__init__` and implements
    `_fit(images)` and `_map(images)`; those built on patch vectors implement `_fit_patches` and `_score_patches`
    instead. Images are (n, c, h, w) in [0, 1], arrays or tensors; results come back as what went in: tensors for
    tensors, arrays otherwise.

    Signs: `anomaly_map` higher = worse; `score_samples` higher = more normal, $-\max_{ij} m_{ij}$.

    >>> class Brightness(ImageDetector):
    ...     def __init__(self, batch_size=64, device="cpu"):
    ...         self.batch_size, self.device = batch_size, device
    ...     def _fit(self, images):
    ...         self.usual_ = images.mean()
    ...     def _map(self, images):
    ...         return (images.mean(1) - self.usual_).abs()
    >>> Brightness().fit(torch.zeros(2, 1, 4, 4)).score_samples(torch.ones(1, 1, 4, 4))
    tensor([-1.])

    Chapter: anomaly/visual-anomalies
    """

    @torch.enable_grad()
    def fit(self, images: Any, y: Any = None) -> "ImageDetector":
        """Learn what normal looks like.

        Args:
            images: normal images (n, c, h, w) in [0, 1].
            y: ignored; there are no labels.

        Returns:
            The detector itself.

        Raises:
            ValueError: not images, or fewer than two.
        """
        tensor = check_images(images, min_samples=2).detach().float().to(pick_device(self.device))
        self.__dict__.pop("offset_", None)
        self.image_shape_ = tuple(tensor.shape[1:])
        self._fit(tensor)
        return self

    def anomaly_map(self, images: Any) -> Any:
        """Return how odd each pixel is, (n, h, w): higher = worse."""
        tensor = self._checked(images)
        return self._like(torch.cat([self._map(batch) for batch in tensor.split(self.batch_size)]), images)

    def score_samples(self, images: Any) -> Any:
        """Return how normal each image is, (n,): minus the largest value of its anomaly map."""
        tensor = self._checked(images)
        return self._like(torch.cat([-self._map(b).amax((1, 2)) for b in tensor.split(self.batch_size)]), images)

    @torch.enable_grad()
    def fit_patches(self, grid: Any) -> "ImageDetector":
        """Learn from patch vectors computed before, so that many detectors can share one pass of the backbone.

        Args:
            grid: (n, rows, columns, channels) of normal images, as `local_patch_features` gives them.

        Returns:
            The detector itself; score with `score_patches`.

        Raises:
            ValueError: not such a grid, or a detector that reads images.
        """
        grid = self._checked_grid(grid).detach()
        self.__dict__.pop("offset_", None)
        self.__dict__.pop("image_shape_", None)
        self.patch_shape_ = tuple(grid.shape[1:])
        self._fit_patches(grid)
        return self

    def score_patches(self, grid: Any) -> Any:
        """Return how odd each patch vector is, (n, rows, columns): higher = worse."""
        checked = self._checked_grid(grid)
        if not (hasattr(self, "patch_shape_") or hasattr(self, "image_shape_")):
            check_is_fitted(self, "patch_shape_")
        return self._like(torch.cat([self._score_patches(b) for b in checked.split(self.batch_size)]), grid)

    def _checked_grid(self, grid: Any) -> Tensor:
        if type(self)._fit_patches is ImageDetector._fit_patches:
            raise ValueError(f"expected a detector built on patch vectors, {type(self).__name__} reads images")
        tensor = as_tensor(grid, "grid")
        if tensor.ndim != 4 or not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise ValueError(
                f"expected finite patches of shape (n, rows, columns, channels), got {tuple(tensor.shape)}"
            )
        return tensor.to(pick_device(self.device))

    def set_threshold(self, images: Any, false_alarms: float = 0.05) -> "ImageDetector":
        """Set the threshold so that this share of held-out NORMAL images raises an alarm.

        Args:
            images: normal images that were not used in `fit`.
            false_alarms: the share of them that may fall below the threshold.

        Returns:
            The detector itself, with `offset_` set.
        """
        check_in_range(false_alarms, "false_alarms", 0.0, 1.0)
        scores = torch.as_tensor(self.score_samples(images))
        self.offset_ = float(torch.quantile(scores.double(), false_alarms))
        return self

    def predict(self, images: Any) -> np.ndarray:
        """Return 1 for images that look normal and -1 for the others; `set_threshold` comes first."""
        check_is_fitted(self, "offset_")
        scores = torch.as_tensor(self.score_samples(images)).cpu().numpy()
        return np.where(scores >= self.offset_, 1, -1)

    def _checked(self, images: Any) -> Tensor:
        check_is_fitted(self, "image_shape_")
        tensor = check_images(images)
        if tensor.shape[1] != self.image_shape_[0]:
            raise ValueError(f"expected images with {self.image_shape_[0]} channels as in fit, got {tensor.shape[1]}")
        return tensor.float().to(pick_device(self.device))

    @staticmethod
    def _like(result: Tensor, images: Any) -> Any:
        return result.to(images.device) if isinstance(images, Tensor) else result.cpu().numpy()

    def _generator(self) -> torch.Generator | None:
        """Return the stream of `random_state`, or None for torch's default generator."""
        if self.random_state is None or isinstance(self.random_state, torch.Generator):
            return self.random_state
        return torch.Generator().manual_seed(int(self.random_state))

    def _patches(self, images: Tensor) -> Tensor:
        return local_patch_features(images, self.backbone, self.patch, self.batch_size)

    def _fit(self, images: Tensor) -> None:
        self._fit_patches(self._patches(images))

    def _map(self, images: Tensor) -> Tensor:
        return upsample_map(self._score_patches(self._patches(images)), images.shape[2:])

    def _fit_patches(self, grid: Tensor) -> None:
        raise NotImplementedError(f"{type(self).__name__} implements neither _fit nor _fit_patches")

    def _score_patches(self, grid: Tensor) -> Tensor:
        raise NotImplementedError
