"""Handwritten digits as images, and on coloured backgrounds that give their class away in training only.

Public: `PALETTE`, `ColorDigits`, `color_digits`, `load_digits_images`, `make_color_digits`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from sklearn import datasets
from torch import Tensor
from torch.nn.functional import interpolate

from companion.checks import as_tensor, check_generator, check_in_range, check_labels, check_positive_int
from companion.data.wrappers import stratified_split

__all__ = ["PALETTE", "ColorDigits", "color_digits", "load_digits_images", "make_color_digits"]

PALETTE = torch.tensor(
    [
        [0.84, 0.19, 0.15],
        [0.10, 0.46, 0.82],
        [0.18, 0.62, 0.25],
        [0.98, 0.75, 0.14],
        [0.56, 0.27, 0.68],
        [0.94, 0.49, 0.13],
        [0.11, 0.68, 0.71],
        [0.91, 0.42, 0.66],
        [0.55, 0.36, 0.22],
        [0.50, 0.50, 0.50],
    ]
)
"""Ten background colours, (10, 3)."""


class ColorDigits(NamedTuple):
    """Digits on coloured backgrounds.

    `images` (n, 3, size, size) in [0, 1]; `labels` (n,) the digit's class; `colors` (n,) the background's index;
    `groups` (n,) = label * number of colours + colour.
    """

    images: Tensor
    labels: Tensor
    colors: Tensor
    groups: Tensor


def load_digits_images(size: int = 8, classes: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Return scikit-learn's 1797 digits as images.

    Args:
        size: side in pixels; other than 8, the images are resampled (bicubic, clamped to [0, 1]).
        classes: keep only these digits, relabelled 0, 1, ... in the order given.

    Returns:
        (images (n, 1, size, size) in [0, 1], labels (n,) int64).

    Raises:
        ValueError: a size below one, or classes that are not distinct digits.

    >>> images, labels = load_digits_images(size=16, classes=(3, 8))
    >>> images.shape[1:], labels.unique().tolist()
    (torch.Size([1, 16, 16]), [0, 1])
    """
    size = check_positive_int(size, "size")
    pixels, digits = datasets.load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.get_default_dtype()).view(-1, 1, 8, 8)
    labels = torch.tensor(digits, dtype=torch.int64)
    if classes is not None:
        if len(set(classes)) != len(classes) or not set(classes) <= set(range(10)) or not classes:
            raise ValueError(f"expected distinct digits for classes, got {tuple(classes)}")
        place = torch.full((10,), -1)
        place[list(classes)] = torch.arange(len(classes))
        kept = place[labels] >= 0
        images, labels = images[kept], place[labels[kept]]
    if size != 8:
        images = interpolate(images, (size, size), mode="bicubic", antialias=size < 8).clamp(0, 1)
    return images, labels


def color_digits(
    images: Any,
    labels: Any,
    correlation: float = 0.9,
    n_colors: int | None = None,
    cue: str = "background",
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> ColorDigits:
    r"""Colour grey images so that the colour follows the class as closely as you like.

    With probability `correlation` an image gets the colour of its class (label modulo n_colors), otherwise one of all
    colours at random: P(own colour) = correlation + (1 - correlation) / n_colors. 0 makes colour and class
    independent, 1 makes colour a perfect cue. With as many colours as balanced classes, Cramer's V of the two is
    `correlation`.

    Args:
        images: (n, 1, h, w) in [0, 1].
        labels: (n,) classes 0..C-1.
        correlation: in [0, 1].
        n_colors: 2 to 10; None: as many as classes.
        cue: "background" (white ink on a coloured ground) or "ink" (coloured ink on black).
        noise: standard deviation of pixel noise; the result is clamped to [0, 1].
        generator: a cpu generator; None means torch's default one.

    Returns:
        `ColorDigits(images, labels, colors, groups)`.

    Raises:
        ValueError: a correlation outside [0, 1], too many colours, an unknown cue, shapes that do not fit.

    >>> digits = color_digits(*load_digits_images(16), correlation=1.0)
    >>> bool((digits.colors == digits.labels).all())
    True

    Chapter: shortcuts/subgroups
    """
    images, labels, generator = (
        as_tensor(images, "images").cpu(),
        check_labels(labels).cpu(),
        check_generator(generator),
    )
    if images.ndim != 4 or images.shape[1] != 1 or labels.shape != images.shape[:1] or not len(images):
        raise ValueError(
            f"expected images (n, 1, h, w) and labels (n,), got {tuple(images.shape)} and {tuple(labels.shape)}"
        )
    n_colors = int(labels.max()) + 1 if n_colors is None else n_colors
    if not 2 <= n_colors <= len(PALETTE):
        raise ValueError(f"expected 2 to {len(PALETTE)} colours, got {n_colors}")
    correlation, noise = check_in_range(correlation, "correlation", 0, 1), check_in_range(noise, "noise", 0)
    follows = torch.rand(len(labels), generator=generator) < correlation
    colors = torch.where(follows, labels % n_colors, torch.randint(n_colors, (len(labels),), generator=generator))
    paint = PALETTE[colors].to(images)[:, :, None, None]  # (n, 3, 1, 1)
    if cue == "background":
        colored = images + (1 - images) * paint
    elif cue == "ink":
        colored = images * paint
    else:
        raise ValueError(f"expected cue 'background' or 'ink', got {cue!r}")
    if noise:
        colored = (colored + noise * torch.randn(colored.shape, generator=generator, dtype=colored.dtype)).clamp(0, 1)
    return ColorDigits(colored, labels, colors, labels * n_colors + colors)


def make_color_digits(
    correlation: float = 0.9,
    size: int = 16,
    classes: Sequence[int] | None = None,
    test_fraction: float = 0.4,
    cue: str = "background",
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[ColorDigits, ColorDigits]:
    """Return digits whose colour betrays the class in training and says nothing in the test.

    Args:
        correlation: of colour and class in training, see `color_digits`; in the test it is 0.
        size: side of the images in pixels.
        classes: which digits; None: all ten.
        test_fraction: share of the test part; classes keep their shares, no digit is in both parts.
        cue: "background" or "ink".
        noise: standard deviation of pixel noise.
        generator: a cpu generator; None means torch's default one.

    Returns:
        (train, test), two `ColorDigits`.

    Raises:
        ValueError: a setting out of range, an unknown cue.

    >>> train, test = make_color_digits(0.95, classes=(3, 8), generator=torch.Generator().manual_seed(0))
    >>> train.groups.bincount().tolist()[1] < test.groups.bincount().tolist()[1]
    True

    Chapter: shortcuts/subgroups
    """
    images, labels = load_digits_images(size, classes)
    test_fraction = check_in_range(test_fraction, "test_fraction", 0, 1, "neither")
    generator = check_generator(generator)
    train, test = stratified_split(labels, (1 - test_fraction, test_fraction), generator)
    n_colors = max(int(labels.max()) + 1, 2)
    return (
        color_digits(images[train], labels[train], correlation, n_colors, cue, noise, generator),
        color_digits(images[test], labels[test], 0.0, n_colors, cue, noise, generator),
    )
