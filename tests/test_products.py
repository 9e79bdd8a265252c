"""Products in oneDNN's layout against float64."""

import pytest
import torch

from companion._products import packed, product


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
