"""How far features have collapsed: the four measures, in one call or over a stream.

Public: `neural_collapse` (features in memory), `NeuralCollapse` (batches, several processes), `NearestMeanDisagreement`
(the second pass that nc4 of a stream needs).

All measures are zero for features that have collapsed completely. M holds the class means, centred at their own mean,
in its rows: (C, d).
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from companion.checks import as_tensor, check_features, check_labels, check_logits, check_positive_int
from companion.geometry import pairwise_cosine, single
from companion.statistics import ClassMoments

__all__ = ["NearestMeanDisagreement", "NeuralCollapse", "neural_collapse"]

CHUNK = 8192  # rows whose residuals are in memory at a time


@torch.no_grad()
def neural_collapse(features: Any, labels: Any, weight: Any = None, bias: Any = None) -> dict[str, Tensor]:
    r"""Measure how far the features of a classifier have collapsed.

    - `nc1` $= \frac1C\,\mathrm{tr}(\Sigma_W\Sigma_B^\dagger)$: the spread within classes, against that between them;
    - `nc2_norms`: the standard deviation of the lengths of the centred class means over their mean;
    - `nc2_angles`: the mean over pairs of $|\cos(\mu_c,\mu_{c'}) + \frac{1}{C-1}|$, how far from a simplex;
    - `nc3` $= \lVert W/\lVert W\rVert_F - M/\lVert M\rVert_F\rVert_F^2$: classifier against class means, from 0 to 4;
    - `nc4`: the share of samples that the classifier and the nearest class mean put into different classes.

    $\Sigma_W$ averages over samples, $\Sigma_B = \frac1C M^\top M$ over classes: both are the usual ones when classes
    have equal counts. The pseudo-inverse goes through the C x C Gram matrix of M, never through d x d. Half precision
    is measured in float32.

    Args:
        features: h, (n, d): what the last layer reads.
        labels: y, (n,).
        weight: W of the last layer, (C, d), for nc3 and nc4.
        bias: of the last layer, (C,).

    Returns:
        The measures by name, float64 scalars; nc3 and nc4 only with a weight.

    Raises:
        ValueError: shapes that do not match, a class without samples, one class only, class means that coincide.

    >>> h = torch.tensor([[2.0, 0.0], [2.0, 0.0], [-1.0, 3**0.5], [-1.0, -(3**0.5)]])
    >>> {name: round(float(value), 6) for name, value in neural_collapse(h, [0, 0, 1, 2], weight=h[1:]).items()}
    {'nc1': 0.0, 'nc2_norms': 0.0, 'nc2_angles': 0.0, 'nc3': 0.0, 'nc4': 0.0}

    Chapter: collapse/neural-collapse
    """
    features = check_features(features, "features")
    labels = check_labels(labels, len(features)).to(features.device)
    n_classes = int(labels.max()) + 1 if weight is None else len(as_tensor(weight, "weight"))
    labels = check_labels(labels, len(features), n_classes)
    if n_classes < 2:
        raise ValueError("expected at least two classes, got one")
    moments = ClassMoments(n_classes, features.shape[1], covariance=None).to(features.device)
    moments.update(features, labels)
    means, _, counts = moments.compute()
    _check_counts(counts)
    weight, bias = _check_head(weight, bias, means)

    wide = means.dtype
    centred = means - means.mean(0)  # (C, d)
    values, axes = _axes(centred)  # (k,), (d, k)
    dtype = single(features[:0]).dtype
    own, narrow = means.to(dtype), axes.to(dtype)
    drift = means - own.to(wide)  # what rounding the means leaves, (C, d)
    gram = centred @ centred.T  # (C, C)
    # |h - mu_c|^2 = const - 2 <h - mu_y, mu_c - mu> - 2 <mu_y - mu, mu_c - mu> + |mu_c - mu|^2
    between = (gram - gram.diagonal() / 2 - drift @ centred.T).to(dtype)
    onto_means = (axes.T @ centred.T).to(dtype)  # (k, C)
    squares = torch.zeros_like(values)
    differ = torch.zeros((), dtype=torch.int64, device=features.device)
    for h, y in zip(features.split(CHUNK), labels.split(CHUNK)):
        h = single(h)
        along = (h - own[y]) @ narrow  # (m, k)
        squares += along.square().sum(0).to(wide)
        if weight is not None:
            nearest = (along @ onto_means + between[y]).argmax(1)
            differ += (_logits(h, weight, bias).argmax(1) != nearest).sum()
    squares -= (counts.to(wide)[:, None] * (drift @ axes).square()).sum(0)
    measures = _geometry(centred, squares / len(features) / values, weight)
    if weight is not None:
        measures["nc4"] = differ.to(wide) / len(features)
    return measures


def _check_counts(counts: Tensor) -> None:
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"expected every class to have samples, got none for {empty[:10]}: relabel as 0..C-1")


def _check_head(weight: Any, bias: Any, means: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if weight is None:
        if bias is not None:
            raise ValueError("expected a weight together with the bias, got the bias alone")
        return None, None
    weight = check_features(weight, "weight").detach().to(means.device)
    if weight.shape != means.shape:
        raise ValueError(f"expected weight (C, d) = {tuple(means.shape)}, got {tuple(weight.shape)}")
    if bias is not None:
        bias = as_tensor(bias, "bias").to(means.device)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"expected bias ({len(weight)},), got {tuple(bias.shape)}")
    return weight, bias


def _logits(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    z = h @ weight.T.to(h.dtype)
    return z if bias is None else z + bias.to(h.dtype)


def _axes(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Return S^2 (k,) and V (d, k) of the centred class means M = U S V^T, so that Sigma_B^+ = C V S^-2 V^T.

    The spread within classes is measured along each axis by itself: one strong direction does not round the others.
    """
    values, vectors = torch.linalg.eigh(centred @ centred.T)  # M M^T = U S^2 U^T
    keep = values > values[-1] * max(centred.shape) * torch.finfo(values.dtype).eps * 10
    if not bool(keep.any()) or float(values[-1]) == 0:
        raise ValueError("expected class means that differ, got the same mean for every class")
    return values[keep], centred.T @ vectors[:, keep] / values[keep].sqrt()


def _geometry(centred: Tensor, ratios: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
    """Return nc1 to nc3 from the centred class means (C, d) and, along each of their axes, v^T Sigma_W v / s^2."""
    n_classes = len(centred)
    norms = centred.norm(dim=1)
    measures = {
        "nc1": ratios.sum(),
        "nc2_norms": norms.std(correction=0) / norms.mean(),
    }
    if bool((norms == 0).any()):
        raise ValueError("expected no class mean at the mean of all class means: it has no direction")
    cosines = pairwise_cosine(centred)
    measures["nc2_angles"] = (each_pair(cosines) + 1 / (n_classes - 1)).abs().mean()
    if weight is not None:
        weight = weight.to(centred)
        measures["nc3"] = ((weight / weight.norm() - centred / centred.norm()) ** 2).sum()
    return measures


def each_pair(matrix: Tensor) -> Tensor:
    """Return the entries above the diagonal of a square matrix, one for each pair.

    >>> each_pair(torch.tensor([[1, 2], [3, 4]]))
    tensor([2])
    """
    rows, columns = torch.triu_indices(*matrix.shape, offset=1, device=matrix.device)
    return matrix[rows, columns]


class NeuralCollapse(ClassMoments):
    """The measures nc1, nc2 and nc3 over a stream of batches, in one pass that merges across processes.

    It keeps counts, class means and one pooled within-class scatter matrix (d, d), however many samples there are, with
    a recurrence that stays exact in float32 when features are far from the origin. nc4 needs the final means: make a
    `NearestMeanDisagreement(metric.class_means())` and go through the data a second time.

    Args:
        num_classes: C.
        dim: d.
        weight: of the last layer, (C, d), for nc3; kept by reference, so that a layer in training is read as it is
            when `compute` is called.
        **kwargs: for `torchmetrics.Metric`.

    Raises:
        ValueError: features or labels that do not fit; `compute` while a class has no samples.

    >>> metric = NeuralCollapse(num_classes=3, dim=2)
    >>> metric.update(torch.tensor([[2.0, 0.0], [-1.0, 3**0.5]]), torch.tensor([0, 1]))
    >>> metric.update(torch.tensor([[-1.0, -(3**0.5)]]), torch.tensor([2]))
    >>> abs(round(float(metric.compute()["nc2_angles"]), 6))
    0.0

    Chapter: collapse/neural-collapse
    """

    higher_is_better = False
    is_differentiable = False

    def __init__(self, num_classes: int, dim: int, weight: Any = None, **kwargs: Any):
        check_positive_int(num_classes, "num_classes", minimum=2)
        super().__init__(num_classes, dim, covariance="pooled", **kwargs)
        self._head = (weight,)  # in a tuple, so that a Parameter does not become one of the metric's

    def class_means(self) -> Tensor:
        """Return the class means so far, (C, d), float64; NaN for a class not seen yet."""
        return super().compute().mean

    def compute(self) -> dict[str, Tensor]:
        """Return nc1, nc2_norms, nc2_angles and, with a weight, nc3."""
        means, within, counts = super().compute()
        _check_counts(counts)
        weight, _ = _check_head(self._head[0], None, means)
        centred = means - means.mean(0)
        values, axes = _axes(centred)
        return _geometry(centred, ((within @ axes) * axes).sum(0) / values, weight)


class NearestMeanDisagreement(Metric):
    """The measure nc4 over a stream: how often the classifier and the nearest class mean disagree.

    Args:
        means: the final class means (C, d), from `NeuralCollapse.class_means()`.
        **kwargs: for `torchmetrics.Metric`.

    Raises:
        ValueError: means with NaN, features or logits of another shape.

    >>> metric = NearestMeanDisagreement(torch.tensor([[0.0], [2.0]]))
    >>> metric.update(torch.tensor([[0.3], [1.8]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    >>> metric.compute()
    tensor(0.5000)

    Chapter: collapse/neural-collapse
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False

    def __init__(self, means: Any, **kwargs: Any):
        super().__init__(**kwargs)
        means = check_features(means, "means", min_samples=2)
        self.register_buffer("means", means - means.mean(0), persistent=False)
        self.register_buffer("centre", means.mean(0), persistent=False)
        self.add_state("differ", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, features: Any, logits: Any) -> None:
        """Take in features (n, d) and the classifier's logits (n, C) for them."""
        features, logits = check_features(features, "features"), check_logits(logits)
        if features.shape[1] != self.means.shape[1] or logits.shape != (len(features), len(self.means)):
            raise ValueError(
                f"expected features (n, {self.means.shape[1]}) and logits (n, {len(self.means)}), "
                f"got {tuple(features.shape)} and {tuple(logits.shape)}"
            )
        centred = features.to(self.means) - self.centre
        nearest = (centred @ self.means.T - (self.means**2).sum(1) / 2).argmax(1)
        self.differ += (nearest != logits.argmax(1)).sum()
        self.total += len(features)

    def compute(self) -> Tensor:
        """Return the share of samples on which they disagree."""
        if int(self.total) == 0:
            raise ValueError("expected at least 1 sample before compute(), got none")
        return self.differ / self.total
