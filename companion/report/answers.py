"""Lenses on the answers: can they be believed, who pays for mistakes, and are strangers noticed.

Public: `calibration`, `groups`, `strangers`, `cramers_v`.
"""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from companion.anomaly import mahalanobis
from companion.calibration import TemperatureScaler
from companion.collapse import NeuralCollapse
from companion.ranking import auroc, bootstrap_interval, fpr_at_tpr
from companion.report.findings import CONSTANT, TOLERANCE, Estimate, Found, Skipped, make
from companion.report.streaming import BINS, Summary, constant, part_of
from companion.shortcuts import wilson_interval
from companion.statistics import ClassMoments, Moments, shrunk_covariance

__all__ = ["calibration", "cramers_v", "groups", "strangers"]

GROUP_TOLERANCE = 0.05  # five points, added to what equal groups show by chance
MIN_COUNT = 20  # rows below which a group's accuracy says little
SEPARATED = 0.8  # AUROC
CUE = 0.1  # Cramer's V, Cohen's "small"
DRAWS = 1000
RESAMPLES = 200
BELIEF = "calibration (accuracy, ece, overconfidence, temperature)"
WHO = "groups (class_gap, group_gap, follows_group)"
ELSEWHERE = "strangers (ood_auroc, ood_confidence_auroc)"
MEASURING = "calibration/measuring-calibration"
RECALIBRATION = "calibration/recalibration"
SUBGROUPS = "shortcuts/subgroups"
CUES = "shortcuts/shortcut-learning"
STRANGERS = "anomaly/gaussian-features"


def calibration(summary: Summary, seed: int) -> Found:
    """Ask whether the probabilities can be believed.

    A calibrated model has an ECE above zero at finite n. How much is simulated: in each bin the gap is drawn as a
    calibrated model with these confidences would show it; the 95th percentile and two points are normal. The interval
    of the ECE redraws rows by bin and is reflected at the estimate, because redrawing inflates an ECE.

    >>> from companion.report import checkup
    >>> checkup(torch.eye(2), [0, 1], probs=[[0.9, 0.1], [0.4, 0.6]])["ece"].value  # (0.1 + 0.4) / 2
    0.25
    """
    if summary.bins is None:
        yield Skipped(BELIEF, "it needs labels, and logits or probabilities")
        return
    count, gap, square, chance = summary.bins.T
    n = float(count.sum())
    right = float(summary.right.sum())
    accuracy = right / n
    low, high = (float(v) for v in wilson_interval(right, n))
    most = float(summary.seen.max() / n)
    yield make(
        "accuracy",
        "calibration",
        "Accuracy",
        Estimate(accuracy, low, high),
        (most, None, f"at least {most:.3g}, what always naming the commonest class gives"),
        f"{accuracy:.1%} of the predictions are right.",
        MEASURING,
        summary.n,
    )
    generator = torch.Generator().manual_seed(seed)
    value = float(gap.abs().sum() / n)
    by_chance = (torch.randn(DRAWS, BINS, generator=generator, dtype=torch.float64) * chance.sqrt()).abs().sum(1) / n
    bound = float(by_chance.quantile(0.95)) + TOLERANCE
    drawn = _redrawn_ece(count, gap, square, n, generator)
    low, high = (2 * value - float(drawn.quantile(q)) for q in (0.975, 0.025))
    share = float(gap.sum()) / max(float(gap.abs().sum()), 1e-300)
    way = "too sure in some places and too unsure in others"
    if abs(share) > 0.5:
        way = "mostly it is too sure" if share > 0 else "mostly it is too unsure"
    yield make(
        "ece",
        "calibration",
        "Expected calibration error (15 bins)",
        Estimate(value, min(max(low, 0.0), value), max(high, value)),
        (
            None,
            bound,
            _by_chance(bound, TOLERANCE, "a calibrated model shows"),
        ),
        f"Confidence and accuracy differ by {value:.1%} on average; {way}.",
        MEASURING,
        summary.n,
    )
    mean = float(gap.sum() / n)
    half = 1.96 * math.sqrt(max(float(square.sum() / n) - mean**2, 0) / n)
    yield make(
        "overconfidence",
        "calibration",
        "Mean confidence minus accuracy",
        Estimate(mean, mean - half, mean + half),
        (-TOLERANCE, TOLERANCE, "between -0.02 and 0.02 (a convention); above is overconfident, below underconfident"),
        f"On average it says {accuracy + mean:.1%} and is right in {accuracy:.1%} of the cases.",
        MEASURING,
        summary.n,
    )
    yield from _temperature(summary)


def _by_chance(bound: float, tolerance: float, who: str) -> str:
    return f"at most {bound:.3g}: what {who} by chance ({bound - tolerance:.2g}) plus {tolerance:g}"


def _redrawn_ece(count: Tensor, gap: Tensor, square: Tensor, n: float, generator: torch.Generator) -> Tensor:
    """Return the ECE of redrawn rows: normal counts and gaps per bin, which is what many rows come to."""
    share = count / n
    z = torch.randn(2, DRAWS, BINS, generator=generator, dtype=torch.float64)
    counts = (count + (n * share * (1 - share)).sqrt() * z[0]).clamp_min(0)
    mean = gap / count.clamp_min(1)
    spread = (square / count.clamp_min(1) - mean.square()).clamp_min(0).sqrt()
    return (counts * mean + counts.sqrt() * spread * z[1]).abs().sum(1) / n


def _temperature(summary: Summary) -> Found:
    """A temperature between 4/5 and 5/4 moves no probability of a two-class model by more than five points."""
    if summary.kind != "logits":
        yield Skipped("temperature", "it needs logits, not probabilities")
        return
    z, y = summary.sample.outputs.double(), summary.sample.labels
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            best = float(TemperatureScaler().fit(z, y).temperature_)
        except (Warning, ValueError) as error:
            yield Skipped("temperature", str(error))
            return
    u = z / best
    p = u.softmax(1)
    mean = (p * u).sum(1)
    score = u.gather(1, y[:, None]).squeeze(1) - mean
    curvature = float(((p * u.square()).sum(1) - mean.square()).mean())
    half = 1.96 * float(score.std()) / (math.sqrt(len(y)) * curvature) if curvature > 0 else math.inf
    sense = "overconfident: divide the logits by it" if best > 1 else "underconfident: divide the logits by it"
    yield make(
        "temperature",
        "calibration",
        "Temperature that fits best",
        Estimate(best, best * math.exp(-half), best * math.exp(min(half, 50))),
        (0.8, 1.25, "from 0.8 to 1.25: within, no two-class probability is off by more than 0.05"),
        f"The logits are {best:.2f} times too large ({sense})."
        if best > 1.05 or best < 0.95
        else "The logits are about as large as they should be.",
        RECALIBRATION,
        len(y),
    )


def groups(summary: Summary, seed: int) -> Found:
    """Ask who pays: the worst class, and within classes the worst group of every column.

    Equal groups differ by chance. How much is simulated: every group is drawn with the accuracy of its class, and the
    95th percentile of the worst gap, with five points on top, is normal.

    >>> from companion.report import checkup
    >>> y = torch.arange(2).repeat_interleave(50)
    >>> probs = torch.eye(2).repeat_interleave(50, 0)
    >>> round(checkup(torch.randn(100, 2), y, probs=probs.roll(20, 0))["class_gap"].value, 6)  # both are right in 60 %
    0.0
    """
    if summary.seen is None or summary.right is None:
        yield Skipped(WHO, "it needs labels, and logits or probabilities")
        return
    generator = torch.Generator().manual_seed(seed)
    seen, right = summary.seen, summary.right
    yield from _gap(
        "class_gap",
        "Worst class below the average",
        seen[None],
        right[None],
        torch.tensor([float(right.sum() / seen.sum())]),
        [f"class {c}" for c in range(len(seen))],
        "the average over all rows",
        generator,
    )
    if not summary.groups:
        yield Skipped("group_gap, follows_group", "it needs group columns")
    for name, (codes, kinds) in summary.groups.items():
        if name not in summary.cells:
            yield Skipped(f"group_gap/{name}", f"{len(kinds)} values are too many")
        elif len(kinds) < 2:
            yield Skipped(f"group_gap/{name}", "the column has one value only")
        else:
            rows, hits = summary.cells[name]
            of_class = right / seen.clamp_min(1)
            yield from _gap(
                f"group_gap/{name}",
                f"Worst group of {name} below its class",
                rows,
                hits,
                of_class,
                [f"class {c} with {name} = {kind}" for c in range(len(seen)) for kind in kinds],
                "its class",
                generator,
            )
            yield from _follows(summary, name, codes, kinds, seed)


def _gap(
    key: str, title: str, rows: Tensor, hits: Tensor, expected: Tensor, names: list[str], of: str, generator
) -> Found:
    """The largest amount by which a cell (a row of the table: one expected accuracy) stays below what is expected."""
    use = rows >= MIN_COUNT
    if int(use.sum()) < 2:
        yield Skipped(key, f"fewer than two groups have {MIN_COUNT} rows")
        return
    below = torch.where(use, expected[:, None].to(rows) - hits / rows.clamp_min(1), -torch.inf)
    place = int(below.argmax())
    count, k = float(rows.flatten()[place]), float(hits.flatten()[place])
    low, high = (float(v) for v in wilson_interval(k, count))
    base = float(expected[place // rows.shape[1]])
    p = expected[:, None].to(rows).expand_as(rows)[use]
    draws = torch.randn(DRAWS, len(p), generator=generator, dtype=torch.float64)
    worst = (draws * (p * (1 - p) / rows[use]).sqrt()).amax(1)
    bound = float(worst.quantile(0.95)) + GROUP_TOLERANCE
    small = int((~use & (rows > 0)).sum())
    left = f" {small} group(s) with fewer than {MIN_COUNT} rows are left out." if small else ""
    yield make(
        key,
        "shortcuts",
        title,
        Estimate(base - k / count, base - high, base - low),
        (
            None,
            bound,
            _by_chance(bound, GROUP_TOLERANCE, "equal groups show"),
        ),
        f"{names[place][0].upper() + names[place][1:]} is right in {k / count:.1%} of {int(count)} rows, {of} in "
        f"{base:.1%}.{left}",
        SUBGROUPS,
        int(rows[use].sum()),
    )


def cramers_v(a: Tensor, b: Tensor) -> Tensor:
    """Return Cramer's V of two columns, with Bergsma's correction for small samples: 0 without, 1 with full dependence.

    >>> a = torch.arange(4).repeat(25)
    >>> float(cramers_v(a, a)), float(cramers_v(a, torch.arange(2).repeat_interleave(50)))
    (1.0, 0.0)
    """
    k, m, n = int(a.max()) + 1, int(b.max()) + 1, len(a)
    table = torch.bincount(a * m + b, minlength=k * m).view(k, m).double()
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]
    k, m = table.shape
    if min(k, m) < 2 or n < 2:
        return torch.tensor(0.0, dtype=torch.float64)
    expected = table.sum(1, keepdim=True) * table.sum(0) / n
    phi = ((table - expected).square() / expected).sum() / n
    phi = (phi - (k - 1) * (m - 1) / (n - 1)).clamp_min(0)
    k, m = k - (k - 1) ** 2 / (n - 1), m - (m - 1) ** 2 / (n - 1)
    return (phi / (min(k, m) - 1)).sqrt().clamp_max(1)


def _follows(summary: Summary, name: str, codes: Tensor, kinds: list[str], seed: int) -> Found:
    sample = summary.sample
    g, y, predicted = codes[sample.index], sample.labels, sample.predicted

    def excess(predicted: Tensor, y: Tensor, g: Tensor) -> Tensor:
        return cramers_v(predicted, g) - cramers_v(y, g)

    interval = bootstrap_interval(excess, predicted, y, g, n_resamples=RESAMPLES, generator=seed)
    said, true = float(cramers_v(predicted, g)), float(cramers_v(y, g))
    yield make(
        f"follows_group/{name}",
        "shortcuts",
        f"Predictions follow {name} more than labels do",
        Estimate(*(float(v) for v in interval)),
        (None, CUE, f"at most {CUE:g}, what Cohen calls a small association (Cramer's V)"),
        f"The association with {name} is {said:.2f} for the predictions and {true:.2f} for the labels.",
        CUES,
        len(y),
    )


def strangers(summary: Summary, seed: int) -> Found:
    """Ask whether rows from elsewhere lie farther from the classes: Mahalanobis distance with a shared covariance.

    Each sampled row is scored with the moments of the seven parts it is not in, so that no row vouches for itself.

    >>> from companion.report import checkup
    >>> x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    >>> checkup(x, outliers=10 + x)["ood_auroc"].value
    1.0
    """
    if summary.outliers is None:
        yield Skipped(ELSEWHERE, "it needs features of outliers (outliers=, --ood)")
        return
    if constant(summary):
        yield Skipped(ELSEWHERE, CONSTANT)
        return
    part = part_of(summary.sample.index)
    scores, theirs = torch.zeros(len(part), dtype=torch.float64), []
    try:
        for g, rest in summary.without():
            distance = _mahalanobis(rest, summary.n)
            scores[part == g] = distance(summary.sample.features[part == g])
            theirs.append(distance(summary.outliers))
    except ValueError as error:
        yield Skipped(ELSEWHERE, f"no distance can be computed: {error}")
        return
    if not theirs:
        yield Skipped(ELSEWHERE, "it needs more rows")
        return
    theirs = torch.stack(theirs).mean(0)
    yield from _separation(scores, theirs, "ood_auroc", "Strangers lie farther from the classes", seed, summary.dim)
    if summary.outlier_outputs is not None and summary.sample.outputs is not None:
        z = summary.sample.outputs
        own = -(z.softmax(1) if summary.kind == "logits" else z).amax(1).double()
        other = -summary.outlier_outputs.softmax(1).amax(1).double()
        value = bootstrap_interval(
            auroc,
            torch.cat([own, other]),
            torch.cat([torch.zeros(len(own)), torch.ones(len(other))]),
            n_resamples=RESAMPLES,
            generator=seed,
            stratify=torch.cat([torch.zeros(len(own)), torch.ones(len(other))]).long(),
        )
        yield make(
            "ood_confidence_auroc",
            "anomaly",
            "Strangers get a lower confidence (AUROC)",
            Estimate(*(float(v) for v in value)),
            (None, None, "0.5 is chance; confidence is not made for this: compare it with the distance above"),
            f"A stranger gets a lower confidence than a row of your own in {float(value.estimate):.1%} of the pairs.",
            STRANGERS,
            len(own) + len(other),
        )


def _mahalanobis(moments: Moments | NeuralCollapse, n: int) -> Callable[[Tensor], Tensor]:
    if isinstance(moments, NeuralCollapse):
        means, covariance, counts = ClassMoments.compute(moments)
        means = means[counts > 0]
    else:
        mean, covariance, _ = Moments.compute(moments)
        means = mean[None]
    d = len(covariance)
    covariance = shrunk_covariance(covariance, d / (n + d))  # the sampling error of S is of the order d / n

    def distance(x: Tensor) -> Tensor:
        return mahalanobis(x.to(means), means, covariance).amin(1).sqrt() if len(x) else means.new_zeros(0)

    return distance


def _separation(own: Tensor, other: Tensor, key: str, title: str, seed: int, dim: int) -> Found:
    scores = torch.cat([own, other])
    strange = torch.cat([torch.zeros(len(own)), torch.ones(len(other))]).long()
    value = bootstrap_interval(auroc, scores, strange, n_resamples=RESAMPLES, generator=seed, stratify=strange)
    admitted = float(fpr_at_tpr(-scores, 1 - strange))
    yield make(
        key,
        "anomaly",
        f"{title} (AUROC)",
        Estimate(*(float(v) for v in value)),
        (SEPARATED, None, f"at least {SEPARATED:g} (a convention): it outranks in four of five pairs; 0.5 is chance"),
        f"A stranger lies farther out than a row of your own in {float(value.estimate):.1%} of the pairs. A threshold "
        f"that keeps 95 % of your rows lets {admitted:.1%} of the strangers in.",
        STRANGERS,
        len(scores),
    )
