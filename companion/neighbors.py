"""Exact k-nearest neighbours in bounded memory, on any device.

Public: `knn`.

The search is a matrix product in float32, and yet the result is that of float64: a short list of candidates comes
from the product, their distances are computed again from differences in float64, and a bound on the rounding errors
says for every row whether a neighbour can be missing from its list. Rows where it can (ties, far clusters, very
dense data) are searched again in float64, then with longer lists.

Processors that multiply bfloat16 twice as fast begin with that, and with longer lists: see `companion._halves`.

A set searched within itself has every distance twice. Where memory allows, each is computed once, and the smallest of
each group of rows are kept for both rows; the few groups that can hold a neighbour are then looked into.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from companion._halves import BLOCK, Halves, could_be_missed, halves, multiplies_halves, nearest_halves, padded
from companion.checks import check_features, check_positive_int

__all__ = ["Neighbors", "knn"]

_GROUP = 16  # columns per group; see _smallest
_SPARE = 2  # candidates beyond k, so that rounding seldom decides
_COLUMNS = 16384  # database rows per block
_TILE = 2048  # database rows per matrix product: what it writes is read again while it is in the cache
_BATCH = 256  # queries per matrix product on a CPU, for the same reason
_CACHED = 2**19  # entries that stay in the cache
_SQUARE = 1024  # rows and columns of a block that serves as its own mirror image
_PAYS = 800  # rows per group to look into from which half the products saved are worth the looking
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
    are looked into. Groups are strided, because the minimum over a strided axis runs at the speed of memory. The
    smallest minima are found in the same way; smaller groups serve a larger share of columns asked for.
    """
    rows, columns = block.shape
    size = _GROUP if columns >= 64 * k else 4
    groups = columns // size
    if groups <= 2 * k or columns % size:
        return block.topk(k, dim=1, largest=False, sorted=True)
    inside = _members(_smallest(block.view(rows, size, groups).amin(1), k)[1], groups, size)
    values, place = block.gather(1, inside).topk(k, dim=1, largest=False, sorted=True)
    return values, inside.gather(1, place)


def _members(chosen: Tensor, stride: int, size: int = _GROUP) -> Tensor:
    """Return the columns of the chosen groups, (rows, c) to (rows, size c).

    Group t stride + u, where u < stride, holds the columns (size t + s) stride + u for s in 0..size - 1: the groups
    of a tile of size * stride columns come before those of the next.
    """
    first = chosen + (size - 1) * stride * chosen.div(stride, rounding_mode="floor")
    return (first[:, None, :] + stride * torch.arange(size, device=chosen.device)[None, :, None]).flatten(1)


def _factor(rows: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows and bias as `_product` takes them.

    On processors oneDNN multiplies up to twice as fast as the library behind `torch.mm`, in the same float32; torch
    offers it for tensors in its own layout.
    """
    if rows.device.type == "cpu" and rows.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return rows.to_mkldnn(), bias.to_mkldnn()
    return rows, bias


def _product(queries: Tensor, factor: tuple[Tensor, Tensor]) -> Tensor:
    """Return the products of queries (b, d) with rows (c, d), plus a bias per row: (b, c)."""
    rows, bias = factor
    if rows.is_mkldnn:
        return F.linear(queries.to_mkldnn(), rows, bias).to_dense()
    return torch.addmm(bias, queries, rows.T)


class _Search:
    def __init__(self, x: Tensor, y: Tensor | None, k: int, metric: str, memory: int):
        self.x, self.y = x, x if y is None else y
        self.k, self.metric, self.memory = k, metric, memory
        self.excludes_self = y is None
        self.finest = torch.promote_types(self.x.dtype, self.y.dtype)
        self.available = len(self.y) - self.excludes_self
        self.wide = torch.float32 if x.device.type == "mps" else torch.float64
        self.on_cpu = x.device.type == "cpu"
        size = x.shape[1] * 4 * 8  # a prepared database row, with its intermediate copies
        most = max(64, min(_COLUMNS, memory // (4 * size)))
        self.columns = min(len(self.y), most)
        self.pass_rows = max(1, min(self.columns, _CACHED // x.shape[1])) if self.on_cpu else self.columns
        self.center = self._center()
        self.reach = self._reach(self.y)
        self.near: tuple[Tensor, Tensor] | None = None
        self.rounded: Halves | None = None
        self.kept: tuple[Tensor, Tensor] | None = None
        self.factors: dict[int, tuple[Tensor, Tensor]] = {}
        self.buffer: Tensor | None = None
        self.tile = _TILE if self.on_cpu and self.columns > _TILE else _GROUP * math.ceil(self.columns / _GROUP)

    def run(self) -> Neighbors:
        n, device = len(self.x), self.x.device
        distances = torch.empty(n, self.k, dtype=self.x.dtype, device=device)
        indices = torch.empty(n, self.k, dtype=torch.int64, device=device)
        pending = torch.arange(n, device=device)
        for dtype, length in self._attempts():
            if dtype != torch.bfloat16:
                self.rounded = None
            failed: list[Tensor] = []
            hopeless, minima = False, None
            for batch in self._batches(pending, dtype, length):
                if hopeless:
                    failed.append(batch)
                    continue
                distance, index, sure = self._nearest(batch, dtype, length, minima)
                distances[batch], indices[batch] = distance.to(self.x.dtype), index
                # when few rows of a batch are decided, trying the same on the others would be wasted
                hopeless = dtype != self.wide and 2 * int(sure.sum()) < len(batch)
                failed.append(batch if hopeless else batch[~sure])
                if minima is None and not hopeless and self._mirrors(len(pending), dtype, length):
                    minima = self._minima(dtype)
            pending = torch.cat(failed)
            if not len(pending):
                break
        return Neighbors(distances, indices)

    def _attempts(self) -> Iterator[tuple[torch.dtype, int]]:
        """Yield formats of numbers with lengths of the list of candidates, the quickest first, and never stop."""
        dtype, length = self._first_dtype(), min(self.k + _SPARE, self.available)
        if self._rounds(dtype):
            longer = self.k + 2 * self.k // 3 + 4  # their rounding leaves more in doubt
            yield from ((torch.bfloat16, times * longer) for times in (1, 4) if times * longer < self.available)
        if dtype != self.wide:
            yield dtype, length
        while True:
            yield self.wide, length
            length = min(4 * length, self.available)

    def _rounds(self, dtype: torch.dtype) -> bool:
        """Say whether to begin with bfloat16."""
        can = self.on_cpu and dtype == torch.float32 and self.metric != "inner" and multiplies_halves()
        fits = self.y.numel() * 2 + len(self.y) * 16 <= self.memory // 4
        return can and fits

    def _batches(self, pending: Tensor, dtype: torch.dtype, length: int) -> tuple[Tensor, ...]:
        if dtype == torch.bfloat16:
            width = padded(min(BLOCK, len(self.y)))
            row = 3 * width + length * _GROUP * 64 + self.x.shape[1] * 32
            most = min(4 * _BATCH, max(2 * _BATCH, 10 * _CACHED // width))  # so that the block stays in the cache
            size = max(1, min(most, self.memory // 2 // row))
            few = min(size // 8, len(pending) // 16)  # first, to see whether this attempt is hopeless
            return (pending[:few], *pending[few:].split(size)) if few else pending.split(size)
        size = torch.finfo(dtype).bits // 8
        row = self.columns * size * 5 // 4 + length * (_GROUP * (size + 16) + 64) + self.x.shape[1] * 32
        if not self.on_cpu:
            most = 8192
        else:  # unless the database has to be prepared again for every batch
            most = max(_BATCH, _CACHED // self.columns) if self._keeps(dtype) else 4 * _BATCH
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
        total = sum(self._rows(rows).sum(0) for rows in self.y.split(self.pass_rows))
        center = total / len(self.y)
        return center if self.finest == torch.float64 else center.float().to(self.wide)

    def _reach(self, x: Tensor) -> float:
        """Return the largest distance of a row of x from the centre."""
        norms = (torch.linalg.vector_norm(self._rows(r) - self.center, dim=1).max() for r in x.split(self.pass_rows))
        return max(float(norm) for norm in norms)

    def _first_dtype(self) -> torch.dtype:
        largest = self.reach + float(torch.linalg.vector_norm(self.center))
        if self.x is not self.y and self.metric != "cosine":
            low, high = self.x.aminmax()
            largest += max(float(high), -float(low)) * math.sqrt(self.x.shape[1])
        if largest > math.sqrt(torch.finfo(self.wide).max) / 8:
            raise ValueError(f"expected features whose squares do not overflow, got rows of length {largest:g}")
        return torch.float32 if largest < math.sqrt(torch.finfo(torch.float32).max) / 8 else self.wide

    def _block(self, part: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return rows of the database, centred, and the squares of their lengths (zeros for "inner")."""
        rows, bias = part.new_empty(part.shape, dtype=dtype), part.new_zeros(len(part), dtype=dtype)
        for into, square, piece in zip(*(t.split(self.pass_rows) for t in (rows, bias, part))):
            centred = self._rows(piece) - self.center
            into.copy_(centred)
            if self.metric != "inner":
                square.copy_(centred.square_().sum(1))
        return rows, bias

    def _nearest(
        self, batch: Tensor, dtype: torch.dtype, length: int, minima: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return distances and indices of the k nearest of some rows, and of which rows that is certain."""
        full = self._rows(self.x[batch])
        if dtype == torch.bfloat16:
            return self._nearest_by_halves(batch, full, length)
        centred = full - self.center
        if minima is None:
            last, indices = self._candidates(batch, full if self.metric == "inner" else centred, dtype, length)
        else:
            last, indices = self._candidates_of_groups(batch, minima, dtype, length)
        distance, index = self._ranked(full, indices)
        if self.metric == "inner":
            last = last - full @ self.center
        sure = self._is_certain(full if self.metric == "inner" else centred, distance[:, -1], last, dtype)
        if length == self.available:
            sure = torch.ones_like(sure)
        if self.metric == "cosine":
            distance = distance.square() / 2
        return distance, index, sure

    def _ranked(self, full: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return exact distances and indices of the k nearest among candidates; ties go to the lower index."""
        indices = indices.sort(dim=1).values  # by index first, then stably by distance
        distance, order = self._exact(full, indices).sort(dim=1, stable=True)
        return distance[:, : self.k], indices.gather(1, order[:, : self.k])

    def _nearest_by_halves(self, batch: Tensor, full: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same as `_nearest`, from distances of rows rounded to bfloat16."""
        if self.rounded is None:
            self.rounded = self._rounded(self.y)
        database = self.rounded
        queries = database[batch] if self.x is self.y else self._rounded(self.x[batch])
        if self.buffer is None or self.buffer.dtype != torch.bfloat16 or len(self.buffer) < len(batch):
            self.buffer = queries.rows.new_empty(len(batch), padded(min(BLOCK, len(self.y))))
        own = batch if self.excludes_self else None
        last, indices = nearest_halves(queries, database, length, self.buffer[: len(batch)], own)
        distance, index = self._ranked(full, indices)
        sure = could_be_missed(queries, distance[:, -1], database) < last
        if self.metric == "cosine":
            distance = distance.square() / 2
        return distance, index, sure

    def _rounded(self, x: Tensor) -> Halves:
        return halves((self._centred(rows) for rows in x.split(self.pass_rows)), *x.shape)

    def _centred(self, rows: Tensor) -> Tensor:
        """Return rows minus the centre, rounded to float32."""
        if self.metric == "cosine" or self.finest == torch.float64:
            return (self._rows(rows) - self.center).float()
        return rows.float() - self.center.float()  # which has no more digits then

    def _candidates(self, batch: Tensor, queries: Tensor, dtype: torch.dtype, length: int) -> tuple[Tensor, Tensor]:
        """Return what all others are at least away, (b,), squared, and the indices of the nearest by a matrix product.

        With "inner" both are of products with centred rows of the database.
        """
        offset = 0 if self.metric == "inner" else queries.square().sum(1)
        queries = (-queries if self.metric == "inner" else -2 * queries).to(dtype)
        tile, padded = self.tile, self.tile * math.ceil(self.columns / self.tile)
        if self.buffer is None or self.buffer.dtype != dtype or len(self.buffer) < len(batch):
            self.buffer = queries.new_empty(len(batch), padded)
        buffer = self.buffer[: len(batch)]
        minima = queries.new_empty(len(batch), padded // _GROUP)
        few = minima.shape[1] <= 2 * length  # so few groups that looking at everything is quicker
        first, last = (int(batch[0]), int(batch[-1])) if self.excludes_self else (-1, -1)  # batches are ascending
        best: tuple[Tensor, Tensor] | None = None
        for start in range(0, len(self.y), self.columns):
            width = min(self.columns, len(self.y) - start)
            buffer[:, width:] = torch.inf
            for left in range(0, padded, tile):
                right = min(left + tile, width)
                if left < right:
                    buffer[:, left:right] = _product(queries, self._prepared(start + left, right - left, dtype))
                if first < start + right and last >= start + left:
                    own = ((batch >= start + left) & (batch < start + right)).nonzero().squeeze(1)
                    buffer[own, batch[own] - start] = torch.inf
                if not few:
                    groups = buffer[:, left : left + tile].view(len(batch), _GROUP, -1)
                    torch.amin(groups, 1, out=minima[:, left // _GROUP : (left + tile) // _GROUP])
            if few:
                values, columns = buffer.topk(min(length, padded), dim=1, largest=False, sorted=True)
            else:
                inside = _members(_smallest(minima, length)[1], tile // _GROUP)
                values, place = _smallest(buffer.gather(1, inside), length)
                columns = inside.gather(1, place)
            found = values, columns + start
            if best is not None:
                values, place = torch.cat([best[0], found[0]], 1).topk(
                    min(length, best[0].shape[1] + values.shape[1]), dim=1, largest=False, sorted=True
                )
                found = values, torch.cat([best[1], found[1]], 1).gather(1, place)
            best = found
        return best[0][:, -1].to(self.wide) + offset, best[1]

    def _mirrors(self, n: int, dtype: torch.dtype, length: int) -> bool:
        """Say whether the distances of a set to itself are worth computing once for both rows they belong to."""
        can = self.excludes_self and self.on_cpu and self.metric != "inner" and n == len(self.y)
        can = can and dtype != torch.bfloat16  # whose other half costs less than the looking
        fits = n * n * 4 // _GROUP <= self.memory // 2 and self._keeps(dtype)
        return can and fits and n >= max(4 * _SQUARE, _PAYS * length)

    def _minima(self, dtype: torch.dtype) -> Tensor:
        """Return the smallest squared distance of each row to each group of rows, from half of the products."""
        side, groups = _SQUARE, _SQUARE // _GROUP
        rows, norms = (whole.split(side) for whole in self._whole(dtype))
        factors = [_factor(*pair) for pair in zip(rows, norms)]
        minima = rows[0].new_full((len(self.y), len(rows) * groups), torch.inf)
        block = rows[0].new_full((side, side), torch.inf)
        for i in range(len(rows)):
            for j in range(i, len(rows)):
                height, width = len(rows[i]), len(rows[j])
                block[:, width:] = torch.inf
                torch.add(_product(-2 * rows[i], factors[j]), norms[i][:, None], out=block[:height, :width])
                if i == j:
                    block.fill_diagonal_(torch.inf)
                here, there = slice(i * side, i * side + height), slice(j * side, j * side + width)
                mine, theirs = slice(j * groups, (j + 1) * groups), slice(i * groups, (i + 1) * groups)
                torch.amin(block[:height].view(height, _GROUP, groups), 1, out=minima[here, mine])
                if i != j:
                    minima[there, theirs] = block.view(_GROUP, groups, side).amin(0).T[:width]
        return minima

    def _candidates_of_groups(
        self, batch: Tensor, minima: Tensor, dtype: torch.dtype, length: int
    ) -> tuple[Tensor, Tensor]:
        """Return the same as `_candidates`, from the smallest distance of each row to each group."""
        values, chosen = _smallest(minima[batch], length)
        inside = _members(chosen[:, :-1], _SQUARE // _GROUP)
        columns = inside.clamp(max=len(self.y) - 1)
        rows, _ = self._whole(dtype)
        near = torch.empty_like(inside, dtype=dtype)
        step = max(4, _CACHED // (columns.shape[1] * rows.shape[1]))
        for into, own, index in zip(*(t.split(step) for t in (near, batch, columns))):
            others = rows.index_select(0, index.flatten()).view(*index.shape, -1)
            torch.sum(others.sub_(rows[own][:, None]).square_(), 2, out=into)
        near[(inside != columns) | (inside == batch[:, None])] = torch.inf
        nearest, place = _smallest(near, length)
        return torch.minimum(nearest[:, -1], values[:, -1]).to(self.wide), columns.gather(1, place)

    def _prepared(self, start: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return some rows of the database as factor of a product."""
        here = slice(start, start + count)
        if not self._keeps(dtype):
            return _factor(*self._block(self.y[here], dtype))
        rows, bias = self._whole(dtype)
        if start not in self.factors:
            self.factors[start] = _factor(rows[here], bias[here])
        return self.factors[start]

    def _whole(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self.kept is None or self.kept[0].dtype != dtype:
            self.kept, self.factors = self._block(self.y, dtype), {}
        return self.kept

    def _keeps(self, dtype: torch.dtype) -> bool:
        """Say whether the prepared database fits into memory as a whole, twice: as rows and as factors."""
        return self.y.numel() * torch.finfo(dtype).bits // 8 <= self.memory // 4

    def _exact(self, full: Tensor, indices: Tensor) -> Tensor:
        """Return distances (or minus the inner products) of candidates in full precision."""
        length, d = indices.shape[1], full.shape[1]
        step = max(1, self.memory // 4 // (length * d * 8 * 4))
        if self.on_cpu:
            step = min(step, max(4, _CACHED // 2 // (length * d)))
        exact, size = full.new_empty(indices.shape), min(step, len(full)) * length
        if self.near is None or len(self.near[0]) < size:
            # fresh memory for each step would cost more than what is computed in it
            self.near = self.y.new_empty(size, d), full.new_empty(size, d)
        near, wide = self.near
        for into, rows, index in zip(exact.split(step), full.split(step), indices.split(step)):
            count = index.numel()
            torch.index_select(self.y, 0, index.flatten(), out=near[:count])
            others = self._rows(wide[:count].copy_(near[:count])).view(*index.shape, d)  # (r, length, d)
            if self.metric == "inner":
                torch.matmul(others, -rows[:, :, None], out=into[:, :, None])
            else:
                torch.linalg.vector_norm(others.sub_(rows[:, None]), dim=2, out=into)
        return exact

    def _is_certain(self, queries: Tensor, kth: Tensor, last: Tensor, dtype: torch.dtype) -> Tensor:
        """Say for which rows no neighbour can have been missed.

        Whatever is not among the candidates has a computed value of at least `last`, so its true value is at least
        that minus the rounding error of the product. For distances only rows y with |y| < |x| + 2 r can be nearer
        than r, which bounds their norm and hence the error, whatever outliers the database has.
        """
        finfo = torch.finfo(dtype)
        d = queries.shape[1]
        unit = finfo.eps * (4 + 2 * math.sqrt(d))
        if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
            unit = 2.0**-7  # TensorFloat32 and bfloat16 products, which the reader's settings allow
        norm = torch.linalg.vector_norm(queries, dim=1)
        if self.metric == "inner":
            value, offset = kth, norm * torch.linalg.vector_norm(self.center)
            error = unit * norm * self.reach
        else:
            value, offset = kth.square(), norm.square()
            error = unit * (offset + (norm + 2 * kth).square())
        # the candidates' own rounding and underflow
        error = error + finfo.tiny * d + torch.finfo(self.wide).eps * (4 + 2 * math.sqrt(d)) * offset
        return value + error < last
