"""Scores of scores against brute force, closed forms, other implementations and bad input."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import linalg, ndimage, stats
from sklearn.metrics import average_precision_score, f1_score, r2_score, roc_auc_score

from companion import anomaly
from companion.anomaly import (
    AUPIMO,
    FlowDeform,
    FrechetDistance,
    atomic_mistakes,
    auprc_as_expectation,
    aupro,
    auroc_as_expectation,
    auth_pct,
    chamfer,
    compare_paired,
    ct_score,
    cumulative_precision,
    discovery_report,
    frechet_at_infinity,
    frechet_distance,
    gaussian_frechet,
    hausdorff,
    kernel_distance,
    make_candidates,
    pimo_curves,
    prdc,
    repair_greedily,
    rolling_error,
    sliced_wasserstein,
    surface_measure,
)
from companion.ranking import partial_auroc
from tests.processes import run_two


def make_maps(n=12, size=24, ties=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    maps = torch.randn(n, size, size, generator=g)
    masks = torch.zeros(n, size, size, dtype=torch.bool)
    for i in range(n // 2, n):
        row, column = torch.randint(2, size - 8, (2,), generator=g).tolist()
        masks[i, row : row + 5, column : column + 4] = True
        masks[i, 0, 0] = i % 2 == 0  # a second region in some
    maps[masks] += 2
    return (maps * 2).round() / 2 if ties else maps, masks


def brute_aupimo(maps, masks, low, high):
    """Integrate the recall at every reachable false-positive rate, step by step."""
    bad = masks.flatten(1).any(1)
    normal = maps[~bad].flatten().double()
    out = []
    for m, d in zip(maps, masks):
        if not d.any():
            out.append(float("nan"))
            continue
        scores, area = m[d].double(), 0.0
        for k in range(len(normal) + 1):  # at most k normal pixels may raise an alarm
            left, right = max(k / len(normal), low), min((k + 1) / len(normal), high)
            if right <= left:
                continue
            alarms = (normal[None] >= scores[:, None]).sum(1)
            area += (alarms <= k).double().mean().item() * math.log(right / left)
        out.append(area / math.log(high / low))
    return torch.tensor(out, dtype=torch.float64)


# ---- AUPIMO ----


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("bounds", [(1e-3, 1e-2), (0.01, 0.5), (3e-4, 0.7)])
@pytest.mark.filterwarnings("ignore:.*out of reach")
def test_aupimo_is_exact(ties, bounds, device):
    maps, masks = make_maps(8, 16, ties)
    metric = AUPIMO(bounds).to(device)
    metric.update(maps.to(device), masks.to(device))
    expected = brute_aupimo(maps, masks, *bounds)
    torch.testing.assert_close(metric.compute().cpu(), expected, atol=1e-12, rtol=0, equal_nan=True)
    assert metric.compute().device.type == device.type


def grid_aupimo(maps, masks, low, high, n_thresholds):
    """The common way: thresholds on a grid, trapezoids over the logarithm of the false-positive rate."""
    bad = masks.flatten(1).any(1)
    normal = maps[~bad].flatten().sort().values
    grid = torch.linspace(normal[0], normal[-1], n_thresholds)
    fpr = (len(normal) - torch.searchsorted(normal, grid)).double() / len(normal)
    start, stop = int((fpr - high).abs().argmin()), int((fpr - low).abs().argmin())
    out = []
    for m, d in zip(maps[bad], masks[bad]):
        scores = m[d].sort().values
        tpr = (len(scores) - torch.searchsorted(scores, grid)).double() / len(scores)
        x = fpr[start : stop + 1].log().flip(0)
        out.append(torch.trapezoid(tpr[start : stop + 1].flip(0), x) / math.log(high / low))
    return torch.stack(out)


def test_aupimo_is_the_limit_of_a_fine_grid():
    maps, masks = make_maps(40, 64, seed=3)
    low, high = 1e-3, 1e-2
    metric = AUPIMO((low, high))
    metric.update(maps, masks)
    ours = metric.compute()[20:]
    coarse, fine = (grid_aupimo(maps, masks, low, high, n) for n in (1000, 100_000))
    assert (fine - ours).abs().max() < 2e-3  # the grid's ends miss L and U by part of a step
    assert (fine - ours).abs().max() < (coarse - ours).abs().max()


def test_aupimo_agrees_with_anomalib():
    functional = pytest.importorskip("anomalib.metrics.pimo.functional")
    maps, masks = make_maps(40, 64, seed=3)
    metric = AUPIMO((1e-3, 1e-2))
    metric.update(maps, masks)
    theirs = functional.aupimo_scores(maps, masks.int(), num_thresholds=30_000, fpr_bounds=(1e-3, 1e-2))[4]
    torch.testing.assert_close(metric.compute()[20:], theirs[20:].double(), atol=3e-3, rtol=0)


def test_aupimo_does_not_see_increasing_maps_or_the_order_of_images():
    maps, masks = make_maps(seed=1)
    values = []
    for m in (maps, maps.exp(), maps.double() ** 3):
        metric = AUPIMO((1e-3, 1e-1))
        metric.update(m, masks)
        values.append(metric.compute())
    assert torch.equal(values[0].nan_to_num(), values[1].nan_to_num())
    assert torch.equal(values[0].nan_to_num(), values[2].nan_to_num())
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    metric = AUPIMO((1e-3, 1e-1))
    metric.update(maps[order], masks[order])
    torch.testing.assert_close(metric.compute(), values[0][order], equal_nan=True)


def test_aupimo_limits():
    _, masks = make_maps()
    for value, expected in ((1.0, 1.0), (-1.0, 0.0), (0.0, 0.0)):  # perfect, inverted, constant
        metric = AUPIMO((1e-3, 1e-2))
        metric.update(value * masks.float(), masks)
        assert torch.equal(metric.compute()[6:], torch.full((6,), expected, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_aupimo_streams_merges_and_forgets_what_cannot_count():
    maps, masks = make_maps(40, 32, seed=2)
    whole = AUPIMO((1e-3, 1e-2))
    whole.update(maps, masks)
    small = AUPIMO((1e-3, 1e-2), max_pixels=20 * 32 * 32)
    for part in torch.arange(40).split(1):
        small.update(maps[part], masks[part, None])
    assert sum(len(part) for part in small.normal) <= 3 * small.kept < 20 * 32 * 32 / 10
    assert torch.equal(small.compute()[20:], whole.compute()[20:])
    first, second = AUPIMO((1e-3, 1e-2)), AUPIMO((1e-3, 1e-2))
    second.update(maps[:25], masks[:25])
    first.update(maps[25:], masks[25:])
    first.merge_state(second)  # the images of the other metric come first
    assert torch.equal(first.compute()[20:], whole.compute()[20:])
    with pytest.raises(ValueError, match="max_pixels"):
        small.update(maps[:1], masks[:1])
    small.reset()
    with pytest.raises(ValueError, match="with and without"):
        small.compute()


def test_aupimo_of_two_processes_is_that_of_one(tmp_path):
    script = """
from companion.anomaly import AUPIMO, FrechetDistance
maps, masks = torch.load(f"{folder}/maps.pt", weights_only=True)
metric = AUPIMO((1e-3, 1e-2))
metric.update(maps[rank * 10 : rank * 10 + 10], masks[rank * 10 : rank * 10 + 10])
x = torch.randn(2, 60, 3, generator=torch.Generator().manual_seed(0))
distance = FrechetDistance(3)
distance.update(x[0, rank * 30 : rank * 30 + 30], real=True)
distance.update(x[1, rank * 30 : rank * 30 + 30], real=False)
out = {"aupimo": metric.compute(), "frechet": distance.compute()}
"""
    maps, masks = make_maps(20, 32)  # all normal images on one process, all defects on the other
    torch.save([maps, masks], tmp_path / "maps.pt")
    metric = AUPIMO((1e-3, 1e-2))
    metric.update(maps, masks)
    x = torch.randn(2, 60, 3, generator=torch.Generator().manual_seed(0))
    for file in run_two(script, tmp_path):
        out = torch.load(file, weights_only=True)
        torch.testing.assert_close(out["aupimo"], metric.compute(), equal_nan=True)
        torch.testing.assert_close(out["frechet"], frechet_distance(x[0], x[1]))


def test_aupimo_refuses_what_it_cannot_score():
    maps, masks = make_maps()
    metric = AUPIMO()
    for bad_maps, bad_masks, message in (
        (maps[:, :-1], masks, "one shape"),
        (maps * torch.nan, masks, "without NaN"),
        (maps, maps, "masks of 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            metric.update(bad_maps, bad_masks)
    metric.update(maps, masks)
    with pytest.raises(ValueError, match="as before"):
        metric.update(maps[:, 1:], masks[:, 1:])
    with pytest.raises(ValueError, match="at least 10000 normal pixels"):
        metric.compute()
    other = AUPIMO()
    other.update(maps[:, 1:], masks[:, 1:])
    with pytest.raises(ValueError, match="one size"):
        other.merge_state(metric)
    with pytest.raises(ValueError, match="low < high"):
        AUPIMO((1e-3, 1e-4))
    rough = AUPIMO((1e-5, 1e-2))
    rough.update(maps, masks)
    with pytest.warns(UserWarning, match="out of reach"):
        rough.compute()


def test_pimo_curves_integrate_to_aupimo_and_count_by_hand():
    maps, masks = make_maps(seed=4)
    fpr = torch.logspace(-2, -1, 20_001, dtype=torch.float64)
    curves = pimo_curves(maps, masks, fpr)
    assert curves.recall.shape == (6, 20_001)
    assert bool((curves.recall.diff(dim=1) >= 0).all())
    metric = AUPIMO((1e-2, 1e-1))
    metric.update(maps, masks)
    area = torch.trapezoid(curves.recall, fpr.log(), dim=1) / math.log(10)
    torch.testing.assert_close(area, metric.compute()[6:], atol=1e-4, rtol=0)
    normal = maps[:6].flatten()
    for i in range(6):
        scores = maps[6 + i][masks[6 + i]]
        found = ((normal[None] >= scores[:, None]).double().mean(1) <= 0.05).double().mean()
        assert pimo_curves(maps, masks, [0.05]).recall[i, 0] == found
    with pytest.raises(ValueError, match="with and without"):
        pimo_curves(maps[6:], masks[6:])


# ---- AUPRO ----


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("max_fpr", [0.05, 0.3, 1.0])
def test_aupro_is_a_weighted_partial_auroc(ties, max_fpr, device):
    maps, masks = make_maps(ties=ties, seed=5)
    weights = torch.ones(masks.shape, dtype=torch.float64)
    for i in range(len(masks)):
        labels, n = ndimage.label(masks[i].numpy(), np.ones((3, 3)))
        for r in range(1, n + 1):
            weights[i][torch.from_numpy(labels == r)] = 1 / (labels == r).sum()
    expected = partial_auroc(maps.flatten(), masks.flatten(), max_fpr, standardize=False, weights=weights.flatten())
    got = aupro(maps.to(device), masks.to(device), max_fpr)
    torch.testing.assert_close(got.cpu(), expected / max_fpr, atol=1e-12, rtol=0)


def test_aupro_by_thresholds_and_components():
    maps, masks = make_maps(seed=6)
    regions = []
    for i in range(len(masks)):
        labels, n = ndimage.label(masks[i].numpy(), np.ones((3, 3)))
        regions += [maps[i][torch.from_numpy(labels == r)] for r in range(1, n + 1)]
    normal, points = maps[~masks], [(0.0, 0.0)]
    for t in maps.flatten().sort(descending=True).values:
        points.append(
            ((normal >= t).double().mean().item(), np.mean([(r >= t).double().mean().item() for r in regions]))
        )
    x, y = np.array(points).T
    inside = x <= 0.3
    end = np.interp(0.3, x, y)
    expected = np.trapezoid(np.append(y[inside], end), np.append(x[inside], 0.3)) / 0.3
    assert float(aupro(maps, masks)) == pytest.approx(expected, abs=1e-12)


def test_aupro_counts_regions_not_pixels_and_knows_corners():
    maps = torch.zeros(1, 8, 8)
    masks = torch.zeros(1, 8, 8, dtype=torch.bool)
    masks[0, :4, :4] = True
    masks[0, 7, 7] = True
    maps[0, :4, :4] = 1
    found_large = aupro(maps, masks, 1.0)
    assert float(found_large) == pytest.approx(0.5 + 0.5 * 0.5)  # the small region ties with all the rest
    corner = torch.zeros(1, 4, 4, dtype=torch.bool)
    corner[0, 0, 0] = corner[0, 1, 1] = corner[0, 1, 2] = True
    score = torch.zeros(1, 4, 4)
    score[0, 0, 0] = 1
    eight, four = aupro(score, corner, 1.0), aupro(score, corner, 1.0, connectivity=4)
    assert float(eight) == pytest.approx(1 / 3 + 2 / 3 * 0.5)
    assert float(four) == pytest.approx(1 / 2 + 1 / 2 * 0.5)
    with pytest.raises(ValueError, match="connectivity"):
        aupro(score, corner, connectivity=6)
    with pytest.raises(ValueError, match="inside and outside"):
        aupro(score, torch.zeros_like(corner))


# ---- paired comparison ----


def test_compare_paired_is_wilcoxon_and_pairs():
    g = torch.Generator().manual_seed(0)
    hard = torch.rand(80, generator=g)
    a, b = hard + 0.02 + 0.01 * torch.randn(80, generator=g), hard
    result = compare_paired(a, b, generator=1)
    assert result.p_value == pytest.approx(
        stats.wilcoxon((a.double() - b.double()).numpy(), method="asymptotic").pvalue
    )
    assert result.low < 0.02 < result.high
    assert result.low > 0.015
    assert result.difference == pytest.approx(float((a.double() - b.double()).mean()))
    assert result.wins + result.losses + result.ties == 80
    swapped = compare_paired(b, a, generator=1)
    assert swapped.difference == -result.difference
    assert swapped.p_value == result.p_value
    assert stats.ttest_ind(a, b).pvalue > 0.1  # unpaired, the images' difficulty drowns it
    small = compare_paired(a[:9], b[:9], generator=1)
    assert small.p_value == pytest.approx(stats.wilcoxon((a - b)[:9].numpy(), method="exact").pvalue)


def test_compare_paired_leaves_normal_images_out_and_counts_ties():
    nan = torch.nan
    result = compare_paired([nan, 1.0, 1.0, 0.5], [nan, 1.0, 1.0, 0.2], generator=0)
    assert (result.wins, result.ties, result.losses) == (1, 2, 0)
    same = compare_paired([0.3, 0.4], [0.3, 0.4], generator=0)
    assert same.p_value == 1
    assert same.low == same.high == 0
    with pytest.raises(ValueError, match="in one only"):
        compare_paired([nan, 1.0, 0.2], [0.1, 1.0, 0.1])
    with pytest.raises(ValueError, match="one length"):
        compare_paired([0.1, 1.0], [0.1, 1.0, 0.1])
    with pytest.raises(ValueError, match="at least 2"):
        compare_paired([0.1], [0.1])


def test_compare_paired_weighs_categories_alike():
    a = torch.tensor([1.0] * 90 + [0.0] * 10)
    b = torch.tensor([0.9] * 90 + [0.3] * 10)
    categories = ["carpet"] * 90 + ["screw"] * 10
    result = compare_paired(a, b, categories, generator=0)
    assert result.difference == pytest.approx((0.1 - 0.3) / 2)
    assert [c.category for c in result.categories] == ["carpet", "screw"]
    assert result.categories[1].difference == pytest.approx(-0.3)
    assert result.low_new < 0 < result.high_new  # two categories that disagree say nothing about a third
    assert result.p_value == 1.0
    assert result.categories[0].p_value < 1e-6  # while within each category there is no doubt
    assert compare_paired(a, b, generator=0).difference > 0  # pooled, the large category wins


# ---- AUROC and average precision ----


@pytest.mark.parametrize("decimals", [1, 2, 8])
def test_expectations_are_the_areas_with_ties(decimals):
    g = torch.Generator().manual_seed(0)
    labels = torch.rand(3000, generator=g) < 0.05
    scores = (torch.randn(3000, generator=g).double() + 1.2 * labels).round(decimals=decimals)
    assert float(auroc_as_expectation(scores, labels)) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    ap = average_precision_score(labels, scores)
    assert float(auprc_as_expectation(scores, labels)) == pytest.approx(ap, abs=1e-12)
    assert float(anomaly.average_precision(scores, labels)) == pytest.approx(ap, abs=1e-12)
    assert float(anomaly.auroc(scores, labels)) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    with pytest.raises(ValueError, match="both classes"):
        auprc_as_expectation(scores, torch.zeros(3000))


def test_gains_are_what_a_swap_adds():
    g = torch.Generator().manual_seed(1)
    labels = (torch.rand(60, generator=g) < 0.3).numpy()
    scores = -np.arange(60.0)
    mistakes = atomic_mistakes(labels)
    assert len(mistakes.rank) == int((~labels[:-1] & labels[1:]).sum())
    for rank, equal, gain in zip(*mistakes):
        fixed, r = labels.copy(), int(rank)
        fixed[[r - 1, r]] = fixed[[r, r - 1]]
        assert roc_auc_score(fixed, scores) - roc_auc_score(labels, scores) == pytest.approx(float(equal), abs=1e-12)
        change = average_precision_score(fixed, scores) - average_precision_score(labels, scores)
        assert change == pytest.approx(float(gain), abs=1e-12)


def test_greedy_repairs_climb_and_end_in_a_perfect_order():
    g = torch.Generator().manual_seed(2)
    labels = torch.rand(40, generator=g) < 0.3
    scores = torch.randn(40, generator=g) + labels
    done = repair_greedily(scores, labels, 10_000, generator=0)
    assert bool(labels[done.order][: int(labels.sum())].all())
    inversions = int((scores[labels][:, None] < scores[~labels][None]).sum())
    assert len(done.repaired) == inversions  # bubble sort
    assert bool(labels[done.repaired].all())
    gains = []
    for prefer in ("auroc", "average_precision"):
        order = repair_greedily(scores, labels, 5, prefer, generator=0).order
        gains.append(average_precision_score(labels[order], -np.arange(40)))
    assert gains[1] >= gains[0] > average_precision_score(labels, scores)
    with pytest.raises(ValueError, match="distinct"):
        repair_greedily([1.0, 1.0], [0, 1], 1)
    with pytest.raises(ValueError, match="prefer"):
        repair_greedily(scores, labels, 1, "f1")


# ---- discovery ----


def test_discovery_report_is_scikit_learns_numbers(device):
    energy = make_candidates(2000, generator=0).energy
    predicted = energy + 0.05 * torch.randn(2000, generator=torch.Generator().manual_seed(1))
    report = discovery_report(energy.to(device), predicted.to(device))
    stable, called = (energy <= 0).numpy(), (predicted <= 0).numpy()
    assert float(report.f1) == pytest.approx(f1_score(stable, called))
    assert float(report.r2) == pytest.approx(r2_score(energy.double(), predicted.double()))
    assert float(report.fpr) == pytest.approx(called[~stable].mean())
    assert float(report.precision) == pytest.approx(stable[called].mean())
    assert float(report.daf) == pytest.approx(stable[called].mean() / stable.mean())
    perfect = discovery_report(energy, energy)
    assert float(perfect.daf) == pytest.approx(1 / float(perfect.prevalence))
    blind = discovery_report(energy, torch.full_like(energy, -1.0))
    assert float(blind.daf) == pytest.approx(1)
    nothing = discovery_report(energy, torch.ones_like(energy))
    assert bool(nothing.precision.isnan())
    assert float(nothing.f1) == 0
    for bad in (energy[:-1], energy * torch.nan):
        with pytest.raises(ValueError, match="expected"):
            discovery_report(energy, bad)
    with pytest.raises(ValueError, match="both sides"):
        discovery_report(energy.abs() + 1, energy)


def test_discovery_of_gaussian_errors_has_a_closed_form():
    n = 200_000
    g = torch.Generator().manual_seed(0)
    true = torch.randn(n, generator=g, dtype=torch.float64)
    predicted = true + torch.randn(n, generator=g, dtype=torch.float64)
    report = discovery_report(true, predicted)
    # two Gaussians of correlation rho: P(both below 0) = 1/4 + arcsin(rho) / 2 pi
    both = 0.25 + math.asin(1 / math.sqrt(2)) / (2 * math.pi)
    assert float(report.precision) == pytest.approx(both / 0.5, abs=5e-3)
    assert float(report.mae) == pytest.approx(math.sqrt(2 / math.pi), abs=5e-3)


def test_cumulative_precision_and_rolling_error():
    g = torch.Generator().manual_seed(0)
    true = torch.randn(500, generator=g)
    predicted = true + torch.randn(500, generator=g)
    k = [1, 10, 77, 500]
    best = predicted.argsort()
    expected = [float((true[best[:i]] <= 0.1).double().mean()) for i in k]
    assert cumulative_precision(true, predicted, k, threshold=0.1).tolist() == pytest.approx(expected)
    at = torch.linspace(-2, 2, 9)
    got = rolling_error(true, predicted, at, window=0.3)
    for place, value in zip(at, got):
        near = (true - place).abs() <= 0.15
        assert float(value) == pytest.approx(float((predicted - true)[near].abs().mean()), rel=1e-4)
    assert bool(rolling_error(true, predicted, [99.0]).isnan())
    with pytest.raises(ValueError, match="k from 1 to"):
        cumulative_precision(true, predicted, 501)


def test_candidates_share_one_landscape():
    a, b = make_candidates(3000, generator=0), make_candidates(3000, stable=0.4, generator=0)
    assert torch.equal(a.x, b.x)
    torch.testing.assert_close((a.energy - b.energy).std(), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert float((a.energy <= 0).float().mean()) == pytest.approx(0.15, abs=0.02)
    with pytest.raises(ValueError, match="stable"):
        make_candidates(10, stable=1.0)


# ---- sets of features ----


def spd(d, seed, rank=None):
    a = torch.randn(d, rank or d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T


def test_gaussian_frechet_has_closed_forms(device):
    mean, zero = (
        torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        torch.zeros(5).double(),
    )
    a, b = torch.tensor([1.0, 4.0, 9.0, 0.0, 2.0]).double(), torch.tensor([4.0, 1.0, 0.0, 0.0, 2.0]).double()
    expected = mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum()  # commuting covariances
    rotation = torch.linalg.qr(spd(5, 1)).Q
    got = gaussian_frechet(mean.to(device), (rotation * a @ rotation.T).to(device), zero, rotation * b @ rotation.T)
    torch.testing.assert_close(got.cpu(), expected, atol=1e-7, rtol=1e-7)
    s, t = spd(5, 2), spd(5, 3)
    root = linalg.sqrtm(s.numpy() @ t.numpy()).real
    expected = float(s.trace() + t.trace() - 2 * np.trace(root))
    assert float(gaussian_frechet(zero, s, zero, t)) == pytest.approx(expected, rel=1e-9)
    assert float(gaussian_frechet(zero, s, zero, s)) == pytest.approx(0, abs=1e-12 * float(s.trace()))


def test_frechet_survives_missing_rank():
    zero = torch.zeros(30).double()
    s, t = spd(30, 4, rank=3), spd(30, 5, rank=2)
    assert float(gaussian_frechet(zero, s, zero, s)) == pytest.approx(0, abs=1e-10 * float(s.trace()))
    low = torch.linalg.eigh(s)
    root = low.eigenvectors * low.eigenvalues.clamp_min(0).sqrt() @ low.eigenvectors.T
    middle = torch.linalg.eigvalsh(root @ t @ root).clamp_min(0).sqrt().sum()
    assert float(gaussian_frechet(zero, s, zero, t)) == pytest.approx(
        float(s.trace() + t.trace() - 2 * middle), rel=1e-6
    )
    x = torch.randn(2, 20, 50, generator=torch.Generator().manual_seed(6)).double()
    few = frechet_distance(x[0], x[1])  # 40 samples in 50 dimensions: the other way round
    full = gaussian_frechet(x[0].mean(0), x[0].T.cov(), x[1].mean(0), x[1].T.cov())
    torch.testing.assert_close(few, full, rtol=1e-6, atol=1e-6)
    assert float(frechet_distance(x[0], x[0])) < 1e-10


def test_frechet_distance_moves_with_shift_and_scale():
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=torch.float64)
    assert float(frechet_distance(x, x + shift)) == pytest.approx(float(shift.square().sum()))
    assert float(frechet_distance(x - x.mean(0), 3 * (x - x.mean(0)))) == pytest.approx(4 * float(x.T.cov().trace()))
    far = x.float() + 1e4  # the mean must not eat the variance
    assert float(frechet_distance(far, 2 * (far - 1e4) + 1e4)) == pytest.approx(
        float(frechet_distance(x, 2 * x)), rel=1e-2
    )
    with pytest.raises(ValueError, match="width"):
        frechet_distance(x, x[:, :2])


def test_frechet_bias_and_its_extrapolation():
    g = torch.Generator().manual_seed(0)
    plain, at_infinity = [], []
    for _ in range(20):
        x = torch.randn(2, 200, 8, generator=g)
        plain.append(float(frechet_distance(x[0], x[1])))
        at_infinity.append(float(frechet_at_infinity(x[0], x[1], generator=g)))
    assert np.mean(plain) > 0.15
    assert abs(np.mean(at_infinity)) < 0.25 * np.mean(plain)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_frechet_metric_streams_merges_and_encodes(device):
    x = torch.randn(2, 300, 6, generator=torch.Generator().manual_seed(0)).to(device)
    expected = frechet_distance(x[0], x[1])
    metric, other = FrechetDistance(6).to(device), FrechetDistance(6).to(device)
    for part in torch.arange(300).split(70):
        metric.update(x[0, part], real=True)
    metric.update(x[1, :100], real=False)
    other.update(x[1, 100:], real=False)
    metric.merge_state(other)
    torch.testing.assert_close(metric.compute(), expected)
    encoder = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Dropout(0.5)).to(device)
    coded = FrechetDistance(4, encoder).to(device)
    coded(x[0], real=True)
    coded(x[1], real=False)
    with torch.no_grad():
        torch.testing.assert_close(coded.compute(), frechet_distance(encoder(x[0]), encoder(x[1])))
    coded.reset()
    with pytest.raises(ValueError, match="sample"):
        coded.compute()
    with pytest.raises(TypeError, match="FrechetDistance"):
        metric.merge_state(AUPIMO())


@pytest.mark.parametrize("kernel", ["polynomial", "rbf"])
def test_kernel_distance_is_unbiased(kernel, device, monkeypatch):
    x = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def of(a, b):
        return kernel_distance(a.to(device), b.to(device), kernel, bandwidth=1.5).cpu()

    def k(a, b):
        return (a @ b.T / 3 + 1) ** 3 if kernel == "polynomial" else (-(torch.cdist(a, b) ** 2) / (2 * 1.5**2)).exp()

    off = ~torch.eye(7, dtype=torch.bool)
    expected = k(x[0], x[0])[off].mean() + k(x[1], x[1])[off].mean() - 2 * k(x[0], x[1]).mean()
    torch.testing.assert_close(of(x[0], x[1]), expected, rtol=1e-9, atol=1e-12)
    # the mean over all pairs of subsets is the value for the whole: no bias from the size of a sample
    subsets = [list(s) for s in itertools.combinations(range(7), 4)]
    values = [of(x[0][s], x[1][t]) for s in subsets for t in subsets]
    torch.testing.assert_close(torch.stack(values).mean(), expected, rtol=1e-9, atol=1e-9)
    g = torch.Generator().manual_seed(1)
    same = torch.stack([of(*torch.randn(2, 10, 3, generator=g).double()) for _ in range(400)])
    assert abs(same.mean()) < 3 * same.std() / 20
    monkeypatch.setattr("companion.anomaly.scoring_the_scorer.sets._BLOCK", 14)  # blocks of two rows
    torch.testing.assert_close(of(x[0], x[1]), expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="kernel"):
        kernel_distance(x[0], x[1], "linear")


def test_prdc_is_its_definition(device, monkeypatch):
    g = torch.Generator().manual_seed(0)
    real, made = torch.randn(90, 3, generator=g).double(), 0.7 * torch.randn(70, 3, generator=g).double() + 0.3
    monkeypatch.setattr("companion.anomaly.scoring_the_scorer.sets._BLOCK", 1000)
    got = prdc(real.to(device), made.to(device), k=4)
    rr, gg, rg = torch.cdist(real, real), torch.cdist(made, made), torch.cdist(real, made)
    r_radius, g_radius = rr.sort(1).values[:, 4], gg.sort(1).values[:, 4]
    inside = rg < r_radius[:, None]
    expected = (
        inside.any(0).double().mean(),
        (rg < g_radius[None]).any(1).double().mean(),
        inside.sum(0).double().mean() / 4,
        (rg.min(1).values < r_radius).double().mean(),
    )
    torch.testing.assert_close(tuple(v.cpu() for v in got), expected)
    same = prdc(real, real.clone(), k=4)
    assert float(same.precision) == float(same.recall) == float(same.coverage) == 1
    far = prdc(real, made + 100, k=4)
    assert all(float(v) == 0 for v in far)
    with pytest.raises(ValueError, match="k to be at most"):
        prdc(real, made, k=90)


def test_copies_are_not_authentic(device):
    g = torch.Generator().manual_seed(0)
    train, test, fresh = torch.randn(3, 400, 5, generator=g).to(device)
    noise = torch.randn(400, 5, generator=g).to(device)
    assert float(auth_pct(train, train)) == 0
    assert float(auth_pct(train, train + 1e-3 * noise)) == 0
    assert 45 < float(auth_pct(train, fresh)) < 70
    assert float(auth_pct(train, fresh + 50)) == 100
    assert float(ct_score(train, test, train + 1e-3 * noise)) < -15
    assert abs(float(ct_score(train, test, fresh))) < 3
    spacing = torch.cdist(train, train).fill_diagonal_(torch.inf).amin(1)
    train, test, fresh = (x.double() for x in (train, test, fresh))
    near = torch.cdist(fresh, train).min(1)
    expected = 100 * (near.values > spacing[near.indices]).double().mean()
    torch.testing.assert_close(auth_pct(train, fresh), expected)
    u = stats.mannwhitneyu(near.values.cpu(), torch.cdist(test, train).amin(1).cpu(), method="asymptotic").statistic
    z = (u - 400 * 400 / 2) / math.sqrt(400 * 400 * 801 / 12)
    assert float(ct_score(train, test, fresh)) == pytest.approx(z, abs=1e-9)


# ---- transport ----


def test_sliced_wasserstein_is_scipys_on_every_line(device):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 3, generator=g).double(), torch.randn(31, 3, generator=g).double() + 1
    a, b = torch.rand(40, generator=g), torch.rand(31, generator=g)
    lines = torch.nn.functional.normalize(torch.randn(6, 3, generator=g), dim=1).double()
    for weights in ((None, None), (a, b), (a, None)):
        got = sliced_wasserstein(
            x.to(device), y.to(device), p=1, x_weights=weights[0], y_weights=weights[1], directions=lines
        )
        expected = np.mean([stats.wasserstein_distance(x @ line, y @ line, *weights) for line in lines])
        assert float(got) == pytest.approx(expected, rel=1e-9)
    same_size = sliced_wasserstein(x[:31], y, p=2, directions=lines)
    equal = torch.full((31,), 2.0)
    general = sliced_wasserstein(x[:31], y, p=2, x_weights=equal, directions=lines)
    torch.testing.assert_close(same_size, general)


def test_sliced_wasserstein_of_a_shift():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([3.0, 0, 0, 0])
    got = sliced_wasserstein(x, x + shift, n_proj=20_000, generator=0)
    assert float(got) == pytest.approx(3 / math.sqrt(4), rel=0.02)  # a line sees 1/d of a squared shift
    assert float(sliced_wasserstein(x, x.flip(0), generator=0)) == 0
    doubled = sliced_wasserstein(x, x.repeat(2, 1), generator=0)
    assert float(doubled) == pytest.approx(0, abs=1e-6)  # measures, not lists of points
    first = sliced_wasserstein(x, x + shift, generator=3)
    assert torch.equal(first, sliced_wasserstein(x, x + shift, generator=3))


def test_sliced_wasserstein_obeys_the_triangle_inequality_and_chamfer_does_not():
    g = torch.Generator().manual_seed(0)
    lines = torch.nn.functional.normalize(torch.randn(32, 2, generator=g), dim=1)
    broken = 0
    for _ in range(100):
        a, c = torch.randn(2, 4, 2, generator=g)
        b = torch.cat([a[:2], c[:2]])  # half of each
        ab, bc, ac = (sliced_wasserstein(u, v, directions=lines) for u, v in ((a, b), (b, c), (a, c)))
        assert ac <= ab + bc + 1e-5
        broken += bool(chamfer(a, c) > chamfer(a, b) + chamfer(b, c) + 1e-6)
    assert broken > 20


def test_chamfer_and_hausdorff_are_their_definitions(device):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 3, generator=g), torch.randn(55, 3, generator=g)
    d = torch.cdist(x.double(), y.double())
    x, y = x.to(device), y.to(device)
    assert float(chamfer(x, y)) == pytest.approx(float(d.amin(1).mean() + d.amin(0).mean()), rel=1e-5)
    squared = d.square()
    expected = float(squared.amin(1).mean() + squared.amin(0).mean())
    assert float(chamfer(x, y, squared=True)) == pytest.approx(expected, rel=1e-5)
    assert float(hausdorff(x, y)) == pytest.approx(float(torch.maximum(d.amin(1).max(), d.amin(0).max())), rel=1e-5)


def test_set_distances_have_gradients():
    g = torch.Generator().manual_seed(0)
    y = torch.randn(9, 2, generator=g, dtype=torch.float64)
    lines = torch.nn.functional.normalize(torch.randn(5, 2, generator=g), dim=1).double()
    x = torch.randn(9, 2, generator=g, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(9, generator=g)
    assert torch.autograd.gradcheck(lambda v: sliced_wasserstein(v, y, directions=lines), (x,))
    assert torch.autograd.gradcheck(lambda v: sliced_wasserstein(v, y, x_weights=weights, directions=lines), (x,))
    assert torch.autograd.gradcheck(lambda v: chamfer(v, y), (x,))
    at_zero = y.clone().requires_grad_()
    chamfer(at_zero, y).backward()
    assert bool((at_zero.grad == 0).all())


def test_set_distances_refuse_bad_input():
    x = torch.zeros(3, 2)
    for call, message in (
        (lambda: sliced_wasserstein(x, torch.zeros(3, 3)), "one dimension"),
        (lambda: sliced_wasserstein(x, x, p=0.5), "p in"),
        (lambda: sliced_wasserstein(x, x, x_weights=[-1.0, 1, 1]), "x_weights"),
        (lambda: sliced_wasserstein(x, x, directions=torch.ones(2, 3)), "directions of dimension 2"),
        (lambda: chamfer(x, x * torch.nan), "y"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_surface_measures():
    # a cube of side 2: two triangles per side
    corners = torch.tensor(list(itertools.product((0.0, 2.0), repeat=3)))
    faces = [[0, 1, 3], [0, 3, 2], [4, 7, 5], [4, 6, 7], [0, 5, 1], [0, 4, 5]]
    faces += [[2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3]]
    points, weights = surface_measure(corners, faces)
    torch.testing.assert_close(weights, torch.full((12,), 1 / 12))
    torch.testing.assert_close(weights @ points, torch.ones(3))
    oriented = surface_measure(corners, faces, "varifold").points
    torch.testing.assert_close(oriented[:, 3:].norm(dim=1), torch.ones(12))
    assert bool((((points - 1) * oriented[:, 3:]).sum(1).abs() > 0.99).all())  # normals are normal
    # cutting one triangle into three changes the vertices' measure, and hardly that of the faces
    extra = torch.cat([corners, corners[faces[0]].mean(0, keepdim=True)])
    cut = [*faces[1:], [0, 1, 8], [1, 3, 8], [3, 0, 8]]
    assert torch.allclose(surface_measure(extra, cut).weights[-3:], torch.full((3,), 1 / 36))
    for bad, message in (([[0, 1, 9]], "vertex numbers"), ([[0, 0, 0]], "area above 0"), ([0, 1], "faces")):
        with pytest.raises(ValueError, match=message):
            surface_measure(corners, bad)
    with pytest.raises(ValueError, match="kind"):
        surface_measure(corners, faces, "edges")


def test_a_flow_can_be_undone_and_does_not_fold(device):
    deform = FlowDeform(dim=2, hidden=16, steps=8, seed=0).to(device)
    x = torch.rand(30, 2, generator=torch.Generator().manual_seed(0)).to(device)
    torch.testing.assert_close(deform(deform(x), backwards=True), x, atol=1e-4, rtol=0)
    det = deform.jacobian_determinant(x)
    assert det.shape == (30,)
    assert bool((det > 0).all())
    step = 1e-3
    plus, minus = (torch.stack([deform(x + s * e) for e in torch.eye(2, device=device)], 2) for s in (step, -step))
    numeric = torch.linalg.det(((plus - minus) / (2 * step)).double())
    torch.testing.assert_close(det.double(), numeric, atol=1e-2, rtol=0)
    assert torch.equal(FlowDeform(2, 16, 8, seed=0)(x.cpu()), FlowDeform(2, 16, 8, seed=0)(x.cpu()))
