"""Small pictures of one shape each, whose shape, colour, size and place vary independently, or as you set them.

Public: `COLORS`, `SHAPES`, `Sprites`, `make_sprites`.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from companion.checks import as_tensor, check_generator, check_in_range, check_positive_int
from companion.data.textures import TEXTURES, make_textures

__all__ = ["COLORS", "SHAPES", "Sprites", "make_sprites"]

COLORS = {
    "red": (0.85, 0.18, 0.16),
    "green": (0.16, 0.65, 0.27),
    "blue": (0.13, 0.40, 0.85),
    "yellow": (0.97, 0.80, 0.15),
    "purple": (0.58, 0.27, 0.72),
    "orange": (0.95, 0.50, 0.12),
    "cyan": (0.14, 0.72, 0.78),
    "pink": (0.95, 0.45, 0.68),
    "black": (0.0, 0.0, 0.0),
    "gray": (0.5, 0.5, 0.5),
    "white": (1.0, 1.0, 1.0),
}
"""Colours by name, in [0, 1]."""

# How far the farthest point lies from the centre, for the area of a disc of radius 1.
_REACH = {
    "square": math.sqrt(math.pi / 2),
    "disc": 1.0,
    "triangle": 2 * math.sqrt(math.pi / (3 * math.sqrt(3))),
    "cross": math.sqrt(9 * math.pi / 20) * math.sqrt(10) / 3,
    "star": math.sqrt(math.pi / (5 * 0.45 * math.sin(math.pi / 5))),
    "diamond": 1.5 * math.sqrt(math.pi / 3),
    "ring": 1.25,
    "hexagon": math.sqrt(math.pi / (6 * math.tan(math.pi / 6))) / math.cos(math.pi / 6),
    "bar": math.sqrt(10 * math.pi / 12),
    "half": math.sqrt(2) * math.hypot(1, 4 / (3 * math.pi)),
    "ell": math.sqrt(math.pi / 3) * math.sqrt(74) / 6,
    "hourglass": math.sqrt(math.pi),
}

SHAPES = tuple(_REACH)
"""The shapes `make_sprites` knows. At one size all have the same area, so that size says nothing about shape."""


class Sprites(NamedTuple):
    """Pictures of one shape each, and everything that was decided about them.

    `images` (n, 3, h, w) in [0, 1]; `shape`, `color`, `size`, `background` (n,) int64, places in the lists that were
    asked for; `x`, `y` (n,) centre as a fraction of the side, from the left and from the top; `angle` (n,) in radians,
    clockwise; `filled` (n,) bool; `masks` (n, 1, h, w) bool, pixels at least half covered by the shape.
    """

    images: Tensor
    shape: Tensor
    color: Tensor
    size: Tensor
    x: Tensor
    y: Tensor
    angle: Tensor
    background: Tensor
    filled: Tensor
    masks: Tensor


def _regular(p: Tensor, q: Tensor, sides: int) -> Tensor:
    apothem = math.sqrt(math.pi / (sides * math.tan(math.pi / sides)))
    normals = [math.pi / 2 + 2 * math.pi * k / sides for k in range(sides)]
    return torch.stack([p * math.cos(a) + q * math.sin(a) for a in normals]).amax(0) - apothem


def _box(p: Tensor, q: Tensor, width: float, height: float) -> Tensor:
    return torch.maximum(p.abs() - width, q.abs() - height)


def _distance(shape: str, p: Tensor, q: Tensor) -> Tensor:
    """Return the distance to the outline, negative inside, of the shape of area pi at the origin; q points down."""
    if shape == "square":
        return _box(p, q, math.sqrt(math.pi) / 2, math.sqrt(math.pi) / 2)
    if shape == "triangle":
        return _regular(p, q, 3)
    if shape == "hexagon":
        return _regular(p, q, 6)
    if shape == "cross":
        long = math.sqrt(9 * math.pi / 20)
        return torch.minimum(_box(p, q, long, long / 3), _box(p, q, long / 3, long))
    if shape == "diamond":
        a, b = math.sqrt(math.pi / 3), 1.5 * math.sqrt(math.pi / 3)
        return (p.abs() / a + q.abs() / b - 1) / math.hypot(1 / a, 1 / b)
    if shape == "bar":
        return _box(p, q, 3 * math.sqrt(math.pi / 12), math.sqrt(math.pi / 12))
    if shape == "ell":
        half = math.sqrt(math.pi / 3)  # a square without one quarter, its centre of mass at the origin
        p, q = p - half / 6, q + half / 6
        return torch.maximum(_box(p, q, half, half), torch.minimum(p, -q))
    if shape == "hourglass":
        return torch.maximum((p.abs() - q.abs()) / math.sqrt(2), q.abs() - math.sqrt(math.pi / 2))
    radius = (p.square() + q.square()).sqrt()
    if shape == "disc":
        return radius - 1
    if shape == "ring":
        return (radius - 1).abs() - 0.25
    if shape == "half":
        below = q - math.sqrt(2) * 4 / (3 * math.pi)  # likewise
        return torch.maximum((p.square() + below.square()).sqrt() - math.sqrt(2), below)
    # star: fold all ten half-points onto one, bounded by the line from the tip to the notch
    tip = _REACH["star"]
    fold = (torch.atan2(p, -q).remainder(2 * math.pi / 5) - math.pi / 5).abs()  # 0 at a notch
    along, across = radius * fold.cos(), radius * fold.sin()
    notch, end = (0.45 * tip, 0.0), (tip * math.cos(math.pi / 5), tip * math.sin(math.pi / 5))
    dx, dy = end[0] - notch[0], end[1] - notch[1]
    return ((along - notch[0]) * dy - across * dx) / math.hypot(dx, dy)


def _palette(colors: Sequence[str] | Tensor, name: str) -> Tensor:
    if isinstance(colors, Tensor):
        rgb = colors.float()
    else:
        unknown = [c for c in colors if isinstance(c, str) and c not in COLORS]
        if unknown:
            raise ValueError(f"expected {name} among {', '.join(COLORS)}, got {unknown[0]!r}")
        rgb = torch.tensor([COLORS[c] if isinstance(c, str) else c for c in colors])
    if rgb.ndim != 2 or rgb.shape[1] != 3 or not len(rgb) or rgb.min() < 0 or rgb.max() > 1:
        raise ValueError(f"expected {name} as names or (k, 3) numbers in [0, 1], got shape {tuple(rgb.shape)}")
    return rgb


def _factor(value: Any, drawn: Tensor, name: str, levels: int | None = None) -> Tensor:
    """Return the factor the caller set, or the one drawn, one value per picture."""
    if value is None:
        return drawn
    value = as_tensor(value, name)
    if levels is not None and value.is_floating_point():
        raise ValueError(f"expected whole numbers for {name}, got {value.dtype}")
    value = value.to("cpu", drawn.dtype)
    if value.ndim > 1 or (value.ndim == 1 and value.shape != drawn.shape) or not torch.isfinite(value).all():
        raise ValueError(f"expected {name} to be one number or {len(drawn)}, got shape {tuple(value.shape)}")
    if levels is not None and (value.min() < 0 or value.max() >= levels):
        raise ValueError(f"expected {name} in 0..{levels - 1}, got {int(value.min())} to {int(value.max())}")
    return value.expand_as(drawn).clone()


def _canvas(
    n: int, backgrounds: Sequence[str] | Tensor, background: Any, side: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Return what lies behind the shapes (n, 3, side, side), and which background each is."""
    if isinstance(backgrounds, Tensor):
        if backgrounds.shape != (n, 3, side, side):
            raise ValueError(f"expected background pictures ({n}, 3, {side}, {side}), got {tuple(backgrounds.shape)}")
        return backgrounds.float().cpu(), torch.zeros(n, dtype=torch.int64)
    chosen = _factor(
        background, torch.randint(len(backgrounds), (n,), generator=generator), "background", len(backgrounds)
    )
    canvas = torch.empty(n, 3, side, side)
    for level, name in enumerate(backgrounds):
        rows = (chosen == level).nonzero().flatten()
        if name in TEXTURES and len(rows):
            surface = make_textures(len(rows), name, size=side, look=4, generator=generator).images
            canvas[rows] = 0.6 * surface.mean(1, keepdim=True).expand(-1, 3, -1, -1)
        elif name not in TEXTURES:
            canvas[rows] = _palette([name], "backgrounds (or textures)").view(1, 3, 1, 1)
    return canvas, chosen


def make_sprites(
    n: int,
    *,
    shape: Any = None,
    color: Any = None,
    size: Any = None,
    x: Any = None,
    y: Any = None,
    angle: Any = 0.0,
    background: Any = None,
    filled: Any = True,
    shapes: Sequence[str] = ("square", "disc", "triangle"),
    colors: Sequence[str] | Tensor = ("red", "green", "blue"),
    sizes: Sequence[float] = (0.10, 0.14, 0.18),
    backgrounds: Sequence[str] | Tensor = ("black",),
    image_size: int = 32,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> Sprites:
    """Draw n pictures of one anti-aliased shape each.

    What is None is drawn uniformly and independently of everything else; what you pass is used, so that a set in which
    cues agree, or conflict, is two index arrays: `make_sprites(n, shape=y, color=y)` for training,
    `make_sprites(n, shape=y, color=(y + 1) % 3)` to see which of the two a network followed.

    Args:
        n: pictures.
        shape: places in `shapes`: one number, (n,) of them, or None.
        color: places in `colors`, likewise.
        size: places in `sizes`, likewise.
        x: centre from the left, as a fraction of the side; None: anywhere the largest shape fits.
        y: centre from the top, likewise.
        angle: turn in radians, clockwise; None: any.
        background: places in `backgrounds`, likewise.
        filled: False for an outline; None: half of them.
        shapes: names among `SHAPES`.
        colors: names among `COLORS`, or (k, 3) numbers in [0, 1].
        sizes: radius of the disc with the same area, as a fraction of the side.
        backgrounds: names among `COLORS` or (in grey) `TEXTURES`; or pictures (n, 3, h, w) to draw upon, such as the
            `images` of another call: scenes with several objects.
        image_size: side in pixels.
        noise: standard deviation of pixel noise; the result is clamped to [0, 1].
        generator: a cpu generator; None means torch's default one.

    Returns:
        `Sprites(images, shape, color, size, x, y, angle, background, filled, masks)`.

    Raises:
        ValueError: unknown names, factors out of range or of another length, sizes too large to fit.

    >>> sprites = make_sprites(6, shape=[0, 0, 1, 1, 2, 2], generator=torch.Generator().manual_seed(0))
    >>> sprites.images.shape, sprites.shape.tolist()
    (torch.Size([6, 3, 32, 32]), [0, 0, 1, 1, 2, 2])

    Chapter: shortcuts/shortcut-learning
    """
    unknown = [name for name in shapes if name not in SHAPES]
    if unknown or not len(shapes):
        raise ValueError(f"expected shapes among {', '.join(SHAPES)}, got {unknown[:1] or 'none'}")
    n, image_size = check_positive_int(n, "n"), check_positive_int(image_size, "image_size", 4)
    noise, generator = check_in_range(noise, "noise", 0), check_generator(generator)
    if not len(sizes) or not min(sizes) > 0:
        raise ValueError(f"expected positive sizes, got {tuple(sizes)}")
    rgb = _palette(colors, "colors")
    radii = torch.tensor(sizes, dtype=torch.float32)
    margin = max(_REACH[name] for name in shapes) * max(sizes)
    if margin > 0.5 and (x is None or y is None):
        raise ValueError(
            f"a {max(shapes, key=_REACH.get)} of size {max(sizes)} does not fit: pass smaller sizes, or x and y"
        )

    def level(k: int) -> Tensor:
        return torch.randint(k, (n,), generator=generator)

    def unit() -> Tensor:
        return torch.rand(n, generator=generator)

    # everything is drawn, used or not: setting one factor leaves the others as they were
    shape = _factor(shape, level(len(shapes)), "shape", len(shapes))
    color = _factor(color, level(len(rgb)), "color", len(rgb))
    size = _factor(size, level(len(radii)), "size", len(radii))
    x = _factor(x, margin + (1 - 2 * margin) * unit(), "x")
    y = _factor(y, margin + (1 - 2 * margin) * unit(), "y")
    angle = _factor(angle, 2 * math.pi * unit(), "angle")
    filled = _factor(filled, unit() < 0.5, "filled")
    images, background = _canvas(n, backgrounds, background, image_size, generator)

    grid = (torch.arange(image_size) + 0.5) / image_size
    scale = radii[size].view(n, 1, 1)
    dx, dy = (grid - x.view(n, 1, 1)) / scale, (grid[:, None] - y.view(n, 1, 1)) / scale  # (n, 1, w), (n, h, 1)
    cos, sin = angle.cos().view(n, 1, 1), angle.sin().view(n, 1, 1)
    p, q = dx * cos + dy * sin, dy * cos - dx * sin  # (n, h, w)
    coverage = torch.empty(n, 1, image_size, image_size)
    for place, name in enumerate(shapes):
        rows = shape == place
        distance = _distance(name, p[rows], q[rows])
        outline = (distance + 0.14).abs() - 0.14
        distance = torch.where(filled[rows].view(-1, 1, 1), distance, outline)
        coverage[rows, 0] = (0.5 - distance * scale[rows] * image_size).clamp(0, 1)
    images = images + coverage * (rgb[color][:, :, None, None] - images)
    if noise:
        images = (images + noise * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    return Sprites(images, shape, color, size, x, y, angle, background, filled, coverage >= 0.5)
