"""Lenses on the features: how many numbers they need, and what shape their classes have.

Public: `dimensions`, `collapse`.
"""

import math

import torch
from torch import Tensor

from companion.collapse import NearestMeanDisagreement, NeuralCollapse
from companion.dimensionality import TwoNN
from companion.geometry import pairwise_cosine
from companion.report.findings import CONSTANT, TOLERANCE, Estimate, Found, Skipped, jackknife, make
from companion.report.streaming import Summary, constant, covariance_of
from companion.shortcuts import wilson_interval

__all__ = ["collapse", "dimensions"]

COSINE = math.sqrt(0.5)  # 45 degrees: half of a squared length lies along the other direction
DEAD = 0.1  # share of columns that never change
DIMENSIONS = "dimensionality (participation_ratio, dead_features, intrinsic_dimension)"
SHAPE = "collapse (nc1, closest_classes, nc3, nc4, closest_weights)"
GEOMETRY = "dimensionality/intrinsic-dimension"
COLLAPSE = "collapse/neural-collapse"


def _participation(covariance: Tensor) -> float:
    square = float(covariance.square().sum())
    return float(covariance.trace()) ** 2 / square if square > 0 else math.nan


def dimensions(summary: Summary, seed: int) -> Found:
    r"""Ask how many numbers the features need.

    A participation ratio $(\sum\lambda)^2/\sum\lambda^2$ below 2 means that one direction holds more than half of the
    variance, since $\sum_i p_i^2 > \tfrac12$ needs a $p_i > \tfrac12$. The intrinsic dimension is held against that of
    Gaussian noise with the same covariance and sample size: a trained layer is thinner than that.

    >>> from companion.report import checkup
    >>> round(checkup([[0.0, 1.0, 5.0], [1.0, 0.0, 5.0], [0.0, -1.0, 5.0], [-1.0, 0.0, 5.0]])["dead_features"].value, 3)
    0.333
    """
    if constant(summary):
        yield Skipped(DIMENSIONS, CONSTANT)
        return
    n, covariance = summary.n, covariance_of(summary.whole())
    parts = [_participation(covariance_of(rest)) for _, rest in summary.without()]
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

    >>> from companion.report import checkup
    >>> round(checkup([[0.5], [1.5], [-0.5], [-1.5]], [0, 0, 1, 1])["nc1"].value, 6)  # means at +-1, spread 1/2
    0.125
    """
    if summary.present is None:
        yield Skipped(SHAPE, "it needs labels")
        return
    if len(summary.present) < 2 or constant(summary):
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
            f"at most {bound:.3g}: twice the error, as two classifiers of that error can differ, plus {TOLERANCE:g}",
        ),
        f"For {differ:.1%} of the sampled rows the nearest class mean is another class than the predicted one.",
        COLLAPSE,
        m,
    )
