"""Manifolds: the dimension, the variance, the distances and the curvature they claim to have."""

import math

import pytest
import torch

from companion.data import MANIFOLDS, make_manifold, random_frame


def _distances(a, b):
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")  # the fast mode rounds small ones off


def _gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", MANIFOLDS)
def test_shapes_dtype_and_reproducibility(kind):
    x, z = make_manifold(kind, 50, 2, 9, 0.1, generator=_gen(), return_coordinates=True)
    assert x.shape == (50, 9)
    assert len(z) == 50
    assert x.dtype == torch.float32
    assert torch.equal(x, make_manifold(kind, 50, 2, 9, 0.1, generator=_gen()))
    assert not torch.equal(x, make_manifold(kind, 50, 2, 9, 0.1, generator=_gen(1)))


@pytest.mark.parametrize("kind", MANIFOLDS)
def test_local_dimension_is_the_one_asked_for(kind):
    dim = 2
    x = make_manifold(kind, 40_000, dim, 7, generator=_gen(), dtype=torch.float64)
    variances = []
    for i in range(5):
        nearest = x[(x - x[i]).square().sum(1).topk(60, largest=False).indices]
        variances.append(torch.linalg.svdvals(nearest - nearest.mean(0)).square())
    share = torch.stack(variances).mean(0)
    share = share / share.sum()
    assert share[:dim].sum() > 0.995
    assert share[dim - 1] > 0.1


@pytest.mark.parametrize("dim", [1, 3, 6])
@pytest.mark.parametrize("kind", ["linear", "gaussian", "cube"])
def test_flat_kinds_are_isometric_and_of_exact_rank(kind, dim):
    x, z = make_manifold(kind, 200, dim, 10, generator=_gen(), return_coordinates=True, dtype=torch.float64)
    assert torch.allclose(_distances(x, x), _distances(z, z), atol=1e-9)
    assert torch.linalg.matrix_rank(x - x.mean(0)) == dim


def test_variances_have_their_closed_forms():
    n, dim = 200_000, 3
    expected = {"linear": 1 / (dim + 2), "gaussian": 1.0, "cube": 1 / 12}
    for kind, variance in expected.items():
        x = make_manifold(kind, n, dim, 6, generator=_gen(), dtype=torch.float64)
        spectrum = torch.linalg.eigvalsh(torch.cov(x.T)).flip(0)
        assert torch.allclose(spectrum[:dim], torch.full((dim,), variance).double(), rtol=0.02)
        assert spectrum[dim:].abs().max() < 1e-12


def test_noise_adds_its_variance_in_every_direction():
    x = make_manifold("gaussian", 200_000, 2, 5, noise=0.3, generator=_gen(), dtype=torch.float64)
    spectrum = torch.linalg.eigvalsh(torch.cov(x.T))
    assert torch.allclose(spectrum, torch.tensor([0.09, 0.09, 0.09, 1.09, 1.09]).double(), rtol=0.02)


def test_sphere_has_its_radius_and_is_uniform():
    x = make_manifold("sphere", 100_000, 3, 4, curvature=2.0, generator=_gen(), dtype=torch.float64)
    assert torch.allclose(x.norm(dim=1), torch.tensor(0.5).double())
    assert x.mean(0).abs().max() < 5e-3
    assert torch.allclose(torch.cov(x.T), 0.25 / 4 * torch.eye(4).double(), atol=1e-3)


@pytest.mark.parametrize(("kind", "curvature"), [("torus", 0.5), ("swiss_roll", 2.0)])
def test_unrolled_kinds_keep_small_distances(kind, curvature):
    x, z = make_manifold(
        kind, 4000, 2, 8, curvature=curvature, generator=_gen(), return_coordinates=True, dtype=torch.float64
    )
    far = _distances(z, z)
    close = (far > 0) & (far < 0.03 / curvature)
    ratio = _distances(x, x)[close] / far[close]
    assert close.sum() > 50
    assert (ratio - 1).abs().max() < 2e-3


def test_swiss_roll_has_its_curvature_at_the_innermost_point_and_uniform_length():
    x, z = make_manifold(
        "swiss_roll", 200_000, 1, 2, curvature=2.0, generator=_gen(), return_coordinates=True, dtype=torch.float64
    )
    order = z[:, 0].argsort()
    # a chord of a curve of curvature k is shorter than the arc s by k^2 s^3 / 24
    a, b = x[order[0]], x[order[2000]]
    arc = z[order[2000], 0] - z[order[0], 0]
    assert torch.sqrt(24 * (arc - (a - b).norm()) / arc**3) == pytest.approx(2.0, rel=0.05)
    u = z[order, 0] / z.max()
    assert (u - torch.linspace(0, 1, len(u)).double()).abs().max() < 0.01


def test_paraboloid_follows_its_formula():
    x, z = make_manifold("paraboloid", 300, 2, 3, curvature=3.0, generator=_gen(), return_coordinates=True)
    flat = torch.cat([z, 1.5 * z.square().sum(1, keepdim=True)], 1)
    assert torch.allclose(_distances(x, x), _distances(flat, flat), atol=2e-3)
    plane = make_manifold("paraboloid", 300, 2, 3, curvature=0.0, generator=_gen(), dtype=torch.float64)
    assert torch.linalg.matrix_rank(plane) == 2


def test_moebius_edge_is_one_curve():
    x, z = make_manifold("moebius", 1000, 2, 3, generator=_gen(), return_coordinates=True, dtype=torch.float64)
    assert (z[:, 1].abs() <= 0.5).all()
    assert (z[:, 0] >= 0).all()
    assert (z[:, 0] <= 2 * math.pi).all()
    # after one turn the strip is glued upside down: coordinates (0, w) and (2 pi, -w) are the same place
    start = (z[:, 0] < 0.3).nonzero().flatten()
    end = (z[:, 0] > 2 * math.pi - 0.3).nonzero().flatten()
    apart = _distances(x[start], x[end])
    nearest = apart.argmin(1)
    assert torch.allclose(z[start, 1], -z[end[nearest], 1], atol=0.35)


def test_waves_keep_lengths_on_average_and_flatten_out():
    x, z = make_manifold(
        "curved", 300, 3, 4000, curvature=2.0, generator=_gen(), return_coordinates=True, dtype=torch.float64
    )
    far = _distances(z, z)
    close = (far > 0) & (far < 0.1)
    assert (_distances(x, x)[close] / far[close]).mean() == pytest.approx(1, abs=0.02)
    flat = make_manifold("curved", 50, 3, 7, curvature=0.0, generator=_gen(), dtype=torch.float64)
    assert torch.linalg.matrix_rank(flat - flat.mean(0)) == 3
    nearly = make_manifold("curved", 50, 3, 7, curvature=1e-6, generator=_gen(), dtype=torch.float64)
    assert torch.allclose(flat, nearly, atol=1e-4)


def test_frames_are_uniform():
    frames = torch.stack([random_frame(3, 1, g, torch.float64) for g in [_gen()] for _ in range(4000)])
    assert frames.mean(0).abs().max() < 0.05
    assert torch.allclose((frames @ frames.mT).mean(0), torch.eye(3).double() / 3, atol=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "cone"}, "one of linear"),
        ({"kind": "sphere", "dim": 3, "ambient": 3}, "needs ambient >= 4"),
        ({"kind": "torus", "dim": 3, "ambient": 5}, "needs ambient >= 6"),
        ({"kind": "moebius", "dim": 3}, "dim=2"),
        ({"kind": "sphere", "curvature": 0.0}, "positive curvature"),
        ({"kind": "linear", "noise": -1.0}, "noise"),
        ({"kind": "linear", "n": 0}, "n"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_manifold(**{"n": 10, **arguments})
