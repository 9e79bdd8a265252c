"""Approximate search with a graph, and what intrinsic dimension and insertion order do to it.

Public: `HNSWIndex`, `recall_at_k`, `spanned_vectors`, `nested_mixture`.
"""

from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from companion.checks import as_tensor, check_generator, check_positive_int
from companion.data.manifolds import random_frame
from companion.geometry import single

__all__ = ["HNSWIndex", "nested_mixture", "recall_at_k", "spanned_vectors"]


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "HNSWIndex builds its graph with faiss, which is an extra: pip install 'feature-geometry[search]'"
        ) from error
    return faiss


class HNSWIndex(BaseEstimator):
    """A hierarchical navigable small world graph: neighbours in logarithmic time, most of them.

    Points are linked to about `m` near ones as they arrive; a search walks the links greedily and keeps the `ef` best
    it has met. What is never reached is never found, so recall, not time, pays for hard data. Built with faiss
    (`IndexHNSWFlat`), in the extra `search`.

    Args:
        m: links per point (twice that on the ground floor).
        ef_construction: candidates kept while inserting.
        ef: candidates kept while searching; raised to k where it is smaller.
        metric: "euclidean", or "inner" for the largest inner product (distances come back as its negative).
        batch: False inserts row by row, so the order of the rows is the order of insertion. True hands all rows over
            at once: faster, threaded, and faiss then sorts them by level first, so the order given has no effect.

    Attributes:
        index_: the faiss index.
        n_samples_fit_: rows in it.
        n_features_in_: their columns.

    >>> x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    >>> distances, indices = HNSWIndex().fit(x).kneighbors(x, 1)  # doctest: +SKIP
    >>> bool((indices[:, 0] == torch.arange(200).numpy()).all())  # doctest: +SKIP
    True

    Paper: elliott2024impacts
    Chapter: dimensionality/intrinsic-dimension
    """

    def __init__(
        self,
        m: int = 16,
        ef_construction: int = 128,
        ef: int = 64,
        metric: str = "euclidean",
        batch: bool = False,
    ):
        self.m = m
        self.ef_construction = ef_construction
        self.ef = ef
        self.metric = metric
        self.batch = batch

    def fit(self, X: Any, y: Any = None) -> "HNSWIndex":
        """Build the graph over the rows of X, in their order.

        Args:
            X: (n, d) array or tensor.
            y: ignored, as scikit-learn has it.

        Raises:
            ValueError: NaN, no rows, settings out of range.
            ImportError: faiss is not installed.
        """
        x = self._rows(X, reset=True)
        m = check_positive_int(self.m, "m", minimum=2)
        ef_construction = check_positive_int(self.ef_construction, "ef_construction")
        check_positive_int(self.ef, "ef")
        if self.metric not in ("euclidean", "inner"):
            raise ValueError(f"expected metric to be 'euclidean' or 'inner', got {self.metric!r}")
        faiss = _faiss()
        kind = faiss.METRIC_L2 if self.metric == "euclidean" else faiss.METRIC_INNER_PRODUCT
        index = faiss.IndexHNSWFlat(x.shape[1], m, kind)
        index.hnsw.efConstruction = ef_construction
        if self.batch:
            index.add(x)
        else:
            for start in range(len(x)):
                index.add(x[start : start + 1])
        self.index_, self.n_samples_fit_ = index, len(x)
        return self

    def kneighbors(
        self, X: Any, n_neighbors: int = 10, return_distance: bool = True
    ) -> tuple[np.ndarray, np.ndarray] | np.ndarray:
        """Return the neighbours the graph finds, nearest first.

        Args:
            X: queries (q, d). A query that is in the index finds itself.
            n_neighbors: k, at most the number of rows indexed.
            return_distance: also the distances.

        Returns:
            (distances, indices), each (q, k), or indices alone; -1 where the walk met fewer than k points.

        Raises:
            ValueError: NaN, another number of columns, k too large.
        """
        check_is_fitted(self)
        x = self._rows(X, reset=False)
        k = check_positive_int(n_neighbors, "n_neighbors")
        if k > self.n_samples_fit_:
            raise ValueError(f"expected n_neighbors to be at most {self.n_samples_fit_}, the rows indexed, got {k}")
        parameters = _faiss().SearchParametersHNSW(efSearch=max(self.ef, k))
        distances, indices = self.index_.search(x, k, params=parameters)
        if not return_distance:
            return indices
        return (np.sqrt(np.maximum(distances, 0)) if self.metric == "euclidean" else -distances), indices

    def _rows(self, X: Any, reset: bool) -> np.ndarray:
        X = single(X).detach().cpu().numpy() if isinstance(X, Tensor) else X
        return np.ascontiguousarray(validate_data(self, X, reset=reset, dtype=np.float32))

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        if "index_" in state:
            state = {**state, "index_": _faiss().serialize_index(self.index_)}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state.get("index_"), np.ndarray):
            state = {**state, "index_": _faiss().deserialize_index(state["index_"])}
        super().__setstate__(state)


def recall_at_k(found: Any, exact: Any) -> Tensor:
    """Return the share of the true neighbours that were found, averaged over queries.

    Args:
        found: indices (q, k) an approximate search returned; -1 counts as not found.
        exact: indices (q, k) of the true neighbours.

    Returns:
        A scalar between 0 and 1.

    Raises:
        ValueError: shapes that differ.
        TypeError: not whole numbers.

    >>> recall_at_k([[0, 1], [5, 2]], [[1, 0], [2, 3]])
    tensor(0.7500)

    Paper: elliott2024impacts
    Chapter: dimensionality/intrinsic-dimension
    """
    found = as_tensor(found, "found")
    exact = as_tensor(exact, "exact", found.device)
    if found.is_floating_point() or exact.is_floating_point():
        raise TypeError(f"expected indices, got {found.dtype} and {exact.dtype}")
    if found.dim() != 2 or found.shape != exact.shape or not found.numel():
        raise ValueError(f"expected two (q, k) arrays of one shape, got {tuple(found.shape)}, {tuple(exact.shape)}")
    hits = [(a[:, :, None] == b[:, None, :]).any(1).sum() for a, b in zip(found.split(4096), exact.split(4096))]
    return torch.stack(hits).sum() / torch.tensor(float(exact.numel()), device=found.device)


def spanned_vectors(n: int, dim: int, ambient: int, generator: torch.Generator | int | None = None) -> Tensor:
    """Draw n unit vectors uniformly in the span of `dim` random orthonormal vectors of an `ambient`-dimensional space.

    Args:
        n: how many.
        dim: of the span, at most `ambient`.
        ambient: columns.
        generator: a cpu generator or a seed; None means torch's default generator.

    Returns:
        (n, ambient).

    Raises:
        ValueError: dim is not between 1 and ambient.

    >>> torch.linalg.matrix_rank(spanned_vectors(50, 3, 10, torch.Generator().manual_seed(0))).item()
    3

    Paper: elliott2024impacts
    Chapter: dimensionality/intrinsic-dimension
    """
    generator = check_generator(generator)
    frame = random_frame(ambient, dim, generator)
    z = torch.randn(check_positive_int(n, "n"), dim, generator=generator)
    return torch.nn.functional.normalize(z, dim=1) @ frame.T


def nested_mixture(
    n: int,
    dims: tuple[int, int] = (4, 64),
    ambient: int = 256,
    *,
    nested: bool = True,
    generator: torch.Generator | int | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw unit vectors of two dimensions, half of each: an easy crowd and a hard one.

    Args:
        n: rows in all; half of them, rounded down, easy.
        dims: of the easy and of the hard half.
        ambient: columns.
        nested: whether the easy span lies inside the hard one, or is orthogonal to it.
        generator: a cpu generator or a seed; None means torch's default generator.

    Returns:
        (x (n, ambient), hard (n,) booleans), shuffled.

    Raises:
        ValueError: spans that do not fit.

    >>> x, hard = nested_mixture(100, (2, 8), 16, generator=torch.Generator().manual_seed(0))
    >>> x.shape, int(hard.sum())
    (torch.Size([100, 16]), 50)

    Paper: elliott2024impacts
    Chapter: dimensionality/intrinsic-dimension
    """
    low, high = (check_positive_int(d, "dims") for d in dims)
    n, generator = check_positive_int(n, "n", minimum=2), check_generator(generator)
    frame = random_frame(ambient, max(low, high) if nested else low + high, generator)
    easy = torch.nn.functional.normalize(torch.randn(n // 2, low, generator=generator), dim=1)
    hard = torch.nn.functional.normalize(torch.randn(n - n // 2, high, generator=generator), dim=1)
    hard_frame = frame[:, :high] if nested else frame[:, low:]
    x = torch.cat([easy @ frame[:, :low].T, hard @ hard_frame.T])
    order = torch.randperm(n, generator=generator)
    return x[order], (order >= n // 2)
