"""Background colour as a group, and augmentations that move it without touching the class.

Public: `background_color_groups`, `swap_backgrounds`, `latent_swap`, `PrincipalDirections`, `make_background_digits`,
`BackgroundDigits`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from companion.checks import (
    as_tensor,
    check_features,
    check_generator,
    check_in_range,
    check_labels,
    check_positive_int,
)
from companion.data.glyphs import PALETTE, load_digits_images
from companion.data.wrappers import stratified_split

__all__ = [
    "BackgroundDigits",
    "PrincipalDirections",
    "background_color_groups",
    "latent_swap",
    "make_background_digits",
    "swap_backgrounds",
]


class BackgroundDigits(NamedTuple):
    """Digits on coloured grounds: `images` (n, 3, s, s), `labels`, `groups` (n,), and `ink` (n, 1, s, s), the digit."""

    images: Tensor
    labels: Tensor
    groups: Tensor
    ink: Tensor


class PrincipalDirections(NamedTuple):
    """The mean image (d,) and the leading principal directions (k, d), orthonormal rows."""

    mean: Tensor
    directions: Tensor

    @classmethod
    def of(cls, images: Any, k: int = 3) -> "PrincipalDirections":
        """Return the k leading principal directions of images (n, ...), flattened.

        Raises:
            ValueError: k larger than the number of images or pixels.
        """
        x = check_features(as_tensor(images, "images").flatten(1), "images", min_samples=2)
        k = check_positive_int(k, "k")
        if k > min(x.shape):
            raise ValueError(f"expected k to be at most {min(x.shape)}, got {k}")
        mean = x.mean(0)
        _, vectors = torch.linalg.eigh((x - mean).T @ (x - mean))
        return cls(mean, vectors[:, -k:].flip(1).T.contiguous())


def background_color_groups(
    images: Any, n_groups: int, steps: int = 50, generator: torch.Generator | int | None = None
) -> Tensor:
    """Return a group per image by the colour of its border, found by k-means on the mean border pixel.

    Started far apart (each centre is the border farthest from those before), so that clear colours are found whatever
    the generator draws first.

    Args:
        images: (n, c, h, w).
        n_groups: how many colours.
        steps: k-means iterations.
        generator: draws the first centre; a seed will do, None means torch's default generator.

    Returns:
        (n,) whole numbers.

    Raises:
        ValueError: another shape, more groups than images.

    >>> images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4), torch.zeros(3, 4, 4)])
    >>> groups = background_color_groups(images, 2)
    >>> bool(groups[0] == groups[2]), bool(groups[0] == groups[1])
    (True, False)

    Paper: chiu2023better
    Chapter: shortcuts/subgroups
    """
    x = as_tensor(images, "images")
    n_groups, steps = check_positive_int(n_groups, "n_groups"), check_positive_int(steps, "steps")
    if x.dim() != 4 or min(x.shape[2:]) < 2 or len(x) < n_groups:
        raise ValueError(f"expected at least {n_groups} images (n, c, h, w), got shape {tuple(x.shape)}")
    edge = torch.ones(x.shape[2:], dtype=torch.bool, device=x.device)
    edge[1:-1, 1:-1] = False
    border = x[:, :, edge].double().mean(2)  # (n, c)
    first = torch.randint(len(x), (1,), generator=check_generator(generator)).to(x.device)
    centers = border[first]
    for _ in range(n_groups - 1):
        centers = torch.cat([centers, border[torch.cdist(border, centers).amin(1).argmax()][None]])
    groups = torch.cdist(border, centers).argmin(1)
    for _ in range(steps):
        counts = torch.bincount(groups, minlength=n_groups).to(border.dtype)[:, None]
        sums = torch.zeros_like(centers).index_add_(0, groups, border)
        centers = torch.where(counts > 0, sums / counts.clamp_min(1), centers)
        before, groups = groups, torch.cdist(border, centers).argmin(1)
        if torch.equal(before, groups):
            break
    return groups


def swap_backgrounds(ink: Any, n_colors: int = 5, generator: torch.Generator | int | None = None) -> Tensor:
    """Return digits on backgrounds drawn anew: the oracle, which knows what is background and what is not.

    Args:
        ink: (n, 1, h, w) in [0, 1], how much of each pixel is digit.
        n_colors: 1 to 10.
        generator: a cpu generator or a seed; None means torch's default generator.

    Returns:
        (n, 3, h, w) images.

    Raises:
        ValueError: another shape, too many colours.

    >>> swap_backgrounds(torch.zeros(2, 1, 4, 4)).shape
    torch.Size([2, 3, 4, 4])

    Paper: chiu2023better
    Chapter: shortcuts/subgroups
    """
    ink = as_tensor(ink, "ink")
    if ink.dim() != 4 or ink.shape[1] != 1 or not 1 <= n_colors <= len(PALETTE):
        raise ValueError(
            f"expected ink (n, 1, h, w) and 1 to {len(PALETTE)} colours, got {tuple(ink.shape)}, {n_colors}"
        )
    drawn = torch.randint(n_colors, (len(ink),), generator=check_generator(generator))
    return _painted(ink, drawn)


def _painted(ink: Tensor, colors: Tensor) -> Tensor:
    return ink + (1 - ink) * PALETTE[colors].to(ink)[:, :, None, None]


def latent_swap(
    images: Any, directions: PrincipalDirections, strength: float = 1.0, generator: torch.Generator | int | None = None
) -> Tensor:
    r"""Return images whose leading principal coordinates are those of other images of the batch.

    $$x_i' = x_i + s \sum_k \big(\langle v_k, x_{\pi(i)} \rangle - \langle v_k, x_i \rangle\big)\, v_k$$

    with a random permutation $\pi$. Where the background dominates the variance, its colour is what moves: no label
    and no mask is used. It stands in for an augmentation that moves along the latent directions of a generative flow.

    Args:
        images: (n, ...).
        directions: from `PrincipalDirections.of(training images)`.
        strength: s, in [0, 1].
        generator: draws the permutation; a seed will do, None means torch's default generator.

    Returns:
        Images of the same shape; values may leave [0, 1] a little.

    Raises:
        ValueError: images of another size than the directions.

    >>> x = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    >>> moved = latent_swap(x, PrincipalDirections.of(x, k=2))
    >>> torch.allclose(moved.mean(0), x.mean(0), atol=1e-6)
    True

    Paper: chiu2023better
    Chapter: shortcuts/subgroups
    """
    x = as_tensor(images, "images")
    strength = check_in_range(strength, "strength", 0, 1)
    flat, v = x.flatten(1), directions.directions.to(x)
    if flat.shape[1] != v.shape[1]:
        raise ValueError(f"expected images of {v.shape[1]} numbers each, as the directions, got {flat.shape[1]}")
    generator = check_generator(generator)
    where = "cpu" if generator is None else generator.device
    other = torch.randperm(len(x), generator=generator, device=where).to(x.device)
    coordinates = flat @ v.T  # (n, k)
    return (flat + strength * (coordinates[other] - coordinates) @ v).view(x.shape)


def make_background_digits(
    correlation: float = 0.7, n_colors: int = 5, size: int = 8, generator: torch.Generator | int | None = None
) -> tuple[BackgroundDigits, BackgroundDigits]:
    """Return training digits whose background usually goes with the class, and test digits on every background.

    Each test digit is rendered on all colours, so that groups hold the same digits and differ by colour alone.

    Args:
        correlation: probability that class c has colour c modulo n_colors; otherwise any colour at random.
        n_colors: 2 to 10.
        size: side of the images in pixels.
        generator: a cpu generator or a seed; None means torch's default generator.

    Returns:
        (train, test), two `BackgroundDigits`.

    Raises:
        ValueError: a correlation outside [0, 1], too many colours.

    >>> train, test = make_background_digits(generator=torch.Generator().manual_seed(0))
    >>> test.groups.bincount().unique().numel()
    1

    Paper: chiu2023better
    Chapter: shortcuts/subgroups
    """
    correlation = check_in_range(correlation, "correlation", 0, 1)
    if not 2 <= n_colors <= len(PALETTE):
        raise ValueError(f"expected 2 to {len(PALETTE)} colours, got {n_colors}")
    ink, labels = load_digits_images(size)
    generator = check_generator(generator)
    rows, held = stratified_split(labels, (0.6, 0.4), generator)
    follows = torch.rand(len(rows), generator=generator) < correlation
    drawn = torch.randint(n_colors, (len(rows),), generator=generator)
    colors = torch.where(follows, labels[rows] % n_colors, drawn)
    train = BackgroundDigits(_painted(ink[rows], colors), labels[rows], colors, ink[rows])
    every = torch.arange(n_colors).repeat_interleave(len(held))
    again = held.repeat(n_colors)
    return train, BackgroundDigits(_painted(ink[again], every), labels[again], check_labels(every), ink[again])
