"""References, modalities, synthesis, prompts and captions: identities, limits, closed forms, bad input."""

import math

import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from torch.nn import functional as F

from companion.anomaly import (
    AttributeTokenGenerator,
    CaptionDecoder,
    LogBarrierOCCLoss,
    ModalAdaptor,
    PromptFlow,
    PromptScorer,
    ResADDetector,
    ResidualCrossAttention,
    TwoModalMemory,
    align_embedding,
    alignment_loss,
    class_correlation,
    compactness_loss,
    decoupled_alignment_loss,
    elbo,
    ensemble_map,
    fit_prompts,
    height_patches,
    inconsistency_map,
    local_patch_features,
    make_factor_defects,
    make_height_pairs,
    make_prompt_task,
    make_text_image_pairs,
    mask_iou,
    residual_features,
    synth_augment,
    train_segmenter,
    word_attribution,
)


class TestResiduals:
    def test_against_brute_force(self, generator):
        x, pool = torch.randn(50, 6, generator=generator), torch.randn(30, 6, generator=generator)
        expected = x - pool[torch.cdist(x, pool).argmin(1)]
        torch.testing.assert_close(residual_features(x, pool), expected)

    def test_a_reference_has_no_residual_and_shifts_cancel(self, generator):
        x, pool = torch.randn(20, 4, generator=generator), torch.randn(9, 4, generator=generator)
        assert residual_features(pool, pool).abs().max() == 0
        torch.testing.assert_close(residual_features(x + 3, pool + 3), residual_features(x, pool), atol=1e-5, rtol=1e-4)

    def test_probe_reads_islands_and_not_noise(self, generator):
        labels = torch.randint(3, (600,), generator=generator)
        noise = torch.randn(600, 5, generator=generator)
        assert class_correlation(noise + 10 * F.one_hot(labels, 5), labels) > 0.99
        assert class_correlation(noise, labels) < 0.45

    def test_barrier_is_zero_in_the_shell_and_grows_outside(self):
        loss = LogBarrierOCCLoss(0.4, 1.0, scale=10.0)
        at = [float(loss(torch.tensor([[r, 0.0]]))) for r in (0.1, 0.4, 0.7, 1.0, 2.0, 5.0, 50.0)]
        assert at[1] == at[2] == at[3] == 0
        assert at[0] > 0
        assert at[3] < at[4] < at[5] < at[6] < math.inf
        assert at[4] == pytest.approx(-math.log(1 - 0.1), rel=1e-5)
        with pytest.raises(ValueError, match="r_min"):
            LogBarrierOCCLoss(2.0, 1.0)

    def test_scale_step_undoes_contrast(self, generator):
        class Linear:  # a backbone without a nonlinearity: contrast passes straight through
            def __call__(self, x):
                return [F.avg_pool2d(x, 4)]

        product = 0.2 + 0.1 * torch.rand(8, 3, 32, 32, generator=generator)
        detector = ResADDetector(Linear(), score="norm", steps=0).fit([product, product.flip(0)])
        weak = detector.set_reference(product[:4]).score_samples(product[4:])
        strong = detector.set_reference(3 * product[:4]).score_samples(3 * product[4:])
        torch.testing.assert_close(weak, strong, rtol=1e-3, atol=1e-3)
        detector.set_params(hypersphere=False)
        raw = detector.set_reference(product[:4]).score_samples(product[4:])
        stretched = detector.set_reference(3 * product[:4]).score_samples(3 * product[4:])
        torch.testing.assert_close(stretched, 3 * raw, rtol=1e-3, atol=1e-3)

    def test_new_product_needs_references(self, generator):
        products = [torch.rand(6, 1, 32, 32, generator=generator) for _ in range(2)]
        detector = clone(ResADDetector(steps=3, random_state=0))
        with pytest.raises(NotFittedError):
            detector.score_samples(products[0])
        detector.fit(products)
        with pytest.raises(ValueError, match="set_reference"):
            detector.score_samples(products[0])
        scores = detector.set_reference(products[0][:3]).score_samples(products[0][3:])
        torch.testing.assert_close(scores, -detector.anomaly_map(products[0][3:]).amax((1, 2)))
        again = clone(detector).fit(products).set_reference(products[0][:3]).score_samples(products[0][3:])
        assert torch.equal(scores, again)
        with pytest.raises(ValueError, match="two products"):
            detector.fit([products[0]])
        with pytest.raises(ValueError, match="score"):
            ResADDetector(score="other").fit(products)

    def test_gradients_are_its_own_business(self, generator):
        products = [torch.rand(5, 1, 32, 32, generator=generator, requires_grad=True) for _ in range(2)]
        with torch.no_grad():
            within = ResADDetector(steps=3, random_state=0).fit(products)
        beside = ResADDetector(steps=3, random_state=0).fit(products)
        few, new = products[0][:3].detach(), products[1].detach()
        scores = [detector.set_reference(few).score_samples(new) for detector in (within, beside)]
        assert torch.equal(*scores)
        assert not any(p.grad is not None for p in products)

    def test_grids_computed_before_give_the_same_scores(self, generator):
        products = [torch.rand(5, 1, 32, 32, generator=generator) * scale for scale in (0.3, 0.9)]
        few, new = (torch.rand(n, 1, 32, 32, generator=generator) for n in (3, 4))
        from_images = ResADDetector(steps=5, random_state=0).fit(products).set_reference(few)
        grids = [local_patch_features(product) for product in products]
        from_grids = ResADDetector(steps=5, random_state=0).fit_patches(grids)
        from_grids.set_reference_patches(local_patch_features(few))
        scores = [d.score_patches(local_patch_features(new)) for d in (from_images, from_grids)]
        torch.testing.assert_close(*scores)
        with pytest.raises(ValueError, match="at least 5 images"):
            ResADDetector().fit_patches([grid[:4] for grid in grids])
        with pytest.raises(ValueError, match="at least two products"):
            ResADDetector().fit_patches(grids[0])
        with pytest.raises(ValueError, match="at least 2 reference"):
            from_grids.set_reference_patches(grids[0][:1])


class TestModalities:
    def test_paint_changes_one_map_and_ghost_the_other(self):
        normal, paint, ghost = (
            make_height_pairs(5, kind, generator=torch.Generator().manual_seed(0))
            for kind in ("normal", "paint", "ghost")
        )
        assert torch.equal(normal.intensity, paint.intensity)
        assert not torch.equal(normal.height, paint.height)
        assert torch.equal(normal.height, ghost.height)
        assert not torch.equal(normal.intensity, ghost.intensity)
        changed = (normal.height - paint.height)[:, 0].abs() > 0.03
        assert (changed <= paint.masks).all()
        assert not normal.masks.any()

    def test_patches_against_a_slice(self, generator):
        maps = torch.rand(2, 1, 16, 16, generator=generator)
        patches = height_patches(maps, patch=5, stride=2)
        expected = (maps[1, 0] - maps[1].median())[4:9, 6:11].flatten()
        torch.testing.assert_close(patches[1, 2, 3], expected)

    def test_losses(self, generator):
        z = F.normalize(torch.randn(8, 4, generator=generator), dim=1)
        assert compactness_loss(z, z) == pytest.approx(0, abs=1e-6)
        assert compactness_loss(z, -z[:1]) > 0.5
        same = torch.ones(8, 4) / 2
        assert alignment_loss(same, same) == pytest.approx(math.log(8), rel=1e-5)  # nothing to tell apart
        assert alignment_loss(z, z) < alignment_loss(z, z.roll(1, 0))
        torch.testing.assert_close(ModalAdaptor(4)(z).norm(dim=1), torch.ones(8))

    def test_finds_a_broken_relation(self):
        g = torch.Generator().manual_seed(0)
        normal, test, ghost = (
            make_height_pairs(n, k, generator=g) for n, k in ((80, "normal"), (30, "normal"), (30, "ghost"))
        )
        memory = TwoModalMemory(steps=120, random_state=0).fit(normal.intensity, normal.height)
        good = memory.score_samples(test.intensity, test.height)
        bad = memory.score_samples(ghost.intensity, ghost.height)
        assert (good[:, None] > bad[None]).float().mean() > 0.85
        maps = memory.anomaly_map(ghost.intensity, ghost.height)
        assert maps.shape == (30, 32, 32)
        assert maps[ghost.masks].mean() > 1.5 * maps[~ghost.masks].mean()

    @pytest.mark.parametrize("which", ["memory", "first", "second", "joined"])
    def test_memories_score(self, which):
        pairs = make_height_pairs(6, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            TwoModalMemory(steps=1, which=which).fit(pairs.intensity.clone().requires_grad_(), pairs.height)
        memory = clone(TwoModalMemory(steps=2, compactness=0.1, which=which, random_state=0))
        with pytest.raises(NotFittedError):
            memory.score_samples(pairs.intensity, pairs.height)
        assert memory.fit(pairs.intensity, pairs.height).score_samples(pairs.intensity, pairs.height).shape == (6,)

    def test_errors(self):
        maps = torch.zeros(2, 1, 32, 32)
        with pytest.raises(ValueError, match="two batches"):
            TwoModalMemory().fit(maps, maps[:1])
        with pytest.raises(ValueError, match="one patch grid"):
            TwoModalMemory().fit(maps, maps[:, :, :16])
        with pytest.raises(ValueError, match="kind"):
            make_height_pairs(2, "odd")
        with pytest.raises(ValueError, match="kind of map"):
            TwoModalMemory(which="all").fit(maps, maps)


class TestSynthesis:
    def test_tokens_measure_the_contrast(self):
        data = make_factor_defects(6, [(0, 0), (1, 1), (2, 2)], generator=torch.Generator().manual_seed(0))
        tokens = AttributeTokenGenerator().encode(data.images, data.masks)
        assert tokens.contrasts_[:3] == pytest.approx([-0.3, 0.18, 0.45], abs=0.05)
        assert [int(s.sum()) for s in tokens.shapes_] == data.masks.sum((1, 2)).tolist()

    def test_render_changes_the_mask_only(self):
        g = torch.Generator().manual_seed(0)
        data = make_factor_defects(3, [(0, 0), (1, 1), (2, 2)], generator=g)
        tokens = AttributeTokenGenerator().encode(data.images, data.masks)
        normal = make_factor_defects(30, None, generator=g).images
        images, masks = tokens.sample(normal, torch.arange(30) % 3, (torch.arange(30) + 1) % 3, g)
        changed = (images != normal)[:, 0]
        assert not (changed & ~masks).any()
        area = masks.sum((1, 2)).view(10, 3).float().mean(0)
        torch.testing.assert_close(area, data.masks.sum((1, 2)).float(), rtol=0.2, atol=3)
        change = (images - normal)[0, 0][masks[0]].mean()
        assert float(change) == pytest.approx(tokens.contrasts_[1], abs=0.03)

    def test_paste_and_recombine(self):
        g = torch.Generator().manual_seed(0)
        data = make_factor_defects(2, [(0, 0), (2, 2)], generator=g)
        tokens = AttributeTokenGenerator().encode(data.images, data.masks)
        normal = make_factor_defects(64, None, generator=g).images
        for recombine, kinds in ((False, 2), (True, 4)):
            images, masks = synth_augment(normal, tokens, recombine, g)
            assert not masks[::4].any()
            sign = ((images - normal)[:, 0] * masks).sum((1, 2)).sign()
            area = masks.sum((1, 2)) > data.masks[0].sum() - 6
            seen = {(float(s), bool(a)) for s, a, m in zip(sign, area, masks, strict=True) if m.any()}
            assert len(seen) <= kinds

    def test_alignment_binds_tokens_to_their_side(self):
        mask = torch.zeros(1, 4, 4)
        mask[:, :2] = 1
        right = torch.stack([1 - mask, mask, mask], 1)
        assert decoupled_alignment_loss(right, mask) == 0
        assert decoupled_alignment_loss(1 - right, mask) > 1

    def test_segmenter_learns_and_iou_is_exact(self):
        data = make_factor_defects(60, [(0, 2)], generator=torch.Generator().manual_seed(0))
        net = train_segmenter(data.images, data.masks, steps=80)
        assert mask_iou(net, data.images, data.masks).mean() > 0.6
        with torch.no_grad():
            predicted = net((data.images - 0.5) * 4) > 0
        assert (mask_iou(net, data.images, predicted) == 1).all()
        with pytest.raises(ValueError, match="empty"):
            AttributeTokenGenerator().encode(data.images[:1], torch.zeros(1, 32, 32, dtype=torch.bool))


class TestPromptFlow:
    def test_log_det_against_autograd(self, generator):
        flow = PromptFlow(4, layers=3, seed=0).double()
        z = torch.randn(5, 4, generator=generator, dtype=torch.float64)
        _, log_det = flow(z)
        for row, got in zip(z, log_det, strict=True):
            jacobian = torch.autograd.functional.jacobian(lambda x: flow(x[None])[0][0], row)
            torch.testing.assert_close(got, torch.linalg.slogdet(jacobian).logabsdet)

    def test_layers_stay_invertible(self, generator):
        flow = PromptFlow(3, layers=1, seed=0)
        with torch.no_grad():
            flow.u.copy_(-5 * flow.w)  # would fold space without the correction
        z = torch.randn(100, 3, generator=generator)
        assert torch.isfinite(flow(z)[1]).all()

    def test_gaussian_density_and_kl_have_closed_forms(self):
        flow = PromptFlow(3, layers=0, seed=0)
        with torch.no_grad():
            z, log_q = flow.sample(20_000, generator=torch.Generator().manual_seed(0))
        expected = torch.distributions.Normal(flow.mean, flow.log_std.exp()).log_prob(z).sum(1)
        torch.testing.assert_close(log_q, expected)
        normal = torch.distributions.Normal(torch.zeros(3), torch.ones(3))
        kl = torch.distributions.kl_divergence(torch.distributions.Normal(flow.mean, flow.log_std.exp()), normal).sum()
        assert float((log_q - normal.log_prob(z).sum(1)).mean()) == pytest.approx(float(kl.detach()), rel=0.03)

    def test_elbo_takes_the_kl_off(self):
        task = make_prompt_task(6, torch.eye(8)[:2], torch.eye(8)[3:4], generator=torch.Generator().manual_seed(0))
        model = PromptScorer(8, layers=0, seed=0)
        bounds = [elbo(model, task.patches, task.labels, 500, w, torch.Generator().manual_seed(1)) for w in (0.0, 1.0)]
        z, log_q = model.flow.sample(500, generator=torch.Generator().manual_seed(1))
        kl = (log_q + 0.5 * z.square().sum(1) + 4 * math.log(2 * math.pi)).mean()
        torch.testing.assert_close(bounds[0] - bounds[1], kl)

    def test_context_shifts_the_flow(self):
        flow = PromptFlow(4, layers=0, context_dim=2, seed=0)
        with torch.no_grad():
            flow.shift.weight.fill_(1.0)
        plain = flow.sample(5, generator=torch.Generator().manual_seed(0))[0]
        moved = flow.sample(5, torch.ones(2), torch.Generator().manual_seed(0))[0]
        torch.testing.assert_close(moved, plain + 2)

    def test_point_prompt_is_one_prompt(self):
        model = PromptScorer(8, layers=None, seed=0)
        patches = torch.rand(2, 3, 8)
        torch.testing.assert_close(ensemble_map(model, patches, 5), ensemble_map(model, patches, 1))
        assert ensemble_map(model, patches, 2).shape == (2, 3)

    def test_prompts_trained_as_one_end_where_each_ends_alone(self, generator):
        """A point prompt draws nothing but its batches: the plain loop is the reference."""
        codes = torch.eye(8)
        tasks = [make_prompt_task(12, codes[:2], codes[2:4], generator=generator) for _ in range(3)]
        together = fit_prompts(tasks, [5, 6, 7], layers=None, steps=6, batch_size=4)
        for task, seed, trained in zip(tasks, [5, 6, 7], together):
            alone, g = PromptScorer(8, layers=None, seed=seed), torch.Generator().manual_seed(seed)
            optimizer = torch.optim.Adam([p for p in alone.parameters() if p.requires_grad], lr=1e-2)
            for _ in range(6):
                rows = torch.randint(12, (4,), generator=g)
                optimizer.zero_grad()
                (-elbo(alone, task.patches[rows], task.labels[rows])).backward()
                optimizer.step()
            for name, p in alone.named_parameters():
                torch.testing.assert_close(trained.get_parameter(name), p)

    def test_prompts_trained_as_one_draw_their_own_samples(self, generator):
        task = make_prompt_task(12, torch.eye(8)[:2], torch.eye(8)[2:4], generator=generator)
        state = torch.get_rng_state()
        first, other = fit_prompts([task, task], [0, 1], layers=2, steps=5)
        again, _ = fit_prompts([task, task], [0, 1], layers=2, steps=5)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(first.flow.w, again.flow.w)
        assert not torch.equal(first.flow.w, PromptScorer(8, layers=2, seed=0).flow.w)
        assert not torch.equal(first.flow.w, other.flow.w)
        assert torch.equal(first.tower[0].weight, PromptScorer(8, layers=2, seed=0).tower[0].weight)

    def test_cross_attention_starts_as_identity(self):
        text = torch.rand(3, 8)
        torch.testing.assert_close(ResidualCrossAttention(8)(text, torch.rand(5, 8)), text)


class TestInconsistency:
    @pytest.mark.parametrize(("swap", "slot"), [("colour", 0), ("shape", 1), ("place", 2)])
    def test_exactly_one_word_is_wrong(self, swap, slot):
        right = make_text_image_pairs(20, None, torch.Generator().manual_seed(0))
        pairs = make_text_image_pairs(20, swap, torch.Generator().manual_seed(0))
        different = (right.captions != pairs.captions).flatten(1)
        assert torch.equal(right.images, pairs.images)
        assert (different.sum(1) == 1).all()
        assert torch.equal(different.float().argmax(1), pairs.wrong)
        assert (pairs.wrong % 3 == slot).all()
        assert pairs.masks.any((1, 2)).all()
        assert (pairs.captions[:, 0, 2] != pairs.captions[:, 1, 2]).all()

    def test_fit_improves_the_render_and_stays_when_held(self):
        g = torch.Generator().manual_seed(0)
        pairs = make_text_image_pairs(40, generator=g)
        decoder = CaptionDecoder(seed=0).fit(pairs, steps=30, generator=g)
        e = decoder.embed(pairs.captions)
        fitted = align_embedding(pairs.images, decoder, e, steps=10)
        with torch.no_grad():
            before, after = ((decoder(x) - pairs.images).square().mean() for x in (e, fitted))
        assert after < before
        held = align_embedding(pairs.images, decoder, e, steps=10, stay=1e9)
        assert (held - e).abs().max() < (fitted - e).abs().max()
        assert inconsistency_map(decoder, e, e).max() == 0
        assert inconsistency_map(decoder, e, fitted).max() > 0

    def test_attribution_against_single_renders(self):
        pairs = make_text_image_pairs(2, "colour", torch.Generator().manual_seed(0))
        decoder = CaptionDecoder(seed=0)
        got = word_attribution(pairs.images, decoder, pairs.captions)
        with torch.no_grad():
            base = (decoder(decoder.embed(pairs.captions)) - pairs.images).square().sum((1, 2, 3))
            best = torch.full((2,), math.inf)
            for word in range(4):
                other = pairs.captions.clone()
                other[:, 1, 2] = word
                error = (decoder(decoder.embed(other)) - pairs.images).square().sum((1, 2, 3))
                best = torch.where(other[:, 1, 2] == pairs.captions[:, 1, 2], best, torch.minimum(best, error))
        torch.testing.assert_close(got[:, 5], base - best)

    def test_errors(self):
        with pytest.raises(ValueError, match="swap"):
            make_text_image_pairs(2, "size")
        with pytest.raises(ValueError, match="n"):
            make_text_image_pairs(0)
