"""Exact k-nearest neighbours in bounded memory, on any device.

Public: `knn`.

The search is a matrix product in float32, and yet the result is that of float64: a short list of candidates comes
from the product, their distances are computed again from differences in float64, and a bound on the rounding errors
says for every row whether a neighbour can be missing from its list. Rows where it can (ties, far clusters, very
dense data) are searched again in float64, then with longer lists.
"""

import math
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from companion.checks import check_features, check_positive_int

__all__ = ["Neighbors", "knn"]

_GROUP = 16  # columns per group; see _smallest
_SPARE = 4  # candidates beyond k, so that rounding seldom decides
_COLUMNS = 16384  # database rows per block
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30, "b": 1}


class Neighbors(NamedTuple):
    """Distances and indices of the neighbours, both (n, k), nearest first."""

    distances: Tensor
    indices: Tensor


def knn(x: Any, y: Any = None, k: int = 10, metric: str = "euclidean", memory: str | int = "256MB") -> Neighbors:
    r"""Return the k nearest neighbours of each row of x among the rows of y, exactly.

    The distance is $\lVert x - y \rVert$ for "euclidean", $1 - \cos(x, y)$ for "cosine" and $-\langle x, y \rangle$
    for "inner", so that smaller is nearer in all three. Equal distances are ordered by index. Gradients do not flow:
    compute what you need from the indices.

    Args:
        x: queries, shape (n, d).
        y: database, shape (m, d). None: x itself, where a row is never its own neighbour, but its duplicates are.
        k: how many, at most m (n - 1 when y is None).
        metric: "euclidean", "cosine" or "inner".
        memory: working memory to stay within, in bytes or as text such as "256MB" or "2GiB"; input and result, and
            at least one row's work, come on top.

    Returns:
        `Neighbors(distances, indices)`, each (n, k), nearest first; distances in the dtype of x.

    Raises:
        ValueError: shapes that do not fit, NaN or infinity, k too large, an unknown metric, rows of zeros with
            "cosine".

    >>> knn([[0.0], [1.0], [3.0]], k=1)
    Neighbors(distances=tensor([[1.],
            [1.],
            [2.]]), indices=tensor([[1],
            [0],
            [1]]))
    """
    x = check_features(x).detach()
    y = None if y is None else check_features(y, "y", device=x.device).detach()
    if y is not None and y.shape[1] != x.shape[1]:
        raise ValueError(f"expected x and y with one number of features, got {x.shape[1]} and {y.shape[1]}")
    if metric not in ("euclidean", "cosine", "inner"):
        raise ValueError(f"expected metric to be 'euclidean', 'cosine' or 'inner', got {metric!r}")
    k = check_positive_int(k, "k")
    available = len(x) - 1 if y is None else len(y)
    if k > available:
        others = "n - 1, since a row is not its own neighbour" if y is None else "m, the number of rows of y"
        raise ValueError(f"expected k to be at most {available} ({others}), got k={k}")
    search = _Search(x, y, k, metric, _parse_memory(memory))
    return search.run()


def _parse_memory(memory: str | int) -> int:
    if isinstance(memory, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?b|b|)\s*", memory.lower())
        if not match:
            raise ValueError(f"expected memory such as '256MB', '2GiB' or a number of bytes, got {memory!r}")
        memory = int(float(match[1]) * _UNITS[match[2]])
    return check_positive_int(memory, "memory")


def _smallest(block: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k smallest values of each row and their columns, in ascending order.

    A value among the k smallest lies in a group whose minimum is among the k smallest minima, so only those groups
    are looked into. Groups are strided, because the minimum over a strided axis runs at the speed of memory.
    """
    rows, columns = block.shape
    groups = columns // _GROUP
    if groups <= 2 * k:
        return block.topk(k, dim=1, largest=False, sorted=True)
    grouped = block.view(rows, _GROUP, groups)
    chosen = grouped.amin(1).topk(k, dim=1, largest=False, sorted=False).indices  # (rows, k)
    inside = chosen[:, None, :] + groups * torch.arange(_GROUP, device=block.device)[None, :, None]
    inside = inside.flatten(1)  # (rows, 16 k): the columns of the chosen groups
    values, place = block.gather(1, inside).topk(k, dim=1, largest=False, sorted=True)
    return values, inside.gather(1, place)


class _Search:
    def __init__(self, x: Tensor, y: Tensor | None, k: int, metric: str, memory: int):
        self.x, self.y = x, x if y is None else y
        self.k, self.metric, self.memory = k, metric, memory
        self.excludes_self = y is None
        self.available = len(self.y) - self.excludes_self
        self.wide = torch.float32 if x.device.type == "mps" else torch.float64
        size = x.shape[1] * 4 * 8  # a prepared database row, with its intermediate copies
        most = max(64, min(_COLUMNS, memory // (4 * size)))
        self.columns = min(len(self.y), most)
        self.center = self._center()
        self.reach = self._reach(self.y)
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.kept_dtype: torch.dtype | None = None

    def run(self) -> Neighbors:
        n, device = len(self.x), self.x.device
        distances = torch.empty(n, self.k, dtype=self.x.dtype, device=device)
        indices = torch.empty(n, self.k, dtype=torch.int64, device=device)
        pending, dtype, length = (
            torch.arange(n, device=device),
            self._first_dtype(),
            min(self.k + _SPARE, self.available),
        )
        while len(pending):
            failed: list[Tensor] = []
            hopeless = False
            for batch in self._batches(pending, dtype, length):
                if hopeless:
                    failed.append(batch)
                    continue
                distance, index, sure = self._nearest(batch, dtype, length)
                distances[batch], indices[batch] = distance.to(self.x.dtype), index
                failed.append(batch[~sure])
                # when float32 decides too few rows of a batch, trying it on the others would be wasted
                hopeless = dtype != self.wide and 2 * len(failed[-1]) > len(batch)
            pending = torch.cat(failed)
            if dtype == self.wide:
                length = min(4 * length, self.available)
            dtype = self.wide
        return Neighbors(distances, indices)

    def _batches(self, pending: Tensor, dtype: torch.dtype, length: int) -> tuple[Tensor, ...]:
        size = torch.finfo(dtype).bits // 8
        row = self.columns * size * 5 // 4 + length * (_GROUP * (size + 16) + 64) + self.x.shape[1] * 32
        if self.x.device.type != "cpu":
            most = 8192
        else:  # the product should stay in the cache, unless its database has to be prepared again for every batch
            most = 256 if self._keeps(dtype) else 1024
        return pending.split(max(1, min(most, self.memory // 2 // row)))

    def _rows(self, x: Tensor) -> Tensor:
        """Return rows in full precision, as the metric sees them."""
        x = x.to(self.wide)
        if self.metric != "cosine":
            return x
        # dividing by the largest entry first keeps the squares of tiny and huge rows within range
        largest = x.abs().amax(-1, keepdim=True)
        if not bool((largest > 0).all()):
            raise ValueError("expected rows that are not all zero with metric='cosine', got a row of zeros")
        x = x / largest
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)

    def _center(self) -> Tensor:
        total = sum(self._rows(rows).sum(0) for rows in self.y.split(self.columns))
        return total / len(self.y)

    def _reach(self, x: Tensor) -> float:
        """Return the largest distance of a row of x from the centre."""
        norms = (torch.linalg.vector_norm(self._rows(r) - self.center, dim=1).max() for r in x.split(self.columns))
        return max(float(norm) for norm in norms)

    def _first_dtype(self) -> torch.dtype:
        largest = max(self.reach, float(torch.linalg.vector_norm(self.center)))
        if self.x is not self.y:
            largest = max(largest, self._reach(self.x))
        if largest > math.sqrt(torch.finfo(self.wide).max) / 8:
            raise ValueError(f"expected features whose squares do not overflow, got rows of length {largest:g}")
        return torch.float32 if largest < math.sqrt(torch.finfo(torch.float32).max) / 8 else self.wide

    def _block(self, start: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rows = self._rows(self.y[start : start + self.columns]) - self.center  # (c, d)
        bias = torch.zeros_like(rows[:, 0]) if self.metric == "inner" else rows.square().sum(1)
        return rows.to(dtype), bias.to(dtype)

    def _nearest(self, batch: Tensor, dtype: torch.dtype, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return distances and indices of the k nearest of some rows, and of which rows that is certain."""
        full = self._rows(self.x[batch])
        values, indices = self._candidates(batch, full, dtype, length)
        exact = self._exact(full, indices)
        # by index first, then stably by distance: ties go to the lower index
        indices, order = indices.sort(dim=1)
        exact, order = exact.gather(1, order).sort(dim=1, stable=True)
        distance, index = exact[:, : self.k], indices.gather(1, order)[:, : self.k]
        sure = self._is_certain(full, distance[:, -1], values[:, -1].to(self.wide), dtype)
        if length == self.available:
            sure = torch.ones_like(sure)
        if self.metric == "euclidean":
            distance = distance.sqrt()
        elif self.metric == "cosine":
            distance = distance / 2
        return distance, index, sure

    def _candidates(self, batch: Tensor, full: Tensor, dtype: torch.dtype, length: int) -> tuple[Tensor, Tensor]:
        queries = (full if self.metric == "inner" else full - self.center).to(dtype)
        slope = -1 if self.metric == "inner" else -2
        padded = math.ceil(self.columns / _GROUP) * _GROUP
        buffer = queries.new_empty(len(batch), padded)
        best: tuple[Tensor, Tensor] | None = None
        for start in range(0, len(self.y), self.columns):
            rows, bias = self._prepared(start, dtype)
            width = len(rows)
            if width < padded:
                buffer[:, width:] = torch.inf
            torch.addmm(bias, queries, rows.T, alpha=slope, out=buffer[:, :width])
            if self.excludes_self:
                inside = ((batch >= start) & (batch < start + width)).nonzero().squeeze(1)
                buffer[inside, batch[inside] - start] = torch.inf
            values, columns = _smallest(buffer, min(length, padded))
            found = values, columns + start
            if best is not None:
                values, place = torch.cat([best[0], found[0]], 1).topk(
                    min(length, best[0].shape[1] + values.shape[1]), dim=1, largest=False, sorted=True
                )
                found = values, torch.cat([best[1], found[1]], 1).gather(1, place)
            best = found
        return best

    def _prepared(self, start: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if not self._keeps(dtype):
            return self._block(start, dtype)
        if self.kept_dtype != dtype:
            self.kept, self.kept_dtype = {}, dtype
        if start not in self.kept:
            self.kept[start] = self._block(start, dtype)
        return self.kept[start]

    def _keeps(self, dtype: torch.dtype) -> bool:
        """Say whether the prepared database fits into memory as a whole."""
        return self.y.numel() * torch.finfo(dtype).bits // 8 <= self.memory // 4

    def _exact(self, full: Tensor, indices: Tensor) -> Tensor:
        """Return squared distances (or minus the inner products) of candidates in full precision."""
        pairs = indices.shape[1] * full.shape[1] * 8 * 4
        step = max(1, self.memory // 4 // pairs)
        parts = []
        for rows, index in zip(full.split(step), indices.split(step)):
            others = self._rows(self.y[index])  # (r, length, d)
            if self.metric == "inner":
                parts.append(-(others @ rows[:, :, None]).squeeze(2))
            else:
                parts.append(others.sub_(rows[:, None]).square_().sum(2))
        return torch.cat(parts)

    def _is_certain(self, full: Tensor, kth: Tensor, last: Tensor, dtype: torch.dtype) -> Tensor:
        """Say for which rows no neighbour can have been missed.

        Whatever is not among the candidates has a computed value of at least `last`, so its true value is at least
        that minus the rounding error of the product. For distances only rows y with |y| < |x| + 2 r can be nearer
        than r, which bounds their norm and hence the error, whatever outliers the database has.
        """
        finfo = torch.finfo(dtype)
        d = full.shape[1]
        unit = finfo.eps * (4 + 2 * math.sqrt(d))
        if full.device.type == "cuda" and dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
            unit = 2.0**-7  # TensorFloat32 and bfloat16 products, which the reader's settings allow
        if self.metric == "inner":
            offset = -(full @ self.center)
            error = unit * torch.linalg.vector_norm(full, dim=1) * self.reach
        else:
            norm = torch.linalg.vector_norm(full - self.center, dim=1)
            offset = norm.square()
            error = unit * (norm.square() + (norm + 2 * kth.clamp_min(0).sqrt()).square())
        # the candidates' own rounding and underflow
        error = error + finfo.tiny * d + torch.finfo(self.wide).eps * (4 + 2 * math.sqrt(d)) * offset.abs()
        return kth + error < last + offset
