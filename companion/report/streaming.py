"""One pass over the data: what a check-up keeps of a million rows, and how processes share the work.

Public: `Processes`, `Summary`, `Sample`, `summarise`, `covariance_of`.

Kept are class moments in eight parts (their differences give intervals), counts of how often which confidence, class
and group was right, and a random sample of rows for what is quadratic. All of it merges: with `torchrun` each process
reads its share, and the numbers are those of one process.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from companion.checks import check_features, check_logits, check_probs
from companion.collapse import NeuralCollapse
from companion.report.reading import Rows
from companion.statistics import ClassMoments, Moments

__all__ = ["Processes", "Sample", "Summary", "covariance_of", "summarise"]

PARTS = 8
NUMBERS = 16_000_000  # of one piece: 128 MB where they are float64
BINS = 15
MOST_CELLS = 100_000  # class times group: more can hold no group of a useful size


class Processes:
    """The processes that share the work: one, or those of an initialised process group.

    >>> Processes().world
    1
    """

    def __init__(self) -> None:
        self.shared = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if self.shared else (0, 1)

    def each(self, x: Tensor) -> list[Tensor]:
        """Return a tensor of one shape from every process, in the order of their ranks."""
        if not self.shared:
            return [x]
        parts = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(parts, x.contiguous())
        return parts

    def total(self, x: Tensor) -> Tensor:
        """Return the sum over processes."""
        return torch.stack(self.each(x)).sum(0)

    def rows(self, x: Tensor) -> Tensor:
        """Return the rows of all processes below each other; they may have different numbers of them."""
        if not self.shared:
            return x
        sizes = [int(size) for size in self.each(torch.tensor(len(x)))]
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        return torch.cat([part[:size] for part, size in zip(self.each(padded), sizes)])


class Sample(NamedTuple):
    """Rows drawn at random, in order: features (m, d) and what belongs to them, on the cpu."""

    index: Tensor
    features: Tensor
    labels: Tensor | None
    outputs: Tensor | None  # logits, or probabilities where these were given
    predicted: Tensor | None


@dataclass
class Summary:
    """What one pass leaves.

    Attributes:
        n: rows.
        dim: columns.
        classes: C, or None without labels and outputs.
        present: the classes that have labels, in order, or None.
        parts: moments of eight parts of the rows, on the cpu.
        bins: (15, 4) per bin of confidence: rows, sum of confidence - correct, of its square, of confidence (1 - it).
        seen: (C,) labels of each class.
        right: (C,) of those, predicted right.
        cells: by group column, (2, C, values): rows, and rows predicted right.
        groups: by group column, codes (n,) and names of values.
        sample: rows drawn at random.
        outliers: (m, d) rows of the outliers, drawn at random, or None.
        outlier_outputs: what the last layer says about them, or None.
        weight: of the last layer, or None.
        kind: "logits", "probs" or None.
    """

    n: int
    dim: int
    classes: int | None
    present: list[int] | None
    parts: list[Moments | NeuralCollapse]
    bins: Tensor | None
    seen: Tensor | None
    right: Tensor | None
    cells: dict[str, Tensor]
    groups: dict[str, tuple[Tensor, list[str]]]
    sample: Sample
    outliers: Tensor | None
    outlier_outputs: Tensor | None
    weight: Tensor | None
    kind: str | None

    def whole(self) -> Moments | NeuralCollapse:
        """Return the moments of all rows."""
        return self._merged(range(len(self.parts)))

    def without(self) -> Iterator[tuple[int, Moments | NeuralCollapse]]:
        """Go through the parts that have rows: (number, the moments of all other parts)."""
        filled = [
            g for g, part in enumerate(self.parts) if float(part.metric_state["state"][: _counts(part)].sum()) > 0
        ]
        for g in filled if len(filled) > 1 else []:
            yield g, self._merged(i for i in filled if i != g)

    def _merged(self, which: Iterable[int]) -> Moments | NeuralCollapse:
        which = list(which)
        merged = self.parts[which[0]].clone()
        for i in which[1:]:
            merged.merge_state({"state": self.parts[i].metric_state["state"]})
        return merged


def part_of(index: Tensor) -> Tensor:
    """Return which of the eight parts each row belongs to: fixed by its number, with no pattern in it.

    >>> bool((part_of(torch.arange(80_000)).bincount() / 10_000 - 1).abs().max() < 0.05)
    True
    """
    mixed = (index * 2654435761) % 2**32
    mixed = ((mixed ^ (mixed >> 15)) * 2246822519) % 2**32
    return ((mixed ^ (mixed >> 13)) >> 8) % PARTS


def draw(n: int, size: int, seed: int) -> Tensor:
    """Return the numbers of at most `size` of n rows, in order.

    >>> len(draw(10, 4, 0)), draw(3, 9, 0).tolist()
    (4, [0, 1, 2])
    """
    if n <= size:
        return torch.arange(n)
    chosen = np.random.default_rng(seed).choice(n, size, replace=False, shuffle=False)
    return torch.from_numpy(np.sort(chosen))


def apply_head(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the logits of a linear layer for features h."""
    h = h.float() if h.dtype in (torch.float16, torch.bfloat16) else h
    z = h @ weight.to(h).T
    return z if bias is None else z + bias.to(h)


def summarise(
    features: Rows,
    labels: Tensor | None,
    outputs: Rows | None,
    kind: str | None,
    groups: dict[str, tuple[Tensor, list[str]]],
    outliers: Rows | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    size: int,
    seed: int,
    device: torch.device,
    progress: Callable[[Iterable, int, str], Iterable],
) -> Summary:
    """Go through the rows once and return what the lenses need.

    Args:
        features: (n, d).
        labels: (n,) or None.
        outputs: logits or probabilities (n, C), or None; with a weight the logits of the last layer stand in.
        kind: "logits", "probs" or None.
        groups: by column, codes (n,) and names.
        outliers: (m, d) or None.
        weight: of the last layer, (C, d), or None.
        bias: of the last layer, (C,), or None.
        size: of the sample.
        seed: of the sample.
        device: where to compute.
        progress: wraps the pass: (iterable, how many, what it is).

    Raises:
        ValueError: NaN or infinity, rows that are no probabilities, labels that do not fit.

    >>> from companion.report.reading import read_rows
    >>> x = read_rows(torch.eye(4), "features")
    >>> plain = {"size": 3, "seed": 0, "device": torch.device("cpu"), "progress": lambda it, n, what: it}
    >>> summarise(x, None, None, None, {}, None, None, None, **plain).sample.features.shape
    torch.Size([3, 4])
    """
    team = Processes()
    for rows in (features, outliers):
        if rows is not None and rows.n < team.world:
            raise ValueError(f"expected {rows.name} with at least one row per process ({team.world}), got {rows.n}")
    classes = outputs.dim if outputs is not None else None if weight is None else len(weight)
    if classes is None and labels is not None:
        classes = int(labels.max()) + 1
    present = None if labels is None else labels.unique()
    dtype = torch.float32 if device.type == "mps" else torch.float64
    several = present is not None and len(present) > 1
    if several:
        parts = [NeuralCollapse(len(present), features.dim, dtype=dtype).to(device) for _ in range(PARTS)]
        place = torch.full((classes,), -1).index_copy(0, present, torch.arange(len(present)))
    else:
        parts = [Moments(features.dim, dtype=dtype).to(device) for _ in range(PARTS)]
    judged = labels is not None and (outputs is not None or weight is not None)
    counted = {name: group for name, group in groups.items() if judged and classes * len(group[1]) <= MOST_CELLS}
    tally = _Tally(classes, counted, labels) if judged else None
    chosen = draw(features.n, size, seed)
    kept: dict[str, list[Tensor]] = {"index": [], "features": [], "outputs": []}
    begin, end = features.part(team.rank, team.world)
    step = max(256, min(65536, NUMBERS // max(features.dim, classes or 1)))
    pieces = range(begin, end, step)
    for start in progress(pieces, len(pieces), features.name):
        stop = min(start + step, end)
        index = torch.arange(start, stop)
        x = _checked(check_features, features, start, stop, device)
        which = part_of(index)
        for g, part in enumerate(parts):
            rows_of = (which == g).nonzero().squeeze(1)
            if len(rows_of):
                mine = x[rows_of.to(device)]
                own = () if not several else (place[labels[start:stop]][rows_of].to(device),)
                part.update(mine, *own)
        z = None
        if outputs is not None:
            z = _checked(check_logits if kind == "logits" else check_probs, outputs, start, stop, device)
        elif weight is not None:
            z = apply_head(x, weight, bias)
        if tally is not None:
            tally.add(z, kind or "logits", start, stop)
        low, high = torch.searchsorted(chosen, torch.tensor([start, stop])).tolist()
        local = chosen[low:high] - start
        kept["index"].append(chosen[low:high])
        kept["features"].append(_plain(x[local.to(device)]))
        if z is not None:
            kept["outputs"].append(_plain(z[local.to(device)]))
    sample = _sample(team, kept, labels, features.dim)
    strangers = None if outliers is None else _strangers(outliers, features, team, size, seed, progress)
    summary = Summary(
        n=features.n,
        dim=features.dim,
        classes=classes,
        present=None if present is None else present.tolist(),
        parts=[_gathered(part, team) for part in parts],
        bins=None,
        seen=None if labels is None else labels.bincount(minlength=classes).double(),
        right=None,
        cells={},
        groups=groups,
        sample=sample,
        outliers=strangers,
        outlier_outputs=None if strangers is None or weight is None else apply_head(strangers, weight.cpu(), bias),
        weight=None if weight is None else weight.cpu(),
        kind=kind or (None if weight is None else "logits"),
    )
    if tally is not None:
        summary.bins, summary.seen, summary.right, summary.cells = tally.result(team)
    return summary


def _counts(part: Moments | NeuralCollapse) -> int:
    return part.layout.classes


def _checked(check: Callable, rows: Rows, start: int, stop: int, device: torch.device) -> Tensor:
    part = rows.read(start, stop)
    try:
        return check(part.to(device), rows.name).detach()
    except ValueError as error:
        raise ValueError(f"{error} (in rows {start} to {stop - 1})") from error


def _plain(x: Tensor) -> Tensor:
    x = x.cpu()
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _sample(team: Processes, kept: dict, labels: Tensor | None, dim: int) -> Sample:
    def joined(name: str, empty: Tensor) -> Tensor:
        return team.rows(torch.cat(kept[name]) if kept[name] else empty)

    index = joined("index", torch.zeros(0, dtype=torch.int64))
    features = joined("features", torch.zeros(0, dim))
    outputs = joined("outputs", torch.zeros(0, 1)) if kept["outputs"] else None
    predicted = None if outputs is None else outputs.argmax(1)
    return Sample(index, features, None if labels is None else labels[index], outputs, predicted)


def _strangers(outliers: Rows, features: Rows, team: Processes, size: int, seed: int, progress: Callable) -> Tensor:
    if outliers.dim != features.dim:
        raise ValueError(
            f"expected {outliers.name} with {features.dim} columns as in {features.name}, got {outliers.dim}"
        )
    chosen, found = draw(outliers.n, size, seed + 1), []
    begin, end = outliers.part(team.rank, team.world)
    step = max(256, 8_000_000 // outliers.dim)
    steps = range(begin, end, step)
    for start in progress(steps, len(steps), outliers.name):
        stop = min(start + step, end)
        low, high = torch.searchsorted(chosen, torch.tensor([start, stop])).tolist()
        x = _checked(check_features, outliers, start, stop, torch.device("cpu"))
        found.append(_plain(x[chosen[low:high] - start]))
    return team.rows(torch.cat(found) if found else torch.zeros(0, outliers.dim))


def _gathered(part: Moments | NeuralCollapse, team: Processes) -> Moments | NeuralCollapse:
    part = part.cpu()
    if not team.shared:
        return part
    states = team.each(part.metric_state["state"])
    merged = part.clone()
    merged.reset()
    for state in states:
        merged.merge_state({"state": state})
    return merged


def covariance_of(moments: Moments | NeuralCollapse) -> Tensor:
    """Return the covariance of all rows: of the classes' means and around them, where there are classes.

    >>> moments = NeuralCollapse(2, 1)
    >>> moments.update(torch.tensor([[0.0], [2.0], [4.0]]), torch.tensor([0, 0, 1]))
    >>> round(float(covariance_of(moments)), 4)  # the variance of 0, 2 and 4
    2.6667
    """
    if not isinstance(moments, NeuralCollapse):
        return Moments.compute(moments).covariance
    means, within, counts = ClassMoments.compute(moments)
    share = (counts.to(means) / counts.sum())[:, None]
    seen = counts > 0
    centred = (means - (share * means)[seen].sum(0))[seen]
    return within + centred.T @ (share[seen] * centred)


def constant(summary: Summary) -> bool:
    """Whether all rows are the same, up to the rounding of their mean."""
    variance = float(covariance_of(summary.whole()).trace())
    return variance <= 1e-20 * float(summary.sample.features.double().square().sum(1).mean())


class _Tally:
    """Counts of what was right, by confidence, class and group: sums, so that processes add them up."""

    def __init__(self, classes: int, groups: dict[str, tuple[Tensor, list[str]]], labels: Tensor):
        self.classes, self.groups, self.labels = classes, groups, labels
        self.edges = torch.arange(1, BINS, dtype=torch.float64) / BINS
        self.bins = torch.zeros(BINS, 4, dtype=torch.float64)
        self.seen, self.right = torch.zeros(2, classes, dtype=torch.float64)
        self.cells = {name: torch.zeros(2, classes * len(v[1]), dtype=torch.float64) for name, v in groups.items()}

    def add(self, z: Tensor, kind: str, start: int, stop: int) -> None:
        z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
        confidence, predicted = (z.softmax(1) if kind == "logits" else z).max(1)
        confidence, predicted = confidence.double().cpu(), predicted.cpu()
        y = self.labels[start:stop]
        correct = (predicted == y).double()
        gap = confidence - correct
        which = torch.bucketize(confidence, self.edges)  # (lower, upper], as in expected_calibration_error
        rows = torch.stack([torch.ones_like(gap), gap, gap.square(), confidence * (1 - confidence)], 1)
        self.bins.index_add_(0, which, rows)
        self.seen += y.bincount(minlength=self.classes)
        self.right += torch.bincount(y, weights=correct, minlength=self.classes)
        for name, (codes, kinds) in self.groups.items():
            cell = y * len(kinds) + codes[start:stop]
            self.cells[name][0] += cell.bincount(minlength=self.cells[name].shape[1])
            self.cells[name][1] += torch.bincount(cell, weights=correct, minlength=self.cells[name].shape[1])

    def result(self, team: Processes) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        cells = {n: team.total(c).view(2, self.classes, -1) for n, c in self.cells.items()}
        return team.total(self.bins), team.total(self.seen), team.total(self.right), cells
