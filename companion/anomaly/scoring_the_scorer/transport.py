"""Two clouds of points or two surfaces: where the points are, and how many are where.

Public: `sliced_wasserstein`, `chamfer`, `hausdorff`; `surface_measure` and what it returns, `PointMeasure`;
`FlowDeform`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from companion.checks import as_tensor, check_features, check_generator, check_in_range, check_positive_int
from companion.neighbors import knn
from companion.nets import MLP

__all__ = ["FlowDeform", "PointMeasure", "chamfer", "hausdorff", "sliced_wasserstein", "surface_measure"]

_BLOCK = 2**22  # projected values per block
_SMALL = 2**18  # pairs of points: up to here one table of all distances is cheaper than a search


class PointMeasure(NamedTuple):
    """Points (n, d) and the mass (n,) at each of them, summing to one."""

    points: Tensor
    weights: Tensor


def _check_clouds(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    x = check_features(x)
    y = check_features(y, "y", device=x.device)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"expected points of one dimension, got {x.shape[1]} and {y.shape[1]}")
    return x, y


def _check_weights(weights: Any, points: Tensor, name: str) -> Tensor:
    wide = torch.float32 if points.device.type == "mps" else torch.float64
    if weights is None:
        return torch.full((len(points),), 1 / len(points), dtype=wide, device=points.device)
    weights = as_tensor(weights, name, points.device).to(wide)
    if weights.shape != (len(points),) or not bool((weights >= 0).all()) or not 0 < float(weights.sum()) < torch.inf:
        raise ValueError(f"expected {name} of shape ({len(points)},), at least 0 and not all 0")
    return weights / weights.sum()


def sliced_wasserstein(
    x: Any,
    y: Any,
    n_proj: int = 128,
    p: float = 2,
    *,
    x_weights: Any = None,
    y_weights: Any = None,
    directions: Any = None,
    generator: torch.Generator | int | None = None,
) -> Tensor:
    r"""Return the sliced Wasserstein distance: project on random lines, sort, compare.

    $$\mathrm{SW}_p(\mu, \nu) = \Bigl(\frac1L \sum_{l=1}^{L}
    \int_0^1 \bigl| F^{-1}_{\theta_l, \mu}(q) - F^{-1}_{\theta_l, \nu}(q) \bigr|^p dq \Bigr)^{1/p}$$

    with $F^{-1}_{\theta,\mu}$ the quantile function of $\mu$ projected on $\theta$. For any fixed directions it is
    symmetric and obeys the triangle inequality; with infinitely many it is a metric on measures. Differentiable in x
    and y.

    Args:
        x: points, shape (n, d).
        y: points, shape (m, d); m need not be n.
        n_proj: L, how many directions are drawn.
        p: the power, at least 1.
        x_weights: mass of each point of x (None: equal); normalised to one.
        y_weights: the same for y.
        directions: unit vectors (L, d) instead of random ones, to compare several pairs on the same lines.
        generator: draws the directions on the CPU (None: torch's default generator).

    Returns:
        A scalar in the dtype of x.

    Raises:
        ValueError: shapes that do not fit, NaN, weights that are negative or all 0.

    >>> sliced_wasserstein([[0.0], [1.0]], [[2.0], [5.0]], p=1)
    tensor(3.)

    Paper: le2024diffeomorphic
    Chapter: anomaly/scoring-the-scorer
    """
    x, y = _check_clouds(x, y)
    p = check_in_range(p, "p", low=1)
    if directions is None:
        draws = check_generator(generator)
        directions = torch.randn(check_positive_int(n_proj, "n_proj"), x.shape[1], generator=draws)
        directions = directions / directions.norm(dim=1, keepdim=True)
    directions = check_features(directions, "directions", device=x.device).to(x)
    if directions.shape[1] != x.shape[1]:
        raise ValueError(f"expected directions of dimension {x.shape[1]}, got {directions.shape[1]}")
    plain = x_weights is None and y_weights is None and len(x) == len(y)
    masses = None if plain else (_check_weights(x_weights, x, "x_weights"), _check_weights(y_weights, y, "y_weights"))
    total = x.new_zeros((), dtype=torch.float32 if x.device.type == "mps" else torch.float64)
    for lines in directions.split(max(1, _BLOCK // (len(x) + len(y)))):
        u, v = lines @ x.T, lines @ y.T  # (lines, n), (lines, m)
        if masses is None:
            cost = (u.sort(1).values - v.sort(1).values).abs().pow(p).mean(1)
        else:
            cost = _transport_cost(u, v, *masses, p)
        total = total + cost.sum(dtype=total.dtype)
    return (total / len(directions)).pow(1 / p).to(x.dtype)


def _transport_cost(u: Tensor, v: Tensor, a: Tensor, b: Tensor, p: float) -> Tensor:
    """Return the cost of monotone transport of each row of u (masses a) to that of v (masses b)."""
    (u, i), (v, j) = u.sort(1), v.sort(1)
    mass_u, mass_v = a[i].cumsum(1), b[j].cumsum(1)  # where each quantile function jumps
    levels = torch.cat([mass_u, mass_v], 1).sort(1).values.clamp(max=1)
    width = torch.diff(levels, dim=1, prepend=levels.new_zeros(len(levels), 1))
    middle = levels - width / 2  # inside of an interval on which both are constant
    from_u = torch.searchsorted(mass_u, middle).clamp(max=u.shape[1] - 1)
    from_v = torch.searchsorted(mass_v, middle).clamp(max=v.shape[1] - 1)
    return (width * (u.gather(1, from_u) - v.gather(1, from_v)).abs().pow(p)).sum(1)


def chamfer(x: Any, y: Any, *, squared: bool = False, memory: str | int = "256MB") -> Tensor:
    r"""Return the Chamfer distance: how far each point is from the other cloud, on average, both ways.

    $$\frac1n \sum_i \min_j \lVert x_i - y_j \rVert + \frac1m \sum_j \min_i \lVert x_i - y_j \rVert$$

    It asks whether there is *a* point nearby, never how many, and it breaks the triangle inequality. Differentiable
    in x and y.

    Args:
        x: points, shape (n, d).
        y: points, shape (m, d).
        squared: average squared distances instead.
        memory: working memory of the neighbour searches.

    Returns:
        A scalar in the dtype of x.

    Raises:
        ValueError: shapes that do not fit, NaN or infinity.

    >>> chamfer([[0.0], [1.0]], [[0.0], [1.0], [1.0], [1.0]])
    tensor(0.)

    Paper: le2024diffeomorphic
    Chapter: anomaly/scoring-the-scorer
    """
    x, y = _check_clouds(x, y)
    there, back = _gaps(x, y, memory)
    if squared:
        return there.square().sum(1).mean() + back.square().sum(1).mean()
    return _length(there).mean() + _length(back).mean()


def _gaps(x: Tensor, y: Tensor, memory: str | int) -> tuple[Tensor, Tensor]:
    """Return what separates each row of x from the nearest of y, and each row of y from the nearest of x."""
    if len(x) * len(y) <= _SMALL:
        with torch.no_grad():
            distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
            nearest, back = distance.argmin(1), distance.argmin(0)
    else:
        nearest, back = (knn(a, b, k=1, memory=memory).indices[:, 0] for a, b in ((x, y), (y, x)))
    return x - y[nearest], y - x[back]


def _length(gaps: Tensor) -> Tensor:
    """Return row norms with a gradient of 0, not NaN, where a row is 0."""
    square = gaps.square().sum(1)
    return torch.where(square > 0, square, 1).sqrt() * (square > 0)


def hausdorff(x: Any, y: Any, *, memory: str | int = "256MB") -> Tensor:
    """Return the Hausdorff distance: the farthest that any point of either cloud is from the other cloud.

    Args:
        x: points, shape (n, d).
        y: points, shape (m, d).
        memory: working memory of the neighbour searches.

    Raises:
        ValueError: shapes that do not fit, NaN or infinity.

    >>> hausdorff([[0.0], [1.0]], [[0.0], [5.0]])
    tensor(4.)

    Paper: le2024diffeomorphic
    Chapter: anomaly/scoring-the-scorer
    """
    x, y = _check_clouds(x, y)
    there, back = _gaps(x, y, memory)
    return torch.maximum(_length(there).max(), _length(back).max())


def surface_measure(vertices: Any, faces: Any, kind: str = "faces") -> PointMeasure:
    r"""Return a triangle mesh as a measure, so that two meshes can be compared however they are cut into triangles.

    Args:
        vertices: shape (n, 3).
        faces: three vertex numbers per triangle, shape (m, 3).
        kind: "vertices": equal mass at each vertex, whatever the mesh looks like there; "faces": at the centre of
            each triangle, its share of the area; "varifold": the same, with the unit normal as three more coordinates.

    Returns:
        `PointMeasure(points, weights)`, points (n, 3), (m, 3) or (m, 6); differentiable in the vertices.

    Raises:
        ValueError: shapes that do not fit, vertex numbers out of range, no area, an unknown kind.

    >>> surface_measure([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 3]], [[0, 1, 2], [0, 1, 3]]).weights
    tensor([0.2500, 0.7500])

    Paper: le2024diffeomorphic
    Chapter: anomaly/scoring-the-scorer
    """
    vertices = check_features(vertices, "vertices", 3)
    faces = as_tensor(faces, "faces", vertices.device).long()
    if vertices.shape[1] != 3 or faces.dim() != 2 or faces.shape[1] != 3 or len(faces) == 0:
        raise ValueError(f"expected vertices (n, 3), faces (m, 3), got {tuple(vertices.shape)}, {tuple(faces.shape)}")
    if int(faces.min()) < 0 or int(faces.max()) >= len(vertices):
        raise ValueError(f"expected vertex numbers in 0..{len(vertices) - 1}, got up to {int(faces.max())}")
    if kind not in ("vertices", "faces", "varifold"):
        raise ValueError(f"expected kind to be 'vertices', 'faces' or 'varifold', got {kind!r}")
    if kind == "vertices":
        return PointMeasure(vertices, vertices.new_full((len(vertices),), 1 / len(vertices)))
    a, b, c = vertices[faces].unbind(1)  # (m, 3) each
    normal = torch.linalg.cross(b - a, c - a)
    area = normal.norm(dim=1) / 2
    if not float(area.sum()) > 0:
        raise ValueError("expected triangles with an area above 0, got none")
    centre = (a + b + c) / 3
    if kind == "varifold":
        centre = torch.cat([centre, nn.functional.normalize(normal, dim=1)], 1)
    return PointMeasure(centre, area / area.sum())


class FlowDeform(nn.Module):
    r"""Deform space by following a learned velocity: $\dot\phi_t(x) = v(\phi_t(x), t)$, from $t=0$ to $1$.

    Paths of one smooth velocity field never cross, so the exact flow is one to one and can be undone by running
    backwards. Steps that are too long lose that: `jacobian_determinant` tells.

    Args:
        dim: d of the points.
        hidden: width of the velocity network.
        steps: Runge-Kutta steps of fourth order.
        seed: of the network's initialisation.

    >>> deform = FlowDeform(dim=2, hidden=16, steps=4, seed=0)
    >>> points = torch.rand(5, 2)
    >>> bool(torch.allclose(deform(deform(points), backwards=True), points, atol=1e-3))
    True

    Paper: le2024diffeomorphic
    Chapter: anomaly/scoring-the-scorer
    """

    def __init__(self, dim: int = 3, hidden: int = 64, steps: int = 5, *, seed: int | None = None):
        super().__init__()
        self.steps = check_positive_int(steps, "steps")
        self.velocity = MLP((check_positive_int(dim, "dim") + 1, hidden, hidden, dim), activation="tanh", seed=seed)

    def _at(self, x: Tensor, t: float) -> Tensor:
        return self.velocity(torch.cat([x, x.new_full((*x.shape[:-1], 1), t)], -1))

    def forward(self, x: Tensor, backwards: bool = False) -> Tensor:
        """Return where the points (n, d) end up, or where they came from."""
        h = (-1 if backwards else 1) / self.steps
        for step in range(self.steps):
            t = 1 + h * step if backwards else h * step
            k1 = self._at(x, t)
            k2 = self._at(x + h / 2 * k1, t + h / 2)
            k3 = self._at(x + h / 2 * k2, t + h / 2)
            k4 = self._at(x + h * k3, t + h)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return x

    def jacobian_determinant(self, x: Tensor) -> Tensor:
        """Return by how much volume grows at each point, shape (n,); at most 0 where the deformation folds."""
        return torch.linalg.det(torch.func.vmap(torch.func.jacrev(lambda point: self(point[None])[0]))(x))
