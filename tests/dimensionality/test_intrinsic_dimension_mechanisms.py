"""What dimension does to learning, density, search, spectra, samplers and forecasts, against closed forms."""

import math
import sys

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError
from sklearn.neighbors import KernelDensity
from sklearn.utils.estimator_checks import parametrize_with_checks

from companion.dimensionality import (
    FLOWS,
    HNSWIndex,
    MatrixNuclearNorm,
    RandomFeatureForecaster,
    best_bandwidth,
    column_norm,
    edm_denoise,
    edm_sample,
    edm_transform,
    effective_points,
    fit_power_law,
    flow_period,
    forecast_horizon,
    gaussian_twin,
    integrate_flows,
    label_sharpness,
    log_kde,
    lyapunov_exponents,
    matrix_entropy,
    matrix_nuclear_norm,
    moment_probe,
    nearest_neighbor_error,
    nested_mixture,
    norm_tail_ratio,
    nuclear_norm,
    recall_at_k,
    rem_thresholds,
    spanned_vectors,
)
from companion.neighbors import knn

# --- learning curves


def test_label_sharpness_of_a_linear_target_is_its_slope(generator, device):
    x = torch.randn(200, 1, generator=generator, dtype=torch.float64).to(device)
    assert float(label_sharpness(x, 3 * x[:, 0])) == pytest.approx(3)
    assert label_sharpness(x, 3 * x[:, 0]).device.type == device.type
    wide = torch.randn(100, 4, generator=generator)
    assert float(label_sharpness(wide, wide @ torch.ones(4))) <= 2  # the length of the gradient


def test_label_sharpness_scales_and_bounds(generator):
    x, y = torch.rand(300, 2, generator=generator), torch.randint(2, (300,), generator=generator)
    sharp = label_sharpness(x, y)
    assert float(label_sharpness(2 * x, y)) == pytest.approx(float(sharp) / 2)
    assert float(label_sharpness(x, 5 * y)) == pytest.approx(5 * float(sharp))
    few = [float(label_sharpness(x, y, n, generator=torch.Generator().manual_seed(0))) for n in (10, 1000)]
    assert few[0] <= few[1] <= float(sharp)
    assert float(label_sharpness(x, y, quantile=0.9)) < float(sharp)
    assert math.isinf(label_sharpness([[0.0], [0.0], [1.0]], [0, 1, 0]))
    with pytest.raises(ValueError, match="copies of one"):
        label_sharpness([[1.0], [1.0]], [0, 0])
    with pytest.raises(ValueError, match="quantile"):
        label_sharpness(x, y, quantile=1.5)


def test_power_law_recovers_itself():
    n = torch.tensor([100.0, 1000.0, 10000.0])
    law = fit_power_law(n, 3 * n**-0.25)
    assert float(law.exponent) == pytest.approx(-0.25, abs=1e-6)
    assert float(law.log_constant) == pytest.approx(math.log(3), abs=1e-5)
    with pytest.raises(ValueError, match="positive"):
        fit_power_law([1.0, 2.0], [0.0, 1.0])
    with pytest.raises(ValueError, match="different sizes"):
        fit_power_law([2.0, 2.0], [1.0, 1.0])


def test_nearest_neighbor_error_is_bounded_by_sharpness_times_distance(generator):
    x, q = torch.rand(300, 3, generator=generator), torch.rand(50, 3, generator=generator)
    slope = torch.tensor([1.0, 2.0, 2.0])  # of length 3
    distance = knn(q, x, k=1).distances.mean()
    assert nearest_neighbor_error(x, x @ slope, q, q @ slope) <= 3 * distance
    both = nearest_neighbor_error(x, torch.stack([x[:, 0], x[:, 1]], 1), q, torch.stack([q[:, 0], q[:, 1]], 1))
    each = [nearest_neighbor_error(x, x[:, i], q, q[:, i]) for i in (0, 1)]
    assert float(both) == pytest.approx(float(sum(each) / 2))
    with pytest.raises(ValueError, match="length"):
        nearest_neighbor_error(x, x[:5, 0], q, q[:, 0])


# --- density


def test_log_kde_agrees_with_scikit_learn(generator, device):
    x, y = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (20, 200))
    theirs = KernelDensity(bandwidth=0.7).fit(y.numpy()).score_samples(x.numpy())
    ours = log_kde(x.to(device), y.to(device), 0.7)
    np.testing.assert_allclose(ours.cpu().numpy(), theirs, rtol=1e-6)
    torch.testing.assert_close(log_kde(x, y, 0.7, chunk=3), log_kde(x, y, 0.7))


def test_log_kde_integrates_to_one_and_does_not_underflow(generator):
    y = torch.randn(50, 1, generator=generator, dtype=torch.float64)
    grid = torch.linspace(-8, 8, 2001, dtype=torch.float64)[:, None]
    assert float(torch.trapezoid(log_kde(grid, y, 0.3).exp(), grid[:, 0])) == pytest.approx(1, abs=1e-6)
    assert bool(torch.isfinite(log_kde(torch.full((1, 40), 30.0), torch.zeros(5, 40), 0.1)).all())


def test_effective_points_limits(generator):
    x, y = torch.randn(10, 5, generator=generator), torch.randn(100, 5, generator=generator)
    torch.testing.assert_close(effective_points(x, y, 1e4), torch.full((10,), 100.0), rtol=1e-3, atol=0)
    assert bool((effective_points(x, y, 1e-3) < 1.01).all())
    sweep = torch.stack([effective_points(x, y, h) for h in (0.1, 0.3, 1.0, 3.0)])
    assert bool((sweep.diff(dim=0) >= -1e-4).all())
    with pytest.raises(ValueError, match="h in"):
        effective_points(x, y, 0.0)
    with pytest.raises(ValueError, match="one number of features"):
        log_kde(x, y[:, :2], 1.0)


@pytest.mark.parametrize("alpha", [0.05, 0.35, 2.0])
def test_rem_thresholds_solve_the_entropy_crisis(alpha):
    h_g, h_clt = rem_thresholds(alpha)
    b = h_g**-2
    assert alpha - 0.5 * math.log(1 + b) + b / (2 * (1 + b) ** 2) == pytest.approx(0, abs=1e-9)
    assert h_clt == pytest.approx(math.sqrt(2) * h_g)


def test_rem_thresholds_limits():
    # many points: b is large and alpha = log(1 + b) / 2
    assert rem_thresholds(8.0).h_g == pytest.approx(math.exp(-8.0), rel=1e-3)
    # few points: s = alpha - 3 b^2 / 4 + ..., since the terms of first order cancel
    assert rem_thresholds(1e-6).h_g ** -2 == pytest.approx(math.sqrt(4e-6 / 3), rel=2e-2)
    with pytest.raises(ValueError, match="alpha"):
        rem_thresholds(0.0)


def test_best_bandwidth_narrows_with_data(generator):
    x, h = torch.randn(500, 1, generator=generator), torch.logspace(-2, 1, 20)
    few, many = (best_bandwidth(torch.randn(n, 1, generator=generator), x, h) for n in (20, 5000))
    assert many < few


# --- search


@pytest.fixture
def faiss():
    return pytest.importorskip("faiss")


@parametrize_with_checks([HNSWIndex(m=4, ef_construction=8, ef=8)])
def test_index_keeps_scikit_learns_contract(estimator, check):
    pytest.importorskip("faiss")
    check(estimator)


def test_index_with_generous_settings_is_exact(faiss, generator):
    x = torch.randn(500, 8, generator=generator)
    exact = knn(x[:50], x, k=5)
    for batch in (False, True):
        distances, indices = HNSWIndex(32, 200, 400, batch=batch).fit(x).kneighbors(x[:50], 5)
        assert float(recall_at_k(indices, exact.indices)) == 1
        np.testing.assert_allclose(distances[:, 1:], exact.distances[:, 1:].numpy(), rtol=1e-3)
    inner = HNSWIndex(32, 200, 400, "inner").fit(x).kneighbors(x[:50], 5)[1]
    assert float(recall_at_k(inner, knn(x[:50], x, k=5, metric="inner").indices)) > 0.95


def test_index_says_what_is_missing(monkeypatch, generator):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"feature-geometry\[search\]"):
        HNSWIndex().fit(torch.randn(10, 2, generator=generator))


def test_index_bad_input(faiss, generator):
    x = torch.randn(20, 2, generator=generator)
    with pytest.raises(NotFittedError):
        HNSWIndex().kneighbors(x)
    with pytest.raises(ValueError, match="at most 20"):
        HNSWIndex().fit(x).kneighbors(x, 21)
    with pytest.raises(ValueError, match="metric"):
        HNSWIndex(metric="cosine").fit(x)
    with pytest.raises(ValueError, match="NaN"):
        HNSWIndex().fit(x * torch.nan)
    with pytest.raises(ValueError, match="m to be"):
        HNSWIndex(m=1).fit(x)


def test_recall_at_k():
    assert float(recall_at_k([[3, 1, 2]], [[1, 2, 3]])) == 1
    assert float(recall_at_k([[-1, 1, -1]], [[1, 2, 3]])) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="one shape"):
        recall_at_k([[1, 2]], [[1]])
    with pytest.raises(TypeError, match="indices"):
        recall_at_k([[0.5]], [[1]])


def test_spanned_vectors(generator):
    x = spanned_vectors(300, 4, 20, generator)
    torch.testing.assert_close(x.norm(dim=1), torch.ones(300))
    assert int(torch.linalg.matrix_rank(x, rtol=1e-4)) == 4
    x, hard = nested_mixture(200, (2, 6), 20, generator=generator)
    assert int(torch.linalg.matrix_rank(x[~hard], rtol=1e-4)) == 2
    assert int(torch.linalg.matrix_rank(x, rtol=1e-4)) == 6
    x, hard = nested_mixture(200, (2, 6), 20, nested=False, generator=generator)
    assert int(torch.linalg.matrix_rank(x, rtol=1e-4)) == 8
    assert float((x[hard] @ x[~hard].T).abs().max()) < 1e-5


# --- spectra


def test_column_norm_bounds_the_nuclear_norm(device):
    draw = torch.Generator().manual_seed(1)
    for _ in range(200):
        n, d = (int(v) for v in torch.randint(2, 30, (2,), generator=draw))
        x = torch.randn(n, d, generator=draw, dtype=torch.float64).to(device)
        assert column_norm(x) >= nuclear_norm(x) - 1e-9
    q = torch.linalg.qr(torch.randn(20, 6, generator=draw, dtype=torch.float64)).Q * torch.arange(1.0, 7)
    assert float(column_norm(q)) == pytest.approx(float(nuclear_norm(q)))


def test_top_columns_are_no_bound(generator):
    x = torch.randn(64, 256, generator=generator)
    assert column_norm(x, 64) < nuclear_norm(x) < column_norm(x)


def test_nuclear_norm_ignores_rotation_and_column_norm_does_not(generator):
    x = torch.zeros(50, 20)
    x[:, 0] = 1
    q = torch.linalg.qr(torch.randn(20, 20, generator=generator)).Q
    assert float(nuclear_norm(x @ q)) == pytest.approx(float(nuclear_norm(x)), rel=1e-5)
    assert column_norm(x @ q) > 3 * column_norm(x)


def test_matrix_entropy_and_nuclear_norm_limits(generator):
    x = torch.randn(2000, 8, generator=generator)
    assert float(matrix_entropy(x)) == pytest.approx(math.log(8), abs=0.01)
    assert float(matrix_entropy(x.T)) == pytest.approx(math.log(8), abs=0.2)  # the smaller Gram matrix
    line = torch.randn(100, 1, generator=generator) @ torch.ones(1, 8)
    assert float(matrix_entropy(line)) == pytest.approx(0, abs=1e-3)
    assert float(matrix_nuclear_norm(x)) == pytest.approx(math.sqrt(8 / 2000), rel=0.01)
    one = torch.zeros(100, 8)
    one[:, 2] = torch.randn(100, generator=generator)
    assert float(matrix_nuclear_norm(one)) == pytest.approx(0.1, rel=1e-5)
    with pytest.raises(ValueError, match="mean row"):
        matrix_entropy(torch.ones(3, 2))


def test_metric_streams(generator):
    prompts = torch.randn(6, 10, 4, generator=generator)
    whole, first, second = MatrixNuclearNorm(), MatrixNuclearNorm(), MatrixNuclearNorm()
    whole.update(prompts)
    for prompt in prompts[:2]:
        first.update(prompt)
    second.update(prompts[2:])
    merged = (first.total + second.total) / (first.prompts + second.prompts)
    torch.testing.assert_close(whole.compute(), merged)
    assert float(whole.compute()) == pytest.approx(sum(float(matrix_nuclear_norm(p)) for p in prompts) / 6)
    with pytest.warns(UserWarning, match="compute"), pytest.raises(ValueError, match="at least one prompt"):
        MatrixNuclearNorm().compute()


# --- samplers


def _exact_normal(variance):
    """The optimal network for centred normal data: D(x) = v / (v + s^2) x."""

    def net(z):
        x, sigma = z[..., :-1], (4 * z[..., -1:]).exp()
        total = (sigma**2 + 1).sqrt()
        noisy = x * total
        best = variance / (variance + sigma**2) * noisy
        return (best - noisy / total**2) / (sigma / total)

    return net


def test_sampler_with_the_exact_denoiser_draws_the_normal(generator):
    for heun in (False, True):
        x = edm_sample(_exact_normal(0.25), (4000, 3), steps=100, heun=heun, generator=generator)
        assert float(x.std()) == pytest.approx(0.5, rel=0.05)
    noisy = torch.randn(5, 3, generator=generator)
    torch.testing.assert_close(edm_denoise(_exact_normal(0.25), noisy, 1.0), 0.2 * noisy, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="sigma_min"):
        edm_sample(_exact_normal(1.0), (2, 2), sigma_min=5.0, sigma_max=1.0)


def test_transform_has_unit_variance(generator):
    inputs, targets = edm_transform()(torch.randn(40_000, 2, generator=generator), None, generator)
    assert inputs.shape == (40_000, 3)
    assert float(inputs[:, :2].std()) == pytest.approx(1, rel=0.02)
    assert float(targets.std()) == pytest.approx(1, rel=0.02)


def test_norm_tail_ratio(generator):
    x = torch.randn(20_000, 64, generator=generator)
    assert float(norm_tail_ratio(x, 0.99)) < 1.25
    heavy = x / torch.rand(20_000, 1, generator=generator)
    assert float(norm_tail_ratio(heavy, 0.99)) > 10
    assert float(norm_tail_ratio(7 * x)) == pytest.approx(float(norm_tail_ratio(x)))
    with pytest.raises(ValueError, match="median norm"):
        norm_tail_ratio(torch.zeros(5, 2))


def test_gaussian_twin_matches_moments(generator):
    x = torch.rand(3000, 3, generator=generator) @ torch.randn(3, 5, generator=generator)  # rank three in five columns
    twin = gaussian_twin(x, n=60_000, generator=generator)
    torch.testing.assert_close(twin.mean(0), x.mean(0), atol=0.03, rtol=0)
    torch.testing.assert_close(twin.T.cov(), x.T.cov(), atol=0.04, rtol=0)
    labels = torch.arange(2).repeat_interleave(1500)
    shifted = x + 10 * labels[:, None]
    assert float(gaussian_twin(shifted, labels, generator=generator)[:1500].mean()) < 5
    with pytest.raises(ValueError, match="both"):
        gaussian_twin(x, labels, n=5)
    with pytest.raises(ValueError, match="two rows"):
        gaussian_twin(x[:3], [0, 0, 1])


def test_moment_probe(generator):
    ring = torch.randn(400, 2, generator=generator)
    y = (ring.norm(dim=1) > 1.2).long()
    assert moment_probe(ring[:200], y[:200], ring[200:], y[200:]) > 0.3
    assert moment_probe(ring[:200], y[:200], ring[200:], y[200:], quadratic=True) < 0.25
    with pytest.raises(ValueError, match="0 or 1"):
        moment_probe(ring, y + 1, ring, y)


# --- chaos


def test_flow_has_its_equations():
    x, y, z = 1.0, 2.0, 3.0
    g = torch.Generator().manual_seed(0)
    orbit = integrate_flows(["lorenz"], 2, per_period=100_000, transient=0, generator=g)[0, 0]
    velocity = (orbit[1] - orbit[0]) / (FLOWS["lorenz"].period / 100_000)
    x, y, z = orbit.mean(0).tolist()
    torch.testing.assert_close(
        velocity, torch.tensor([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z]).double(), rtol=1e-3, atol=1e-3
    )


def test_integration_is_of_fourth_order():
    ends = []
    for per_period in (25, 50, 100):
        g = torch.Generator().manual_seed(0)
        ends.append(
            integrate_flows(["roessler"], per_period + 1, per_period=per_period, transient=0, generator=g)[0, 0, -1]
        )
    coarse, fine = (ends[0] - ends[1]).norm(), (ends[1] - ends[2]).norm()
    assert 8 < float(coarse / fine) < 40


def test_table_periods_are_those_measured(generator):
    orbits = integrate_flows(list(FLOWS), 3000, per_period=40, generator=generator)[:, 0]
    for name, orbit in zip(FLOWS, orbits):
        assert flow_period(name, orbit) == pytest.approx(FLOWS[name].period, rel=0.15)
        assert float(orbit.abs().max()) < 100


def test_lyapunov_exponent_of_lorenz(generator):
    value = lyapunov_exponents(["lorenz"], 3000, starts=16, generator=generator) / FLOWS["lorenz"].period
    assert float(value) == pytest.approx(0.906, abs=0.05)


def test_flows_bad_input():
    with pytest.raises(ValueError, match="names among"):
        integrate_flows(["pendulum"], 10)
    with pytest.raises(ValueError, match="stay bounded"):
        integrate_flows(["lorenz"], 500, per_period=2)
    with pytest.raises(ValueError, match="shape"):
        flow_period("lorenz", torch.zeros(5, 2))


def test_forecaster_learns_a_rotation_exactly_enough(generator):
    t = torch.arange(600, dtype=torch.float64) * 0.1
    wave = torch.stack([t.sin(), t.cos()], 1)
    model = RandomFeatureForecaster(50, random_state=0).fit(wave[:400])
    path = model.forecast(wave[399:400], 150)
    assert float((path - wave[400:550]).abs().max()) < 0.05
    several = model.forecast(torch.stack([wave[399:400], wave[299:300]]), 10)
    torch.testing.assert_close(several[0], path[:10])
    with pytest.raises(ValueError, match="history"):
        model.forecast(wave[:3], 5)
    with pytest.raises(NotFittedError):
        RandomFeatureForecaster().forecast(wave[:1], 5)
    with pytest.raises(ValueError, match="constant"):
        RandomFeatureForecaster().fit(torch.ones(10, 2))


def test_forecast_horizon(generator):
    truth = torch.randn(3, 50, 2, generator=generator)
    assert forecast_horizon(truth, truth).tolist() == [50, 50, 50]
    off = truth.clone()
    off[1, 7] += 100
    off[2, 0] = torch.nan
    assert forecast_horizon(truth, off).tolist() == [50, 7, 0]
    with pytest.raises(ValueError, match="two"):
        forecast_horizon(truth, truth[:, :5])


@pytest.mark.parametrize("offset", [1e3, 1e5, 1e6])
def test_kernel_density_far_from_the_origin(offset):
    x = torch.randn(300, 10, generator=torch.Generator().manual_seed(0)) + offset
    for measure in (log_kde, effective_points):
        values, exact = measure(x[:20], x[20:], 2.0), measure(x[:20].double(), x[20:].double(), 2.0)
        torch.testing.assert_close(values.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = torch.randn(50, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    for measure in (
        nuclear_norm,
        lambda x: log_kde(y.to(x), x, 1.0),
        lambda x: effective_points(y.to(x), x, 1.0),
        lambda x: gaussian_twin(x, generator=torch.Generator().manual_seed(0)),
    ):
        short = measure(x)
        assert short.dtype == dtype
        torch.testing.assert_close(short, measure(x.float()).to(dtype), rtol=2e-2, atol=2e-2)


def test_a_seed_draws_frame_and_points_one_after_the_other():
    points = spanned_vectors(20, 2, 5, generator=1)
    assert torch.equal(points, spanned_vectors(20, 2, 5, generator=torch.Generator().manual_seed(1)))


def test_widths_that_differ_are_refused():
    wide, thin, y = torch.randn(6, 3), torch.randn(6, 1), torch.arange(6) % 2
    with pytest.raises(ValueError, match="expected x_train and x_test of one width, got 3 and 1"):
        moment_probe(wide, y, thin, y)
    with pytest.raises(ValueError, match="expected targets of one width, got 3 in training and 1"):
        nearest_neighbor_error(wide, wide, wide, thin)
