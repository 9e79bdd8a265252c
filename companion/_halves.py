"""Squared distances of rows rounded to bfloat16, which some processors multiply twice as fast as float32.

Rounding moves a row x by a length that is measured, and so it moves a distance by at most those of both its ends: what
is far after rounding was far before. `nearest_halves` returns short lists of candidates, and `could_be_missed` how
large a computed value can be at most where the true distance is no more than r.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Halves", "could_be_missed", "halves", "multiplies_halves", "nearest_halves", "padded"]

GROUP = 16  # columns per group: a minimum over strided groups runs at the speed of memory
TILE = 10240  # columns per product
BLOCK = 32768  # columns per selection; a column has to fit into 16 bits
PARTITIONS_SLOWLY = int(np.__version__.split(".")[0]) < 2  # before NumPy used the instructions of the processor
HALF = 2.0**-8  # largest relative error of rounding to bfloat16


class Halves(NamedTuple):
    """Rows rounded to bfloat16.

    Attributes:
        rows: (n, d + 4), the rounded row, two ones, and the square of its length as a sum of two numbers.
        norm: (n,), the length of the rounded row.
        moved: (n,), at least how far rounding moved it.
    """

    rows: Tensor
    norm: Tensor
    moved: Tensor

    def __getitem__(self, index):
        return Halves(self.rows[index], self.norm[index], self.moved[index])


def multiplies_halves() -> bool:
    """Say whether this processor has instructions for products in bfloat16."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # newer than the oldest torch we run on
    mkldnn = torch.backends.mkldnn
    return supported is not None and supported() and mkldnn.is_available() and bool(getattr(mkldnn, "enabled", True))


def halves(parts: Iterable[Tensor], n: int, d: int) -> Halves:
    """Round n rows of d numbers, which come in parts, in float32, and are overwritten."""
    rows, norm, moved = torch.ones(n, d + 4, dtype=torch.bfloat16), torch.empty(n), torch.empty(n)
    start = 0
    for x in parts:
        here = slice(start, start + len(x))
        start += len(x)
        rounded = rows[here, :d].copy_(x).float()
        moved[here] = torch.linalg.vector_norm(x.sub_(rounded), dim=1)
        square = rounded.square_().sum(1)
        rows[here, d + 2] = square
        rows[here, d + 3] = square - rows[here, d + 2].float()
        norm[here] = square.sqrt_()
    # how float32 rounded x before, and these sums
    return Halves(rows, norm, moved.mul_(1 + 2.0**-10).add_(norm, alpha=2.0**-22))


def nearest_halves(
    queries: Halves, database: Halves, length: int, buffer: Tensor, own: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return what all others are at least away, squared, and the nearest, (b, length), in no order.

    Args:
        queries: b rows.
        database: m rows.
        length: of the lists, below m.
        buffer: (b, `padded(m)` or `BLOCK`), bfloat16, for the products.
        own: (b,), ascending: which row of the database a query is itself, and cannot find.
    """
    d = queries.rows.shape[1] - 4
    # with the ones and squares of the other side this makes |x|^2 + |y|^2 - 2 x.y
    left = torch.cat([-2 * queries.rows[:, :d], queries.rows[:, d + 2 :], queries.rows[:, d : d + 2]], 1)
    lists = []
    for start in range(0, len(database.rows), BLOCK):
        right = database.rows[start : start + BLOCK].T
        width = right.shape[1]
        block = buffer[:, : padded(width)]
        if width < block.shape[1]:
            block[:, width:] = torch.inf
        for tile in range(0, width, TILE):
            torch.mm(left, right[:, tile : tile + TILE], out=block[:, tile : min(tile + TILE, width)])
        if own is not None and int(own[0]) < start + width and int(own[-1]) >= start:
            here = ((own >= start) & (own < start + width)).nonzero().squeeze(1)
            block[here, own[here] - start] = torch.inf
        values, columns = _smallest(block.view(torch.int16), min(length, width))
        lists.append((values, columns + start))
    values, columns = (torch.cat(parts, 1) for parts in zip(*lists))
    if len(lists) > 1:
        values, place = values.topk(length, dim=1, largest=False)
        columns = columns.gather(1, place)
    return values.amax(1).view(torch.bfloat16), columns


def padded(columns: int) -> int:
    """Return the width of a block of columns: whole groups that begin at whole cache lines."""
    return 32 * GROUP * math.ceil(columns / (32 * GROUP))


def _smallest(block: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k smallest of each row of bits, (b, c), and their columns, in no order.

    As in `companion.neighbors`, by the minima of groups. The bits of floating-point numbers that are not negative are
    ordered as whole numbers. A distance that rounding has made negative stays below all others.
    """
    groups = block.shape[1] // GROUP
    if groups <= 4 * k:
        return _partitioned(block, k)
    _, chosen = _partitioned(block.view(len(block), GROUP, groups).amin(1), k)
    inside = (chosen[:, None, :] + groups * torch.arange(GROUP)[None, :, None]).flatten(1)
    values, place = _partitioned(block.gather(1, inside), k)
    return values, inside.gather(1, place)


def _partitioned(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k smallest of values of 16 bits, (b, c), and their columns, of which there are at most 2^16.

    Both fit into one number of 32 bits, which NumPy 2 partitions faster than torch finds the k smallest and where.
    """
    both = values.int().bitwise_left_shift_(16).bitwise_or_(torch.arange(values.shape[1], dtype=torch.int32))
    if PARTITIONS_SLOWLY or 64 * k <= both.shape[1]:  # where a heap is faster still
        quarter = both.shape[1] // 4
        if 8 * k < 4 * quarter == both.shape[1] < 64 * k:  # by the minima of fours, which carry their columns
            four = torch.arange(4)[:, None]
            chosen = both.view(-1, 4, quarter).amin(1).topk(k, dim=1, largest=False, sorted=False).values & 0xFFFF
            both = both.gather(1, ((chosen % quarter)[:, None, :] + quarter * four).flatten(1))
        both = both.topk(k, dim=1, largest=False, sorted=False).values
    else:
        both.numpy().partition(k - 1, axis=1)
        both = both[:, :k]
    return (both >> 16).short(), (both & 0xFFFF).long()


def could_be_missed(queries: Halves, radius: Tensor, database: Halves) -> Tensor:
    """Return how large the computed square of a distance can be, where the true distance is at most the radius.

    Args:
        queries: b rows.
        radius: (b,).
        database: m rows.
    """
    norm = queries.norm + queries.moved
    # a row that near is no longer than norm + radius, which bounds how far it was moved, whatever outliers there are
    share = (database.moved / (database.norm - database.moved).clamp(min=0)).nan_to_num(0).max()
    moved = torch.minimum((norm + radius) * share, database.moved.max()) + queries.moved
    d = queries.rows.shape[1] - 4
    finfo = torch.finfo(torch.float32)
    # float32 sums of products, and lengths in two pieces
    error = (finfo.eps * (4 + 2 * math.sqrt(d)) + HALF**2) * (2 * norm + radius + moved).square() + d * finfo.tiny
    # rounding to bfloat16 keeps the order
    return ((radius + moved).square() + error).to(torch.bfloat16)
