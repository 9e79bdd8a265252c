"""Small pictures of surfaces, whole or with a defect whose every pixel is known.

Public: `DEFECTS`, `TEXTURES`, `Textures`, `make_textures`.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from companion.checks import check_generator, check_in_range, check_positive_int

__all__ = ["DEFECTS", "TEXTURES", "Textures", "make_textures"]

TEXTURES = ("stripes", "grid", "weave", "dots", "bricks", "marble", "noise")
"""The surfaces `make_textures` knows."""

DEFECTS = ("scratch", "blob", "missing", "misplaced", "stain")
"""The defects `make_textures` knows."""

# (dark, light, repeats per image, angle in degrees): the looks a surface comes in
_LOOKS = (
    ((0.16, 0.24, 0.36), (0.74, 0.80, 0.84), 7.0, 20.0),
    ((0.35, 0.20, 0.12), (0.86, 0.70, 0.50), 6.0, 0.0),
    ((0.12, 0.30, 0.26), (0.70, 0.84, 0.66), 8.0, 45.0),
    ((0.40, 0.14, 0.20), (0.93, 0.74, 0.70), 5.0, -30.0),
    ((0.22, 0.20, 0.22), (0.72, 0.70, 0.68), 9.0, 10.0),
    ((0.26, 0.18, 0.40), (0.80, 0.76, 0.90), 6.5, 70.0),
)


class Textures(NamedTuple):
    """Pictures of a surface, and what is wrong with them.

    `images` (n, 3, size, size) in [0, 1]; `masks` (n, 1, size, size) bool, true where a defect changed the picture;
    `labels` (n,) 0 for a normal picture, otherwise 1 + the place of its defect among those asked for (None left out).
    """

    images: Tensor
    masks: Tensor
    labels: Tensor


def _wave(u: Tensor) -> Tensor:
    """Return 1 at whole numbers and 0 halfway, as a cosine."""
    return 0.5 + 0.5 * (2 * math.pi * u).cos()


def _smooth_field(n: int, size: int, exponent: float, generator: torch.Generator | None) -> Tensor:
    """Return (n, size, size) Gaussian fields with amplitude spectrum 1 / frequency^exponent, mean 0, variance 1."""
    white = torch.randn(n, size, size, generator=generator)
    fy, fx = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None]
    frequency = (fx.square() + fy.square()).sqrt() * size
    amplitude = frequency.clamp(min=1) ** -exponent
    amplitude[0, 0] = 0
    field = torch.fft.irfft2(torch.fft.rfft2(white) * amplitude, s=(size, size))
    return field / field.std((1, 2), keepdim=True).clamp(min=1e-6)


def _pattern(kind: str, u: Tensor, v: Tensor, field: Tensor, smooth: Tensor) -> Tensor:
    """Return how light the surface is, 0 to 1, at pattern coordinates u, v (one repeat per unit)."""
    if kind == "stripes":
        return (6 * (_wave(u) - 0.5)).sigmoid()
    if kind == "grid":
        return 1 - torch.maximum(_wave(u) ** 6, _wave(v) ** 6)
    if kind == "weave":
        column, row = u.floor(), v.floor()
        weft, warp = (math.pi * (u - 0.5 + row)).cos(), -(math.pi * (v - 0.5 + column)).cos()  # height of each thread
        across_weft, across_warp = (math.pi * (v % 1)).sin(), (math.pi * (u % 1)).sin()
        on_top = weft + 0.6 * across_weft > warp + 0.6 * across_warp
        light = torch.where(on_top, across_weft * (0.72 + 0.28 * weft), 0.8 * across_warp * (0.72 + 0.28 * warp))
        return light.clamp(0, 1)
    if kind == "dots":
        row = v.floor()
        du, dv = (u + 0.5 * (row % 2)) % 1 - 0.5, v % 1 - 0.5
        return (14 * ((du.square() + dv.square()).sqrt() - 0.3)).sigmoid()
    if kind == "bricks":
        row = (2 * v).floor()
        du, dv = (u + 0.5 * (row % 2)) % 1, (2 * v) % 1
        edge = torch.minimum(torch.minimum(du, 1 - du), 0.5 * torch.minimum(dv, 1 - dv))
        return 1 - (40 * (edge - 0.07)).sigmoid() * (0.7 + 0.06 * field)
    if kind == "marble":
        veins, fibres = _wave(0.5 * u + 0.5 * smooth), _wave(5 * u + 0.8 * smooth)
        return 0.2 + 0.5 * veins**1.5 + 0.12 * fibres + 0.05 * field
    return (0.5 + 0.22 * field).clamp(0, 1)


class _Shapes(NamedTuple):
    """The random numbers that place defects, one row each: (k, 1, 1)."""

    x: Tensor
    y: Tensor
    turn: Tensor
    bend: Tensor
    wobble: Tensor
    extent: Tensor


def _coverage(defect: str, shape: _Shapes, gx: Tensor, gy: Tensor) -> Tensor:
    """Return how much of each pixel the defect covers, 0 to 1; exactly 0 outside it."""
    dx, dy = gx - shape.x, gy - shape.y
    p = dx * shape.turn.cos() + dy * shape.turn.sin()
    q = dy * shape.turn.cos() - dx * shape.turn.sin()
    if defect == "scratch":
        length, width = 0.3 * shape.extent, 0.011 * shape.extent.sqrt()
        off = (q - shape.bend * (p.square() - 0.3 * length.square()) / length).abs()
        distance = torch.maximum(off - width * (1 - 0.6 * (p / length).square()).clamp(min=0.2), p.abs() - length)
    elif defect == "misplaced":
        distance = torch.maximum(p.abs(), q.abs()) - 0.14 * shape.extent
    else:
        around = torch.atan2(q, p)
        wave = 0.22 * (2 * around + shape.wobble).cos() + 0.12 * (3 * around - 2 * shape.wobble).cos()
        radius = (0.1 if defect == "blob" else 0.15) * shape.extent * (1 + wave)
        distance = (p.square() + q.square()).sqrt() - radius
    if defect == "stain":
        return (0.1 - distance / (0.06 * shape.extent)).clamp(0, 1)
    return (0.5 - distance * gx.shape[-1]).clamp(0, 1)


class _Surface:
    """The n pictures of one surface, before anything happens to them: where each is shifted, turned and lit."""

    def __init__(self, n: int, kind: str, size: int, look: int, noise: float, generator: torch.Generator | None):
        dark, light, self.repeats, angle = _LOOKS[look]
        self.kind, self.size = kind, size
        self.dark, self.light = torch.tensor(dark)[:, None, None], torch.tensor(light)[:, None, None]
        self.y, self.x = torch.meshgrid(*[(torch.arange(size) + 0.5) / size] * 2, indexing="ij")
        r = torch.rand(n, 6, 1, 1, generator=generator)
        self.grain = noise * torch.randn(n, 3, size, size, generator=generator)
        self.field, self.smooth = (_smooth_field(n, size, e, generator) for e in (1.3, 2.6))
        self.turn = math.radians(angle) + 0.06 * (r[:, 0] - 0.5)
        slope = (r[:, 1] - 0.5) * (self.x - 0.5) + (r[:, 2] - 0.5) * (self.y - 0.5)
        self.lighting = 1 + 0.24 * slope + 0.08 * (r[:, 3] - 0.5)
        self.shift_u, self.shift_v = r[:, 4], r[:, 5]
        self.lightness = self.pattern(torch.arange(n))

    def pattern(self, rows: Tensor, turn: float = 0.0, shift: float = 0.0, field: Tensor | None = None) -> Tensor:
        """Return how light the surface is (k, size, size), turned and shifted if you like."""
        a = self.turn[rows] + turn
        u = self.repeats * (self.x * a.cos() + self.y * a.sin()) + self.shift_u[rows] + shift
        v = self.repeats * (self.y * a.cos() - self.x * a.sin()) + self.shift_v[rows] + shift
        return _pattern(self.kind, u, v, (self.field if field is None else field)[rows], self.smooth[rows])

    def paint(self, lightness: Tensor, rows: Tensor) -> Tensor:
        """Return pictures (k, 3, size, size) of a pattern, lit and with grain."""
        color = self.dark + (self.light - self.dark) * lightness[:, None]
        return color * self.lighting[rows, None] + self.grain[rows]

    def damaged(self, defect: str, images: Tensor, rows: Tensor, choice: Tensor) -> Tensor:
        """Return what the defect would look like if it covered the whole picture."""
        if defect == "scratch":
            return torch.where(choice[:, None] < 0.5, 0.97, 0.06) + self.grain[rows]
        if defect == "blob":
            return 0.25 * self.dark + 0.5 * self.grain[rows] + 0.05 * self.field[rows, None]
        if defect == "missing":
            bare = 0.6 * self.lightness[rows].mean((1, 2), keepdim=True)
            return self.paint(bare.expand(-1, self.size, self.size), rows)
        if defect == "misplaced":
            return self.paint(self.pattern(rows, math.pi / 4, 0.5, self.smooth), rows)
        tints = torch.tensor([[0.95, 0.45, 0.25], [0.35, 0.60, 0.95], [0.55, 0.85, 0.35]])
        return images * tints[(3 * choice.flatten()).long().clamp(max=2)][:, :, None, None]


def _column(value: Any, n: int, name: str) -> Tensor:
    value = torch.as_tensor(value, dtype=torch.float32)
    if value.ndim > 1 or (value.ndim == 1 and len(value) != n) or not (value > 0).all():
        raise ValueError(f"expected a positive {name}, one number or {n} of them")
    return value.expand(n).reshape(n, 1, 1)


def make_textures(
    n: int,
    kind: str = "weave",
    defect: str | Sequence[str | None] | None = None,
    size: int = 64,
    look: int = 0,
    *,
    strength: float | Tensor = 1.0,
    extent: float | Tensor = 1.0,
    noise: float = 0.02,
    generator: torch.Generator | None = None,
) -> Textures:
    """Draw n pictures of one surface, each shifted, slightly turned and lit differently, with a defect if you like.

    The same generator state draws the same surfaces whatever the defect, so that a picture and its normal twin differ
    exactly inside the mask.

    Args:
        n: pictures.
        kind: one of `TEXTURES`.
        defect: one of `DEFECTS`; or a sequence of them to draw from at random (None in it: a normal picture); or None.
        size: side in pixels.
        look: which colours, scale and direction the surface comes in, 0 to 5: another "product" of the same kind.
        strength: how visible the defect is, in (0, 1]; a number or one per picture.
        extent: how large it is; 1 covers a few percent of the picture.
        noise: standard deviation of the grain of a pixel.
        generator: a cpu generator; None means torch's default one.

    Returns:
        `Textures(images, masks, labels)`.

    Raises:
        ValueError: an unknown kind, defect or look, or a size that is too small.

    >>> textures = make_textures(4, "weave", "scratch", generator=torch.Generator().manual_seed(0))
    >>> textures.images.shape, textures.labels.tolist()
    (torch.Size([4, 3, 64, 64]), [1, 1, 1, 1])

    Chapter: anomaly/visual-anomalies
    """
    if kind not in TEXTURES:
        raise ValueError(f"expected kind to be one of {', '.join(TEXTURES)}, got {kind!r}")
    defects = [defect] if defect is None or isinstance(defect, str) else list(defect)
    for name in defects:
        if name is not None and name not in DEFECTS:
            raise ValueError(f"expected defects among {', '.join(DEFECTS)}, got {name!r}")
    n, size = check_positive_int(n, "n"), check_positive_int(size, "size", 8)
    noise, generator = check_in_range(noise, "noise", 0), check_generator(generator)
    if not defects or not 0 <= look < len(_LOOKS):
        raise ValueError(f"expected a defect or None, and look 0 to {len(_LOOKS) - 1}, got {defect!r} and {look}")
    strength, extent = _column(strength, n, "strength").clamp(max=1), _column(extent, n, "extent")

    surface = _Surface(n, kind, size, look, noise, generator)
    d = torch.rand(n, 6, 1, 1, generator=generator)
    chosen = torch.randint(len(defects), (n,), generator=generator)
    shapes = _Shapes(
        0.2 + 0.6 * d[:, 0], 0.2 + 0.6 * d[:, 1], math.pi * d[:, 2], d[:, 3] - 0.5, 2 * math.pi * d[:, 4], extent
    )

    images = surface.paint(surface.lightness, torch.arange(n))
    masks = torch.zeros(n, 1, size, size, dtype=torch.bool)
    labels = torch.zeros(n, dtype=torch.int64)
    names = [name for name in defects if name is not None]
    for place, name in enumerate(defects):
        rows = (chosen == place).nonzero().flatten()
        if name is None or not len(rows):
            continue
        alpha = _coverage(name, _Shapes(*(part[rows] for part in shapes)), surface.x, surface.y)[:, None]
        alpha = alpha.where(alpha >= 0.1, 0.0)  # (k, 1, size, size); what nobody could see is no defect
        damaged = surface.damaged(name, images[rows], rows, d[rows, 5])
        images[rows] += strength[rows, None] * alpha * (damaged - images[rows])
        masks[rows] = alpha > 0
        labels[rows] = 1 + names.index(name)
    return Textures(images.clamp(0, 1), masks, labels)
