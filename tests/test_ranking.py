"""Ranking against closed forms, invariances, scikit-learn, and bad input."""

import math

import numpy as np
import pytest
import torch
from sklearn import metrics
from sklearn.isotonic import IsotonicRegression

from companion.ranking import (
    auroc,
    average_precision,
    bootstrap_interval,
    fpr_at_tpr,
    partial_auroc,
    precision_recall_curve,
    roc_convex_hull,
    roc_curve,
    weighted_quantile,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def draw(n=2000, ties=False, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.rand(n, generator=generator) < 0.3
    scores = torch.randn(n, generator=generator, dtype=torch.float64) + labels
    return (scores.mul(3).round() / 3 if ties else scores).to(dtype), labels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ties", [False, True])
def test_areas_equal_scikit_learn(device, dtype, ties):
    scores, labels = draw(ties=ties, dtype=dtype)
    s, y = scores.double().numpy(), labels.numpy()
    on_device = scores.to(device), labels.to(device)
    assert auroc(*on_device).item() == pytest.approx(metrics.roc_auc_score(y, s), abs=1e-12)
    assert average_precision(*on_device).item() == pytest.approx(metrics.average_precision_score(y, s), abs=1e-12)
    for max_fpr in (0.01, 0.2, 1.0):
        expected = metrics.roc_auc_score(y, s, max_fpr=max_fpr)
        assert partial_auroc(*on_device, max_fpr).item() == pytest.approx(expected, abs=1e-12)
    assert auroc(*on_device).device.type == device.type


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weighted_areas_equal_scikit_learn(device, dtype):
    scores, labels = draw(ties=True, dtype=dtype)
    weights = torch.rand(len(scores), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights[::7] = 0
    s, y, w = scores.double().numpy(), labels.numpy(), weights.numpy()
    on_device = scores.to(device), labels.to(device)
    w_device = weights.to(device)
    expected = metrics.roc_auc_score(y, s, sample_weight=w)
    assert auroc(*on_device, weights=w_device).item() == pytest.approx(expected, abs=1e-12)
    expected = metrics.average_precision_score(y, s, sample_weight=w)
    assert average_precision(*on_device, weights=w_device).item() == pytest.approx(expected, abs=1e-12)


def test_whole_weights_repeat_samples():
    scores, labels = draw(300, ties=True)
    weights = torch.randint(1, 4, (300,), generator=torch.Generator().manual_seed(2))
    repeated = scores.repeat_interleave(weights), labels.repeat_interleave(weights)
    for measure in (auroc, average_precision, fpr_at_tpr):
        assert measure(scores, labels, weights=weights).item() == pytest.approx(measure(*repeated).item(), abs=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ties", [False, True])
def test_curves_equal_scikit_learn(device, dtype, ties):
    scores, labels = draw(500, ties=ties, dtype=dtype)
    s, y = scores.double().numpy(), labels.numpy()
    fpr, tpr, thresholds = roc_curve(scores.to(device), labels.to(device))
    expected = metrics.roc_curve(y, s, drop_intermediate=False)
    for ours, theirs in zip((fpr, tpr, thresholds.double()), expected, strict=True):
        np.testing.assert_allclose(ours.cpu().numpy(), theirs, rtol=0, atol=1e-12)
    assert thresholds.dtype == dtype
    precision, recall, _ = precision_recall_curve(scores.to(device), labels.to(device))
    their_precision, their_recall, _ = metrics.precision_recall_curve(y, s)
    np.testing.assert_allclose(precision.cpu().numpy(), their_precision[-2::-1], atol=1e-12)
    np.testing.assert_allclose(recall.cpu().numpy(), their_recall[-2::-1], atol=1e-12)


def test_auroc_is_the_share_of_ordered_pairs(device):
    scores, labels = draw(200, ties=True)
    above = scores[labels][:, None] - scores[~labels][None, :]
    expected = ((above > 0).double() + 0.5 * (above == 0).double()).mean()
    assert auroc(scores.to(device), labels.to(device)).item() == pytest.approx(expected.item(), abs=1e-15)


def test_closed_forms():
    assert auroc([0, 1, 2, 3], [0, 0, 1, 1]) == 1
    assert auroc([0, 1, 2, 3], [1, 1, 0, 0]) == 0
    assert auroc([5.0] * 9, [0, 1, 1] * 3) == 0.5
    assert average_precision([5.0] * 9, [0, 1, 1] * 3).item() == pytest.approx(2 / 3, abs=1e-15)
    assert average_precision([0, 1, 2, 3], [0, 0, 1, 1]) == 1
    assert partial_auroc([0, 1, 2, 3], [0, 0, 1, 1], 0.5, standardize=False) == 0.5
    # two unit normals one apart: Phi(1 / sqrt 2)
    generator = torch.Generator().manual_seed(0)
    s = torch.randn(400_000, generator=generator)
    y = torch.arange(400_000) % 2
    assert auroc(s + y, y).item() == pytest.approx(0.5 * (1 + math.erf(0.5)), abs=3e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_invariances(dtype):
    scores, labels = draw(ties=True, dtype=dtype)
    shuffled = torch.randperm(len(scores), generator=torch.Generator().manual_seed(1))
    for measure in (auroc, average_precision, fpr_at_tpr):
        value = measure(scores, labels)
        assert measure(scores[shuffled], labels[shuffled]) == value
        assert measure(scores.exp(), labels) == value
        assert measure(scores * 4, labels) == value
    assert auroc(-scores, labels).item() == pytest.approx(1 - auroc(scores, labels).item(), abs=1e-15)
    assert auroc(scores, ~labels).item() == pytest.approx(1 - auroc(scores, labels).item(), abs=1e-15)


def test_signed_zeros_tie_and_infinities_rank(device):
    assert auroc(torch.tensor([0.0, -0.0], device=device), [1, 0]) == 0.5
    scores = torch.tensor([-math.inf, -3e38, -1e-45, 1e-45, 3e38, math.inf], device=device)
    assert auroc(scores, [0, 0, 0, 1, 1, 1]) == 1
    assert roc_curve(scores, [0, 0, 0, 1, 1, 1]).thresholds[1:].tolist() == scores.flip(0).tolist()


def test_the_input_is_left_alone():
    scores, labels = draw(100)
    copy = scores.clone()
    auroc(scores, labels)
    roc_convex_hull(scores, labels)
    assert torch.equal(scores, copy)
    assert auroc(scores.clone().requires_grad_(), labels) == auroc(scores, labels)


def test_fpr_at_tpr():
    scores = torch.arange(40.0)
    labels = torch.arange(40) >= 20
    labels[0], labels[21] = True, False  # one positive at the bottom, one negative among the positives
    assert fpr_at_tpr(scores, labels, 0.95) == 1 / 20
    assert fpr_at_tpr(scores, labels, 0.96) == 1
    fpr, tpr, _ = roc_curve(*draw(ties=True))
    assert fpr_at_tpr(*draw(ties=True), 0.8) == fpr[tpr >= 0.8].min()


@pytest.mark.parametrize("ties", [False, True])
def test_hull_is_the_curve_of_isotonic_regression(device, ties):
    scores, labels = draw(400, ties=ties)
    hull = roc_convex_hull(scores.to(device), labels.to(device))
    fitted = IsotonicRegression(increasing=True).fit_transform(scores.numpy(), labels.numpy().astype(float))
    fpr, tpr, _ = metrics.roc_curve(labels.numpy(), fitted.round(9), drop_intermediate=False)
    np.testing.assert_allclose(hull.fpr.cpu().numpy(), fpr, atol=1e-12)
    np.testing.assert_allclose(hull.tpr.cpu().numpy(), tpr, atol=1e-12)


def test_hull_is_concave_and_above_the_curve():
    scores, labels = draw(3000)
    hull, curve = roc_convex_hull(scores, labels), roc_curve(scores, labels)
    slopes = torch.diff(hull.tpr) / torch.diff(hull.fpr)
    assert bool((slopes[1:] < slopes[:-1]).all())
    assert (hull.fpr[0], hull.tpr[0], hull.fpr[-1], hull.tpr[-1]) == (0, 0, 1, 1)
    above = np.interp(curve.fpr.numpy(), hull.fpr.numpy(), hull.tpr.numpy())
    assert (above >= curve.tpr.numpy() - 1e-12).all()
    assert roc_convex_hull([1, 2, 3, 4], [1, 1, 0, 0]).fpr.tolist() == [0, 1]
    assert roc_convex_hull([1, 2, 3, 4], [0, 0, 1, 1]).tpr.tolist() == [0, 1, 1]
    weights = torch.ones(3000)
    assert torch.equal(roc_convex_hull(scores, labels, weights=weights).fpr, hull.fpr)


def test_quantiles_equal_numpy(device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(101, generator=generator).mul(4).round()
    weights = torch.randint(0, 5, (101,), generator=generator)
    q = torch.linspace(0, 1, 41, dtype=torch.float64)
    ours = weighted_quantile(x.to(device), q, weights.to(device)).cpu().numpy()
    repeated = x.repeat_interleave(weights).numpy()
    np.testing.assert_array_equal(ours, np.quantile(repeated, q.numpy(), method="inverted_cdf"))
    ours = weighted_quantile(x.to(device), q).cpu().numpy()
    np.testing.assert_array_equal(ours, np.quantile(x.numpy(), q.numpy(), method="inverted_cdf"))


def test_quantile_levels_that_round_badly():
    x = torch.arange(1.0, 101.0)
    levels = torch.arange(1, 101, dtype=torch.float64) / 100
    assert torch.equal(weighted_quantile(x, levels), x)
    assert weighted_quantile([1.0, math.inf], 0.9) == math.inf
    assert weighted_quantile([1.0, 2.0], [[0.1, 0.9]]).shape == (1, 2)


def test_bootstrap_interval_covers_the_mean():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(60):
        x = torch.randn(60, generator=generator)
        estimate, low, high = bootstrap_interval(torch.mean, x, n_resamples=200, level=0.9, generator=generator)
        assert estimate == x.mean()
        covered += bool(low < 0 < high)
    assert 47 <= covered <= 60  # 0.9 * 60 = 54, three standard deviations below


def test_bootstrap_width_is_that_of_theory_and_repeats():
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    a = bootstrap_interval(lambda v: torch.stack([v.mean(), v.std()]), x, n_resamples=400, generator=3)
    b = bootstrap_interval(lambda v: torch.stack([v.mean(), v.std()]), x, n_resamples=400, generator=3)
    assert all(torch.equal(u, v) for u, v in zip(a, b, strict=True))
    width = a.high - a.low
    theory = 2 * 1.96 * x.std() / 2000**0.5 * torch.tensor([1.0, 0.5**0.5])
    torch.testing.assert_close(width, theory, rtol=0.15, atol=0)


def test_bootstrap_of_a_ranking(device):
    scores, labels = (t.to(device) for t in draw(300))
    estimate, low, high = bootstrap_interval(auroc, scores, labels, n_resamples=100, generator=0)
    assert low < estimate < high
    few = torch.zeros(30, dtype=torch.bool)
    few[0] = True
    with pytest.raises(ValueError, match=r"both classes.*stratify"):
        bootstrap_interval(auroc, torch.randn(30), few, n_resamples=50, generator=0)
    interval = bootstrap_interval(auroc, torch.randn(30), few, n_resamples=50, generator=0, stratify=few)
    assert 0 <= interval.low <= interval.high <= 1


@pytest.mark.parametrize("measure", [auroc, average_precision, roc_curve, roc_convex_hull, fpr_at_tpr])
def test_bad_rankings(measure):
    for labels, says in [
        ([1, 1, 1], "both classes, got 3 times 1"),
        ([0, 0, 0], "both classes, got 3 times 0"),
        ([0, 1], "expected 3 labels, one per sample, got 2"),
        ([0, 1, 2], "to be 0 or 1"),
    ]:
        with pytest.raises(ValueError, match=says):
            measure([0.1, 0.2, 0.3], labels)
    with pytest.raises(ValueError, match="without NaN, got 1 of 3"):
        measure([0.1, math.nan, 0.3], [0, 1, 1])
    with pytest.raises(ValueError, match=r"shape \(n,\)"):
        measure([[0.1, 0.3]], [0, 1])
    with pytest.raises(ValueError, match="got 0 for label 1"):
        measure([0.1, 0.2, 0.3], [0, 1, 1], weights=[1, 0, 0])
    with pytest.raises(ValueError, match="weights"):
        measure([0.1, 0.2, 0.3], [0, 1, 1], weights=[1, -1, 1])
    with pytest.raises(ValueError, match="weights has 2"):
        measure([0.1, 0.2, 0.3], [0, 1, 1], weights=[1, 1])


def test_bad_levels():
    with pytest.raises(ValueError, match="max_fpr"):
        partial_auroc([0.1, 0.2], [0, 1], 0)
    with pytest.raises(ValueError, match="tpr"):
        fpr_at_tpr([0.1, 0.2], [0, 1], 1.5)
    with pytest.raises(ValueError, match=r"q in \[0, 1\]"):
        weighted_quantile([1.0, 2.0], 1.5)
    with pytest.raises(ValueError, match="not all 0"):
        weighted_quantile([1.0, 2.0], 0.5, [0, 0])
    with pytest.raises(ValueError, match="at least one array"):
        bootstrap_interval(torch.mean)
    with pytest.raises(ValueError, match="one length"):
        bootstrap_interval(torch.mean, [1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="level"):
        bootstrap_interval(torch.mean, [1.0, 2.0], level=1)


def test_scores_beyond_the_digits_of_a_float32():
    scores = [2**24, 2**24 + 1, 2**24 + 2, 2**24 + 3]
    assert auroc(scores, [0, 1, 0, 1]) == 0.75
    assert weighted_quantile(scores, 0.5) == 2**24 + 1
