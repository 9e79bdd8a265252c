"""Tests of companion.report: figures against their chapters' functions, streams, files, models, verdicts, pages."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import companion
from companion.calibration import TemperatureScaler, expected_calibration_error
from companion.collapse import neural_collapse
from companion.data import FeatureShards
from companion.geometry import participation_ratio, simplex_etf
from companion.ranking import auroc
from companion.report import checkup, extract
from companion.report.answers import cramers_v
from companion.report.findings import Estimate, jackknife, verdict
from companion.report.patients import train_patients, train_wards
from companion.report.reading import read_groups
from companion.report.streaming import draw, part_of
from tests.processes import run_two

ROOT = Path(__file__).parents[1]
SEEDS = (0, 1, 2)


def cloud(n=2000, classes=4, dim=12, spread=0.5, seed=0):
    """Round classes at equal angles, with the logits of a linear layer that is not quite calibrated."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=g)
    means = simplex_etf(classes, dim, generator=g).float()
    h = means[y] + spread * torch.randn(n, dim, generator=g)
    weight, bias = 2 * means, 0.1 * torch.randn(classes, generator=g)
    return h, y, weight, bias


@pytest.fixture(scope="module")
def whole():
    """A check-up of everything at once, and what went in."""
    h, y, weight, bias = cloud()
    group = (torch.rand(len(y), generator=torch.Generator().manual_seed(1)) < 0.5).long()
    out = torch.randn(500, h.shape[1], generator=torch.Generator().manual_seed(2)) * 2
    found = checkup(h, y, logits=h @ weight.T + bias, weight=weight, bias=bias, groups={"site": group}, outliers=out)
    return found, h, y, weight, bias, group, out


@pytest.fixture(scope="module")
def clinic():
    """Three seeds of the four networks and their check-ups."""
    return [{name: checkup(**p.inputs()) for name, p in ward.items()} for ward in train_wards(SEEDS)]


# --- each figure is that of its chapter -------------------------------------------------------------------------------


def test_figures_are_those_of_the_chapters_functions(whole):
    found, h, y, weight, bias, _, _ = whole
    z = h @ weight.T + bias
    measures = neural_collapse(h, y, weight, bias)
    for key in ("nc1", "nc3", "nc4"):
        assert found[key].value == pytest.approx(float(measures[key]), rel=1e-4), key
    assert found["participation_ratio"].value == pytest.approx(float(participation_ratio(h)), rel=1e-4)
    assert found["ece"].value == pytest.approx(float(expected_calibration_error(z.softmax(1), y)), rel=1e-5)
    assert found["temperature"].value == pytest.approx(float(TemperatureScaler().fit(z, y).temperature_), rel=1e-5)
    right = (z.argmax(1) == y).double()
    assert found["accuracy"].value == pytest.approx(float(right.mean()))
    confidence = z.softmax(1).amax(1).double()
    assert found["overconfidence"].value == pytest.approx(float(confidence.mean() - right.mean()), abs=1e-6)


def test_class_and_group_gaps_are_those_counted_by_hand(whole):
    found, h, y, weight, bias, group, _ = whole
    right = ((h @ weight.T + bias).argmax(1) == y).double()
    by_class = torch.stack([right[y == c].mean() for c in range(4)])
    assert found["class_gap"].value == pytest.approx(float(right.mean() - by_class.min()))
    gaps = [float(by_class[c] - right[(y == c) & (group == g)].mean()) for c in range(4) for g in range(2)]
    assert found["group_gap/site"].value == pytest.approx(max(gaps))


def test_the_distance_to_the_classes_is_mahalanobis(whole):
    found, h, y, _, _, _, out = whole
    means = torch.stack([h[y == c].mean(0) for c in range(4)]).double()
    centred = h.double() - means[y]
    inverse = torch.linalg.inv(centred.T @ centred / len(h))

    def distance(x):
        delta = x.double()[:, None] - means
        return torch.einsum("mcd,de,mce->mc", delta, inverse, delta).amin(1)

    scores = torch.cat([distance(h), distance(out)])
    truth = torch.cat([torch.zeros(len(h)), torch.ones(len(out))])
    assert found["ood_auroc"].value == pytest.approx(float(auroc(scores, truth)), abs=0.005)


def test_features_far_from_the_origin_lose_no_digits(whole):
    found, h, y, *_ = whole
    far = checkup(h.double() + 1e4, y)
    for key in ("participation_ratio", "nc1", "closest_classes"):
        assert far[key].value == pytest.approx(found[key].value, rel=1e-4), key


def test_no_row_vouches_for_itself():
    """With as many columns as rows, distances scored in sample would call anything else strange."""
    g = torch.Generator().manual_seed(0)
    x, other = torch.randn(120, 80, generator=g), torch.randn(400, 80, generator=g)
    assert 0.4 < checkup(x, outliers=other)["ood_auroc"].value < 0.6


def test_nc1_of_round_classes_is_the_formula_behind_its_range():
    c, sigma, dim = 6, 0.2, 40
    g = torch.Generator().manual_seed(0)
    y = torch.arange(60_000) % c
    h = simplex_etf(c, dim, generator=g)[y] + sigma * torch.randn(len(y), dim, generator=g)
    finding = checkup(h, y)["nc1"]
    assert finding.value == pytest.approx((c - 1) ** 2 * sigma**2 / c, rel=0.03)
    spreads = float((2 * c / (c - 1)) ** 0.5 / 2 / sigma)  # half the distance of two means, in spreads
    assert f"lie {spreads:.1f} spreads" in finding.meaning


def test_a_participation_ratio_below_two_means_one_direction_with_more_than_half():
    for share in (0.51, 0.6, 0.9):
        values = torch.tensor([share, *[(1 - share) / 99] * 99])
        assert values.max() > 0.5
        x = torch.randn(4000, 100, generator=torch.Generator().manual_seed(0)) * values.sqrt()
        ratio = checkup(x)["participation_ratio"].value
        assert ratio == pytest.approx(1 / float(values.square().sum()), rel=0.1)
    assert checkup(x)["participation_ratio"].verdict == "alarm"


def test_intrinsic_dimension_is_normal_for_a_sheet_and_not_for_noise(generator):
    flat = torch.rand(1500, 2, generator=generator)
    sheet = torch.cat([torch.sin(6 * flat[:, :1] * k + flat[:, 1:] * (3 - k)) for k in range(4)], 1)
    found = checkup(sheet)["intrinsic_dimension"]
    assert found.verdict == "ok"
    assert found.low < 2.2 < found.normal_high
    cube = torch.rand(1500, 8, generator=generator)
    assert checkup(torch.cat([cube, cube[:1]]))["intrinsic_dimension"].value > 5


def test_cramers_v_ends_and_chance(generator):
    a = torch.randint(5, (4000,), generator=generator)
    assert float(cramers_v(a, a)) == pytest.approx(1)
    assert float(cramers_v(a, a[torch.randperm(4000, generator=generator)])) < 0.03
    assert float(cramers_v(a, torch.zeros_like(a))) == 0


def test_predictions_that_copy_the_group_are_seen(generator):
    y, g = torch.randint(4, (2, 3000), generator=generator)
    probs = torch.full((3000, 4), 0.05).scatter_(1, g[:, None], 0.85)
    found = checkup(torch.randn(3000, 5, generator=generator), y, probs=probs, groups={"g": g})
    assert found["follows_group/g"].value > 0.95
    assert found["follows_group/g"].verdict == "alarm"


# --- verdicts and intervals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimate", "low", "high", "says"),
    [
        (Estimate(1.0), None, None, "note"),
        (Estimate(1.0), 0.5, 2.0, "ok"),
        (Estimate(1.0, 0.2, 1.2), 0.5, None, "ok"),
        (Estimate(0.4, 0.2, 0.6), 0.5, None, "watch"),
        (Estimate(0.4, 0.2, 0.45), 0.5, None, "alarm"),
        (Estimate(3.0, 2.5, 3.5), None, 2.0, "alarm"),
        (Estimate(3.0, 1.5, 3.5), None, 2.0, "watch"),
        (Estimate(3.0), None, 2.0, "alarm"),
        (Estimate(2.0), None, 2.0, "ok"),
    ],
)
def test_verdict(estimate, low, high, says):
    assert verdict(estimate, low, high) == says


def test_jackknife_of_a_mean_is_its_standard_error(generator):
    x = torch.randn(8000, generator=generator, dtype=torch.float64) + 10
    parts = x.view(8, -1)
    without = [float((x.sum() - p.sum()) / 7000) for p in parts]
    found = jackknife(float(x.mean()), without)
    expected = float(parts.mean(1).std() / 8**0.5) * 2.3646  # t with seven degrees of freedom
    assert found.high - found.value == pytest.approx(expected, rel=0.01)
    assert jackknife(1.0, [1.0, float("nan"), 1.0]) == Estimate(1.0)


def test_a_calibrated_model_is_called_so_whatever_its_size():
    """The range holds what a calibrated model shows by chance: few false alarms with few rows and with many."""
    for n in (60, 300, 3000):
        states = []
        for seed in range(20):
            g = torch.Generator().manual_seed(seed)
            z = 1.5 * torch.randn(n, 3, generator=g)
            y = torch.multinomial(z.softmax(1), 1, generator=g).squeeze(1)
            states.append(checkup(torch.randn(n, 2, generator=g), y, logits=z).verdicts())
        assert sum(s["ece"] == "ok" for s in states) >= 19
        assert sum(s["overconfidence"] != "alarm" for s in states) >= 19
        assert sum(s.get("temperature") != "alarm" for s in states) >= 19


def test_equal_groups_raise_no_alarm_although_one_is_always_the_worst():
    states = []
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        y, site = torch.randint(4, (2, 1600), generator=g)
        said = torch.where(torch.rand(1600, generator=g) < 0.8, y, (y + 1) % 4)
        probs = torch.full((1600, 4), 0.2 / 3).scatter_(1, said[:, None], 0.8)
        states.append(checkup(torch.randn(1600, 2, generator=g), y, probs=probs, groups={"site": site}).verdicts())
    for key in ("class_gap", "group_gap/site", "follows_group/site"):
        assert sum(s[key] == "ok" for s in states) >= 19, key


def test_intervals_cover():
    """The intervals of streamed geometry and of the confidence gap cover the truth about as often as they say."""
    hits = {"participation_ratio": 0, "overconfidence": 0}
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(3000, 5, generator=g) * torch.tensor([2.0, 1, 1, 1, 1])
        z = 2 * torch.randn(3000, 3, generator=g)
        y = torch.multinomial(z.softmax(1), 1, generator=g).squeeze(1)
        found = checkup(x, y, logits=z)
        for key, truth in (("participation_ratio", 64 / 20), ("overconfidence", 0.0)):
            hits[key] += found[key].low <= truth <= found[key].high
    assert all(count >= 52 for count in hits.values()), hits


# --- the four networks ------------------------------------------------------------------------------------------------

OWN = {
    "overconfident": ("temperature", "overconfidence"),
    "shortcut": ("group_gap/colour", "follows_group/colour"),
    "minority": ("class_gap",),
}


def test_the_healthy_network_raises_no_alarm(clinic):
    for found in clinic:
        assert "alarm" not in found["healthy"].verdicts().values(), str(found["healthy"])


@pytest.mark.parametrize("name", OWN)
def test_each_sick_network_is_told_by_its_own_rows(clinic, name):
    for found in clinic:
        for key in OWN[name]:
            assert found[name][key].verdict == "alarm", key
        for other in set(OWN) - {name}:
            telling = OWN[other][0]
            assert found[name][telling].verdict != "alarm", f"{name} is taken for {other}"


def test_the_healthy_and_the_sick_read_the_same_images(clinic):
    patients = train_patients(SEEDS[0])
    for patient in patients.values():
        assert torch.equal(patient.test.images, patients["healthy"].test.images)
    again = checkup(**patients["shortcut"].inputs())
    assert again.verdicts() == clinic[0]["shortcut"].verdicts()
    with pytest.raises(ValueError, match="at least one seed"):
        train_wards([])


# --- what goes in -----------------------------------------------------------------------------------------------------


def same(a, b, rel=1e-6):
    assert [f.key for f in a.findings] == [f.key for f in b.findings]
    for x, y in zip(a.findings, b.findings):
        assert x.value == pytest.approx(y.value, rel=rel, abs=1e-7), x.key
        assert x.verdict == y.verdict


@pytest.fixture
def files(tmp_path):
    """The same features and logits in every kind of file."""
    h, y, weight, bias = cloud(n=900)
    z = h @ weight.T + bias
    np.save(tmp_path / "h.npy", h.numpy())
    np.save(tmp_path / "y.npy", y.numpy())
    np.save(tmp_path / "z.npy", z.numpy())
    np.savez(tmp_path / "run.npz", h=h.numpy(), y=y.numpy(), z=z.numpy(), w=weight.numpy(), b=bias.numpy())
    save_file({"h": h, "z": z.contiguous(), "y": y}, tmp_path / "run.safetensors")
    for name, x in (("hs", h), ("zs", z), ("ys", y)):
        (tmp_path / name).mkdir()
        for i, part in enumerate(x.split(250)):
            np.save(tmp_path / name / f"part{i}.npy", part.numpy())
    return tmp_path, h, y, z, weight, bias


def test_files_give_what_tensors_give(files):
    folder, h, y, z, weight, bias = files
    plain = checkup(h, y, logits=z, weight=weight, bias=bias)
    same(plain, checkup(h.numpy(), y.tolist(), logits=z.numpy(), weight=weight, bias=bias))
    same(
        plain,
        checkup(
            folder / "h.npy",
            folder / "y.npy",
            logits=str(folder / "z.npy"),
            weight=f"{folder}/run.npz:w",
            bias=f"{folder}/run.npz:b",
        ),
    )
    for kind in ("npz", "safetensors"):
        run = f"{folder}/run.{kind}"
        same(plain, checkup(f"{run}:h", f"{run}:y", logits=f"{run}:z", weight=weight, bias=bias))
    shards = checkup(FeatureShards(folder / "hs"), folder / "ys", logits=folder / "zs", weight=weight, bias=bias)
    same(plain, shards)


def test_probabilities_and_the_last_layer_stand_in_for_logits(files):
    _, h, y, z, weight, bias = files
    plain = checkup(h, y, logits=z)
    probs = checkup(h, y, probs=z.softmax(1))
    assert probs["ece"].value == pytest.approx(plain["ece"].value, rel=1e-5)
    assert "logits" in probs.why_not("temperature")
    head = checkup(h, y, weight=weight, bias=bias)
    assert head["ece"].value == pytest.approx(plain["ece"].value, rel=1e-5)


def test_less_input_gives_fewer_figures_and_reasons(files):
    _, h, y, _, _, _ = files
    alone = checkup(h)
    assert {f.theme for f in alone.findings} == {"dimensionality"}
    for what in ("collapse", "calibration", "groups", "strangers"):
        assert alone.why_not(what)
    assert "weight" in checkup(h, y).why_not("nc3")


def test_everything_is_read_once_and_in_pieces(files, monkeypatch):
    folder, h, y, z, _, _ = files
    plain = checkup(h, y, logits=z)
    monkeypatch.setattr("companion.report.streaming.NUMBERS", 0)
    asked = {"hs": [], "zs": []}

    class Watched(FeatureShards):
        def rows(self, start, stop):
            asked[self.path.name].append((start, stop))
            return super().rows(start, stop)

    same(plain, checkup(Watched(folder / "hs"), y, logits=Watched(folder / "zs")))
    for pieces in asked.values():
        assert pieces == [(0, 256), (256, 512), (512, 768), (768, 900)]


def test_half_precision_and_float64(files):
    _, h, y, z, _, _ = files
    plain = checkup(h, y, logits=z)
    for dtype, rel in ((torch.float64, 1e-4), (torch.float16, 2e-2)):
        other = checkup(h.to(dtype), y, logits=z.to(dtype))
        for key in ("nc1", "participation_ratio", "accuracy"):
            assert other[key].value == pytest.approx(plain[key].value, rel=rel), key


def test_a_device_gives_what_the_cpu_gives(device, files):
    _, h, y, z, weight, bias = files
    inputs = {"logits": z, "weight": weight, "bias": bias, "outliers": 2 * h}
    same(checkup(h, y, device="cpu", **inputs), checkup(h, y, device=device, **inputs), rel=1e-4)


def test_inputs_are_left_alone(files):
    _, h, y, z, _, _ = files
    kept = h.clone(), y.clone(), z.clone()
    state = torch.random.get_rng_state()
    checkup(h, y, logits=z, outliers=h[:100] + 1)
    assert all(torch.equal(a, b) for a, b in zip(kept, (h, y, z)))
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator moved"


def test_groups_of_all_kinds():
    values = ["b", "a", "b"]
    for groups in ({"g": values}, {"g": np.array(values)}, {"g": [True, False, True]}, {"g": (2, 1, 2)}):
        codes, names = read_groups(groups, 3)["g"]
        assert codes.tolist() == [1, 0, 1]
        assert len(names) == 2
    assert list(read_groups(np.array([[0, 1], [1, 1]]), 2)) == ["group0", "group1"]
    assert list(read_groups(torch.tensor([0, 1]), 2)) == ["group"]


def test_groups_from_a_data_frame_and_from_a_csv_file(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"site": ["x", "y", "x"], "age, years": [1, 2, 1]})
    frame.to_csv(tmp_path / "groups.csv", index=False)
    for groups in (frame, tmp_path / "groups.csv"):
        read = read_groups(groups, 3)
        assert [codes.tolist() for codes, _ in read.values()] == [[0, 1, 0], [0, 1, 0]]
        assert list(read) == ["site", "age, years"]


def test_missing_groups_are_named_whatever_stands_for_them():
    pandas = pytest.importorskip("pandas")
    for missing in (None, float("nan"), pandas.NA):
        with pytest.raises(ValueError, match="'site', got missing"):
            read_groups({"site": ["x", missing, "y"]}, 3)
    with pytest.raises(ValueError, match="'site', got missing"):
        read_groups({"site": pandas.Series(["x", None, "y"], dtype="string")}, 3)


def test_classes_without_rows_and_a_single_class(files):
    _, h, y, z, weight, bias = files
    few = y < 3
    found = checkup(h[few], y[few], logits=z[few], weight=weight, bias=bias)
    assert "nc1" in found
    assert "no rows" in found.why_not("nc3")
    one = checkup(h[y == 1], y[y == 1], logits=z[y == 1])
    assert "two classes" in one.why_not("collapse")
    assert one["accuracy"].value > 0.5


def test_constant_features_copies_and_few_rows_are_reasons_not_errors():
    y = torch.arange(60) % 3
    constant = checkup(torch.ones(60, 4), y, outliers=torch.zeros(5, 4))
    assert "same" in constant.why_not("dimensionality")
    assert constant.why_not("collapse")
    assert constant.why_not("strangers")
    copies = checkup(torch.eye(3).repeat(40, 1), torch.arange(120) % 3)
    assert "distinct" in copies.why_not("intrinsic_dimension")
    tiny = checkup([[0.0, 1.0], [1.0, 0.0]], [0, 1], logits=[[3.0, 0.0], [0.0, 3.0]])
    assert tiny["accuracy"].value == 1


# --- models -----------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.drop = nn.Dropout(0.5)
        self.hidden = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.drop(torch.relu(self.hidden(self.conv(x).mean((2, 3))))))


@pytest.fixture
def small():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Small()
        x, y = torch.randn(330, 1, 6, 6), torch.randint(3, (330,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=64)
    return model, loader, x, y


def test_a_model_and_its_loader(small):
    model, loader, x, y = small
    model.train()
    found = checkup(model=model, loader=loader, device="cpu", outliers=[torch.zeros(40, 1, 6, 6) + x[:40]])
    assert model.training, "the model was left in eval mode"
    assert not model.head._forward_pre_hooks
    model.eval()
    with torch.no_grad():
        h = torch.relu(model.hidden(model.conv(x).mean((2, 3))))
        plain = checkup(h, y, logits=model(x), weight=model.head.weight, bias=model.head.bias, outliers=h[:40])
    same(plain, found)


def test_a_named_layer_is_averaged_over_space(small, tmp_path):
    model, loader, x, _ = small
    found = extract(model, loader, tmp_path, layer="conv")
    assert found.weight is None
    saved = FeatureShards(found.features)
    with torch.no_grad():
        torch.testing.assert_close(saved.rows(0, len(saved)), model.conv(x).mean((2, 3)))
    assert "nc1" in checkup(model=model, loader=loader, layer="conv", device="cpu")


def test_parts_of_a_model_keep_their_own_mode(small, tmp_path):
    model, loader, *_ = small
    model.train()
    model.conv.eval()  # as people freeze a stem
    extract(model, loader, tmp_path)
    assert model.training
    assert not model.conv.training


def test_floats_of_a_loader_are_brought_to_the_precision_of_the_model(small, tmp_path):
    model, loader, *_ = small
    found = extract(model, [(x.double(), y) for x, y in loader], tmp_path / "double")
    expected = extract(model, loader, tmp_path / "single")
    first, second = (FeatureShards(f.features).rows(0, 330) for f in (found, expected))
    assert torch.equal(first, second)


def test_extraction_writes_shards(small, tmp_path, monkeypatch):
    monkeypatch.setattr("companion.report.reading._Writer.SHARD", 2000)
    model, loader, *_ = small
    found = extract(model, loader, tmp_path)
    assert len(list(found.features.iterdir())) > 2
    assert len(FeatureShards(found.features)) == 330


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"layer": "nothing"}, ValueError, "name of a module"),
        ({"loader": []}, ValueError, "at least one batch"),
        ({"loader": [{"x": 1}]}, TypeError, "expected batches"),
        ({"loader": None}, ValueError, "together"),
        ({"features": torch.zeros(3, 2)}, ValueError, "got both"),
        ({"layer": "unused"}, ValueError, "to be used"),
    ],
)
def test_models_that_do_not_fit(small, change, error, match):
    model, loader, *_ = small
    model.unused = nn.Identity()
    with pytest.raises(error, match=match):
        checkup(**{"model": model, "loader": loader, "device": "cpu", **change})


def test_a_model_in_two_processes_brings_its_own_rows(tmp_path, small):
    script = """
from companion.report import checkup
sys.path.insert(0, ".")
from tests.test_report import Small
torch.manual_seed(0)
model, x, y = Small(), torch.randn(330, 1, 6, 6), torch.randint(3, (330,))
mine = slice(0, 150) if rank == 0 else slice(150, 330)
found = checkup(model=model, loader=[(x[mine], y[mine])], device="cpu")
out = {f.key: f.value for f in found.findings}
"""
    model, loader, *_ = small
    alone = checkup(model=model, loader=loader, device="cpu")
    for file in run_two(script, tmp_path):
        together = torch.load(file, weights_only=True)
        assert together == pytest.approx({f.key: f.value for f in alone.findings}, rel=1e-5)


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_parts_have_no_pattern_and_samples_no_row_twice():
    for period in (8, 10, 64):
        counts = part_of(torch.arange(0, 64_000, period)).bincount(minlength=8)
        assert counts.min() > 0.85 * counts.sum() / 8
    rows = draw(100_000, 5000, 0)
    assert len(rows.unique()) == 5000
    assert torch.equal(rows, rows.sort().values)
    assert abs(float(rows.double().mean()) - 50_000) < 1500


def test_what_is_quadratic_uses_a_sample_and_says_so(generator):
    x = torch.randn(4000, 6, generator=generator)
    found = checkup(x, sample=400)
    assert found["intrinsic_dimension"].rows == 400
    assert found["participation_ratio"].rows == 4000
    more = checkup(x, sample=3000)["intrinsic_dimension"]
    narrow, wide = more.high - more.low, found["intrinsic_dimension"].high - found["intrinsic_dimension"].low
    assert narrow < wide
    assert checkup(x, sample=400, seed=1)["intrinsic_dimension"].value != found["intrinsic_dimension"].value


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_every_figure_links_a_chapter_of_the_book(whole):
    listed = (ROOT / "_toc.yml").read_text()
    for finding in whole[0].findings:
        assert f"book/{finding.chapter}.ipynb" in listed, finding.chapter
        assert finding.link.endswith(f"book/{finding.chapter}.ipynb")
        assert finding.normal
        assert finding.meaning.endswith(".")


def test_links_lead_to_a_site_where_one_is_named(whole, monkeypatch):
    monkeypatch.setenv("COMPANION_BOOK", "https://book.example/")
    assert whole[0]["ece"].link == "https://book.example/calibration/measuring-calibration.html"


def test_json_is_strict_and_complete(whole, tmp_path):
    found = whole[0]
    path = found.to_json(tmp_path / "report.json")
    record = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert record["verdicts"] == found.verdicts()
    assert {f["key"] for f in record["findings"]} == {f.key for f in found.findings}
    assert record["about"]["rows"] == 2000
    assert list(tmp_path.iterdir()) == [path], "a part was left behind"


class Loads(HTMLParser):
    """Everything a page would fetch."""

    def __init__(self, text):
        super().__init__()
        self.found, self.ids, self.alts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids.append(given.get("id"))
        if tag in ("script", "link", "iframe", "object", "embed"):
            self.found.append(tag)
        if tag == "img":
            self.alts.append(given.get("alt"))
        for name in ("src", "srcset", "data", "action", "poster", "xlink:href"):
            if given.get(name) and not given[name].startswith("data:image/png;base64,"):
                self.found.append(given[name])


def test_the_page_is_self_contained(whole, tmp_path):
    text = whole[0].to_html(tmp_path / "report.html").read_text()
    seen = Loads(text)
    assert seen.found == []
    assert not re.findall(r"url\(|@import", text)
    assert "prefers-color-scheme:dark" in text
    assert 'name="viewport"' in text
    assert all(len(alt.split()) > 5 for alt in seen.alts)
    assert seen.alts
    for finding in whole[0].findings:
        assert finding.key in seen.ids
        assert finding.link in text


def test_names_from_outside_are_text_not_markup(tmp_path):
    h, y, weight, bias = cloud(n=400)
    name = "<script>alert(1)</script>"
    found = checkup(h, y, weight=weight, bias=bias, groups={name: (y % 2).tolist()})
    for text in (found._repr_html_(), found.to_html(tmp_path / "r.html").read_text()):
        assert "<script" not in text
        assert "&lt;script&gt;" in text


def test_table_text_and_figure(whole):
    found = whole[0]
    table = found.table()
    assert [row["key"] for row in table] == [f.key for f in found.findings]
    assert "<table" in table._repr_html_()
    for finding in found.findings:
        assert finding.meaning in str(found)
    from matplotlib import pyplot as plt

    before = plt.get_fignums()
    plt.rcdefaults()
    style = plt.rcParams.copy()
    figure = found.figure()
    assert plt.rcParams == style, "the style of all other pictures changed"
    assert len(figure.axes) == 4
    plt.close(figure)
    assert plt.get_fignums() == before
    plt.close(checkup(whole[1]).figure())
    with pytest.raises(KeyError, match="there are"):
        found["nothing"]
    assert "nothing" not in found


def test_importing_the_companion_stays_light():
    code = "import sys, companion; print([m for m in ('torch', 'companion.report') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
    assert companion.checkup is checkup
    assert "checkup" in dir(companion)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"features": None}, ValueError, "expected features"),
        ({"features": "no such.npy"}, FileNotFoundError, "does not exist"),
        ({"features": torch.zeros(5)}, ValueError, r"\(n, d\)"),
        ({"features": torch.zeros(0, 3)}, ValueError, "at least one row"),
        ({"features": torch.full((5, 3), float("nan"))}, ValueError, "rows 0 to 4"),
        ({"labels": [0, 1]}, ValueError, "5 labels"),
        ({"labels": [0.0, 1, 2, 0, 1]}, TypeError, "whole numbers"),
        ({"labels": [0, 1, 2, 3, 0]}, ValueError, "up to 3"),
        ({"logits": torch.zeros(4, 3)}, ValueError, "5 rows"),
        ({"logits": torch.zeros(5, 1)}, ValueError, "two classes"),
        ({"probs": torch.ones(5, 3)}, ValueError, "got both"),
        ({"logits": None, "probs": torch.ones(5, 3)}, ValueError, "probabilities"),
        ({"logits": torch.full((5, 3), 1 / 3).double() + torch.tensor([0.1, -0.1, 0])}, ValueError, "looks like prob"),
        ({"weight": torch.zeros(3, 9)}, ValueError, r"\(C, 2\)"),
        ({"weight": torch.zeros(4, 2)}, ValueError, "as many columns"),
        ({"bias": torch.zeros(3)}, ValueError, "together"),
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(4)}, ValueError, "finite bias"),
        ({"groups": {"g": [1, 2]}}, ValueError, "5 values"),
        ({"groups": {}}, ValueError, "at least one column"),
        ({"groups": {"g": [1, None, 2, 1, 2]}}, ValueError, "missing"),
        ({"outliers": torch.zeros(3, 5)}, ValueError, "2 columns"),
        ({"sample": 0}, ValueError, "sample"),
        ({"seed": 1.5}, TypeError, "seed"),
        ({"device": "cuda:99"}, ValueError, "device"),
    ],
)
def test_bad_arguments_say_what_was_expected(change, error, match, generator):
    good = {
        "features": torch.randn(5, 2, generator=generator),
        "labels": [0, 1, 2, 0, 1],
        "logits": torch.randn(5, 3, generator=generator),
    }
    with pytest.raises(error, match=match):
        checkup(**{**good, **change})
