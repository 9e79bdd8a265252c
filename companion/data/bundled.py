"""The data sets that come with scikit-learn, as scaled tensors with a split.

Public: `Split`, `load_breast_cancer`, `load_diabetes`, `load_digits`, `load_iris`, `load_photos`, `load_wine`,
`photo_crops`.
"""

from typing import NamedTuple

import numpy as np
import torch
from sklearn import datasets
from torch import Tensor

from companion.checks import check_generator, check_in_range, check_positive_int
from companion.data.wrappers import stratified_split

__all__ = [
    "Split",
    "load_breast_cancer",
    "load_diabetes",
    "load_digits",
    "load_iris",
    "load_photos",
    "load_wine",
    "photo_crops",
]


class Split(NamedTuple):
    """A data set cut in two; unpacks as `x_train, y_train, x_test, y_test`."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def _split(
    x: np.ndarray, y: np.ndarray, test_fraction: float, standardize: bool, generator: torch.Generator | None
) -> Split:
    test_fraction = check_in_range(test_fraction, "test_fraction", 0, 1, "neither")
    features = torch.tensor(x, dtype=torch.float64)
    classes = y.dtype.kind in "iu"
    targets = torch.tensor(y, dtype=torch.int64 if classes else torch.float64)
    strata = targets if classes else torch.zeros(len(y), dtype=torch.int64)
    train, test = stratified_split(strata, (1 - test_fraction, test_fraction), generator)
    if standardize:  # by the training half's moments only
        mean, deviation = features[train].mean(0), features[train].std(0, correction=0)
        features = (features - mean) / deviation.where(deviation > 0, 1.0)
    features = features.to(torch.get_default_dtype())
    targets = targets if classes else targets.to(torch.get_default_dtype())
    return Split(features[train], targets[train], features[test], targets[test])


def load_digits(test_fraction: float = 0.5, generator: torch.Generator | None = None, images: bool = False) -> Split:
    """Return the 1797 handwritten digits of 8 x 8 pixels, in [0, 1], ten classes.

    Args:
        test_fraction: share of the test part; classes keep their shares.
        generator: for the split; None means torch's default one.
        images: x as (n, 1, 8, 8) instead of (n, 64).

    >>> x_train, y_train, x_test, y_test = load_digits(generator=torch.Generator().manual_seed(0))
    >>> tuple(x_train.shape), float(x_train.max())
    ((898, 64), 1.0)
    """
    x, y = datasets.load_digits(return_X_y=True)
    split = _split(x / 16, y, test_fraction, False, generator)
    if images:
        split = split._replace(x_train=split.x_train.view(-1, 1, 8, 8), x_test=split.x_test.view(-1, 1, 8, 8))
    return split


def load_wine(test_fraction: float = 0.5, generator: torch.Generator | None = None) -> Split:
    """Return 178 wines: 13 chemical measurements, standardised by the training part, three cultivars.

    Args:
        test_fraction: share of the test part; classes keep their shares.
        generator: for the split; None means torch's default one.

    >>> load_wine().x_train.shape[1]
    13
    """
    return _split(*datasets.load_wine(return_X_y=True), test_fraction, True, generator)


def load_breast_cancer(test_fraction: float = 0.5, generator: torch.Generator | None = None) -> Split:
    """Return 569 tumours: 30 measurements, standardised by the training part; 0 malignant, 1 benign.

    Args:
        test_fraction: share of the test part; classes keep their shares.
        generator: for the split; None means torch's default one.

    >>> load_breast_cancer().x_train.shape[1]
    30
    """
    return _split(*datasets.load_breast_cancer(return_X_y=True), test_fraction, True, generator)


def load_iris(test_fraction: float = 0.5, generator: torch.Generator | None = None) -> Split:
    """Return 150 irises: 4 measurements, standardised by the training part, three species.

    Args:
        test_fraction: share of the test part; classes keep their shares.
        generator: for the split; None means torch's default one.

    >>> load_iris().x_train.shape[1]
    4
    """
    return _split(*datasets.load_iris(return_X_y=True), test_fraction, True, generator)


def load_diabetes(test_fraction: float = 0.5, generator: torch.Generator | None = None) -> Split:
    """Return 442 patients: 10 measurements, standardised by the training part; the target is a real number.

    Args:
        test_fraction: share of the test part.
        generator: for the split; None means torch's default one.

    >>> load_diabetes().y_train.is_floating_point()
    True
    """
    return _split(*datasets.load_diabetes(return_X_y=True), test_fraction, True, generator)


def load_photos() -> Tensor:
    """Return the two photographs that come with scikit-learn, a temple and a flower: (2, 3, 427, 640) in [0, 1].

    Raises:
        ImportError: Pillow is missing.

    >>> load_photos().shape
    torch.Size([2, 3, 427, 640])
    """
    photos = np.stack(datasets.load_sample_images().images)  # (2, 427, 640, 3)
    return torch.from_numpy(photos).movedim(3, 1).to(torch.get_default_dtype()) / 255


def photo_crops(n: int, size: int = 32, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Cut n random squares out of the two photographs.

    Args:
        n: crops.
        size: their side in pixels, at most 427.
        generator: a cpu generator; None means torch's default one.

    Returns:
        (crops (n, 3, size, size) in [0, 1], photo (n,) 0 or 1).

    Raises:
        ValueError: n or size is out of range.

    >>> photo_crops(4, 16)[0].shape
    torch.Size([4, 3, 16, 16])
    """
    photos = load_photos()
    height, width = photos.shape[2:]
    n, size, generator = check_positive_int(n, "n"), check_positive_int(size, "size"), check_generator(generator)
    if size > height:
        raise ValueError(f"expected a size of at most {height}, the height of the photographs, got {size}")
    photo = torch.randint(2, (n,), generator=generator)
    top = torch.randint(height - size + 1, (n,), generator=generator)
    left = torch.randint(width - size + 1, (n,), generator=generator)
    rows = (top[:, None] + torch.arange(size))[:, :, None]  # (n, size, 1)
    columns = (left[:, None] + torch.arange(size))[:, None, :]  # (n, 1, size)
    crops = photos[photo[:, None, None], :, rows, columns]  # (n, size, size, 3)
    return crops.movedim(3, 1).contiguous(), photo
