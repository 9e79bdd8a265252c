"""What happens to labels in the wild: long tails, noise, and splits that keep the classes' shares.

Public: `long_tailed`, `noisy_labels`, `stratified_split`, `transition_matrix`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from companion.checks import as_tensor, check_generator, check_in_range, check_labels, check_positive_int

__all__ = ["long_tailed", "noisy_labels", "stratified_split", "transition_matrix"]


def long_tailed(
    labels: Any,
    ratio: float = 100.0,
    kind: str = "exponential",
    n_max: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Choose a subset in which class 0 is common and the last class `ratio` times rarer.

    "exponential" keeps $n_c = n_{\max}\, r^{-c/(C-1)}$ of class c; "step" keeps $n_{\max}$ of the first half of the
    classes and $n_{\max}/r$ of the others. At least one of each class stays.

    Args:
        labels: (n,) classes 0..C-1.
        ratio: the largest class over the smallest, at least 1.
        kind: "exponential" or "step".
        n_max: size of the largest class; None: as many as every class could supply.
        generator: a cpu generator; None means torch's default one.

    Returns:
        (k,) indices into `labels`, in random order.

    Raises:
        ValueError: a ratio below one, an unknown kind, or a class with too few members.

    >>> kept = long_tailed(torch.arange(4).repeat_interleave(64), ratio=8)
    >>> torch.arange(4).repeat_interleave(64)[kept].bincount().tolist()
    [64, 32, 16, 8]
    """
    labels, generator = check_labels(labels).cpu(), check_generator(generator)
    counts = labels.bincount()
    n_classes = len(counts)
    ratio = check_in_range(ratio, "ratio", 1)
    place = torch.arange(n_classes, dtype=torch.float64)
    if kind == "exponential":
        share = ratio ** -(place / max(n_classes - 1, 1))
    elif kind == "step":
        share = torch.where(place < (n_classes + 1) // 2, 1.0, 1 / ratio).double()
    else:
        raise ValueError(f"expected kind 'exponential' or 'step', got {kind!r}")
    if n_max is None:
        n_max = int((counts / share).floor().min())
    wanted = (n_max * share).round().long().clamp(min=1)
    short = (wanted > counts).nonzero().flatten().tolist()
    if n_max < 1 or short:
        raise ValueError(f"n_max={n_max} asks for {wanted.tolist()} per class, there are {counts.tolist()}")
    order = torch.randperm(len(labels), generator=generator)
    kept = [order[labels[order] == c][: int(wanted[c])] for c in range(n_classes)]
    kept = torch.cat(kept)
    return kept[torch.randperm(len(kept), generator=generator)]


def transition_matrix(n_classes: int, rate: float, kind: str = "uniform") -> Tensor:
    """Return the probabilities that class i is labelled j, for the noise of `noisy_labels` that ignores the input.

    Args:
        n_classes: C, at least 2.
        rate: probability that a label is wrong.
        kind: "uniform" (any other class) or "pair" (the next class, cyclically).

    Returns:
        (C, C) float64, rows sum to one.

    Raises:
        ValueError: fewer than two classes, a rate out of range, an unknown kind.

    >>> transition_matrix(3, 0.2)[0].tolist()
    [0.8, 0.1, 0.1]
    """
    n_classes, rate = check_positive_int(n_classes, "n_classes", 2), check_in_range(rate, "rate", 0, 1)
    eye = torch.eye(n_classes, dtype=torch.float64)
    if kind == "uniform":
        return (1 - rate) * eye + rate / (n_classes - 1) * (1 - eye)
    if kind == "pair":
        return (1 - rate) * eye + rate * eye.roll(1, 1)
    raise ValueError(f"expected kind 'uniform' or 'pair', got {kind!r}")


def noisy_labels(
    labels: Any,
    rate: float,
    kind: str = "uniform",
    *,
    features: Any = None,
    n_classes: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Replace labels by wrong ones, each independently with probability `rate`.

    "uniform" moves to any other class, "pair" to the next one (cyclically). "instance" lets the input decide: a random
    direction per class scores each input, the wrong class is drawn from the softmax of the scores, and hard
    inputs (small margin between the true class's score and the best other one) are flipped more often; the average
    of the flip probabilities is `rate`.

    Args:
        labels: (n,) classes 0..C-1.
        rate: expected share of wrong labels, in [0, 1].
        kind: "uniform", "pair" or "instance".
        features: (n, ...) inputs, for "instance" only.
        n_classes: C; None: the largest label plus one.
        generator: a cpu generator; None means torch's default one.

    Returns:
        (noisy labels (n,), was_flipped (n,) bool).

    Raises:
        ValueError: a rate outside [0, 1], fewer than two classes, an unknown kind, or missing features.

    >>> noisy, flipped = noisy_labels([0, 1, 2] * 100, 1.0, "pair")
    >>> noisy[:3].tolist(), bool(flipped.all())
    ([1, 2, 0], True)
    """
    labels, generator = check_labels(labels).cpu(), check_generator(generator)
    n_classes = int(labels.max()) + 1 if n_classes is None else n_classes
    if n_classes <= labels.max():
        raise ValueError(f"expected labels below n_classes={n_classes}, got {int(labels.max())}")
    if kind == "instance":
        table = _instance_noise(labels, rate, features, n_classes, generator)
    else:
        table = transition_matrix(n_classes, rate, kind)[labels]
    noisy = torch.multinomial(table, 1, generator=generator).squeeze(1)
    return noisy, noisy != labels


def _instance_noise(
    labels: Tensor, rate: float, features: Any, n_classes: int, generator: torch.Generator | None
) -> Tensor:
    """Return (n, C): the probability of each label given the input."""
    if features is None:
        raise ValueError("noise of kind 'instance' needs the inputs: pass features=")
    x = as_tensor(features, "features").to("cpu", torch.float64).flatten(1)
    if len(x) != len(labels):
        raise ValueError(f"expected one row of features per label, got {len(x)} and {len(labels)}")
    transition_matrix(n_classes, rate)  # checks both numbers
    x = (x - x.mean(0)) / x.std(0, correction=0).clamp(min=1e-8)
    scores = x @ torch.randn(x.shape[1], n_classes, generator=generator, dtype=torch.float64)
    scores = scores / scores.std().clamp(min=1e-8)
    own = torch.nn.functional.one_hot(labels, n_classes).bool()
    others = scores.masked_fill(own, -math.inf)
    difficulty = others.amax(1) - scores[own]
    flip = _with_mean(difficulty, rate).unsqueeze(1)
    return torch.where(own, 1 - flip, flip * others.softmax(1))


def _with_mean(score: Tensor, mean: float) -> Tensor:
    """Return sigmoid(score + b) with the b, found by bisection, that gives it this mean."""
    if mean in (0, 1):
        return torch.full_like(score, mean)
    low, high = -score.max() - 40, -score.min() + 40
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if (score + middle).sigmoid().mean() < mean else (low, middle)
    return (score + high).sigmoid()


def stratified_split(
    labels: Any, fractions: Sequence[float] = (0.5, 0.5), generator: torch.Generator | None = None
) -> tuple[Tensor, ...]:
    """Split indices into parts that hold the same share of every class.

    Two parts have each class's share to within one sample, more parts to within two.

    Args:
        labels: (n,) classes 0..C-1.
        fractions: of the parts; positive, summing to at most one (the rest is left out).
        generator: a cpu generator; None means torch's default one.

    Returns:
        One index tensor per part, each in random order.

    Raises:
        ValueError: fractions that are not positive or sum to more than one.

    >>> train, test = stratified_split([0] * 60 + [1] * 40, (0.8, 0.2))
    >>> len(train), len(test)
    (80, 20)
    """
    labels, generator = check_labels(labels).cpu(), check_generator(generator)
    shares = torch.tensor([0.0, *fractions], dtype=torch.float64).cumsum(0)
    if len(shares) < 2 or min(fractions) <= 0 or shares[-1] > 1 + 1e-9:
        raise ValueError(f"expected positive fractions that sum to at most one, got {tuple(fractions)}")
    parts: list[list[Tensor]] = [[] for _ in fractions]
    order = torch.randperm(len(labels), generator=generator)
    seen = 0
    for c in labels.unique():
        members = order[labels[order] == c]
        # rounding the running totals keeps the parts' sizes right as well as each class's share
        cuts = (shares * (seen + len(members))).round() - (shares * seen).round()
        cuts = cuts.clamp(max=len(members)).cummax(0).values.long().tolist()
        seen += len(members)
        for part, start, stop in zip(parts, cuts, cuts[1:]):
            part.append(members[start:stop])
    joined = [torch.cat(part) for part in parts]
    return tuple(part[torch.randperm(len(part), generator=generator)] for part in joined)
