import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import sparse
from sklearn.base import clone
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.estimator_checks import parametrize_with_checks

from companion.data import load_digits
from companion.mixing import Mixed, mixup
from companion.mixup import (
    SMOTE,
    AffineFamily,
    CaptionSpace,
    DiverseGenerator,
    MetrixLoss,
    PrimalDualAugment,
    SpriteSource,
    TextOnlyDecoder,
    TransformSampler,
    close_gap,
    coverage,
    embedding_noise,
    energy_gap,
    energy_score,
    fit_constrained,
    generic_metric_loss,
    instance_replacement,
    joint_roc_hull,
    memory_projection,
    metrix_loss,
    mix_labels,
    modality_gap,
    recall_at,
    replicate,
    retrieve_tags,
    roc_convex_hull,
    similarity_filter,
    smote_points,
    under_sample,
    utilization,
)
from companion.nets import MLP
from companion.ranking import auroc, roc_curve


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(n=24, d=6, n_classes=4, seed=0, dtype=torch.float64):
    z = torch.randn(n, d, generator=seeded(seed), dtype=dtype)
    return z, torch.arange(n) % n_classes


class TestMetricLoss:
    @pytest.mark.parametrize("base", ["ms", "contrastive"])
    def test_hard_labels_give_the_loss_by_the_book(self, base, device):
        z, y = batch()
        u = F.normalize(z, dim=1).numpy()
        s = u @ u.T
        losses = []
        for a in range(len(y)):
            pos = [s[a, v] for v in range(len(y)) if v != a and y[v] == y[a]]
            neg = [s[a, v] for v in range(len(y)) if y[v] != y[a]]
            if base == "contrastive":
                losses.append(sum(1 - p for p in pos) + sum(max(0, q - 0.5) for q in neg))
            else:
                pull = math.log(1 + sum(math.exp(-2 * (p - 0.5)) for p in pos)) / 2
                losses.append(pull + math.log(1 + sum(math.exp(40 * (q - 0.5)) for q in neg)) / 40)
        z, y = z.to(device), y.to(device)
        mixed = Mixed(z, y, y, torch.tensor(1.0, device=device))
        got = metrix_loss(z, y, mixed, base=base, weight=0.0)
        assert float(got) == pytest.approx(np.mean(losses), rel=1e-9)

    @pytest.mark.parametrize("base", ["ms", "contrastive"])
    @pytest.mark.parametrize("lam", [0.0, 1.0])
    def test_mixing_with_lam_0_or_1_is_the_base_loss_of_the_parent(self, base, lam):
        z, y = batch()
        partner = torch.randperm(len(y), generator=seeded(1))
        first, second = F.normalize(z, dim=1), F.normalize(z, dim=1)[partner]
        mixed = Mixed(lam * first + (1 - lam) * second, y, y[partner], torch.tensor(lam))
        parents, classes = (first, y) if lam else (second, y[partner])
        crossing = (y == y[:, None]) != (y[partner] == y[:, None])
        expected = generic_metric_loss(first @ parents.T, (classes == y[:, None]).to(z), base, crossing)
        extra = metrix_loss(z, y, mixed, base=base, weight=1.0) - metrix_loss(z, y, mixed, base=base, weight=0.0)
        assert float(extra) == pytest.approx(float(expected), abs=1e-9)

    def test_contrastive_is_linear_in_the_label(self):
        s = torch.tensor([[0.7, 0.2]], dtype=torch.float64)
        ends = [generic_metric_loss(s, torch.full_like(s, v), "contrastive") for v in (0.0, 1.0)]
        half = generic_metric_loss(s, torch.full_like(s, 0.25), "contrastive")
        assert float(half) == pytest.approx(float(0.75 * ends[0] + 0.25 * ends[1]))

    def test_mixed_labels(self):
        y_a, y_b = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2])
        got = mix_labels(y_a, y_b, torch.tensor([0.3, 0.6, 0.9]), torch.tensor([0, 1]))
        torch.testing.assert_close(got, torch.tensor([[1.0, 0.6, 0.0], [0.0, 0.4, 0.9]]))

    def test_same_or_foreign_parents_do_not_count(self):
        z, y = batch(8, n_classes=2)
        same = Mixed(z, y, y, torch.tensor(0.5))
        assert float(metrix_loss(z, y, same)) == pytest.approx(float(metrix_loss(z, y, same, weight=0.0)))

    def test_module_mixes_by_its_generator_and_reaches_every_embedding(self):
        z, y = batch(dtype=torch.float32)
        values = [MetrixLoss(generator=seeded(s))(z, y) for s in (0, 0, 1)]
        assert values[0] == values[1] != values[2]
        z.requires_grad_()
        MetrixLoss(generator=seeded())(z, y).backward()
        assert bool((z.grad.abs().sum(1) > 0).all())

    def test_input_level_goes_through_the_network(self):
        net, loss = MLP((5, 8, 3), seed=0), MetrixLoss("contrastive")
        x, y = torch.randn(9, 5, generator=seeded()), torch.arange(9) % 3  # an odd batch
        m = mixup(x, y, 2.0, generator=seeded(1))
        m = m._replace(x=net(m.x))
        value = loss(net(x), y, mixed=m)
        torch.testing.assert_close(value, metrix_loss(net(x), y, m, base="contrastive"))

    def test_proxies_are_trained_and_match_the_formula(self):
        loss = MetrixLoss("proxy", weight=0.0, n_classes=4, dim=6, generator=seeded())
        z, y = batch(dtype=torch.float32)
        value = loss(z, y)
        value.backward()
        s = F.normalize(loss.proxies, dim=1) @ F.normalize(z, dim=1).T
        expected = generic_metric_loss(s, (y == torch.arange(4)[:, None]).float(), "proxy")
        torch.testing.assert_close(value, expected)
        assert float(loss.proxies.grad.abs().sum()) > 0

    def test_utilization_and_recall(self):
        z, y = batch(40, n_classes=4)
        refs = torch.randn(30, 6, generator=seeded(2), dtype=torch.float64)
        expected = torch.cdist(z, refs).min(1).values.square().mean()
        torch.testing.assert_close(utilization(z, refs), expected)
        u = F.normalize(z, dim=1)
        nearest = (u @ u.T - 2 * torch.eye(40)).argmax(1)
        assert float(recall_at(z, y)) == pytest.approx(float((y[nearest] == y).double().mean()))
        assert float(recall_at(z, y, k=39)) == 1

    def test_bad_input(self):
        z, y = batch()
        for make in (lambda: MetrixLoss("triplet"), lambda: MetrixLoss(alpha=-1.0), lambda: MetrixLoss()(z, y[:-1])):
            with pytest.raises(ValueError, match="expected"):
                make()
        with pytest.raises(TypeError, match="n_classes"):
            MetrixLoss("proxy")


def imbalanced(n=120, rare=20, d=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), np.r_[np.zeros(n - rare, int), np.ones(rare, int)]


class TestSMOTE:
    @pytest.mark.parametrize("n_new", [7, 150])
    def test_points_lie_on_segments_to_near_neighbours(self, n_new):
        x = torch.randn(30, 4, generator=seeded(), dtype=torch.float64)
        new = smote_points(x, n_new, k=3, generator=seeded(1))
        neighbours = NearestNeighbors(n_neighbors=4).fit(x).kneighbors(x, return_distance=False)[:, 1:]
        for point, i, j, lam in zip(*new):
            assert int(j) in neighbours[int(i)]
            torch.testing.assert_close(point, x[i] + lam * (x[j] - x[i]), rtol=0, atol=1e-14)
            assert 0 <= float(lam) < 1

    def test_from_the_points_alone(self):
        """Without being told the ends: distances to some neighbouring pair add up to the length of its segment."""
        X, y = imbalanced()
        rare = X[y == 1]
        points = SMOTE(k_neighbors=4, random_state=3).fit_resample(X, y)[0][len(X) :]
        neighbours = NearestNeighbors(n_neighbors=5).fit(rare).kneighbors(rare, return_distance=False)[:, 1:]
        ends = [(rare[i], rare[j]) for i, row in enumerate(neighbours) for j in row]
        for p in points:
            detour = min(np.linalg.norm(p - a) + np.linalg.norm(p - b) - np.linalg.norm(a - b) for a, b in ends)
            assert detour < 1e-12

    def test_duplicates_and_both_ways_to_search(self):
        x = torch.zeros(8, 2).index_fill(0, torch.tensor([7]), 1.0)  # seven equal rows
        new = smote_points(x, 5, k=2, generator=seeded())
        assert bool((new.base != new.neighbour).all())
        many = smote_points(x, 64, k=2, generator=seeded())
        assert bool((many.base != many.neighbour).all())

    def test_draws_are_uniform(self):
        x = torch.randn(10, 2, generator=seeded(), dtype=torch.float64)
        new = smote_points(x, 20000, k=2, generator=seeded(1))
        assert float((new.base.bincount() / 2000 - 1).abs().max()) < 0.1
        assert float(new.lam.mean()) == pytest.approx(0.5, abs=0.01)

    def test_same_seed_same_points_and_input_untouched(self):
        X, y = imbalanced()
        kept = X.copy()
        a, b, c = (SMOTE(random_state=s).fit_resample(X, y)[0] for s in (0, 0, 1))
        assert np.array_equal(a, b)
        assert not np.array_equal(a, c)
        assert np.array_equal(X, kept)
        assert np.array_equal(a[: len(X)], X)

    @pytest.mark.parametrize(
        ("strategy", "counts"),
        [
            ("auto", [60, 60, 60]),
            ("minority", [60, 25, 60]),
            ("not minority", [60, 60, 15]),
            ("all", [60, 60, 60]),
            ({2: 40}, [60, 25, 40]),
            (lambda y: {1: 30}, [60, 30, 15]),
        ],
    )
    def test_strategies(self, strategy, counts):
        X = np.random.default_rng(0).normal(size=(100, 2))
        y = np.repeat([0, 1, 2], [60, 25, 15])
        sampler = SMOTE(sampling_strategy=strategy, random_state=0)
        assert np.bincount(sampler.fit_resample(X, y)[1]).tolist() == counts
        assert sum(sampler.sampling_strategy_.values()) == sum(counts) - 100

    def test_ratio(self):
        X, y = imbalanced()
        assert np.bincount(SMOTE(sampling_strategy=0.5).fit_resample(X, y)[1]).tolist() == [100, 50]

    def test_kinds(self, device):
        X, y = imbalanced()
        expected, labels = SMOTE(random_state=0).fit_resample(X, y)
        t, ty = SMOTE(random_state=0).fit_resample(torch.tensor(X).to(device), torch.tensor(y).to(device))
        assert t.device.type == torch.device(device).type
        np.testing.assert_allclose(t.cpu().numpy(), expected)
        assert ty.tolist() == labels.tolist()
        rows, classes = SMOTE(random_state=0).fit_resample(X.tolist(), ["ab"[v] for v in y])
        assert isinstance(rows, list)
        assert classes.count("b") == 100
        s, _ = SMOTE(random_state=0).fit_resample(sparse.csr_array(X), y)
        assert s.format == "csr"
        np.testing.assert_allclose(s.toarray(), expected)
        assert SMOTE().fit_resample(X.astype(np.float32), y)[0].dtype == np.float32

    def test_whole_numbers_become_floats(self):
        pd = pytest.importorskip("pandas")
        frame = pd.DataFrame({"a": range(12), "b": np.linspace(0, 1, 12)})
        new, y = SMOTE(k_neighbors=2, random_state=0).fit_resample(frame, pd.Series([0] * 8 + [1] * 4, name="y"))
        assert new.dtypes.tolist() == [np.float64, np.float64]
        assert (new["a"] % 1 != 0).any()
        assert y.name == "y"

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"k_neighbors": 20}, "k_neighbors below the 20"),
            ({"sampling_strategy": 0.1}, "nothing is removed"),
            ({"sampling_strategy": {1: 3}}, "none below"),
            ({"sampling_strategy": {5: 30}}, "classes of y"),
            ({"sampling_strategy": "majority"}, "sampling_strategy among"),
            ({"sampling_strategy": [1]}, "text, a number"),
            ({"k_neighbors": 0}, "at least 1"),
        ],
    )
    def test_bad_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            SMOTE(**settings).fit_resample(*imbalanced())

    def test_bad_data(self):
        X, y = imbalanced()
        with pytest.raises(ValueError, match="1 class"):
            SMOTE().fit_resample(X, 0 * y)
        with pytest.raises(ValueError, match="NaN"):
            SMOTE().fit_resample(np.where(X > 1, np.nan, X), y)
        with pytest.raises(ValueError, match="k below"):
            smote_points(torch.zeros(3, 2), 1, k=3)

    @parametrize_with_checks([SMOTE(random_state=0)])
    def test_sklearn_contract(self, estimator, check):
        check(estimator)

    def test_imbalanced_learn_contract(self):
        checks = pytest.importorskip("imblearn.utils.estimator_checks")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            names = []
            for estimator, check in checks.estimator_checks_generator(SMOTE(random_state=0)):
                check(estimator)
                names.append(getattr(check, "func", check).__name__)
        assert "check_samplers_fit_resample" in names
        assert "check_samplers_sparse" in names

    def test_same_distribution_as_imbalanced_learn(self):
        theirs = pytest.importorskip("imblearn.over_sampling").SMOTE
        X, y = imbalanced(4000, 200)
        a, b = (s(random_state=0).fit_resample(X, y)[0][4000:] for s in (SMOTE, theirs))
        assert len(a) == len(b)
        np.testing.assert_allclose(a.mean(0), b.mean(0), atol=0.06)
        np.testing.assert_allclose(np.cov(a.T), np.cov(b.T), atol=0.08)

    def test_no_one_clones_away_the_settings(self):
        assert clone(SMOTE(k_neighbors=3)).get_params() == {
            "k_neighbors": 3,
            "random_state": None,
            "sampling_strategy": "auto",
        }


class TestRatesAndHulls:
    def test_under_sample_and_replicate(self):
        y = torch.tensor([0] * 90 + [1] * 10)
        assert y[under_sample(y, 0.5, seeded())].bincount().tolist() == [20, 10]
        assert y[under_sample(y, 0.01, seeded())].bincount().tolist() == [90, 10]
        repeated = replicate(y, 0.5, seeded())
        assert y[repeated].bincount().tolist() == [90, 45]
        assert repeated[:100].tolist() == list(range(100))
        assert (1 - y)[under_sample(1 - y, 1.0, seeded())].bincount().tolist() == [10, 10]
        with pytest.raises(ValueError, match="both classes"):
            under_sample([1, 1])

    def test_joint_hull_of_one_curve_is_its_hull(self):
        scores = torch.randn(200, generator=seeded(), dtype=torch.float64)
        labels = (scores + torch.randn(200, generator=seeded(1)) > 0.5).long()
        one, joint = roc_convex_hull(scores, labels), joint_roc_hull([roc_curve(scores, labels)])
        torch.testing.assert_close(joint.area, torch.trapezoid(one.tpr, one.fpr))
        assert float(joint.area) >= float(auroc(scores, labels))

    def test_joint_hull_lies_above_every_curve(self):
        curves = [(torch.rand(9, generator=seeded(i)), torch.rand(9, generator=seeded(i + 50))) for i in range(6)]
        hull = joint_roc_hull(curves)
        for fpr, tpr in curves:
            assert (np.interp(fpr, hull.fpr, hull.tpr) >= tpr.numpy() - 1e-9).all()
        slopes = torch.diff(hull.tpr) / torch.diff(hull.fpr)
        assert bool((torch.diff(slopes[torch.isfinite(slopes)]) < 0).all())
        assert (float(hull.fpr[-1]), float(hull.tpr[-1])) == (1, 1)

    def test_bad_rates(self):
        with pytest.raises(ValueError, match="at least one"):
            joint_roc_hull([])
        with pytest.raises(ValueError, match="rates"):
            joint_roc_hull([([0.2], [1.2])])


class TestAffine:
    def test_a_shift_by_whole_pixels(self, device):
        images = torch.rand(2, 1, 8, 8, generator=seeded()).to(device)
        right = AffineFamily("s", shift=0.25)(images, torch.tensor([[0.0, 1.0, 0.0, 0.0]]).expand(2, 4))
        torch.testing.assert_close(right[..., 2:], images[..., :-2], atol=1e-5, rtol=0)
        assert float(right[..., :2].abs().max()) < 1e-5

    @pytest.mark.parametrize("side", [8, 9])
    def test_a_quarter_turn(self, side):
        images = torch.rand(3, 1, side, side, generator=seeded())
        turned = AffineFamily("t", degrees=90)(images, torch.tensor([1.0, 0, 0, 0]).expand(3, 4))
        quarter = [torch.rot90(images, k, (2, 3)) for k in (1, 3)]
        assert min(float((turned - q).abs().max()) for q in quarter) < 1e-4

    def test_lead_dimensions_and_gradient(self):
        images = torch.rand(2, 3, 1, 6, 6, generator=seeded(), requires_grad=True)
        family = AffineFamily("all", 30, 0.1, 0.2)
        u = family.draw((2, 3), seeded(1))
        out = family(images, u)
        torch.testing.assert_close(out[1], family(images[1], u[1]))
        out.sum().backward()
        assert float(images.grad.abs().sum()) > 0


class TestSampler:
    def test_density_is_proportional_to_the_loss(self):
        """A loss that is 1 or 3, half of the turns each, should be met at 3 three times as often as at 1."""
        sampler = TransformSampler(AffineFamily("s", shift=0.0, degrees=180), n_steps=40)
        image = torch.zeros(1, 9, 9)
        image[0, 4, 6:] = 1.0

        def losses(x):
            return torch.where(x[:, 0, :4].sum((1, 2)) > x[:, 0, 5:].sum((1, 2)), 3.0, 1.0)

        drawn = sampler.sample(losses, image.expand(4000, 1, 9, 9), seeded())
        assert float((losses(drawn.images) == 3).double().mean()) == pytest.approx(0.75, abs=0.03)
        plain = TransformSampler(sampler.family, n_steps=0).sample(losses, image.expand(4000, 1, 9, 9), seeded())
        assert float((losses(plain.images) == 3).double().mean()) == pytest.approx(0.5, abs=0.03)
        assert plain.acceptance == 0 < drawn.acceptance < 1

    def test_images_are_those_of_the_parameters(self):
        family, images = AffineFamily("all", 45, 0.2), torch.rand(6, 1, 8, 8, generator=seeded())
        drawn = TransformSampler(family, 3).sample(lambda x: x.square().sum((1, 2, 3)), images, seeded(1))
        torch.testing.assert_close(family(images, drawn.parameters), drawn.images)


class TestPrimalDual:
    def test_prices_solve_a_problem_with_a_known_answer(self):
        """Minimise (w - 2)^2 subject to w^2 <= 1: the price is 1 (2 (w - 2) + 2 mu w = 0 at w = 1)."""
        learner = PrimalDualAugment([AffineFamily("none")], eps=1.0, dual_lr=0.02, n_steps=0)
        w = torch.zeros((), requires_grad=True)
        calls = []

        def losses(images):  # first the clean loss, then the constrained one
            calls.append(0)
            return ((w - 2) ** 2 if len(calls) % 2 else w**2).expand(len(images))

        for _ in range(1500):
            value, constrained = learner.lagrangian(losses, torch.zeros(1, 1, 4, 4))
            (slope,) = torch.autograd.grad(value, w)
            with torch.no_grad():
                w -= 0.02 * slope
            learner.update(constrained)
        assert w.item() == pytest.approx(1, abs=1e-2)
        assert float(learner.duals_) == pytest.approx(1, abs=1e-2)

    def test_prices_rise_fall_and_stay_in_their_bounds(self):
        learner = PrimalDualAugment([AffineFamily("a"), AffineFamily("b")], eps=[0.5, 1.0], dual_lr=1.0, cap=2.0)
        assert learner.update(torch.tensor([1.5, 0.0])).tolist() == [1.0, 0.0]
        assert learner.update(torch.tensor([9.0, 1.25])).tolist() == [2.0, 0.25]
        assert len(learner.dual_history_) == 2

    def test_no_families_is_plain_training_and_zero_rate_keeps_the_weights(self):
        x, y = torch.rand(20, 1, 6, 6, generator=seeded()), torch.arange(20) % 3
        model = MLP((36, 3), seed=0)

        def losses(images):
            return F.cross_entropy(model(images), y, reduction="none")

        value, _ = PrimalDualAugment([]).lagrangian(losses, x)
        torch.testing.assert_close(value, losses(x).mean())
        fixed = PrimalDualAugment([AffineFamily("none")], eps=0.0, initial=2.0, dual_lr=0.0)
        value, constrained = fixed.lagrangian(losses, x)
        fixed.update(constrained)
        torch.testing.assert_close(value, 3 * losses(x).mean(), rtol=1e-4, atol=1e-5)
        assert fixed.duals_.tolist() == [2.0]

    def test_step_and_fit(self, device):
        x, y, _, _ = load_digits(0.9, seeded(), images=True)
        model = MLP((64, 16, 10), seed=0).to(device)
        learner = PrimalDualAugment([AffineFamily("turns", degrees=30)], eps=0.1, dual_lr=0.1)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        values = [float(learner.step(model, optimizer, x.to(device), y.to(device), seeded(i))) for i in range(15)]
        assert values[-1] < values[0] + float(learner.duals_) * 3
        assert float(learner.duals_) > 0
        many = [
            fit_constrained(lambda: MLP((64, 16, 10)), [0, 1], x, y, learner, n_steps=60, lr=1e-2, device=device)
            for _ in range(2)
        ]
        assert torch.equal(many[0].params["head.weight"], many[1].params["head.weight"])
        assert learner.duals_.shape == (2, 1)
        assert float(many[0].accuracy(x.to(device), y).mean()) > 0.6

    def test_bad_settings(self):
        with pytest.raises(ValueError, match="one per family"):
            PrimalDualAugment([AffineFamily("a")], eps=[1.0, 2.0])
        with pytest.raises(ValueError, match="eps"):
            PrimalDualAugment([AffineFamily("a")], eps=-1.0)
        with pytest.raises(ValueError, match="degrees"):
            AffineFamily("a", degrees=-1)


class TestGap:
    def test_known_clouds(self, device):
        a = torch.randn(4000, 6, generator=seeded(), dtype=torch.float64).to(device)
        b = torch.randn(3000, 6, generator=seeded(1), dtype=torch.float64).to(device)
        b[:, 0] -= 3
        gap = modality_gap(a, b)
        assert float(gap.distance) == pytest.approx(3, abs=0.1)
        assert float(gap.share) == pytest.approx(9 / 21, abs=0.02)
        assert float(gap.separability) == pytest.approx(0.5 * (1 + math.erf(3 / 2)), abs=0.01)  # Phi(3 / sqrt 2)
        pairs = torch.cdist(a[:500], b[:500]).square().mean()
        spread = a.var(0, correction=0).sum() + b.var(0, correction=0).sum()
        assert float(pairs) == pytest.approx(float(gap.distance**2 + spread), rel=0.05)
        assert float(modality_gap(close_gap(a, a, b), b).distance) < 1e-10

    def test_does_not_change_under_rotation(self):
        a, b = torch.randn(50, 4, generator=seeded()), torch.randn(60, 4, generator=seeded(1)) + 1
        turn = torch.linalg.qr(torch.randn(4, 4, generator=seeded(2)))[0]
        for one, two in zip(modality_gap(a, b)[1:], modality_gap(a @ turn, b @ turn)[1:]):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5, check_dtype=False)

    def test_mixing(self):
        z = torch.randn(300, 8, generator=seeded())
        noisy = embedding_noise(z, 0.3, seeded(1))
        assert float((noisy - z).std()) == pytest.approx(0.3, abs=0.02)
        swapped = instance_replacement(z, k=3, p=0.4, generator=seeded(2))
        unit = F.normalize(z, dim=1)
        near = (unit @ unit.T - 2 * torch.eye(300)).topk(3).indices
        changed = (swapped != z).any(1)
        assert float(changed.float().mean()) == pytest.approx(0.4, abs=0.08)
        assert all(any(torch.equal(swapped[i], z[j]) for j in near[i]) for i in changed.nonzero()[:, 0])
        assert torch.equal(instance_replacement(z, k=3, p=0.0), z)

    def test_projection_stays_in_the_hull_and_finds_its_own(self):
        bank = torch.randn(7, 16, generator=seeded())
        torch.testing.assert_close(memory_projection(bank, bank, 1e-3), bank)
        flat = memory_projection(bank, bank, 1e6)
        torch.testing.assert_close(flat, bank.mean(0).expand_as(flat), atol=1e-4, rtol=0)

    def test_tags_ignore_a_shift_outside(self):
        space = CaptionSpace(generator=seeded())
        near, far = (space.sample(200, shift, generator=seeded(1)) for shift in (0.0, 9.0))
        assert torch.equal(retrieve_tags(near.audio, space.tags), retrieve_tags(far.audio, space.tags))
        assert bool((retrieve_tags(near.audio, space.tags, 4).sum(1) == 4).all())
        inside = CaptionSpace(gap="inside", generator=seeded())
        near, far = (inside.sample(200, shift, generator=seeded(1)) for shift in (0.0, 9.0))
        assert not torch.equal(retrieve_tags(near.audio, inside.tags), retrieve_tags(far.audio, inside.tags))

    def test_space_and_decoder(self):
        space = CaptionSpace(generator=seeded())
        scenes = space.sample(400, 2.0, audio_noise=0.0, generator=seeded(1))
        assert float(space.direction @ space.tags.T @ torch.ones(18)) == pytest.approx(0, abs=1e-4)
        assert float(modality_gap(scenes.audio, scenes.text).distance) == pytest.approx(2, abs=0.1)
        decoder = TextOnlyDecoder(128, seed=0)
        assert decoder.caption(scenes.text).shape == scenes.words.shape
        expected = (decoder.caption(scenes.text) == scenes.words).double().mean()
        assert decoder.word_accuracy(scenes.text, scenes.words) == expected

    def test_bad_input(self):
        with pytest.raises(ValueError, match="one dimension"):
            modality_gap(torch.zeros(3, 2), torch.zeros(3, 4))
        with pytest.raises(ValueError, match="outside"):
            CaptionSpace(gap="between")
        with pytest.raises(ValueError, match="meaning"):
            CaptionSpace(dim=8, meaning=8)
        with pytest.raises(ValueError, match="std"):
            embedding_noise(torch.zeros(1, 2), -1.0)


class TestDiverse:
    def test_budget_is_split_evenly(self):
        seen = []

        def source(label, n, prompt, generator):
            seen.append((label, n, prompt))
            return torch.rand(n, 2, generator=generator)

        maker = DiverseGenerator([source, source], prompts=("a", "b"), extra_classes=(7, 8))
        made = maker.sample(3, 10, seeded())
        assert made.x.shape == (10, 2)
        assert [n for _, n, _ in seen] == [3, 3, 2, 2]
        assert made.labels.tolist() == [3] * 10
        assert made.source.bincount().tolist() == [6, 4]
        assert made.prompt.bincount().tolist() == [5, 5]
        extra = maker.sample_extra(2, seeded())
        assert extra.labels.tolist() == [7, 7, 8, 8]
        assert DiverseGenerator([source]).sample_extra(2) is None
        assert maker.sample(0, 1).x.shape == (1, 2)

    def test_sources_have_their_bias(self):
        bright, dark = (SpriteSource(polarity=p, noise=0.0)(1, 20, generator=seeded()) for p in ("bright", "dark"))
        assert float(bright.min()) > 0.49
        assert float(dark.max()) < 0.51
        stiff = SpriteSource(angles=1, polarity="bright", sizes=(0.3,), noise=0.0)(1, 30, generator=seeded())
        free = SpriteSource(polarity="bright", sizes=(0.3,), noise=0.0)(1, 30, generator=seeded())
        assert float(free.std(0).mean()) > 1.05 * float(stiff.std(0).mean())
        asked = SpriteSource()(0, 3, prompt=0.25, generator=seeded())
        assert asked.shape == (3, 1, 16, 16)

    def test_energy(self):
        z = torch.randn(20, 5, generator=seeded())
        torch.testing.assert_close(energy_score(z), -z.exp().sum(1).log())
        torch.testing.assert_close(energy_score(z + 2), energy_score(z) - 2)
        assert float(energy_gap(z, z)) == 0
        assert float(energy_gap(z + 3, z)) == pytest.approx(3, abs=1e-5)

    def test_coverage_sees_a_missing_mode(self):
        test = torch.randn(200, 3, generator=seeded()) + 8 * (torch.arange(200) % 2)[:, None]
        whole = torch.randn(200, 3, generator=seeded(1)) + 8 * (torch.arange(200) % 2)[:, None]
        assert 0.7 < float(coverage(whole, test)) < 1.4
        assert float(coverage(whole[::2], test)) > 2

    def test_filter(self):
        real = torch.randn(30, 4, generator=seeded()) + torch.tensor([5.0, 0, 0, 0])
        good, bad = real[:10] + 0.1, torch.randn(10, 4, generator=seeded(1)) - torch.tensor([5.0, 0, 0, 0])
        both = torch.cat([good, bad])
        assert similarity_filter(both, real, 0.5).tolist() == list(range(10))
        sources = torch.arange(20) // 10
        assert sources[similarity_filter(both, real, 0.5, sources)].bincount().tolist() == [5, 5]
        assert len(similarity_filter(both, real, 1.0)) == 20

    def test_bad_input(self):
        with pytest.raises(ValueError, match="source"):
            DiverseGenerator([])
        with pytest.raises(ValueError, match="polarity"):
            SpriteSource(polarity="grey")
        with pytest.raises(ValueError, match="keep"):
            similarity_filter(torch.zeros(2, 2), torch.ones(2, 2), keep=0.0)
        with pytest.raises(TypeError, match="whole number"):
            DiverseGenerator([lambda *a: 0]).sample(0, 2.5)


def test_fit_constrained_takes_the_floats_of_numpy_and_records_gradients_itself():
    def train(x):
        learner = PrimalDualAugment([AffineFamily("turns", degrees=45)])
        make = lambda: MLP((64, 8, 2))  # noqa: E731
        return fit_constrained(make, [0, 1], x, np.arange(32) % 2, learner, n_steps=3, generator=0, device="cpu")

    images = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    usual = train(images)(images)
    with torch.no_grad():
        assert torch.equal(train(images.double().numpy())(images), usual)


@pytest.mark.parametrize("base", ["ms", "contrastive"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_metric_loss_of_half_precision_is_finite(base, dtype):
    z, y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
    short, long = (MetrixLoss(base, generator=torch.Generator().manual_seed(0))(x, y) for x in (z.to(dtype), z))
    torch.testing.assert_close(short.float(), long, rtol=0.1, atol=0.05)


def test_a_seed_is_a_generator():
    x, labels, space = torch.rand(10, 2), [0] * 7 + [1] * 3, CaptionSpace(16, 4, generator=0)
    for draw in (
        lambda g: smote_points(x, 5, generator=g).points,
        lambda g: under_sample(labels, generator=g),
        lambda g: replicate(labels, generator=g),
        lambda g: embedding_noise(x, 0.1, g),
        lambda g: instance_replacement(x, 3, generator=g),
        lambda g: CaptionSpace(16, 4, generator=g).direction,
        lambda g: space.sample(5, generator=g).audio,
        lambda g: SpriteSource()(0, 3, generator=g),
        lambda g: DiverseGenerator([SpriteSource(), SpriteSource()]).sample(1, 4, g).x,
    ):
        assert torch.equal(draw(3), draw(torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_smote_of_half_precision(dtype):
    x, y = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)).to(dtype), torch.arange(30) // 22
    new_x, new_y = SMOTE(random_state=0).fit_resample(x, y)
    assert new_x.dtype == dtype
    assert new_y.bincount().tolist() == [22, 22]
    assert torch.equal(new_x[:30], x)


def test_a_metric_loss_with_a_seed_moves_on_from_batch_to_batch():
    loss, z, y = MetrixLoss(generator=0), torch.randn(8, 4), torch.arange(8) % 2
    assert loss(z, y) != loss(z, y)


def test_widths_that_differ_are_refused():
    wide, thin = torch.randn(6, 3), torch.randn(6, 1)
    for measure in (
        lambda: close_gap(wide, thin, thin),
        lambda: close_gap(wide, wide, thin),
        lambda: memory_projection(wide, thin),
        lambda: similarity_filter(wide, thin),
    ):
        with pytest.raises(ValueError, match=r"expected .* of one width d, got"):
            measure()
    with pytest.raises(ValueError, match="expected fpr, tpr to have one length"):
        joint_roc_hull([([0.1, 0.2], [0.5])])
