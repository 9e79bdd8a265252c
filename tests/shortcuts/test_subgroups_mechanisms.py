"""The mechanisms of the nine papers against closed forms, brute force and other implementations."""

import math

import numpy as np
import pytest
import torch
from scipy import optimize
from scipy import stats as sps
from torch.utils._python_dispatch import TorchDispatchMode

from companion.shortcuts import (
    ContextEpisodeSampler,
    DistanceCovariancePenalty,
    Episode,
    IntersectionalRecall,
    PrincipalDirections,
    TinyCLIP,
    accuracy_disparity,
    accuracy_points,
    background_color_groups,
    benjamini_hochberg,
    bootstrap_disparity,
    caption_loss,
    cauchy_robust_classifier,
    class_accuracies,
    counter_split,
    curve_fit_report,
    distance_correlation,
    distance_covariance,
    error_attribution,
    gaussian_robust_classifier,
    group_drop,
    joint_distance_covariance,
    js_divergence_groups,
    last_layer_retrain,
    latent_swap,
    make_attribute_population,
    make_background_digits,
    make_captioned_digits,
    make_regional_digits,
    make_spurious_xor,
    neighbor_composition,
    progress_gap,
    progress_rate,
    prototype_accuracy,
    recall_disparity,
    recall_tests,
    region_gap,
    remove_site_effect,
    robust_logistic,
    robustness_index,
    spurious_shift_score,
    swap_backgrounds,
)
from companion.shortcuts.subgroups import independence

# --- distance covariance ------------------------------------------------------------------------------------


def distances(x):
    x = x.reshape(len(x), -1).double()
    return (x[:, None] - x[None]).square().sum(-1).sqrt()


def centered(x):
    a = distances(x)
    return a - a.mean(0) - a.mean(1, keepdim=True) + a.mean()


def u_centered(x):
    a, n = distances(x), len(x)
    a = a - a.sum(0) / (n - 2) - a.sum(1, keepdim=True) / (n - 2) + a.sum() / ((n - 1) * (n - 2))
    return a.fill_diagonal_(0)


@pytest.mark.parametrize("n", [2, 3, 7, 8, 64, 101])
@pytest.mark.parametrize("shapes", [((), ()), ((1,), (3,)), ((2,), (2,))])
def test_distance_covariance_is_its_definition(n, shapes, device, generator):
    x = torch.randn(n, *shapes[0], generator=generator, dtype=torch.float64)
    y = (x.reshape(n, -1)[:, :1] ** 2 + torch.randn(n, *(shapes[1] or (1,)), generator=generator)).double()
    y = y[:, 0] if shapes[1] == () else y
    result = distance_covariance(x.to(device), y.to(device))
    assert result.device.type == device.type
    assert math.isclose(result.item(), (centered(x) * centered(y)).mean().item(), abs_tol=1e-12)
    if n >= 4:
        expected = (u_centered(x) * u_centered(y)).sum() / (n * (n - 3))
        assert math.isclose(distance_covariance(x, y, unbiased=True).item(), expected.item(), abs_tol=1e-12)


def test_distance_covariance_with_ties(generator):
    x = torch.randint(3, (200,), generator=generator).double()
    y = torch.randint(2, (200,), generator=generator).double()
    assert math.isclose(distance_covariance(x, y).item(), (centered(x) * centered(y)).mean().item(), abs_tol=1e-14)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("dims", [(1, 1), (2, 3)])
def test_distance_covariance_agrees_with_dcor(unbiased, dims, generator):
    dcor = pytest.importorskip("dcor")
    x = torch.randn(300, dims[0], generator=generator, dtype=torch.float64)
    y = torch.randn(300, dims[1], generator=generator, dtype=torch.float64) + x[:, :1] ** 2
    name = "u_distance_covariance_sqr" if unbiased else "distance_covariance_sqr"
    expected = getattr(dcor, name)(x.numpy(), y.numpy())
    assert abs(distance_covariance(x, y, unbiased=unbiased).item() - expected) < 1e-8
    name = "u_distance_correlation_sqr" if unbiased else "distance_correlation_sqr"
    expected = getattr(dcor, name)(x.numpy(), y.numpy())
    assert abs(distance_correlation(x, y, unbiased=unbiased).item() - expected) < 1e-8


def test_distance_covariance_of_large_numbers(generator):
    x = torch.randn(500, generator=generator, dtype=torch.float64)
    y = torch.randn(500, generator=generator, dtype=torch.float64) + x
    assert math.isclose(
        distance_covariance(x + 1e6, 1e3 * y).item(), 1e3 * distance_covariance(x, y).item(), rel_tol=1e-8
    )


class Elements(TorchDispatchMode):
    """Counts the numbers that torch operations write."""

    def __init__(self):
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                self.total += t.numel()
                self.largest = max(self.largest, t.numel())
        return out


def test_one_dimension_takes_n_log_n(generator):
    def cost(n):
        x, y = torch.randn(2, n, generator=generator, dtype=torch.float64)
        with Elements() as seen:
            distance_covariance(x, y)
        return seen

    small, large = cost(1 << 9), cost(1 << 12)
    assert large.total / small.total < 8 * 12 / 9 * 1.2
    assert large.largest < 5 * (1 << 12)  # four running sums, and no matrix


@pytest.mark.parametrize("joint", [False, True])
def test_more_dimensions_stay_within_the_block(joint, generator, monkeypatch):
    x = torch.randn(130, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randn(130, 2, generator=generator, dtype=torch.float64)

    def value():
        return joint_distance_covariance(x, y, x.detach()[:, 0]) if joint else distance_covariance(x, y)

    whole = value()
    (gradient,) = torch.autograd.grad(whole, x)
    monkeypatch.setattr(independence, "_BLOCK", 1000)
    with Elements() as seen:
        blocks = value()
        (again,) = torch.autograd.grad(blocks, x)
    assert math.isclose(whole.item(), blocks.item(), rel_tol=1e-12)
    assert torch.allclose(gradient, again, atol=1e-14)
    assert seen.largest <= 1000


def test_distance_covariance_has_the_right_gradient(generator):
    x = torch.randn(12, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randn(12, 1, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, y: distance_covariance(x, y), (x, y))
    assert torch.autograd.gradcheck(lambda x, y: distance_covariance(x, y.repeat(1, 2) ** 2, unbiased=True), (x, y))


def test_distance_correlation_is_one_for_similar_and_zero_for_constant(generator):
    x = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    assert math.isclose(distance_correlation(x, 5 - 2 * x @ q).item(), 1, abs_tol=1e-12)
    assert distance_correlation(x, torch.ones(50)).item() == 0


def test_unbiased_version_is_near_zero_under_independence(generator):
    values = [distance_covariance(*torch.randn(2, 40, generator=generator), unbiased=True) for _ in range(400)]
    biased = [distance_covariance(*torch.randn(2, 40, generator=generator)) for _ in range(50)]
    values = torch.stack(values)
    assert values.mean().abs() < 3 * values.std() / 20
    assert torch.stack(biased).mean() > 0.01


def test_joint_is_the_sum_over_subsets(generator):
    xs = [torch.randn(20, generator=generator, dtype=torch.float64) for _ in range(2)]
    xs.append(torch.randn(20, 2, generator=generator, dtype=torch.float64) + xs[0][:, None])
    a, b, d = (centered(x) for x in xs)
    for c in (0.3, 1.0, 2.0):
        expected = c * ((a * b).mean() + (a * d).mean() + (b * d).mean()) - (a * b * d).mean()
        assert math.isclose(joint_distance_covariance(*xs, c=c).item(), expected.item(), abs_tol=1e-12)
        assert math.isclose(
            joint_distance_covariance(xs[0], xs[2], c=c).item(), distance_covariance(xs[0], xs[2]).item(), abs_tol=1e-12
        )


def crossed_bits():
    s = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]).repeat(25, 1)
    return s, (s[:, 0] - s[:, 1]).abs()


def test_the_sum_is_blind_to_what_cancels_in_the_margins():
    s, xor = crossed_bits()
    assert abs(DistanceCovariancePenalty("sum")(xor, s).item()) < 1e-6
    assert DistanceCovariancePenalty("concat")(xor, s).item() > 0.01
    assert abs(DistanceCovariancePenalty("joint")(xor, s).item()) > 0.01


@pytest.mark.parametrize("kind", ["sum", "concat", "joint"])
def test_penalty_is_made_of_the_statistics(kind, generator, device):
    f = torch.randn(60, generator=generator, dtype=torch.float64)
    s = torch.randn(60, 2, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 100.0])
    scaled = s / s.std(0, correction=0)
    expected = {
        "sum": distance_covariance(f, scaled[:, 0]) + distance_covariance(f, scaled[:, 1]),
        "concat": distance_covariance(f, scaled),
        "joint": joint_distance_covariance(f, scaled[:, 0], scaled[:, 1]),
    }[kind]
    assert math.isclose(
        DistanceCovariancePenalty(kind)(f.to(device), s.to(device)).item(), expected.item(), rel_tol=1e-9
    )


def test_penalty_works_under_vmap(generator):
    f, s = torch.randn(3, 30, generator=generator), torch.randn(30, 2, generator=generator)
    penalty = DistanceCovariancePenalty("concat")
    many = torch.func.vmap(penalty, in_dims=(0, None))(f, s)
    assert torch.allclose(many, torch.stack([penalty(row, s) for row in f]), atol=1e-6)


def test_js_divergence_has_its_limits(generator):
    f = torch.rand(4000, generator=generator)
    groups = torch.randint(2, (4000,), generator=generator)
    chance = 19 / (2 * 4000 * math.log(2))
    assert js_divergence_groups(f, groups) < 4 * chance
    assert math.isclose(js_divergence_groups(groups.float(), groups, bins=2).item(), 1, abs_tol=1e-3)
    assert js_divergence_groups(torch.ones(10), torch.arange(10) % 2) == 0


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: distance_covariance([1.0, 2.0], [1.0]), ValueError, "min|at least 2|same length"),
        (lambda: distance_covariance([1.0, 2.0, 3.0], [1.0, 2.0]), ValueError, "same length"),
        (lambda: distance_covariance([1.0, math.nan], [1.0, 2.0]), ValueError, "finite"),
        (lambda: distance_covariance([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], unbiased=True), ValueError, "4 samples"),
        (lambda: distance_covariance("no", [1.0]), TypeError, "tensor"),
        (lambda: joint_distance_covariance([1.0, 2.0]), ValueError, "two variables"),
        (lambda: joint_distance_covariance([1.0, 2.0], [1.0, 2.0], c=0), ValueError, "c in"),
        (lambda: DistanceCovariancePenalty("product"), ValueError, "'sum', 'concat' or 'joint'"),
        (lambda: DistanceCovariancePenalty()(torch.ones(3), torch.ones(4, 2)), ValueError, r"\(n, p\)"),
    ],
)
def test_distance_covariance_refuses(call, error, match):
    with pytest.raises(error, match=match):
        call()


# --- robust classifiers ------------------------------------------------------------------------------------


def robust_risk(theta, mu, sigma, prior, eps, dual):
    w, b = theta[:-1], theta[-1]
    scale = np.sqrt(w @ sigma @ w) + 1e-300
    margin = w @ mu - eps * np.linalg.norm(w, dual)
    return prior * sps.norm.cdf(-(margin + b) / scale) + (1 - prior) * sps.norm.cdf(-(margin - b) / scale)


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
@pytest.mark.parametrize("eps", [0.0, 0.15, 0.4])
def test_no_classifier_has_less_robust_error(norm, dual, eps):
    rng = np.random.default_rng(0)
    mu = np.array([1.0, 0.4, -0.3, 0.1])
    root = rng.normal(size=(4, 4))
    sigma = root @ root.T / 4 + 0.5 * np.eye(4)
    w, b = gaussian_robust_classifier(mu, sigma, 0.8, eps, norm)
    best = robust_risk(np.append(w.numpy(), b), mu, sigma, 0.8, eps, dual)
    for _ in range(2):
        start = np.append(w.numpy(), b) + rng.normal(size=5) * 0.3
        options = {"maxiter": 20000, "maxfev": 20000, "xatol": 1e-9, "fatol": 1e-13}
        found = optimize.minimize(
            robust_risk, start, args=(mu, sigma, 0.8, eps, dual), method="Nelder-Mead", options=options
        )
        assert best <= found.fun + 1e-7


def test_isotropic_noise_means_soft_thresholding():
    w, b = gaussian_robust_classifier([1.0, -0.5, 0.1], prior=0.75, eps=0.2)
    assert torch.allclose(w, torch.tensor([0.8, -0.3, 0.0], dtype=torch.float64))
    assert math.isclose(b.item(), 0.5 * math.log(3))


def test_class_accuracies_match_simulation(generator):
    mu, sigma = torch.tensor([1.0, 0.3]), torch.tensor([[1.0, 0.4], [0.4, 2.0]])
    classifier = gaussian_robust_classifier(mu, sigma, 0.7, 0.2)
    noise = torch.randn(200_000, 2, generator=generator) @ torch.linalg.cholesky(sigma).T
    score = (noise + mu).double() @ classifier.weights
    positive, negative = class_accuracies(classifier, mu, sigma)
    assert abs((score + classifier.bias > 0).double().mean() - positive) < 0.004
    score = (noise - mu).double() @ classifier.weights
    assert abs((score + classifier.bias < 0).double().mean() - negative) < 0.004


def test_cauchy_accuracies_match_simulation(generator):
    noise = torch.from_numpy(sps.cauchy.rvs(size=(200_000, 2), random_state=0))
    mu, classifier = torch.tensor([2.0, 1.0], dtype=torch.float64), (torch.tensor([1.0, 0.5]), 0.4)
    positive, _ = class_accuracies(classifier, mu, dist="cauchy")
    score = (noise + mu) @ torch.tensor([1.0, 0.5], dtype=torch.float64) + 0.4
    assert abs((score > 0).double().mean() - positive) < 0.004


@pytest.mark.parametrize("prior", [0.5, 0.6, 0.8, 0.2, 0.9])
@pytest.mark.parametrize("delta", [0.5, 1.5, 4.0])
def test_cauchy_bias_is_the_best_on_a_grid(prior, delta):
    _, bias = cauchy_robust_classifier([delta + 0.3], prior, eps=0.3)
    grid = np.concatenate([np.linspace(-30, 30, 60_001), [-1e9, 1e9]])

    def error(b):
        return prior * sps.cauchy.cdf(-(delta + b)) + (1 - prior) * sps.cauchy.cdf(-(delta - b))

    finite = bias.clamp(-1e9, 1e9).item()
    assert error(finite) <= error(grid).min() + 1e-9


def test_disparity_is_zero_when_balanced_and_grows_when_not():
    mu = [1.0] + [0.3] * 9
    for eps in (0.0, 0.1, 0.2):
        assert abs(accuracy_disparity(1, eps, mu)) < 1e-12
        assert abs(accuracy_disparity(1, eps, mu, dist="cauchy")) < 1e-12
    for ratio in (5, 20):
        values = [accuracy_disparity(ratio, eps, mu).item() for eps in (0.0, 0.1, 0.2)]
        assert values[0] < values[1] < values[2]


def test_heavy_tails_give_the_rare_class_up():
    assert accuracy_disparity(20, 0.0, [3.0], dist="cauchy") == 1
    assert accuracy_disparity(1.5, 0.0, [3.0], dist="cauchy") < 0.1


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_robust_logistic_approaches_the_closed_form(norm, generator):
    mu = torch.tensor([1.0, 0.5, 0.05])
    y = (torch.rand(40_000, generator=generator) < 0.8).long()
    x = torch.randn(40_000, 3, generator=generator) + mu * (2 * y[:, None] - 1)
    w, b = robust_logistic(x, y, eps=0.2, norm=norm)
    closed = gaussian_robust_classifier(mu, prior=0.8, eps=0.2, norm=norm)
    scale = w.norm() / closed.weights.norm()
    assert torch.allclose(w / scale, closed.weights, atol=0.03)
    assert abs(b / scale - closed.bias) < 0.05


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: gaussian_robust_classifier([[1.0]]), "shape"),
        (lambda: gaussian_robust_classifier([1.0], eps=1.0), "budget"),
        (lambda: gaussian_robust_classifier([1.0], prior=1.0), "prior"),
        (lambda: gaussian_robust_classifier([1.0, 0.0], [[1.0, 0.0], [0.0, -1.0]]), "positive definite"),
        (lambda: gaussian_robust_classifier([1.0, 0.0], norm="l1"), "norm"),
        (lambda: accuracy_disparity(0.5, 0.1, [1.0]), "ratio"),
        (lambda: accuracy_disparity(2, 0.1, [1.0], dist="laplace"), "dist"),
        (lambda: cauchy_robust_classifier([0.1], eps=0.2), "budget"),
        (lambda: robust_logistic([[1.0], [2.0]], [1, 1]), "both classes"),
    ],
)
def test_robust_classifiers_refuse(call, match):
    with pytest.raises(ValueError, match=match):
        call()


# --- robustness index ------------------------------------------------------------------------------------


def sites_and_classes(generator, b, s, classes=6, sites=5, per=20, d=50):
    y = torch.arange(classes).repeat_interleave(sites * per)
    site = torch.arange(sites).repeat_interleave(per).repeat(classes)
    means = torch.randn(classes, d, generator=generator), torch.randn(sites, d, generator=generator)
    return b * means[0][y] + s * means[1][site] + torch.randn(len(y), d, generator=generator), y, site


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_index_is_its_definition(metric, generator, device):
    x, y, site = sites_and_classes(generator, 0.3, 0.3)
    unit = x / x.norm(dim=1, keepdim=True) if metric == "cosine" else x
    near = torch.cdist(unit.double(), unit.double()).fill_diagonal_(torch.inf).topk(15, largest=False).indices
    good = ((y[near] == y[:, None]) & (site[near] != site[:, None])).sum()
    bad = ((y[near] != y[:, None]) & (site[near] == site[:, None])).sum()
    result = robustness_index(x.to(device), y.to(device), site.to(device), k=15, metric=metric)
    assert math.isclose(result.item(), good.item() / bad.item(), rel_tol=1e-12)


def test_all_neighbours_are_chance(generator):
    x, y, site = sites_and_classes(generator, 1.0, 0.2, per=4)
    shares = neighbor_composition(x, y, site, k=len(x) - 1)
    assert torch.allclose(torch.stack([share.mean() for share in shares[:4]]), shares.chance)
    assert torch.isclose(sum(share for share in shares[:4]), torch.ones(1, dtype=torch.float64)).all()


def test_index_knows_who_organises_the_space(generator):
    values = [robustness_index(*sites_and_classes(generator, b, 1 - b), k=15).item() for b in (0.2, 0.5, 0.8)]
    assert values[0] < 0.5 < values[1] < 2 < values[2]
    x, y, site = sites_and_classes(generator, 5.0, 0.0)
    assert robustness_index(x, y, site, k=15).isinf()


def test_neighbours_of_the_own_group_do_not_count(generator):
    x, y, site = sites_and_classes(generator, 0.4, 0.4, per=6)
    patient = torch.arange(len(x)) // 3
    twins = x[patient * 3]  # three identical images per patient
    unit = (twins / twins.norm(dim=1, keepdim=True)).double()
    d = torch.cdist(unit, unit)
    d[patient[:, None] == patient] = torch.inf
    near = d.topk(6, largest=False).indices
    good = ((y[near] == y[:, None]) & (site[near] != site[:, None])).sum()
    bad = ((y[near] != y[:, None]) & (site[near] == site[:, None])).sum()
    assert math.isclose(robustness_index(twins, y, site, 6, exclude=patient).item(), (good / bad).item(), rel_tol=0.02)
    with pytest.raises(ValueError, match="largest group"):
        robustness_index(twins, y, site, k=len(x) - 2, exclude=patient)


def test_errors_come_from_the_own_site_and_centring_helps(generator):
    x, y, site = sites_and_classes(generator, 0.4, 1.2)
    found = error_attribution(x, y, site, k=15)
    assert found.errors > 50
    assert found.same_site > 0.7 > 2 * found.chance
    clean = remove_site_effect(x, site)
    assert robustness_index(clean, y, site, k=15) > 1 > robustness_index(x, y, site, k=15)
    for s in range(5):
        assert torch.allclose(clean[site == s].mean(0), x.mean(0), atol=1e-5)


def test_attribution_without_errors_has_none(generator):
    found = error_attribution(*sites_and_classes(generator, 5.0, 0.1), k=5)
    assert found.errors == 0
    assert found.same_site.isnan()


# --- intersections ------------------------------------------------------------------------------------


def recalls_of(population, keep=None, levels=(2, 3, 2)):
    metric = IntersectionalRecall(5, levels)
    metric.update(*population)
    return metric.recalls(keep)


def test_intersectional_recall_counts(generator):
    p, y, a = make_attribute_population(3000, interaction="single_cell", effect=0.3, generator=generator)
    recalls = recalls_of((p, y, a))
    rows = (y == 2) & (a[:, 0] == 1) & (a[:, 1] == 2) & (a[:, 2] == 0)
    assert recalls.counts[2, 1, 2, 0] == rows.sum()
    assert torch.isclose(recalls.recall[2, 1, 2, 0], (p == y)[rows].double().mean())
    margin = recalls_of((p, y, a), keep=[1])
    rows = (y == 4) & (a[:, 1] == 0)
    assert torch.isclose(margin.recall[4, 0], (p == y)[rows].double().mean())
    assert margin.counts.sum() == 3000
    assert (margin.low < margin.recall).all()
    assert (margin.recall < margin.high).all()


def test_intersectional_recall_streams(generator):
    population = make_attribute_population(1000, generator=generator)
    whole, parts = IntersectionalRecall(5, (2, 3, 2)), IntersectionalRecall(5, (2, 3, 2))
    whole.update(*population)
    for rows in torch.arange(1000).split(300):
        parts.update(*(t[rows] for t in population))
    assert torch.equal(whole.compute().right, parts.compute().right)


def test_one_bad_cell_leaks_into_the_margins(generator):
    population = make_attribute_population(200_000, interaction="single_cell", effect=0.2, generator=generator)
    by_first, by_second = (recall_disparity(recalls_of(population, [a])) for a in (0, 1))
    assert abs(by_first - 0.2 / 3) < 0.01  # the second attribute has the bad value in a third of the cases
    assert abs(by_second - 0.2 / 2) < 0.015


def test_a_crossover_shows_in_the_cells_only(generator):
    population = make_attribute_population(100_000, interaction="crossover", effect=0.1, generator=generator)
    assert recall_disparity(recalls_of(population, [0])) < 0.012
    cells = recalls_of(population, [0, 1])
    assert 0.18 < recall_disparity(cells) < 0.22
    interval = bootstrap_disparity(cells, generator=generator)
    assert interval.low < interval.estimate < interval.high
    assert interval.estimate == recall_disparity(cells)


def test_class_mix_does_not_make_a_disparity(generator):
    a = torch.randint(2, (20_000, 1), generator=generator)
    y = (torch.rand(20_000, generator=generator) < torch.where(a[:, 0] == 1, 0.8, 0.2)).long()
    right = torch.rand(20_000, generator=generator) < torch.where(y == 1, 0.5, 0.9)
    metric = IntersectionalRecall(2, (2,))
    metric.update(torch.where(right, y, 1 - y), y, a)
    assert recall_disparity(metric.compute()) < 0.03


def test_corrected_tests_are_quiet_when_there_is_nothing(generator):
    corrected = plain = 0
    for _ in range(40):
        p = recall_tests(recalls_of(make_attribute_population(6000, generator=generator)))
        corrected += bool(benjamini_hochberg(p).any())
        plain += bool((p < 0.05).any())
    assert corrected <= 7
    assert plain >= 30


def test_small_cells_are_suppressed(generator):
    recalls = recalls_of(make_attribute_population(600, generator=generator))
    assert recall_tests(recalls)[recalls.counts < 20].isnan().all()
    assert recall_disparity(recalls).isnan()
    with pytest.raises(ValueError, match="at least two cells"):
        bootstrap_disparity(recalls)


def test_z_test_agrees_with_the_chi_square(generator):
    recalls = recalls_of(make_attribute_population(3000, generator=generator), [0])
    right, counts = recalls.right[0].numpy(), recalls.counts[0].numpy()
    expected = sps.chi2_contingency(np.stack([right, counts - right]), correction=False).pvalue
    assert np.allclose(recall_tests(recalls)[0].numpy(), expected)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric Intersectional:UserWarning")  # on purpose
def test_intersections_refuse(generator):
    metric = IntersectionalRecall(2, (2,))
    with pytest.raises(ValueError, match="at least one sample"):
        metric.compute()
    with pytest.raises(ValueError, match="attributes"):
        metric.update([0], [0], [[0, 1]])
    with pytest.raises(ValueError, match=r"attribute 0 in 0\.\.1"):
        metric.update([0], [0], [[2]])
    with pytest.raises(ValueError, match="levels"):
        IntersectionalRecall(2, ())
    metric.update([0], [0], [[1]])
    with pytest.raises(ValueError, match="keep"):
        metric.recalls([1])
    with pytest.raises(ValueError, match="crossover"):
        make_attribute_population(10, interaction="cross")


# --- progress ------------------------------------------------------------------------------------


def test_progress_rate_is_least_squares(generator):
    x = 0.3 + 0.6 * torch.rand(40, generator=generator, dtype=torch.float64)
    y = 0.1 + 0.7 * x + 0.02 * torch.randn(40, generator=generator, dtype=torch.float64)
    slope, intercept = np.polyfit(x, y, 1)
    rate = progress_rate(x, y, generator=0)
    assert math.isclose(rate.slope, slope)
    assert math.isclose(rate.intercept, intercept)
    assert rate.low < slope < rate.high
    logit = progress_rate(x, y, scale="logit", generator=0)
    assert math.isclose(logit.slope, np.polyfit(torch.logit(x).numpy(), torch.logit(y).numpy(), 1)[0])


def test_progress_gap_is_a_ratio_of_slopes(generator):
    x = torch.linspace(0.4, 0.9, 20)
    gap = progress_gap(x, 0.9 * x, 0.1 + 0.3 * x, generator=0)
    assert math.isclose(gap.estimate, 3, rel_tol=1e-5)
    assert math.isclose(gap.low, gap.high, rel_tol=1e-4)


def test_region_gap_leaves_out_what_is_unknown():
    nan = float("nan")
    gap = region_gap([[0.9, 0.5, nan], [0.9, nan, nan]])
    assert math.isclose(gap[0], 0.4, rel_tol=1e-6)
    assert gap[1].isnan()


def test_last_layer_retraining_balances(generator):
    # the majority group's labels follow the first feature, the minority's the second
    n = 2000
    g = (torch.rand(n, generator=generator) < 0.05).long()
    y = torch.randint(2, (n,), generator=generator)
    sign = 2.0 * y - 1
    x = torch.stack([torch.where(g == 0, sign, -sign), 0.5 * sign], 1) + 0.5 * torch.randn(n, 2, generator=generator)
    fair = last_layer_retrain(x, y, g, generator=generator)
    plain = last_layer_retrain(x, y, g, balanced=False)
    minority = g == 1
    right = [(torch.from_numpy(h.predict(x.numpy())) == y)[minority].double().mean() for h in (plain, fair)]
    assert right[1] > right[0] + 0.3
    with pytest.raises(ValueError, match="two classes"):
        last_layer_retrain(x, torch.zeros(n, dtype=torch.int64), g)


def test_regional_digits_share_no_digit_between_parts(generator):
    digits = make_regional_digits(generator=generator)
    (x, _, regions), test, spare = digits.train, digits.test, digits.spare
    base = {tuple(i.flatten().tolist()) for i in x[regions == 0]}
    assert not base & {tuple(i.flatten().tolist()) for i in test[0][test[2] == 0]}
    assert not base & {tuple(i.flatten().tolist()) for i in spare[0][spare[2] == 0]}
    assert abs((regions == 0).double().mean() - 0.85) < 0.05
    assert digits.corrupted[0].shape == test[0][test[2] == 0].shape
    with pytest.raises(ValueError, match="shares"):
        make_regional_digits((0.5, 0.5))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: progress_rate([0.1, 0.2], [0.1, 0.2]), "at least 3"),
        (lambda: progress_rate([0.1, 0.2, 0.3], [0.1, 0.2]), "at least 3|per model"),
        (lambda: progress_rate([0.5, 0.5, 0.5], [0.1, 0.2, 0.3]), "different reference"),
        (lambda: progress_rate([0.5, 0.6, 1.0], [0.1, 0.2, 0.3], scale="logit"), r"inside \(0, 1\)"),
        (lambda: progress_rate([0.5, 0.6, 0.9], [0.1, 0.2, 0.3], scale="log"), "scale"),
    ],
)
def test_progress_refuses(call, match):
    with pytest.raises(ValueError, match=match):
        call()


# --- episodes ------------------------------------------------------------------------------------


def crossed(n=12, concepts=6, contexts=6):
    concept = torch.arange(concepts).repeat_interleave(contexts * n)
    return concept, torch.arange(contexts).repeat_interleave(n).repeat(concepts)


@pytest.mark.parametrize(("shift", "agrees"), [(0.0, 1.0), (1.0, 0.0), (0.5, 0.5)])
def test_episodes_shift_as_asked(shift, agrees, generator):
    concept, context = crossed()
    sampler = ContextEpisodeSampler(concept, context, 5, 2, 4, shift, 100, generator)
    shares = []
    for support, query, classes in sampler.episodes():
        assert (concept[support] == classes[:, None]).all()
        assert (concept[query] == classes[:, None]).all()
        own = context[support]
        assert (own == own[:, :1]).all()
        assert own[:, 0].unique().numel() == 5
        assert torch.isin(context[query], own).all()
        assert support.unique().numel() + query.unique().numel() == torch.cat([support, query], 1).unique().numel()
        assert query.unique().numel() == query.numel()
        shares.append((context[query] == own[:, :1]).double().mean())
    assert abs(torch.stack(shares).mean() - agrees) < 0.05


def test_control_episodes_have_one_context(generator):
    concept, context = crossed()
    for support, query, _ in ContextEpisodeSampler(
        concept, context, shift=None, n_episodes=5, generator=generator
    ).episodes():
        assert context[torch.cat([support, query], 1)].unique().numel() == 1


def test_context_readers_win_without_shift_and_lose_with_it(generator):
    concept, context = crossed()
    reads_context, reads_concept = torch.eye(6)[context], torch.eye(6)[concept]
    for shift, expected in ((0.0, 1.0), (1.0, 0.0)):
        for episode in ContextEpisodeSampler(
            concept, context, shift=shift, n_episodes=5, generator=generator
        ).episodes():
            assert prototype_accuracy(reads_context, episode) == expected
            assert prototype_accuracy(reads_concept, episode, metric="euclidean") == 1


def test_sampler_feeds_a_data_loader(generator):
    concept, context = crossed()
    sampler = ContextEpisodeSampler(concept, context, 3, 1, 2, 0.0, 4, torch.Generator().manual_seed(3))
    loader = torch.utils.data.DataLoader(torch.arange(len(concept)), batch_sampler=sampler)
    batches = [batch.view(3, 3) for batch in loader]
    assert len(batches) == 4 == len(sampler)
    assert all((concept[b] == concept[b[:, :1]]).all() for b in batches)


def test_shift_score_in_closed_form():
    concept, context = crossed(n=2)
    for a, b in ((1.0, 0.0), (0.0, 1.0), (2.0, 1.0)):
        z = torch.cat([a * torch.eye(6)[context], b * torch.eye(6)[concept]], 1)
        score = spurious_shift_score(z, concept, context)
        assert math.isclose(score.score, a**2 / (a**2 + b**2), abs_tol=1e-12)
        assert math.isclose(score.context + score.concept, 1, abs_tol=1e-12)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"n_way": 7}, "classes and contexts"),
        ({"n_query": 12}, "of every class in every"),
        ({"shift": 1.5}, "shift"),
        ({"k_shot": 0}, "k_shot"),
    ],
)
def test_sampler_refuses(kwargs, match):
    with pytest.raises(ValueError, match=match):
        ContextEpisodeSampler(*crossed(), **kwargs)


def test_prototypes_refuse():
    episode = Episode(torch.tensor([[0], [1]]), torch.tensor([[2], [9]]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="places below 3"):
        prototype_accuracy(torch.ones(3, 2), episode)


# --- counter groups ------------------------------------------------------------------------------------


def test_counter_split_picks_best_and_worst(generator):
    y = torch.randint(3, (6000,), generator=generator)
    b = torch.randint(4, (6000,), generator=generator)
    right = torch.rand(6000, generator=generator) < torch.where(b == y, 0.95, torch.where(b == (y + 1) % 4, 0.5, 0.8))
    split = counter_split(torch.where(right, y, (y + 1) % 3), y, b)
    assert split.common_background.tolist() == [0, 1, 2]
    assert split.counter_background.tolist() == [1, 2, 3]
    assert torch.equal(split.common, b == y)
    assert not (split.common & split.counter).any()


def test_who_splits_shows_a_drop_even_without_an_effect(generator):
    y, b = torch.randint(2, (400,), generator=generator), torch.randint(5, (400,), generator=generator)
    own, other = [], []
    for _ in range(40):
        first, second = (torch.where(torch.rand(400, generator=generator) < 0.8, y, 1 - y) for _ in range(2))
        split = counter_split(first, y, b)
        own.append(group_drop(first == y, split.common, split.counter).drop)
        other.append(group_drop(second == y, split.common, split.counter).drop)
    assert torch.stack(own).mean() > 0.1 > 3 * abs(torch.stack(other).mean())


def test_classes_without_two_backgrounds_are_left_out():
    y = torch.tensor([0] * 40 + [1] * 20)
    b = torch.tensor([0] * 20 + [1] * 20 + [1] * 20)
    split = counter_split(y, y, b)
    assert split.common_background.tolist() == [0, -1]
    assert split.counter_background.tolist() == [1, -1]
    assert not split.common[40:].any()
    assert not split.counter[40:].any()
    with pytest.raises(ValueError, match="two backgrounds"):
        counter_split([0, 0], [0, 0], [0, 1])


def test_group_drop_has_an_interval():
    drop = group_drop([1] * 56 + [0] * 14 + [1] * 48 + [0] * 32, [1] * 70 + [0] * 80, [0] * 70 + [1] * 80)
    assert math.isclose(drop.low, 0.0524, abs_tol=1e-4)
    assert math.isclose(drop.high, 0.3339, abs_tol=1e-4)
    empty = group_drop([1, 0], [1, 1], [0, 0])
    assert empty.drop.isnan()
    assert (empty.low, empty.high) == (-1, 1)
    with pytest.raises(ValueError, match="in both"):
        group_drop([1, 0], [1, 1], [1, 0])


def test_caption_loss_is_cross_entropy_for_distinct_captions(generator):
    u, v = (torch.nn.functional.normalize(torch.randn(6, 4, generator=generator), dim=1) for _ in range(2))
    scale = torch.full((6,), 3.0)
    logits, target = 3.0 * u @ v.T, torch.arange(6)
    expected = (
        torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)
    ) / 2
    assert torch.isclose(caption_loss((u, v, scale), target), expected)


def test_equal_captions_are_not_pushed_apart():
    u = torch.eye(4)[[0, 0, 1, 1]]
    same = caption_loss((u, u, torch.full((4,), 50.0)), torch.tensor([0, 0, 1, 1]))
    assert math.isclose(same.item(), math.log(2), rel_tol=1e-4)  # even over the two matches: the minimum


def test_tiny_clip_towers_and_data(generator):
    train = make_captioned_digits(0.9, generator=generator)
    test = make_captioned_digits(0.5, part="test", generator=generator)
    assert abs((train.labels == train.backgrounds).double().mean() - 0.9) < 0.05
    assert train.backgrounds.max() == 3
    assert len(train.labels) > len(test.labels)
    clip = TinyCLIP(192, 8, seed=0)
    x = clip.pack(test.images, torch.eye(8)[test.labels])
    image, text, _ = clip(x)
    assert torch.allclose(image, clip.image(test.images))
    assert torch.allclose(text, clip.text(torch.eye(8)[test.labels]))
    assert torch.allclose(image.norm(dim=1), torch.ones(len(image)))
    with pytest.raises(ValueError, match="part"):
        make_captioned_digits(part="both")


# --- the curve ------------------------------------------------------------------------------------


def test_spurious_xor_is_what_it_says(generator):
    x, y, majority = make_spurious_xor(50_000, 0.8, generator=generator)
    assert abs(majority.double().mean() - 0.8) < 0.01
    assert (((x[:, 0] * x[:, 1]) > 0).long() == y).all()
    easy = (x[:, 2] > 0).long()
    expected = sps.norm.cdf(0.7 / 0.5)
    assert abs((easy == y)[majority].double().mean() - expected) < 0.01
    assert abs((easy == y)[~majority].double().mean() - (1 - expected)) < 0.01


@pytest.mark.parametrize("scale", ["raw", "probit"])
def test_curve_fit_agrees_with_numpy(scale, generator):
    x, y = 0.1 + 0.8 * torch.rand(2, 60, generator=generator, dtype=torch.float64)
    fit = curve_fit_report(x, y, scale=scale)
    a, b = (sps.norm.ppf(v) if scale == "probit" else v.numpy() for v in (x, y))
    residual = b - np.polyval(np.polyfit(a, b, 2), a)
    assert math.isclose(fit.r2_linear, np.corrcoef(a, b)[0, 1] ** 2, rel_tol=1e-9)
    assert math.isclose(fit.r2_quadratic, 1 - (residual**2).sum() / ((b - b.mean()) ** 2).sum(), rel_tol=1e-9)
    assert math.isclose(fit.curvature, np.polyfit(a, b, 2)[0], rel_tol=1e-6)


def test_accuracy_points_learn(generator):
    train, test = (make_spurious_xor(400, rho, generator=generator) for rho in (1.0, 0.5))
    points = accuracy_points(train, test, widths=(8,), lrs=(0.1, 0.5), checkpoints=(1, 60), device="cpu")
    assert points.majority.shape == (2, 2)
    assert points.epochs.tolist() == [1, 60]
    assert points.majority[-1].min() > 0.75
    assert (points.majority[-1] > points.minority[-1] + 0.2).all()  # the cue is followed where it lies
    with pytest.raises(ValueError, match="both groups"):
        accuracy_points(train, train)
    with pytest.raises(ValueError, match="checkpoint"):
        accuracy_points(train, test, checkpoints=())


@pytest.mark.parametrize(
    ("args", "kwargs", "match"),
    [
        (([0.1, 0.2, 0.3], [0.1, 0.2, 0.3]), {}, "at least 4"),
        (([0.1, 0.2, 0.3, 0.4], [0.5] * 4), {}, "differ"),
        (([0.1, 0.2, 0.3, 1.0], [0.1, 0.2, 0.3, 0.4]), {"scale": "probit"}, "inside"),
        (([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]), {"scale": "log"}, "scale"),
    ],
)
def test_curve_fit_refuses(args, kwargs, match):
    with pytest.raises(ValueError, match=match):
        curve_fit_report(*args, **kwargs)


# --- backgrounds ------------------------------------------------------------------------------------


def test_border_colours_are_found(generator):
    _, test = make_background_digits(generator=generator)
    groups = background_color_groups(test.images, 5, generator=generator)
    table = torch.zeros(5, 5).index_put_((test.groups, groups), torch.ones(()), accumulate=True)
    assert table.max(1).values.sum() / table.sum() > 0.9
    assert table.argmax(1).unique().numel() == 5
    with pytest.raises(ValueError, match="at least 9 images"):
        background_color_groups(test.images[:5], 9)


def test_test_digits_stand_on_every_colour(generator):
    train, test = make_background_digits(0.7, generator=generator)
    n = len(test.labels) // 5
    assert torch.equal(test.labels[:n], test.labels[-n:])
    assert torch.equal(test.ink[:n], test.ink[-n:])
    share = (train.groups == train.labels % 5).double().mean()
    assert abs(share - (0.7 + 0.3 / 5)) < 0.04


def test_latent_swap_moves_only_along_its_directions(generator, device):
    train, _ = make_background_digits(generator=generator)
    directions = PrincipalDirections.of(train.images, k=3)
    x = train.images[:50].to(device)
    moved = latent_swap(x, PrincipalDirections(*(t.to(device) for t in directions)), generator=generator)
    change = (moved - x).flatten(1).cpu()
    v = directions.directions
    assert torch.allclose(v @ v.T, torch.eye(3), atol=1e-5)
    assert (change - change @ v.T @ v).abs().max() < 1e-5
    assert change.norm() > 1
    assert torch.equal(latent_swap(x, directions, strength=0.0), x)
    with pytest.raises(ValueError, match="numbers each"):
        latent_swap(x[:, :1], directions)


def test_swap_backgrounds_keeps_the_ink(generator):
    ink = torch.rand(20, 1, 8, 8, generator=generator)
    images = swap_backgrounds(ink, 5, generator)
    assert ((images - ink) >= -1e-6).all()
    assert images.max() <= 1
    with pytest.raises(ValueError, match="ink"):
        swap_backgrounds(images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_embeddings_in_half_precision(dtype):
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    y, groups = torch.arange(60) % 2, torch.arange(60) // 2 % 3
    head, other = (last_layer_retrain(v, y, groups, generator=0) for v in (x, x.float()))
    assert np.array_equal(head.coef_, other.coef_)
    episode = Episode(torch.tensor([[0], [1]]), torch.arange(2, 42).view(2, 20), torch.tensor([0, 1]))
    for metric in ("cosine", "euclidean"):
        assert prototype_accuracy(x, episode, metric) == prototype_accuracy(x.float(), episode, metric)


def test_prototypes_far_from_the_origin():
    episode = Episode(torch.tensor([[0], [1]]), torch.arange(2, 62).view(2, 30), torch.tensor([0, 1]))
    x = torch.randn(62, 4, generator=torch.Generator().manual_seed(0))
    x[1], x[32:] = x[1] + 9, x[32:] + 9
    assert prototype_accuracy(x + 1e5, episode, "euclidean") == 1


def test_names_of_patients_may_be_large_numbers():
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    labels, sites, patients = torch.arange(12) % 2, torch.arange(12) // 6, torch.arange(12) // 2
    few = robustness_index(x, labels, sites, 3, exclude=patients)
    assert torch.equal(robustness_index(x, labels, sites, 3, exclude=patients + 2**60), few)


def test_robust_logistic_where_no_gradients_are_recorded():
    x, y = [[-2.0], [-1.0], [0.5], [-0.5], [1.0], [2.0]], [0, 0, 0, 1, 1, 1]
    usual = robust_logistic(x, y)
    with torch.no_grad():
        assert torch.equal(robust_logistic(x, y).weights, usual.weights)


def test_a_seed_is_a_generator():
    for draw in (
        lambda g: make_attribute_population(20, generator=g).attributes,
        lambda g: make_background_digits(generator=g)[0].images,
        lambda g: make_regional_digits(generator=g).train[0],
    ):
        assert torch.equal(draw(3), draw(torch.Generator().manual_seed(3)))
