"""Products in the layout of oneDNN, halves of symmetric and triangular ones: against float64."""

import pytest
import torch

from companion._products import SquaredLengths, add_gram, packed, product


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 1, 3), (1, 5, 2), (300, 40, 65)])
def test_products_are_those_of_float64(device, dtype, shape):
    n, m, d = shape
    g = torch.Generator().manual_seed(0)
    a, b, bias = (torch.randn(*size, generator=g, dtype=torch.float64) for size in ((n, d), (m, d), (m,)))
    expected = a @ b.T
    a, b, bias = (part.to(device, dtype) for part in (a, b, bias))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for left, right in ((a, b), (packed(a), b), (a, packed(b)), (packed(a), packed(b))):
        for offset in (None, bias):
            found = product(left, right, offset)
            assert (found.dtype, found.layout, found.device.type) == (dtype, torch.strided, device.type)
            whole = expected + (0 if offset is None else offset.double().cpu())
            torch.testing.assert_close(found.cpu().double(), whole, rtol=tolerance, atol=tolerance)


def test_packed_is_a_copy_only_where_it_helps():
    x = torch.ones(3, 2)
    assert packed(x).is_mkldnn == torch.backends.mkldnn.is_available()
    for other in (x.double(), x.half(), x.clone().requires_grad_()):
        assert packed(other) is other
    torch.testing.assert_close(product(packed(x.T), x.T), x.T @ x)  # any strides


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [1, 40, 256, 257, 700])
def test_gram_of_blocks(device, dtype, d):
    x = torch.randn(390, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = torch.eye(d, dtype=torch.float64, device=device)
    blocks = x.to(device, dtype).split([50, 1, 339])
    add_gram(total, (block for block in blocks))
    expected = x.T @ x + torch.eye(d)
    torch.testing.assert_close(total.cpu(), expected, rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 1e-12)
    narrow = torch.zeros(d, d, dtype=dtype, device=device)
    add_gram(narrow, blocks)
    torch.testing.assert_close(narrow.cpu().double(), x.T @ x, rtol=1e-4, atol=1e-4)
    untouched = total.clone()
    add_gram(total, [])
    assert torch.equal(total, untouched)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (600, 600), (300, 600), (600, 300)])
@pytest.mark.parametrize("triangular", [True, False])
def test_squared_lengths(device, dtype, shape, triangular):
    g = torch.Generator().manual_seed(0)
    w = torch.randn(*shape, generator=g, dtype=torch.float64)
    w = w.tril() if triangular else w
    w[:1] = 0  # a row that gives nothing
    z = torch.randn(7, shape[1], generator=g, dtype=torch.float64)
    found = SquaredLengths(w.to(device, dtype))(z.to(device, dtype))
    expected = (z @ w.T).square().sum(1)
    torch.testing.assert_close(found.cpu(), expected.to(dtype), rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=0)


def test_zeros_are_skipped_but_not_missed():
    z = torch.randn(4, 600)
    assert torch.equal(SquaredLengths(torch.zeros(600, 600))(z), torch.zeros(4))
    corner = torch.zeros(600, 600)
    corner[0, -1] = 2
    torch.testing.assert_close(SquaredLengths(corner)(z), 4 * z[:, -1].square())


def test_gradients_pass_through_what_is_not_packed():
    g = torch.Generator().manual_seed(0)
    z, w = torch.randn(5, 300, generator=g), torch.randn(300, 300, generator=g).tril()
    for f in (lambda v: SquaredLengths(w)(v), lambda v: product(v, packed(w)).square().sum(1)):
        leaf = z.clone().requires_grad_()
        f(leaf).sum().backward()
        torch.testing.assert_close(leaf.grad, 2 * z @ w.T @ w, rtol=1e-4, atol=1e-3)
