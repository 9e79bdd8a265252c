import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from companion.geometry import simplex_etf
from companion.mixup import (
    AdaMixUp,
    EarlyStoppedMixup,
    Mixed,
    MixupCollate,
    QuadraticPatchCNN,
    adamixup_loss,
    channel_curve,
    channel_projection,
    intrusion_rate,
    make_bands,
    make_feature_noise,
    manifold_mixup,
    mix_apart,
    mixup,
    mixup_loss,
    mixup_ufm_features,
    pair_up,
)
from companion.nets import MLP, SmallCNN
from companion.training import fit, fit_many, per_model


class TestIntrusion:
    def test_bands_alternate_and_stay_inside(self, generator):
        x, y = make_bands(2000, n_bands=7, spacing=0.33, half_width=0.1, generator=generator)
        band = (x[:, 0] / 0.33 + 3).round()
        assert float((x[:, 0] - (band - 3) * 0.33).abs().max()) <= 0.1 + 1e-6
        assert torch.equal(band.long() % 2, y)
        assert x[:, 1].min() < -0.95
        assert x[:, 1].max() > 0.95

    def test_rate_by_brute_force(self, device, generator):
        x, y = make_bands(300, generator=generator)
        x, y = x.to(device), y.to(device)
        mixed = mixup(x, y, per_sample=True, generator=generator)
        distance = torch.cdist(mixed.x, x, compute_mode="donot_use_mm_for_euclid_dist")
        near, index = distance.min(1)
        expected = ((near <= 0.1) & (y[index] != mixed.y_a) & (y[index] != mixed.y_b)).float().mean()
        assert float(intrusion_rate(mixed, x, y, 0.1)) == pytest.approx(float(expected))
        assert float(expected) > 0.05

    def test_nothing_intrudes_without_mixing(self, generator):
        x, y = make_bands(300, generator=generator)
        assert float(intrusion_rate(Mixed(x, y, y, torch.tensor(1.0)), x, y, 0.1)) == 0

    def test_each_part_gets_only_its_own_gradient(self, generator):
        ada = AdaMixUp(MLP((2, 8, 2), seed=0), 2, hidden=8)
        x, y = make_bands(32, generator=generator)
        packed, labels = pair_up(x, y, generator)
        outputs = ada(packed)

        def touched(value):
            grads = torch.autograd.grad(value, list(ada.parameters()), allow_unused=True, retain_graph=True)
            names = [name for name, _ in ada.named_parameters()]
            return {name.split(".")[0] for name, g in zip(names, grads) if g is not None and bool(g.abs().sum() > 0)}

        assert touched(outputs.mixed.sum()) == {"model"}
        assert touched(outputs.through.square().sum() + outputs.fooled.square().sum()) == {"policy"}
        assert touched(outputs.found_real.square().sum() + outputs.found_mixed.square().sum()) == {"discriminator"}
        assert touched(adamixup_loss(outputs, labels)) == {"model", "policy", "discriminator"}
        without = adamixup_loss(outputs, labels, fit=False, discriminate=False)
        assert touched(without) == {"model", "discriminator"}

    @pytest.mark.parametrize("min_width", [0.0, 0.2, 1.0])
    def test_interval_lies_in_the_unit_interval_and_is_wide_enough(self, min_width, generator):
        ada = AdaMixUp(MLP((2, 8, 2), seed=0), 2, min_width=min_width)
        pairs = 20 * torch.randn(2, 500, 2, generator=generator)
        with torch.no_grad():
            lower, width = ada.interval(*pairs)
        assert float(lower.min()) >= 0
        assert float((lower + width).max()) <= 1 + 1e-5
        assert float(width.min()) >= min_width - 1e-6

    def test_pairs_are_mixed_as_the_interval_says(self, generator):
        ada = AdaMixUp(MLP((2, 8, 2), seed=0), 2, min_width=0.3)
        x, y = make_bands(16, generator=generator)
        packed, (y_a, _) = pair_up(x, y, generator)
        outputs = ada(packed)
        lower, width = ada.interval(packed[:, :2], packed[:, 2:4])
        torch.testing.assert_close(outputs.lam, lower + packed[:, 4] * width)
        torch.testing.assert_close(outputs.x, torch.lerp(packed[:, 2:4], packed[:, :2], outputs.lam[:, None]))
        assert torch.equal(y_a, y)
        torch.testing.assert_close(ada.eval()(x), ada.model(x))

    def test_an_interval_without_width_is_a_point_and_all_the_width_is_plain_mixup(self, generator):
        x, y = make_bands(64, generator=generator)
        packed, _ = pair_up(x, y, generator)
        plain = AdaMixUp(MLP((2, 8, 2), seed=0), 2, min_width=1.0)
        torch.testing.assert_close(plain(packed).lam, packed[:, 4])
        point = AdaMixUp(MLP((2, 8, 2), seed=0), 2)
        with torch.no_grad():
            point.policy.head.bias.copy_(torch.tensor([50.0, -50.0, 0.0]))
        outputs = point(packed)
        torch.testing.assert_close(outputs.lam, torch.ones(64))
        torch.testing.assert_close(outputs.x, x)

    def test_images_odd_and_single_batches_train(self, generator):
        x, y = torch.rand(5, 1, 8, 8, generator=generator), torch.tensor([0, 1, 2, 0, 1])
        ada = AdaMixUp(SmallCNN(1, 3, width=4), (1, 8, 8), hidden=8)
        history = fit(
            ada, x, y, loss=adamixup_loss, epochs=2, batch_size=2, batch_transform=pair_up, generator=generator
        )
        assert all(math.isfinite(value) for value in history.loss)
        assert ada(x).shape == (5, 3)

    def test_many_train_as_one(self, generator):
        x, y = make_bands(64, generator=generator)
        settings = {"loss": adamixup_loss, "epochs": 3, "batch_size": 16, "batch_transform": per_model(pair_up)}
        many = fit_many(lambda: AdaMixUp(MLP((2, 8, 2)), 2, hidden=8), [0, 1], x, y, **settings)
        assert many(x).shape == (2, 64, 2)
        assert many.history.loss.isfinite().all()

    def test_bad_input(self, generator):
        x, y = make_bands(10, generator=generator)
        with pytest.raises(ValueError, match="pair_up"):
            AdaMixUp(MLP((2, 8, 2)), 2)(x)
        with pytest.raises(ValueError, match="in_shape"):
            AdaMixUp(MLP((2, 8, 2)), (2, 0))
        with pytest.raises(ValueError, match="half_width"):
            make_bands(10, spacing=0.2, half_width=0.1)
        with pytest.raises(ValueError, match="radius"):
            intrusion_rate(mixup(x, y), x, y, 0.0)
        with pytest.raises(ValueError, match="min_width"):
            AdaMixUp(MLP((2, 8, 2)), 2, min_width=2.0)


class TestRareFeatures:
    def test_features_are_where_they_should_be_and_noise_is_orthogonal(self, generator):
        data = make_feature_noise(2000, dim=50, rare=0.25, noise=0.3, generator=generator)
        strength = (data.x @ data.directions.T).abs().amax(1)  # (n, 4)
        expected = F.one_hot(data.y + 2 * data.is_rare, 4).float()
        torch.testing.assert_close(strength, expected)
        assert [int(data.is_rare[data.y == k].sum()) for k in (0, 1)] == [250, 250]
        noise = data.x[..., 4:]
        assert float(noise[noise != 0].std()) == pytest.approx(0.3, rel=0.02)

    def test_the_network_is_the_sum_of_squares(self, generator):
        net = QuadraticPatchCNN(6, n_filters=3)
        x = torch.randn(4, 2, 6, generator=generator)
        expected = sum((x[:, p] @ net.filters[k, r]) ** 2 for k in [1] for r in range(3) for p in range(2))
        torch.testing.assert_close(net(x)[:, 1], expected)
        torch.testing.assert_close(net.learned(x[:1, 0])[:, 0], (net.filters @ x[0, 0]).square().sum(1))

    def test_mixing_inputs_and_labels_apart(self, generator):
        x = torch.randn(8, 3, generator=generator)
        twin = torch.Generator().manual_seed(4)
        mixed = mix_apart(x, torch.arange(8), 0.75, 0.5, torch.Generator().manual_seed(4))
        partner = torch.randperm(8, generator=twin)
        torch.testing.assert_close(mixed.x, 0.75 * x + 0.25 * x[partner])
        assert torch.equal(mixed.y_b, partner)
        assert float(mixed.lam) == 0.5
        assert mix_apart(x, torch.arange(8), 1, 0).lam.is_floating_point()

    def test_many_models_mix_apart_as_one_would(self, generator):
        x, y = torch.randn(3, 8, 2, 5, generator=generator), torch.arange(24).view(3, 8)
        many = mix_apart(x, y, 0.6, 0.75, torch.Generator().manual_seed(4), dim=1)
        assert many.lam.shape == (3,)
        for i in range(3):
            one = mix_apart(x[i], y[i], 0.6, 0.75, torch.Generator().manual_seed(4))
            torch.testing.assert_close(many.x[i], one.x)
            assert torch.equal(many.y_b[i], one.y_b)
            assert float(many.lam[i]) == float(one.lam)
        with pytest.raises(ValueError, match="dim 0, or 1"):
            mix_apart(x, y, 0.6, 0.75, dim=2)

    def test_mixing_apart_trains_many_models(self):
        data = make_feature_noise(40, dim=30, generator=torch.Generator().manual_seed(0))

        def transform(x, y, g):
            mixed = mix_apart(x, y, 0.6, 0.6, g, dim=1)
            return mixed.x, mixed

        many = fit_many(
            lambda: QuadraticPatchCNN(30),
            [0, 1],
            data.x.expand(2, -1, -1, -1),
            data.y.expand(2, -1),
            loss=mixup_loss,
            batch_transform=transform,
            epochs=40,
            batch_size=None,
            optimizer="sgd",
            momentum=0,
            lr=1.2,
            stacked=True,
        )
        assert bool((many.accuracy(data.x, data.y, stacked=False) > 0.9).all())

    def test_early_stopping_stops(self, generator):
        x, y = torch.randn(6, 2, generator=generator), torch.arange(6)
        early = EarlyStoppedMixup(2)
        mixed = [early(x, y, generator)[1] for _ in range(4)]
        assert not torch.equal(mixed[1].x, x)
        assert torch.equal(mixed[2].x, x)
        assert float(mixed[3].lam) == 1
        assert torch.equal(EarlyStoppedMixup(0)(x, y)[0], x)
        many = EarlyStoppedMixup(2, n_models=3)
        stacked = per_model(many)
        steps = [stacked(x.expand(3, 6, 2), y.expand(3, 6), generator)[1].lam for _ in range(3)]
        assert bool((steps[1] < 1).all())
        assert bool((steps[2] == 1).all())
        with pytest.raises(ValueError, match="stop_at"):
            EarlyStoppedMixup(-1)


class TestChannels:
    WEIGHT = simplex_etf(3, 2, dtype=torch.float64)

    def test_the_optimum_is_stationary(self, device):
        lam = torch.linspace(0.01, 0.99, 9, dtype=torch.float64, device=device)
        weight = self.WEIGHT.to(device)
        h = mixup_ufm_features(weight, lam, 0, 1, 1e-2).requires_grad_()
        log_p = (h @ weight.T).log_softmax(1)
        value = (-lam * log_p[:, 0] - (1 - lam) * log_p[:, 1] + 5e-3 * (h**2).sum(1)).sum()
        (gradient,) = torch.autograd.grad(value, h)
        assert float(gradient.abs().max()) < 1e-9

    @pytest.mark.parametrize("mu", [1e-2, 1e-3, 1e-4])
    def test_gap_between_the_two_is_the_log_odds_and_the_rest_runs_away(self, mu):
        z = mixup_ufm_features(self.WEIGHT, [0.7], 0, 1, mu)[0] @ self.WEIGHT.T
        assert float(z[0] - z[1]) == pytest.approx(math.log(0.7 / 0.3), abs=0.01)
        gaps = [
            float((mixup_ufm_features(self.WEIGHT, [0.7], 0, 1, m)[0] @ self.WEIGHT.T)[[0, 2]].diff().neg())
            for m in (mu, mu / 10)
        ]
        assert gaps[1] > gaps[0] + 1

    def test_squared_error_stays_on_the_chord_and_cross_entropy_leaves_it(self):
        lam = torch.linspace(0, 1, 11, dtype=torch.float64)
        for loss, on_chord in (("mse", True), ("ce", False)):
            h = mixup_ufm_features(self.WEIGHT, lam, 0, 1, 1e-3, loss=loss)
            chord = lam[:, None] * h[-1] + (1 - lam[:, None]) * h[0]
            away = float((h - chord).norm(dim=1).max() / h[0].norm())
            assert (away < 1e-10) if on_chord else (away > 0.3)

    def test_symmetric_in_the_two_classes(self):
        a = mixup_ufm_features(self.WEIGHT, [0.3], 0, 1, 1e-2)
        b = mixup_ufm_features(self.WEIGHT, [0.7], 1, 0, 1e-2)
        torch.testing.assert_close(a, b)

    def test_logits_are_proportional_to_the_residuals(self):
        lam, mu = torch.linspace(0, 1, 9, dtype=torch.float64), 1e-2
        z = mixup_ufm_features(self.WEIGHT, lam, 0, 1, mu) @ self.WEIGHT.T
        target = torch.stack([lam, 1 - lam, torch.zeros(9)], 1)
        torch.testing.assert_close(z, 1.5 / mu * (target - z.softmax(1)), atol=1e-7, rtol=0)

    @pytest.mark.parametrize("n_classes", [3, 5, 10])
    def test_the_curve_is_the_limit_of_the_minimum(self, n_classes):
        weight = simplex_etf(n_classes, n_classes + 3, dtype=torch.float64)
        lam = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
        away = []
        for mu in (1e-2, 1e-4):
            h = mixup_ufm_features(weight, lam, 2, 1, mu)
            exact, curve = channel_projection(h, weight, 2, 1), channel_curve(lam, n_classes, mu)
            away.append(float((exact - curve).norm(dim=1).max() / h[4].norm()))
        assert away[0] < 0.05
        assert away[1] < 1e-3

    def test_projection_keeps_lengths_in_the_plane(self):
        h = mixup_ufm_features(self.WEIGHT, [0.2, 0.5, 0.9], 0, 1, 1e-2)
        flat = channel_projection(h, self.WEIGHT, 0, 1)
        torch.testing.assert_close(flat.norm(dim=1), h.norm(dim=1))
        assert abs(float(flat[1, 0])) < 1e-9
        assert float(flat[2, 0]) > 0

    def test_bad_input(self):
        for arguments, message in (
            ((self.WEIGHT, [1.2], 0, 1, 1e-2), "lam"),
            ((self.WEIGHT, [0.5], 1, 1, 1e-2), "different classes"),
            ((self.WEIGHT, [0.5], 0, 5, 1e-2), "different classes"),
            ((self.WEIGHT, [0.5], 0, 1, 0.0), "weight_decay above 0"),
        ):
            with pytest.raises(ValueError, match=message):
                mixup_ufm_features(*arguments)
        with pytest.raises(ValueError, match="'ce' or 'mse'"):
            mixup_ufm_features(self.WEIGHT, [0.5], 0, 1, 1e-2, loss="hinge")
        with pytest.raises(ValueError, match="opposite"):
            channel_projection(torch.ones(1, 2), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), 0, 1)
        for pair in ((0, 3), (1, 1), (-1, 0)):
            with pytest.raises(ValueError, match="different classes"):
                channel_projection(torch.ones(1, 2), self.WEIGHT, *pair)
        with pytest.raises(ValueError, match="strictly between"):
            channel_curve(torch.zeros(1, requires_grad=True), 3, 1e-2)
        with pytest.raises(ValueError, match="n_classes"):
            channel_curve([0.5], 2, 1e-2)


class TestLoops:
    def test_collate_mixes_every_batch_and_keeps_labels(self):
        data = TensorDataset(torch.arange(10.0)[:, None], torch.arange(10))
        collate = MixupCollate(0.4, per_sample=True, generator=torch.Generator().manual_seed(0))
        for mixed in DataLoader(data, batch_size=4, collate_fn=collate):
            expected = mixed.lam * mixed.y_a + (1 - mixed.lam) * mixed.y_b
            np.testing.assert_allclose(mixed.x[:, 0], expected, rtol=1e-5)
            assert mixed.y_a.dtype == torch.int64

    def test_workers_draw_differently_in_every_epoch_and_the_same_in_every_run(self):
        data = TensorDataset(torch.arange(8.0)[:, None], torch.arange(8))

        def two_epochs():
            collate = MixupCollate(generator=torch.Generator().manual_seed(0))
            order = torch.Generator().manual_seed(1)
            loader = DataLoader(data, batch_size=2, collate_fn=collate, num_workers=2, generator=order)
            return [float(mixed.lam) for _ in range(2) for mixed in loader]

        lam = two_epochs()
        assert len(set(lam)) == 8
        assert two_epochs() == lam

    def test_labels_stay_exact_in_half_precision_and_single_samples_pass(self):
        labels = torch.tensor([2**60 + 1, 7, 2**53 + 1])
        data = TensorDataset(torch.randn(3, 4).to(torch.bfloat16), labels)
        batches = list(DataLoader(data, batch_size=2, collate_fn=MixupCollate()))
        assert torch.equal(torch.cat([mixed.y_a for mixed in batches]), labels)
        assert batches[1].x.shape == (1, 4)
        outputs, mixed = manifold_mixup([nn.Linear(4, 3)], torch.randn(1, 4), labels[:1], layer=0)
        assert torch.equal(mixed.y_b, labels[:1])
        assert mixup_loss(outputs, mixed._replace(y_a=mixed.y_a % 3, y_b=mixed.y_b % 3)).isfinite()

    def test_collate_wants_pairs(self):
        data = TensorDataset(torch.randn(3, 4), torch.arange(3), torch.arange(3))
        with pytest.raises(ValueError, match="samples"):
            next(iter(DataLoader(data, collate_fn=MixupCollate())))

    def test_manifold_mixup_mixes_at_the_layer(self, generator):
        layers = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        x, y = torch.randn(5, 3, generator=generator), torch.arange(5)
        outputs, mixed = manifold_mixup(layers, x, y, layer=2, generator=torch.Generator().manual_seed(3))
        hidden = layers[:2](x)
        again = mixup(hidden, y, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(mixed.x, again.x)
        torch.testing.assert_close(outputs, layers[2](again.x))
        with pytest.raises(ValueError, match="layer from 0 to 2"):
            manifold_mixup(layers, x, y, layer=3)
        with pytest.raises(ValueError, match="at least one layer"):
            manifold_mixup([], x, y)
