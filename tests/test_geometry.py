import math

import numpy as np
import pytest
import scipy.linalg
import torch

from companion import geometry
from companion.geometry import (
    cka,
    class_means,
    covariance_spectrum,
    effective_rank,
    pairwise_cosine,
    participation_ratio,
    random_orthonormal,
    scatter_matrices,
    simplex_etf,
    stable_rank,
    subspace_angles,
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(("n_classes", "dim"), [(2, 1), (2, 5), (3, 2), (10, 9), (10, 64)])
@pytest.mark.parametrize("turned", [False, True])
def test_simplex_etf(n_classes, dim, turned, generator, device):
    v = simplex_etf(n_classes, dim, generator=generator if turned else None, dtype=torch.float64, device=device)
    gram = v @ v.T
    expected = torch.full_like(gram, -1 / (n_classes - 1)).fill_diagonal_(1)
    assert v.shape == (n_classes, dim)
    assert v.device.type == device.type
    assert torch.allclose(gram, expected, atol=1e-12)
    assert torch.allclose(v.sum(0), torch.zeros_like(v[0]), atol=1e-12)
    assert simplex_etf(n_classes).dtype == torch.float32


@pytest.mark.parametrize("args", [(1, 3), (5, 3), (3, 0)])
def test_simplex_etf_that_does_not_fit(args):
    with pytest.raises(ValueError, match="expected"):
        simplex_etf(*args)


def test_random_orthonormal(generator):
    q = random_orthonormal(6, 3, generator=generator, dtype=torch.float64)
    assert torch.allclose(q.T @ q, torch.eye(3, dtype=torch.float64), atol=1e-12)
    # uniform: every entry of a random rotation has mean 0 and variance 1 / d
    many = torch.stack([random_orthonormal(4, generator=generator) for _ in range(2000)])
    assert many.mean(0).abs().max() < 0.05
    assert (many.square().mean(0) - 0.25).abs().max() < 0.03
    with pytest.raises(ValueError, match="at most"):
        random_orthonormal(2, 3)


def test_class_means_against_a_loop(device):
    x, y = normal(5000, 7).to(device), torch.arange(5000, device=device) % 5
    means, counts = class_means(x, y, n_classes=7)
    for c in range(5):
        assert torch.allclose(means[c], x[y == c].mean(0), atol=1e-12)
    assert counts.tolist() == [1000] * 5 + [0, 0]
    assert means[5:].isnan().all()
    assert means.device.type == device.type


def test_class_means_stay_exact_far_from_zero():
    x = 1e4 + normal(200_000, 2).float()
    means, _ = class_means(x, torch.zeros(200_000, dtype=torch.int64))
    assert torch.allclose(means[0].double(), x.double().mean(0), rtol=1e-7)
    assert means.dtype == torch.float32


def test_scatter_adds_up_to_the_covariance():
    x, y = normal(60, 4), torch.tensor([0] * 10 + [1] * 20 + [3] * 30)
    within, between = scatter_matrices(x + y[:, None], y)
    assert torch.allclose(within + between, torch.cov((x + y[:, None]).T, correction=0), atol=1e-12)
    expected = sum(torch.cov(x[y == c].T, correction=0) * (y == c).sum() / 60 for c in (0, 1, 3))
    assert torch.allclose(within, expected, atol=1e-12)


def test_balanced_scatter_ignores_class_sizes():
    x, y = normal(20, 3), torch.arange(20) % 2
    rows = torch.cat([torch.arange(20), *[torch.where(y == 1)[0]] * 3])  # class 1 four times
    for a, b in zip(scatter_matrices(x, y, balanced=True), scatter_matrices(x[rows], y[rows], balanced=True)):
        assert torch.allclose(a, b, atol=1e-12)
    assert torch.allclose(scatter_matrices(x, y)[0], scatter_matrices(x, y, balanced=True)[0], atol=1e-12)


def test_scatter_of_collapsed_features():
    v = simplex_etf(4, 6, dtype=torch.float64)
    within, between = scatter_matrices(v.repeat(5, 1), torch.arange(20) % 4)
    assert within.abs().max() < 1e-15
    assert torch.allclose(torch.linalg.eigvalsh(between)[-3:], torch.full((3,), 1 / 3, dtype=torch.float64))


def test_pairwise_cosine():
    x, y = normal(5, 3), normal(4, 3, seed=1)
    expected = torch.nn.functional.cosine_similarity(x[:, None], y[None], dim=-1)
    assert torch.allclose(pairwise_cosine(x, y), expected)
    assert torch.allclose(pairwise_cosine(x), pairwise_cosine(3 * x))
    assert pairwise_cosine(x).abs().max() <= 1
    with pytest.raises(ValueError, match="zeros"):
        pairwise_cosine([[0.0, 0.0], [1.0, 0.0]])
    with pytest.raises(ValueError, match="same dimension"):
        pairwise_cosine(x, y[:, :2])


@pytest.mark.parametrize("p", [1, 3, 6])
def test_subspace_angles_against_scipy(p):
    a, b = normal(8, 3), normal(8, p, seed=1)
    assert np.allclose(subspace_angles(a, b), scipy.linalg.subspace_angles(a.numpy(), b.numpy()), atol=1e-12)
    deficient = torch.cat([a, a[:, :1] + a[:, 1:2]], 1)
    assert torch.allclose(subspace_angles(deficient, b), subspace_angles(a, b), atol=1e-10)


@pytest.mark.parametrize("theta", [0.0, 1e-9, 1e-3, 0.7, 1.5, math.pi / 2])
def test_subspace_angles_of_a_known_rotation(theta):
    a = torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64)
    b = torch.tensor([[math.cos(theta)], [math.sin(theta)], [0.0]], dtype=torch.float64)
    assert math.isclose(subspace_angles(a, b).item(), theta, rel_tol=1e-6, abs_tol=1e-15)


def test_subspace_angles_refuse():
    with pytest.raises(ValueError, match="same space"):
        subspace_angles(normal(3, 2), normal(4, 2))
    with pytest.raises(ValueError, match="zeros"):
        subspace_angles(torch.zeros(3, 2), normal(3, 2))


def gram_cka(x, y, kernel, unbiased, sigmas=None):
    """The definition, with whole n x n matrices."""
    if kernel == "linear":
        k, l = x @ x.T, y @ y.T
    else:
        k, l = (torch.exp(-(torch.cdist(z, z) ** 2) / (2 * s**2)) for z, s in zip((x, y), sigmas))
    n = len(x)
    if not unbiased:
        h = torch.eye(n, dtype=x.dtype) - 1 / n

        def hsic(a, b):
            return torch.trace(a @ h @ b @ h)
    else:
        k, l = k.clone().fill_diagonal_(0), l.clone().fill_diagonal_(0)

        def hsic(a, b):
            return (a * b).sum() + a.sum() * b.sum() / (n - 1) / (n - 2) - 2 / (n - 2) * (a @ b).sum()

    return hsic(k, l) / (hsic(k, k) * hsic(l, l)).sqrt()


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("shape", [(40, 5, 7), (12, 30, 20)])
def test_cka_against_the_definition(shape, unbiased):
    n, d, e = shape
    x = normal(n, d) + 3
    y = normal(n, e, seed=1) + x[:, :1]
    assert torch.allclose(cka(x, y, unbiased=unbiased), gram_cka(x, y, "linear", unbiased), atol=1e-10)
    sigmas = [torch.pdist(z).median() * 0.7 for z in (x, y)]
    expected = gram_cka(x, y, "rbf", unbiased, sigmas)
    assert torch.allclose(cka(x, y, "rbf", unbiased=unbiased, bandwidth=0.7), expected, atol=1e-10)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_cka_invariances(kernel, unbiased, generator, device):
    x, y = normal(50, 6).to(device), normal(50, 4, seed=1).to(device)
    q = random_orthonormal(6, generator=generator, dtype=torch.float64, device=device)
    settings = {"kernel": kernel, "unbiased": unbiased}
    assert math.isclose(cka(x, 5 * x @ q + 2, **settings).item(), 1, abs_tol=1e-8)
    assert torch.allclose(cka(x, y, **settings), cka(y, x, **settings))
    assert torch.allclose(cka(x, y, **settings), cka(x @ q, 1e6 * y - 1, **settings), atol=1e-8)
    order = torch.randperm(50, generator=generator).to(device)
    assert torch.allclose(cka(x, y, **settings), cka(x[order], y[order], **settings))


def test_unbiased_cka_of_independent_features_is_zero_on_average():
    plain, debiased = (
        torch.stack([cka(normal(20, 50, seed=s), normal(20, 50, seed=s + 100), unbiased=u) for s in range(40)])
        for u in (False, True)
    )
    assert plain.mean() > 0.5
    assert debiased.mean().abs() < 3 * debiased.std() / math.sqrt(40)


def test_rbf_cka_in_chunks_is_the_same(monkeypatch):
    x, y = normal(30, 3), normal(30, 2, seed=1)
    whole = cka(x, y, "rbf")
    monkeypatch.setattr(geometry, "_chunks", lambda n, size: [(i, min(i + 7, n)) for i in range(0, n, 7)])
    assert torch.allclose(cka(x, y, "rbf"), whole, atol=1e-12)


def test_cka_refuses():
    x = normal(10, 3)
    with pytest.raises(ValueError, match="same samples"):
        cka(x, x[:-1])
    with pytest.raises(ValueError, match="constant"):
        cka(x, torch.ones(10, 2))
    with pytest.raises(ValueError, match="kernel"):
        cka(x, x, kernel="cosine")
    with pytest.raises(ValueError, match="duplicates"):
        cka(x, torch.tensor([[0.0]] * 9 + [[1.0]]), kernel="rbf")
    with pytest.raises(ValueError, match="x"):
        cka(x[:3], x[:3], unbiased=True)


@pytest.mark.parametrize("shape", [(50, 6), (6, 50), (5000, 3)])
def test_covariance_spectrum_against_numpy(shape, device):
    x = normal(*shape) * torch.arange(1, shape[1] + 1) + 100
    expected = np.sort(np.linalg.eigvalsh(np.cov(x.numpy().T)))[::-1][: min(shape)]
    values = covariance_spectrum(x.to(device))
    assert np.allclose(values.cpu(), expected, atol=1e-9)
    assert (values >= 0).all()


def test_counts_of_directions_have_their_closed_forms(generator):
    q = random_orthonormal(7, generator=generator, dtype=torch.float64)
    corners = torch.cat([torch.eye(7), -torch.eye(7)]).double()  # the same variance in 7 directions
    assert math.isclose(participation_ratio(corners @ q + 3).item(), 7, rel_tol=1e-9)
    assert math.isclose(effective_rank(corners @ q).item(), 7, rel_tol=1e-9)
    assert math.isclose(stable_rank(corners @ q).item(), 7, rel_tol=1e-9)
    line = normal(20, 1) @ normal(1, 7, seed=1)
    for count in (participation_ratio, effective_rank, stable_rank):
        assert math.isclose(count(line).item(), 1, rel_tol=1e-6)
        assert torch.allclose(count(corners * torch.arange(1, 8)), count(-5 * corners * torch.arange(1, 8)))
    sigma = torch.tensor([3.0, 1.0], dtype=torch.float64)
    assert math.isclose(stable_rank(sigma.diag()).item(), 10 / 9, rel_tol=1e-12)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert math.isclose(effective_rank(sigma.diag()).item(), math.exp(entropy), rel_tol=1e-12)


def test_center_takes_the_mean_out():
    x = normal(100, 5)
    for count in (effective_rank, stable_rank):
        assert torch.allclose(count(x + 50, center=True), count(x, center=True), atol=1e-8)
        assert count(x + 50) < 1.5


@pytest.mark.parametrize("count", [participation_ratio, effective_rank, stable_rank])
def test_zeros_have_no_rank(count):
    with pytest.raises(ValueError, match="zeros"):
        count(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="NaN"):
        count(torch.tensor([[math.nan, 1.0], [1.0, 2.0]]))


@pytest.mark.parametrize(
    "function",
    [
        participation_ratio,
        effective_rank,
        stable_rank,
        covariance_spectrum,
        pairwise_cosine,
        lambda x: cka(x, x[:, :2] ** 2),
        lambda x: cka(x, x[:, :2] ** 2, unbiased=True),
        lambda x: subspace_angles(x[:, :2], x[:, 2:]),
        lambda x: class_means(x, [0, 1, 2, 0, 1, 3])[0],
        lambda x: scatter_matrices(x, [0, 1, 2, 0, 1, 4]),
    ],
)
def test_gradients(function):
    x = normal(6, 3).requires_grad_()
    assert torch.autograd.gradcheck(function, (x,))
    result = function(x.detach().float())
    assert all(t.dtype == torch.float32 for t in (result if isinstance(result, tuple) else (result,)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    x, y = (30 * normal(64, 5, seed=seed, dtype=torch.float32).to(dtype) for seed in (0, 1))
    labels = torch.arange(64) % 3

    def measures(x, y):
        return [
            effective_rank(x),
            stable_rank(x, center=True),
            participation_ratio(20 * x),  # whose variances leave the range of float16
            covariance_spectrum(x),
            subspace_angles(x[:, :2], y[:, :3]),
            cka(x, y),
            cka(x, y, "rbf", unbiased=True),
            *scatter_matrices(x, labels),
        ]

    for short, long in zip(measures(x, y), measures(x.float(), y.float())):
        assert short.dtype == dtype
        assert torch.equal(short, long.to(dtype))


def test_dtypes_may_differ():
    x = normal(6, 2)
    assert torch.allclose(pairwise_cosine(x, x.float()), pairwise_cosine(x), atol=1e-6)
    assert torch.allclose(subspace_angles(x, x.float()), x.new_zeros(2), atol=1e-6)


def test_a_seed_is_a_generator():
    generator = torch.Generator().manual_seed(4)
    assert torch.equal(random_orthonormal(5, 2, generator=4), random_orthonormal(5, 2, generator=generator))
    generator = torch.Generator().manual_seed(4)
    assert torch.equal(simplex_etf(4, generator=4), simplex_etf(4, generator=generator))
