"""Estimators of intrinsic dimension: known manifolds, invariances, recorded values of other libraries, bad input."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.utils.estimator_checks import parametrize_with_checks

from companion import dimensionality, geometry
from companion.data import make_manifold
from companion.dimensionality import (
    MLE,
    CorrelationDimension,
    DimensionEnsemble,
    LocalPCA,
    TwoNN,
    decimation,
    mle_dimension,
    twonn,
)

SMALL = [
    TwoNN(random_state=0, n_bootstrap=5),
    MLE(n_neighbors=5, random_state=0, n_bootstrap=5),
    LocalPCA(n_neighbors=5, random_state=0, n_bootstrap=5),
    CorrelationDimension(fractions=(0.1, 0.6), random_state=0, n_bootstrap=5),
    DimensionEnsemble([("twonn", TwoNN()), ("mle", MLE(n_neighbors=5))], random_state=0, n_bootstrap=5),
]
ALL = [TwoNN, MLE, LocalPCA, CorrelationDimension, DimensionEnsemble]


@pytest.mark.filterwarnings("ignore:expected distinct points:UserWarning")  # one check repeats rows
@parametrize_with_checks(SMALL)
def test_scikit_learn_contract(estimator, check):
    check(estimator)


def oracle_sets():
    """The sets on which the recorded values were made, from NumPy's frozen generator."""
    r = np.random.RandomState(0)
    cube = r.rand(400, 3)
    z = r.randn(500, 8)
    sphere = z / np.linalg.norm(z, axis=1, keepdims=True)
    t = 1.5 * np.pi * (1 + 2 * r.rand(600))
    roll = np.stack([t * np.cos(t), 21 * r.rand(600), t * np.sin(t)], 1)
    return {"cube": cube, "sphere": sphere, "roll": roll, "normal": r.randn(500, 20)}


# scikit-dimension 0.5.0: skdim.id.TwoNN(), TwoNN(method="mle"), MLE() with n_neighbors=20, and the mean of
# lPCA().fit_pw with n_neighbors=50; DADApy 0.3.4: Data(X).compute_id_2NN(), and with algorithm="ml", mu_fraction=1.
RECORDED = {
    "cube": (2.888982840799627, 2.914281273251132, 2.665747558473152, 3.0, 2.8889828403819915, 2.985680319324805),
    "sphere": (6.977950875998413, 6.903176158529374, 6.435515495299587, 7.766, 6.977950875999534, 6.9007861480826325),
    "roll": (
        1.9213128486193167,
        1.9322978305723335,
        1.9452210248820452,
        2.6666666666666665,
        1.921312848368017,
        1.9018593419847338,
    ),
    "normal": (
        15.26258929834165,
        15.319069676717048,
        13.925324575169558,
        19.898,
        15.26258929819857,
        15.353030239677466,
    ),
}


@pytest.mark.parametrize("name", RECORDED)
def test_agrees_with_scikit_dimension_and_dadapy(name):
    x = oracle_sets()[name]
    linear, censored, mle, pca, dadapy, dadapy_mle = RECORDED[name]
    assert TwoNN(n_bootstrap=0).fit(x).dimension_ == pytest.approx(linear, rel=1e-6)
    assert TwoNN(n_bootstrap=0).fit(x).dimension_ == pytest.approx(dadapy, rel=1e-6)
    assert TwoNN(method="mle", n_bootstrap=0).fit(x).dimension_ == pytest.approx(censored, rel=1e-6)
    # DADApy divides by the sum of n logs, the unbiased estimate by n - 1 of them: 1 / n apart
    assert float(twonn(x, 0.0, "mle")) == pytest.approx(dadapy_mle, rel=1e-3)
    assert MLE(n_bootstrap=0).fit(x).dimension_ == pytest.approx(mle, rel=1e-6)
    assert LocalPCA(n_neighbors=50, n_bootstrap=0).fit(x).dimension_ == pytest.approx(pca, rel=1e-3)


def test_agrees_with_scikit_dimension_when_it_is_installed():
    skdim = pytest.importorskip("skdim")
    x = oracle_sets()["sphere"]
    assert TwoNN(n_bootstrap=0).fit(x).dimension_ == pytest.approx(skdim.id.TwoNN().fit(x).dimension_, rel=1e-3)
    assert MLE(n_bootstrap=0).fit(x).dimension_ == pytest.approx(skdim.id.MLE().fit(x).dimension_, rel=1e-3)


def test_twonn_is_the_slope_of_the_closed_form(device):
    # ratios that are exact quantiles of P(mu <= m) = 1 - m^-d lie on the line, whichever share is left out
    d, n = 4.0, 1000
    f = torch.arange(1, n + 1, dtype=torch.float64, device=device) / (n + 1)
    log_ratio = -torch.log1p(-f) / d
    for discard in (0.1, 0.5):
        estimate = dimensionality.intrinsic_dimension.ratios.twonn_from_ratios(log_ratio, discard, "linear")
        assert float(estimate) == pytest.approx(d, rel=2e-2)
    assert estimate.device.type == device.type


def test_mle_by_hand():
    # distances to the three neighbours of the first point: 1, 2, 4
    x = torch.tensor([[0.0], [1.0], [-2.0], [4.0]])
    expected = 2 / (np.log(4 / 1) + np.log(4 / 2))
    assert float(mle_dimension(x, k=3, reduce="none")[0]) == pytest.approx(expected)


def test_invariant_to_rotation_shift_scale_and_constant_columns(generator, device):
    x = make_manifold("sphere", 400, 3, generator=generator, dtype=torch.float64).to(device)
    frame = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=generator)).Q.to(device)
    moved = torch.cat([1e3 * x @ frame + 7, torch.full((400, 2), 3.0, dtype=x.dtype, device=device)], 1)
    for make in (TwoNN, MLE, lambda **k: LocalPCA(50, **k), CorrelationDimension):
        a, b = (make(n_bootstrap=0, random_state=0).fit(v).dimension_ for v in (x, moved))
        assert a == pytest.approx(b, rel=1e-6)
    assert float(twonn(x)) == pytest.approx(float(twonn(moved)), rel=1e-6)
    assert twonn(x).device.type == device.type


@pytest.mark.parametrize(
    ("kind", "dim"), [("linear", 1), ("sphere", 2), ("torus", 3), ("swiss_roll", 2), ("curved", 4)]
)
def test_finds_low_dimensions(kind, dim, generator):
    x = make_manifold(kind, 2000, dim, ambient=12, generator=generator, dtype=torch.float64)
    for estimator in (TwoNN(n_bootstrap=0), MLE(10, n_bootstrap=0), CorrelationDimension(n_bootstrap=0)):
        assert estimator.fit(x).dimension_ == pytest.approx(dim, rel=0.12)
    if kind != "torus":
        assert LocalPCA(20, "largest", 0.1, n_bootstrap=0).fit(x).dimension_ == pytest.approx(dim, rel=0.25)


def test_underestimates_high_dimensions_in_order(generator):
    x = make_manifold("linear", 2000, 20, generator=generator)
    dims = {e: e(n_bootstrap=0, random_state=0).fit(x).dimension_ for e in (TwoNN, MLE, CorrelationDimension)}
    assert max(dims[CorrelationDimension], dims[MLE]) < dims[TwoNN] < 18
    assert min(dims.values()) > 13


def test_pointwise_values_combine_to_the_whole(generator):
    x = make_manifold("sphere", 500, 3, generator=generator, dtype=torch.float64)
    mle = MLE(n_bootstrap=0).fit(x)
    assert 1 / np.mean(1 / mle.dimension_pw_) == pytest.approx(mle.dimension_)
    pca = LocalPCA(30, n_bootstrap=0).fit(x)
    assert pca.dimension_pw_.mean() == pytest.approx(pca.dimension_)
    two = TwoNN(0.0, "mle", n_bootstrap=0).fit(x)
    assert two.dimension_ == pytest.approx(499 / (1 / two.dimension_pw_).sum())
    gp = CorrelationDimension(n_bootstrap=0, n_references=None).fit(x)
    assert np.nanmean(gp.dimension_pw_) == pytest.approx(gp.dimension_, rel=0.5)
    assert all(len(e.dimension_pw_) == 500 for e in (mle, pca, two, gp))


def test_pointwise_dimension_tells_a_line_from_a_cube(generator):
    line = torch.zeros(500, 3)
    line[:, 0] = 5 + torch.rand(500, generator=generator)
    x = torch.cat([line, torch.rand(500, 3, generator=generator)])
    pw = MLE(10, n_bootstrap=0).fit(x).dimension_pw_
    assert np.median(pw[:500]) < 1.4
    assert np.median(pw[500:]) > 2.2


def test_local_pca_criteria(generator):
    plane = torch.rand(300, 2, generator=generator) @ torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
    assert LocalPCA(40, n_bootstrap=0).fit(plane).dimension_ == 2
    assert LocalPCA(40, "variance", n_bootstrap=0).fit(plane).dimension_ == pytest.approx(2, abs=0.1)
    assert 1.5 < LocalPCA(40, "participation", n_bootstrap=0).fit(plane).dimension_ <= 2
    wide = torch.cat([plane, torch.zeros(300, 60)], 1)  # more columns than neighbours: the other Gram matrix
    assert LocalPCA(40, n_bootstrap=0).fit(wide).dimension_ == 2


def test_correlation_dimension_counts_pairs(generator):
    x = torch.rand(300, 2, generator=generator, dtype=torch.float64)
    e = CorrelationDimension((0.01, 0.1), n_bootstrap=0, n_references=None).fit(x)
    distances = torch.cdist(x, x)
    distances.fill_diagonal_(torch.inf)
    direct = [(distances <= r).double().sum().item() / (300 * 299) for r in e.radii_]
    np.testing.assert_allclose(e.correlation_, direct, atol=2 / (300 * 299))
    slope = np.polyfit(np.log(e.radii_), np.log(e.correlation_), 1)[0]
    assert e.dimension_ == pytest.approx(slope)


def test_theiler_window_leaves_out_neighbours_in_time(generator):
    # one slow random walk through ten dimensions: its neighbours in space are its neighbours in time
    x = torch.randn(2000, 10, generator=generator, dtype=torch.float64).cumsum(0)
    x = torch.nn.functional.interpolate(x.T[None], scale_factor=4, mode="linear")[0].T[:4000]
    settings = {"fractions": (2e-4, 2e-3), "n_bootstrap": 0, "n_references": 500, "random_state": 0}
    without = CorrelationDimension(**settings).fit(x).dimension_
    assert without < 1.7
    assert CorrelationDimension(theiler=100, **settings).fit(x).dimension_ > without + 1


def test_bootstrap_interval(generator):
    x = make_manifold("cube", 800, 2, generator=generator, dtype=torch.float64)
    for estimator in (TwoNN(random_state=1), MLE(random_state=1), CorrelationDimension(random_state=1)):
        low, high = estimator.fit(x).dimension_interval_
        assert low < estimator.dimension_ < high
        assert len(estimator.dimension_draws_) == 100
        again = type(estimator)(random_state=1).fit(x)
        assert again.dimension_interval_ == (low, high)
    few = TwoNN(random_state=1).fit(x[:100]).dimension_interval_
    many = TwoNN(random_state=1).fit(x).dimension_interval_
    assert few[1] - few[0] > many[1] - many[0]
    assert TwoNN(n_bootstrap=0).fit(x).dimension_interval_ is None


def test_twonn_interval_has_the_width_of_theory(generator):
    # the rate of n exponentials has standard error d / sqrt(n)
    x = make_manifold("torus", 3000, 2, generator=generator, dtype=torch.float64)
    e = TwoNN(0.0, "mle", n_bootstrap=300, random_state=0).fit(x)
    assert e.dimension_draws_.std() == pytest.approx(e.dimension_ / 3000**0.5, rel=0.2)


def test_ensemble(generator):
    x = make_manifold("sphere", 600, 3, generator=generator, dtype=torch.float64)
    e = DimensionEnsemble(random_state=0).fit(x)
    assert e.dimension_ == pytest.approx(np.median(list(e.dimensions_.values())))
    assert e.spread_ == (min(e.dimensions_.values()), max(e.dimensions_.values()))
    assert e.dimensions_["twonn"] == TwoNN(n_bootstrap=0).fit(x).dimension_
    assert e.dimensions_["local_pca"] == pytest.approx(LocalPCA(n_bootstrap=0).fit(x).dimension_)
    assert e.dimension_interval_[0] < e.dimension_ < e.dimension_interval_[1]
    assert e.dimension_pw_.shape == (600,)
    with pytest.raises(ValueError, match="list of"):
        DimensionEnsemble([]).fit(x)


def test_duplicates_are_refused_or_dropped(generator):
    x = torch.rand(200, 2, generator=generator, dtype=torch.float64)
    doubled = torch.cat([x, x[:50]])
    for make in (TwoNN, lambda **k: MLE(10, **k), lambda **k: CorrelationDimension((0.01, 0.2), **k)):
        with pytest.raises(ValueError, match="distinct points"):
            make(n_bootstrap=0, duplicates="error").fit(doubled)
        with pytest.warns(UserWarning, match="counted once"):
            warned = make(n_bootstrap=0, random_state=0).fit(doubled)
        dropped = make(n_bootstrap=0, duplicates="drop", random_state=0).fit(doubled)
        assert dropped.dimension_ == pytest.approx(
            make(n_bootstrap=0, random_state=0).fit(x.unique(dim=0)).dimension_, rel=1e-9
        )
        assert warned.dimension_ == dropped.dimension_
        assert dropped.dimension_pw_.shape == (250,)
        np.testing.assert_array_equal(dropped.dimension_pw_[:50], dropped.dimension_pw_[200:])
    with pytest.raises(ValueError, match="distinct points"):
        twonn(doubled)
    with pytest.raises(ValueError, match="duplicates"):
        TwoNN(duplicates="ignore").fit(x)
    with pytest.raises(ValueError, match="copies"):
        LocalPCA(5, n_bootstrap=0, duplicates="error").fit(torch.ones(20, 2))
    with pytest.raises(ValueError, match="1 distinct sample"):
        TwoNN(duplicates="drop").fit(torch.ones(20, 2))


@pytest.mark.parametrize("make", ALL)
def test_bad_input(make, generator):
    x = torch.rand(150, 3, generator=generator)
    bad = x.clone()
    bad[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN|finite"):
        make().fit(bad)
    with pytest.raises(ValueError, match="NaN"):
        make().fit(bad.numpy())
    with pytest.raises(ValueError, match="sample"):
        make().fit(x[:2])
    with pytest.raises(ValueError, match="level"):
        make(level=1.0).fit(x)
    with pytest.raises(ValueError, match="n_bootstrap"):
        make(n_bootstrap=-1).fit(x)
    assert isinstance(make(n_bootstrap=0, random_state=0).fit(x).dimension_pw_, np.ndarray)


def test_bad_settings(generator):
    x = torch.rand(50, 3, generator=generator)
    with pytest.raises(ValueError, match=r"n_neighbors|neighbours, got 50"):
        MLE(50).fit(x)
    with pytest.raises(ValueError, match="neighbours, got 50"):
        LocalPCA(100).fit(x)
    for estimator, match in (
        (TwoNN(1.0), "discard_fraction"),
        (TwoNN(0.0), "discard_fraction"),
        (TwoNN(method="fit"), "linear"),
        (MLE(1), "n_neighbors"),
        (MLE(reduce="sum"), "reduce"),
        (LocalPCA(10, "gap"), "criterion"),
        (LocalPCA(10, threshold=0.0), "threshold"),
        (CorrelationDimension((0.2, 0.1)), "fractions"),
        (CorrelationDimension(0.1), "fractions"),
        (CorrelationDimension(n_radii=1), "n_radii"),
        (CorrelationDimension(theiler=100), "Theiler"),
    ):
        with pytest.raises(ValueError, match=match):
            estimator.fit(x)
    with pytest.raises(TypeError, match="n_neighbors"):
        MLE(2.5).fit(x)
    with pytest.raises(ValueError, match="ties"):
        TwoNN(n_bootstrap=0).fit(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    with pytest.raises(ValueError, match="reduce"):
        mle_dimension(x, reduce="sum")
    with pytest.raises(ValueError, match="more points"):
        mle_dimension(x[:5], k=5)


def test_mle_is_differentiable(generator):
    x = torch.rand(40, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: mle_dimension(v, k=5), (x,))
    mle_dimension(x, k=5).backward()
    # scaling changes nothing, so the gradient has no radial part
    assert float((x.grad * x.detach()).sum()) == pytest.approx(0, abs=1e-9)


def test_decimation_sees_noise_at_small_scales_only(generator):
    x = make_manifold("torus", 4096, 1, ambient=5, noise=0.005, generator=generator, dtype=torch.float64)
    profile = decimation(x, 6, generator=generator)
    assert profile.sizes.tolist() == [4096, 2048, 1024, 512, 256, 128, 64]
    assert bool((profile.scales.diff() > 0).all())
    assert profile.dimensions[0] > 2.5
    assert profile.dimensions[-1] < 1.4
    with pytest.raises(ValueError, match="halvings"):
        decimation(x[:10], 2)


def test_reexports_are_those_of_geometry():
    assert dimensionality.participation_ratio is geometry.participation_ratio
    assert dimensionality.effective_rank is geometry.effective_rank


def _peak_megabytes(n, dim, memory):
    code = (
        "import resource, torch; from companion.dimensionality import TwoNN, MLE\n"
        "torch.set_num_threads(1)\n"
        f"x = torch.rand({n}, {dim}, generator=torch.Generator().manual_seed(0))\n"
        f"MLE(10, n_bootstrap=2, memory='{memory}').fit(x[:500])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"d = MLE(10, n_bootstrap=2, memory='{memory}').fit(x).dimension_\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, d)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kilobytes, dimension = done.stdout.split()
    return int(kilobytes) / (1024**2 / 1000 if sys.platform == "darwin" else 1000), float(dimension)


def test_memory_is_bounded():
    # all pairs would take 1.6 GB
    megabytes, dimension = _peak_megabytes(20_000, 4, "32MB")
    assert megabytes < 150
    assert dimension == pytest.approx(4, rel=0.1)


@pytest.mark.slow
def test_memory_is_bounded_at_200_000_points():
    # all pairs would take 160 GB
    megabytes, dimension = _peak_megabytes(200_000, 4, "256MB")
    assert megabytes < 1000
    assert dimension == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("estimator", [TwoNN(), MLE(), LocalPCA(30), DimensionEnsemble()], ids=repr)
def test_half_precision_is_computed_in_float32(estimator, dtype):
    x = torch.randn(600, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    estimator = estimator.set_params(random_state=0, n_bootstrap=0, duplicates="drop")
    assert estimator.fit(x).dimension_ == estimator.fit(x.float()).dimension_


def test_functions_measure_distances_of_half_precision_in_float32():
    x = torch.randn(600, 6, generator=torch.Generator().manual_seed(0)).bfloat16().unique(dim=0)
    for measure in (twonn, mle_dimension, lambda x: decimation(x, 2, generator=0).dimensions):
        short = measure(x)
        assert short.dtype == torch.bfloat16
        assert torch.equal(short, measure(x.float()).bfloat16())


def test_correlation_dimension_refuses_a_lattice():
    corners = (torch.randn(200, 6, generator=torch.Generator().manual_seed(4)) > 0).float()
    with pytest.raises(ValueError, match="two radii"):
        CorrelationDimension(duplicates="drop", random_state=0).fit(corners)
