"""The mechanisms of the chapter's papers: closed forms, invariances, limits, and input that is refused."""

import json
import math

import pytest
import torch
from scipy.stats import norm, spearmanr
from torch import nn

from companion.calibration import (
    CaPETrainer,
    EmpiricalTargets,
    GaussianScorer,
    IQAMetrics,
    LogisticMap,
    ThurstoneFidelityLoss,
    brier_skill_score,
    complete,
    count_macs,
    degrade,
    discretize_gaussian,
    empirical_probability,
    error_types,
    expected_score,
    gaussian_score_loss,
    make_answers,
    make_arithmetic,
    make_latent_probability,
    make_quality_set,
    make_referring_scenes,
    mask_iou,
    probability_integral,
    quality_features,
    rank_aggregate,
    read_answers,
    read_opinion_scores,
    sample_answers,
    score_integration,
    score_spread,
    sequence_confidence,
    two_point_label,
    win_probability,
    write_answers,
)
from companion.nets import MLP
from companion.training import fit, fit_many
from tests.processes import run_two


class TestHiddenChances:
    def test_outcomes_follow_the_chance(self):
        data = make_latent_probability(40_000, 3, generator=0)
        for low in (0.1, 0.4, 0.7):
            some = (data.p > low) & (data.p < low + 0.1)
            assert data.y[some].mean().item() == pytest.approx(data.p[some].mean().item(), abs=0.02)
        again = make_latent_probability(40_000, 3, generator=torch.Generator().manual_seed(0))
        assert torch.equal(data.x, again.x)
        assert make_latent_probability(10, amplitude=0.0, generator=0).p.unique().tolist() == [0.5]

    def test_bins_by_hand(self):
        scores = torch.tensor([0.9, 0.1, 0.8, 0.2, 0.5, 0.6])
        y = torch.tensor([1, 0, 0, 1, 1, 1])
        assert empirical_probability(scores, y, 3).tolist() == [0.5, 0.5, 0.5, 0.5, 1, 1]
        assert empirical_probability(scores, y, 1).tolist() == pytest.approx([4 / 6] * 6)
        assert torch.equal(empirical_probability(scores, y, 6), y.float())

    def test_stacked_models_and_monotone_maps(self, generator):
        scores = torch.rand(3, 50, generator=generator)
        y = torch.rand(3, 50, generator=generator) < scores
        found = empirical_probability(scores, y)
        for i in range(3):
            assert torch.equal(found[i], empirical_probability(scores[i].logit(), y[i]))
        assert found.mean(1).tolist() == pytest.approx(y.float().mean(1).tolist())

    def test_kernel(self, generator):
        scores = torch.rand(40, generator=generator, dtype=torch.float64)
        y = torch.rand(40, generator=generator) < scores
        weights = norm.pdf(scores.numpy()[:, None], scores.numpy(), 0.1)
        expected = weights @ y.double().numpy() / weights.sum(1)
        assert empirical_probability(scores, y, bandwidth=0.1).tolist() == pytest.approx(expected.tolist())
        wide = empirical_probability(scores, y, bandwidth=1e3)
        assert wide.tolist() == pytest.approx([y.double().mean().item()] * 40, abs=1e-6)

    @pytest.mark.parametrize(
        ("ratio", "ordinary"),
        [(2, [0, 3, 6, 9]), (1, [0, 2, 4, 6, 8, 10]), (1 / 5, [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]), (0, list(range(12)))],
    )
    def test_targets_alternate(self, ratio, ordinary):
        x, _, y = make_latent_probability(100, 3, generator=0)
        targets = EmpiricalTargets(x, y, n_bins=5, ratio=ratio)
        model = MLP((3, 8, 1), seed=0)
        found = []
        for epoch in range(12):
            if torch.equal(targets.targets, y):
                found.append(epoch)
            targets.refresh(epoch, model)
        assert found == ordinary

    def test_one_and_many_train_alike(self):
        x, _, y = make_latent_probability(200, 3, generator=0)

        def loss(z, t):
            return nn.functional.binary_cross_entropy_with_logits(z.squeeze(-1), t)

        settings = {"loss": loss, "epochs": 5, "device": "cpu", "batch_size": 50}
        one, targets = MLP((3, 8, 1), seed=4), EmpiricalTargets(x, y)
        order = torch.Generator().manual_seed(4)
        fit(one, x, targets.index, batch_transform=targets.batch, callback=targets.refresh, generator=order, **settings)
        targets = EmpiricalTargets(x[None], y[None])
        many = fit_many(
            lambda: MLP((3, 8, 1), seed=4), [4], x[None], targets.index, batch_transform=targets.batch,
            callback=targets.refresh, **settings,
        )  # fmt: skip
        torch.testing.assert_close(many(x[None])[0], one(x).detach(), atol=1e-4, rtol=1e-4)

    def test_trainer(self):
        data = make_latent_probability(1500, 3, frequency=1.0, generator=0)
        model = MLP((3, 32, 1), seed=0)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        trainer = CaPETrainer(model, warmup=15, epochs=8, lr=5e-3, random_state=0).fit(data.x, data.y)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        p = trainer.predict_proba(data.x)
        torch.testing.assert_close(p.sum(1), torch.ones(1500))
        assert (p[:, 1] - data.p).square().mean() < 0.02
        assert trainer.validation_loss_ <= trainer.early_loss_
        again = CaPETrainer(model, warmup=15, epochs=8, lr=5e-3, random_state=0).fit(data.x, data.y)
        assert torch.equal(again.predict_proba(data.x), p)
        last = CaPETrainer(model, warmup=5, epochs=4, bandwidth=0.05, keep="last", random_state=0)
        assert brier_skill_score(last.fit(data.x, data.y).predict_proba(data.x)[:, 1], data.y) > 0

    def test_refused(self):
        x, _, y = make_latent_probability(20, 3, generator=0)
        with pytest.raises(ValueError, match="one shape"):
            empirical_probability([0.1, 0.2], [1])
        with pytest.raises(ValueError, match="as many bins"):
            empirical_probability([0.1, 0.2], [1, 0], 3)
        with pytest.raises(ValueError, match="looks like confidences"):
            empirical_probability([1.0, 0.0], [0.3, 0.2], 1)
        with pytest.raises(ValueError, match="ratio"):
            EmpiricalTargets(x, y, ratio=-1)
        with pytest.raises(TypeError, match="Module"):
            CaPETrainer().fit(x, y)
        with pytest.raises(ValueError, match="keep"):
            CaPETrainer(MLP((3, 4, 1)), keep="first").fit(x, y)


class TestAnswers:
    def test_confidence_by_hand(self):
        rows = [[math.log(0.5), math.log(0.8)], [math.log(0.1)]]
        for how, expected in (("mean", 0.65), ("product", 0.4), ("geometric", 0.4**0.5), ("min", 0.5)):
            assert sequence_confidence(rows, how).tolist() == pytest.approx([expected, 0.1])

    def test_generator_keeps_its_promises(self):
        answers = make_answers(4000, pass_rate=0.3, signal=1.5, overconfidence=2.0, noise=0.8, generator=0)
        assert answers.passed.double().mean().item() == pytest.approx(0.3, abs=0.03)
        logit = sequence_confidence(answers.token_logprobs).logit()
        right, wrong = logit[answers.passed], logit[~answers.passed]
        assert (right.mean() - wrong.mean()).item() == pytest.approx(1.5, abs=0.1)
        assert wrong.mean().item() == pytest.approx(2.0, abs=0.1)
        assert wrong.std().item() == pytest.approx(0.8, abs=0.1)
        assert {len(row) for row in answers.token_logprobs} == set(range(3, 13))
        assert 0.2 < answers.reflective_score.isnan().double().mean() < 0.45

    def test_file_there_and_back(self, tmp_path):
        answers = make_answers(30, generator=1)
        write_answers(tmp_path / "a.jsonl", answers)
        back = read_answers(tmp_path / "a.jsonl")
        assert back.task_id == answers.task_id
        assert torch.equal(back.passed, answers.passed)
        torch.testing.assert_close(back.reflective_score, answers.reflective_score, equal_nan=True)
        for a, b in zip(back.token_logprobs, answers.token_logprobs):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)

    def test_the_sample_is_what_the_generator_makes(self, tmp_path):
        write_answers(tmp_path / "a.jsonl", make_answers(400, generator=0))
        made, kept = (
            [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            for path in (tmp_path / "a.jsonl", sample_answers())
        )
        assert [row["passed"] for row in made] == [row["passed"] for row in kept]
        for a, b in zip(made, kept):
            assert a["token_logprobs"] == pytest.approx(b["token_logprobs"], abs=2e-4)

    @pytest.mark.parametrize(
        ("line", "match"),
        [
            ("nonsense", "line 2"),
            ("[1]", "line 2: expected an object"),
            ('{"task_id": "b", "passed": true}', "missing: token_logprobs"),
            ('{"task_id": "b", "token_logprobs": [0.9, 0.2], "passed": true}', "looks like probabilities"),
            ('{"task_id": "b", "token_logprobs": [NaN], "passed": true}', "NaN"),
            ('{"task_id": "b", "token_logprobs": [], "passed": true}', "at least one"),
            ('{"task_id": "b", "token_logprobs": [-1], "passed": "yes"}', "true or false"),
            ('{"task_id": "b", "token_logprobs": [-1], "passed": true, "reflective_score": 7}', "reflective_score"),
        ],
    )
    def test_bad_lines_are_named(self, tmp_path, line, match):
        good = '{"task_id": "a", "token_logprobs": [-0.5], "passed": false}'
        (tmp_path / "a.jsonl").write_text(f"{good}\n{line}\n")
        with pytest.raises(ValueError, match=match):
            read_answers(tmp_path / "a.jsonl")
        with pytest.raises(FileNotFoundError):
            read_answers(tmp_path / "none.jsonl")
        (tmp_path / "empty.jsonl").write_text("\n")
        with pytest.raises(ValueError, match="at least one answer"):
            read_answers(tmp_path / "empty.jsonl")

    def test_sums_and_a_model_that_knows_them(self):
        sums = make_arithmetic(300, generator=0)
        text = ["".join(sums.alphabet[c] for c in row) for row in torch.cat([sums.prompts, sums.answers], 1).tolist()]
        assert len(set(text)) == 300
        for row in text:
            a, b, c = int(row[:2]), int(row[3:5]), int(row[6:])
            assert a + b == c
        x, y = sums.windows()
        assert x.shape == (900, 8 * 12)
        assert x.sum(1).unique().tolist() == [6, 7, 8]
        x8, _ = sums.windows()
        table = {tuple(row.nonzero().squeeze(1).tolist()): int(label) for row, label in zip(x8, y)}

        def knows(inputs):
            flat = inputs.reshape(-1, inputs.shape[-1])
            answer = torch.tensor([table[tuple(row.nonzero().squeeze(1).tolist())] for row in flat])
            logits = 9.0 * nn.functional.one_hot(answer, 12)
            return logits.view(*(inputs.shape[:-1] if inputs.dim() == 3 else (1, len(inputs))), 12)

        written, logprobs = complete(knows, sums)
        assert torch.equal(written[0], sums.answers)
        assert logprobs.shape == (1, 300, 3)
        assert logprobs.max() < 0


class TestRaters:
    @pytest.mark.parametrize("std", [0.0, 0.05, 0.3, 0.7, 1.5])
    def test_the_mean_is_exact_everywhere(self, std):
        mean = torch.linspace(1, 5, 401, dtype=torch.float64)
        p = discretize_gaussian(mean, torch.full_like(mean, std))
        assert p.min() >= 0
        torch.testing.assert_close(p.sum(1), torch.ones_like(mean))
        torch.testing.assert_close(expected_score(p), mean, atol=1e-6, rtol=0)

    def test_without_the_repair_the_ends_are_biased(self):
        p = discretize_gaussian([1.2, 3.0], [0.6, 0.6], fix_mean=False)
        score = expected_score(p)
        assert score[0] > 1.3
        assert score[1].item() == pytest.approx(3)

    def test_bin_masses(self):
        q = discretize_gaussian([2.6], [0.8], fix_mean=False)[0]
        mass = norm.cdf(torch.arange(1, 6) + 0.5, 2.6, 0.8) - norm.cdf(torch.arange(1, 6) - 0.5, 2.6, 0.8)
        assert q.tolist() == pytest.approx((mass / mass.sum()).tolist(), abs=1e-6)

    def test_the_middle_is_no_exception(self):
        near = discretize_gaussian([3.0, 3.0 + 1e-5], [1.0, 1.0])
        torch.testing.assert_close(near[0], near[1], atol=1e-4, rtol=0)

    def test_spread_survives_in_the_middle(self):
        spread = score_spread(discretize_gaussian([3.0], [0.6]))
        assert spread.item() == pytest.approx((0.36 + 1 / 12) ** 0.5, abs=0.02)  # Sheppard: bins add 1 / 12
        assert score_spread(two_point_label([3.0])).item() < 1e-6

    def test_most_labels_keep_their_spread(self):
        generator = torch.Generator().manual_seed(0)
        mean = 1 + 4 * torch.rand(2000, generator=generator, dtype=torch.float64)
        std = 0.3 + 0.3 * torch.rand(2000, generator=generator, dtype=torch.float64)
        inner = (mean > 1.5) & (mean < 4.5)
        found = score_spread(discretize_gaussian(mean, std))[inner]
        assert (found - (std[inner].square() + 1 / 12).sqrt()).abs().mean() < 0.05

    def test_where_nothing_is_negative_it_is_the_affine_repair(self):
        mean, std = 2.6, 1.2
        q = norm.cdf(torch.arange(1, 6) + 0.5, mean, std) - norm.cdf(torch.arange(1, 6) - 0.5, mean, std)
        levels = torch.arange(1, 6).numpy()
        alpha = (mean - 3) / (q @ (levels - 3))
        expected = alpha * q + (1 - alpha * q.sum()) / 5
        assert expected.min() > 0
        assert discretize_gaussian([mean], [std])[0].tolist() == pytest.approx(expected.tolist(), abs=1e-6)

    def test_other_levels(self):
        p = discretize_gaussian([30.0], [10.0], levels=(0, 25, 50, 75, 100))
        assert expected_score(p, (0, 25, 50, 75, 100)).item() == pytest.approx(30, abs=1e-4)

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            (([6.0], [1.0]), "levels"),
            (([3.0], [-1.0]), "at least 0"),
            (([3.0, 2.0], [1.0]), "one length"),
            (([3.0], [1.0], (1, 2, 4)), "equal distances"),
            (([3.0], [1.0], (3, 2, 1)), "rising"),
        ],
    )
    def test_refused(self, arguments, match):
        with pytest.raises(ValueError, match=match):
            discretize_gaussian(*arguments)

    def test_fidelity_by_hand(self):
        loss = ThurstoneFidelityLoss(eps=0.0)
        mean, std = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
        target = torch.tensor([2.5, 1.0], dtype=torch.float64)
        p, q = norm.cdf(-1 / 2**0.5), norm.cdf(1.5 / 2**0.5)
        expected = 1 - (p * q) ** 0.5 - ((1 - p) * (1 - q)) ** 0.5
        assert loss(mean, std, target, std).item() == pytest.approx(expected)
        assert loss(mean, std, mean, std).item() == pytest.approx(0, abs=1e-12)

    def test_fidelity_ignores_scale_and_other_groups(self, generator):
        loss = ThurstoneFidelityLoss()
        mean, std = torch.randn(6, generator=generator), 0.5 + torch.rand(6, generator=generator)
        group = torch.tensor([0, 0, 0, 1, 1, 1])
        target = torch.where(group == 0, mean, 7 * mean - 100)
        spread = torch.where(group == 0, std, 7 * std)
        assert loss(mean, std, target, spread, group).item() == pytest.approx(0, abs=1e-6)
        assert loss(mean, std, target, spread).item() > 0.05
        assert loss(mean[:1], std[:1], target[:1], spread[:1]).item() == 0

    def test_fidelity_far_apart_has_a_finite_gradient(self):
        mean = torch.tensor([0.0, 80.0], requires_grad=True)
        value = ThurstoneFidelityLoss()(mean, torch.ones(2), torch.tensor([5.0, 0.0]), torch.ones(2))
        value.backward()
        assert value.item() == pytest.approx(1, abs=0.02)
        assert bool(torch.isfinite(mean.grad).all())


class TestQuality:
    def test_rank_metrics_do_not_see_a_bend(self, generator):
        truth = torch.rand(300, generator=generator, dtype=torch.float64) * 4 + 1
        p = (truth + 0.4 * torch.randn(300, generator=generator)).clamp(1.01, 5)
        scores = []
        for bend in (lambda x: x, lambda x: x**3, lambda x: 0.25 * x + 3, torch.exp):
            metric = IQAMetrics()
            metric.update(bend(p), truth)
            scores.append(metric.compute())
        for bent in scores[1:]:
            assert bent["SRCC"].item() == pytest.approx(scores[0]["SRCC"].item(), abs=1e-12)
            assert bent["KRCC"].item() == pytest.approx(scores[0]["KRCC"].item(), abs=1e-12)
            assert bent["MAE"] > scores[0]["MAE"]
        assert scores[2]["PLCC"].item() == pytest.approx(scores[0]["PLCC"].item(), abs=1e-12)

    def test_against_torchmetrics_and_in_batches(self, generator):
        from torchmetrics.functional import kendall_rank_corrcoef, pearson_corrcoef, spearman_corrcoef

        a, b = torch.randn(2, 120, generator=generator, dtype=torch.float64)
        b = b + a
        one, other = IQAMetrics(), IQAMetrics()
        one.update(a[:50], b[:50])
        other.update(a[50:], b[50:])
        one.merge_state(other)
        found = one.compute()
        assert found["SRCC"].item() == pytest.approx(spearman_corrcoef(a, b).item(), abs=1e-6)
        assert found["PLCC"].item() == pytest.approx(pearson_corrcoef(a, b).item(), abs=1e-6)
        assert found["KRCC"].item() == pytest.approx(kendall_rank_corrcoef(a, b).item(), abs=1e-6)

    def test_two_processes(self, tmp_path):
        script = """
from companion.calibration import IQAMetrics
x = torch.arange(40.0).sin()
y = x + 0.1 * torch.arange(40.0).cos()
part = slice(0, 15) if rank == 0 else slice(15, None)
metric = IQAMetrics()
metric.update(x[part], y[part])
out = metric.compute()
"""
        x = torch.arange(40.0).sin()
        whole = IQAMetrics()
        whole.update(x, x + 0.1 * torch.arange(40.0).cos())
        for file in run_two(script, tmp_path):
            for name, value in torch.load(file, weights_only=True).items():
                assert value.item() == pytest.approx(whole.compute()[name].item(), abs=1e-12)

    def test_logistic_keeps_the_order_and_mends_the_level(self, generator):
        truth = 1 + 4 * torch.rand(60, generator=generator, dtype=torch.float64)
        for bend in (lambda x: x**3, lambda x: 100 - 100 / x, lambda x: 0.01 * x):
            x = bend(truth)
            mapped = LogisticMap().fit(x, truth).transform(x)
            assert (mapped - truth).abs().mean() < 0.1
            assert spearmanr(mapped, truth).statistic == pytest.approx(1, abs=1e-12)
        low, high, _, width = LogisticMap().fit(-truth, truth).parameters_  # a falling relation: it cannot flip
        assert high > low
        assert width > 0

    def test_degrading(self, generator):
        images = make_quality_set(4, 48, generator=0).images
        assert torch.equal(degrade(images), images)
        blurred = degrade(images, blur=3.0)
        assert blurred.diff(dim=3).abs().mean() < 0.5 * images.diff(dim=3).abs().mean()
        noisy = degrade(torch.full((1, 1, 64, 64), 0.5), noise=0.1, generator=generator)
        assert noisy.std().item() == pytest.approx(0.1, abs=0.005)
        coarse = degrade(images, blocks=torch.tensor([0.0, 9.0, 9.0, 9.0]))
        torch.testing.assert_close(coarse[0], images[0], atol=1e-5, rtol=0)
        means = images[1:].reshape(3, 3, 6, 8, 6, 8).mean((3, 5))
        torch.testing.assert_close(coarse[1:, :, ::8, ::8], means, atol=1e-4, rtol=0)
        with pytest.raises(ValueError, match="divisible by 8"):
            degrade(torch.rand(1, 1, 20, 20), blocks=1.0)
        with pytest.raises(ValueError, match="noise"):
            degrade(images, noise=-1.0)

    def test_features_see_what_was_done(self):
        data = make_quality_set(60, 48, generator=0)
        features = quality_features(data.images)
        assert bool(torch.isfinite(features).all())
        assert (quality_features(degrade(data.images, noise=0.2)) - features).abs().mean() > 0.1
        assert 1 <= data.rated.min() <= data.rated.max() <= 5
        with pytest.raises(ValueError, match="16 pixels"):
            quality_features(torch.rand(1, 3, 8, 8))

    def test_ranks_and_macs(self):
        table = {"a": {"SRCC": 0.9, "MAE": 0.5}, "b": {"SRCC": 0.9, "MAE": 0.1}, "c": {"SRCC": 0.1, "MAE": 0.9}}
        assert rank_aggregate(table) == {"b": 1.25, "a": 1.75, "c": 3.0}
        with pytest.raises(ValueError, match="every entry"):
            rank_aggregate({"a": {"SRCC": 1.0}, "b": {"MAE": 1.0}})
        model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(8 * 36, 10))
        assert count_macs(model, (4, 8, 8)) == 8 * 36 * 2 * 9 + 8 * 36 * 10
        assert model.training

    def test_reader(self, tmp_path):
        (tmp_path / "a.csv").write_text("image,mos,mos_std,dataset\na.png,3.5,0.5,k\nb.png,2,1,l\n")
        scores = read_opinion_scores(tmp_path / "a.csv")
        assert scores.mos.tolist() == [3.5, 2]
        assert scores.mos_std.tolist() == [0.5, 1]
        assert scores.dataset == ["k", "l"]
        (tmp_path / "b.csv").write_text("image,mos\na.png,3.5\n")
        assert read_opinion_scores(tmp_path / "b.csv").mos_std is None
        for text, match in (("image\na", "missing: mos"), ("image,mos\n", "one row"), ("image,mos\na,x\n", "numbers")):
            (tmp_path / "c.csv").write_text(text)
            with pytest.raises(ValueError, match=match):
                read_opinion_scores(tmp_path / "c.csv")
        with pytest.raises(FileNotFoundError):
            read_opinion_scores(tmp_path / "none.csv")


class TestSegmenters:
    def test_iou(self):
        a = torch.zeros(3, 4, 4)
        b = torch.zeros(3, 4, 4)
        a[0, :2], b[0, 1:3] = 1, 1
        a[1, :2], b[1, 2:] = 0.7, 1
        assert mask_iou(a, b).tolist() == pytest.approx([1 / 3, 0, 1])
        assert error_types([0.0, 0.6, 0.9, 1.0])["polar negative"].item() == 0.25
        with pytest.raises(ValueError, match="one shape"):
            mask_iou(a, b[:1])

    def test_branches_fail_as_described(self):
        scenes = make_referring_scenes(1500, generator=0)
        a, b = mask_iou(scenes.top_down, scenes.target), mask_iou(scenes.bottom_up, scenes.target)
        wrong = a < 0.05
        assert wrong.double().mean().item() == pytest.approx(0.2, abs=0.04)
        assert a[~wrong].mean() > 0.85
        assert (b < 0.05).double().mean() < 0.01
        assert scenes.cues[wrong, 0].mean() > scenes.cues[~wrong, 0].mean() + 0.3

    def test_win_probability(self, generator):
        scores = torch.stack([torch.rand(50, 2, generator=generator), 0.1 + torch.rand(50, 2, generator=generator)], -1)
        exact = win_probability(scores)
        torch.testing.assert_close(win_probability(scores, 20_000, generator), exact, atol=0.02, rtol=0)
        assert torch.equal(exact > 0.5, scores[:, 0, 0] > scores[:, 1, 0])
        torch.testing.assert_close(win_probability(scores.flip(1)), 1 - exact)

    def test_hard_masks_make_mixing_a_choice(self, generator):
        a, b = (torch.rand(2, 30, 6, 6, generator=generator) > 0.5).float()
        weight = torch.rand(30, generator=generator)
        mixed = score_integration(a, b, weight) >= 0.5
        assert torch.equal(mixed, torch.where((weight >= 0.5)[:, None, None], a, b) >= 0.5)
        assert torch.equal(score_integration(a, b, torch.ones(30)), a)

    def test_scorer_learns_a_gaussian(self, generator):
        x = torch.randn(2000, 2, generator=generator)
        quality = torch.stack([0.5 + 0.2 * torch.randn(2000, generator=generator), torch.full((2000,), 0.3)], 1)
        quality[:, 1] += 0.05 * torch.randn(2000, generator=generator)
        model = GaussianScorer(2, seed=0)
        fit(model, x, quality, loss=gaussian_score_loss, epochs=30, lr=1e-2, device="cpu", generator=generator)
        scores = model(x).detach()
        assert scores[..., 0].mean(0).tolist() == pytest.approx([0.5, 0.3], abs=0.03)
        assert scores[..., 1].mean(0).tolist() == pytest.approx([0.2, 0.05], abs=0.02)
        pit = probability_integral(scores, quality)
        assert ((pit > 0.1) & (pit < 0.9)).double().mean().item() == pytest.approx(0.8, abs=0.04)
        with pytest.raises(ValueError, match="expected scores"):
            probability_integral(scores, quality[:5])
        with pytest.raises(ValueError, match="2, 2"):
            win_probability(scores[:, :1])

    def test_loss_is_the_normal_density(self):
        expected = -norm.logpdf([0.4, 0.9], [0.5, 0.5], [0.1, 0.3]).mean()
        scores = torch.tensor([[[0.5, 0.1], [0.5, 0.3]]])
        assert gaussian_score_loss(scores, torch.tensor([[0.4, 0.9]])).item() == pytest.approx(expected, abs=1e-5)

    def test_seed_leaves_the_global_state(self):
        before = torch.get_rng_state()
        one, two = GaussianScorer(2, seed=1), GaussianScorer(2, seed=1)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(one(torch.ones(1, 2)), two(torch.ones(1, 2)))


def test_cape_takes_the_floats_of_numpy():
    data = make_latent_probability(200, 3, generator=0)
    settings = {"warmup": 3, "epochs": 3, "random_state": 0}
    usual = CaPETrainer(MLP((3, 8, 1), seed=0), **settings).fit(data.x, data.y).predict_proba(data.x)
    wide = CaPETrainer(MLP((3, 8, 1), seed=0), **settings).fit(data.x.double().numpy(), data.y.numpy())
    probs = wide.predict_proba(data.x.double().numpy())
    assert probs.dtype == torch.float64
    torch.testing.assert_close(probs, usual.double())


def test_counting_leaves_each_part_in_its_mode():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout()).train()
    model[1].eval()
    count_macs(model, (1, 8, 8))
    assert [part.training for part in model.modules()] == [True, True, False, True]


def test_a_seed_is_a_generator():
    images, scores = torch.rand(2, 1, 8, 8), torch.rand(3, 2, 2)
    for draw in (lambda g: degrade(images, noise=0.1, generator=g), lambda g: win_probability(scores, 50, g)):
        assert torch.equal(draw(3), draw(torch.Generator().manual_seed(3)))


def test_a_score_for_each_quality():
    with pytest.raises(ValueError, match="expected scores"):
        gaussian_score_loss(torch.rand(4, 2, 2), torch.rand(4, 1))
