"""Scores, kernels, streams and diagrams: closed forms, identities, limits, other people's code, and bad input."""

import math
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss

from companion.calibration import (
    CalibrationError,
    ClasswiseECE,
    PlattScaler,
    aurc,
    binary_calibration_error,
    brier_decomposition,
    brier_skill_score,
    bucket_collapse,
    classwise_ece,
    debiased_ece,
    ece_noise_floor,
    expected_calibration_error,
    mmce,
    reliability_curve,
    reliability_diagram,
    risk_coverage,
    top_class,
)
from tests.processes import run_two


def draw(n=600, n_classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    probs = (2 * torch.randn(n, n_classes, generator=generator, dtype=torch.float64)).softmax(1)
    return probs, probs.sqrt().multinomial(1, generator=generator).squeeze(1)


def honest(n, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    p = torch.sigmoid(spread * torch.randn(n, generator=generator, dtype=torch.float64))
    return p, torch.rand(n, generator=generator, dtype=torch.float64) < p


class TestStreams:
    @pytest.mark.parametrize("norm", ["l1", "l2", "max"])
    def test_batches_and_merging_are_the_whole(self, norm):
        probs, labels = draw()
        for whole, make in (
            (expected_calibration_error(probs, labels, 10, norm), lambda: CalibrationError(10, norm)),
            (classwise_ece(probs, labels, 10, norm), lambda: ClasswiseECE(4, 10, norm)),
        ):
            one, other = make(), make()
            one.update(probs[:100], labels[:100])
            one.update(probs[100:101], labels[100:101])
            other.update(probs[101:], labels[101:])
            one.merge_state(other)
            assert one.compute().item() == pytest.approx(whole.item(), abs=1e-12)
            one.reset()
            with pytest.raises(ValueError, match="at least 1 sample"), pytest.warns(UserWarning, match="compute"):
                one.compute()

    def test_state_does_not_grow(self):
        metric = ClasswiseECE(4)
        for _ in range(3):
            metric.update(*draw(50))
        assert metric.gap.shape == metric.count.shape == (4, 15)

    def test_events(self):
        p, o = honest(200)
        metric = CalibrationError()
        metric.update(p, o)
        assert metric.compute().item() == pytest.approx(binary_calibration_error(p, o).item())

    def test_two_processes(self, tmp_path):
        script = """
from companion.calibration import CalibrationError, ClasswiseECE
g = torch.Generator().manual_seed(0)
probs = (2 * torch.randn(300, 4, generator=g, dtype=torch.float64)).softmax(1)
labels = probs.multinomial(1, generator=g).squeeze(1)
part = slice(0, 120) if rank == 0 else slice(120, None)
out = []
for metric in (CalibrationError(), ClasswiseECE(4)):
    metric.update(probs[part], labels[part])
    out.append(metric.compute())
    metric.reset()
"""
        g = torch.Generator().manual_seed(0)
        probs = (2 * torch.randn(300, 4, generator=g, dtype=torch.float64)).softmax(1)
        labels = probs.multinomial(1, generator=g).squeeze(1)
        expected = [expected_calibration_error(probs, labels).item(), classwise_ece(probs, labels).item()]
        for file in run_two(script, tmp_path):
            found = torch.load(file, weights_only=True)
            assert [v.item() for v in found] == pytest.approx(expected, abs=1e-12)

    def test_columns(self):
        with pytest.raises(ValueError, match="3 classes"):
            ClasswiseECE(3).update(*draw(20))


class TestNetcal:
    @pytest.mark.parametrize("bins", [5, 10, 15, 40])
    def test_agreement(self, bins):
        metrics = pytest.importorskip("netcal.metrics")
        probs, labels = draw(3000, 6)
        for norm, theirs in (("l1", metrics.ECE(bins)), ("max", metrics.MCE(bins))):
            value = theirs.measure(probs.numpy(), labels.numpy())
            assert expected_calibration_error(probs, labels, bins, norm).item() == pytest.approx(value, abs=1e-6)


class TestBias:
    def test_noise_floor_is_what_honest_models_show(self):
        for n, bins in ((200, 15), (2000, 15), (2000, 50)):
            found = [binary_calibration_error(*honest(n, seed), bins).item() for seed in range(200)]
            floor = np.mean([ece_noise_floor(honest(n, seed)[0], bins).item() for seed in range(5)])
            assert np.mean(found) == pytest.approx(floor, rel=0.08)

    def test_noise_floor_falls_with_the_root_of_n(self):
        p, _ = honest(500)
        assert ece_noise_floor(p.repeat(4)).item() == pytest.approx(ece_noise_floor(p).item() / 2)
        assert ece_noise_floor(p).item() <= math.sqrt(15 / (2 * math.pi * 500))

    def test_debiased_is_right_on_average(self):
        values = torch.stack([debiased_ece(*honest(300, seed)) for seed in range(400)])
        plain = torch.stack([binary_calibration_error(*honest(300, seed), norm="l2").square() for seed in range(400)])
        assert abs(values.mean()) < 4 * values.std() / 20
        assert plain.mean() > 10 * abs(values.mean())

    def test_debiased_finds_a_known_error(self):
        # every p is 0.7 and the chance is 0.5: the squared error is 0.04
        generator = torch.Generator().manual_seed(0)
        p = torch.full((50,), 0.7, dtype=torch.float64)
        values = [debiased_ece(p, torch.rand(50, generator=generator) < 0.5) for _ in range(600)]
        assert torch.stack(values).mean().item() == pytest.approx(0.04, abs=0.004)

    def test_debiased_is_the_mean_over_pairs(self):
        p, o = honest(12)
        r = p - o.double()
        pairs = [r[i] * r[j] for i in range(12) for j in range(12) if i != j]
        assert debiased_ece(p, o, n_bins=1).item() == pytest.approx(torch.stack(pairs).mean().item())


class TestMMCE:
    @pytest.mark.parametrize("bandwidth", [0.002, 0.05, 0.4, 10.0])
    def test_against_all_pairs(self, bandwidth):
        probs, labels = draw(300)
        probs = torch.cat([probs, probs[:40], torch.eye(4, dtype=torch.float64)])
        labels = torch.cat([labels, labels[:40], torch.tensor([0, 1, 3, 3])])
        p, o = top_class(probs, labels)
        r = p - o.double()
        kernel = (-(p[:, None] - p).abs() / bandwidth).exp()
        expected = (r @ kernel @ r).sqrt() / len(p)
        assert mmce(probs, labels, bandwidth).item() == pytest.approx(expected.item(), rel=1e-9)

    def test_gradient_against_all_pairs(self):
        p, o = honest(40)
        p.requires_grad_()
        r = p - o.double()
        ((r @ (-(p[:, None] - p).abs() / 0.4).exp() @ r).sqrt() / 40).backward()
        expected, p.grad = p.grad, None
        mmce(p, o).backward()
        torch.testing.assert_close(p.grad, expected)

    def test_wide_kernel_sees_the_mean_only(self):
        p, o = honest(100)
        assert mmce(p, o, 1e9).item() == pytest.approx(abs((p - o.double()).mean().item()))

    def test_perfect_has_no_gradient_and_no_nan(self):
        p = torch.ones(5, dtype=torch.float64, requires_grad=True)
        mmce(p, torch.ones(5)).backward()
        assert torch.equal(p.grad, torch.zeros(5, dtype=torch.float64))

    def test_bandwidth(self):
        with pytest.raises(ValueError, match="bandwidth"):
            mmce(*honest(5), 1e-4)


class TestBrier:
    @pytest.mark.parametrize("strategy", ["width", "mass"])
    def test_identity(self, strategy):
        p, o = honest(500)
        parts = brier_decomposition(p, o, 7, strategy)
        total = parts.reliability - parts.resolution + parts.uncertainty + parts.within_bins
        assert parts.brier.item() == pytest.approx(total.item(), abs=1e-14)
        assert parts.brier.item() == pytest.approx(brier_score_loss(o.numpy(), p.numpy()))

    def test_one_value_per_bin_is_murphys(self):
        p = torch.tensor([0.1] * 30 + [0.5] * 30 + [0.9] * 30, dtype=torch.float64)
        o = torch.arange(90) % 3 == 0
        parts = brier_decomposition(p, o, 10)
        assert parts.within_bins.item() == pytest.approx(0, abs=1e-14)
        gaps = torch.tensor([0.1, 0.5, 0.9]) - 1 / 3
        assert parts.reliability.item() == pytest.approx(gaps.square().mean().item())
        assert parts.resolution.item() == pytest.approx(0, abs=1e-14)

    def test_reliability_is_the_squared_l2_error(self):
        p, o = honest(300)
        expected = binary_calibration_error(p, o, 9, "l2").item() ** 2
        assert brier_decomposition(p, o, 9).reliability.item() == pytest.approx(expected)

    def test_skill(self):
        o = torch.tensor([1, 1, 0, 0, 0])
        assert brier_skill_score(o.double(), o).item() == 1
        assert brier_skill_score(torch.full((5,), 0.4, dtype=torch.float64), o).item() == pytest.approx(0, abs=1e-12)
        assert brier_skill_score(1 - o.double(), o).item() < -3
        assert brier_skill_score([0.4], [1], base_rate=0.4).item() == pytest.approx(0, abs=1e-6)
        with pytest.raises(ValueError, match="both kinds"):
            brier_skill_score([0.4, 0.5], [1, 1])

    def test_only_reliability_is_lost_by_squeezing(self):
        """A constant equal to the base rate has no calibration error, and no skill."""
        _, o = honest(400)
        constant = torch.full((400,), o.double().mean().item(), dtype=torch.float64)
        assert binary_calibration_error(constant, o).item() == pytest.approx(0, abs=1e-12)
        assert brier_skill_score(constant, o).item() == pytest.approx(0, abs=1e-12)
        assert bucket_collapse(constant).item() == 1


class TestRiskCoverage:
    def test_by_counting(self):
        p, o = honest(60)
        order = p.argsort(descending=True)
        wrong = (~o[order]).double()
        expected = np.mean([wrong[:k].mean().item() for k in range(1, 61)])
        assert aurc(p, o).item() == pytest.approx(expected)

    def test_ties_are_the_mean_over_orders(self):
        p, o = torch.tensor([0.9, 0.5, 0.5, 0.5, 0.1]), torch.tensor([1, 0, 1, 1, 0])
        generator, values = torch.Generator().manual_seed(0), []
        for _ in range(4000):
            jitter = p + 1e-3 * torch.rand(5, generator=generator)
            values.append(aurc(jitter, o).item())
        assert aurc(p, o).item() == pytest.approx(np.mean(values), abs=4e-3)
        assert aurc(torch.full((5,), 0.3), o).item() == pytest.approx(0.4)

    def test_sees_the_order_only(self):
        p, o = honest(300)
        assert aurc(p**5, o).item() == pytest.approx(aurc(p, o).item(), abs=1e-12)
        assert aurc(p.logit(), o).item() == pytest.approx(aurc(p, o).item(), abs=1e-12)
        assert risk_coverage(p, o).risk[-1].item() == pytest.approx((~o).double().mean().item())


class TestDiagram:
    def test_curve(self):
        probs, labels = draw()
        curve = reliability_curve(probs, labels, 10)
        assert curve.ece.item() == pytest.approx(expected_calibration_error(probs, labels, 10).item())
        again = (curve.count * (curve.confidence - curve.accuracy).abs()).sum() / 600
        assert again.item() == pytest.approx(curve.ece.item())
        assert bool(((curve.low <= curve.accuracy) & (curve.accuracy <= curve.high)).all())
        assert int(curve.count.sum()) == 600

    def test_interval_is_that_of_redrawn_rows(self):
        generator = torch.Generator().manual_seed(0)
        p, o = torch.full((80,), 0.55, dtype=torch.float64), torch.arange(80) % 4 > 0
        curve = reliability_curve(p, o, 10, n_resamples=4000)
        rows = torch.randint(80, (4000, 80), generator=generator)
        low, high = o[rows].double().mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        assert curve.low.item() == pytest.approx(low.item(), abs=0.02)
        assert curve.high.item() == pytest.approx(high.item(), abs=0.02)

    def test_intervals_cover(self):
        inside = []
        for seed in range(40):
            p, o = honest(3000, seed)
            curve = reliability_curve(p, o, 10, generator=seed)
            inside.append(((curve.low <= curve.confidence) & (curve.confidence <= curve.high)).double().mean().item())
        assert 0.9 < np.mean(inside) < 0.99

    @pytest.mark.parametrize("strategy", ["width", "mass"])
    def test_figure(self, strategy):
        probs, labels = draw()
        fig = reliability_diagram(probs, labels, 10, strategy, title="test")
        top, bottom = fig.axes
        assert "ECE" in top.texts[0].get_text()
        assert top.get_title(loc="left") == "test"
        assert sum(bar.get_height() for bar in bottom.patches) == pytest.approx(600)
        plt.close(fig)

    def test_own_axes(self):
        p, o = honest(100)
        fig, axes = plt.subplots(2, 1)
        assert reliability_diagram(p, o, axes=axes) is fig
        plt.close(fig)
        with pytest.raises(ValueError, match="two axes"):
            reliability_diagram(p, o, axes=[None])


class TestPlatt:
    def test_finds_the_map_that_made_the_outcomes(self):
        generator = torch.Generator().manual_seed(0)
        c = torch.sigmoid(2 + torch.randn(40_000, generator=generator, dtype=torch.float64))
        o = torch.rand(40_000, generator=generator, dtype=torch.float64) < torch.sigmoid(0.7 * c.logit() - 2)
        scaler = PlattScaler().fit(c, o)
        assert scaler.slope_ == pytest.approx(0.7, abs=0.04)
        assert scaler.intercept_ == pytest.approx(-2, abs=0.1)

    def test_against_a_general_solver(self):
        from scipy.optimize import minimize

        p, o = honest(200)
        z, n = p.logit().numpy(), int(o.sum())
        t = np.where(o.numpy(), (n + 1) / (n + 2), 1 / (200 - n + 2))

        def loss(w):
            a = w[0] * z + w[1]
            return np.mean(np.logaddexp(0, a) - t * a)

        best = minimize(loss, [1.0, 0.0], tol=1e-12).x
        scaler = PlattScaler().fit(p, o)
        assert [scaler.slope_, scaler.intercept_] == pytest.approx(best.tolist(), abs=1e-4)

    def test_separated_and_constant_stay_finite(self):
        scaler = PlattScaler().fit([0.0, 0.1, 0.9, 1.0], [0, 0, 1, 1])
        assert math.isfinite(scaler.slope_)
        assert scaler.transform([0.0, 1.0]).diff() > 0
        flat = PlattScaler().fit([0.8] * 10, [1, 0] * 5)
        assert flat.slope_ == 0
        assert flat.transform([0.1, 0.9]).tolist() == pytest.approx([0.5, 0.5])

    def test_contract(self):
        from sklearn.base import clone
        from sklearn.exceptions import NotFittedError

        with pytest.raises(NotFittedError):
            PlattScaler().transform([0.5])
        p, o = honest(50)
        kept = p.clone()
        scaler = clone(PlattScaler(eps=1e-4)).fit(p, o)
        again = clone(scaler).fit(p[:20], o[:20]).fit(p, o)
        assert torch.equal(p, kept)
        assert again.slope_ == scaler.slope_
        rows = scaler.predict_proba(p.numpy())
        torch.testing.assert_close(rows.sum(1), torch.ones(50, dtype=torch.float64))
        with pytest.raises(ValueError, match="both kinds"):
            PlattScaler().fit([0.5, 0.6], [1, 1])


@pytest.mark.parametrize(
    "score", [binary_calibration_error, brier_skill_score, brier_decomposition, lambda c, o: PlattScaler().fit(c, o)]
)
class TestWrongThings:
    @pytest.mark.parametrize(
        ("confidence", "correct", "match"),
        [
            ([2.0, -1.0, 0.5], [1, 0, 1], r"logits: pass sigmoid"),
            ([-0.2, -1.0, -3.0], [1, 0, 1], r"log-probabilities: pass exp"),
            ([90.0, 20.0, 55.0], [1, 0, 1], "percentages"),
            ([3, 0, 1], [0.9, 0.3, 0.2], "looks like labels"),
            ([0.9, float("nan"), 0.1], [1, 0, 1], "NaN"),
            ([[0.9, 0.1], [0.2, 0.8]], [1, 0], "top_class"),
            ([1, 0, 1], [0.9, 0.3, 0.2], r"order is \(confidence, correct\)"),
            ([0.9, 0.3, 0.2], [1, 2, 0], "0 or 1"),
            ([0.9, 0.3, 0.2], [1, 0], "expected 3"),
            ([], [], "at least 1"),
        ],
    )
    def test_errors_say_so(self, score, confidence, correct, match):
        with pytest.raises(ValueError, match=match):
            score(confidence, correct)


@pytest.mark.parametrize("score", [mmce, debiased_ece, lambda probs, labels: CalibrationError().update(probs, labels)])
def test_labels_in_place_of_probabilities(score):
    probs, labels = draw(50)
    with pytest.raises(ValueError, match="looks like labels"):
        score(labels, probs)


def test_devices_agree(device):
    p, o = honest(200)
    probs, labels = draw(200)
    for score in (binary_calibration_error, brier_skill_score, debiased_ece, mmce, aurc):
        there = score(p.to(device), o.to(device))
        assert there.device.type == device.type
        assert there.item() == pytest.approx(score(p, o).item(), abs=1e-10)
    metric = ClasswiseECE(4).to(device)
    metric.update(probs.to(device), labels.to(device))
    assert metric.compute().item() == pytest.approx(classwise_ece(probs, labels).item(), abs=1e-12)


def test_a_diagram_leaves_the_style_of_other_pictures_alone():
    code = """if True:
        import matplotlib
        from companion.calibration import reliability_diagram
        before = dict(matplotlib.rcParams)
        for _ in range(2):
            fig = reliability_diagram([0.2, 0.4, 0.7, 0.9], [0, 1, 1, 1], n_bins=5)
            assert fig.axes[0].get_facecolor() != (1, 1, 1, 1), "the figure itself has the style of the book"
            assert dict(matplotlib.rcParams) == before
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_axis_is_not_two():
    with pytest.raises(ValueError, match="expected two axes, diagram and histogram, got 1"):
        reliability_diagram([0.2, 0.9], [0, 1], axes=plt.figure().add_subplot())
    plt.close()
