import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from companion.collapse import (
    ContextModel,
    LinearFeatureNet,
    MarkovLanguage,
    NearestMeanDisagreement,
    NeuralCollapse,
    UnconstrainedFeatureModel,
    cdnv,
    central_path_flow,
    central_path_weight,
    count_outliers,
    depthwise_spread,
    duality_spread,
    exact_hessian,
    gauss_newton,
    gof_solution,
    hessian_spectrum,
    hyperspherical_uniformity,
    interpolate_loss,
    linguistic_collapse,
    neural_collapse,
    simplex_etf,
    tethered_features,
)
from companion.geometry import scatter_matrices
from companion.nets import MLP
from tests.processes import run_two


def cloud(n=600, d=12, n_classes=5, spread=1.0, shift=0.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(n_classes, d, generator=generator, dtype=torch.float64)
    labels = torch.arange(n) % n_classes
    noise = torch.randn(n, d, generator=generator, dtype=torch.float64)
    weight = torch.randn(n_classes, d, generator=generator, dtype=torch.float64)
    return (means[labels] + spread * noise + shift).to(dtype), labels, weight.to(dtype)


def by_the_book(features, labels, weight, bias=0.0):
    """The definitions in numpy, with a d x d pseudo-inverse."""
    h, y, w = features.double().numpy(), labels.numpy(), weight.double().numpy()
    means = np.stack([h[y == c].mean(0) for c in range(len(w))])
    m = means - means.mean(0)
    residual = h - means[y]
    within, between = residual.T @ residual / len(h), m.T @ m / len(m)
    unit = m / np.linalg.norm(m, axis=1, keepdims=True)
    cosines = (unit @ unit.T)[np.triu_indices(len(m), 1)]
    norms = np.linalg.norm(m, axis=1)
    distances = ((h[:, None] - means) ** 2).sum(2)
    return {
        "nc1": np.trace(within @ np.linalg.pinv(between, rcond=1e-10)) / len(m),
        "nc2_norms": norms.std() / norms.mean(),
        "nc2_angles": np.abs(cosines + 1 / (len(m) - 1)).mean(),
        "nc3": ((w / np.linalg.norm(w) - m / np.linalg.norm(m)) ** 2).sum(),
        "nc4": ((h @ w.T + bias).argmax(1) != distances.argmin(1)).mean(),
    }


class TestNeuralCollapse:
    def test_matches_the_definitions(self, device):
        features, labels, weight = cloud()
        bias = torch.linspace(-1, 1, 5, dtype=torch.float64)
        got = neural_collapse(features.to(device), labels.to(device), weight.to(device), bias.to(device))
        expected = by_the_book(features, labels, weight, bias.numpy())
        assert set(got) == set(expected)
        for name, value in expected.items():
            assert float(got[name]) == pytest.approx(value, rel=1e-9), name

    def test_more_classes_than_dimensions(self):
        features, labels, weight = cloud(d=3, n_classes=7, n=700)
        expected = by_the_book(features, labels, weight)
        for name, value in neural_collapse(features, labels, weight).items():
            assert float(value) == pytest.approx(expected[name], rel=1e-8), name

    def test_is_zero_on_a_collapsed_simplex_and_grows_with_the_square_of_the_spread(self):
        frame = simplex_etf(4, 10, dtype=torch.float64)
        labels = torch.arange(400) % 4
        noise = torch.randn(400, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        measured = [neural_collapse(frame[labels] + s * noise, labels)["nc1"] for s in (1e-4, 1e-3)]
        assert float(measured[1] / measured[0]) == pytest.approx(100, rel=1e-2)
        collapsed = neural_collapse(frame[labels], labels, frame)
        assert all(abs(float(v)) < 1e-9 for v in collapsed.values())

    def test_does_not_change_under_rotation_scale_and_shift(self):
        features, labels, weight = cloud()
        turn = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
        before = neural_collapse(features, labels, weight)
        after = neural_collapse(3 * features @ turn, labels, 2 * weight @ turn)
        for name in before:
            assert float(after[name]) == pytest.approx(float(before[name]), rel=1e-8), name
        shifted = neural_collapse(features + 7, labels)
        assert float(shifted["nc1"]) == pytest.approx(float(before["nc1"]), rel=1e-8)

    def test_float32_far_from_the_origin(self):
        features, labels, _ = cloud(n=5000, shift=1e4)
        rounded = features.float()
        exact = neural_collapse(rounded.double(), labels)
        for name, value in neural_collapse(rounded, labels).items():
            assert float(value) == pytest.approx(float(exact[name]), rel=1e-4), name

    def test_one_strong_direction_does_not_round_the_others(self, device):
        features, labels, weight = cloud(n=2000, d=20, dtype=torch.float32)
        features += 3 * labels[:, None] * torch.arange(20)
        exact = by_the_book(features, labels, weight)
        for name, value in neural_collapse(features.to(device), labels.to(device), weight.to(device)).items():
            assert float(value) == pytest.approx(float(exact[name]), rel=1e-4), name

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_measured_in_float32(self, dtype):
        features, labels, weight = (v.to(dtype) if v.is_floating_point() else v for v in cloud(n=20_000))
        exact = neural_collapse(features.float(), labels, weight.float())
        for name, value in neural_collapse(features, labels, weight).items():
            assert float(value) == pytest.approx(float(exact[name]), rel=1e-5), name

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda h, y, w: (h[:5], y, w), "labels"),
            (lambda h, y, w: (h * math.nan, y, w), "features"),
            (lambda h, y, w: (h, y, w[:, :3]), "weight"),
            (lambda h, y, w: (h, y, torch.cat([w, w])), "none for"),
            (lambda h, y, w: (torch.ones_like(h), y, w), "differ"),
            (lambda h, y, w: (h, torch.zeros_like(y), None), "two classes"),
        ],
    )
    def test_bad_input_is_named(self, change, message):
        with pytest.raises(ValueError, match=message):
            neural_collapse(*change(*cloud()))

    def test_a_bias_needs_a_weight(self):
        features, labels, _ = cloud()
        with pytest.raises(ValueError, match="weight together"):
            neural_collapse(features, labels, bias=torch.zeros(5))


class TestStream:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_shuffled_batches_give_the_one_shot_value(self, device, dtype):
        features, labels, weight = cloud(n=3000, shift=100.0, dtype=dtype)
        features, labels, weight = features.to(device), labels.to(device), weight.to(device)
        order = torch.randperm(3000, generator=torch.Generator().manual_seed(0)).to(device)
        metric = NeuralCollapse(5, 12, weight=weight).to(device)
        for rows in order.split(170):
            metric.update(features[rows], labels[rows])
        stream, whole = metric.compute(), neural_collapse(features, labels, weight)
        for name, value in stream.items():
            assert float(value) == pytest.approx(float(whole[name]), rel=1e-5), name

        second = NearestMeanDisagreement(metric.class_means()).to(device)
        for rows in order.split(170):
            second.update(features[rows], features[rows] @ weight.T)
        assert float(second.compute()) == pytest.approx(float(whole["nc4"]), abs=1e-3)

    def test_merged_halves_give_the_one_shot_value(self):
        features, labels, _ = cloud(n=2000, shift=1e3, dtype=torch.float32)
        halves = []
        for rows in (slice(0, 700), slice(700, None)):
            half = NeuralCollapse(5, 12)
            half.update(features[rows], labels[rows])
            halves.append(half)
        halves[0].merge_state(halves[1])
        whole = neural_collapse(features, labels)
        for name, value in halves[0].compute().items():
            assert float(value) == pytest.approx(float(whole[name]), rel=1e-5), name

    @pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
    def test_two_processes_give_the_one_shot_value(self, tmp_path):
        features, labels, _ = cloud(n=2000, shift=1e3, dtype=torch.float32)
        torch.save({"h": features, "y": labels}, tmp_path / "data.pt")
        script = """
from companion.collapse import NeuralCollapse
data = torch.load(f"{folder}/data.pt", weights_only=True)
mine = slice(0, 300) if rank == 0 else slice(300, None)
metric = NeuralCollapse(5, 12)
metric.update(data["h"][mine], data["y"][mine])
out = metric.compute()
"""
        whole = neural_collapse(features, labels)
        for path in run_two(script, tmp_path):
            for name, value in torch.load(path, weights_only=True).items():
                assert float(value) == pytest.approx(float(whole[name]), rel=1e-5), name

    def test_reset_forgets(self):
        features, labels, _ = cloud()
        metric = NeuralCollapse(5, 12)
        metric.update(features + 100, labels.flip(0))
        metric.reset()
        metric.update(features, labels)
        assert float(metric.compute()["nc1"]) == pytest.approx(float(neural_collapse(features, labels)["nc1"]))

    def test_a_class_never_seen_is_named(self):
        metric = NeuralCollapse(6, 12)
        metric.update(*cloud()[:2])
        with pytest.raises(ValueError, match=r"none for \[5\]"):
            metric.compute()


class TestClosedForm:
    @pytest.mark.parametrize("dim", [4, 10])
    def test_the_rows_four_digits_and_the_minimiser_agree(self, dim):
        counts = [100, 40, 10, 2]
        closed = gof_solution(counts, 3e-3, 3e-3, dim=dim)
        assert closed.strength.numpy().round(4).tolist() == [0.9544, 0.9279, 0.8558, 0.6776]
        model = UnconstrainedFeatureModel(counts, dim, 3e-3, 3e-3).minimise()
        assert model.loss().item() == pytest.approx(float(closed.loss), abs=1e-9)
        means = model.class_features()
        np.testing.assert_allclose(means.norm(dim=1), closed.feature_norms, rtol=1e-3)
        np.testing.assert_allclose(model.weight.detach().norm(dim=1), closed.weight_norms, rtol=1e-3)
        gram = means @ means.T
        assert float((gram - gram.diag().diag()).abs().max()) < 1e-4
        np.testing.assert_allclose(model.features.detach(), means[model.labels], atol=1e-4)

    def test_a_class_dies_exactly_at_the_predicted_count(self):
        total, lam = 200, 0.02
        threshold = total**2 * lam * lam  # 16
        for rare, dies in ((15, True), (16, True), (17, False)):
            closed = gof_solution([150, total - 150 - rare, rare], lam, lam)
            assert bool(closed.collapsed[2]) is dies
            assert (rare <= threshold) is dies
        model = UnconstrainedFeatureModel([150, 38, 12], 6, lam, lam).minimise()
        assert float(model.class_features()[2].norm()) < 1e-4

    def test_equal_counts_with_a_bias_give_a_simplex(self):
        closed = gof_solution([20] * 4, 1e-2, 5e-3, bias=True)
        model = UnconstrainedFeatureModel([20] * 4, 6, 1e-2, 5e-3, bias=True).minimise()
        assert model.loss().item() == pytest.approx(float(closed.loss), abs=1e-9)
        for means in (closed.means, model.class_features()):
            unit = F.normalize(means)
            etf = simplex_etf(4, dtype=torch.float64)
            np.testing.assert_allclose(unit @ unit.T, etf @ etf.T, atol=1e-4)

    @pytest.mark.parametrize("n_layers", [2, 3])
    def test_deep_linear_layers(self, n_layers):
        counts, lam = [12, 8, 4, 2], 5e-3
        closed = gof_solution(counts, [lam] * n_layers, lam)
        runs = [UnconstrainedFeatureModel(counts, 6, lam, lam, n_layers=n_layers, seed=s).minimise() for s in range(3)]
        best = min(runs, key=lambda model: model.loss().item())
        assert best.loss().item() == pytest.approx(float(closed.loss), abs=1e-8)
        np.testing.assert_allclose(best.class_features().norm(dim=1), closed.feature_norms, rtol=1e-3)
        spectra = [torch.linalg.svdvals(layer.detach())[:4] for layer in best.layers]
        np.testing.assert_allclose(spectra[0], spectra[1], rtol=1e-3)  # every layer carries the same share

    def test_too_few_dimensions_keep_the_largest_classes(self):
        closed = gof_solution([60, 40, 10, 2], 3e-3, 3e-3, dim=2)
        assert closed.collapsed.tolist() == [False, False, True, True]
        model = UnconstrainedFeatureModel([60, 40, 10, 2], 2, 3e-3, 3e-3).minimise()
        assert model.loss().item() == pytest.approx(float(closed.loss), abs=1e-9)

    def test_cross_entropy_on_balanced_classes_gives_a_simplex_too(self):
        model = UnconstrainedFeatureModel([10] * 4, 6, 5e-3, 5e-3, loss="cross_entropy", bias=True).minimise()
        cosines = F.cosine_similarity(model.class_features()[0], model.class_features()[1:])
        np.testing.assert_allclose(cosines, [-1 / 3] * 3, atol=1e-3)

    @pytest.mark.parametrize(
        "arguments", [([5], 1e-3, 1e-3), ([5, 0], 1e-3, 1e-3), ([5, 5], 0.0, 1e-3), ([5, 5], 1e-3, -1.0)]
    )
    def test_bad_input(self, arguments):
        with pytest.raises(ValueError, match="expected"):
            gof_solution(*arguments)
        with pytest.raises(ValueError, match="loss"):
            UnconstrainedFeatureModel([5, 5], 2, 1e-3, 1e-3, loss="hinge")


class TestTether:
    def test_is_the_minimiser_and_shrinks_the_spread(self):
        start, labels, weight = cloud(n=60, d=8, n_classes=4)
        lam_h, beta = 0.3, 0.7
        best = tethered_features(weight, labels, start, lam_h, beta)
        h = best.clone().requires_grad_()
        targets = F.one_hot(labels, 4).double()
        value = ((h @ weight.T - targets) ** 2).sum() + lam_h * (h**2).sum() + beta * ((h - start) ** 2).sum()
        (gradient,) = torch.autograd.grad(value, h)
        assert float(gradient.abs().max()) < 1e-10

        shrink = beta * torch.linalg.inv(weight.T @ weight + (lam_h + beta) * torch.eye(8))
        pair = start[0] - start[4]  # two samples of class 0
        np.testing.assert_allclose(best[0] - best[4], shrink @ pair, atol=1e-8)
        assert float((best[0] - best[4]).norm()) <= beta / (beta + lam_h) * float(pair.norm()) + 1e-12

    def test_limits(self):
        start, labels, weight = cloud(n=40, d=6, n_classes=4)
        np.testing.assert_allclose(tethered_features(weight, labels, start, 0.0, 1e9), start, atol=1e-6)

    def test_the_central_path_is_ridge_regression(self):
        from sklearn.linear_model import Ridge

        features, labels, _ = cloud(n=80, d=6, n_classes=4)
        ridge = Ridge(alpha=80 * 0.05, fit_intercept=False).fit(features, F.one_hot(labels, 4))
        np.testing.assert_allclose(central_path_weight(features, labels, 0.05), ridge.coef_, atol=1e-10)

    def test_the_flow_never_raises_the_spread(self):
        rises = 0
        for seed in range(20):
            start, labels, _ = cloud(n=80, d=12, n_classes=4, seed=seed)
            path = central_path_flow(start, labels, 0.01, 0.01, step=0.05, n_steps=60)
            traces = [scatter_matrices(h, labels) for h in path[::6]]
            ratios = torch.tensor([float(w.trace() / b.trace()) for w, b in traces])
            rises += int((ratios.diff() > 0).any())
        assert rises == 0

    def test_bad_input(self):
        start, labels, weight = cloud(n=40, d=6, n_classes=4)
        with pytest.raises(ValueError, match="beta above 0"):
            tethered_features(weight, labels, start, 0.1, 0.0)
        with pytest.raises(ValueError, match="weight"):
            tethered_features(weight[:, :2], labels, start, 0.1, 1.0)
        with pytest.raises(ValueError, match="lam_w above 0"):
            central_path_weight(start, labels, 0.0)
        with pytest.raises(ValueError, match="step above 0"):
            central_path_flow(start, labels, 0.1, 0.1, step=0.0)


class TestHessian:
    def setup_method(self):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
        self.y = torch.arange(40) % 3
        self.model = MLP((3, 4, 3), activation="tanh", seed=0).double()

    def test_exact_hessian_matches_finite_differences_of_the_gradient(self):
        full = exact_hessian(self.model, self.x, self.y)
        theta = nn.utils.parameters_to_vector(self.model.parameters()).detach()

        def gradient(vector):
            model = copy.deepcopy(self.model)
            nn.utils.vector_to_parameters(vector, model.parameters())
            grads = torch.autograd.grad(F.cross_entropy(model(self.x), self.y), list(model.parameters()))
            return torch.cat([g.flatten() for g in grads])

        for i in (0, 7, len(theta) - 1):
            step = torch.zeros_like(theta)
            step[i] = 1e-5
            np.testing.assert_allclose(full[i], (gradient(theta + step) - gradient(theta - step)) / 2e-5, atol=1e-8)

    def test_gauss_newton_is_the_whole_hessian_of_a_linear_classifier(self):
        linear = nn.Linear(3, 3).double()
        np.testing.assert_allclose(gauss_newton(linear, self.x), exact_hessian(linear, self.x, self.y), atol=1e-12)

    def test_lanczos_finds_the_extremes_the_trace_and_the_share_near_zero(self, device, generator):
        values = torch.linalg.eigvalsh(exact_hessian(self.model, self.x, self.y))
        model = copy.deepcopy(self.model).to(device)
        data = [(self.x[:25].to(device), self.y[:25].to(device)), (self.x[25:].to(device), self.y[25:].to(device))]
        spectrum = hessian_spectrum(model, data, n_probes=60, n_steps=40, generator=generator)
        assert spectrum.extremes == pytest.approx((float(values[0]), float(values[-1])), abs=1e-6)
        assert float(spectrum.trace()) == pytest.approx(float(values.sum()), rel=0.15)
        bound = float(values[-1]) / 20
        assert float(spectrum.share_below(bound)) == pytest.approx(
            float((values.abs() <= bound).double().mean()), abs=0.1
        )
        grid = torch.linspace(-3, 4, 4001, dtype=torch.float64)
        assert float(torch.trapezoid(spectrum.density(grid, 0.05), grid)) == pytest.approx(1, abs=1e-3)

    def test_the_model_is_left_alone(self):
        before = copy.deepcopy(self.model.state_dict())
        hessian_spectrum(self.model, (self.x, self.y), n_probes=1, n_steps=3)
        assert all(torch.equal(before[k], v) for k, v in self.model.state_dict().items())
        assert all(p.grad is None for p in self.model.parameters())

    def test_gradients_are_its_own_business(self):
        expected = hessian_spectrum(self.model, (self.x, self.y), n_probes=1, n_steps=3, generator=0)
        with torch.no_grad():
            found = hessian_spectrum(self.model, (self.x, self.y), n_probes=1, n_steps=3, generator=0)
        assert torch.equal(found.nodes, expected.nodes)

    def test_counting_and_interpolating(self):
        assert count_outliers([5.0, 4.0, 0.1, 0.09]) == 2
        other = MLP((3, 4, 3), activation="tanh", seed=1).double()
        line = interpolate_loss(self.model, other, self.x, self.y, n=5)
        assert line[0].item() == pytest.approx(F.cross_entropy(self.model(self.x), self.y).item())
        assert line[-1].item() == pytest.approx(F.cross_entropy(other(self.x), self.y).item())

    def test_bad_input(self):
        frozen = copy.deepcopy(self.model).requires_grad_(False)
        for call in (lambda: exact_hessian(frozen, self.x, self.y), lambda: hessian_spectrum(frozen, (self.x, self.y))):
            with pytest.raises(ValueError, match="require a gradient"):
                call()
        with pytest.raises(ValueError, match="at least one sample"):
            hessian_spectrum(self.model, [])
        with pytest.raises(ValueError, match="positive"):
            count_outliers([-1.0, -2.0, 3.0])
        with pytest.raises(ValueError, match="one shape"):
            interpolate_loss(self.model, MLP((3, 5, 3)).double(), self.x, self.y)


class TestLanguage:
    def test_its_words_follow_its_table_and_its_entropy_is_a_floor(self):
        language = MarkovLanguage(6, generator=torch.Generator().manual_seed(0))
        np.testing.assert_allclose(language.transition.sum(-1), np.ones((6, 6)))
        text = language.sample(4000, 12, torch.Generator().manual_seed(1))
        triples = text.unfold(1, 3, 1).reshape(-1, 3)
        at = (triples[:, 0] == triples[0, 0]) & (triples[:, 1] == triples[0, 1])
        seen = torch.bincount(triples[at, 2], minlength=6) / at.sum()
        expected = language.transition[triples[0, 0], triples[0, 1]]
        assert float((seen - expected).abs().max()) < 5 / math.sqrt(float(at.sum()))
        surprise = -language.transition[triples[:, 0], triples[:, 1], triples[:, 2]].log().mean()
        assert float(surprise) == pytest.approx(float(language.entropy(triples[:, :2])), abs=0.02)

    def test_measures_by_hand(self):
        means, variances = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]]), torch.tensor([1.0, 1.0, 3.0])
        assert float(cdnv(means, variances)) == pytest.approx((2 / 8 + 4 / 8 + 4 / 16) / 3)
        frame = simplex_etf(5, 7)
        assert float(hyperspherical_uniformity(frame)) == pytest.approx(-0.5 * math.log(2 + 2 / 4), abs=1e-6)
        assert float(duality_spread(frame, 3 * frame)) == pytest.approx(0, abs=1e-6)

    def test_the_simplex_is_the_most_uniform(self):
        random = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
        assert hyperspherical_uniformity(random) > hyperspherical_uniformity(simplex_etf(5, 7))

    def test_rare_classes_are_left_out(self):
        features, labels, weight = cloud(n=500)
        rare = torch.cat([labels, torch.full((3,), 5)])
        both = torch.cat([features, torch.randn(3, 12, dtype=torch.float64)])
        head = torch.cat([weight, torch.ones(1, 12, dtype=torch.float64)])
        got, expected = linguistic_collapse(both, rare, head), linguistic_collapse(features, labels, weight)
        assert int(got["kept"]) == 5
        for name in expected:
            assert float(got[name]) == pytest.approx(float(expected[name])), name

    def test_nearest_means_far_from_the_origin(self):
        features, labels, _ = cloud(spread=0.3)
        far = (features + 1e5).float()
        means = torch.stack([features[labels == c].mean(0) for c in range(5)])
        nearest = torch.cdist(far.double(), means + 1e5).argmin(1)
        for c in range(5):  # a head that always says c agrees with the nearest mean as often as c is nearest
            constant = torch.zeros(5).index_fill(0, torch.tensor([c]), 1.0)
            got = linguistic_collapse(far, labels, torch.zeros(5, 12), constant)["agreement"]
            assert float(got) == pytest.approx(float((nearest == c).double().mean()), abs=0.01)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_measured_in_float32(self, dtype):
        features, labels, weight = (v.to(dtype) if v.is_floating_point() else v for v in cloud())
        exact = linguistic_collapse(features.float(), labels, weight.float())
        for name, value in linguistic_collapse(features, labels, weight).items():
            assert float(value) == pytest.approx(float(exact[name]), rel=1e-5), name

    def test_bad_input(self):
        features, labels, weight = cloud(n=50)
        with pytest.raises(ValueError, match="as wide as features"):
            linguistic_collapse(features, labels, weight[:, :3], min_count=5)
        with pytest.raises(ValueError, match="bias"):
            linguistic_collapse(features, labels, weight, torch.zeros(3), min_count=5)
        with pytest.raises(ValueError, match="at least two classes"):
            linguistic_collapse(features, labels, weight, min_count=40)
        with pytest.raises(ValueError, match="variances"):
            cdnv(weight, [-1.0] * 5)
        with pytest.raises(ValueError, match="like the means"):
            duality_spread(weight, weight[:3])


def test_spread_by_depth_and_the_small_nets():
    net = MLP((4, 8, 8, 3), seed=0)
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    spread = depthwise_spread(net, x, torch.arange(30) % 3)
    within, between = scatter_matrices(net.features(x).detach(), torch.arange(30) % 3)
    assert list(spread) == ["input", "layer1", "layer2"]
    assert spread["layer2"] == pytest.approx(float(within.trace() / between.trace()))
    assert LinearFeatureNet(4, 3).features(x).shape == (30, 2)
    assert ContextModel(9, 4).features(torch.zeros(3, 4, dtype=torch.int64)).shape == (3, 4)
