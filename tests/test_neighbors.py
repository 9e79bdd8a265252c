"""Neighbours against brute force in float64, closed forms, invariances, a memory bound, and bad input."""

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors

from companion import neighbors
from companion.neighbors import _members, _Search, _smallest, knn
from tests.largest import Largest

METRICS = ["euclidean", "cosine", "inner"]


@pytest.fixture(params=["bfloat16", "float32"])
def first_numbers(request, monkeypatch):
    """Searches begin with these numbers, as they do on processors that do and do not multiply bfloat16 faster."""
    monkeypatch.setattr(neighbors, "multiplies_halves", lambda: request.param == "bfloat16")
    return request.param


def draw(n, d, seed=0, dtype=torch.float32):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def distances_by_definition(x, y, metric):
    x, y = x.double(), y.double()
    if metric == "inner":
        return -(x @ y.T)
    if metric == "cosine":
        x, y = (v / v.norm(dim=1, keepdim=True) for v in (x, y))
        return (x[:, None] - y[None]).square().sum(2) / 2
    return (x[:, None] - y[None]).square().sum(2).sqrt()


def brute_force(x, y, k, metric):
    distance = distances_by_definition(x, x if y is None else y, metric)
    if y is None:
        distance.fill_diagonal_(torch.inf)
    distance, index = distance.sort(dim=1, stable=True)
    return distance[:, :k], index[:, :k]


@pytest.mark.usefixtures("first_numbers")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("against_itself", [True, False])
def test_equals_brute_force(device, metric, dtype, against_itself):
    x, y = draw(150, 6, dtype=dtype), None if against_itself else draw(401, 6, seed=1, dtype=dtype)
    distance, index = brute_force(x, y, 7, metric)
    found = knn(x.to(device), None if y is None else y.to(device), k=7, metric=metric)
    assert torch.equal(found.indices.cpu(), index)
    tolerance = {torch.float16: 1e-3, torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(found.distances.cpu().double(), distance, rtol=tolerance, atol=tolerance)
    assert found.distances.dtype == dtype
    assert found.distances.device.type == device.type


@pytest.mark.usefixtures("first_numbers")
@pytest.mark.parametrize("metric", METRICS)
def test_small_memory_changes_nothing(device, metric):
    x, y = draw(300, 16).to(device), draw(1100, 16, seed=1).to(device)
    whole = knn(x, y, k=5, metric=metric)
    for memory in ("30kB", "300KiB", 1):
        pieces = knn(x, y, k=5, metric=metric, memory=memory)
        assert torch.equal(whole.indices, pieces.indices)
        torch.testing.assert_close(whole.distances, pieces.distances, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("first_numbers")
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_equals_scikit_learn_on_digits(device, metric):
    x = torch.tensor(load_digits().data, dtype=torch.float32)
    distance, _ = NearestNeighbors(n_neighbors=10, metric=metric, algorithm="brute").fit(x.numpy()).kneighbors()
    found = knn(x.to(device), k=10, metric=metric)
    np.testing.assert_allclose(found.distances.cpu().numpy(), distance, rtol=1e-5, atol=1e-6)
    exact, index = brute_force(x[:200], x, 11, metric)
    assert torch.equal(found.indices[:200].cpu(), index[:, 1:])  # ties by index; nothing else is at distance 0
    assert bool((exact[:, 1] > 0).all())


@pytest.mark.usefixtures("first_numbers")
def test_two_far_clusters_do_not_lose_their_neighbours(device):
    """Around 1e4 a float32 product has errors of several units; the neighbours are 1e-2 apart."""
    x = draw(600, 5, dtype=torch.float64) * 1e-2
    x[::2] += 1e4
    x[1::2] -= 1e4
    distance, index = brute_force(x, None, 4, "euclidean")
    found = knn(x.to(device), k=4)
    assert torch.equal(found.indices.cpu(), index)
    torch.testing.assert_close(found.distances.cpu(), distance, rtol=1e-12, atol=0)


@pytest.mark.usefixtures("first_numbers")
def test_dense_data_needs_more_than_float32(device):
    x = torch.rand(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.cat([x, 1 + 1e-9 * x], 0)
    distance, index = brute_force(x, None, 3, "euclidean")
    found = knn(x.to(device), k=3)
    assert torch.equal(found.indices.cpu(), index)
    torch.testing.assert_close(found.distances.cpu(), distance, rtol=1e-9, atol=0)


@pytest.mark.usefixtures("first_numbers")
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e25, 1e100])
@pytest.mark.parametrize("metric", METRICS)
def test_any_scale(device, scale, metric):
    x = draw(200, 4, dtype=torch.float64)
    _, index = brute_force(x, None, 3, metric)
    assert torch.equal(knn(x.to(device) * scale, k=3, metric=metric).indices.cpu(), index)


@pytest.mark.usefixtures("first_numbers")
def test_an_outlier_does_not_matter(device):
    x = draw(500, 8)
    x[17] = 1e6
    _, index = brute_force(x, None, 3, "euclidean")
    assert torch.equal(knn(x.to(device), k=3).indices.cpu(), index)


@pytest.mark.usefixtures("first_numbers")
def test_duplicates_are_neighbours_and_the_row_itself_is_not(device):
    x = draw(40, 3).repeat(2, 1).to(device)
    distance, index = knn(x, k=1)
    assert index.squeeze(1).tolist() == [*range(40, 80), *range(40)]
    assert bool((distance == 0).all())
    distance, index = knn(x, x, k=2)
    assert bool((distance == 0).all())
    assert index.tolist() == [[i % 40, i % 40 + 40] for i in range(80)]


@pytest.mark.usefixtures("first_numbers")
@pytest.mark.parametrize("metric", METRICS)
def test_ties_go_to_the_lower_index(device, metric):
    x = torch.ones(100, 3, device=device)
    index = knn(x, k=5, metric=metric).indices
    assert index[50].tolist() == [0, 1, 2, 3, 4]
    assert index[2].tolist() == [0, 1, 3, 4, 5]
    grid = torch.cartesian_prod(torch.arange(12.0), torch.arange(12.0)).to(device)
    _, expected = brute_force(grid.cpu(), None, 9, "euclidean")
    for memory in ("256MB", "20kB"):
        assert torch.equal(knn(grid, k=9, memory=memory).indices.cpu(), expected)


@pytest.mark.usefixtures("first_numbers")
def test_all_rows_in_order(device):
    x = draw(50, 4).to(device)
    distance, index = knn(x, k=49)
    assert bool((distance[:, 1:] >= distance[:, :-1]).all())
    for i in range(50):
        assert sorted(index[i].tolist()) == [j for j in range(50) if j != i]
    assert sorted(knn(x[:1], x, k=50).indices[0].tolist()) == list(range(50))
    assert knn([[0.0], [1.0]], k=1).indices.tolist() == [[1], [0]]


def test_invariances():
    x, y = draw(200, 8, dtype=torch.float64), draw(300, 8, seed=1, dtype=torch.float64)
    rotation = torch.linalg.qr(draw(8, 8, seed=2, dtype=torch.float64)).Q
    distance, index = knn(x, y, k=5)
    moved = knn(x @ rotation + 3, y @ rotation + 3, k=5)
    assert torch.equal(moved.indices, index)
    torch.testing.assert_close(moved.distances, distance)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(3))
    assert torch.equal(order[knn(x, y[order], k=5).indices], index)
    scaled = knn(x * torch.rand(200, 1, dtype=torch.float64).add(0.5), y, k=5, metric="cosine")
    assert torch.equal(scaled.indices, knn(x, y, k=5, metric="cosine").indices)


def test_inner_finds_the_largest_products():
    found = knn([[1.0, 0.0]], [[1.0, 5.0], [3.0, -9.0], [2.0, 0.0]], k=2, metric="inner")
    assert found.indices.tolist() == [[1, 2]]
    assert found.distances.tolist() == [[-3.0, -2.0]]


def test_the_smallest_of_each_row_are_found_by_groups(device):
    block = draw(30, 16 * 40).to(device)
    values, columns = _smallest(block, 5)
    expected = block.sort(dim=1)
    assert torch.equal(values, expected.values[:, :5])
    assert torch.equal(columns, expected.indices[:, :5])


def test_members_of_groups_are_the_columns_a_minimum_was_taken_over():
    stride, size, tiles = 5, 16, 3
    column = torch.arange(tiles * size * stride)
    groups = column.view(tiles, size, stride).permute(0, 2, 1).reshape(-1, size)  # as the search takes its minima
    assert torch.equal(_members(torch.arange(tiles * stride)[:, None], stride, size), groups)


def in_blocks(x, k, metric):
    """Brute force without self, a few rows at a time."""
    parts = []
    for rows in torch.arange(len(x)).split(500):
        distance = distances_by_definition(x[rows], x, metric)
        distance[torch.arange(len(rows)), rows] = torch.inf
        distance, index = distance.sort(dim=1, stable=True)
        parts.append((distance[:, :k], index[:, :k]))
    return [torch.cat(part) for part in zip(*parts)]


@pytest.fixture
def mirrored(monkeypatch):
    """Notes whether a search took half of the products and mirrored them, which it does from some thousand rows on."""
    calls, minima = [], _Search._minima
    monkeypatch.setattr(neighbors, "multiplies_halves", lambda: False)
    monkeypatch.setattr(_Search, "_minima", lambda self, dtype: calls.append(dtype) or minima(self, dtype))
    return calls


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_mirrored_products_change_nothing(mirrored, metric):
    x = draw(5100, 6)  # no multiple of the block
    x[100:103] = x[4000]  # copies in other blocks
    x[5099] = 1e3  # an outlier in the last, smaller block
    distance, index = in_blocks(x, 2, metric)
    found = knn(x, k=2, metric=metric)
    assert mirrored == [torch.float32]
    assert torch.equal(found.indices, index)
    torch.testing.assert_close(found.distances.double(), distance, rtol=1e-6, atol=1e-6)
    assert torch.equal(knn(x, k=2, metric=metric, memory="5MB").indices, index)
    assert len(mirrored) == 1, "there was no room for the minima of all pairs"


def test_mirrored_products_are_searched_again_where_rounding_decides(mirrored):
    x = draw(5000, 4, dtype=torch.float64)
    x[:3000] *= 1e3
    x[3000:] = 500 + 1e-3 * x[3000:]  # dense and far from the centre
    distance, index = in_blocks(x, 2, "euclidean")
    found = knn(x, k=2)
    assert mirrored == [torch.float32]
    assert torch.equal(found.indices, index)
    torch.testing.assert_close(found.distances, distance, rtol=1e-9, atol=0)


def test_the_reader_may_allow_short_products(device):
    """With lower matmul precision products have eight bits; neighbours stay exact."""
    x = draw(600, 32)
    _, index = brute_force(x, None, 5, "euclidean")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        found = knn(x.to(device), k=5)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found.indices.cpu(), index)


@pytest.fixture
def attempts(monkeypatch):
    """Lists how many rows were searched with which numbers and how long a list, and how many of them were decided."""
    done, nearest = [], _Search._nearest
    monkeypatch.setattr(neighbors, "multiplies_halves", lambda: True)

    def counted(self, batch, dtype, length, minima):
        found = nearest(self, batch, dtype, length, minima)
        done.append((dtype, length, len(batch), int(found[2].sum())))
        return found

    monkeypatch.setattr(_Search, "_nearest", counted)
    return done


def rows_by(attempts, dtype):
    return sum(rows for kind, _, rows, _ in attempts if kind == dtype)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("against_itself", [True, False])
def test_short_numbers_decide_ordinary_data(attempts, metric, against_itself):
    x, y = draw(1500, 24), None if against_itself else draw(2100, 24, seed=1)
    distance, index = brute_force(x, y, 6, metric)
    found = knn(x, y, k=6, metric=metric)
    assert torch.equal(found.indices, index)
    torch.testing.assert_close(found.distances.double(), distance, rtol=1e-6, atol=1e-6)
    assert attempts[0][:2] == (torch.bfloat16, 14), "lists of k + 2k / 3 + 4"
    assert rows_by(attempts, torch.float32) + rows_by(attempts, torch.float64) == 0


def test_rows_that_short_numbers_leave_in_doubt_are_searched_with_longer_ones(attempts):
    """A tight bunch far from the centre has distances below what bfloat16 can tell apart; the rest has not."""
    x = draw(1600, 12)
    x[1400:] = 10 + 5e-2 * x[1400:]
    distance, index = brute_force(x, None, 3, "euclidean")
    found = knn(x, k=3)
    assert torch.equal(found.indices, index)
    torch.testing.assert_close(found.distances.double(), distance, rtol=1e-6, atol=0)
    assert rows_by(attempts, torch.float64) <= rows_by(attempts, torch.float32) == 200


def test_short_numbers_that_decide_nothing_are_given_up_after_few_rows(attempts):
    x = 100 + 1e-3 * draw(4000, 8)
    x[0] = 0  # so that the centre is not among them
    x[1] = -1e4
    _, index = brute_force(x[:1000], None, 2, "euclidean")
    assert torch.equal(knn(x[:1000], k=2).indices, index)
    assert rows_by(attempts, torch.bfloat16) <= 2 * 1000 // 16


@pytest.mark.parametrize("kind", ["inner", "mixed dtypes", "views", "one query", "one column", "k of all"])
def test_short_numbers_meet_every_kind_of_input(attempts, kind):
    x, y, k, metric = draw(300, 8), draw(500, 8, seed=1), 4, "euclidean"
    if kind == "inner":
        metric = "inner"
    elif kind == "mixed dtypes":
        x, y = x.half(), 100 + y.double()
    elif kind == "views":
        x, y = draw(8, 300).T, draw(1000, 16, seed=1)[::2, ::2]
    elif kind == "one query":
        x = x[:1]
    elif kind == "one column":
        x, y = x[:, :1], y[:, :1]
    elif kind == "k of all":
        y, k = y[:30], 30
    distance, index = brute_force(x, y, k, metric)
    found = knn(x, y, k=k, metric=metric)
    assert torch.equal(found.indices, index)
    torch.testing.assert_close(found.distances.double(), distance, rtol=1e-3, atol=1e-3)
    used = {dtype for dtype, *_ in attempts}
    assert (torch.bfloat16 in used) == (kind not in ("inner", "k of all"))


def test_little_memory_leaves_no_room_for_rounded_rows(attempts):
    x = draw(600, 32)
    _, index = brute_force(x, None, 3, "euclidean")
    assert torch.equal(knn(x, k=3, memory="150kB").indices, index)
    assert rows_by(attempts, torch.bfloat16) == 0


@pytest.mark.usefixtures("first_numbers")
@pytest.mark.parametrize("metric", METRICS)
def test_memory_stays_bounded(device, metric):
    x = draw(20_000, 8).to(device)
    with Largest() as largest:
        knn(x[:3000], x, k=5, metric=metric, memory="2MB")
    assert largest.bytes <= 1_000_000  # the whole matrix would be 240 MB
    with Largest() as largest:
        knn(x[:5000], k=1, metric=metric, memory="16MB")
    assert largest.bytes <= 8_000_000
    x = torch.ones(2000, 4, device=device)  # all tied: the lists have to grow to everything
    with Largest() as largest:
        knn(x[:20], x, k=3, metric=metric, memory="2MB")
    assert largest.bytes <= 1_000_000


@pytest.mark.usefixtures("first_numbers")
def test_the_input_is_left_alone(device):
    x = draw(60, 4).to(device)
    copy = x.clone()
    knn(x, k=3)
    assert torch.equal(x, copy)
    assert not knn(x.requires_grad_(), k=3).distances.requires_grad


def test_memory_mapped_features(tmp_path):
    x = draw(200, 4)
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert torch.equal(knn(mapped, k=3).indices, knn(x, k=3).indices)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"k": 5}, ValueError, r"at most 4 \(n - 1"),
        ({"k": 0}, ValueError, "at least 1, got 0"),
        ({"k": 2.0}, TypeError, "k to be a whole number"),
        ({"y": torch.zeros(3, 2), "k": 4}, ValueError, r"at most 3 \(m"),
        ({"y": torch.zeros(3, 3), "k": 1}, ValueError, "got 2 and 3"),
        ({"y": torch.full((3, 2), math.nan), "k": 1}, ValueError, "y to be finite"),
        ({"k": 1, "metric": "manhattan"}, ValueError, "got 'manhattan'"),
        ({"y": torch.full((3, 2), 1e200, dtype=torch.float64), "k": 1}, ValueError, "overflow"),
        ({"k": 1, "memory": "lots"}, ValueError, "got 'lots'"),
        ({"k": 1, "memory": 0}, ValueError, "memory"),
        ({"y": torch.zeros(3, 2), "k": 1, "metric": "cosine"}, ValueError, "row of zeros"),
    ],
)
def test_bad_input(arguments, error, says):
    with pytest.raises(error, match=says):
        knn(draw(5, 2), **arguments)


def test_a_single_row_has_no_neighbour():
    with pytest.raises(ValueError, match="at most 0"):
        knn([[1.0, 2.0]], k=1)
