"""Streaming moments and shrinkage against two-pass float64, scikit-learn, and two processes."""

import copy
import math
import pickle

import numpy as np
import pytest
import sklearn.covariance
import torch
from torchmetrics import MetricCollection

from companion.statistics import ClassMoments, Moments, ledoit_wolf, oas, shrunk_covariance
from tests.largest import Largest
from tests.processes import run_two

KINDS = ["full", "diagonal", "pooled", None]


def draw(n=700, d=5, classes=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix
    y = torch.randint(classes, (n,), generator=generator)
    return (x + 3 * y[:, None]).to(dtype), y


def two_pass(x, y, kind, classes=4, correction=0):
    x = x.double()
    means = torch.stack([x[y == c].mean(0) for c in range(classes)])
    covariances = torch.stack([x[y == c].T.cov(correction=correction) for c in range(classes)])
    centered = x - means[y]
    return means, {
        "full": covariances,
        "diagonal": covariances.diagonal(dim1=1, dim2=2),
        "pooled": centered.T @ centered / (len(x) - correction * classes),
        None: None,
    }[kind]


@pytest.mark.parametrize("kind", ["full", "diagonal", None])
@pytest.mark.parametrize("correction", [0, 1])
def test_moments_equal_two_passes(device, kind, correction):
    x, _ = draw()
    moments = Moments(5, kind, correction=correction).to(device)
    for batch in x.to(device).split([1, 100, 599]):
        moments.update(batch)
    mean, covariance, counts = moments.compute()
    torch.testing.assert_close(mean.cpu(), x.mean(0), rtol=1e-12, atol=1e-12)
    expected = x.T.cov(correction=correction)
    if kind == "full":
        torch.testing.assert_close(covariance.cpu(), expected, rtol=1e-12, atol=1e-12)
    elif kind == "diagonal":
        torch.testing.assert_close(covariance.cpu(), expected.diagonal(), rtol=1e-12, atol=1e-12)
    else:
        assert covariance is None
    assert counts == 700
    assert mean.device.type == device.type


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("correction", [0, 1])
def test_class_moments_equal_two_passes(device, kind, correction):
    x, y = draw()
    moments = ClassMoments(4, 5, kind, correction=correction).to(device)
    for rows, labels in zip(x.to(device).split(90), y.to(device).split(90), strict=True):
        moments.update(rows, labels)
    means, covariance = two_pass(x, y, kind, correction=correction)
    found = moments.compute()
    torch.testing.assert_close(found.mean.cpu(), means, rtol=1e-12, atol=1e-12)
    assert torch.equal(found.counts.cpu(), y.bincount())
    if kind is None:
        assert found.covariance is None
    else:
        torch.testing.assert_close(found.covariance.cpu(), covariance, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", ["full", "diagonal", "pooled"])
def test_as_many_classes_as_dimensions(device, kind):
    """(C, d) and (d, d) are one shape then: the kind decides, in the batch and in the merge."""
    g = torch.Generator().manual_seed(3)
    y = torch.arange(300) % 4
    x = 3 * y[:, None] + torch.randn(300, 4, generator=g, dtype=torch.float64).cumsum(1)
    moments = ClassMoments(4, 4, kind).to(device)
    for rows, labels in zip(x.to(device).split(70), y.to(device).split(70), strict=True):
        moments.update(rows, labels)
    _, covariance = two_pass(x, y, kind, classes=4)
    torch.testing.assert_close(moments.compute().covariance.cpu(), covariance, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("accumulators", [torch.float32, torch.float64])
def test_far_from_zero_in_float32(device, accumulators):
    """Mean 1e4 and variance 1: E[x^2] - E[x]^2 in float32 would be off by units."""
    x = 1e4 + torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0))
    y = torch.arange(20_000) % 2
    exact = x.double().T.cov(correction=0)
    moments = Moments(3, dtype=accumulators).to(device)
    classes = ClassMoments(2, 3, "pooled", dtype=accumulators).to(device)
    for rows, labels in zip(x.to(device).split(64), y.to(device).split(64), strict=True):
        moments.update(rows)
        classes.update(rows, labels)
    tolerance = 1e-6 if accumulators == torch.float64 else 1e-4
    torch.testing.assert_close(moments.compute().covariance.cpu().double(), exact, rtol=0, atol=tolerance)
    _, pooled = two_pass(x, y, "pooled", classes=2)
    torch.testing.assert_close(classes.compute().covariance.cpu().double(), pooled, rtol=0, atol=tolerance)
    naive = (x.square().mean(0) - x.mean(0).square()).double()
    assert (naive - exact.diagonal()).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_batches_and_order_do_not_matter(device, kind):
    x, y = (t.to(device) for t in draw())
    results = []
    for seed, size in [(0, 700), (1, 1), (2, 33), (3, 256)]:
        order = torch.randperm(700, generator=torch.Generator().manual_seed(seed)).to(device)
        moments = ClassMoments(4, 5, kind).to(device)
        for rows, labels in zip(x[order].split(size), y[order].split(size), strict=True):
            moments.update(rows, labels)
        results.append(moments.compute())
    for other in results[1:]:
        torch.testing.assert_close(other.mean, results[0].mean, rtol=1e-12, atol=1e-12)
        assert torch.equal(other.counts, results[0].counts)
        if kind is not None:
            torch.testing.assert_close(other.covariance, results[0].covariance, rtol=1e-11, atol=1e-11)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("kind", KINDS)
def test_states_merge(kind):
    x, y = draw()
    whole, left, right, empty = (ClassMoments(4, 5, kind) for _ in range(4))
    whole.update(x, y)
    left.update(x[:100], y[:100])
    right.update(x[100:], y[100:])
    left.merge_state(right)
    left.merge_state(empty)
    empty.merge_state(left)
    for merged in (left, empty):
        for ours, theirs in zip(merged.compute(), whole.compute(), strict=True):
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_forward_returns_the_batch_and_accumulates():
    x, _ = draw()
    moments = Moments(5)
    first, second = moments(x[:300]), moments(x[300:])
    torch.testing.assert_close(first.mean, x[:300].mean(0))
    torch.testing.assert_close(second.mean, x[300:].mean(0))
    torch.testing.assert_close(moments.compute().covariance, x.T.cov(correction=0), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_metric_manners():
    x, _ = draw()
    moments = Moments(5)
    moments.update(x[:300])
    kept = moments.metric_state["state"].clone()
    handed_out = moments.metric_state["state"]
    twin, packed = copy.deepcopy(moments), pickle.loads(pickle.dumps(moments))
    moments.update(x[300:])
    assert torch.equal(handed_out, kept)
    for other in (twin, packed):
        other.update(x[300:])
        assert torch.equal(other.compute().covariance, moments.compute().covariance)
    moments.reset()
    with pytest.raises(ValueError, match="more than 0 sample"):
        moments.compute()
    moments.update(x[:300])
    torch.testing.assert_close(moments.compute().mean, x[:300].mean(0))
    both = MetricCollection({"full": Moments(5), "mean": Moments(5, None)})
    both.update(x)
    torch.testing.assert_close(both.compute()["mean"].mean, x.mean(0))


WORKER = """
from companion.statistics import ClassMoments, Moments
data = torch.load(f"{folder}/data.pt", weights_only=True)
x, y = data["x"], data["y"]
mine = slice(0, 123) if rank == 0 else slice(123, None)  # uneven, and class 3 only in the second process
out = {}
for kind in ("full", "diagonal", "pooled"):
    metric = ClassMoments(4, 5, kind)
    metric.update(x[mine], y[mine])
    result = metric.compute()
    out[kind] = [result.mean, result.covariance, result.counts]
metric = Moments(5)
if rank == 1:  # the first process never sees a sample
    metric.update(x)
out["one-sided"] = list(metric.compute())
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.filterwarnings("ignore")
def test_two_processes_give_the_answer_of_one(tmp_path):
    x, y = draw()
    y = y.sort().values
    torch.save({"x": x, "y": y}, tmp_path / "data.pt")
    for path in run_two(WORKER, tmp_path):
        out = torch.load(path, weights_only=True)
        for kind in ("full", "diagonal", "pooled"):
            alone = ClassMoments(4, 5, kind)
            alone.update(x, y)
            for ours, theirs in zip(out[kind], alone.compute(), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(out["one-sided"][1], x.T.cov(correction=0), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["full", "diagonal", "pooled"])
def test_wide_features_in_blocks(device, dtype, kind):
    """More rows than a block, more columns than a piece; classes lie far apart and come one after the other."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(1200) // 400
    x = torch.randn(1200, 270, generator=g, dtype=torch.float64) + torch.tensor([0.0, 50.0, -300.0])[y][:, None]
    x = x.to(dtype)
    strided = torch.zeros(1200, 540, dtype=dtype)
    strided[:, ::2] = x
    moments = ClassMoments(4, 270, kind).to(device)
    moments.update(strided[:, ::2].to(device), y)
    found = moments.compute()
    means, covariance = two_pass(x, y, kind, classes=3)
    torch.testing.assert_close(found.mean.cpu()[:3], means, rtol=1e-12, atol=1e-12)
    ours = found.covariance.cpu()
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(ours if kind == "pooled" else ours[:3], covariance, rtol=tolerance, atol=tolerance)


def test_an_update_takes_little_memory_beside_its_rows(device):
    x = torch.randn(60_000, 64, generator=torch.Generator().manual_seed(0)).to(device)
    with Largest() as largest:
        moments = ClassMoments(3, 64, "pooled").to(device)
        moments.update(x, torch.arange(60_000, device=device) % 3)
        ledoit_wolf(x)
    assert largest.bytes <= 5 * 2**20  # in float64 the rows are 31 MB


def test_missing_and_single_classes_are_not_a_number():
    moments = ClassMoments(3, 2, correction=1)
    moments.update([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]], [0, 0, 2])
    mean, covariance, counts = moments.compute()
    assert counts.tolist() == [2, 0, 1]
    assert mean[1].isnan().all()
    assert mean[2].tolist() == [9, 9]
    assert covariance[0].tolist() == [[2, 2], [2, 2]]
    assert covariance[1:].isnan().all()


@pytest.mark.parametrize("estimator", [(ledoit_wolf, sklearn.covariance.ledoit_wolf), (oas, sklearn.covariance.oas)])
@pytest.mark.parametrize("shape", [(60, 5), (20, 40), (200, 40), (2, 3), (30, 1), (9000, 3)])
@pytest.mark.parametrize("assume_centered", [False, True])
def test_shrinkage_equals_scikit_learn(device, estimator, shape, assume_centered):
    ours, theirs = estimator
    x, _ = draw(*shape)
    covariance, shrinkage = ours(x.to(device), assume_centered=assume_centered)
    expected, expected_shrinkage = theirs(x.numpy(), assume_centered=assume_centered)
    np.testing.assert_allclose(covariance.cpu().numpy(), expected, rtol=1e-9, atol=1e-9)
    assert shrinkage.item() == pytest.approx(float(expected_shrinkage), abs=1e-9)
    assert covariance.device.type == device.type


@pytest.mark.parametrize("estimator", [ledoit_wolf, oas])
def test_shrinkage_keeps_dtype_trace_and_rotation(device, estimator):
    x, _ = draw(40, 8)
    covariance, shrinkage = estimator(x.to(device))
    rotation = torch.linalg.qr(draw(8, 8, seed=1)[0]).Q.to(device)
    turned = estimator(x.to(device) @ rotation + 5)
    assert turned.shrinkage.item() == pytest.approx(shrinkage.item(), abs=1e-9)
    torch.testing.assert_close(turned.covariance, rotation.T @ covariance @ rotation, rtol=1e-9, atol=1e-9)
    assert covariance.trace().item() == pytest.approx(x.T.cov(correction=0).trace().item())
    far = estimator(x.float().to(device) + 1e4)
    assert far.covariance.dtype == torch.float32
    torch.testing.assert_close(far.covariance.double(), covariance, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("estimator", [ledoit_wolf, oas])
def test_shrinkage_limits(estimator):
    generator = torch.Generator().manual_seed(0)
    isotropic = estimator(torch.randn(50, 30, generator=generator, dtype=torch.float64))
    assert isotropic.shrinkage > 0.7
    stretched = estimator(torch.randn(20_000, 4, generator=generator) * torch.tensor([1.0, 3.0, 9.0, 27.0]))
    assert stretched.shrinkage < 0.01
    assert (estimator(torch.ones(5, 3)).covariance == 0).all()
    assert torch.linalg.cholesky(estimator(draw(10, 30)[0]).covariance).isfinite().all()


def test_shrinkage_is_differentiable():
    x, _ = draw(12, 3)
    assert torch.autograd.gradcheck(lambda v: tuple(ledoit_wolf(v)), x.requires_grad_())
    assert torch.autograd.gradcheck(lambda v: tuple(oas(v)), x)


def test_shrunk_covariance():
    x, _ = draw()
    empirical = x.T.cov(correction=0)
    for s in (0, 0.3, 1):
        np.testing.assert_allclose(
            shrunk_covariance(empirical, s), sklearn.covariance.shrunk_covariance(empirical.numpy(), s), atol=1e-12
        )
    many = torch.stack([empirical, 2 * empirical])
    torch.testing.assert_close(shrunk_covariance(many, 0.2)[1], 2 * shrunk_covariance(empirical, 0.2))


def test_bad_input():
    moments, classes = Moments(3), ClassMoments(2, 3)
    for metric, arguments, says in [
        (moments, (torch.zeros(4, 2),), "3 features, got shape"),
        (moments, (torch.full((4, 3), math.nan),), "finite"),
        (moments, (torch.zeros(3),), r"shape \(n, d\)"),
        (moments, (torch.zeros(0, 3),), "at least 1 sample"),
        (classes, (torch.zeros(2, 3), [0, 2]), r"in 0\.\.1"),
        (classes, (torch.zeros(2, 3), [0]), "expected 2 labels"),
    ]:
        with pytest.raises(ValueError, match=says):
            metric.update(*arguments)
    with pytest.raises(ValueError, match="at least 1 sample before"), pytest.warns(UserWarning, match="before"):
        ClassMoments(2, 3).compute()
    with pytest.raises(ValueError, match="one of"):
        Moments(3, "pooled")
    with pytest.raises(ValueError, match="float64"):
        Moments(3, dtype=torch.float16)
    with pytest.raises(TypeError, match="dim"):
        Moments(3.0)
    for estimator in (ledoit_wolf, oas):
        with pytest.raises(ValueError, match="at least 2 sample"):
            estimator(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"\(\.\.\., d, d\)"):
        shrunk_covariance(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="shrinkage in"):
        shrunk_covariance(torch.eye(2), 1.5)
