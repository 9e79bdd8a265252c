"""Calibration errors: against a literal reading of the definition, edges included, and against torchmetrics."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from companion.calibration import (
    binary_calibration_error,
    classwise_ece,
    ece_noise_floor,
    expected_calibration_error,
    reliability_curve,
    top_class,
)


def draw(n=500, n_classes=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    probs = (2 * torch.randn(n, n_classes, generator=generator, dtype=dtype)).softmax(1)
    labels = probs.sqrt().multinomial(1, generator=generator).squeeze(1)
    return probs, labels


def on_edges(n_bins, dtype):
    """Two-class probabilities whose first column is every edge, its neighbours, and 0 and 1."""
    edges = torch.arange(n_bins + 1, dtype=dtype) / n_bins
    up = torch.nextafter(edges, torch.full_like(edges, 2.0)).clamp(max=1)
    down = torch.nextafter(edges, torch.full_like(edges, -1.0)).clamp(min=0)
    p = torch.cat([edges, up, down])
    return torch.stack([p, 1 - p], dim=1)


def binary(confidence, outcome, n_bins, norm):
    """The definition, one bin at a time: bins are (lo, hi], and the first holds 0 too."""
    gaps, sizes = [], []
    for k in range(n_bins):
        inside = (confidence > k / n_bins) & (confidence <= (k + 1) / n_bins)
        if k == 0:
            inside |= confidence == 0
        if inside.any():
            gaps.append((confidence[inside].double() - outcome[inside].double()).mean().abs().item())
            sizes.append(inside.sum().item())
    assert sum(sizes) == len(confidence)
    gaps, weights = np.array(gaps), np.array(sizes) / len(confidence)
    return {"l1": (weights * gaps).sum(), "l2": np.sqrt((weights * gaps**2).sum()), "max": gaps.max()}[norm]


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@pytest.mark.parametrize("n_bins", [1, 2, 10, 15, 49])
class TestDefinition:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_ece_at_the_edges(self, norm, n_bins, dtype):
        probs = torch.cat([on_edges(n_bins, dtype), draw(dtype=dtype, n_classes=2)[0]])
        labels = torch.arange(len(probs)) % 2
        confidence, predicted = probs.max(1)
        expected = binary(confidence, predicted == labels, n_bins, norm)
        assert expected_calibration_error(probs, labels, n_bins, norm).item() == pytest.approx(expected, abs=1e-9)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_classwise_at_the_edges(self, norm, n_bins, dtype):
        probs = on_edges(n_bins, dtype)
        labels = torch.arange(len(probs)) % 2
        expected = np.mean([binary(probs[:, c], labels == c, n_bins, norm) for c in range(2)])
        assert classwise_ece(probs, labels, n_bins, norm).item() == pytest.approx(expected, abs=1e-9)

    def test_torchmetrics(self, norm, n_bins):
        probs, labels = draw()
        theirs = multiclass_calibration_error(probs, labels, num_classes=4, n_bins=n_bins, norm=norm).item()
        assert expected_calibration_error(probs, labels, n_bins, norm).item() == pytest.approx(theirs, abs=1e-6)


def test_by_hand():
    probs = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.0, 1.0]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 1])  # gaps: .9 - .5 on two, .6 - 0 on one, 0 on one
    for norm, expected in (("l1", 0.35), ("l2", ((2 * 0.16 + 0.36) / 4) ** 0.5), ("max", 0.6)):
        assert expected_calibration_error(probs, labels, 10, norm).item() == pytest.approx(expected)


def test_mass_bins_hold_equally_many():
    probs, labels = draw(1200)
    order = probs.amax(1).argsort()
    confidence, predicted = probs[order].max(1)
    gaps = (confidence - (predicted == labels[order]).double()).view(12, 100).mean(1)
    ours = expected_calibration_error(probs, labels, 12, strategy="mass").item()
    assert ours == pytest.approx(gaps.abs().mean().item())
    worst = expected_calibration_error(probs, labels, 12, "max", "mass").item()
    assert worst == pytest.approx(gaps.abs().max().item())


def test_mass_bins_keep_ties_together():
    probs = torch.tensor([[0.7, 0.3]]).repeat(10, 1)
    labels = torch.tensor([0] * 7 + [1] * 3)
    for order in (torch.arange(10), torch.arange(9, -1, -1)):
        assert expected_calibration_error(probs, labels[order], 5, strategy="mass").item() == pytest.approx(0, abs=1e-7)
    assert classwise_ece(probs, labels, 5, strategy="mass").item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
def test_chunks_change_nothing(norm, monkeypatch):
    probs, labels = draw(300)
    whole = classwise_ece(probs, labels, norm=norm)
    monkeypatch.setattr("companion.calibration.measuring_calibration.errors._CHUNK", 28)
    assert classwise_ece(probs, labels, norm=norm).item() == pytest.approx(whole.item(), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("turned", [False, True])
def test_top_class_of_many_rows_with_ties(dtype, turned, monkeypatch):
    monkeypatch.setattr("companion.calibration.measuring_calibration.errors._CHUNK", 1000)
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 4, (9_000, 8), generator=generator)  # most rows share their first place
    counts[:, 0] += (counts.sum(1) == 0).long()
    probs = (counts / counts.sum(1, keepdim=True)).to(dtype)
    probs[:3] = torch.tensor([0.5, 0.5, 0, 0, 0, 0, 0, 0], dtype=dtype)
    labels = torch.randint(0, 8, (9_000,), generator=generator)
    labels[:2] = torch.tensor([0, 1])
    given = probs.T.contiguous().T if turned else probs
    before = given.clone()
    confidence, correct = top_class(given, labels)
    first = torch.tensor(np.array([row.index(max(row)) for row in probs.tolist()]))
    assert torch.equal(correct, first == labels)
    assert correct[:2].tolist() == [True, False]
    assert torch.equal(confidence, probs.gather(1, first[:, None]).squeeze(1))
    assert torch.equal(given, before)


def test_many_rows_and_few_give_the_same_and_so_do_gradients():
    probs, labels = draw(9_000, 20, dtype=torch.float32)
    pieces = zip(probs.split(1_000), labels.split(1_000), strict=True)
    whole, parts = top_class(probs, labels), [top_class(p, y) for p, y in pieces]
    assert torch.equal(whole.confidence, torch.cat([part.confidence for part in parts]))
    assert torch.equal(whole.correct, torch.cat([part.correct for part in parts]))
    tracked = probs.clone().requires_grad_()
    error = expected_calibration_error(tracked, labels)
    error.backward()
    assert error.item() == pytest.approx(expected_calibration_error(probs, labels).item(), abs=1e-12)
    assert torch.equal((tracked.grad != 0).sum(1), torch.ones(9_000, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_bins", [3, 15, 100, 1000])
def test_a_confidence_that_rounding_put_above_one_is_in_the_last_bin(n_bins, dtype):
    above = torch.tensor([[1 + 1e-5, 0.0]], dtype=dtype)
    assert expected_calibration_error(above, [0], n_bins).item() == pytest.approx(1e-5, rel=1e-2)
    assert classwise_ece(above, [0], n_bins).item() == pytest.approx(5e-6, rel=1e-2)


def test_certain_and_right_is_zero_certain_and_wrong_is_one():
    probs = torch.eye(3)
    assert expected_calibration_error(probs, [0, 1, 2]).item() == 0
    assert expected_calibration_error(probs, [1, 2, 0]).item() == 1
    assert classwise_ece(probs, [0, 1, 2]).item() == 0


def test_float32_sums_do_not_drift():
    probs = torch.tensor([[0.7, 0.3]]).repeat(200_000, 1)
    labels = (torch.arange(200_000) % 10 >= 7).long()
    assert expected_calibration_error(probs, labels).item() == pytest.approx(0, abs=1e-6)


def test_gradient_lowers_overconfidence():
    logits = torch.tensor([[2.0, 0.0]], dtype=torch.float64).repeat(4, 1).requires_grad_()
    expected_calibration_error(logits.softmax(1), [0, 0, 1, 1]).backward()
    assert bool((logits.grad[:, 0] > 0).all())


@pytest.mark.parametrize("metric", [expected_calibration_error, classwise_ece])
class TestInput:
    def test_kinds(self, metric):
        probs, labels = draw(50)
        expected = metric(probs, labels).item()
        assert metric(probs.numpy(), labels.numpy()).item() == pytest.approx(expected)
        assert metric(probs.tolist(), labels.tolist()).item() == pytest.approx(expected, abs=1e-6)

    def test_half_precision(self, metric):
        probs, labels = draw(400)
        assert metric(probs.half(), labels).item() == pytest.approx(metric(probs, labels).item(), abs=0.02)

    @pytest.mark.parametrize(
        ("wrong", "match"),
        [
            ({"probs": torch.randn(50, 4)}, "looks like logits"),
            ({"labels": torch.full((50,), 4)}, "0..3"),
            ({"labels": torch.zeros(49, dtype=torch.long)}, "one per sample"),
            ({"n_bins": 0}, "n_bins"),
            ({"norm": "l3"}, "norm"),
            ({"strategy": "no"}, "strategy"),
        ],
    )
    def test_bad_input(self, metric, wrong, match):
        probs, labels = draw(50)
        with pytest.raises(ValueError, match=match):
            metric(**{"probs": probs, "labels": labels, **wrong})

    def test_swapped(self, metric):
        probs, labels = draw(50)
        with pytest.raises((TypeError, ValueError), match="labels"):
            metric(labels, probs)

    def test_devices_agree(self, metric, device):
        probs, labels = draw(200)
        there = metric(probs.to(device), labels.to(device))
        assert there.device.type == device.type
        assert there.item() == pytest.approx(metric(probs, labels).item(), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_average_of_sure_models_may_be_rounded_to_above_one(dtype):
    probs = sum(0.1 * torch.tensor([[1.0, 0.0], [0.6, 0.4]]) for _ in range(10)).repeat(20, 1)
    probs[0, 0] = 1 + torch.finfo(dtype).eps
    probs, labels = probs.to(dtype), torch.zeros(40, dtype=torch.int64)
    assert probs.max() > 1
    confidence, correct = top_class(probs, labels)
    expected = expected_calibration_error(probs, labels)
    assert binary_calibration_error(confidence, correct) == expected
    assert 0 < ece_noise_floor(probs) < 0.2
    assert ece_noise_floor(confidence) == ece_noise_floor(probs)
    curve = reliability_curve(probs, labels)
    assert abs(curve.ece - expected) < 2 * torch.finfo(dtype).eps
    assert curve.confidence.max() <= 1
    with pytest.raises(ValueError, match="looks like logits"):
        binary_calibration_error(1.1 * confidence, correct)
