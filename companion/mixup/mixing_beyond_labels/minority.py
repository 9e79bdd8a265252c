"""New points for a rare class, on the segments between its neighbours: SMOTE, and what to hold it against.

Public: `smote_points`, `SMOTE`, `under_sample`, `replicate`, `joint_roc_hull`, and what they return: `SyntheticPoints`,
`JointHull`.
"""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from sklearn.base import BaseEstimator, OneToOneFeatureMixin
from sklearn.preprocessing import label_binarize
from sklearn.utils import InputTags, Tags
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import column_or_1d, validate_data
from torch import Tensor

from companion.checks import (
    check_features,
    check_generator,
    check_in_range,
    check_labels,
    check_positive_int,
    check_same_length,
)
from companion.geometry import single
from companion.neighbors import knn

__all__ = ["SMOTE", "JointHull", "SyntheticPoints", "joint_roc_hull", "replicate", "smote_points", "under_sample"]

STRATEGIES = ("auto", "minority", "not minority", "not majority", "all")


class SyntheticPoints(NamedTuple):
    """Points on segments, with the ends they lie between.

    Attributes:
        points: (m, d), each `x[base] + lam * (x[neighbour] - x[base])`.
        base: (m,) rows of the input they start from.
        neighbour: (m,) rows they lead to.
        lam: (m,) places on the segment, in [0, 1).
    """

    points: Tensor
    base: Tensor
    neighbour: Tensor
    lam: Tensor


def smote_points(x: Any, n: int, k: int = 5, generator: torch.Generator | int | None = None) -> SyntheticPoints:
    r"""Draw n new points on segments between rows of x and one of their k nearest neighbours.

    $\tilde x = x_i + \lambda\,(x_j - x_i)$, with i uniform, j uniform among the k nearest neighbours of i in x, and
    $\lambda$ uniform in [0, 1). Only the rows that are drawn are searched for, which saves a third of the work when
    as many points are wanted as there are.

    Args:
        x: the rare class, shape (m, d).
        n: how many points to draw.
        k: neighbours to choose from, at most m - 1.
        generator: a seed will do, None uses torch's default generator.

    Returns:
        `SyntheticPoints(points, base, neighbour, lam)`.

    Raises:
        ValueError: k not below the number of rows, NaN or infinity.

    >>> new = smote_points([[0.0, 0.0], [1.0, 1.0]], 3, k=1, generator=torch.Generator().manual_seed(0))
    >>> new.points.shape, torch.equal(new.points[:, 0], new.points[:, 1])
    (torch.Size([3, 2]), True)

    Paper: chawla2002smote
    Chapter: mixup/mixing-beyond-labels
    """
    x = check_features(x).detach()
    n, k, generator = check_positive_int(n, "n"), check_positive_int(k, "k"), check_generator(generator)
    if k >= len(x):
        raise ValueError(f"expected k below the number of rows, {len(x)}, got k={k}: take a smaller k")
    base = torch.randint(len(x), (n,), generator=generator).to(x.device)
    rank = torch.randint(k, (n,), generator=generator).to(x.device)
    lam = torch.rand(n, generator=generator, dtype=torch.float64).to(x)
    if n >= 4 * len(x):  # nearly every row is drawn: search for all of them at once
        neighbour = knn(x, k=k).indices[base, rank]
    else:
        drawn, place = base.unique(return_inverse=True)
        neighbour = _others(x, drawn, k)[place, rank]
    return SyntheticPoints(torch.lerp(x[base], x[neighbour], lam[:, None]), base, neighbour, lam)


def _others(x: Tensor, rows: Tensor, k: int) -> Tensor:
    """Return the k nearest neighbours of some rows of x, none of them the row itself: (len(rows), k)."""
    found = knn(x[rows], x, k=k + 1).indices  # (r, k + 1), the row itself among them unless it has many duplicates
    own = found == rows[:, None]
    own[:, -1] |= ~own.any(1)
    return found[~own].view(len(rows), k)


@dataclass
class _SamplerKind:
    """What imbalanced-learn's checks ask a sampler about itself."""

    sample_indices: bool = False


@dataclass
class _SamplerInput(InputTags):
    dataframe: bool = True


@dataclass
class _SamplerTags(Tags):
    sampler_tags: Any = field(default_factory=_SamplerKind)


class SMOTE(OneToOneFeatureMixin, BaseEstimator):
    r"""Synthetic minority over-sampling: fill rare classes with points $x_i + \lambda (x_j - x_i)$ between neighbours.

    The contract is that of imbalanced-learn's samplers: `fit_resample(X, y)` returns the given samples followed by the
    new ones, in the kind they came in (array, sparse matrix, data frame, list, tensor), and an
    `imblearn.pipeline.Pipeline` resamples when it is fitted and never when it predicts. Whole-number columns become
    floats, because points between whole numbers are none.

    Args:
        sampling_strategy: "auto" or "not majority" (every class but the largest is filled up to it), "minority" (only
            the smallest), "not minority", "all", a number r in (0, 1] (two classes: the rare one becomes r times the
            other), a dict {class: count to reach}, or a function of y that returns such a dict.
        random_state: None (torch's default generator), a whole number, a `torch.Generator`, or NumPy's.
        k_neighbors: neighbours to choose from, below the count of every class that is filled up.

    Attributes:
        sampling_strategy_: {class: how many points were added}.
        n_features_in_: d.

    >>> X, y = np.arange(24.0).reshape(12, 2), np.array([0] * 8 + [1] * 4)
    >>> X_new, y_new = SMOTE(k_neighbors=2, random_state=0).fit_resample(X, y)
    >>> X_new.shape, np.bincount(y_new).tolist()
    ((16, 2), [8, 8])

    Paper: chawla2002smote
    Chapter: mixup/mixing-beyond-labels
    """

    def __init__(self, *, sampling_strategy: Any = "auto", random_state: Any = None, k_neighbors: int = 5):
        self.sampling_strategy = sampling_strategy
        self.random_state = random_state
        self.k_neighbors = k_neighbors

    def fit(self, X: Any, y: Any) -> "SMOTE":
        """Check the data and say in `sampling_strategy_` what `fit_resample` would add.

        Args:
            X: samples (n, d).
            y: classes (n,).
        """
        self._read(X, y)
        return self

    def fit_resample(self, X: Any, y: Any) -> tuple[Any, Any]:
        """Return the samples and their classes with the new points behind them.

        Args:
            X: samples (n, d): array, sparse matrix, data frame, list or tensor.
            y: classes (n,), or one-hot rows.

        Returns:
            (X, y) of the kinds they came in.

        Raises:
            ValueError: one class only, a strategy that would remove samples, k not below a class's count.
        """
        rows, classes, one_hot = self._read(X, y)
        generator = check_generator(self.random_state, "random_state")
        new_rows, new_classes = [], []
        for label, n_new in self.sampling_strategy_.items():
            if n_new == 0:
                continue
            members = rows[np.flatnonzero(classes == label)]
            members = members.toarray() if sparse.issparse(members) else members
            if self.k_neighbors >= len(members):
                raise ValueError(
                    f"expected k_neighbors below the {len(members)} samples of class {label}, got {self.k_neighbors}"
                )
            points = smote_points(torch.as_tensor(members), n_new, self.k_neighbors, generator).points
            new_rows.append(points.numpy())
            new_classes.append(np.full(n_new, label, dtype=classes.dtype))
        if sparse.issparse(rows):
            rows = sparse.vstack([rows, *(sparse.csr_array(r) for r in new_rows)], format=rows.format)
        else:
            rows = np.concatenate([rows, *new_rows])
        filled = np.concatenate([classes, *new_classes])
        if one_hot:
            filled = label_binarize(filled, classes=np.unique(classes))
        return _like(rows, X), _like(filled, y)

    def _read(self, X: Any, y: Any) -> tuple[Any, np.ndarray, bool]:
        """Return the samples as array or sparse matrix, the classes, and whether they came as one-hot rows."""
        check_positive_int(self.k_neighbors, "k_neighbors")
        X, y = (single(v).detach().cpu().numpy() if isinstance(v, Tensor) else v for v in (X, y))
        if y is None:
            raise ValueError("requires y to be passed, but the target y is None")
        check_classification_targets(y)
        one_hot = type_of_target(y) == "multilabel-indicator"
        if one_hot:
            y = np.asarray(y)
            if (y.sum(1) != 1).any():
                raise ValueError("Multilabel and multioutput targets are not supported: pass one class per sample")
            y = y.argmax(1)
        else:
            y = column_or_1d(y)
        X, y = validate_data(self, X, y, accept_sparse=["csr", "csc"], dtype=[np.float64, np.float32])
        self.sampling_strategy_ = _wanted(self.sampling_strategy, y)
        return X, y, one_hot

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        kept = {name: getattr(tags, name) for name in Tags.__dataclass_fields__}
        tags = _SamplerTags(**{**kept, "estimator_type": "sampler"})
        tags.input_tags = _SamplerInput(sparse=True)
        tags.target_tags.required = True
        tags.target_tags.one_d_labels = True
        return tags


def _wanted(strategy: Any, y: np.ndarray) -> dict[Any, int]:
    """Return how many points each class is to get."""
    labels, counts = np.unique(y, return_counts=True)
    if len(labels) < 2:
        raise ValueError(f"expected at least two classes in y, got 1 class ({labels[0]!r})")
    have = dict(zip(labels.tolist(), counts.tolist()))
    if callable(strategy):
        strategy = strategy(y)
    if isinstance(strategy, str):
        if strategy not in STRATEGIES:
            raise ValueError(f"expected a sampling_strategy among {STRATEGIES}, got {strategy!r}")
        most, least = max(have, key=have.get), min(have, key=have.get)
        left_out = {"minority": set(have) - {least}, "not minority": {least}, "all": set()}.get(strategy, {most})
        return {label: have[most] - n for label, n in have.items() if label not in left_out}
    if isinstance(strategy, Mapping):
        missing = [label for label in strategy if label not in have]
        fewer = [label for label, n in strategy.items() if label in have and n < have[label]]
        if missing or fewer:
            raise ValueError(
                f"expected a sampling_strategy with counts to reach for classes of y, none below what is there, "
                f"{have}; got {dict(strategy)}"
            )
        return {label: int(n) - have[label] for label, n in strategy.items()}
    if isinstance(strategy, numbers.Real) and not isinstance(strategy, bool):
        ratio = check_in_range(strategy, "sampling_strategy", 0, 1, "high")
        if len(labels) != 2:
            raise ValueError(f"expected two classes for a sampling_strategy that is a number, got {len(labels)}")
        rare, common = labels[np.argsort(counts, kind="stable")].tolist()
        n_new = int(ratio * have[common]) - have[rare]
        if n_new < 0:
            raise ValueError(
                f"expected a sampling_strategy of at least {have[rare] / have[common]:.4g}, the ratio there is, "
                f"got {strategy}: nothing is removed"
            )
        return {rare: n_new}
    raise ValueError(f"expected a sampling_strategy that is text, a number, a dict or a function, got {strategy!r}")


def _like(values: Any, given: Any) -> Any:
    """Return values as the kind of thing that was given."""
    if isinstance(given, Tensor):
        return torch.as_tensor(values).to(device=given.device, dtype=_float_dtype(given))
    if isinstance(given, list):
        return values.tolist()
    if not hasattr(given, "iloc"):
        return values
    import pandas as pd

    if not hasattr(given, "columns"):
        return pd.Series(values, dtype=given.dtype, name=given.name)
    if sparse.issparse(values):
        frame = pd.DataFrame.sparse.from_spmatrix(values, columns=given.columns)
    else:
        frame = pd.DataFrame(values, columns=given.columns)
    whole = values.dtype.kind == "f"  # a column of whole numbers has to become one of floats
    kept = {c: t for c, t in given.dtypes.items() if not (whole and getattr(t, "kind", "") in "iub")}
    return frame.astype(kept)


def _float_dtype(given: Tensor) -> torch.dtype | None:
    return given.dtype if given.is_floating_point() or given.dim() == 1 else None


def under_sample(labels: Any, ratio: float = 1.0, generator: torch.Generator | int | None = None) -> Tensor:
    """Choose all samples of the rarer class and so many of the other that the rarer one is `ratio` times as large.

    Args:
        labels: (n,), 0 or 1.
        ratio: rare over common after the choice, in (0, 1]; where it is there already, nothing is left out.
        generator: a cpu generator or a seed; None means torch's default generator.

    Returns:
        (k,) indices, ascending.

    >>> under_sample([0, 0, 0, 0, 1, 1], generator=torch.Generator().manual_seed(0)).shape
    torch.Size([4])

    Paper: chawla2002smote
    Chapter: mixup/mixing-beyond-labels
    """
    rare, common = _rare_and_common(labels, ratio)
    kept = min(len(common), round(len(rare) / ratio))
    chosen = common[torch.randperm(len(common), generator=check_generator(generator))[:kept]]
    return torch.cat([rare, chosen]).sort().values


def replicate(labels: Any, ratio: float = 1.0, generator: torch.Generator | int | None = None) -> Tensor:
    """Repeat samples of the rarer class, drawn with replacement, until it is `ratio` times as large as the other.

    Args:
        labels: (n,), 0 or 1.
        ratio: rare over common afterwards, in (0, 1]; where it is there already, nothing is repeated.
        generator: a cpu generator or a seed; None means torch's default generator.

    Returns:
        (k,) indices: all samples, then the repeated ones.

    >>> replicate([0, 0, 0, 1], generator=torch.Generator().manual_seed(0)).tolist()
    [0, 1, 2, 3, 3, 3]

    Paper: chawla2002smote
    Chapter: mixup/mixing-beyond-labels
    """
    rare, common = _rare_and_common(labels, ratio)
    missing = max(0, int(ratio * len(common)) - len(rare))
    extra = rare[torch.randint(len(rare), (missing,), generator=check_generator(generator))]
    return torch.cat([torch.arange(len(rare) + len(common)), extra])


def _rare_and_common(labels: Any, ratio: float) -> tuple[Tensor, Tensor]:
    check_in_range(ratio, "ratio", 0, 1, "high")
    labels = check_labels(labels, n_classes=2).cpu()
    groups = sorted(((labels == c).nonzero()[:, 0] for c in (1, 0)), key=len)
    if not len(groups[0]):
        raise ValueError("expected labels of both classes, got one class only")
    return groups[0], groups[1]


class JointHull(NamedTuple):
    """Corners of a convex hull in ROC space from (0, 0) to (1, 1), and the area under it."""

    fpr: Tensor
    tpr: Tensor
    area: Tensor


def joint_roc_hull(curves: Sequence[tuple[Any, ...]] | Sequence[Callable]) -> JointHull:
    """Return the convex hull of several ROC curves: the best that choosing among all their points could do.

    Args:
        curves: pairs (fpr, tpr, ...) such as those of `companion.ranking.roc_curve`, or of single classifiers.

    Returns:
        `JointHull(fpr, tpr, area)`, float64.

    Raises:
        ValueError: no curve, rates outside [0, 1], or not as many of one kind as of the other.

    >>> hull = joint_roc_hull([([0.1], [0.5]), ([0.4], [0.8]), ([0.5], [0.6])])
    >>> hull.fpr.tolist(), round(float(hull.area), 4)
    ([0.0, 0.1, 0.4, 1.0], 0.76)

    Paper: chawla2002smote
    Chapter: mixup/mixing-beyond-labels
    """
    if not len(curves):
        raise ValueError("expected at least one curve, got none")
    points = [(0.0, 0.0), (1.0, 1.0)]
    for fpr, tpr, *_ in curves:
        check_same_length(fpr=fpr, tpr=tpr)
        points += zip(*(torch.as_tensor(v, dtype=torch.float64).flatten().tolist() for v in (fpr, tpr)))
    if not all(math.isfinite(v) and 0 <= v <= 1 for point in points for v in point):
        raise ValueError("expected rates in [0, 1], got some outside")
    hull: list[tuple[float, float]] = []
    for x, y in sorted(points):
        while len(hull) > 1 and _is_below(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    while hull[-1] != (1.0, 1.0):  # points straight above the end
        hull.pop()
    fpr, tpr = torch.tensor(hull, dtype=torch.float64).T
    return JointHull(fpr, tpr, torch.trapezoid(tpr, fpr))


def _is_below(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[0] - a[0]) * (c[1] - a[1]) >= (b[1] - a[1]) * (c[0] - a[0])
