"""Gaussians on features: closed forms, identities, other implementations, scikit-learn's contract, bad input."""

import copy
import math
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.base import clone
from sklearn.covariance import OAS, EmpiricalCovariance, LedoitWolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.exceptions import NotFittedError
from sklearn.mixture import GaussianMixture as SklearnMixture
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from companion import statistics
from companion.anomaly import (
    FrozenFeatures,
    HierarchicalGMM,
    LayerSum,
    LinearProbe,
    MahalanobisOOD,
    MixturePrototypes,
    MomentProbe,
    MVGDetector,
    PooledNaiveBayes,
    aggregate_mahalanobis,
    cross_covariance,
    excess_error_curve,
    few_shot_accuracy,
    mahalanobis,
    mixture_prototype_loss,
    oriented_noise,
    retrieval_map,
    samples_to_excess,
    sharpen_input,
    texture_backbone,
    tied_covariance,
    two_regimes_crossing,
    variance_ranked_auroc,
)
from companion.data import FeatureShards, GaussianMixture, make_textures

ESTIMATORS = [
    MVGDetector(),
    MVGDetector(covariance="oas", components="pca"),
    MahalanobisOOD(),
    MahalanobisOOD(shrinkage=0.1),
    HierarchicalGMM(n_components=2, n_init=1, random_state=0),
    PooledNaiveBayes(),
    PooledNaiveBayes(priors="uniform"),
]


@parametrize_with_checks(ESTIMATORS)
def test_scikit_learn_contract(estimator, check):
    check(estimator)


def stretched(n=400, d=6, seed=0, shift=0.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=g, dtype=torch.float64)
    return (torch.randn(n, d, generator=g, dtype=torch.float64) @ mix + shift).to(dtype)


def classes(n=600, d=8, n_classes=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(n_classes, (n,), generator=g)
    means = 2 * torch.randn(n_classes, d, generator=g, dtype=torch.float64)
    return means[y] + stretched(n, d, seed), y


class TestMahalanobis:
    def test_closed_form_in_one_dimension(self, device):
        x = torch.tensor([[1.0], [4.0]], device=device)
        assert mahalanobis(x, [1.0], [[9.0]]).tolist() == pytest.approx([0.0, 1.0])

    def test_several_means_are_the_single_ones(self, device):
        x, y = classes()
        x, y = x.to(device), y.to(device)
        mean, covariance, _ = tied_covariance(x, y)
        together = mahalanobis(x, mean, covariance)
        for c in range(4):
            torch.testing.assert_close(together[:, c], mahalanobis(x, mean[c], covariance))
            off = x - mean[c]
            torch.testing.assert_close(together[:, c], (off @ torch.linalg.inv(covariance) * off).sum(1))

    def test_a_linear_map_of_the_features_changes_nothing(self):
        x = stretched()
        mean, covariance = x.mean(0), x.T.cov(correction=0)
        a = stretched(6, 6, seed=5)
        moved = mahalanobis(x @ a + 3, mean @ a + 3, a.T @ covariance @ a)
        torch.testing.assert_close(moved, mahalanobis(x, mean, covariance))

    def test_mean_over_the_samples_is_the_dimension(self):
        x = stretched()
        assert float(mahalanobis(x, x.mean(0), x.T.cov(correction=0)).mean()) == pytest.approx(6)

    def test_far_from_zero_in_float32(self):
        x = stretched(shift=0.0)
        near = mahalanobis(x, x.mean(0), x.T.cov(correction=0))
        far = (x + 1000).float()
        found = mahalanobis(far, far.mean(0), far.double().T.cov(correction=0))
        torch.testing.assert_close(found.double(), near, rtol=1e-2, atol=1e-2)

    def test_gradient(self):
        x = stretched(20).requires_grad_()
        mahalanobis(x, torch.zeros(6), torch.eye(6)).sum().backward()
        torch.testing.assert_close(x.grad, 2 * x.detach())

    def test_bad_input(self):
        with pytest.raises(ValueError, match="full rank"):
            mahalanobis([[1.0, 2.0]], [0.0, 0.0], [[1.0, 1.0], [1.0, 1.0]])
        with pytest.raises(ValueError, match=r"expected mean \(2,\)"):
            mahalanobis([[1.0, 2.0]], [0.0], [[1.0, 0.0], [0.0, 1.0]])


class TestMVG:
    @pytest.mark.parametrize(
        ("name", "other"), [("ledoit_wolf", LedoitWolf()), ("oas", OAS()), ("empirical", EmpiricalCovariance())]
    )
    def test_equals_scikit_learn(self, name, other):
        x, new = stretched(60).numpy(), stretched(50, seed=0).numpy() + 0.5
        detector = MVGDetector(covariance=name).fit(x)
        np.testing.assert_allclose(detector.score_samples(new), -other.fit(x).mahalanobis(new), rtol=1e-9)
        np.testing.assert_allclose(detector.covariance_, other.covariance_, rtol=1e-9, atol=1e-12)
        assert detector.shrinkage_ == pytest.approx(getattr(other, "shrinkage_", 0.0), rel=1e-9)

    @pytest.mark.parametrize("name", ["ledoit_wolf", "oas", "empirical"])
    @pytest.mark.parametrize("shift", [0.0, 300.0])
    def test_batches_do_not_matter(self, device, name, shift):
        x = stretched(1000, shift=shift).to(device)
        whole, batched = MVGDetector(covariance=name).fit(x), MVGDetector(covariance=name)
        for rows in x.split(170):
            batched.partial_fit(rows)
        torch.testing.assert_close(batched.score_samples(x), whole.score_samples(x), rtol=1e-7, atol=1e-7)
        assert batched.n_samples_seen_ == 1000
        if name == "ledoit_wolf":
            assert whole.shrinkage_ == pytest.approx(float(statistics.ledoit_wolf(x).shrinkage), rel=1e-7)

    def test_batches_that_drift(self):
        """The anchor of the first batch is far from the mean of all: the sums around it still give the shrinkage."""
        x = stretched(900) + torch.linspace(0, 20, 900).double()[:, None]
        batched = MVGDetector()
        for rows in x.split(100):
            batched.partial_fit(rows)
        assert batched.shrinkage_ == pytest.approx(float(statistics.ledoit_wolf(x).shrinkage), rel=1e-8)

    @pytest.mark.parametrize("variance", [0.5, 0.9, 0.99])
    def test_leading_and_other_components_add_up(self, variance):
        x, new = stretched(100), stretched(40, seed=0) * 2
        parts = [MVGDetector(components=c, variance=variance).fit(x) for c in ("pca", "npca")]
        total = sum(part.score_samples(new) for part in parts)
        torch.testing.assert_close(total, MVGDetector().fit(x).score_samples(new))
        assert sum(part.n_components_ for part in parts) == 6
        shares = torch.linalg.eigvalsh(x.T.cov(correction=0)).flip(0)
        k = parts[0].n_components_
        assert shares[:k].sum() >= variance * shares.sum()
        assert k == 1 or shares[: k - 1].sum() < variance * shares.sum()

    def test_normal_samples_follow_the_law(self):
        """With exact moments the squared distances are chi-square; with estimated ones, Hotelling's F."""
        g = torch.Generator().manual_seed(1)
        d, n, alarms = 20, 60, {"chi2": [], "hotelling": []}
        for _ in range(60):
            train, new = (torch.randn(k, d, generator=g, dtype=torch.float64) for k in (n, 500))
            detector = MVGDetector(covariance="empirical").fit(train)
            scores = detector.score_samples(new)
            for law, shares in alarms.items():
                shares.append(float((scores < detector.threshold(0.05, law)).double().mean()))
        assert np.mean(alarms["hotelling"]) == pytest.approx(0.05, abs=0.01)
        assert np.mean(alarms["chi2"]) > 0.3
        many = MVGDetector(covariance="empirical").fit(torch.randn(20_000, d, generator=g))
        share = (many.predict(torch.randn(20_000, d, generator=g)) == -1).mean()
        assert share == pytest.approx(0.05, abs=0.008)
        assert many.threshold(0.05) == pytest.approx(-stats.chi2.ppf(0.95, d))
        assert many.threshold(0.05, "hotelling") == pytest.approx(many.threshold(0.05), rel=0.01)

    def test_linear_maps_change_nothing_without_shrinkage(self):
        x, a = stretched(), stretched(6, 6, seed=9)
        plain = MVGDetector(covariance="empirical")
        torch.testing.assert_close(
            clone(plain).fit(x @ a + 7).score_samples(x @ a + 7), plain.fit(x).score_samples(x), rtol=1e-8, atol=1e-8
        )

    def test_signs(self):
        x = stretched()
        detector = MVGDetector().fit(x)
        far = x.mean(0)[None] + 1000
        assert detector.score_samples(far) < detector.score_samples(x).min()
        assert detector.predict(far).tolist() == [-1]
        assert detector.decision_function(x.mean(0)[None]) > 0

    def test_kinds(self, device):
        x = stretched(dtype=torch.float32).to(device)
        detector = MVGDetector().fit(x)
        scores = detector.score_samples(x)
        assert isinstance(scores, torch.Tensor)
        assert scores.device.type == device.type
        assert scores.dtype == torch.float32
        array = x.cpu().numpy()
        array.flags.writeable = False
        from_array = MVGDetector(device="cpu").fit(array).score_samples(array)
        assert isinstance(from_array, np.ndarray)
        np.testing.assert_allclose(from_array, scores.cpu(), rtol=1e-4, atol=1e-4)
        restored = pickle.loads(pickle.dumps(detector))  # a file of our own, never one from outside
        torch.testing.assert_close(restored.score_samples(x), scores)
        torch.testing.assert_close(copy.deepcopy(detector).score_samples(x), scores)

    def test_more_features_than_samples(self):
        x = stretched(20, 50)
        assert torch.isfinite(MVGDetector().fit(x).score_samples(x)).all()
        with pytest.raises(ValueError, match="full rank"):
            MVGDetector(covariance="empirical").fit(x)
        with pytest.raises(ValueError, match="do not"):
            MVGDetector(covariance="empirical", components="npca").fit(x)
        with pytest.raises(ValueError, match="more samples than components"):
            MVGDetector().fit(x).threshold(0.05, "hotelling")

    def test_files_larger_than_memory(self, tmp_path):
        """A memory-mapped array is read block by block, and shards go through `partial_fit`."""
        x = stretched(5000, dtype=torch.float32)
        np.save(tmp_path / "0.npy", x[:3000].numpy())
        np.save(tmp_path / "1.npy", x[3000:].numpy())
        detector = MVGDetector()
        for shard in FeatureShards(tmp_path).chunks(700):
            detector.partial_fit(shard)
        mapped = np.load(tmp_path / "0.npy", mmap_mode="r")
        assert MVGDetector().fit(mapped).n_samples_seen_ == 3000
        torch.testing.assert_close(
            detector.score_samples(x), MVGDetector().fit(x).score_samples(x), rtol=1e-3, atol=1e-3
        )

    @pytest.mark.parametrize(
        ("setting", "match"),
        [
            ({"covariance": "mcd"}, "covariance among"),
            ({"components": "ica"}, "components among"),
            ({"variance": 0.0}, "variance"),
            ({"false_alarms": 1.0}, "false_alarms"),
            ({"components": "npca", "variance": 1.0}, "got none"),
        ],
    )
    def test_bad_settings(self, setting, match):
        with pytest.raises(ValueError, match=match):
            MVGDetector(**setting).fit(stretched())

    def test_bad_input(self):
        x = stretched()
        with pytest.raises(NotFittedError):
            MVGDetector().score_samples(x)
        with pytest.raises(ValueError, match="6 features"):
            MVGDetector().fit(x).score_samples(x[:, :5])
        with pytest.raises(ValueError, match="finite"):
            MVGDetector().fit(x.log())
        with pytest.raises(ValueError, match="full rank"):
            MVGDetector().fit(torch.ones(10, 3))
        with pytest.raises(ValueError, match="copies"):
            MVGDetector(components="pca").fit(torch.ones(10, 3))
        with pytest.raises(ValueError, match="law"):
            MVGDetector().fit(x).threshold(0.1, "normal")

    def test_the_thin_direction_gives_a_defect_away(self):
        g = torch.Generator().manual_seed(0)
        scale = torch.tensor([10.0, 1.0, 0.1])
        train, normal, odd = (torch.randn(400, 3, generator=g) * scale for _ in range(3))
        variance, area = variance_ranked_auroc(train, normal, odd + torch.tensor([0.3, 0.3, 0.3]))
        assert variance.tolist() == sorted(variance.tolist(), reverse=True)
        assert area[2] > 0.85
        assert area[:2].max() < 0.6
        with pytest.raises(ValueError, match="3 features"):
            variance_ranked_auroc(train, normal[:, :2], odd)


class TestOOD:
    def test_prediction_is_discriminant_analysis(self):
        x, y = classes()
        counts = y.bincount()
        x, y = (torch.cat([part[y == c][: int(counts.min())] for c in range(4)]) for part in (x, y))
        ours = MahalanobisOOD(shrinkage=0.0).fit(x.numpy(), y.numpy())
        other = LinearDiscriminantAnalysis(solver="lsqr", priors=[0.25] * 4).fit(x, y)
        np.testing.assert_array_equal(ours.predict(x.numpy()), other.predict(x))
        np.testing.assert_allclose(ours.predict_proba(x.numpy()), other.predict_proba(x), atol=1e-6)
        np.testing.assert_allclose(ours.covariance_, other.covariance_, rtol=1e-8)

    def test_score_is_the_smallest_distance(self, device):
        x, y = (part.to(device) for part in classes())
        detector = MahalanobisOOD(shrinkage=0.2).fit(x, y)
        mean, covariance, _ = tied_covariance(x, y)
        every = mahalanobis(x, mean, statistics.shrunk_covariance(covariance, 0.2))
        torch.testing.assert_close(detector.ood_score(x), every.amin(1))
        torch.testing.assert_close(detector.score_samples(x), -every.amin(1))
        assert torch.equal(detector.predict(x), every.argmin(1))

    def test_shrinkage_is_that_of_the_centred_features(self):
        x, y = classes()
        detector = MahalanobisOOD().fit(x, y)
        expected = OAS(assume_centered=True).fit(x - tied_covariance(x, y).mean[y])
        assert detector.shrinkage_ == pytest.approx(expected.shrinkage_, rel=1e-9)
        np.testing.assert_allclose(detector.covariance_, expected.covariance_, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("make", [MahalanobisOOD, PooledNaiveBayes])
    def test_batches_and_classes_that_come_later(self, device, make):
        x, y = classes()
        order = y.argsort(stable=True)  # whole classes come late
        whole, batched = make().fit(x, y), make()
        for rows in order.split(130):
            batched.partial_fit(x[rows].to(device), y[rows])
        torch.testing.assert_close(batched.decision_function(x.to(device)).cpu(), whole.decision_function(x))
        assert batched.classes_.tolist() == [0, 1, 2, 3]
        assert torch.equal(batched.counts_.cpu(), y.bincount())

    def test_a_first_batch_that_is_refused_is_forgotten(self):
        x, y = classes()
        detector = MahalanobisOOD(shrinkage=0.0)
        for few in (1, 2):
            with pytest.raises(ValueError, match=r"at least 2|full rank"):
                detector.partial_fit(x[:few] + 100, y[:few])
        whole = MahalanobisOOD(shrinkage=0.0).fit(x, y)
        torch.testing.assert_close(detector.partial_fit(x, y).ood_score(x), whole.ood_score(x))

    def test_announced_classes_without_samples_are_never_predicted(self):
        x, y = classes()
        known = y < 3
        detector = MahalanobisOOD().partial_fit(x[known], y[known], classes=[0, 1, 2, 3])
        assert detector.predict(x).max() == 2
        torch.testing.assert_close(detector.ood_score(x), MahalanobisOOD().fit(x[known], y[known]).ood_score(x))
        model = PooledNaiveBayes().partial_fit(x[known], y[known], classes=[0, 1, 2, 3])
        assert model.predict(x).max() == 2
        assert torch.isfinite(model.predict_proba(x)).all()

    def test_labels_of_any_kind(self):
        x, y = classes()
        names = np.array(["ant", "bee", "cat", "dog"])[y]
        predicted = MahalanobisOOD().fit(x, names).predict(x)
        assert (predicted == names).mean() == pytest.approx(
            float((MahalanobisOOD().fit(x, y).predict(x) == y).double().mean())
        )
        with pytest.raises(ValueError, match="one label per sample"):
            MahalanobisOOD().fit(x, torch.eye(4)[y])
        with pytest.raises(ValueError, match="one length"):
            MahalanobisOOD().fit(x, y[:-1])
        with pytest.raises(ValueError, match="shrinkage"):
            MahalanobisOOD(shrinkage=2.0).fit(x, y)

    def test_as_many_classes_as_features(self):
        x, y = classes(d=4)
        torch.testing.assert_close(
            MahalanobisOOD(0.0).fit(x, y).covariance_, (x - tied_covariance(x, y).mean[y]).T.cov(correction=0)
        )

    def test_a_step_raises_the_confidence(self):
        x, y = classes()
        detector = MahalanobisOOD().fit(x, y)
        stepped = sharpen_input(x, detector.confidence, 1e-3)
        assert (detector.confidence(stepped) >= detector.confidence(x)).double().mean() > 0.99
        torch.testing.assert_close((stepped - x).abs().max(), torch.tensor(1e-3, dtype=torch.float64))
        assert torch.equal(sharpen_input(x, detector.confidence, 0.0), x)
        assert not stepped.requires_grad
        with pytest.raises(ValueError, match="epsilon"):
            sharpen_input(x, detector.confidence, -1.0)

    def test_layers_are_added_in_units_of_their_own(self):
        g = torch.Generator().manual_seed(0)
        normal, odd = torch.randn(300, 2, generator=g), torch.randn(300, 2, generator=g) - torch.tensor([5.0, 0.0])
        units = torch.tensor([1.0, 1e4])
        plain = LayerSum().fit(normal)
        torch.testing.assert_close(LayerSum().fit(normal * units).score_samples(odd * units), plain.score_samples(odd))
        learned = LayerSum().fit(normal, odd)
        assert learned.weights_[0] > 5 * learned.weights_[1].abs()
        assert learned.score_samples(odd).mean() < learned.score_samples(normal).mean()
        with pytest.raises(ValueError, match="vary"):
            LayerSum().fit(torch.ones(5, 2))
        with pytest.raises(ValueError, match="2 layers"):
            plain.score_samples(torch.zeros(3, 3))


class TestHierarchical:
    def test_one_component_is_one_gaussian_per_class(self):
        x, y = classes()
        mixture = HierarchicalGMM(1, random_state=0).fit(x, y)
        single = MahalanobisOOD().fit(x, y)
        torch.testing.assert_close(2 * mixture.score_samples(x), single.score_samples(x))
        torch.testing.assert_close(mixture.means_[:, 0], single.means_)
        assert torch.equal(mixture.predict(x), single.predict(x))

    def test_likelihood_never_falls(self):
        x, y = classes()
        history = HierarchicalGMM(4, shrinkage=0.0, tol=0.0, n_init=1, random_state=3).fit(x, y).log_likelihood_
        assert len(history) > 3
        assert all(b >= a - 1e-9 for a, b in pairwise(history))

    def test_one_class_is_a_tied_mixture(self):
        """From a good start scikit-learn's tied mixture ends at the same parameters."""
        g = torch.Generator().manual_seed(0)
        modes = torch.tensor([[-6.0, 0.0], [6.0, 0.0], [0.0, 9.0]], dtype=torch.float64)
        x = modes[torch.arange(600) % 3] + torch.randn(600, 2, generator=g, dtype=torch.float64)
        ours = HierarchicalGMM(3, shrinkage=0.0, tol=1e-9, random_state=0).fit(x, np.zeros(600, int))
        other = SklearnMixture(3, covariance_type="tied", means_init=modes.numpy(), reg_covar=0.0, tol=1e-9).fit(x)
        order = torch.cdist(ours.means_[0], torch.from_numpy(other.means_)).argmin(0)
        np.testing.assert_allclose(ours.means_[0][order], other.means_, atol=1e-6)
        np.testing.assert_allclose(ours.covariance_, other.covariances_, atol=1e-6)
        np.testing.assert_allclose(ours.weights_[0][order], other.weights_, atol=1e-7)
        difference = ours.score_samples(x).numpy() - other.score_samples(x)
        assert np.ptp(difference) < 1e-6  # the same up to the constant of the density

    def test_the_hole_between_the_lobes(self):
        g = torch.Generator().manual_seed(0)
        lobes = 8 * torch.eye(3).repeat_interleave(100, 0) + torch.randn(300, 3, generator=g)
        hole = lobes.mean(0)[None]
        y = torch.zeros(300, dtype=torch.int64)
        assert MahalanobisOOD().fit(lobes, y).score_samples(hole) > -0.01
        three = HierarchicalGMM(3, random_state=0).fit(lobes, y)
        assert three.score_samples(hole) < three.score_samples(lobes).min()

    def test_few_samples_and_copies(self):
        x = torch.cat([torch.zeros(1, 2), torch.randn(30, 2, generator=torch.Generator().manual_seed(0)) + 4])
        model = HierarchicalGMM(5, random_state=0).fit(x, [0] + [1] * 30)
        assert torch.isfinite(model.score_samples(x)).all()
        assert model.predict(x)[0] == 0

    def test_aggregation(self, device):
        d = torch.rand(5, 3, 4, device=device, dtype=torch.float64) * 10
        torch.testing.assert_close(aggregate_mahalanobis(d), (-d / 2).exp().mean(2).log())
        torch.testing.assert_close(aggregate_mahalanobis(d, "min"), -d.amin(2) / 2)
        assert (aggregate_mahalanobis(d) <= aggregate_mahalanobis(d, "min")).all()
        weights = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(3, 4)
        torch.testing.assert_close(aggregate_mahalanobis(d, log_weights=weights.log()), -d[..., 0] / 2)
        with pytest.raises(ValueError, match="n, C, K"):
            aggregate_mahalanobis(d[0])
        with pytest.raises(ValueError, match="rule"):
            aggregate_mahalanobis(d, "mean")

    def test_prototypes_and_their_loss(self):
        torch.manual_seed(0)
        head = MixturePrototypes(3, n_classes=2, n_components=4)
        x, y = torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 0, 1])
        distances = head(x)
        torch.testing.assert_close(distances[2, 1, 3], (x[2] - head.prototypes[1, 3]).square().sum())
        logits = (-distances / 2).exp().sum(2).log()
        by_hand = -(logits.log_softmax(1)[torch.arange(6), y]).mean()
        torch.testing.assert_close(mixture_prototype_loss(distances, y, 0.0), by_hand)
        own = distances[torch.arange(6), y].amin(1).mean()
        torch.testing.assert_close(mixture_prototype_loss(distances, y, 2.0), by_hand + own)

    def test_bad_settings(self):
        x, y = classes(60)
        for setting, match in (({"n_components": 0}, "n_components"), ({"rule": "sum"}, "rule"), ({"tol": -1}, "tol")):
            with pytest.raises(ValueError, match=match):
                HierarchicalGMM(**setting).fit(x, y)


class TestNaiveBayes:
    def test_equals_the_textbook(self):
        x, y = classes()
        model = PooledNaiveBayes(var_smoothing=0.0).fit(x, y)
        mean = tied_covariance(x, y).mean
        variance = (x - mean[y]).square().mean(0)
        log_prior = (y.bincount() / len(y)).double().log()
        joint = log_prior - ((x[:, None] - mean).square() / variance).sum(2) / 2
        torch.testing.assert_close(model.predict_proba(x), joint.softmax(1), rtol=1e-5, atol=1e-7)
        linear = x @ model.coef_.T + model.intercept_
        torch.testing.assert_close(linear.softmax(1), joint.softmax(1), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(model.variance_, variance)

    def test_equals_scikit_learn_where_variances_agree(self):
        half = stretched(50, 4)
        x = torch.cat([half, half + torch.tensor([1.0, -1.0, 0.5, 0.0])]).numpy()
        y = np.repeat([0, 1], 50)
        np.testing.assert_allclose(
            PooledNaiveBayes(var_smoothing=0.0).fit(x, y).predict_proba(x),
            GaussianNB(var_smoothing=0.0).fit(x, y).predict_proba(x),
            atol=1e-6,
        )

    def test_uniform_priors(self):
        x, y = classes()
        skewed = torch.cat([(y == 0).nonzero()[:, 0], (y > 0).nonzero()[:60, 0]])
        uniform = PooledNaiveBayes("uniform").fit(x[skewed], y[skewed])
        rows = uniform.means_.mean(0)[None]
        assert uniform.intercept_.exp().numel() == 4
        shift = PooledNaiveBayes().fit(x[skewed], y[skewed]).decision_function(rows) - uniform.decision_function(rows)
        assert shift.argmax() == 0

    def test_one_sample_per_class_is_the_nearest_mean(self):
        x = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
        model = PooledNaiveBayes().fit(x, [0, 1, 2])
        assert model.predict(x + 0.9).tolist() == [0, 1, 2]

    def test_reaches_the_least_error_where_its_assumption_holds(self, generator):
        task = GaussianMixture(torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 0.0]]), covariance=[[1.0, 0.0], [0.0, 0.3]])
        excess = excess_error_curve(PooledNaiveBayes(), task, [10, 3000], n_repeats=3, generator=generator)
        assert excess[0] > excess[1]
        assert abs(excess[1]) < 0.01

    def test_reading_the_curves(self):
        sizes = [10, 100, 1000]
        assert samples_to_excess(sizes, [0.05, 0.02, 0.01], 0.1) == 10
        assert samples_to_excess(sizes, [0.5, 0.4, 0.3], 0.1) == math.inf
        assert samples_to_excess(sizes, [0.4, 0.1, 0.025], 0.05) == pytest.approx(10**2.5)
        assert two_regimes_crossing(sizes, [0.3, 0.2, 0.2], [0.4, 0.3, 0.1]) == 1000
        assert two_regimes_crossing(sizes, [0.3, 0.2, 0.2], [0.2, 0.1, 0.1]) == 10
        assert two_regimes_crossing(sizes, [0.1, 0.1, 0.1], [0.2, 0.05, 0.2]) == math.inf
        with pytest.raises(ValueError, match="one excess per size"):
            samples_to_excess(sizes, [0.1], 0.1)
        with pytest.raises(ValueError, match="one length"):
            two_regimes_crossing(sizes, [0.1], [0.1])
        with pytest.raises(ValueError, match="increasing"):
            excess_error_curve(PooledNaiveBayes(), GaussianMixture([[0.0], [1.0]]), [20, 10])

    def test_bad_settings(self):
        x, y = classes(60)
        with pytest.raises(ValueError, match="priors"):
            PooledNaiveBayes("flat").fit(x, y)
        constant = torch.cat([x, torch.ones(60, 1)], 1)
        with pytest.raises(ValueError, match="var_smoothing"):
            PooledNaiveBayes(var_smoothing=0.0).fit(constant, y)
        assert PooledNaiveBayes().fit(constant, y).predict(constant).shape == (60,)


class Tokens(nn.Module):
    """A stand-in for a transformer: maps in, tokens (n, t, c) from its block, a vector from its head."""

    def __init__(self):
        super().__init__()
        self.block = nn.Conv2d(3, 5, 2, stride=2)
        self.flat = nn.Flatten(2)
        self.turn = nn.Identity()
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(5, 7)

    def forward(self, x):
        return self.head(self.drop(self.turn(self.flat(self.block(x)).transpose(1, 2))).mean(1))


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class TestFrozen:
    images = make_textures(7, "weave", size=16, generator=torch.Generator().manual_seed(0)).images

    @pytest.mark.parametrize(
        ("layer", "width"), [("block", 5), ("turn", 5), ("head", 7), (None, 7), (["block", "head"], 12)]
    )
    def test_any_layer_of_any_model(self, device, layer, width):
        torch.manual_seed(0)
        model = Tokens().train()
        frozen = FrozenFeatures(model, layer, l2=False, batch_size=3, device=str(device))
        out = frozen.fit_transform(self.images)
        assert out.shape == (7, width)
        assert frozen.n_features_out_ == width
        assert not out.requires_grad
        assert model.training, "the model was left in another mode"
        assert not any(m._forward_hooks for m in model.modules()), "a hook stayed"
        torch.testing.assert_close(out, frozen.transform(self.images))  # no dropout
        with torch.no_grad():
            expected = {"block": model.cpu().block(self.images).mean((2, 3)), "head": model.eval()(self.images)}
        if isinstance(layer, str) and layer in expected:
            torch.testing.assert_close(out, expected[layer], rtol=1e-4, atol=1e-5)
        if layer == "turn":
            torch.testing.assert_close(out, expected["block"], rtol=1e-4, atol=1e-5)

    def test_pools(self):
        conv = nn.Conv2d(3, 4, 3)
        maps = conv(self.images).detach()
        read = {
            pool: FrozenFeatures(conv, pool=pool, l2=False).transform(self.images)
            for pool in ("mean", "moments", "flatten")
        }
        torch.testing.assert_close(read["flatten"], maps.flatten(1))
        torch.testing.assert_close(read["mean"], maps.mean((2, 3)))
        torch.testing.assert_close(read["moments"][:, 4:], maps.flatten(2).std(2, correction=0))
        unit = FrozenFeatures(conv).transform(self.images)
        torch.testing.assert_close(unit.norm(dim=1), torch.ones(7))

    def test_scaling(self):
        conv = nn.Conv2d(3, 4, 3)
        mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.1)
        scaled = (self.images - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
        torch.testing.assert_close(
            FrozenFeatures(conv, mean=mean, std=std).transform(self.images), FrozenFeatures(conv).transform(scaled)
        )

    def test_the_shipped_network_and_arrays(self):
        out = FrozenFeatures(l2=False).transform(self.images.numpy())
        assert isinstance(out, np.ndarray)
        expected = torch.cat([m.mean((2, 3)) for m in texture_backbone()(self.images)], 1)
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)

    def test_in_a_pipeline(self):
        pipeline = make_pipeline(FrozenFeatures(), MVGDetector(device="cpu"))
        assert pipeline.fit(self.images).score_samples(self.images).shape == (7,)
        copied = clone(pipeline)
        assert copied.get_params()["frozenfeatures__pool"] == "mean"
        assert FrozenFeatures().set_params(pool="flatten").pool == "flatten"

    def test_bad_input(self):
        with pytest.raises(ValueError, match="layers among"):
            FrozenFeatures(nn.Conv2d(3, 4, 3), "layer9").transform(self.images)
        with pytest.raises(ValueError, match="n, c, h, w"):
            FrozenFeatures().transform(self.images[0])
        with pytest.raises(ValueError, match="pool"):
            FrozenFeatures(pool="max").transform(self.images)
        with pytest.raises(ValueError, match="expected a tensor"):
            FrozenFeatures(Pair()).transform(self.images)

    def test_few_shot_accuracy(self, generator):
        x = torch.cat([torch.randn(50, 5, generator=generator) + 10 * c for c in range(3)])
        y = torch.arange(3).repeat_interleave(50)
        assert (few_shot_accuracy(x, y, 5, generator=generator) == 1).all()
        shuffled = y[torch.randperm(150, generator=generator)]
        assert few_shot_accuracy(x, shuffled, 5, n_splits=8, generator=generator).mean() == pytest.approx(
            1 / 3, abs=0.1
        )
        same = [
            few_shot_accuracy(scale * x + 3, shuffled, 5, generator=torch.Generator().manual_seed(0))
            for scale in (1, 100)
        ]
        torch.testing.assert_close(*same, atol=0.03, rtol=0)
        with pytest.raises(ValueError, match="more than 50"):
            few_shot_accuracy(x, y, 50)

    def test_retrieval_equals_scikit_learn(self, generator):
        from sklearn.metrics import average_precision_score

        x, y = torch.randn(40, 3, generator=generator), torch.randint(3, (40,), generator=generator)
        distances = torch.cdist(x, x)
        each = []
        for i in range(40):
            others = torch.arange(40) != i
            each.append(average_precision_score((y[others] == y[i]).numpy(), -distances[i, others].numpy()))
        assert float(retrieval_map(x, y)) == pytest.approx(np.mean(each), abs=1e-5)


class TestMoments:
    def test_cross_covariance(self, device):
        tokens = torch.randn(3, 50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
        p, q = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
        got = cross_covariance(tokens, p, q)
        for i in range(3):
            torch.testing.assert_close(got[i], p @ tokens[i].T.cov(correction=0) @ q.T)
        torch.testing.assert_close(cross_covariance(tokens + 100, p, q), got)
        with pytest.raises(ValueError, match="tokens"):
            cross_covariance(tokens, p[:, :5], q)

    def test_the_linear_probe_sees_only_the_mean(self):
        tokens = torch.randn(4, 10, 8, generator=torch.Generator().manual_seed(0))
        wide = tokens.mean(1, keepdim=True) + 5 * (tokens - tokens.mean(1, keepdim=True))
        torch.manual_seed(0)
        linear, moments = LinearProbe(8, 3), MomentProbe(8, 3)
        torch.testing.assert_close(linear(wide), linear(tokens), rtol=1e-4, atol=1e-4)
        assert (moments(wide) - moments(tokens)).abs().max() > 0.1
        torch.testing.assert_close(moments.moments(wide), 25 * moments.moments(tokens), rtol=1e-3, atol=1e-3)

    def test_parameter_counts(self):
        def count(probe):
            return sum(p.numel() for p in probe.parameters())

        assert count(LinearProbe(16, 4)) == 68
        assert count(MomentProbe(16, 4, proj=3)) == 68 + 2 * 3 * 16 + 9 * 4 < 3 * 68
        assert count(MomentProbe(16, 4, proj=None)) == 68 + 136 * 4
        assert count(MomentProbe(16, 4, heads=2, proj=3, conv=True)) == 68 + 2 * 96 + 18 * 4 + 2 * 2 * 9 + 2

    @pytest.mark.parametrize("settings", [{}, {"heads": 3, "conv": True}, {"proj": None}, {"root": True}])
    def test_trains(self, device, settings):
        torch.manual_seed(0)
        probe = MomentProbe(8, 3, **settings).to(device)
        tokens = torch.randn(5, 9, 8, device=device)
        probe(tokens).square().sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in probe.parameters())
        assert probe.moments(tokens[:, torch.randperm(9)]).allclose(probe.moments(tokens), atol=1e-5)

    def test_oriented_noise_differs_in_direction_only(self, generator):
        images, labels = oriented_noise(4000, generator=generator)
        for c in range(4):
            part = images[labels == c]
            assert abs(float(part.mean())) < 0.02
            assert float(part.std()) == pytest.approx(1, abs=0.02)
            assert float(part.std(0).std()) < 0.05  # every pixel alike

        def neighbours(part):
            right, down = (part[..., :-1] * part[..., 1:]).mean(), (part[..., :-1, :] * part[..., 1:, :]).mean()
            return float(right - down)

        across = [neighbours(images[labels == c]) for c in range(4)]
        assert across[0] > 0.1
        assert across[2] < -0.1
        assert abs(across[1]) < 0.03
        assert neighbours(oriented_noise(1000, elongation=1.0, generator=generator)[0]) == pytest.approx(0, abs=0.02)

    def test_bad_settings(self):
        for setting in ({"heads": 0}, {"proj": 0}, {"dim": 0}):
            with pytest.raises(ValueError, match=next(iter(setting))):
                MomentProbe(**{"dim": 8, "n_classes": 3, **setting})
        with pytest.raises(ValueError, match="elongation"):
            oriented_noise(4, elongation=0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_in_half_precision(dtype):
    generator = torch.Generator().manual_seed(0)
    x = (300 * torch.randn(200, 6, generator=generator) * torch.tensor([9.0, 3, 1, 1, 0.3, 0.1])).to(dtype)
    y = torch.arange(200) % 2
    for detector in (MVGDetector(), MahalanobisOOD(), PooledNaiveBayes(), HierarchicalGMM(random_state=0)):
        fitted, other = (clone(detector).fit(v, y) for v in (x, x.float()))
        assert torch.equal(torch.as_tensor(fitted.predict(x)), torch.as_tensor(other.predict(x.float())))
        if hasattr(fitted, "score_samples"):
            assert torch.equal(fitted.score_samples(x), other.score_samples(x.float()))
    distances = mahalanobis(x, [0.0] * 6, 300**2 * torch.eye(6))
    assert distances.dtype == dtype
    assert torch.equal(distances, mahalanobis(x.float(), [0.0] * 6, 300**2 * torch.eye(6)).to(dtype))
    assert torch.equal(few_shot_accuracy(x, y, 5, generator=0), few_shot_accuracy(x.float(), y, 5, generator=0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_frozen_features_of_a_network_in_another_precision(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    images = torch.rand(5, 3, 8, 8)
    usual = FrozenFeatures(net).transform(images)
    rows = FrozenFeatures(copy.deepcopy(net).to(dtype)).transform(images)
    assert rows.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(rows.float(), usual, atol=0.05, rtol=0)


@pytest.mark.parametrize(("offset", "atol"), [(1e3, 2e-3), (1e5, 0.1)])
@pytest.mark.parametrize("detector", [PooledNaiveBayes(), MahalanobisOOD(), HierarchicalGMM(random_state=0)], ids=repr)
def test_classifiers_far_from_the_origin(detector, offset, atol):
    x = torch.randn(300, 20, generator=torch.Generator().manual_seed(0))
    y = torch.arange(300) % 3
    x = (x + y[:, None]).double()
    near = clone(detector).fit(x, y).predict_proba(x)
    shifted = (x + offset).float()
    far = clone(detector).fit(shifted, y).predict_proba(shifted)
    torch.testing.assert_close(far.double(), near, atol=atol, rtol=0)


def test_a_seed_does_not_test_on_the_training_samples():
    task = GaussianMixture([[-1.0, 0.0], [1.0, 0.0]])
    seeded = excess_error_curve(PooledNaiveBayes(), task, [5, 50], n_test=50, n_repeats=3, generator=1)
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(
        seeded, excess_error_curve(PooledNaiveBayes(), task, [5, 50], n_test=50, n_repeats=3, generator=generator)
    )
