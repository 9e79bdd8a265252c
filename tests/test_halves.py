"""Rounded rows against rounding by definition, their bound against every pair, and the short lists against sorting."""

import pytest
import torch

from companion import _halves
from companion._halves import Halves, could_be_missed, halves, nearest_halves, padded


def draw(n, d, seed=0, scale=1.0):
    return scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rounded(x, parts=1):
    return halves((part.float() for part in x.chunk(parts)), *x.shape)


def distances(x, y):
    return (x[:, None] - y[None]).square().sum(2).sqrt()


def buffer(n, m):
    return torch.empty(n, padded(m), dtype=torch.bfloat16)


def all_pairs(queries: Halves, database: Halves):
    """The values that the search computes, of all pairs, in order of index."""
    m = len(database.rows)
    block = buffer(len(queries.rows), m)
    nearest_halves(queries, database, m - 1, block)
    return block[:, :m]


@pytest.mark.parametrize("parts", [1, 3])
def test_rounding_is_measured(parts):
    x = draw(50, 20)
    found = rounded(x.clone(), parts)
    by_definition = x.to(torch.bfloat16).double()
    assert torch.equal(found.rows[:, :20].double(), by_definition)
    torch.testing.assert_close(found.norm.double(), by_definition.norm(dim=1), rtol=1e-6, atol=0)
    moved = (x - by_definition).norm(dim=1)
    assert bool((found.moved >= moved).all())
    assert bool((found.moved <= 1.01 * moved).all())
    assert bool((found.rows[:, 20:22] == 1).all())
    square = found.rows[:, 22].double() + found.rows[:, 23].double()
    torch.testing.assert_close(square, by_definition.square().sum(1), rtol=2.0**-16, atol=0)


@pytest.mark.parametrize("d", [1, 3, 64, 700, 5000])
def test_values_are_squared_distances_of_rounded_rows(d):
    x, y = draw(20, d), draw(90, d, seed=1)
    found = all_pairs(rounded(x), rounded(y)).double()
    exact = distances(x.to(torch.bfloat16).double(), y.to(torch.bfloat16).double()).square()
    torch.testing.assert_close(found, exact, rtol=2.0**-8, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e15])
@pytest.mark.parametrize("d", [1, 3, 64, 700, 5000])
def test_no_pair_exceeds_the_bound(d, scale):
    """Whatever the lengths: short rows beside long ones, copies, near copies, zeros, and an outlier."""
    y = draw(120, d, seed=1, scale=scale) * torch.logspace(-4, 1, 120, dtype=torch.float64)[:, None]
    y[3] = y[100]
    y[4:40] = y[40:76] * (1 + 1e-3)
    y[5] = 0
    y[6] *= 1e4
    y = y.float().double()
    found = rounded(y)
    true, computed = distances(y, y), all_pairs(found, found)
    for column in range(len(y)):
        bound = could_be_missed(found, true[:, column], found)
        assert bool((computed[:, column] <= bound).all())


def test_the_bound_is_not_far():
    """For ordinary rows of 64 numbers it is within two per cent, which is why short lists suffice."""
    x = draw(100, 64).float().double()
    found = rounded(x)
    radius = distances(x, x)[:, 50]
    bound = could_be_missed(found, radius, found).double()
    others = radius > 0
    assert bool((bound[others] <= 1.02 * radius[others].square()).all())


@pytest.mark.parametrize("block", [512, 2048, 32768])
@pytest.mark.parametrize("length", [1, 5, 60])
@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("slowly", [True, False])
def test_lists_hold_the_smallest_values(monkeypatch, block, length, within, slowly):
    y = rounded(draw(1700, 4))
    own = torch.arange(30, 1500, 11) if within else None
    x = y[own] if within else rounded(draw(90, 4, seed=1))
    values = all_pairs(x, y).float()
    if within:
        values[torch.arange(len(own)), own] = torch.inf
    monkeypatch.setattr(_halves, "PARTITIONS_SLOWLY", slowly)
    monkeypatch.setattr(_halves, "BLOCK", block)
    monkeypatch.setattr(_halves, "TILE", block // 2)
    space = torch.full((len(x.rows), padded(min(1700, block))), torch.nan, dtype=torch.bfloat16)
    last, columns = nearest_halves(x, y, length, space, own)
    expected = values.sort(dim=1).values[:, :length]
    expected = torch.where(expected > 0, expected, 0)
    assert columns.shape == (len(x.rows), length)
    assert all(len(set(row)) == length for row in columns.tolist())
    found = values.gather(1, columns).sort(dim=1).values
    assert torch.equal(found, expected)
    assert torch.equal(last.float(), expected[:, -1])
    if within:
        assert not bool((columns == own[:, None]).any())


def test_copies_come_first_whatever_rounding_makes_of_them():
    """The distance of a copy can come out negative; it stays below all others, and the row is left in doubt."""
    x = draw(40, 64, scale=3.0)
    y = rounded(torch.cat([x, x, 50 + x]))
    last, columns = nearest_halves(rounded(x), y, 2, buffer(40, 120))
    assert columns.sort(1).values.tolist() == [[i, i + 40] for i in range(40)]
    assert not bool((could_be_missed(rounded(x), torch.zeros(40), y) < last).any())


def test_rows_of_zeros_are_left_in_doubt():
    y = rounded(torch.zeros(20, 3, dtype=torch.float64))
    last, _ = nearest_halves(y, y, 2, buffer(20, 20))
    assert not bool((could_be_missed(y, torch.zeros(20), y) < last).any())
