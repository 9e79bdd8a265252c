"""LoRA, Tucker updates, task vectors, single-neuron edits, hypernetworks and prompts against their mathematics."""

import math

import pytest
import torch
from scipy import stats
from torch import nn

import companion.dimensionality as dimensionality
from companion.dimensionality import (
    ATLAS,
    FlatDelta,
    HyperNetwork,
    JetPack,
    LoRALinear,
    PromptedTower,
    PromptedTowers,
    SurgeryBlock,
    TuckerDelta,
    TwoTowers,
    alignment,
    circle_encode,
    detachment_threshold,
    feature_shift,
    hosvd,
    intruder_dimensions,
    response_to,
    scale_directions,
    separability_dimension,
    shift_consistency_loss,
    singular_overlap,
    task_vector,
    unfold,
    unfolding_floor,
)
from companion.dimensionality import subspace_training as chapter
from companion.nets import MLP
from companion.training import fit_many


def test_every_public_name_reaches_the_theme():
    assert set(chapter.__all__) <= set(dimensionality.__all__)
    assert all(getattr(dimensionality, name) is getattr(chapter, name) for name in chapter.__all__)


class TestLoRA:
    def test_starts_at_the_layer_and_merges_to_it(self, device, generator):
        linear = nn.Linear(6, 4).to(device)
        layer = LoRALinear(linear, 2)
        x = torch.randn(3, 5, 6, generator=generator).to(device)
        assert torch.equal(layer(x), linear(x))
        with torch.no_grad():
            layer.b.normal_()
        torch.testing.assert_close(layer.merged()(x), layer(x), rtol=1e-4, atol=1e-5)
        assert torch.linalg.matrix_rank(layer.delta()) == 2

    def test_only_the_factors_train(self):
        layer = LoRALinear(nn.Linear(6, 4, bias=False), 2)
        layer(torch.randn(3, 6)).square().sum().backward()
        assert [name for name, _ in layer.named_parameters()] == ["a", "b"]
        assert layer.b.grad.abs().max() > 0
        assert layer.a.grad.abs().max() == 0  # b is zero at first

    def test_scales(self):
        linear = nn.Linear(16, 16)
        assert LoRALinear(linear, 4, alpha=8).scale == 2
        assert LoRALinear(linear, 4, alpha=8, rank_stabilized=True).scale == 4
        assert LoRALinear(linear, 4).scale == 2

    def test_bad_input(self):
        with pytest.raises(ValueError, match="at most 4"):
            LoRALinear(nn.Linear(6, 4), 5)
        with pytest.raises(TypeError, match=r"nn\.Linear, got Conv2d"):
            LoRALinear(nn.Conv2d(1, 1, 1), 1)


class TestIntruders:
    def test_no_change_has_none(self, device, generator):
        w = torch.randn(20, 30, generator=generator).to(device)
        assert intruder_dimensions(w, w).numel() == 0
        torch.testing.assert_close(singular_overlap(w, w).cpu(), torch.eye(20), rtol=1e-4, atol=1e-4)

    def test_a_large_random_spike_is_the_first_direction(self, generator):
        w = torch.diag(1 / torch.arange(1, 201.0))
        a, b = torch.randn(2, 200, generator=generator)
        spike = 5 * torch.outer(a / a.norm(), b / b.norm())
        assert intruder_dimensions(w, w + spike, k=10).tolist() == [0]

    def test_scaling_an_old_direction_makes_no_intruder(self):
        w = torch.diag(torch.arange(10.0, 0, -1))
        assert intruder_dimensions(w, scale_directions(w, [3], 5.0)).numel() == 0

    def test_rotations_of_input_or_output_change_nothing(self, generator):
        w = torch.diag(1 / torch.arange(1, 31.0)).double()
        v = w + 0.1 * torch.randn(30, 30, generator=generator).double()
        q = torch.linalg.qr(torch.randn(30, 30, generator=generator).double()).Q
        expected = singular_overlap(w, v)
        torch.testing.assert_close(singular_overlap(q @ w, q @ v), expected)
        torch.testing.assert_close(singular_overlap(w @ q, v @ q), expected)

    def test_detachment_happens_at_the_singular_value_it_passes(self, generator):
        w = torch.diag(torch.cat([torch.linspace(2, 1, 10), torch.full((246,), 0.05)]))
        a, b = (nn.functional.normalize(torch.randn(256, generator=generator), dim=0) for _ in range(2))
        bar = detachment_threshold(w, 10)
        assert bar == pytest.approx(1.0)
        counts = [len(intruder_dimensions(w, w + s * bar * torch.outer(a, b), k=10)) for s in (0.7, 3.0)]
        assert counts == [0, 1]

    def test_scaling_removes_and_keeps(self, generator):
        w = torch.randn(6, 5, generator=generator)
        torch.testing.assert_close(scale_directions(w, [0, 2], 1.0), w)
        gone = torch.linalg.svdvals(scale_directions(w, [0], 0.0))
        torch.testing.assert_close(gone[:4], torch.linalg.svdvals(w)[1:], rtol=1e-4, atol=1e-5)

    def test_bad_input(self):
        w = torch.eye(3)
        with pytest.raises(ValueError, match="one shape"):
            intruder_dimensions(w, torch.eye(4), k=2)
        with pytest.raises(ValueError, match="at most 3"):
            intruder_dimensions(w, w, k=4)
        with pytest.raises(ValueError, match="NaN"):
            intruder_dimensions(w, w * float("nan"), k=2)
        with pytest.raises(ValueError, match="threshold"):
            intruder_dimensions(w, w, k=2, threshold=0.0)
        with pytest.raises(ValueError, match=r"0\.\.2"):
            scale_directions(w, [3], 0.0)


class TestTensors:
    def test_tucker_is_the_sum_it_stands_for(self):
        delta = TuckerDelta((4, 5, 3), (2, 3, 2), scale=0.7)
        with torch.no_grad():
            delta.factors[0].normal_()
        expected = 0.7 * torch.einsum("abc,ia,jb,kc->ijk", delta.core, *delta.factors)
        torch.testing.assert_close(delta(), expected)
        assert torch.linalg.matrix_rank(unfold(delta().detach(), (1,))) == 3

    @pytest.mark.parametrize("make", [lambda s: TuckerDelta(s, (2, 2, 2, 2)), lambda s: FlatDelta(s, 2, rows=(0, 2))])
    def test_starts_at_zero_with_a_gradient(self, make, device):
        delta = make((6, 5, 3, 3)).to(device)
        assert not delta().any()
        (delta() - 1).square().sum().backward()
        assert sum(float(p.grad.abs().sum()) for p in delta.parameters()) > 0

    def test_counts(self):
        shape = (16, 16, 3, 3)
        counts = [
            sum(p.numel() for p in module.parameters())
            for module in (
                TuckerDelta(shape, (4, 4, 2, 2)),
                TuckerDelta(shape, (6, 6, 3, 3)),
                FlatDelta(shape, 2),
                FlatDelta(shape, 4),
                FlatDelta(shape, 3, rows=(0, 2)),
            )
        ]
        assert counts == [204, 534, 320, 640, 288]

    def test_flat_layouts_fold_back(self, generator):
        for rows in ((0,), (0, 2), (1, 3)):
            delta = FlatDelta((4, 5, 3, 2), 2, rows=rows)
            with torch.no_grad():
                delta.b.normal_(generator=generator)
            torch.testing.assert_close(unfold(delta().detach(), rows), (delta.b @ delta.a).detach())

    def test_a_matrix_tucker_has_the_rank_of_lora(self):
        delta = TuckerDelta((8, 9), (2, 2))
        with torch.no_grad():
            delta.factors[0].normal_()
        assert torch.linalg.matrix_rank(delta().detach()) == 2

    def test_hosvd_recovers_a_tucker_tensor(self, generator):
        core = torch.randn(2, 3, 2, generator=generator).double()
        factors = [torch.randn(n, r, generator=generator).double() for n, r in zip((6, 7, 5), (2, 3, 2), strict=True)]
        tensor = torch.einsum("abc,ia,jb,kc->ijk", core, *factors)
        g, u = hosvd(tensor, (2, 3, 2))
        torch.testing.assert_close(torch.einsum("abc,ia,jb,kc->ijk", g, *u), tensor)
        for factor in u:
            torch.testing.assert_close(factor.T @ factor, torch.eye(factor.shape[1]).double())

    def test_hosvd_error_is_bounded_by_what_was_cut(self, generator):
        tensor = torch.randn(5, 6, 4, generator=generator).double()
        ranks = (3, 3, 2)
        g, u = hosvd(tensor, ranks)
        error = (torch.einsum("abc,ia,jb,kc->ijk", g, *u) - tensor).square().sum()
        cut = sum(torch.linalg.svdvals(unfold(tensor, (k,)))[r:].square().sum() for k, r in enumerate(ranks))
        worst = max(float(torch.linalg.svdvals(unfold(tensor, (k,)))[r:].square().sum()) for k, r in enumerate(ranks))
        assert worst <= float(error) <= float(cut)

    def test_no_training_beats_the_floor(self, generator):
        target = torch.randn(6, 5, 3, 3, generator=generator)
        u, s, vh = torch.linalg.svd(unfold(target, (0,)), full_matrices=False)
        best = (u[:, :2] * s[:2]) @ vh[:2]
        reached = float((best - unfold(target, (0,))).norm() / target.norm())
        assert unfolding_floor(target, 2) == pytest.approx(reached, rel=1e-5)
        assert unfolding_floor(target, 6) == 0

    def test_bad_input(self):
        with pytest.raises(ValueError, match="one rank per axis"):
            TuckerDelta((4, 4), (2,))
        with pytest.raises(ValueError, match=r"ranks\[1\] of at most 4"):
            TuckerDelta((4, 4), (2, 5))
        with pytest.raises(ValueError, match="distinct axes"):
            unfold(torch.zeros(2, 3), (0, 0))
        with pytest.raises(ValueError, match="at most"):
            FlatDelta((4, 4), 5)


class TestTaskVectors:
    def test_zero_is_the_base_and_one_is_the_tuned_network(self, device, generator):
        base, tuned = MLP((4, 8, 3), seed=0).to(device), MLP((4, 8, 3), seed=1).to(device)
        tau = task_vector(base, tuned)
        x = torch.randn(5, 4, generator=generator).to(device)
        torch.testing.assert_close(ATLAS(base, [tau, tau])(x), base(x))
        at_one = ATLAS(base, [tau], blocks="whole", initial=1.0)
        torch.testing.assert_close(at_one(x), tuned(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(at_one.to_module()(x), tuned(x), rtol=1e-4, atol=1e-5)

    def test_blocks(self):
        base = MLP((4, 8, 3), seed=0)
        tau = task_vector(base, MLP((4, 8, 3), seed=1))
        assert ATLAS(base, [tau] * 3).coefficients.shape == (3, 4)
        by_layer = ATLAS(base, [tau] * 3, blocks=lambda name: name.rpartition(".")[0])
        assert by_layer.blocks == ["body.layer1.linear", "head"]
        with torch.no_grad():
            by_layer.coefficients[0, 1] = 1.0
        values = by_layer.values()
        assert torch.equal(values["body.layer1.linear.weight"], base.body.layer1.linear.weight)
        torch.testing.assert_close(values["head.weight"], base.head.weight + tau["head.weight"])

    def test_only_the_coefficients_train_and_stack(self, generator):
        base = MLP((4, 8, 2), seed=0)
        tau = task_vector(base, MLP((4, 8, 2), seed=1))
        x = torch.randn(40, 4, generator=generator)
        many = fit_many(lambda: ATLAS(base, [tau]), [0, 1], x, (x[:, 0] > 0).long(), epochs=3, device="cpu")
        assert list(many.params) == ["coefficients"]

    def test_bad_input(self):
        base = MLP((4, 8, 3), seed=0)
        with pytest.raises(ValueError, match="at least one"):
            ATLAS(base, [])
        with pytest.raises(ValueError, match="does not for"):
            ATLAS(base, [{"head.weight": torch.zeros(3, 8)}])
        with pytest.raises(ValueError, match="blocks"):
            ATLAS(base, [task_vector(base, base)], blocks="layers")
        with pytest.raises(ValueError, match="one architecture"):
            task_vector(base, MLP((4, 9, 3), seed=0))


def _ball(n, d, generator):
    direction = nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1)
    return direction * torch.rand(n, 1, generator=generator) ** (1 / d)


class TestStealth:
    @pytest.mark.parametrize("d", [1, 2, 4, 8])
    def test_the_dimension_of_a_ball(self, d, generator):
        assert separability_dimension(_ball(4000, d, generator)) == pytest.approx(d, rel=0.05)

    def test_the_rate_on_a_sphere_is_a_cap(self, generator):
        d, theta = 6, 0.5
        x = nn.functional.normalize(torch.randn(4000, d, generator=generator), dim=1)
        cap = 0.5 * stats.beta.cdf(1 - (1 - theta) ** 2, (d - 1) / 2, 0.5)
        n = separability_dimension(x, theta, center=False)
        assert 2 ** -(n + 1) == pytest.approx(cap, rel=0.03)

    def test_chunks_and_offsets_do_not_matter(self, generator):
        x = _ball(300, 3, generator)
        expected = separability_dimension(x, 0.1)
        assert separability_dimension(x, 0.1, chunk=7) == expected
        assert separability_dimension(x + 5, 0.1) == pytest.approx(expected, abs=0.02)

    def test_it_counts_pairs_of_different_samples(self):
        x = torch.tensor([[1.0, 0], [0, 1.0], [0, 1.0], [-1.0, 0]])
        # of 12 pairs, the two equal points fall on each other's side
        assert separability_dimension(x, center=False) == pytest.approx(-1 - math.log2(2 / 12))

    def test_an_edit_hits_its_trigger_exactly_and_nothing_outside_the_cap(self, device, generator):
        x = torch.randn(50, 16, generator=generator).to(device)
        block = JetPack(16, theta=0.1, center=x.mean(0)).to(device)
        assert torch.equal(block(x), x)
        response = torch.randn(16, generator=generator).to(device)
        assert block.add(x[3], response) == 0
        out = block(x)
        torch.testing.assert_close(out[3], x[3] + response, rtol=1e-4, atol=1e-4)
        outside = torch.arange(50, device=device) != 3
        assert torch.equal(out[outside], x[outside])
        assert float(block.misfire_rate(x)[0]) == pytest.approx(1 / 50)
        block.remove(0)
        assert len(block) == 0
        assert torch.equal(block(x), x)

    def test_edits_are_stored_with_the_state(self, generator):
        block = JetPack(4)
        block.add(torch.ones(4), torch.ones(4))
        other = JetPack(4)
        other.load_state_dict(block.state_dict())
        assert len(other) == 1
        x = torch.rand(3, 4, generator=generator)
        assert torch.equal(other(x), block(x))

    def test_response_reaches_the_margin_and_moves_nothing_else(self, generator):
        head = nn.Linear(12, 5)
        f = torch.randn(12, generator=generator)
        before = head(f)
        after = head(f + response_to(head, f, 2, margin=3.0))
        assert float((after[2] - before.max()).detach()) == pytest.approx(3.0, abs=1e-4)
        others = [0, 1, 3, 4]
        torch.testing.assert_close(after[others], before[others], rtol=1e-4, atol=1e-4)

    def test_bad_input(self):
        block = JetPack(3)
        with pytest.raises(ValueError, match="no direction"):
            block.add(torch.zeros(3), torch.ones(3))
        with pytest.raises(ValueError, match="trigger of shape"):
            block.add(torch.zeros(4), torch.ones(3))
        with pytest.raises(IndexError):
            block.remove(0)
        with pytest.raises(ValueError, match="theta"):
            JetPack(3, theta=0.0)
        with pytest.raises(ValueError, match="at least 2"):
            separability_dimension([[1.0]])
        with pytest.raises(ValueError, match="class in"):
            response_to(nn.Linear(3, 2), torch.ones(3), 2)


class TestHyperNetworks:
    def test_default_writes_weights_proportional_to_its_input(self, device):
        hyper = HyperNetwork(MLP((1, 8, 1), seed=0), parametrization="default").to(device)
        gammas = torch.tensor([[0.05], [0.5], [1.0]], device=device)
        written = hyper.write(gammas)
        torch.testing.assert_close(written[0], 0.05 * written[2])
        torch.testing.assert_close(written[1], 0.5 * written[2])
        ratio = hyper.weight_scale(gammas)
        assert (ratio[2] / ratio[0]).item() == pytest.approx(20, rel=1e-4)

    def test_circle_has_constant_length(self, generator):
        c = torch.rand(50, 3, generator=generator)
        torch.testing.assert_close(circle_encode(c).norm(dim=1), torch.full((50,), math.sqrt(3)))

    def test_base_weights_are_the_main_networks(self):
        main = MLP((1, 8, 1), seed=0)
        hyper = HyperNetwork(main, parametrization="mip", output_scale=0.0)
        x = torch.randn(5, 1)
        torch.testing.assert_close(hyper(x, torch.tensor([0.3])), main(x))
        assert HyperNetwork(main, parametrization="default").base is None

    @pytest.mark.parametrize("kind", ["default", "encoding", "residual", "mip"])
    def test_a_batch_of_conditions_is_one_at_a_time(self, kind, generator):
        hyper = HyperNetwork(MLP((2, 6, 1), seed=0), cond_dim=2, hidden=(8,), parametrization=kind)
        cond, x = torch.rand(4, 2, generator=generator), torch.randn(4, 5, 2, generator=generator)
        together = hyper(x, cond)
        each = torch.stack([hyper(x[i], cond[i]) for i in range(4)])
        torch.testing.assert_close(together, each)
        together.square().sum().backward()
        assert all(p.grad is not None for p in hyper.parameters())

    def test_bad_input(self):
        with pytest.raises(ValueError, match="parametrization"):
            HyperNetwork(nn.Linear(1, 1), parametrization="l2")
        hyper = HyperNetwork(nn.Linear(1, 1), hidden=(4,))
        with pytest.raises(ValueError, match="cond of shape"):
            hyper(torch.zeros(3, 1), torch.zeros(2))
        with pytest.raises(ValueError, match="one batch per"):
            hyper(torch.zeros(3, 4, 1), torch.zeros(2, 1))


class TestPrompts:
    def test_towers_compare_by_cosine(self, generator):
        towers = TwoTowers(nn.Identity(), nn.Identity(), scale=2.0)
        x, t = torch.randn(4, 3, generator=generator), torch.randn(5, 3, generator=generator)
        expected = 2 * nn.functional.cosine_similarity(x[:, None], t[None], dim=-1)
        torch.testing.assert_close(towers(x, t), expected)
        torch.testing.assert_close(towers(7 * x, t), expected)

    def test_a_zero_prompt_changes_nothing_and_a_bias_is_a_prompt(self, device, generator):
        tower = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).to(device)
        prompted = PromptedTower(tower, "0", 6)
        x = torch.randn(3, 4, generator=generator).to(device)
        assert torch.equal(prompted(x), tower(x))
        with torch.no_grad():
            prompted.prompt.normal_()
            expected = tower[2](torch.relu(tower[0](x) + prompted.prompt))
        torch.testing.assert_close(prompted(x), expected)
        prompted(x).sum().backward()
        assert prompted.prompt.grad.abs().sum() > 0
        assert all(p.grad is None for p in prompted.tower.parameters())
        assert not prompted.tower[0]._forward_hooks

    def test_shift_and_alignment(self):
        a, b = torch.eye(3), 2 * torch.eye(3)
        assert torch.equal(feature_shift(b, a), torch.ones(3))
        assert float(alignment(a, b)) == pytest.approx(1.0)
        assert float(alignment(a, a.roll(1, 0))) == 0
        assert float(shift_consistency_loss(torch.ones(4), torch.ones(2))) == 0
        with pytest.raises(ValueError, match="one shape"):
            feature_shift(a, torch.eye(4))

    def test_equal_shifts_can_still_break_alignment(self):
        # the short cut of the consistency loss: both towers move by the same amount, in opposite directions
        images = texts = torch.tensor([[1.0, 0.0]])
        up, down = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, -1.0]])
        shifts = feature_shift(images + up, images), feature_shift(texts + down, texts)
        assert float(shift_consistency_loss(*shifts)) == 0
        assert float(alignment(images + up, texts + down)) == pytest.approx(0.0, abs=1e-6)

    def test_surgery_starts_as_the_identity(self, generator):
        block = SurgeryBlock(5, 7)
        x = torch.randn(3, 5, generator=generator)
        assert torch.equal(block(x), x)
        block(x).sum().backward()
        assert block.up.grad.abs().sum() > 0

    def test_unknown_layer(self):
        with pytest.raises(ValueError, match="name of a layer"):
            PromptedTower(nn.Linear(2, 2), "body", 2)

    def test_prompted_towers_start_at_the_towers_and_report_their_shift(self, generator):
        towers = TwoTowers(MLP((4, 6, 3), seed=0), MLP((2, 6, 3), seed=1))
        texts = torch.randn(5, 2, generator=generator)
        both = PromptedTowers(towers, texts, "body.layer1.linear", 6)
        x = torch.randn(7, 4, generator=generator)
        out = both(x)
        assert torch.equal(out.logits, towers(x, texts))
        assert not out.image_shift.any()
        with torch.no_grad():
            both.after.image.prompt.fill_(0.5)
        out = both(x)
        assert not out.text_shift.any()
        torch.testing.assert_close(out.image_shift, (out.images - towers.embed_images(x)).norm(dim=1))
        only = PromptedTowers(towers, texts, "body.layer1.linear", 6, text=False)
        assert [n for n, p in only.named_parameters() if p.requires_grad] == ["after.image.prompt"]
        with pytest.raises(ValueError, match="nothing to train"):
            PromptedTowers(towers, texts, "body.layer1.linear", 6, image=False, text=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_have_directions_too(dtype):
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(12, 8, generator=generator).to(dtype)
    after = (before.float() + 9 * torch.outer(torch.randn(12, generator=generator), torch.ones(8))).to(dtype)
    assert torch.equal(singular_overlap(before, after), singular_overlap(before.float(), after.float()))
    assert torch.equal(intruder_dimensions(before, after, 3), intruder_dimensions(before.float(), after.float(), 3))
    assert detachment_threshold(before, 3) == detachment_threshold(before.float(), 3)
    scaled = scale_directions(after, [0], 0.0)
    assert scaled.dtype == dtype
    assert torch.equal(scaled, scale_directions(after.float(), [0], 0.0).to(dtype))
