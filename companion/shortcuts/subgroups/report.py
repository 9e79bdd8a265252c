"""The whole subgroup report from predictions, labels and group columns, as arrays or as a table.

Public: `subgroup_report` and what it returns: `SubgroupReport`, made of `GroupRow` and `AttributeSummary`.
"""

import csv
import html
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from companion.checks import check_generator, check_in_range, check_positive_int, is_missing
from companion.shortcuts.subgroups.intervals import benjamini_hochberg, wilson_interval

__all__ = ["AttributeSummary", "GroupRow", "SubgroupReport", "subgroup_report"]


@dataclass(frozen=True)
class GroupRow:
    """One group: who it is, how many, how accurate, and whether that is more than chance and class mix.

    `accuracy` is NaN for an empty group. `expected` is the accuracy the group would have if each class were recognised
    in it as well as everywhere; `gap` = accuracy - expected. `p_value` is that of the Mantel-Haenszel test stratified
    by class, NaN where there was no test; `flagged` is the Benjamini-Hochberg verdict over all groups tested. `note` is
    "empty", "single", "few" (below `min_count`) or "".
    """

    attributes: tuple[str, ...]
    values: tuple[Any, ...]
    count: int
    accuracy: float
    low: float
    high: float
    expected: float
    gap: float
    p_value: float
    flagged: bool
    note: str

    @property
    def name(self) -> str:
        """The group in words, such as `site=B, age=old`."""
        return ", ".join(f"{a}={v}" for a, v in zip(self.attributes, self.values))


@dataclass(frozen=True)
class AttributeSummary:
    """One attribute, or combination: the worst group, the spread, and both as chance alone would make them.

    `worst` is the lowest accuracy among groups of at least `min_count`; `worst_by_chance` its mean when the errors of
    each class fall on the groups at random, and `p_value` how often it is then as low. `macro_std` and
    `macro_std_by_chance` are those of `MacroStd`.
    """

    attributes: tuple[str, ...]
    groups: int
    worst_group: str
    worst: float
    worst_by_chance: float
    p_value: float
    macro_std: float
    macro_std_by_chance: float


@dataclass(frozen=True, repr=False)
class SubgroupReport:
    """What `subgroup_report` found; prints as text, shows as a table in a notebook.

    `overall` is the row of all samples together, `rows` has one row per group, `summaries` one per attribute and
    combination; `warnings` says in words what keeps the numbers from being read at face value.
    """

    overall: GroupRow
    rows: tuple[GroupRow, ...]
    summaries: tuple[AttributeSummary, ...]
    level: float
    min_count: int
    warnings: tuple[str, ...] = field(default=())

    @property
    def worst(self) -> GroupRow:
        """The least accurate group of at least `min_count` samples."""
        candidates = [row for row in self.rows if row.count >= self.min_count]
        return min(candidates, key=lambda row: row.accuracy) if candidates else self.overall

    @property
    def flagged(self) -> tuple[GroupRow, ...]:
        """The groups whose accuracy differs from expectation by more than chance, worst gap first."""
        return tuple(sorted((row for row in self.rows if row.flagged), key=lambda row: row.gap))

    def to_rows(self) -> list[dict[str, Any]]:
        """Return one flat dict per group, for `pandas.DataFrame(...)` or a file."""
        return [{"group": row.name, **asdict(row)} for row in self.rows]

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        names = ["group", "n", "accuracy", f"{self.level:.0%} interval", "gap", "p", ""]
        body = []
        for row in (self.overall, *self.rows):
            gap = "" if math.isnan(row.gap) or row is self.overall else f"{100 * row.gap:+.1f}"
            p = "" if math.isnan(row.p_value) else (f"{row.p_value:.3f}" if row.p_value >= 1e-3 else "<0.001")
            accuracy = "none" if math.isnan(row.accuracy) else f"{100 * row.accuracy:.1f} %"
            mark = row.note or ("differs" if row.flagged else "")
            interval = f"{100 * row.low:.1f} to {100 * row.high:.1f}"
            body.append([row.name or "all", str(row.count), accuracy, interval, gap, p, mark])
        return names, body

    def _sentences(self) -> list[str]:
        lines = []
        for s in self.summaries:
            what = " x ".join(s.attributes)
            if math.isnan(s.worst):
                lines.append(f"{what}: no two groups of at least {self.min_count} samples to compare.")
                continue
            lines.append(
                f"{what}: worst group {s.worst_group} at {100 * s.worst:.1f} %; by chance alone the worst of "
                f"{s.groups} would be at {100 * s.worst_by_chance:.1f} % (p {_p(s.p_value)}). "
                f"MacroStd {s.macro_std:.3f}, by chance {s.macro_std_by_chance:.3f}."
            )
        return [*lines, *(f"Note: {w}" for w in self.warnings)]

    def __str__(self) -> str:
        names, body = self._cells()
        widths = [max(len(row[i]) for row in [names, *body]) for i in range(len(names))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in [names, *body]]
        return "\n".join([*lines, *self._sentences()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        names, body = self._cells()
        style = 'style="text-align:left;padding:.2em 1.2em .2em 0"'
        head = "".join(f'<th scope="col" {style}>{html.escape(n)}</th>' for n in names)
        rows = "\n".join("<tr>" + "".join(f"<td {style}>{html.escape(c)}</td>" for c in row) + "</tr>" for row in body)
        notes = "".join(f'<p style="margin:.3em 0">{html.escape(line)}</p>' for line in self._sentences())
        return f'<table class="companion-table"><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table>{notes}'


def _p(p: float) -> str:
    return "< 0.001" if p < 1e-3 else f"= {p:.3f}"


def _column(values: Any, name: str) -> list[Any]:
    """Return a column as plain Python values, with None for what is missing."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"expected {name} to be a column of values, got {type(values).__name__}")
    if getattr(values, "ndim", 1) != 1:
        raise ValueError(f"expected {name} of shape (n,), got shape {tuple(values.shape)}")
    plain = values.tolist() if hasattr(values, "tolist") else list(values)
    if any(v.__hash__ is None for v in plain):
        raise TypeError(
            f"expected hashable values in {name}, got a {next(type(v).__name__ for v in plain if v.__hash__ is None)}"
        )
    return [None if is_missing(v) else v for v in plain]


def _read(table: Any) -> dict[str, Any]:
    """Return the columns of a data frame, a mapping, a list of rows or a csv file."""
    if isinstance(table, str | Path):
        with open(table, newline="", encoding="utf-8") as file:
            table = list(csv.DictReader(file))
    if isinstance(table, Mapping):
        return {str(name): column for name, column in table.items()}
    if hasattr(table, "columns") and hasattr(table, "__getitem__"):
        return {str(name): table[name].to_numpy() for name in table.columns}
    if isinstance(table, Sequence) and table and all(isinstance(row, Mapping) for row in table):
        names = list(table[0])
        if any(set(row) != set(names) for row in table):
            raise ValueError("expected the same columns in each row of the table, got different ones")
        return {str(name): [row[name] for row in table] for name in names}
    raise TypeError(
        f"expected a table: a data frame, a mapping of columns, rows or a csv file, got {type(table).__name__}"
    )


def _from_table(columns: Mapping[str, Any], given: Any, role: str) -> Any:
    if isinstance(given, str):
        if not columns:
            raise TypeError(f"expected {role} to be a column of values, or a name with table=..., got {given!r} alone")
        if given not in columns:
            raise ValueError(f"expected {role} to name a column among {', '.join(columns)}, got {given!r}")
        return columns[given]
    return given


def _named_groups(groups: Any) -> dict[str, list[Any]]:
    if hasattr(groups, "columns"):
        groups = _read(groups)
    if isinstance(groups, Mapping):
        return {str(name): _column(column, str(name)) for name, column in groups.items()}
    if getattr(groups, "ndim", 1) == 2:
        return {f"group {i}": _column(groups[:, i], f"group {i}") for i in range(groups.shape[1])}
    return {"group": _column(groups, "groups")}


def _codes(values: list[Any]) -> tuple[np.ndarray, list[Any]]:
    """Return whole numbers for values, and the values in order (by themselves where they sort, else by appearance)."""
    distinct = list(dict.fromkeys(values))
    try:
        distinct.sort(key=lambda v: (v is None, v))
    except TypeError:
        distinct.sort(key=lambda v: (v is None, str(v)))
    place = {value: i for i, value in enumerate(distinct)}
    return np.array([place[v] for v in values]), ["missing" if v is None else v for v in distinct]


def subgroup_report(
    predictions: Any,
    labels: Any,
    groups: Any,
    *,
    table: Any = None,
    intersections: int = 2,
    min_count: int = 20,
    level: float = 0.95,
    rate: float = 0.05,
    n_permutations: int = 1000,
    generator: torch.Generator | int | None = 0,
) -> SubgroupReport:
    """Report accuracy by group, by combination of groups, and what chance and class mix explain of it.

    For every value of every group column, and every combination of columns up to `intersections`: count, accuracy,
    Wilson interval; the gap to what the group's class mix leads to expect, tested by Mantel-Haenszel within classes and
    judged over all groups at once (Benjamini-Hochberg). Per column: the worst group and MacroStd, each beside the value
    that chance alone would give. Combinations without samples, groups of one and groups below `min_count` are listed;
    the last two are neither tested nor called worst.

    Args:
        predictions: predicted classes (n,), of any kind that compares with the labels; or logits or probabilities
            (n, C), with labels 0..C-1; or the name of a column of `table`.
        labels: true classes (n,), or the name of a column.
        groups: one column (n,), several as a mapping by name, as an array (n, k) or as a data frame, or a list of
            names of columns of `table`. Values may be anything hashable; missing ones are a group of their own.
        table: a data frame, a mapping of columns, a list of rows or the path of a csv file (whose values are text).
        intersections: how many columns to combine at most; 1 for none.
        min_count: below this a group is listed, not judged.
        level: of the intervals.
        rate: false discovery rate of the flags.
        n_permutations: for the values by chance.
        generator: draws the permutations.

    Returns:
        `SubgroupReport`.

    Raises:
        ValueError: columns of different lengths, no samples, an unknown column, missing predictions or labels.
        TypeError: something that is no column or no table.

    >>> report = subgroup_report([1, 1, 0, 0], [1, 1, 1, 0], {"site": ["A", "A", "B", "B"]}, min_count=2)
    >>> [(row.name, row.count, row.accuracy) for row in report.rows]
    [('site=A', 2, 1.0), ('site=B', 2, 0.5)]

    Paper: gustafson2023facet
    Paper: chiu2023better
    Chapter: shortcuts/subgroups
    """
    intersections, min_count = (
        check_positive_int(intersections, "intersections"),
        check_positive_int(min_count, "min_count"),
    )
    level = check_in_range(level, "level", 0, 1, inclusive="neither")
    columns = {} if table is None else _read(table)
    predictions, labels = _from_table(columns, predictions, "predictions"), _from_table(columns, labels, "labels")
    if table is not None and isinstance(groups, str):
        groups = [groups]
    if table is not None and isinstance(groups, list | tuple) and all(isinstance(g, str) for g in groups):
        groups = {name: _from_table(columns, name, "groups") for name in groups}
    named = _named_groups(groups)
    y, correct = _outcomes(predictions, labels)
    for name, column in named.items():
        if len(column) != len(y):
            raise ValueError(f"expected {len(y)} values in {name}, one per sample, got {len(column)}")
    if not named:
        raise ValueError("expected at least one group column, got none")

    rng = _numpy_generator(generator)
    coded = {name: _codes(column) for name, column in named.items()}
    rows, summaries = [], []
    for size in range(1, min(intersections, len(coded)) + 1):
        for chosen in itertools.combinations(coded, size):
            found, summary = _one_table(y, correct, chosen, coded, min_count, level, n_permutations, rng)
            rows += found
            summaries.append(summary)
    flags = benjamini_hochberg([row.p_value for row in rows], check_in_range(rate, "rate", 0, 1, inclusive="neither"))
    rows = [GroupRow(**{**vars(row), "flagged": bool(flag)}) for row, flag in zip(rows, flags)]
    n, k = len(y), int(correct.sum())
    low, high = (float(v) for v in wilson_interval(k, n, level))
    overall = GroupRow((), (), n, k / n, low, high, k / n, 0.0, math.nan, False, "")
    return SubgroupReport(overall, tuple(rows), tuple(summaries), level, min_count, _warnings(rows, min_count))


def _outcomes(predictions: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return labels as whole numbers and which predictions are right."""
    truth = _column(labels, "labels")
    if getattr(predictions, "ndim", 1) == 2 or (
        isinstance(predictions, list)
        and predictions
        and (isinstance(predictions[0], list | tuple) or getattr(predictions[0], "ndim", 0) == 1)
    ):
        from companion.shortcuts.subgroups.metrics import predicted_classes

        predictions = predicted_classes(predictions)
    guess = _column(predictions, "predictions")
    if len(truth) != len(guess) or not truth:
        raise ValueError(f"expected one prediction per label and at least one, got {len(guess)} and {len(truth)}")
    if None in truth or None in guess:
        raise ValueError(
            "expected no missing predictions or labels, got some: drop those samples yourself, and count them"
        )
    if {type(v) is str for v in truth} != {type(v) is str for v in guess}:
        raise TypeError(
            "expected predictions and labels of one kind, got text on one side only: they would never agree"
        )
    return _codes(truth)[0], np.array([a == b for a, b in zip(truth, guess)])


def _numpy_generator(generator: torch.Generator | int | None) -> np.random.Generator:
    generator = check_generator(generator)
    return np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))


def _one_table(
    y: np.ndarray,
    correct: np.ndarray,
    chosen: tuple[str, ...],
    coded: Mapping[str, tuple[np.ndarray, list[Any]]],
    min_count: int,
    level: float,
    n_permutations: int,
    rng: np.random.Generator,
) -> tuple[list[GroupRow], AttributeSummary]:
    """Return a row for every combination of values of the chosen columns, present or not, and their summary."""
    sizes = [len(coded[name][1]) for name in chosen]
    if math.prod(sizes) > 100_000:
        raise ValueError(f"expected at most 100000 combinations of {', '.join(chosen)}, got {math.prod(sizes)}")
    cells = np.ravel_multi_index([coded[name][0] for name in chosen], sizes)
    shape = int(y.max()) + 1, math.prod(sizes)
    n = np.bincount(y * shape[1] + cells, minlength=shape[0] * shape[1]).reshape(shape)  # (C, G)
    k = np.bincount((y * shape[1] + cells)[correct], minlength=shape[0] * shape[1]).reshape(shape)
    n_group, k_group = n.sum(0), k.sum(0)
    n_class, k_class = n.sum(1, keepdims=True), k.sum(1, keepdims=True)
    share = k_class / np.maximum(n_class, 1)
    expected = (n * share).sum(0)  # (G,)
    # given the margins of its class, the number right in a cell is hypergeometric
    variance = (n * share * (1 - share) * (n_class - n) / np.maximum(n_class - 1, 1)).sum(0)
    low, high = (v.tolist() for v in wilson_interval(k_group, n_group, level))
    rows = []
    for g, place in enumerate(itertools.product(*(range(size) for size in sizes))):
        count = int(n_group[g])
        tested = min_count <= count < len(y)
        away = max(abs(k_group[g] - expected[g]) - 0.5, 0)  # continuity correction
        p = math.erfc(away / math.sqrt(2 * variance[g])) if tested and variance[g] > 0 else 1.0 if tested else math.nan
        accuracy = float(k_group[g] / count) if count else math.nan
        usual = float(expected[g] / count) if count else math.nan
        note = "empty" if not count else "single" if count == 1 else "few" if count < min_count else ""
        values = tuple(coded[name][1][i] for name, i in zip(chosen, place))
        rows.append(GroupRow(chosen, values, count, accuracy, low[g], high[g], usual, accuracy - usual, p, False, note))
    return rows, _summary(rows, chosen, n, k, min_count, n_permutations, rng)


def _summary(
    rows: list[GroupRow],
    chosen: tuple[str, ...],
    n: np.ndarray,
    k: np.ndarray,
    min_count: int,
    n_permutations: int,
    rng: np.random.Generator,
) -> AttributeSummary:
    enough = n.sum(0) >= min_count
    macro, macro_by_chance = _macro_std(n, k)
    if enough.sum() < 2:
        nan = math.nan
        return AttributeSummary(chosen, int(enough.sum()), "", nan, nan, nan, macro, macro_by_chance)
    # errors of each class dealt out to the groups at random: counts are multivariate hypergeometric
    dealt = sum(rng.multivariate_hypergeometric(n[c], int(k[c].sum()), size=n_permutations) for c in range(len(n)))
    by_chance = (dealt[:, enough] / n.sum(0)[enough]).min(1)
    worst = min((row for row, e in zip(rows, enough) if e), key=lambda row: row.accuracy)
    p = (1 + int((by_chance <= worst.accuracy + 1e-12).sum())) / (1 + n_permutations)
    return AttributeSummary(
        chosen, int(enough.sum()), worst.name, worst.accuracy, float(by_chance.mean()), p, macro, macro_by_chance
    )


def _macro_std(n: np.ndarray, k: np.ndarray) -> tuple[float, float]:
    of_class = n.sum(1)
    share = k.sum(1) / of_class  # classes come from the labels, so none is empty
    accuracy = k / np.maximum(n, 1)
    variance = (n / of_class[:, None] * (accuracy - share[:, None]) ** 2).sum(1)
    by_chance = share * (1 - share) * ((n > 0).sum(1) - 1) / np.maximum(of_class - 1, 1)
    return float(np.sqrt(variance).mean()), float(np.sqrt(by_chance).mean())


def _warnings(rows: list[GroupRow], min_count: int) -> tuple[str, ...]:
    found = []
    for note, text in (
        ("empty", "without samples: nothing is known about them"),
        ("single", "of a single sample: their accuracy is 0 or 1 by necessity"),
        ("few", f"of fewer than {min_count} samples: listed, not judged"),
    ):
        names = [row.name for row in rows if row.note == note]
        if names:
            listed = "; ".join(names[:5]) + (f"; and {len(names) - 5} more" if len(names) > 5 else "")
            found.append(f"{len(names)} group{'s' if len(names) > 1 else ''} {text} ({listed}).")
    if not any(row.flagged for row in rows):
        found.append("no group differs from expectation by more than chance allows; small groups could hide a gap.")
    return tuple(found)
