"""Gaussian mixtures: posterior, density and Bayes risk against closed forms and torch.distributions."""

import math

import pytest
import torch
from torch import distributions

from companion.data import GaussianMixture


def _gen(seed=0):
    return torch.Generator().manual_seed(seed)


def _three():
    covariances = torch.tensor([[[1.0, 0.3], [0.3, 2.0]], [[0.5, 0.0], [0.0, 0.5]], [[3.0, -1.0], [-1.0, 1.0]]])
    return GaussianMixture([[0, 0], [3, 1], [-2, 2]], covariances, [0.5, 0.3, 0.2])


def test_density_agrees_with_torch_distributions():
    task = _three()
    x, _ = task.sample(200, _gen())
    parts = distributions.MultivariateNormal(task.means, task.covariances)
    reference = distributions.MixtureSameFamily(distributions.Categorical(task.weights), parts)
    assert torch.allclose(task.log_prob(x), reference.log_prob(x.double()), atol=1e-10)


def test_density_integrates_to_one():
    axis = torch.linspace(-15, 15, 400, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    cell = float(axis[1] - axis[0]) ** 2
    assert float(_three().log_prob(grid).exp().sum() * cell) == pytest.approx(1, abs=1e-6)


def test_posterior_of_two_equal_gaussians_is_a_sigmoid():
    task = GaussianMixture([[-1.0], [1.0]], 2.0, [0.25, 0.75])
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    # log odds: (x - m0)^2 / 2v - (x - m1)^2 / 2v + log(w1 / w0) = 2 x / v + log 3
    assert torch.allclose(task.posterior(x[:, None])[:, 1], (x + math.log(3)).sigmoid(), atol=1e-12)


def test_posterior_sums_modes_and_survives_far_points():
    task = GaussianMixture([[0.0], [4.0], [8.0]], labels=[0, 1, 0])
    assert task.n_classes == 2
    assert task.posterior([[8.0], [4.0]]).argmax(1).tolist() == [0, 1]
    far = task.posterior([[1e4]])
    assert far.isfinite().all()
    assert float(far.sum()) == pytest.approx(1)


def test_samples_have_the_moments_and_are_calibrated():
    task = _three()
    x, y = task.sample(200_000, _gen())
    for c in range(3):
        own = x[y == c].double()
        assert len(own) / len(x) == pytest.approx(float(task.weights[c]), abs=0.005)
        assert torch.allclose(own.mean(0), task.means[c], atol=0.03)
        assert torch.allclose(torch.cov(own.T), task.covariances[c], atol=0.05)
    p = task.posterior(x)[:, 0]
    sure = (p > 0.7) & (p < 0.8)
    assert float((y[sure] == 0).double().mean()) == pytest.approx(float(p[sure].mean()), abs=0.02)


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.2, 0.8], [0.95, 0.05]])
def test_closed_form_risk_equals_the_error_of_the_bayes_rule(weights):
    covariance = [[2.0, 0.5], [0.5, 1.0]]
    task = GaussianMixture([[0, 0], [1.5, 1]], covariance, weights)
    risk, error = task.bayes_risk()
    assert error == 0
    x, y = task.sample(400_000, _gen())
    wrong = (task.posterior(x).argmax(1) != y).double()
    assert float(wrong.mean()) == pytest.approx(risk, abs=4 * math.sqrt(risk * (1 - risk) / len(x)))


def test_closed_form_risk_of_two_balanced_classes():
    task = GaussianMixture([[0.0, 0.0], [3.0, 4.0]], 4.0)
    assert task.bayes_risk().risk == pytest.approx(0.5 * math.erfc(2.5 / 2 / math.sqrt(2)), abs=1e-12)
    assert GaussianMixture([[1.0], [1.0]], 1.0, [0.3, 0.7]).bayes_risk().risk == pytest.approx(0.3)
    assert GaussianMixture([[1.0], [3.0]], labels=[0, 0]).bayes_risk() == (0.0, 0.0)


def test_closed_form_uses_each_class_own_weight():
    forwards = GaussianMixture([[0.0], [2.0]], 1.0, [0.1, 0.9]).bayes_risk().risk
    assert GaussianMixture([[0.0], [2.0]], 1.0, [0.1, 0.9], labels=[1, 0]).bayes_risk().risk == pytest.approx(forwards)


def test_monte_carlo_risk_covers_the_closed_form():
    closed = GaussianMixture([[-1.0], [1.0]]).bayes_risk().risk
    # the same task with one class cut into two identical components has no closed form
    split = GaussianMixture([[-1.0], [1.0], [1.0]], 1.0, [2, 1, 1], labels=[0, 1, 1])
    risk, error = split.bayes_risk(50_000, _gen())
    assert 0 < error < 1e-3
    assert abs(risk - closed) < 4 * error


def test_random_mixture():
    task = GaussianMixture.random(4, 3, separation=2.0, variance=0.25, modes=2, generator=_gen())
    assert (task.n_classes, task.dim, len(task.means)) == (4, 3, 8)
    assert task.sample(5, _gen())[0].shape == (5, 3)


def test_the_callers_tensors_are_not_shared():
    means = torch.zeros(2, 2, dtype=torch.float64)
    task = GaussianMixture(means)
    means += 5
    assert torch.equal(task.means, torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"means": [1.0, 2.0]}, "means of shape"),
        ({"means": [[float("nan")]]}, "finite means"),
        ({"means": [[0.0, 0], [1, 1]], "covariance": [[1.0, 2], [2, 1]]}, "positive definite"),
        ({"means": [[0.0, 0], [1, 1]], "covariance": [1.0, 1, 1]}, "covariance"),
        ({"means": [[0.0], [1]], "weights": [1.0, -1]}, "positive weights"),
        ({"means": [[0.0], [1]], "labels": [0, 2]}, "cover"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(**arguments)


def test_points_of_another_dimension_are_refused():
    with pytest.raises(ValueError, match=r"\(n, 2\)"):
        GaussianMixture([[0.0, 0], [1, 1]]).posterior([[1.0]])
