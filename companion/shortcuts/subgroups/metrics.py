"""Accuracy by group over a stream: per group, of the worst group, and how much it varies within a class.

Public: `SubgroupAccuracy`, `WorstGroupAccuracy`, `MacroStd` (each a `torchmetrics.Metric`) and what they return,
`GroupAccuracies`, `WorstGroup`, `MacroStdResult`; `predicted_classes`, which all of them read predictions with.

Their states are whole-number counts that add up, so batches, `merge_state` and processes under `torchrun` give the
answer of a single pass, exactly. A group without samples has accuracy NaN and a group of one has an interval that says
so; neither is averaged away.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from companion.checks import as_tensor, check_in_range, check_labels, check_logits, check_positive_int
from companion.shortcuts.subgroups.intervals import wilson_interval

__all__ = [
    "GroupAccuracies",
    "MacroStd",
    "MacroStdResult",
    "SubgroupAccuracy",
    "WorstGroup",
    "WorstGroupAccuracy",
    "predicted_classes",
]


class GroupAccuracies(NamedTuple):
    """Accuracy per group (G,), NaN where a group is empty, with its interval and the counts."""

    accuracy: Tensor
    low: Tensor
    high: Tensor
    counts: Tensor


class WorstGroup(NamedTuple):
    """The lowest accuracy with its interval, which group, its count; `skipped` (G,) were too small."""

    accuracy: Tensor
    low: Tensor
    high: Tensor
    group: Tensor
    count: Tensor
    skipped: Tensor


class MacroStdResult(NamedTuple):
    """MacroStd, what equal groups would show of it by chance, and where it comes from.

    `value` and `noise` are scalars, `per_class` (C,), `accuracy` and `counts` (C, G); NaN marks what has no samples.
    """

    value: Tensor
    noise: Tensor
    per_class: Tensor
    accuracy: Tensor
    counts: Tensor


def predicted_classes(predictions: Any, n_classes: int | None = None, device: Any = None) -> Tensor:
    """Return predicted classes (n,) from classes, or from logits or probabilities (n, C), of which the largest counts.

    Args:
        predictions: whole numbers (n,), or numbers (n, C).
        n_classes: C (None: no upper bound).
        device: where they have to be (None: wherever they are).

    Raises:
        ValueError: another shape, NaN, classes outside 0..C-1.
        TypeError: (n,) numbers that are not whole.

    >>> predicted_classes([[0.2, 0.8], [0.9, 0.1]])
    tensor([1, 0])

    Chapter: shortcuts/subgroups
    """
    predictions = as_tensor(predictions, "predictions", device)
    if predictions.dim() != 2:
        return check_labels(predictions, n_classes=n_classes, name="predictions")
    if not torch.isfinite(predictions).all():
        check_logits(predictions, "predictions")  # says what is wrong
    if n_classes is not None and predictions.shape[1] != n_classes:
        raise ValueError(f"expected predictions with {n_classes} columns, got shape {tuple(predictions.shape)}")
    return predictions.detach().argmax(1)


class _Counted(Metric):
    """Counts of samples and of successes per cell."""

    is_differentiable = False
    full_state_update = False
    right: Tensor
    total: Tensor

    def __init__(self, shape: tuple[int, ...], level: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.level = check_in_range(level, "level", 0, 1, inclusive="neither")
        self.shape = shape
        for name in ("right", "total"):
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def _add(self, cells: Tensor, correct: Tensor) -> None:
        size = self.total.numel()
        self.total += torch.bincount(cells, minlength=size).view(self.shape)
        self.right += torch.bincount(cells[correct], minlength=size).view(self.shape)

    def _accuracy(self) -> Tensor:
        if not int(self.total.sum()):
            raise ValueError("expected at least one sample before compute(), got none")
        wide = torch.float32 if self.total.device.type == "mps" else torch.float64
        return self.right.to(wide) / self.total  # 0 / 0 is NaN: a cell without samples has no accuracy


class SubgroupAccuracy(_Counted):
    r"""Accuracy of each group, with its interval.

    $$\mathrm{acc}_g = \frac{1}{n_g} \sum_{i:\, g_i = g} 1[\hat y_i = y_i]$$

    Args:
        num_groups: G, at least 2; groups are whole numbers 0..G-1.
        level: of the Wilson intervals.
        **kwargs: for `torchmetrics.Metric`.

    Raises:
        ValueError: groups outside 0..G-1, lengths that differ; `compute` before any sample.

    >>> metric = SubgroupAccuracy(num_groups=3)
    >>> metric.update([1, 0, 1, 1], [1, 0, 0, 1], groups=[0, 0, 1, 1])
    >>> metric.compute().accuracy
    tensor([1.0000, 0.5000,    nan], dtype=torch.float64)

    Paper: liang2023accuracy
    Chapter: shortcuts/subgroups
    """

    higher_is_better = True

    def __init__(self, num_groups: int, *, level: float = 0.95, **kwargs: Any):
        super().__init__((check_positive_int(num_groups, "num_groups", 2),), level, **kwargs)

    def update(self, predictions: Any, labels: Any, groups: Any) -> None:
        """Take in predictions, classes (n,) or logits (n, C), labels (n,) and groups (n,)."""
        predictions = predicted_classes(predictions, device=self.device)
        labels = check_labels(labels, n=len(predictions), device=self.device)
        groups = check_labels(groups, len(predictions), self.shape[0], "groups", device=self.device)
        self._add(groups, predictions == labels)

    def compute(self) -> Any:
        """Return `GroupAccuracies(accuracy, low, high, counts)`, each (G,)."""
        return GroupAccuracies(
            self._accuracy(), *wilson_interval(self.right, self.total, self.level), self.total.clone()
        )


class WorstGroupAccuracy(SubgroupAccuracy):
    r"""The accuracy of the group that fares worst, $\min_g \mathrm{acc}_g$, and which group that is.

    The minimum of many noisy numbers lies below the smallest true one: read it with its interval, and with
    `subgroup_report`, which says how low it would fall by chance.

    Args:
        num_groups: G, at least 2; groups are whole numbers 0..G-1.
        min_count: groups with fewer samples cannot be the worst; they are marked in `skipped`.
        level: of the Wilson interval.
        **kwargs: for `torchmetrics.Metric`.

    Raises:
        ValueError: groups outside 0..G-1, lengths that differ; `compute` while no group has `min_count` samples.

    >>> metric = WorstGroupAccuracy(num_groups=3)
    >>> metric.update([1, 0, 1, 1], [1, 0, 0, 1], groups=[0, 0, 1, 1])
    >>> worst = metric.compute()
    >>> worst.accuracy.item(), worst.group.item(), worst.skipped.tolist()
    (0.5, 1, [False, False, True])

    Paper: chiu2023better
    Chapter: shortcuts/subgroups
    """

    def __init__(self, num_groups: int, *, min_count: int = 1, level: float = 0.95, **kwargs: Any):
        super().__init__(num_groups, level=level, **kwargs)
        self.min_count = check_positive_int(min_count, "min_count")

    def compute(self) -> WorstGroup:
        """Return `WorstGroup(accuracy, low, high, group, count, skipped)`."""
        accuracy, low, high, counts = super().compute()
        enough = counts >= self.min_count
        if not bool(enough.any()):
            raise ValueError(f"expected a group of at least {self.min_count} samples, got at most {int(counts.max())}")
        g = torch.where(enough, accuracy, torch.inf).argmin()
        return WorstGroup(accuracy[g], low[g], high[g], g, counts[g], ~enough)


class MacroStd(_Counted):
    r"""How much accuracy varies between the groups of a class, averaged over classes.

    $$\mathrm{MacroStd} = \frac1C \sum_c \sqrt{\sum_g w_{cg} (\mathrm{acc}_{cg} - \mathrm{acc}_c)^2},
    \qquad w_{cg} = n_{cg} / n_c$$

    Small cells vary by chance. If the errors of a class fell on its groups at random, the expected square under the
    root would be exactly $\mathrm{acc}_c (1 - \mathrm{acc}_c)(G_c - 1)/(n_c - 1)$, with $G_c$ groups that have
    samples; `noise` is the MacroStd of that. A value near its noise says nothing about the groups.

    Args:
        num_classes: C.
        num_groups: G, at least 2; the groups of different classes share their numbers (backgrounds, sites).
        **kwargs: for `torchmetrics.Metric`.

    Raises:
        ValueError: labels or groups out of range, lengths that differ; `compute` before any sample.

    >>> metric = MacroStd(num_classes=2, num_groups=2)
    >>> metric.update([0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1], groups=[0, 0, 1, 1, 0, 1])
    >>> metric.compute().value  # class 0 is all right in group 0 and all wrong in group 1; class 1 is even
    tensor(0.2500, dtype=torch.float64)

    Paper: chiu2023better
    Chapter: shortcuts/subgroups
    """

    higher_is_better = False

    def __init__(self, num_classes: int, num_groups: int, **kwargs: Any):
        shape = (check_positive_int(num_classes, "num_classes"), check_positive_int(num_groups, "num_groups", 2))
        super().__init__(shape, 0.95, **kwargs)

    def update(self, predictions: Any, labels: Any, groups: Any) -> None:
        """Take in predictions, classes (n,) or logits (n, C), labels (n,) and groups (n,)."""
        n_classes, n_groups = self.shape
        predictions = predicted_classes(predictions, n_classes, self.device)
        labels = check_labels(labels, len(predictions), n_classes, device=self.device)
        groups = check_labels(groups, len(predictions), n_groups, "groups", device=self.device)
        self._add(labels * n_groups + groups, predictions == labels)

    def compute(self) -> MacroStdResult:
        """Return `MacroStdResult(value, noise, per_class, accuracy, counts)`; the mean is over classes with samples."""
        accuracy = self._accuracy()  # (C, G)
        n = self.total.sum(1)
        of_class = self.right.sum(1) / n.to(accuracy.dtype)  # (C,)
        weights = self.total / n.clamp_min(1).to(accuracy.dtype)[:, None]
        variance = (weights * (accuracy.nan_to_num() - of_class[:, None]).square()).sum(1)
        present = (self.total > 0).sum(1)
        by_chance = of_class * (1 - of_class) * (present - 1) / (n - 1).clamp_min(1)
        return MacroStdResult(
            variance.sqrt().nanmean(), by_chance.sqrt().nanmean(), variance.sqrt(), accuracy, self.total.clone()
        )
