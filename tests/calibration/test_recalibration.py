"""Recalibration: against closed forms, derivatives, limits, and scikit-learn's temperature scaling."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning

from companion.calibration import (
    CorrectnessCalibrator,
    GlobalTemperature,
    HCalibrator,
    MarginTemperature,
    MonotoneLogitMap,
    ProgressiveTargets,
    TemperatureScaler,
    VectorScaling,
    ViewTemperature,
    correctness_aware_loss,
    h_calibration_loss,
    make_overlap_mixture,
    nll_slope,
    progressive_gradient_ratio,
    rotate,
    running_gap,
    sharpening_slopes,
    shifted_views,
)
from tests.contract import check_recalibrator


def sampled_logits(n=600, n_classes=4, temperature=2.0, seed=0, dtype=torch.float32):
    """Logits that are calibrated once they are divided by the temperature."""
    generator = torch.Generator().manual_seed(seed)
    true = 2 * torch.randn(n, n_classes, generator=generator)
    labels = true.softmax(1).multinomial(1, generator=generator).squeeze(1)
    return (temperature * true).to(dtype), labels


def mean_nll(logits, labels, temperature):
    return F.cross_entropy(logits.double() / temperature, labels).item()


@pytest.mark.parametrize(
    "estimator",
    [
        TemperatureScaler(),
        TemperatureScaler(bounds=(0.1, 10.0)),
        HCalibrator(steps=5),
        HCalibrator(map="temperature", loss="nll", steps=5),
        HCalibrator(map="margin", steps=5, random_state=0),
        HCalibrator(map="vector", loss="brier", steps=5),
        CorrectnessCalibrator(steps=5, random_state=0),
        CorrectnessCalibrator(loss="nll", steps=5, random_state=0),
    ],
    ids=repr,
)
def test_contract(estimator):
    check_recalibrator(estimator, *sampled_logits(120))


def test_contract_with_views():
    views, labels = sampled_logits(120)
    views = torch.stack([views, views.roll(1, 0), views + 1], dim=1)
    check_recalibrator(CorrectnessCalibrator(steps=5, random_state=0), views, labels)


class TestTemperature:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e4, 1e12])
    @pytest.mark.parametrize("temperature", [0.05, 1.0, 40.0])
    def test_slope_vanishes_at_any_scale(self, dtype, scale, temperature):
        logits, labels = sampled_logits(500, 7, temperature, dtype=dtype)
        fitted = TemperatureScaler().fit(logits * scale, labels)
        u = (logits * scale).double() / fitted.temperature_
        by_hand = (u.gather(1, labels[:, None]).squeeze(1) - (u.softmax(1) * u).sum(1)).mean()
        assert abs(by_hand.item()) < 1e-6
        assert abs(nll_slope(logits * scale, labels, fitted.temperature_)) < 1e-6
        assert fitted.temperature_ / scale == pytest.approx(temperature, rel=0.2)

    def test_it_is_the_minimum(self):
        logits, labels = sampled_logits(400)
        best = TemperatureScaler().fit(logits, labels).temperature_
        for other in (0.98, 0.999, 1.001, 1.02):
            assert mean_nll(logits, labels, best) < mean_nll(logits, labels, best * other)

    @pytest.mark.parametrize("right", [0.51, 0.75, 0.99])
    def test_closed_form_of_two_classes(self, right):
        n, margin = 1000, 3.0
        labels = (torch.arange(n) >= right * n).long()
        logits = torch.tensor([margin, 0.0]).repeat(n, 1)
        share = (labels == 0).double().mean().item()
        expected = margin / math.log(share / (1 - share))
        assert TemperatureScaler().fit(logits, labels).temperature_ == pytest.approx(expected, rel=1e-6)

    def test_scaling_the_logits_scales_the_temperature(self):
        logits, labels = sampled_logits(dtype=torch.float64)
        one, seven = (TemperatureScaler().fit(c * logits, labels).temperature_ for c in (1, 7))
        assert seven == pytest.approx(7 * one, rel=1e-9)

    def test_shifting_rows_changes_nothing(self):
        logits, labels = sampled_logits(dtype=torch.float64)
        shifted = logits + 1e3 * torch.randn(len(logits), 1, generator=torch.Generator().manual_seed(1))
        one, two = (TemperatureScaler().fit(z, labels).temperature_ for z in (logits, shifted))
        assert two == pytest.approx(one, rel=1e-9)

    def test_slope_is_the_derivative(self):
        logits, labels = sampled_logits(50, dtype=torch.float64)
        log_t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        F.cross_entropy(logits / log_t.exp(), labels).backward()
        assert nll_slope(logits, labels, math.exp(0.3)) == pytest.approx(log_t.grad.item(), abs=1e-12)

    def test_chunks_and_subsample_change_nothing(self):
        logits, labels = sampled_logits(20_000, 30)
        fitted = TemperatureScaler().fit(logits, labels).temperature_
        assert abs(nll_slope(logits, labels, fitted)) < 1e-6
        double = TemperatureScaler().fit(logits.double(), labels).temperature_
        assert fitted == pytest.approx(double, rel=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("n_classes", [2, 30])
    def test_the_start_from_a_sample_ends_where_all_rows_lead(self, dtype, n_classes, monkeypatch):
        logits, labels = sampled_logits(9_000, n_classes, 2.5, dtype=dtype)
        turned = logits.T.contiguous().T  # not contiguous
        fitted = TemperatureScaler().fit(turned, labels).temperature_
        assert abs(nll_slope(logits, labels, fitted)) < 1e-6
        monkeypatch.setattr("companion.calibration.recalibration.temperature._SAMPLE", 10**9)
        assert fitted == pytest.approx(TemperatureScaler().fit(logits, labels).temperature_, rel=1e-6)

    def test_a_sample_that_misleads_is_not_believed(self):
        # every third row is looked at first
        sampled = torch.arange(12_300) % 3 == 0
        informative = torch.tensor([1.0, 0.0]).repeat(12_300, 1)
        labels = torch.where(torch.arange(12_300) % 15 == 0, 1, 0)  # one of five is wrong, all of them in the sample
        assert bool(sampled[labels == 1].all())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fitted = TemperatureScaler().fit(informative, labels)
        share = (labels == 0).double().mean().item()
        assert fitted.temperature_ == pytest.approx(1 / math.log(share / (1 - share)), rel=1e-6)
        with pytest.warns(ConvergenceWarning, match="no better than a guess"):  # all other rows are wrong
            fitted = TemperatureScaler().fit(informative, torch.where(sampled, labels, 1))
        assert fitted.temperature_ == pytest.approx(500.0)
        easy = torch.where(sampled[:, None], torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0]))
        wrong = torch.where(torch.arange(12_300) % 15 == 1, 1, 0)  # none of them in the sample
        fitted = TemperatureScaler().fit(easy, wrong)
        assert abs(nll_slope(easy, wrong, fitted.temperature_)) < 1e-6

    def test_one_error_far_away(self):
        logits = torch.tensor([[1.0, 0.0]]).repeat(2000, 1)
        logits[0] = torch.tensor([1e-6, 0.0])
        labels = torch.zeros(2000, dtype=torch.long)
        labels[0] = 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fitted = TemperatureScaler().fit(logits, labels)
        assert abs(nll_slope(logits, labels, fitted.temperature_)) < 1e-6

    def test_separated_logits_warn_and_take_the_lower_bound(self):
        logits = torch.tensor([[3.0, 0.0], [0.0, 5.0]])
        with pytest.warns(ConvergenceWarning, match="first in every row"):
            fitted = TemperatureScaler(bounds=(0.01, 100.0)).fit(logits, torch.tensor([0, 1]))
        spread = ((1.5**2 + 2.5**2) / 2) ** 0.5
        assert fitted.temperature_ == pytest.approx(0.01 * spread)

    @pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
    def test_hostile_logits_warn_and_take_the_upper_bound(self, scale):
        logits = scale * torch.tensor([[3.0, 0.0], [0.0, 5.0]])
        with pytest.warns(ConvergenceWarning, match="no better than a guess"):
            fitted = TemperatureScaler(bounds=(0.01, 100.0)).fit(logits, torch.tensor([1, 0]))
        assert fitted.temperature_ == pytest.approx(scale * 100 * ((1.5**2 + 2.5**2) / 2) ** 0.5)

    def test_constant_logits_warn_and_keep_one(self):
        with pytest.warns(ConvergenceWarning, match="equal"):
            assert TemperatureScaler().fit(torch.full((4, 3), 7.0), torch.tensor([0, 1, 2, 0])).temperature_ == 1

    def test_ties_for_the_top_count_as_separated(self):
        logits = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 0.0]])
        with pytest.warns(ConvergenceWarning, match="first in every row"):
            TemperatureScaler().fit(logits, torch.tensor([0, 1]))

    def test_agrees_with_scikit_learn(self):
        sklearn_calibration = pytest.importorskip("sklearn.calibration")
        reference = getattr(sklearn_calibration, "_TemperatureScaling", None)
        if reference is None:
            pytest.skip("this scikit-learn has no temperature scaling")
        logits, labels = sampled_logits(2000, 5, 1.5, dtype=torch.float64)
        theirs = 1 / reference().fit(logits.numpy(), labels.numpy()).beta_
        assert TemperatureScaler().fit(logits, labels).temperature_ == pytest.approx(theirs, rel=1e-3)

    @pytest.mark.parametrize("bounds", [(0.0, 1.0), (2.0, 1.0), (-1.0, 1.0), (1.0, float("inf"))])
    def test_bad_bounds(self, bounds):
        with pytest.raises(ValueError, match="bounds"):
            TemperatureScaler(bounds=bounds).fit(*sampled_logits(20))

    def test_bad_temperature(self):
        with pytest.raises(ValueError, match="temperature"):
            nll_slope(*sampled_logits(20), temperature=0)

    def test_devices_agree(self, device):
        logits, labels = sampled_logits(3000, 10)
        here = TemperatureScaler().fit(logits, labels)
        there = TemperatureScaler().fit(logits.to(device), labels.to(device))
        assert there.temperature_ == pytest.approx(here.temperature_, rel=1e-6)
        assert there.transform(logits.to(device)).device.type == device.type


class TestOverlap:
    def test_posterior_by_region(self):
        data = make_overlap_mixture(3000, generator=0)
        assert data.x.shape == (3000, 10)
        assert data.overlap.float().mean().item() == pytest.approx(0.5, abs=0.05)
        torch.testing.assert_close(data.posterior.sum(1), torch.ones(3000))
        of_label = data.posterior.gather(1, data.y[:, None]).squeeze(1)
        assert of_label[data.overlap].median().item() == pytest.approx(0.5, abs=1e-3)
        assert of_label[~data.overlap].median().item() == pytest.approx(1, abs=1e-3)

    @pytest.mark.parametrize("overlap", [0.0, 0.3, 1.0])
    def test_bayes_risk(self, overlap):
        data = make_overlap_mixture(20_000, n_classes=6, dim=30, overlap=overlap, generator=1)
        nll = -data.posterior.double().gather(1, data.y[:, None]).log().mean().item()
        assert nll == pytest.approx(overlap * math.log(2), abs=0.01)

    def test_partners_share_their_place(self):
        data = make_overlap_mixture(500, n_classes=4, noise=1e-3, overlap=1.0, generator=2)
        partner = data.y ^ 1
        torch.testing.assert_close(data.posterior.gather(1, partner[:, None]), torch.full((500, 1), 0.5))

    def test_same_seed_same_data(self):
        one, two = (make_overlap_mixture(10, generator=3) for _ in range(2))
        assert torch.equal(one.x, two.x)
        assert not torch.equal(one.x, make_overlap_mixture(10, generator=4).x)

    @pytest.mark.parametrize(
        "keywords",
        [{"n_classes": 5}, {"n_classes": 0}, {"overlap": 1.5}, {"overlap": -0.1}, {"dim": 0}, {"noise": 0.0}],
    )
    def test_bad_input(self, keywords):
        with pytest.raises(ValueError, match=next(iter(keywords))):
            make_overlap_mixture(10, **keywords)


class TestHLoss:
    def brute(self, probs, labels, window, eps):
        events = sorted(
            (probs[i, c].item(), i * probs.shape[1] + c, float(labels[i] == c))
            for i in range(probs.shape[0])
            for c in range(probs.shape[1])
        )
        window = min(window, len(events))
        gaps = [abs(sum(p - o for p, _, o in events[k : k + window])) / window for k in range(len(events) - window + 1)]
        return sum(max(gap - eps, 0) for gap in gaps) / len(gaps)

    @pytest.mark.parametrize("window", [1, 7, 30, 10_000])
    @pytest.mark.parametrize("eps", [0.0, 0.05])
    def test_against_brute_force(self, window, eps):
        logits, labels = sampled_logits(40, 3, dtype=torch.float64)
        probs = logits.softmax(1)
        loss = h_calibration_loss(probs, labels, window, eps, weighting="uniform")
        assert loss.item() == pytest.approx(self.brute(probs, labels, window, eps), abs=1e-12)

    def test_leave_one_class_out_against_brute_force(self):
        logits, labels = sampled_logits(40, 3, dtype=torch.float64)
        probs = logits.softmax(1)
        parts = [self.brute(probs, labels, 9, 0.0)]
        parts += [self.brute(probs[labels != c], labels[labels != c], 9, 0.0) for c in range(3)]
        loss = h_calibration_loss(probs, labels, 9, weighting="uniform", leave_one_class_out=True)
        assert loss.item() == pytest.approx(sum(parts) / 4, abs=1e-12)

    @pytest.mark.parametrize("weighting", ["cluster", "uniform"])
    def test_honest_beats_bold_and_shy(self, weighting):
        logits, labels = sampled_logits(3000, temperature=1.0)
        losses = [h_calibration_loss((s * logits).softmax(1), labels, weighting=weighting).item() for s in (0.5, 1, 2)]
        assert losses[1] < 0.6 * min(losses[0], losses[2])

    def test_base_rates_are_calibrated(self):
        labels = torch.tensor([0] * 700 + [1] * 300)
        constant = torch.tensor([[0.7, 0.3]]).repeat(1000, 1)
        loss = h_calibration_loss(constant, labels, window=1000, weighting="uniform")
        shuffled = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
        assert loss.item() < 0.31  # the order of ties is that of the data, here the worst there is
        loss = h_calibration_loss(constant, labels[shuffled], window=500, weighting="uniform")
        assert loss.item() < 0.02

    def test_gradient_points_towards_less_confidence(self):
        logits, labels = sampled_logits(1000, temperature=2.0, dtype=torch.float64)
        log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
        h_calibration_loss((logits / log_t.exp()).softmax(1), labels).backward()
        assert log_t.grad.item() < 0

    def test_gradient_is_the_difference_quotient(self):
        logits, labels = sampled_logits(60, 3, dtype=torch.float64)

        def loss(t):
            return h_calibration_loss((logits / t).softmax(1), labels, 11, weighting="uniform")

        t = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
        loss(t).backward()
        step = 1e-7
        numeric = (loss(1.3 + step) - loss(1.3 - step)) / (2 * step)
        assert t.grad.item() == pytest.approx(numeric.item(), rel=1e-4)

    def test_running_gap_ends_where_the_sums_agree(self):
        logits, labels = sampled_logits(200)
        p, gap = running_gap(logits.softmax(1), labels)
        assert bool((p.diff() >= 0).all())
        assert gap[-1].item() == pytest.approx(0, abs=1e-6)

    @pytest.mark.parametrize(
        ("keywords", "match"), [({"weighting": "no"}, "weighting"), ({"window": 0}, "window"), ({"eps": -1}, "eps")]
    )
    def test_bad_input(self, keywords, match):
        logits, labels = sampled_logits(20)
        with pytest.raises(ValueError, match=match):
            h_calibration_loss(logits.softmax(1), labels, **keywords)
        with pytest.raises(ValueError, match="looks like logits"):
            h_calibration_loss(logits, labels)

    def test_devices_agree(self, device):
        logits, labels = sampled_logits(300, dtype=torch.float64)
        probs = logits.softmax(1)
        here, there = h_calibration_loss(probs, labels), h_calibration_loss(probs.to(device), labels.to(device))
        assert there.device.type == device.type
        assert there.item() == pytest.approx(here.item(), rel=1e-9)


class TestMaps:
    @pytest.mark.parametrize("make", [GlobalTemperature, MonotoneLogitMap, MarginTemperature, lambda: VectorScaling(4)])
    def test_starts_as_the_identity(self, make):
        logits, _ = sampled_logits(50)
        torch.testing.assert_close(make()(logits).softmax(1), logits.softmax(1))

    @pytest.mark.parametrize("kind", [GlobalTemperature, MonotoneLogitMap, MarginTemperature])
    def test_keeps_the_order_whatever_its_parameters(self, kind, generator):
        logits, _ = sampled_logits(50, dtype=torch.float64)
        calibration_map = kind().double()
        for parameter in calibration_map.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        out = calibration_map(logits).detach()
        assert torch.equal(out.argsort(1), logits.argsort(1))

    def test_monotone_map_is_piecewise_linear(self):
        calibration_map = MonotoneLogitMap(knots=(0.0, -1.0)).double()
        calibration_map.log_slopes.data = torch.tensor([2.0, 3.0], dtype=torch.float64).log()
        logits = torch.tensor([[0.0, -5.0]], dtype=torch.float64)
        log_p = logits.log_softmax(1)
        expected = torch.stack([2 * log_p[:, 0], -2 + 3 * (log_p[:, 1] + 1)], dim=1)
        torch.testing.assert_close(calibration_map(logits), expected)

    @pytest.mark.parametrize("knots", [(), (-1.0, -2.0), (0.0, 1.0), (0.0, -1.0, -1.0)])
    def test_bad_knots(self, knots):
        with pytest.raises(ValueError, match="knots"):
            MonotoneLogitMap(knots)


class TestHCalibrator:
    @pytest.mark.parametrize("calibration_map", ["order_preserving", "temperature", "margin"])
    def test_accuracy_is_untouched(self, calibration_map):
        logits, labels = sampled_logits(300)
        fitted = HCalibrator(map=calibration_map, steps=30, random_state=0).fit(logits, labels)
        assert torch.equal(fitted.transform(logits).argmax(1), logits.argmax(1))

    def test_nll_temperature_is_already_the_minimum(self):
        logits, labels = sampled_logits(300, dtype=torch.float64)
        fitted = HCalibrator(map="temperature", loss="nll", steps=300).fit(logits, labels)
        assert fitted.map_.log_temperature.item() == pytest.approx(0, abs=1e-3)

    def test_finds_the_temperature_from_any_scale(self):
        logits, labels = sampled_logits(4000, temperature=1.0, dtype=torch.float64)
        fitted = HCalibrator(map="temperature", steps=60).fit(1e6 * logits, labels)
        total = fitted.temperature_ * fitted.map_.log_temperature.exp().item()
        assert total / 1e6 == pytest.approx(1, abs=0.12)

    def test_the_loss_goes_down(self):
        logits, labels = sampled_logits(400)
        curve = HCalibrator(map="margin", loss="brier", steps=50, random_state=0).fit(logits, labels).loss_curve_
        assert len(curve) == 50
        assert curve[-1] < curve[0]

    def test_random_state_decides(self):
        logits, labels = sampled_logits(100)
        torch.manual_seed(1)
        one = HCalibrator(map="margin", steps=5, random_state=0).fit(logits, labels).predict_proba(logits)
        torch.manual_seed(2)
        two = HCalibrator(map="margin", steps=5, random_state=0).fit(logits, labels).predict_proba(logits)
        assert torch.equal(one, two)

    @pytest.mark.parametrize(("name", "value"), [("map", "no"), ("loss", "no"), ("steps", 0), ("lr", -1.0)])
    def test_bad_parameters(self, name, value):
        with pytest.raises(ValueError, match=name):
            HCalibrator(**{name: value}).fit(*sampled_logits(20))


class TestCorrectness:
    @pytest.mark.parametrize(("share", "best"), [(0.3, 0.0), (0.7, 1.0)])
    def test_minimisers_are_median_and_mean(self, share, best):
        correct = torch.arange(100) < 100 * share
        grid = torch.linspace(0, 1, 101, dtype=torch.float64)
        losses = {
            squared: torch.stack([correctness_aware_loss(c.expand(100), correct, squared) for c in grid])
            for squared in (False, True)
        }
        assert grid[losses[False].argmin()].item() == best
        assert grid[losses[True].argmin()].item() == pytest.approx(share)

    def test_slopes_are_derivatives(self):
        logits, labels = sampled_logits(50, dtype=torch.float64)
        probs = logits.softmax(1)
        step = 1e-6

        def losses(s):
            p = (s * logits).softmax(1)
            confidence, predicted = p.max(1)
            right = (predicted == labels).double()
            return (
                F.nll_loss(p.log(), labels, reduction="none"),
                (p - F.one_hot(labels, 4)).square().sum(1),
                (right - confidence).abs(),
            )

        numeric = [(a - b) / (2 * step) for a, b in zip(losses(1 + step), losses(1 - step), strict=True)]
        for slope, expected in zip(sharpening_slopes(probs, labels), numeric, strict=True):
            torch.testing.assert_close(slope, expected, atol=1e-6, rtol=1e-6)

    def test_signs(self):
        logits, labels = sampled_logits(2000, dtype=torch.float64)
        probs = logits.softmax(1)
        slopes = sharpening_slopes(probs, labels)
        wrong = probs.argmax(1) != labels
        assert bool((slopes.correctness[wrong] > 0).all())
        assert bool((slopes.correctness[~wrong] < 0).all())
        entropy = -(probs * probs.log()).sum(1)
        of_label = probs.gather(1, labels[:, None]).squeeze(1)
        assert torch.equal(slopes.nll < 0, of_label > (-entropy).exp())
        assert bool((slopes.nll[wrong] < 0).any())

    def test_uniform_prediction_has_no_slope(self):
        slopes = sharpening_slopes(torch.full((1, 4), 0.25, dtype=torch.float64), [2])
        for slope in slopes:
            assert slope.item() == pytest.approx(0, abs=1e-12)

    def test_views(self):
        images = torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
        views = shifted_views(images)
        assert views.shape == (3, 6, 2, 8, 8)
        assert torch.equal(views[:, 0], images)
        assert torch.equal(views[:, 1, ..., 1:], images[..., :-1])
        assert torch.equal(views[:, 2, :, 1:], images[:, :, :-1])
        assert views.min() >= 0
        assert views.max() <= 1
        torch.testing.assert_close(rotate(images, 360), images, atol=1e-5, rtol=0)
        torch.testing.assert_close(rotate(rotate(images, 90), -90), images, atol=1e-5, rtol=0)

    def test_views_of_a_constant_stay_constant_inside(self):
        views = shifted_views(torch.ones(1, 1, 9, 9))
        torch.testing.assert_close(views[:, :, :, 2:-2, 2:-2], torch.ones(1, 6, 1, 5, 5))

    def test_one_temperature_per_sample_keeps_the_order(self, generator):
        views, labels = sampled_logits(200)
        views = torch.stack([views, views + torch.randn(200, 4, generator=generator)], dim=1)
        fitted = CorrectnessCalibrator(steps=50, random_state=0).fit(views, labels)
        out = fitted.transform(views)
        assert torch.equal(out.argsort(1), views[:, 0].argsort(1))
        ratio = views[:, 0] / fitted.temperature_ / out
        torch.testing.assert_close(ratio, ratio[:, :1].expand(-1, 4), rtol=1e-4, atol=0)
        assert ratio.min() >= math.exp(-3) - 1e-3
        assert ratio.max() <= math.exp(3) + 1e-2

    def test_median_saturates_where_the_square_does_not(self):
        logits, labels = sampled_logits(2000, temperature=1.0)
        confidence = {
            loss: CorrectnessCalibrator(loss=loss, steps=150, random_state=0)
            .fit(logits, labels)
            .predict_proba(logits)
            .amax(1)
            .mean()
            .item()
            for loss in ("correctness", "squared")
        }
        accuracy = (logits.argmax(1) == labels).float().mean().item()
        assert confidence["squared"] == pytest.approx(accuracy, abs=0.03)
        assert confidence["correctness"] > accuracy + 0.1

    def test_starts_at_one(self):
        torch.testing.assert_close(ViewTemperature(2, 3)(torch.randn(5, 2, 4)), torch.ones(5))

    def test_bad_input(self):
        logits, labels = sampled_logits(20)
        with pytest.raises(ValueError, match="loss"):
            CorrectnessCalibrator(loss="no").fit(logits, labels)
        with pytest.raises(ValueError, match="n, V, C"):
            CorrectnessCalibrator().fit(logits[None, None], labels)
        fitted = CorrectnessCalibrator(steps=2, random_state=0).fit(logits[:, None].repeat(1, 2, 1), labels)
        with pytest.raises(ValueError, match="expected 2 views"):
            fitted.transform(logits)
        with pytest.raises(ValueError, match="confidence in"):
            correctness_aware_loss([1.5], [1])
        with pytest.raises(ValueError, match="0 or 1"):
            correctness_aware_loss([0.5], [2])
        with pytest.raises(ValueError, match="above 0"):
            sharpening_slopes([[1.0, 0.0]], [0])
        with pytest.raises(ValueError, match="n, c, h, w"):
            shifted_views(torch.zeros(8, 8))


class TestProgressiveTargets:
    def test_share_grows_linearly(self):
        targets = ProgressiveTargets(torch.tensor([0, 1]), 2, epochs=4, alpha=0.8)
        shares = []
        for _ in range(4):
            shares.append(targets.alpha)
            targets.update(torch.full((2, 2), 0.5))
        np.testing.assert_allclose(shares, [0.2, 0.4, 0.6, 0.8])

    def test_first_epoch_is_plain(self):
        targets = ProgressiveTargets(torch.tensor([2, 0]), 3, epochs=5)
        assert torch.equal(targets(torch.tensor([1, 0])), torch.eye(3)[[0, 2]])

    def test_only_the_last_epoch_counts(self):
        targets = ProgressiveTargets(torch.tensor([0]), 2, epochs=2, alpha=1.0)
        targets.update(torch.tensor([[0.1, 0.9]]))
        torch.testing.assert_close(targets(torch.tensor([0])), torch.tensor([[0.1, 0.9]]))

    def test_gradient_splits(self):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        previous = torch.randn(6, 4, generator=generator, dtype=torch.float64).softmax(1)
        labels = torch.tensor([0, 1, 2, 3, 0, 1])
        targets = ProgressiveTargets(labels, 4, epochs=2, alpha=0.6)
        targets.one_hot = targets.one_hot.double()
        targets.update(previous)
        F.cross_entropy(logits, targets(torch.arange(6)), reduction="sum").backward()
        p = logits.detach().softmax(1)
        expected = 0.4 * (p - F.one_hot(labels, 4)) + 0.6 * (p - previous)
        torch.testing.assert_close(logits.grad, expected, atol=1e-12, rtol=0)
        ratio = progressive_gradient_ratio(p, previous, labels, 0.6)
        of_label = logits.grad.gather(1, labels[:, None]).squeeze(1)
        torch.testing.assert_close(ratio, of_label.abs() / (1 - p.gather(1, labels[:, None]).squeeze(1)))

    def test_unchanged_keeps_its_share_and_harder_keeps_more(self):
        p = torch.tensor([[0.6, 0.4]] * 3)
        previous = torch.tensor([[0.6, 0.4], [0.8, 0.2], [0.4, 0.6]])  # the same, harder now, easier now
        same, harder, easier = progressive_gradient_ratio(p, previous, torch.zeros(3, dtype=torch.long), 0.5).tolist()
        assert same == pytest.approx(0.5)
        assert harder > same > easier

    def test_many_models_are_as_many_stores(self):
        labels = torch.tensor([0, 1, 2])
        many = ProgressiveTargets(labels, 3, epochs=3, n_models=2)
        probs = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(0)).softmax(2)
        many.update(probs)
        index = torch.tensor([[2, 0], [1, 1]])
        for m in range(2):
            one = ProgressiveTargets(labels, 3, epochs=3)
            one.update(probs[m])
            torch.testing.assert_close(many(index)[m], one(index[m]))

    def test_labels_of_their_own(self):
        labels = torch.tensor([[0, 1, 2], [2, 2, 0]])
        many = ProgressiveTargets(labels, 3, epochs=3, n_models=2)
        assert torch.equal(many(torch.tensor([[0], [0]])).argmax(2), torch.tensor([[0], [2]]))

    def test_bad_input(self):
        labels = torch.tensor([0, 1])
        with pytest.raises(ValueError, match="alpha"):
            ProgressiveTargets(labels, 2, epochs=2, alpha=1.1)
        with pytest.raises(ValueError, match="epochs"):
            ProgressiveTargets(labels, 2, epochs=0)
        with pytest.raises(ValueError, match="labels"):
            ProgressiveTargets(labels + 1, 2, epochs=2)
        targets = ProgressiveTargets(labels, 2, epochs=2)
        with pytest.raises(ValueError, match="shape"):
            targets.update(torch.full((3, 2), 0.5))
        with pytest.raises(ValueError, match="logits"):
            targets.update(torch.tensor([[3.0, -1.0], [0.0, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "estimator",
    [
        TemperatureScaler(),
        HCalibrator(steps=30),
        HCalibrator("margin", steps=30, random_state=0),
        CorrectnessCalibrator("nll", steps=30, random_state=0),
    ],
    ids=repr,
)
def test_logits_in_half_precision(estimator, dtype):
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(400, 4, generator=generator)
    labels = torch.softmax(true, 1).multinomial(1, generator=generator).squeeze(1)
    logits = (3 * true).to(dtype)
    probs = clone(estimator).fit(logits, labels).predict_proba(logits)
    assert probs.dtype == dtype
    expected = clone(estimator).fit(logits.float(), labels).predict_proba(logits.float())
    torch.testing.assert_close(probs.float(), expected, atol=2e-2, rtol=0)


@pytest.mark.parametrize(
    "estimator", [HCalibrator(steps=30), CorrectnessCalibrator(steps=30, random_state=0)], ids=repr
)
def test_predicting_in_another_dtype_leaves_the_estimator_alone(estimator):
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(400, 4, generator=generator, dtype=torch.float64)
    labels = torch.softmax(true, 1).multinomial(1, generator=generator).squeeze(1)
    fitted = clone(estimator).fit(3 * true, labels)
    before = fitted.predict_proba(3 * true)
    fitted.predict_proba((3 * true).half())
    fitted.transform((3 * true).float())
    assert torch.equal(fitted.predict_proba(3 * true), before)


@pytest.mark.parametrize("estimator", [HCalibrator("margin", random_state=-1), CorrectnessCalibrator(random_state=-1)])
def test_a_wrong_seed_is_called_by_its_name(estimator):
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(200, 3, generator=generator)
    labels = torch.softmax(true, 1).multinomial(1, generator=generator).squeeze(1)
    with pytest.raises(ValueError, match="expected random_state to be a seed"):
        estimator.fit(3 * true, labels)
