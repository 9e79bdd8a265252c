"""Group metrics and the subgroup report: exact counts, honest intervals, and nothing averaged away."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from companion.shortcuts import (
    MacroStd,
    SubgroupAccuracy,
    WorstGroupAccuracy,
    benjamini_hochberg,
    newcombe_interval,
    predicted_classes,
    subgroup_report,
    wilson_interval,
)

# --- intervals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 10), (3, 10), (10, 10), (57, 200)])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_wilson_agrees_with_scipy(k, n, level):
    low, high = wilson_interval(k, n, level)
    expected = stats.binomtest(k, n).proportion_ci(level, method="wilson")
    assert math.isclose(low.item(), expected.low, abs_tol=1e-12)
    assert math.isclose(high.item(), expected.high, abs_tol=1e-12)


def test_without_samples_nothing_is_known():
    low, high = wilson_interval([0], [0])
    assert (low.item(), high.item()) == (0, 1)
    low, high = newcombe_interval(0, 0, 5, 10)
    assert (low.item(), high.item()) == (-1, 1)


def test_wilson_covers_a_small_group(generator):
    k = torch.binomial(torch.full((4000,), 12.0), torch.tensor(0.9), generator=generator)
    low, high = wilson_interval(k, torch.full_like(k, 12))
    assert ((low <= 0.9) & (high >= 0.9)).double().mean() > 0.92


@pytest.mark.parametrize(("k", "n"), [(2, 1), (-1, 3)])
def test_intervals_refuse_impossible_counts(k, n):
    with pytest.raises(ValueError, match="0 <= successes <= counts"):
        wilson_interval(k, n)


def test_intervals_refuse_other_input():
    with pytest.raises(ValueError, match="one count per success"):
        wilson_interval([1, 2], [3])
    with pytest.raises(ValueError, match="level"):
        wilson_interval(1, 2, level=1.0)


def test_benjamini_hochberg_agrees_with_scipy(generator):
    p = torch.rand(200, generator=generator, dtype=torch.float64) ** 2
    expected = stats.false_discovery_control(p.numpy()) <= 0.1
    assert benjamini_hochberg(p, 0.1).tolist() == expected.tolist()


def test_benjamini_hochberg_skips_what_was_not_tested():
    flags = benjamini_hochberg([[0.001, float("nan")], [0.9, 0.02]])
    assert flags.tolist() == [[True, False], [False, True]]
    assert not benjamini_hochberg([float("nan")]).any()
    with pytest.raises(ValueError, match="p_values"):
        benjamini_hochberg([1.5])


# --- metrics ------------------------------------------------------------------------------------


def sample(generator, n=500, classes=4, groups=3, device="cpu"):
    y = torch.randint(classes, (n,), generator=generator)
    g = torch.randint(groups, (n,), generator=generator)
    p = torch.where(torch.rand(n, generator=generator) < 0.7, y, torch.randint(classes, (n,), generator=generator))
    return p.to(device), y.to(device), g.to(device)


def test_subgroup_accuracy_by_hand(device, generator):
    p, y, g = sample(generator, device=device)
    metric = SubgroupAccuracy(4).to(device)
    for rows in torch.arange(500, device=device).split(77):
        metric.update(p[rows], y[rows], g[rows])
    result = metric.compute()
    for group in range(3):
        rows = g == group
        assert result.counts[group] == rows.sum()
        assert torch.isclose(result.accuracy[group], (p == y)[rows].double().mean())
        assert result.low[group] < result.accuracy[group] < result.high[group]
    assert result.accuracy.device.type == device.type
    assert result.accuracy[3].isnan()
    assert (result.counts[3], result.low[3], result.high[3]) == (0, 0, 1)


def test_a_group_of_one_says_that_it_is_one():
    metric = SubgroupAccuracy(2)
    metric.update([1, 0, 0], [1, 0, 0], [0, 1, 1])
    result = metric.compute()
    assert result.counts.tolist() == [1, 2]
    assert result.accuracy[0] == 1
    assert result.low[0] < 0.25  # one right answer out of one is compatible with almost any accuracy


def test_logits_and_classes_are_the_same():
    logits = torch.tensor([[0.1, 2.0], [3.0, -1.0]])
    assert predicted_classes(logits).tolist() == [1, 0]
    a, b = SubgroupAccuracy(2), SubgroupAccuracy(2)
    a.update(logits, [1, 1], [0, 1])
    b.update([1, 0], [1, 1], [0, 1])
    assert torch.equal(a.compute().accuracy, b.compute().accuracy)


@pytest.mark.parametrize("make", [lambda: SubgroupAccuracy(3), lambda: WorstGroupAccuracy(3), lambda: MacroStd(4, 3)])
def test_metrics_merge_exactly(make, generator):
    p, y, g = sample(generator)
    whole, left, right = make(), make(), make()
    whole.update(p, y, g)
    left.update(p[:123], y[:123], g[:123])
    right.update(p[123:], y[123:], g[123:])
    # what torchmetrics does between processes: every state is summed
    assert set(left._reductions) == {"right", "total"}
    for name, reduce in left._reductions.items():
        setattr(left, name, reduce(torch.stack([getattr(left, name), getattr(right, name)])))
    left._update_count = 2
    for a, b in zip(whole.compute(), left.compute()):
        assert torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0))


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric MacroStd:UserWarning")  # asked for on purpose
def test_metrics_are_cloned_reset_and_forwarded(generator):
    p, y, g = sample(generator)
    metric = MacroStd(4, 3)
    first = metric(p[:200], y[:200], g[:200]).value
    metric(p[200:], y[200:], g[200:])
    whole = MacroStd(4, 3)
    whole.update(p, y, g)
    assert torch.equal(metric.compute().value, whole.compute().value)
    assert not torch.equal(first, whole.compute().value)
    metric.reset()
    with pytest.raises(ValueError, match="at least one sample"):
        metric.compute()


def test_worst_group_names_the_group_and_marks_the_small():
    metric = WorstGroupAccuracy(4, min_count=3)
    metric.update([0] * 9, [0, 0, 0, 1, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 2, 2, 2])
    metric.update([1], [0], [3])  # all wrong, but only one
    worst = metric.compute()
    assert (worst.group, worst.accuracy, worst.count) == (2, 0, 3)
    assert worst.low <= 0 < worst.high
    assert worst.skipped.tolist() == [False, False, False, True]


def test_worst_group_needs_one_large_enough():
    metric = WorstGroupAccuracy(2, min_count=5)
    metric.update([0], [0], [0])
    with pytest.raises(ValueError, match="at least 5 samples"):
        metric.compute()


def brute_macro_std(p, y, g):
    total = []
    for c in y.unique():
        rows = y == c
        right = (p == y)[rows].double()
        spread = sum(
            (g[rows] == b).double().mean() * (right[g[rows] == b].mean() - right.mean()) ** 2 for b in g[rows].unique()
        )
        total.append(spread.sqrt())
    return torch.stack(total).mean()


def test_macro_std_is_its_formula(device, generator):
    p, y, g = sample(generator, device=device)
    metric = MacroStd(4, 5).to(device)
    metric.update(p, y, g)
    result = metric.compute()
    assert torch.isclose(result.value, brute_macro_std(p, y, g))
    assert result.accuracy[:, 3:].isnan().all()
    assert (result.counts[:, 3:] == 0).all()


def test_macro_std_ignores_the_order_of_groups_and_classes(generator):
    p, y, g = sample(generator)
    order = torch.tensor([2, 0, 1])
    classes = torch.tensor([3, 1, 0, 2])
    a, b = MacroStd(4, 3), MacroStd(4, 3)
    a.update(p, y, g)
    b.update(classes[p], classes[y], order[g])
    assert torch.isclose(a.compute().value, b.compute().value)


def test_macro_std_of_even_groups_is_zero():
    metric = MacroStd(1, 2)
    metric.update([0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1])
    assert metric.compute().value == 0


def test_noise_is_the_exact_expectation_over_all_deals():
    correct, groups = torch.tensor([1, 1, 0, 1, 0, 0]), torch.tensor([0, 0, 0, 1, 1, 2])
    squares = []
    for order in itertools.permutations(range(6)):
        metric = MacroStd(2, 3)
        metric.update(1 - correct[list(order)], torch.zeros(6, dtype=torch.int64), groups)
        squares.append(metric.compute().per_class[0] ** 2)
    assert torch.isclose(torch.stack(squares).mean().sqrt(), metric.compute().noise)


def test_macro_std_says_which_class_it_never_saw():
    metric = MacroStd(3, 2)
    metric.update([0, 1, 1, 1], [0, 0, 1, 1], [0, 1, 0, 1])
    result = metric.compute()
    assert result.per_class[2].isnan()
    assert math.isclose(result.value.item(), 0.25)


@pytest.mark.parametrize(
    ("update", "match"),
    [
        (([0, 1], [0, 1], [0]), "2 groups"),
        (([0, 1], [0], [0, 1]), "2 labels"),
        (([0, 1], [0, 1], [0, 2]), "groups in 0..1"),
        (([0, 5], [0, 1], [0, 1]), "predictions in 0..1"),
        (([[0.0, float("nan")]], [0], [0]), "finite"),
        (([[0.0, 1.0, 2.0]], [0], [0]), "2 columns"),
    ],
)
def test_metrics_refuse_what_does_not_fit(update, match):
    with pytest.raises(ValueError, match=match):
        MacroStd(2, 2).update(*update)


def test_metrics_refuse_probabilities_as_labels():
    with pytest.raises(TypeError, match="whole numbers"):
        SubgroupAccuracy(2).update([0, 1], [0.2, 0.8], [0, 1])


# --- the report ------------------------------------------------------------------------------------


def planted(generator, n=3000, drop=0.3):
    """Recall falls by `drop` where site is B and age is old; nowhere else."""
    site, age = (torch.randint(2, (n,), generator=generator) for _ in range(2))
    y = torch.randint(3, (n,), generator=generator)
    right = torch.rand(n, generator=generator) < 0.9 - drop * ((site == 1) & (age == 1))
    p = torch.where(right, y, (y + 1) % 3)
    return p, y, {"site": ["AB"[i] for i in site], "age": ["old" if i else "young" for i in age]}


def test_report_finds_the_planted_group(generator):
    report = subgroup_report(*planted(generator))
    assert report.flagged[0].name == "site=B, age=old"
    assert report.worst.name == "site=B, age=old"
    assert report.flagged[0].gap < -0.15
    both = report.summaries[-1]
    assert both.attributes == ("site", "age")
    assert both.p_value < 0.01
    assert both.worst < both.worst_by_chance
    assert both.macro_std > 3 * both.macro_std_by_chance


def test_report_seldom_cries_wolf(generator):
    flagged = 0
    for _ in range(60):
        flagged += bool(subgroup_report(*planted(generator, 400, drop=0), n_permutations=10).flagged)
    assert flagged <= 8  # 5 % expected


def test_report_counts_match_the_metrics(generator):
    p, y, groups = planted(generator)
    report = subgroup_report(p, y, groups["site"])
    codes = torch.tensor([int(s == "B") for s in groups["site"]])
    metric, macro = SubgroupAccuracy(2), MacroStd(3, 2)
    metric.update(p, y, codes)
    macro.update(p, y, codes)
    assert [row.accuracy for row in report.rows] == metric.compute().accuracy.tolist()
    assert [row.low for row in report.rows] == metric.compute().low.tolist()
    assert math.isclose(report.summaries[0].macro_std, macro.compute().value)
    assert math.isclose(report.summaries[0].macro_std_by_chance, macro.compute().noise)


def test_class_mix_is_not_called_a_gap(generator):
    # group B holds the hard class; within each class both groups fare the same
    n = 4000
    g = torch.randint(2, (n,), generator=generator)
    y = (torch.rand(n, generator=generator) < torch.where(g == 1, 0.8, 0.2)).long()
    right = torch.rand(n, generator=generator) < torch.where(y == 1, 0.6, 0.95)
    report = subgroup_report(torch.where(right, y, 1 - y), y, g)
    a, b = report.rows
    assert b.accuracy < a.accuracy - 0.15
    assert abs(b.gap) < 0.03
    assert not report.flagged


def test_mantel_haenszel_agrees_with_simulation(generator):
    p, y, groups = planted(generator, n=120, drop=0.2)
    row = subgroup_report(p, y, groups["site"]).rows[1]
    inside = np.array([s == "B" for s in groups["site"]])
    right, rng = (p == y).numpy(), np.random.default_rng(0)
    observed, deals = right[inside].sum(), []
    for _ in range(4000):
        dealt = right.copy()
        for c in range(3):
            rows = np.flatnonzero(y.numpy() == c)
            dealt[rows] = dealt[rng.permutation(rows)]
        deals.append(dealt[inside].sum())
    deals = np.array(deals)
    exact = (np.abs(deals - deals.mean()) >= abs(observed - deals.mean()) - 1e-9).mean()
    assert abs(exact - row.p_value) < 0.04


def test_empty_single_and_small_groups_are_listed():
    site = ["A"] * 30 + ["B"] * 5 + ["C"]
    age = ["old"] * 30 + ["young"] * 6
    report = subgroup_report([0] * 36, [0] * 35 + [1], {"site": site, "age": age}, min_count=10)
    notes = {row.name: row.note for row in report.rows}
    assert notes["site=A"] == ""
    assert notes["site=B"] == "few"
    assert notes["site=C"] == "single"
    assert notes["site=A, age=young"] == "empty"
    empty = next(row for row in report.rows if row.note == "empty")
    assert math.isnan(empty.accuracy)
    assert (empty.low, empty.high, empty.count) == (0, 1, 0)
    assert math.isnan(empty.p_value)
    assert not empty.flagged
    assert report.worst.name == "site=A"  # C is all wrong, and one sample
    assert any("without samples" in w for w in report.warnings)
    assert any("single sample" in w for w in report.warnings)


def test_report_reads_tables(tmp_path, generator):
    pd = pytest.importorskip("pandas")
    p, y, groups = planted(generator, n=200)
    columns = {"pred": p.tolist(), "label": y.tolist(), **groups}
    frame = pd.DataFrame(columns)
    path = tmp_path / "results.csv"
    frame.to_csv(path, index=False)
    expected = str(subgroup_report(p, y, groups))
    names = ["site", "age"]
    rows = frame.to_dict("records")
    for table in (frame, columns, rows, path, str(path)):
        assert str(subgroup_report("pred", "label", names, table=table)) == expected
    assert str(subgroup_report(p, y, frame[names])) == expected
    one = subgroup_report("pred", "label", "site", table=frame)
    assert [row.name for row in one.rows] == ["site=A", "site=B"]


def test_report_takes_arrays_logits_and_any_labels():
    logits = np.array([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    a = subgroup_report(logits, [0, 1, 1], np.array([[0, 1], [0, 0], [1, 1]]), min_count=1)
    assert [row.name for row in a.rows[:2]] == ["group 0=0", "group 0=1"]
    b = subgroup_report(["cat", "dog", "cat"], ["cat", "dog", "dog"], torch.tensor([0, 0, 1]), min_count=1)
    assert [row.accuracy for row in b.rows] == [1.0, 0.0]
    c = subgroup_report([0, 1], [0, 1], [None, float("nan")], min_count=1)
    assert [row.name for row in c.rows] == ["group=missing"]


def test_report_shows_itself(generator):
    report = subgroup_report(*planted(generator))
    text, page = str(report), report._repr_html_()
    assert "site=B, age=old" in text
    assert "by chance alone" in text
    assert repr(report) == text
    assert "<table" in page
    assert "<script" not in page
    evil = subgroup_report([0, 1], [0, 1], ["<b>", "x"])._repr_html_()
    assert "<b>" not in evil
    assert report.to_rows()[0]["group"] == "site=A"


def test_report_is_the_same_twice(generator):
    given = planted(generator)
    assert str(subgroup_report(*given)) == str(subgroup_report(*given))


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "match"),
    [
        (([0, 1], [0], [0, 1]), {}, ValueError, "one prediction per label"),
        (([], [], []), {}, ValueError, "at least one"),
        (([0, 1], [0, 1], [0]), {}, ValueError, "2 values in group"),
        (([0, 1], [0, 1], {}), {}, ValueError, "group column"),
        (([0, None], [0, 1], [0, 1]), {}, ValueError, "missing"),
        ((["0"], [0], [0]), {}, TypeError, "one kind"),
        (("p", [0], [0]), {}, TypeError, "column of values"),
        (("p", "y", "g"), {"table": {"y": [0], "g": [0]}}, ValueError, "among y, g"),
        (("p", "y", "g"), {"table": 3}, TypeError, "expected a table"),
        (([0], [0], [[1]]), {}, TypeError, "hashable"),
        (([0], [0], [1]), {"min_count": 0}, ValueError, "min_count"),
        (([0], [0], [1]), {"level": 2}, ValueError, "level"),
    ],
)
def test_report_refuses(args, kwargs, error, match):
    with pytest.raises(error, match=match):
        subgroup_report(*args, **kwargs)


def test_missing_values_of_pandas_are_a_group():
    pandas = pytest.importorskip("pandas")
    for dtype, values in (("string", ["x", None, "y", "x"]), ("Int64", [1, None, 2, 1])):
        column = pandas.Series(pandas.array(values * 5, dtype=dtype))
        report = subgroup_report([1, 1, 0, 1] * 5, [1, 0, 0, 1] * 5, {"site": column}, min_count=2)
        assert [row.count for row in report.rows] == [10, 5, 5]
        assert report.rows[-1].name == "site=missing"
    labels = pandas.Series(pandas.array([1, None], dtype="Int64"))
    with pytest.raises(ValueError, match="no missing predictions or labels"):
        subgroup_report([1, 0], labels, ["a", "b"])


def test_logits_as_a_list_of_rows():
    logits = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    for rows in (list(logits), list(logits.numpy()), logits.bfloat16()):
        assert subgroup_report(rows, [1, 0, 0, 0], [0, 0, 1, 1]).overall.accuracy == 0.75
    assert subgroup_report(logits.argmax(1).bfloat16(), [1, 0, 0, 0], [0, 0, 1, 1]).overall.accuracy == 0.75
