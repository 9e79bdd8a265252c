"""The industrial detectors: shared contract, closed forms, brute force, bad input."""

import pickle

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.base import clone
from sklearn.covariance import LedoitWolf
from sklearn.exceptions import NotFittedError
from torch import nn

from companion._products import product
from companion.anomaly import (
    CoarseToFine,
    EfficientADDetector,
    FeatureAdaptor,
    FODDetector,
    HookedBackbone,
    I2Correlation,
    PatchDescriptionNetwork,
    PatchGaussian,
    PatchMemory,
    SimpleNetDetector,
    SizeStratifiedRecall,
    SmallUNet,
    TextureNet,
    attention_entropy,
    check_images,
    correlation_loss,
    hard_feature_loss,
    irregular_defects,
    k_center,
    load_backbone,
    local_patch_features,
    make_logic_scenes,
    make_parts,
    quantile_normalise,
    rbf_target,
    texture_backbone,
    truncated_l1_loss,
)
from companion.anomaly.visual_anomalies.backbone import WEIGHTS
from companion.data import make_textures
from tests.largest import Largest

DETECTORS = [
    PatchMemory(coreset=200, random_state=0),
    PatchGaussian(random_state=0),
    SimpleNetDetector(steps=60, random_state=0),
    EfficientADDetector(steps=60, random_state=0),
    FODDetector(steps=10, bank=64, random_state=0),
]


@pytest.fixture(scope="module")
def plates():
    g = torch.Generator().manual_seed(0)
    normal = 0.5 + 0.05 * torch.randn(16, 1, 32, 32, generator=g)
    odd = normal[:6].clone()
    odd[:, :, 10:20, 10:20] = 1
    return normal.clamp(0, 1), odd.clamp(0, 1)


@pytest.fixture(params=DETECTORS, ids=lambda d: type(d).__name__)
def detector(request):
    return clone(request.param)


class TestContract:
    def test_parameters_survive_clone_and_are_stored_untouched(self, detector):
        assert clone(detector).get_params() == detector.get_params()
        assert detector.set_params(batch_size=3).batch_size == 3

    def test_gradients_are_its_own_business(self, detector, plates):
        normal, odd = plates[0].clone().requires_grad_(), plates[1]
        with torch.no_grad():
            within = clone(detector).fit(normal).score_samples(odd)
        torch.testing.assert_close(within, detector.fit(normal).score_samples(odd))
        assert normal.grad is None

    def test_scores_and_maps_point_the_same_way(self, detector, plates):
        normal, odd = plates
        detector.fit(normal[:12])
        scores, maps = detector.score_samples(odd), detector.anomaly_map(odd)
        assert maps.shape == (6, 32, 32)
        torch.testing.assert_close(scores, -maps.amax((1, 2)))
        assert scores.mean() < detector.score_samples(normal[12:]).mean()
        inside = maps[:, 10:20, 10:20].mean()
        assert inside > maps[:, :4].mean()

    def test_arrays_in_arrays_out(self, detector, plates):
        normal, odd = plates
        detector.fit(normal.double().numpy())
        scores = detector.score_samples(odd.double().numpy())
        assert isinstance(scores, np.ndarray)
        np.testing.assert_allclose(scores, detector.score_samples(odd).numpy(), rtol=1e-5)

    def test_not_fitted(self, detector, plates):
        with pytest.raises(NotFittedError):
            detector.score_samples(plates[0])
        with pytest.raises(NotFittedError):
            detector.fit(plates[0]).predict(plates[0])

    def test_refit_forgets_and_input_stays(self, detector, plates):
        normal, odd = plates
        before = normal.clone()
        once = clone(detector).fit(normal).score_samples(odd)
        twice = detector.fit(odd).set_threshold(odd).fit(normal)
        assert not hasattr(twice, "offset_")
        torch.testing.assert_close(twice.score_samples(odd), once)
        assert torch.equal(normal, before)

    def test_batches_do_not_matter(self, detector, plates):
        normal, odd = plates
        detector.fit(normal)
        whole = detector.score_samples(odd)
        torch.testing.assert_close(detector.set_params(batch_size=2).score_samples(odd), whole, rtol=1e-4, atol=1e-4)

    def test_threshold_comes_from_normal_images(self, detector, plates):
        normal, odd = plates
        detector.fit(normal[:8]).set_threshold(normal[8:], false_alarms=0.0)
        assert (detector.predict(normal[8:]) == 1).all()
        assert (detector.predict(odd) == -1).mean() > 0.5

    def test_global_random_state_is_left_alone(self, detector, plates):
        torch.manual_seed(3)
        expected = torch.rand(1)
        torch.manual_seed(3)
        detector.fit(plates[0])
        assert torch.equal(torch.rand(1), expected)

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (torch.zeros(3, 32, 32), "shape"),
            (torch.zeros(1, 1, 32, 32), "at least 2"),
            (torch.full((3, 1, 32, 32), 2.0), r"\[0, 1\]"),
            (torch.full((3, 1, 32, 32), torch.nan), "finite"),
            (torch.zeros(3, 1, 32, 32, dtype=torch.uint8), "divide by 255"),
        ],
    )
    def test_bad_images(self, detector, images, message):
        with pytest.raises(ValueError, match=message):
            detector.fit(images)

    def test_channels_must_match(self, detector, plates):
        detector.fit(plates[0])
        with pytest.raises(ValueError, match="channels"):
            detector.score_samples(torch.zeros(1, 3, 32, 32))

    def test_device_agrees_with_cpu(self, detector, plates, device):
        here = clone(detector).set_params(device="cpu").fit(plates[0]).score_samples(plates[1])
        there = detector.set_params(device=str(device)).fit(plates[0]).score_samples(plates[1])
        torch.testing.assert_close(there, here, rtol=5e-2, atol=5e-2)

    def test_pickles(self, detector, plates):
        detector.fit(plates[0])
        copy = pickle.loads(pickle.dumps(detector))
        torch.testing.assert_close(copy.score_samples(plates[1]), detector.score_samples(plates[1]))


class TestBackbone:
    def test_weights_are_small_and_loaded(self):
        assert WEIGHTS.stat().st_size < 1_000_000
        net, fresh = texture_backbone(), TextureNet(seed=0)
        assert not torch.equal(net.stages[0][0].weight, fresh.stages[0][0].weight)
        assert not any(p.requires_grad for p in net.parameters())

    @pytest.mark.parametrize("n", [0, 1, 8, 21])
    def test_an_image_does_not_depend_on_those_beside_it(self, device, n):
        x = torch.rand(n, 3, 32, 48, generator=torch.Generator().manual_seed(0)).to(device)
        net = TextureNet(layers=(1, 3), seed=0).to(device)
        near, far = net(x)
        assert near.shape == (n, 32, 16, 24)
        assert far.shape == (n, 48, 4, 6)
        for maps, stage in ((near, 0), (far, 2)):
            for image, one in zip(x, maps):
                torch.testing.assert_close(net.maps(image[None])[stage][0], one, rtol=1e-4, atol=1e-5)

    def test_blocks_leave_gradients_as_they_are(self):
        x = torch.rand(11, 3, 16, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
        net = texture_backbone()
        net(x)[1].square().sum().backward()
        (expected,) = torch.autograd.grad(net.maps(x)[2].square().sum(), x)
        torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)

    def test_far_patches_do_not_depend_on_a_change(self):
        a = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
        b = a.clone()
        b[:, :, :8, :8] = 0
        same = (local_patch_features(a) - local_patch_features(b)).abs().amax(-1)[0]
        assert same[:3, :3].max() > 0
        assert same[12:, 12:].max() == 0

    def test_patch_average_against_a_loop(self):
        class Raw(nn.Module):
            def forward(self, x):
                return [x]

        x = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(0))
        got = local_patch_features(x, Raw(), patch=3)[0, :, :, 0]
        for i in range(6):
            for j in range(6):
                block = x[0, 0, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
                assert got[i, j] == pytest.approx(float(block.mean()), abs=1e-6)

    def test_hooks_are_removed_and_tokens_are_laid_out(self):
        class Tokens(nn.Module):
            def forward(self, x):
                return x.flatten(2).transpose(1, 2)  # (n, t, c)

        class WithPrefix(nn.Module):
            def __init__(self):
                super().__init__()
                self.tokens = Tokens()
                self.prefix = nn.Identity()

            def forward(self, x):
                t = self.tokens(x)
                return self.prefix(torch.cat([t[:, :1], t], 1))

        model = WithPrefix()
        backbone = HookedBackbone(model, ["tokens", "prefix"], mean=(0, 0, 0), std=(1, 1, 1))
        x = torch.rand(2, 3, 4, 4)
        first, second = backbone(x)
        assert torch.equal(first, x)
        assert torch.equal(second, x)
        assert not model.tokens._forward_hooks
        assert not backbone.train().training

    def test_any_backbone_runs_in_a_detector(self, plates):
        net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 8, 3, stride=2))
        detector = PatchMemory(HookedBackbone(net, ["1", "2"]), random_state=0).fit(plates[0])
        assert detector.memory_.shape[1] == 12

    def test_errors(self):
        with pytest.raises(ValueError, match="layers"):
            HookedBackbone(nn.Sequential(nn.ReLU()), ["nope"])
        with pytest.raises(ValueError, match="expected 'texture'"):
            load_backbone("resnet")
        with pytest.raises(ValueError, match="odd patch"):
            local_patch_features(torch.zeros(1, 1, 32, 32), patch=2)
        with pytest.raises(TypeError):
            check_images("pictures")

    @pytest.mark.parametrize("library", ["timm", "torchvision"])
    def test_missing_library_is_named(self, library, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, library, None)
        with pytest.raises(ImportError, match=f"pip install {library}"):
            load_backbone(f"{library}:resnet18")


def farthest_points(x, n, start):
    """The definition in float64: a distance to each chosen row, one at a time."""
    x, chosen = x.double().cpu(), [start]
    nearest = torch.full((len(x),), torch.inf, dtype=torch.float64)
    while True:
        nearest = torch.minimum(nearest, (x - x[chosen[-1]]).square().sum(1))
        nearest[chosen[-1]] = -torch.inf
        if len(chosen) == n:
            return chosen
        chosen.append(int(nearest.argmax()))


class TestKCenter:
    def test_against_brute_force(self):
        x = np.random.default_rng(0).normal(size=(200, 5))
        chosen = k_center(x, 20, start=7).tolist()
        distances, expected = cdist(x, x), [7]
        while len(expected) < 20:
            expected.append(int(distances[:, expected].min(1).argmax()))
        assert chosen == expected

    def test_radius_is_at_most_twice_the_best(self):
        # four tight clusters: four centres can reach radius 0.1
        centres = torch.tensor([[0.0, 0], [10, 0], [0, 10], [10, 10]])
        x = (centres[:, None] + 0.1 * torch.rand(4, 25, 2, generator=torch.Generator().manual_seed(0))).flatten(0, 1)
        chosen = k_center(x, 4)
        assert torch.cdist(x, x[chosen]).amin(1).max() <= 2 * 0.15
        assert len(set((chosen // 25).tolist())) == 4

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    @pytest.mark.parametrize("n", [1, 2, 50, 400])
    def test_the_plain_algorithm_in_its_order(self, device, dtype, n):
        """More rows than candidates, of several shapes: each is chosen where one distance at a time would choose it."""
        g = torch.Generator().manual_seed(1)
        centres = 4 * torch.randn(12, 6, generator=g)
        clusters = centres[torch.randint(12, (3000,), generator=g)] + torch.randn(3000, 6, generator=g)
        for x in (
            torch.randn(3000, 20, generator=g),
            torch.randn(3000, 2, generator=g),
            clusters,
            torch.randn(500, 9, generator=g).repeat(6, 1),
        ):
            x = x.to(device, dtype)
            assert k_center(x, min(n, 60), start=5).tolist() == farthest_points(x, min(n, 60), 5)
            if dtype == torch.float64:
                assert k_center(x, n, start=5).tolist() == farthest_points(x, n, 5)

    @pytest.mark.parametrize(
        "x",
        [
            torch.cartesian_prod(torch.arange(64), torch.arange(64)),  # many ties in every step
            torch.eye(64).repeat(32, 1),  # all far rows are equally far, and copies of each other
            torch.zeros(2048, 3),
            torch.tensor([0.0, 4.0, 1.0]).repeat(2048).view(-1, 3) * (torch.arange(2048) % 2)[:, None],
        ],
        ids=["grid", "one-hot", "one point", "two points"],
    )
    def test_ties_go_to_the_first(self, device, x):
        x = x.float().to(device)
        assert k_center(x, 300, start=7).tolist() == farthest_points(x, 300, 7)

    def test_duplicates_and_all_rows(self):
        x = torch.zeros(6, 3)
        assert sorted(k_center(x, 6).tolist()) == list(range(6))
        assert k_center(x[:1], 1).tolist() == [0]
        x = torch.randn(60, 384, generator=torch.Generator().manual_seed(0)).repeat(30, 1)
        chosen = k_center(x, 1800)  # copies differ by rounding alone
        assert sorted(chosen.tolist()) == list(range(1800))
        assert (chosen[:60] % 60).unique().numel() == 60

    @pytest.mark.parametrize("d", [2, 32])
    def test_few_passes_over_the_rows(self, monkeypatch, d):
        """A step of its own for each of the 500 rows would be 500 passes."""
        module = __import__("companion.anomaly.visual_anomalies.memory", fromlist=["memory"])
        calls = []
        monkeypatch.setattr(module, "product", lambda *args: calls.append(args) or product(*args))
        k_center(torch.randn(4 * module._BLOCK, d, generator=torch.Generator().manual_seed(0)), 500)
        assert len(calls) <= 20 * 4

    def test_memory_stays_bounded(self, device):
        x = torch.randn(30_000, 4, generator=torch.Generator().manual_seed(0)).to(device)
        with Largest() as largest:
            k_center(x, 2000)
        assert largest.bytes <= (32 if device.type == "cpu" else 512) * 2**20  # all distances would be 240 MB

    def test_input_stays(self, device):
        x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)).to(device)
        before = x.clone()
        chosen = k_center(x, 10)
        assert torch.equal(x, before)
        assert torch.equal(k_center(x.clone().requires_grad_(), 10), chosen)
        wide = torch.zeros(50, 16, device=device)
        wide[:, ::2] = x
        assert torch.equal(k_center(wide[:, ::2], 10), chosen)

    def test_far_from_the_origin(self):
        x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
        assert k_center(x, 15, start=0).tolist() == k_center((x + 1000).double(), 15, start=0).tolist()

    def test_errors(self):
        with pytest.raises(ValueError, match="at most"):
            k_center(torch.zeros(3, 2), 4)
        with pytest.raises(ValueError, match="start"):
            k_center(torch.zeros(3, 2), 1, start=3)
        with pytest.raises(ValueError, match="overflow"):
            k_center([[0.0], [1e20]], 1)


class TestBaselines:
    def test_gaussian_against_sklearn(self, plates):
        detector = PatchGaussian().fit(plates[0])
        x = local_patch_features(plates[0]).flatten(0, 2).double().numpy()
        reference = LedoitWolf().fit(x)
        expected = np.sqrt(reference.mahalanobis(x)).reshape(16, 8, 8)
        got = detector._score_patches(local_patch_features(plates[0]))
        np.testing.assert_allclose(got.numpy(), expected, rtol=2e-3)

    def test_memory_of_everything_knows_everything(self, plates):
        detector = PatchMemory(coreset=10_000, random_state=0).fit(plates[0][:4])
        assert detector.score_samples(plates[0][:4]).abs().max() < 1e-3

    def test_memory_errors(self, plates):
        with pytest.raises(ValueError, match="coreset"):
            PatchMemory(coreset=0).fit(plates[0])
        with pytest.raises(ValueError, match="n_neighbors"):
            PatchMemory(coreset=2, n_neighbors=3).fit(plates[0])


class TestSimpleNet:
    def test_loss_is_zero_beyond_the_threshold(self):
        assert truncated_l1_loss(torch.tensor([0.5, 3.0]), torch.tensor([-0.5, -3.0])) == 0
        assert truncated_l1_loss(torch.zeros(4), torch.zeros(4)) == 1

    def test_adaptor_starts_as_identity(self):
        x = torch.rand(5, 7)
        assert torch.equal(FeatureAdaptor(7)(x), x)

    def test_training_lowers_the_loss(self, plates):
        loss = SimpleNetDetector(steps=80, random_state=0).fit(plates[0]).loss_
        assert np.mean(loss[-10:]) < 0.7 * np.mean(loss[:10])

    @pytest.mark.parametrize(("average", "last"), [(0.0, 1), (0.5, 3), (1.0, 6)])
    def test_the_weights_of_the_last_steps_are_averaged(self, average, last):
        """Every path is a prefix of the longest one: where it ended after each step is known."""
        grid = torch.rand(2, 4, 4, 5, generator=torch.Generator().manual_seed(0))
        ends = [
            [w.detach() for w in SimpleNetDetector(steps=n, random_state=0).fit_patches(grid).members_.parameters()]
            for n in range(1, 7)
        ]
        detector = SimpleNetDetector(steps=6, average=average, random_state=0).fit_patches(grid)
        for i, weight in enumerate(detector.members_.parameters()):
            torch.testing.assert_close(weight, torch.stack([end[i] for end in ends[6 - last :]]).mean(0))
        with pytest.raises(ValueError, match="average"):
            detector.set_params(average=1.5).fit_patches(grid)

    def test_members_are_judged_together(self, plates):
        grid = local_patch_features(plates[0])
        detector = SimpleNetDetector(steps=3, members=3, random_state=0).fit_patches(grid)
        x = (grid - detector.mean_) / detector.std_
        weight, bias = detector.members_.adaptors
        first, offset, last = detector.members_.discriminators
        alone = []
        for i in range(3):  # written out, one at a time
            hidden = (x @ weight[i] + bias[i]) @ first[i] + offset[i]
            alone.append(-(torch.where(hidden > 0, hidden, 0.2 * hidden) @ last[i]).squeeze(-1))
        assert not torch.allclose(alone[0], alone[1])
        assert torch.allclose(detector.score_patches(grid), torch.stack(alone).mean(0), atol=1e-5)

    def test_members_start_as_the_networks_they_are_made_of(self):
        detector = SimpleNetDetector(steps=1, lr=0.0, members=2, random_state=0).fit_patches(torch.rand(2, 4, 4, 5))
        weight, bias = detector.members_.adaptors
        assert torch.equal(weight, torch.eye(5).expand(2, 5, 5))
        assert not bias.any()
        with pytest.raises(ValueError, match="members"):
            SimpleNetDetector(members=0).fit_patches(torch.rand(2, 4, 4, 5))

    def test_negatives_from_damaged_images(self, plates):
        def corrupt(images, g):
            images = images.clone()
            images[:, :, 8:24, 8:24] = 1
            return images

        detector = SimpleNetDetector(steps=60, corrupt=corrupt, random_state=0).fit(plates[0])
        assert detector.score_samples(plates[1]).max() < detector.score_samples(plates[0]).min()


class TestEfficientAD:
    def test_logical_anomalies_hold_no_new_patch(self):
        def patches(images):
            rows = nn.functional.unfold(images, 7).transpose(1, 2).flatten(0, 1)
            return {tuple(r) for r in (rows * 10).round().to(torch.int8).unique(dim=0).tolist()}

        g = torch.Generator().manual_seed(0)
        known = patches(make_logic_scenes(300, "normal", g).images)
        for kind in ("swapped", "two discs", "missing"):
            assert patches(make_logic_scenes(40, kind, g).images) <= known
        assert not patches(make_logic_scenes(40, "scratch", g).images) <= known

    def test_each_output_sees_one_patch(self):
        net = PatchDescriptionNetwork(1, 4, seed=0)
        x = torch.rand(1, 1, 20, 20)
        torch.testing.assert_close(net(x)[:, :, 3:4, 5:6], net(x[:, :, 3:10, 5:12]))

    def test_hard_loss_limits(self):
        d = torch.rand(1000)
        torch.testing.assert_close(hard_feature_loss(d, 0.0), d.mean())
        assert hard_feature_loss(d, 0.999) == d.max()
        with pytest.raises(ValueError, match="q"):
            hard_feature_loss(d, 1.0)

    def test_quantiles_go_to_zero_and_a_tenth(self):
        torch.testing.assert_close(quantile_normalise(torch.tensor([2.0, 5.0]), 2.0, 5.0), torch.tensor([0.0, 0.1]))

    def test_student_teacher_is_blind_to_a_swap(self):
        g = torch.Generator().manual_seed(0)
        detector = EfficientADDetector(steps=30, which="st", random_state=0).fit(
            make_logic_scenes(300, generator=g).images
        )
        normal = detector.score_samples(make_logic_scenes(60, generator=g).images)
        swapped = detector.score_samples(make_logic_scenes(60, "swapped", g).images)
        torch.testing.assert_close(normal.min(), swapped.min())

    def test_errors(self, plates):
        with pytest.raises(ValueError, match="which"):
            EfficientADDetector(which="all").fit(plates[0])
        with pytest.raises(ValueError, match="kind"):
            make_logic_scenes(2, "broken")


class TestCorrelation:
    def test_target_against_the_formula(self):
        g = torch.Generator().manual_seed(0)
        x, r = torch.rand(3, 4, generator=g), torch.rand(5, 4, generator=g)
        log_sigma = torch.rand(3, 1, generator=g)
        weights = torch.exp(-(torch.cdist(x, r) ** 2) / (2 * log_sigma.exp() ** 2))
        torch.testing.assert_close(rbf_target(x, r, log_sigma), weights / weights.sum(1, keepdim=True))

    def test_target_far_from_the_origin(self):
        x = torch.rand(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        far = (x + 1e4).float()
        expected = rbf_target(far.double(), far.double(), torch.zeros(5, 1, dtype=torch.float64))
        torch.testing.assert_close(rbf_target(far, far, torch.zeros(5, 1)).double(), expected, rtol=1e-4, atol=1e-5)

    def test_wide_and_narrow_limits(self):
        x = torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
        wide = rbf_target(x, x, torch.full((6, 1), 10.0))
        torch.testing.assert_close(wide, torch.full((6, 6), 1 / 6), atol=1e-4, rtol=0)
        narrow = rbf_target(x, x, torch.full((6, 1), -10.0))
        torch.testing.assert_close(narrow, torch.eye(6))
        masked = rbf_target(x, x, torch.zeros(6, 1), mask_self=True)
        assert (masked.diagonal() == 0).all()
        torch.testing.assert_close(masked.sum(1), torch.ones(6))

    def test_entropy_and_divergence(self):
        assert attention_entropy(torch.eye(3)).abs().max() == 0
        a, b = torch.tensor([[0.2, 0.8]]), torch.tensor([[0.6, 0.4]])
        expected = (a * (a / b).log()).sum() + (b * (b / a).log()).sum()
        torch.testing.assert_close(correlation_loss(a, b)[0], expected)

    def test_attention_never_looks_at_itself(self):
        _, intra, inter = I2Correlation(5)(torch.rand(2, 7, 5), torch.rand(4, 5))
        assert (intra.diagonal(dim1=1, dim2=2) == 0).all()
        torch.testing.assert_close(inter.sum(-1), torch.ones(2, 7))

    def test_which(self, plates):
        with pytest.raises(ValueError, match="which"):
            FODDetector(which="all").fit(plates[0])


class TestParts:
    def test_regions_are_where_the_picture_changed(self):
        # the same stream draws the same plate, and the defects come after it
        whole = make_parts(20, generator=torch.Generator().manual_seed(0)).images
        parts = make_parts(20, defects=3, generator=torch.Generator().manual_seed(0))
        assert not ((whole != parts.images)[:, 0] & (parts.regions == 0)).any()
        assert parts.regions.amax() == 3

    def test_recall_against_a_loop_and_over_batches(self):
        g = torch.Generator().manual_seed(0)
        parts = make_parts(12, defects=4, generator=g)
        maps = torch.rand(12, 64, 64, generator=g) + (parts.regions > 0) * torch.rand(12, 64, 64, generator=g)
        metric = SizeStratifiedRecall(bins=(4, 16, 64), fpr=0.05)
        for rows in torch.arange(12).split(5):
            metric.update(maps[rows], parts.regions[rows])
        normal = maps[parts.regions == 0].sort(descending=True).values
        threshold = normal[round(0.05 * len(normal)) - 1]
        coverage = [[], [], [], []]
        for m, r in zip(maps, parts.regions, strict=True):
            for k in r[r > 0].unique():
                inside = r == k
                size = int(inside.sum())
                coverage[sum(size > b for b in (4, 16, 64))].append(float((m[inside] > threshold).float().mean()))
        torch.testing.assert_close(metric.compute(), torch.tensor([np.mean(c) for c in coverage]).float())

    def test_pasted_defects_have_the_area_asked_for(self):
        whole = make_parts(200, generator=torch.Generator().manual_seed(0)).images
        damaged, masks = irregular_defects(whole, area=(4, 5), generator=torch.Generator().manual_seed(1))
        assert masks.sum((1, 2)).float().median() in (4, 5)
        assert not ((damaged != whole)[:, 0] & ~masks).any()

    def test_coarse_to_fine_runs_without_a_guide(self):
        parts = make_parts(6, generator=torch.Generator().manual_seed(0)).images
        coarse = PatchMemory(coreset=50, random_state=0).fit(parts)
        with torch.no_grad():
            fine = CoarseToFine(coarse, guide_scale=0, steps=2, random_state=0).fit(parts.clone().requires_grad_())
        assert fine.net_.first[0].in_channels == 1
        torch.testing.assert_close(fine.score_samples(parts), -fine.anomaly_map(parts).amax((1, 2)))

    def test_errors(self):
        with pytest.raises(ValueError, match="bins"):
            SizeStratifiedRecall(bins=(4, 4))
        with pytest.raises(ValueError, match="one shape"):
            SizeStratifiedRecall().update(torch.zeros(1, 2, 2), torch.zeros(1, 3, 3, dtype=torch.int64))
        with pytest.raises(ValueError, match="area"):
            make_parts(2, area=(5, 2))
        assert SmallUNet(1, seed=0)(torch.zeros(2, 1, 32, 32)).shape == (2, 32, 32)


def test_a_defect_in_a_texture_lights_up():
    g = torch.Generator().manual_seed(0)
    normal = make_textures(30, "stripes", look=1, generator=g).images
    bad = make_textures(10, "stripes", "blob", look=1, generator=g)
    maps = PatchMemory(coreset=800, random_state=0).fit(normal).anomaly_map(bad.images)
    inside = maps[bad.masks[:, 0]].mean()
    assert inside > 1.5 * maps[~bad.masks[:, 0]].mean()


def test_a_teacher_of_your_own_is_left_alone(plates):
    teacher = PatchDescriptionNetwork(1, 4, seed=0).train()
    detector = EfficientADDetector(teacher, steps=2, random_state=0).fit(plates[0])
    assert teacher.training
    assert detector.anomaly_map(plates[1]).shape == (6, 32, 32)


class TestPatchGrids:
    @pytest.mark.parametrize("index", [0, 1, 2, 4])
    def test_grids_and_images_agree(self, plates, index):
        detector = clone(DETECTORS[index])
        grid = local_patch_features(plates[1])
        by_image = clone(detector).fit(plates[0])
        by_grid = detector.fit_patches(local_patch_features(plates[0]))
        torch.testing.assert_close(by_grid.score_patches(grid), by_image.score_patches(grid))

    def test_errors(self, plates):
        grid = local_patch_features(plates[0])
        with pytest.raises(NotFittedError):
            PatchGaussian().score_patches(grid)
        with pytest.raises(NotFittedError):
            PatchGaussian().fit_patches(grid).score_samples(plates[0])
        with pytest.raises(ValueError, match="patch vectors"):
            EfficientADDetector().fit_patches(grid)
        with pytest.raises(ValueError, match="rows, columns"):
            PatchGaussian().fit_patches(grid[0])
        with pytest.raises(ValueError, match="call fit"):
            SimpleNetDetector(corrupt=lambda images, g: images).fit_patches(grid)
