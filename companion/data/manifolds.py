"""Point clouds on manifolds of known dimension, curvature and noise, turned at random into a larger space.

Public: `MANIFOLDS`, `make_manifold`, `random_frame`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from companion.checks import check_generator, check_in_range, check_positive_int

__all__ = ["MANIFOLDS", "make_manifold", "random_frame"]


def random_frame(
    ambient: int, dim: int, generator: torch.Generator | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Draw `dim` orthonormal directions of an `ambient`-dimensional space, uniformly (Haar).

    Args:
        ambient: dimensions of the space.
        dim: how many directions, at most `ambient`.
        generator: a cpu generator; None means torch's default one.
        dtype: of the result; None means torch's default.

    Returns:
        (ambient, dim), with orthonormal columns.

    Raises:
        ValueError: dim is not between 1 and ambient.

    >>> frame = random_frame(5, 2, torch.Generator().manual_seed(0), torch.float64)
    >>> bool(torch.allclose(frame.T @ frame, torch.eye(2, dtype=torch.float64)))
    True
    """
    if not 1 <= dim <= ambient:
        raise ValueError(f"expected 1 <= dim <= ambient, got dim={dim}, ambient={ambient}")
    gaussian = torch.randn(ambient, dim, generator=check_generator(generator), dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    # the signs of R's diagonal make the factor unique, hence uniform
    return (q * r.diagonal().sign()).to(dtype or torch.get_default_dtype())


def _uniform(n: int, dim: int, generator: torch.Generator | None) -> Tensor:
    return torch.rand(n, dim, generator=generator, dtype=torch.float64)


def _normal(n: int, dim: int, generator: torch.Generator | None) -> Tensor:
    return torch.randn(n, dim, generator=generator, dtype=torch.float64)


def _ball(n: int, dim: int, generator: torch.Generator | None) -> Tensor:
    direction = torch.nn.functional.normalize(_normal(n, dim, generator), dim=1)
    return direction * _uniform(n, 1, generator) ** (1 / dim)


def _linear(n: int, dim: int, curvature: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    z = _ball(n, dim, generator)
    return z, z


def _gaussian(n: int, dim: int, curvature: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    z = _normal(n, dim, generator)
    return z, z


def _cube(n: int, dim: int, curvature: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    z = _uniform(n, dim, generator)
    return z, z


def _sphere(n: int, dim: int, curvature: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    x = torch.nn.functional.normalize(_normal(n, dim + 1, generator), dim=1) / curvature
    return x, x


def _torus(n: int, dim: int, curvature: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    angle = 2 * math.pi * _uniform(n, dim, generator)
    return torch.cat([angle.cos(), angle.sin()], 1) / curvature, angle / curvature


def _paraboloid(n: int, dim: int, curvature: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    z = _ball(n, dim, generator)
    return torch.cat([z, curvature / 2 * z.square().sum(1, keepdim=True)], 1), z


# The roll is the spiral r = a * angle between these two angles.
_INNER, _OUTER = 1.5 * math.pi, 4.5 * math.pi


def _spiral_length(angle: Tensor) -> Tensor:
    return 0.5 * (angle * (1 + angle.square()).sqrt() + angle.asinh())


def _spiral_angle(length: Tensor) -> Tensor:
    """Invert the arc length by Newton's method: convex and increasing, so a few steps reach full precision."""
    angle = (2 * length).sqrt()
    for _ in range(8):
        angle = angle - (_spiral_length(angle) - length) / (1 + angle.square()).sqrt()
    return angle


def _swiss_roll(n: int, dim: int, curvature: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    start, end = _spiral_length(torch.tensor([_INNER, _OUTER], dtype=torch.float64))
    u = _uniform(n, dim, generator)
    angle = _spiral_angle(start + (end - start) * u[:, :1])
    a = (2 + _INNER**2) / (1 + _INNER**2) ** 1.5 / curvature
    heights = a * 20 * u[:, 1:]
    x = torch.cat([a * angle * angle.cos(), a * angle * angle.sin(), heights], 1)
    return x, torch.cat([a * (end - start) * u[:, :1], heights], 1)


def _moebius(n: int, dim: int, curvature: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    u = _uniform(n, 2, generator)
    angle, width = 2 * math.pi * u[:, 0], (u[:, 1] - 0.5) / curvature
    radius = 1 / curvature + width * (angle / 2).cos()
    x = torch.stack([radius * angle.cos(), radius * angle.sin(), width * (angle / 2).sin()], 1)
    return x, torch.stack([angle / curvature, width], 1)


def _flat(dim: int) -> int:
    return dim


def _one_more(dim: int) -> int:
    return dim + 1


def _twice(dim: int) -> int:
    return 2 * dim


def _whitney(dim: int) -> int:
    return 2 * dim + 1


_Draw = Callable[[int, int, float, torch.Generator | None], tuple[Tensor, Tensor]]
_KINDS: dict[str, tuple[_Draw | None, Callable[[int], int]]] = {
    "linear": (_linear, _flat),
    "gaussian": (_gaussian, _flat),
    "cube": (_cube, _flat),
    "sphere": (_sphere, _one_more),
    "torus": (_torus, _twice),
    "swiss_roll": (_swiss_roll, _one_more),
    "moebius": (_moebius, _one_more),
    "paraboloid": (_paraboloid, _one_more),
    "curved": (None, _whitney),
}

MANIFOLDS = tuple(_KINDS)
"""The kinds `make_manifold` knows."""


def _curved(z: Tensor, ambient: int, curvature: float, generator: torch.Generator | None) -> Tensor:
    frequency, phase = _normal(z.shape[1], ambient, generator), 2 * math.pi * _uniform(1, ambient, generator)
    scale = math.sqrt(2 / ambient)
    if curvature == 0:
        return -scale * phase.sin() * (z @ frequency)
    return scale / curvature * ((curvature * z @ frequency + phase).cos() - phase.cos())


def make_manifold(
    kind: str,
    n: int,
    dim: int = 2,
    ambient: int | None = None,
    noise: float = 0.0,
    curvature: float = 1.0,
    generator: torch.Generator | None = None,
    *,
    return_coordinates: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Draw n points of a `dim`-dimensional manifold, in an `ambient`-dimensional space.

    $x = Q f(z) + b + \sigma \varepsilon$, with coordinates z on the manifold, f as below, Q a random orthonormal frame
    (so distances are those of f), and isotropic Gaussian noise of standard deviation $\sigma$ in every direction.

    - linear: uniform in the unit ball of an affine subspace; b is standard normal (it is 0 for all others);
    - gaussian: standard normal in a linear subspace;
    - cube: uniform in the unit cube;
    - sphere: uniform on the sphere of radius 1/curvature;
    - torus: uniform on a product of `dim` circles of radius 1/curvature, a flat manifold without edges;
    - swiss_roll: uniform on a sheet with one direction rolled into a spiral (curvature: of its innermost point) and
      dim - 1 straight ones;
    - moebius: a strip, one radius wide, with half a twist round a circle of radius 1/curvature; dim is 2;
    - paraboloid: height curvature/2 times the squared norm, over the uniform unit ball (curvature: at the bottom);
    - curved: every ambient coordinate a random wave over the uniform unit cube, a smooth random embedding
      (curvature: scales the frequency of the waves).

    The first three are isometric to z. Torus and swiss roll are so locally: lengths along them are lengths in z.
    The waves preserve lengths on average over their randomness.
    Paraboloid and curved become flat at curvature 0; for the others of positive curvature it sets the scale.

    Args:
        kind: one of `MANIFOLDS`.
        n: points.
        dim: dimension of the manifold.
        ambient: dimension of the space; None means the least that holds the manifold.
        noise: standard deviation of the noise in each ambient direction.
        curvature: see the table.
        generator: a cpu generator; None means torch's default one.
        return_coordinates: also return z; for the sphere these are its points before the turn, for the torus and
            the roll lengths along the manifold.
        dtype: of the result; None means torch's default. Points are drawn in float64.

    Returns:
        x (n, ambient), or (x, z).

    Raises:
        ValueError: an unknown kind, a dimension the kind does not have or that does not fit, negative noise.

    >>> x = make_manifold("sphere", 100, dim=2, ambient=5, generator=torch.Generator().manual_seed(0))
    >>> x.shape, bool(torch.allclose(x.norm(dim=1), torch.ones(100)))
    (torch.Size([100, 5]), True)

    Chapter: dimensionality/intrinsic-dimension
    """
    if kind not in _KINDS:
        raise ValueError(f"expected kind to be one of {', '.join(MANIFOLDS)}, got {kind!r}")
    draw, needs = _KINDS[kind]
    n, dim, generator = check_positive_int(n, "n"), check_positive_int(dim, "dim"), check_generator(generator)
    noise, curvature = check_in_range(noise, "noise", 0), check_in_range(curvature, "curvature", 0)
    if kind == "moebius" and dim != 2:
        raise ValueError(f"a moebius strip has dim=2, got {dim}")
    ambient = needs(dim) if ambient is None else check_positive_int(ambient, "ambient")
    if ambient < needs(dim):
        raise ValueError(f"a {kind} of dim={dim} needs ambient >= {needs(dim)}, got {ambient}")
    if curvature == 0 and kind in {"sphere", "torus", "swiss_roll", "moebius"}:
        raise ValueError(f"expected a positive curvature for a {kind}, got 0")
    if draw is None:
        z = _uniform(n, dim, generator)
        x = _curved(z, ambient, curvature, generator)
    else:
        x, z = draw(n, dim, curvature, generator)
        x = x @ random_frame(ambient, x.shape[1], generator, torch.float64).T  # (n, ambient)
        if kind == "linear":
            x = x + _normal(1, ambient, generator)
    if noise:
        x = x + noise * _normal(n, ambient, generator)
    dtype = dtype or torch.get_default_dtype()
    return (x.to(dtype), z.to(dtype)) if return_coordinates else x.to(dtype)
