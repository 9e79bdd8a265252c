"""The questions asked of a model: each lens turns a `Summary` into findings, or says why it cannot.

Public: `LENSES`. A lens is a function `(summary, seed) -> iterator of Finding or Skipped`. What each calls normal is
derived in its own docstring or said to be a convention; the numbers are constants at the head of this module.
"""

import math
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from companion.calibration import TemperatureScaler
from companion.collapse import NearestMeanDisagreement, NeuralCollapse
from companion.dimensionality import TwoNN
from companion.geometry import pairwise_cosine
from companion.ranking import auroc, bootstrap_interval, fpr_at_tpr
from companion.report.findings import Estimate, Finding, Skipped, jackknife, make
from companion.report.streaming import BINS, Summary, part_of
from companion.shortcuts import wilson_interval
from companion.statistics import ClassMoments, Moments, shrunk_covariance

__all__ = ["LENSES"]

TOLERANCE = 0.02  # calibration: two points, added to what a calibrated model shows by chance
GROUP_TOLERANCE = 0.05  # groups: five points, added to what equal groups show by chance
MIN_COUNT = 20  # rows below which a group's accuracy says little
COSINE = math.sqrt(0.5)  # 45 degrees: half of a squared length lies along the other direction
DEAD = 0.1  # share of columns that never change
SEPARATED = 0.8  # AUROC
CUE = 0.1  # Cramer's V, Cohen's "small"
DIMENSIONS = "dimensionality (participation_ratio, dead_features, intrinsic_dimension)"
SHAPE = "collapse (nc1, closest_classes, nc3, nc4, closest_weights)"
BELIEF = "calibration (accuracy, ece, overconfidence, temperature)"
WHO = "groups (class_gap, group_gap, follows_group)"
ELSEWHERE = "strangers (ood_auroc, ood_confidence_auroc)"
CONSTANT = "every row of the features is the same"
DRAWS = 1000
RESAMPLES = 200

Found = Iterator[Finding | Skipped]
GEOMETRY = "dimensionality/intrinsic-dimension"
COLLAPSE = "collapse/neural-collapse"
CALIBRATION = "calibration/recalibration"
SUBGROUPS = "shortcuts/subgroups"
STRANGERS = "anomaly/visual-anomalies"


def _covariance(moments: Moments | NeuralCollapse) -> Tensor:
    """Return the covariance of all rows: of the classes' means and around them, where there are classes."""
    if not isinstance(moments, NeuralCollapse):
        return Moments.compute(moments).covariance
    means, within, counts = ClassMoments.compute(moments)
    share = (counts.to(means) / counts.sum())[:, None]
    seen = counts > 0
    centred = (means - (share * means)[seen].sum(0))[seen]
    return within + centred.T @ (share[seen] * centred)


def _constant(summary: Summary) -> bool:
    """Whether all rows are the same, up to the rounding of their mean."""
    variance = float(_covariance(summary.whole()).trace())
    return variance <= 1e-20 * float(summary.sample.features.double().square().sum(1).mean())


def _participation(covariance: Tensor) -> float:
    square = float(covariance.square().sum())
    return float(covariance.trace()) ** 2 / square if square > 0 else math.nan


def dimensions(summary: Summary, seed: int) -> Found:
    r"""Ask how many numbers the features need.

    A participation ratio $(\sum\lambda)^2/\sum\lambda^2$ below 2 means that one direction holds more than half of the
    variance, since $\sum_i p_i^2 > \tfrac12$ needs a $p_i > \tfrac12$. The intrinsic dimension is held against that of
    Gaussian noise with the same covariance and sample size: a trained layer is thinner than that.
    """
    if _constant(summary):
        yield Skipped(DIMENSIONS, CONSTANT)
        return
    n, covariance = summary.n, _covariance(summary.whole())
    parts = [_participation(_covariance(rest)) for _, rest in summary.without()]
    ratio = jackknife(_participation(covariance), parts, 0, summary.dim)
    floor = float(min(2, max(1, (summary.classes or 3) - 1)))
    strongest = float(torch.linalg.eigvalsh(covariance)[-1] / covariance.trace())
    yield make(
        "participation_ratio",
        "dimensionality",
        "Directions that carry variance",
        ratio,
        (floor, None, f"at least {floor:g}: below 2 one direction holds more than half of the variance"),
        f"The variance is spread as over {ratio.value:.1f} of {summary.dim} directions; the strongest one holds "
        f"{strongest:.0%} of it.",
        GEOMETRY,
        n,
    )
    dead = int((covariance.diagonal() <= 1e-20 * covariance.diagonal().max()).sum())
    yield make(
        "dead_features",
        "dimensionality",
        "Columns that never change",
        Estimate(dead / summary.dim),
        (None, DEAD, f"at most {DEAD:g} (a convention): more is width that is paid for and not used"),
        f"{dead} of {summary.dim} columns have the same value in every row.",
        GEOMETRY,
        n,
    )
    yield from _intrinsic(summary, covariance, seed)


def _intrinsic(summary: Summary, covariance: Tensor, seed: int) -> Found:
    x = summary.sample.features.double()
    x = x.unique(dim=0)
    if len(x) < 50:
        yield Skipped("intrinsic_dimension", f"it needs 50 distinct rows, the sample has {len(x)}")
        return
    values = torch.linalg.eigvalsh(covariance)
    noise = torch.randn(len(x), len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise = noise * values.clamp_min(0).sqrt()
    try:
        found = TwoNN(random_state=seed, duplicates="drop").fit(x)
        null = TwoNN(random_state=seed, duplicates="drop", n_bootstrap=0).fit(noise).dimension_
    except ValueError as error:
        yield Skipped("intrinsic_dimension", str(error))
        return
    low, high = found.dimension_interval_
    share = len(x) / len(summary.sample.features)
    copies = "" if share == 1 else f" {1 - share:.0%} of the sampled rows were copies and left out."
    yield make(
        "intrinsic_dimension",
        "dimensionality",
        "Intrinsic dimension (TwoNN)",
        Estimate(found.dimension_, low, high),
        (1.0, null, f"from 1 to {null:.1f}, what Gaussian noise of the same covariance and sample size gives"),
        f"Close up, the features look like a set of {found.dimension_:.1f} dimensions.{copies}",
        GEOMETRY,
        len(x),
    )


def collapse(summary: Summary, seed: int) -> Found:
    r"""Ask what shape the classes have.

    For round clouds of spread $\sigma$ around means of length r at equal angles, nc1 is
    $(C-1)^2\sigma^2/(C r^2)$, and the border between two classes lies $\sqrt{(C-1)/(2\,\mathrm{nc1})}$ spreads from
    either mean. Two spreads, or an overlap of 2.3 %, make nc1 = (C - 1) / 8.
    """
    if summary.present is None:
        yield Skipped(SHAPE, "it needs labels")
        return
    if len(summary.present) < 2 or _constant(summary):
        few = "it needs at least two classes among the labels"
        yield Skipped(SHAPE, few if len(summary.present) < 2 else CONSTANT)
        return
    complete = len(summary.present) == summary.classes
    weight = summary.weight if complete else None
    n, c = summary.n, len(summary.present)
    try:
        whole, rests = _shape(summary.whole(), weight), []
        for _, rest in summary.without():
            try:
                rests.append(_shape(rest, weight))
            except ValueError:  # a class that lies in one part only
                rests.append({})
    except ValueError as error:
        yield Skipped(SHAPE, str(error))
        return

    def estimate(key: str, low: float, high: float) -> Estimate:
        return jackknife(float(whole[key]), [float(r.get(key, math.nan)) for r in rests], low, high)

    nc1 = estimate("nc1", 0, math.inf)
    deviations = math.sqrt((c - 1) / (2 * nc1.value)) if nc1.value > 0 else math.inf
    yield make(
        "nc1",
        "collapse",
        "Spread within classes against between",
        nc1,
        (None, (c - 1) / 8, f"at most (C - 1)/8 = {(c - 1) / 8:g}: round classes then overlap by less than 2.3 %"),
        f"If classes were round, the border between two of them would lie {deviations:.1f} spreads from either mean.",
        COLLAPSE,
        n,
    )
    if c > 2:
        a, b = (summary.present[i] for i in whole["pair"])
        yield make(
            "closest_classes",
            "collapse",
            "Cosine of the two closest class means",
            estimate("closest", -1, 1),
            (None, COSINE, f"at most {COSINE:.2f} (45 degrees); equal angles would give {-1 / (c - 1):.2f}"),
            f"Classes {a} and {b} point in the most similar directions.",
            COLLAPSE,
            n,
        )
    if weight is None:
        why = "it needs the weight of the last layer"
        yield Skipped("nc3, nc4, closest_weights", why if summary.weight is None else "some classes have no rows")
        return
    yield make(
        "nc3",
        "collapse",
        "Last layer against class means",
        estimate("nc3", 0, 4),
        (None, 1.0, "at most 1, a cosine of 1/2; 0 is the same shape, 2 is unrelated"),
        f"The rows of the last layer and the class means have a cosine of {1 - float(whole['nc3']) / 2:.2f}.",
        COLLAPSE,
        n,
    )
    if c > 2:
        centred = weight.double() - weight.double().mean(0)
        value, (a, b) = _closest(centred)
        yield make(
            "closest_weights",
            "collapse",
            "Cosine of the two closest rows of the last layer",
            Estimate(value),
            (
                None,
                COSINE,
                f"at most {COSINE:.2f} (45 degrees): rare classes whose rows merge have collapsed",
            ),
            f"The last layer treats classes {a} and {b} the most alike.",
            COLLAPSE,
            len(weight),
        )
    yield from _nearest_mean(summary)


def _shape(moments: NeuralCollapse, weight: Tensor | None) -> dict:
    moments._head = (weight,)
    measures = dict(NeuralCollapse.compute(moments))
    means = moments.class_means()
    measures["closest"], measures["pair"] = _closest(means - means.mean(0))
    return measures


def _closest(rows: Tensor) -> tuple[float, tuple[int, int]]:
    cosines = pairwise_cosine(rows).fill_diagonal_(-2)
    place = int(cosines.argmax())
    return float(cosines.flatten()[place]), (min(divmod(place, len(rows))), max(divmod(place, len(rows))))


def _nearest_mean(summary: Summary) -> Found:
    sample, m = summary.sample, len(summary.sample.index)
    metric = NearestMeanDisagreement(summary.whole().class_means())
    outputs = sample.outputs if summary.kind == "logits" else sample.outputs.clamp_min(1e-30).log()
    metric.update(sample.features.to(metric.means.dtype), outputs)
    differ = float(metric.compute())
    low, high = (float(v) for v in wilson_interval(round(differ * m), m))
    error = 1 - float(summary.right.sum() / summary.n)
    bound = min(1.0, 2 * error + TOLERANCE)
    yield make(
        "nc4",
        "collapse",
        "Last layer disagrees with nearest class mean",
        Estimate(differ, low, high),
        (
            None,
            bound,
            f"at most {bound:.3g}: two classifiers of this error differ at most twice as often; and 0.02",
        ),
        f"For {differ:.1%} of the sampled rows the nearest class mean is another class than the predicted one.",
        COLLAPSE,
        m,
    )


def calibration(summary: Summary, seed: int) -> Found:
    """Ask whether the probabilities can be believed.

    A calibrated model has an ECE above zero at finite n. How much is simulated: in each bin the gap is drawn as a
    calibrated model with these confidences would show it; the 95th percentile and two points are normal. The interval
    of the ECE redraws rows by bin and is reflected at the estimate, because redrawing inflates an ECE.
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
        CALIBRATION,
        summary.n,
    )
    generator = torch.Generator().manual_seed(seed)
    value = float(gap.abs().sum() / n)
    by_chance = (torch.randn(DRAWS, BINS, generator=generator, dtype=torch.float64) * chance.sqrt()).abs().sum(1) / n
    bound = float(by_chance.quantile(0.95)) + TOLERANCE
    drawn = _redrawn_ece(count, gap, square, n, generator)
    low, high = (2 * value - float(drawn.quantile(q)) for q in (0.975, 0.025))
    direction = "sure" if float(gap.sum()) > 0 else "unsure"
    yield make(
        "ece",
        "calibration",
        "Expected calibration error (15 bins)",
        Estimate(value, min(max(low, 0.0), value), max(high, value)),
        (None, bound, f"at most {bound:.3g}: a calibrated model shows {bound - TOLERANCE:.2g} by chance, and 0.02"),
        f"Confidence and accuracy differ by {value:.1%} on average; mostly it is too {direction}.",
        CALIBRATION,
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
        CALIBRATION,
        summary.n,
    )
    yield from _temperature(summary)


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
        CALIBRATION,
        len(y),
    )


def groups(summary: Summary, seed: int) -> Found:
    """Ask who pays: the worst class, and within classes the worst group of every column.

    Equal groups differ by chance. How much is simulated: every group is drawn with the accuracy of its class, and the
    95th percentile of the worst gap, with five points on top, is normal.
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
        (None, bound, f"at most {bound:.3g}: equal groups show {bound - GROUP_TOLERANCE:.2g} by chance, and 0.05"),
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
        "shortcuts/shortcut-learning",
        len(y),
    )


def strangers(summary: Summary, seed: int) -> Found:
    """Ask whether rows from elsewhere lie farther from the classes: Mahalanobis distance with a shared covariance.

    Each sampled row is scored with the moments of the seven parts it is not in, so that no row vouches for itself.
    """
    if summary.outliers is None:
        yield Skipped(ELSEWHERE, "it needs features of outliers (outliers=, --ood)")
        return
    if _constant(summary):
        yield Skipped(ELSEWHERE, CONSTANT)
        return
    part = part_of(summary.sample.index)
    scores, theirs = torch.zeros(len(part), dtype=torch.float64), []
    try:
        for g, rest in summary.without():
            distance = _mahalanobis(rest, summary.n)
            scores[part == g] = distance(summary.sample.features[part == g])
            theirs.append(distance(summary.outliers))
    except (ValueError, torch.linalg.LinAlgError) as error:
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
            (SEPARATED, None, f"at least {SEPARATED:g} (a convention); 0.5 is chance"),
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
    factor = torch.linalg.cholesky(covariance)
    centre = means.mean(0)
    white = torch.linalg.solve_triangular(factor, (means - centre).T, upper=False).T

    def distance(x: Tensor) -> Tensor:
        rows = torch.linalg.solve_triangular(factor, (x.to(centre) - centre).T, upper=False).T
        return torch.cat([torch.cdist(part, white).amin(1) for part in rows.split(4096)]) if len(rows) else rows[:, 0]

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


LENSES: tuple[Callable[[Summary, int], Found], ...] = (dimensions, collapse, calibration, groups, strangers)
