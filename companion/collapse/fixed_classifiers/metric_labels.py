"""Prediction when labels live in a metric space: the Fréchet mean of what a classifier believes.

Public: `frechet_predict`, `LokiHead`, `locus`, `next_class`, `tree_metric`, `grid_metric`, `embedding_metric`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from companion.checks import as_tensor, check_features, check_in_range, check_labels, check_positive_int, check_probs
from companion.geometry import single

__all__ = ["LokiHead", "embedding_metric", "frechet_predict", "grid_metric", "locus", "next_class", "tree_metric"]

CHUNK = 1 << 24  # scores in memory at a time
_SLACK = 1e-7  # of the squared diameter: what counts as a tie


def _distances(distances: Any, name: str = "distances") -> Tensor:
    distances = check_features(distances, name)
    if (distances < 0).any():
        raise ValueError(f"expected {name} of at least 0, got {distances.min().item():.4g}")
    return distances


def frechet_predict(probs: Any, distances: Any, power: float = 2.0) -> Tensor:
    r"""Answer with the label that is closest, on weighted average, to what the classifier believes.

    $$\hat y = \arg\min_{y} \sum_k p_k \; d(y_k, y)^2$$

    The minimum runs over all labels, also those the classifier has never seen. It is one matrix product, in chunks.
    Ties go to the label that comes first. Plain argmax is the special case of a metric in which all labels are equally
    far from each other.

    Args:
        probs: p, (n, K), over the observed labels. Overconfident ones fall back to argmax: calibrate first.
        distances: d, (K, N), from every observed label to every label.
        power: of the distance; 2 is the mean, 1 the median.

    Returns:
        (n,) indices of labels in 0..N-1.

    Raises:
        ValueError: rows that are not probabilities, negative distances, shapes that do not match, a power of at most 0.

    >>> line = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])  # labels 0, 1, 2 on a line; 0 and 2 are observed
    >>> frechet_predict([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]], line)
    tensor([0, 1, 2])

    Paper: roberts2023geometry
    Chapter: collapse/fixed-classifiers
    """
    probs, distances = check_probs(probs), _distances(distances)
    if len(distances) != probs.shape[1]:
        raise ValueError(f"expected one row of distances per observed label ({probs.shape[1]}), got {len(distances)}")
    cost = distances.to(probs) ** check_in_range(power, "power", 0, inclusive="neither")
    rows = max(1, CHUNK // cost.shape[1])
    return torch.cat([(part @ cost).argmin(1) for part in probs.split(rows)])


class LokiHead(nn.Module):
    r"""Wrap a classifier over observed labels so that it scores all labels of a metric space.

    $$z_y = -\sum_k \mathrm{softmax}\big(f(x) / T\big)_k \; d(y_k, y)^2$$

    so that the largest output is the prediction of `frechet_predict`. Nothing is trained.

    Args:
        base: the classifier f, giving logits (n, K).
        distances: d, (K, N).
        temperature: T; 1 leaves the classifier's confidence as it is, higher reaches further between labels.
        power: of the distance.

    Raises:
        ValueError: negative distances, a temperature or power of at most 0.

    >>> line = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
    >>> LokiHead(nn.Identity(), line)(torch.tensor([[9.0, 0.0], [0.0, 0.1]])).argmax(1)
    tensor([0, 1])

    Paper: roberts2023geometry
    Chapter: collapse/fixed-classifiers
    """

    def __init__(self, base: nn.Module, distances: Any, temperature: float = 1.0, power: float = 2.0) -> None:
        super().__init__()
        self.base = base
        self.temperature = check_in_range(temperature, "temperature", 0, inclusive="neither")
        power = check_in_range(power, "power", 0, inclusive="neither")
        self.register_buffer("cost", _distances(distances) ** power)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores (n, N) of all labels, higher = closer."""
        logits = self.base(x)
        if logits.shape[-1] != len(self.cost):
            raise ValueError(f"expected {len(self.cost)} logits, one per observed label, got {logits.shape[-1]}")
        return -(logits / self.temperature).softmax(-1) @ self.cost.to(logits.dtype)


def _square(distances: Any, observed: Any) -> tuple[np.ndarray, np.ndarray]:
    d = _distances(distances)
    if d.shape[0] != d.shape[1] or not torch.allclose(d, d.T) or d.diagonal().any():
        raise ValueError("expected all pairwise distances (N, N): symmetric, with zeros on the diagonal")
    observed = check_labels(observed, n_classes=len(d), name="observed")
    if len(observed.unique()) != len(observed):
        raise ValueError("expected observed labels that are distinct, got repeated ones")
    return d.detach().double().cpu().numpy(), observed.cpu().numpy()


def locus(distances: Any, observed: Any, power: float = 2.0) -> Tensor:
    r"""Return which labels a Fréchet mean of the observed ones can be, for some probabilities.

    Label y is reachable when weights $w \ge 0$, $\sum_k w_k = 1$ exist with $\sum_k w_k\,d(y_k, y)^2 \le \sum_k
    w_k\,d(y_k, y')^2$ for all $y'$: one linear program per label, exact up to ties. In a tree it is the smallest
    subtree that holds the observed labels, on a grid roughly their convex hull.

    Args:
        distances: (N, N) between all labels.
        observed: indices of the observed labels.
        power: of the distance, as in `frechet_predict`.

    Returns:
        (N,) booleans; observed labels are reachable.

    Raises:
        ValueError: distances that are not symmetric with a zero diagonal, observed labels repeated or out of range.

    >>> path = (torch.arange(5.0)[:, None] - torch.arange(5.0)).abs()
    >>> locus(path, [1, 3])
    tensor([False,  True,  True,  True, False])

    Paper: roberts2023geometry
    Chapter: collapse/fixed-classifiers
    """
    d, observed = _square(distances, observed)
    cost = d[observed] ** check_in_range(power, "power", 0, inclusive="neither")  # (K, N)
    n_observed, n = cost.shape
    slack = _SLACK * max(cost.max(), np.finfo(float).tiny)
    reachable = np.zeros(n, dtype=bool)
    reachable[observed] = True
    for y in np.flatnonzero(~reachable):
        gain = np.delete(cost - cost[:, [y]], y, axis=1).T  # (N-1, K): what every other label costs more
        if (gain < -slack).all(1).any():
            continue  # some label is better whatever the weights
        # the largest t with gain w >= t: y is reachable when it is not negative
        answer = linprog(
            np.append(np.zeros(n_observed), -1.0),
            A_ub=np.column_stack([-gain, np.ones(n - 1)]),
            b_ub=np.zeros(n - 1),
            A_eq=np.append(np.ones(n_observed), 0.0)[None],
            b_eq=[1.0],
            bounds=[(0, None)] * n_observed + [(None, None)],
        )
        reachable[y] = answer.status == 0 and -answer.fun >= -slack
    return torch.from_numpy(reachable)


def next_class(distances: Any, observed: Any, reachable: Any = None) -> int:
    """Return the label to observe next: the one furthest from what is reachable already.

    In a tree with edges of one length this adds the most labels to the `locus`, the whole path from the subtree to the
    new label. When everything is reachable, the label furthest from the observed ones is next; ties go to the first.

    Args:
        distances: (N, N) between all labels.
        observed: indices of the observed labels.
        reachable: (N,) booleans, when `locus` has been computed already.

    Returns:
        An index in 0..N-1.

    Raises:
        ValueError: as `locus`; all labels observed.

    >>> path = (torch.arange(5.0)[:, None] - torch.arange(5.0)).abs()
    >>> next_class(path, [0, 1])
    4

    Paper: roberts2023geometry
    Chapter: collapse/fixed-classifiers
    """
    d, seen = _square(distances, observed)
    if len(seen) == len(d):
        raise ValueError("expected a label that is not observed yet, got all of them")
    inside = locus(distances, observed) if reachable is None else as_tensor(reachable, "reachable")
    inside = inside.cpu().numpy().astype(bool)
    if inside.shape != d.shape[:1]:
        raise ValueError(f"expected reachable of shape ({len(d)},), got {inside.shape}")
    from_locus, from_observed = d[inside].min(0), d[seen].min(0)
    ranks = np.where(from_locus > 0, from_locus + d.max(), from_observed)
    ranks[seen] = -1
    return int(ranks.argmax())


def tree_metric(parents: Sequence[int], lengths: Sequence[float] | None = None) -> Tensor:
    """Return the path lengths between all nodes of a tree.

    Args:
        parents: for every node the index of its parent; -1 for the root.
        lengths: of the edge from every node to its parent (that of the root is ignored); None: all 1.

    Returns:
        (N, N) distances.

    Raises:
        ValueError: not one root, a parent out of range, a cycle, a length of at most 0.

    >>> tree_metric([-1, 0, 0, 1])[3]  # from a grandchild: root, parent, aunt, itself
    tensor([2., 1., 3., 0.])

    Paper: roberts2023geometry
    Chapter: collapse/fixed-classifiers
    """
    parents = [int(p) for p in parents]
    n = len(parents)
    if n == 0 or parents.count(-1) != 1 or not all(-1 <= p < n for p in parents):
        raise ValueError(f"expected one root (-1) and parents in 0..{n - 1}, got {parents}")
    lengths = [1.0] * n if lengths is None else [float(length) for length in lengths]
    if len(lengths) != n or any(not length > 0 for i, length in enumerate(lengths) if parents[i] >= 0):
        raise ValueError(f"expected {n} edge lengths above 0, got {lengths}")
    above = np.zeros((n, n))  # above[i, j]: length of the edge over j if j is i or an ancestor of i
    for i in range(n):
        node, steps = i, 0
        while parents[node] >= 0:
            above[i, node] = lengths[node]
            node, steps = parents[node], steps + 1
            if steps > n:
                raise ValueError(f"expected a tree, got a cycle through node {i}")
    depth = above.sum(1)
    shared = above @ (above > 0).T  # the path two nodes have in common
    return torch.tensor(depth[:, None] + depth - 2 * shared, dtype=torch.get_default_dtype())


def grid_metric(*shape: int) -> Tensor:
    """Return the Euclidean distances between all points of a grid, in row-major order.

    Args:
        *shape: points along each side.

    Returns:
        (N, N) distances.

    Raises:
        ValueError: no side, or one below 1.

    >>> grid_metric(2, 2)[0]
    tensor([0.0000, 1.0000, 1.0000, 1.4142])

    Paper: roberts2023geometry
    Chapter: collapse/fixed-classifiers
    """
    if not shape:
        raise ValueError("expected at least one side, got none")
    sides = [torch.arange(check_positive_int(side, "shape"), dtype=torch.get_default_dtype()) for side in shape]
    return embedding_metric(torch.cartesian_prod(*sides).reshape(-1, len(sides)))


def embedding_metric(embeddings: Any, metric: str = "euclidean") -> Tensor:
    r"""Return the distances between all class embeddings: a metric where nobody has drawn a tree.

    "euclidean" $\lVert e_i - e_j \rVert$; "cosine" $\lVert e_i/\lVert e_i\rVert - e_j/\lVert e_j\rVert \rVert /
    \sqrt2 = \sqrt{1 - \cos}$, which is a metric, unlike $1 - \cos$.

    Args:
        embeddings: e, (N, d), such as the class vectors of a zero-shot model.
        metric: "euclidean" or "cosine".

    Returns:
        (N, N) distances.

    Raises:
        ValueError: an unknown metric, or a row of zeros for "cosine".

    >>> embedding_metric([[1.0, 0.0], [0.0, 5.0]], "cosine")
    tensor([[0., 1.],
            [1., 0.]])

    Paper: roberts2023geometry
    Chapter: collapse/fixed-classifiers
    """
    e = check_features(embeddings, "embeddings")
    if metric == "cosine":
        norms = torch.linalg.vector_norm(e, dim=1, keepdim=True)
        if (norms == 0).any():
            raise ValueError("expected embeddings with a direction, got a row of zeros")
        return embedding_metric(e / norms) / 2**0.5
    if metric != "euclidean":
        raise ValueError(f"expected metric 'euclidean' or 'cosine', got {metric!r}")
    return torch.cdist(single(e), single(e), compute_mode="donot_use_mm_for_euclid_dist").to(e.dtype)
