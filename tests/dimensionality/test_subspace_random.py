"""Random subspaces and frozen modules: exact starts, any module, and projections against their matrices."""

import copy
import math

import pytest
import torch
from scipy.linalg import hadamard
from torch import nn

from companion.dimensionality import (
    FrozenModule,
    RandomSubspace,
    StructureAwareSubspace,
    compressed_size,
    compression_bound,
    fastfood,
    fastfood_draw,
    hadamard_transform,
    needed_dimension,
    quantize,
    train_only,
    trainable_count,
)
from companion.nets import MLP, SmallCNN
from companion.training import fit_many

PROJECTIONS = ("dense", "sparse", "fastfood", "coordinates")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.out = nn.Linear(5, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.embed(x))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 6, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def _modules():
    torch.manual_seed(0)
    norm = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LayerNorm(16))
    attention = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.0, batch_first=True)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)))
    return {
        "norm": (norm, torch.randn(5, 1, 4, 4)),
        "tied": (Tied(), torch.randint(0, 7, (3, 4))),
        "lstm": (Recurrent(), torch.randn(3, 5, 4)),
        "attention": (attention, torch.randn(2, 5, 8)),
        "weight_norm": (normed, torch.randn(4, 6)),
        "double": (nn.Linear(3, 2).double(), torch.randn(4, 3).double()),
    }


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("name", ["norm", "tied", "lstm", "attention", "weight_norm", "double"])
def test_starts_at_the_wrapped_module_and_reaches_it(name, projection, device):
    module, x = _modules()[name]
    module, x = module.to(device), x.to(device)
    # another layout of the weights may change the last digit of a recurrent layer, nothing else
    subspace = RandomSubspace(module, 6, projection, random_state=3)
    for mode in (True, False):
        module.train(mode), subspace.train(mode)
        torch.testing.assert_close(subspace(x), module(x), rtol=1e-6, atol=1e-6)
    subspace(x).square().sum().backward()
    assert subspace.z.grad.abs().max() > 0
    assert [n for n, _ in subspace.named_parameters()] == ["z"]
    with torch.no_grad():
        subspace.z.normal_(generator=None)
    subspace.eval()
    exported = subspace.to_module().eval()
    torch.testing.assert_close(exported(x), subspace(x), rtol=1e-5, atol=1e-5)
    assert trainable_count(exported) == trainable_count(module) == subspace.size


def test_wrapping_leaves_the_module_alone_and_moves_with_to():
    module, x = _modules()["norm"]
    before = copy.deepcopy(module.state_dict())
    subspace = RandomSubspace(module, 4).double()
    subspace(x.double()).sum().backward()
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert all(p.requires_grad for p in module.parameters())
    assert subspace.z.dtype == torch.float64
    assert subspace(x.double()).dtype == torch.float64


def test_running_statistics_stay_live():
    module, x = _modules()["norm"]
    subspace = RandomSubspace(module, 4).train()
    subspace(x + 3)
    module.train()(x + 3)
    torch.testing.assert_close(subspace.module[1].running_mean, module[1].running_mean)
    assert int(subspace.module[1].num_batches_tracked) == 1


def test_tied_weights_move_together():
    module, x = _modules()["tied"]
    subspace = RandomSubspace(module, 5)
    assert subspace.size == 35
    with torch.no_grad():
        subspace.z.fill_(1.0)
    exported = subspace.to_module()
    assert exported.out.weight is exported.embed.weight
    moved = copy.deepcopy(module)
    with torch.no_grad():
        moved.embed.weight += subspace.project(subspace.z).view(7, 5)
    torch.testing.assert_close(subspace(x), moved(x))


def test_frozen_parameters_stay_out_of_the_subspace():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    assert train_only(net, (nn.BatchNorm2d, nn.Linear)) == ["1.weight", "1.bias", "3.weight", "3.bias"]
    subspace = RandomSubspace(net, 3)
    assert subspace.size == trainable_count(net) == 8 + 34
    with torch.no_grad():
        subspace.z.fill_(1.0)
    exported = subspace.to_module()
    assert torch.equal(exported[0].weight, net[0].weight)
    assert not exported[0].weight.requires_grad
    assert not torch.equal(exported[3].weight, net[3].weight)


def _matrix(subspace):
    return torch.stack([subspace.project(row) for row in torch.eye(subspace.dim)], dim=1)  # (D, d)


@pytest.mark.parametrize("projection", ["dense", "sparse", "coordinates"])
def test_columns_have_length_one(projection):
    p = _matrix(RandomSubspace(MLP((20, 16, 10), seed=0), 12, projection))
    torch.testing.assert_close(p.norm(dim=0), torch.ones(12))


def test_sparse_columns_have_sqrt_d_distinct_entries_everywhere():
    subspace = RandomSubspace(MLP((20, 16, 10), seed=0), 400, "sparse")
    p = _matrix(subspace)
    assert bool(((p != 0).sum(dim=0) == math.isqrt(subspace.size - 1) + 1).all())
    assert bool((p != 0).any(dim=1).all())  # 400 columns reach every parameter
    z = torch.randn(400, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(subspace.project(z), p @ z, rtol=1e-4, atol=1e-5)


class Numbers(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(n))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 24, 1000, 1023])
def test_sparse_columns_have_one_entry_in_each_slice_of_any_size(size):
    subspace = RandomSubspace(Numbers(size), 2000, "sparse")
    hit = _matrix(subspace).detach() != 0
    count = math.isqrt(size - 1) + 1
    assert bool((hit.sum(dim=0) == count).all())
    hits, width = hit.sum(dim=1), size // count  # slices are that wide, or one wider
    assert 2000 / (width + 1) - 5 * 2000**0.5 < int(hits.min()) <= int(hits.max()) < 2000 / width + 5 * 2000**0.5
    z = torch.randn(2000, generator=torch.Generator().manual_seed(1), requires_grad=True)
    torch.testing.assert_close(subspace.project(z), _matrix(subspace) @ z, rtol=1e-3, atol=1e-3)
    (gradient,) = torch.autograd.grad(subspace.project(z)[-1], z)
    torch.testing.assert_close(gradient, _matrix(subspace)[-1].detach())


@pytest.mark.parametrize("n", [1, 2, 8, 32, 64, 1024, 4096])
def test_hadamard_transform_is_the_matrix(n, generator):
    x = torch.randn(3, n, generator=generator, dtype=torch.float64)
    expected = x @ torch.as_tensor(hadamard(n), dtype=torch.float64)
    torch.testing.assert_close(hadamard_transform(x), expected)
    torch.testing.assert_close(hadamard_transform(hadamard_transform(x)), n * x)


@pytest.mark.parametrize("n", [2**11, 2**15, 2**16])
def test_hadamard_transform_of_many_factors_has_the_sign_of_common_bits(n):
    columns = torch.tensor([0, 1, 33, 1025, n // 2 + 5])
    units = torch.nn.functional.one_hot(columns % n, n).float()
    common = (columns % n)[:, None] & torch.arange(n)
    odd = sum((common >> bit) & 1 for bit in range(17)) % 2
    assert torch.equal(hadamard_transform(units), (1 - 2 * odd).float())


def test_hadamard_transform_of_any_layout_and_number_of_axes(generator):
    x = torch.randn(64, 3, 2, generator=generator, dtype=torch.float64)
    turned = x.permute(2, 1, 0)  # not contiguous
    expected = turned @ torch.as_tensor(hadamard(64), dtype=torch.float64)
    torch.testing.assert_close(hadamard_transform(turned), expected)
    assert hadamard_transform(torch.zeros(0, 64)).shape == (0, 64)
    assert hadamard_transform(turned[0, 0]).shape == (64,)
    batched = torch.func.vmap(hadamard_transform)(turned)
    torch.testing.assert_close(batched, expected)


def test_hadamard_transform_wants_a_power_of_two():
    with pytest.raises(ValueError, match="power of two, got 12"):
        hadamard_transform(torch.zeros(12))


def test_fastfood_equals_its_factors_multiplied_out(generator):
    d, n, big = 5, 8, 21
    draw = fastfood_draw(d, big, random_state=0)
    h = torch.as_tensor(hadamard(n), dtype=torch.float32)
    blocks = []
    for signs, permutation, gaussians in zip(*draw, strict=True):
        pi = torch.eye(n)[permutation]
        blocks.append(h @ torch.diag(gaussians) @ pi @ h @ torch.diag(signs))
    matrix = torch.cat(blocks)[:big, :d] / math.sqrt(n * big)
    z = torch.randn(4, d, generator=generator)
    torch.testing.assert_close(fastfood(z, big, draw), z @ matrix.T, rtol=1e-4, atol=1e-5)


def test_fastfood_keeps_norms_and_angles_in_expectation(generator):
    z = torch.randn(2, 6, generator=generator)
    grams = []
    for seed in range(600):
        p = fastfood(z, 40, random_state=seed)
        grams.append(p @ p.T)
    grams = torch.stack(grams)
    error = (grams.mean(0) - z @ z.T).abs()
    assert bool((error < 4 * grams.std(0) / math.sqrt(600)).all())


def test_fastfood_columns_of_a_large_projection_are_nearly_orthonormal():
    p = fastfood(torch.eye(50), 50_000)
    gram = p @ p.T
    assert (gram - torch.eye(50)).abs().max() < 0.03


def test_fastfood_never_materialises_the_matrix():
    net = RandomSubspace(nn.Linear(1000, 1000), 1000, "fastfood")
    numbers = sum(b.numel() for name, b in net.named_buffers() if not name.startswith("module."))
    assert numbers < 4 * net.size  # the matrix would be 1000 times net.size
    net(torch.randn(2, 1000)).sum().backward()
    assert net.z.grad.shape == (1000,)


def test_fastfood_gradient_is_the_transposed_map(generator):
    z = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: fastfood(v, 13), (z,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fastfood_in_half_precision_stays_near_the_exact_projection(dtype, generator):
    z = torch.randn(100, generator=generator).to(dtype)
    exact = fastfood(z.double(), 3000)
    error = (fastfood(z, 3000).double() - exact).norm() / exact.norm()
    assert fastfood(z, 3000).dtype == dtype
    assert error < 8 * torch.finfo(dtype).eps


def test_fastfood_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="blocks"):
        fastfood(torch.zeros(5), 100, fastfood_draw(5, 50))
    with pytest.raises(ValueError, match="at least 1"):
        fastfood(torch.zeros(0), 100)


def test_the_same_seed_gives_the_same_subspace_and_state_is_small():
    module = MLP((8, 16, 3), seed=0)
    a, b = (RandomSubspace(module, 5, random_state=4) for _ in range(2))
    with torch.no_grad():
        a.z.normal_()
    b.load_state_dict(a.state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(a(x), b(x))
    assert not any("directions" in name for name in a.state_dict())
    with pytest.raises(RuntimeError, match="expected a z trained with"):
        RandomSubspace(module, 5, random_state=5).load_state_dict(a.state_dict())


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_many_subspaces_train_as_one(projection, generator):
    x = torch.randn(64, 8, generator=generator)
    y = (x[:, 0] > 0).long()
    many = fit_many(
        lambda seed: RandomSubspace(MLP((8, 16, 2), seed=seed), 10, projection, random_state=seed),
        [0, 1, 2],
        x,
        y,
        epochs=60,
        batch_size=None,
        lr=0.1,
        device="cpu",
    )
    assert many.params["z"].shape == (3, 10)
    assert bool((many.history.loss[-1] < 0.8 * many.history.loss[0]).all())
    single = many.models()[2]
    assert single.random_state == 2
    torch.testing.assert_close(single(x), many(x)[2])


def test_structure_aware_scales_each_tensor():
    module = MLP((4, 8, 2), seed=0)
    net = StructureAwareSubspace(module, 10, "dense")
    assert (net.z.numel(), net.scales.numel()) == (6, 4)
    assert trainable_count(net) == 10
    x = torch.randn(3, 4)
    assert torch.equal(net(x), module(x))
    with torch.no_grad():
        net.z.fill_(1.0)
        net.scales.copy_(torch.tensor([0.0, 1.0, 2.0, 0.0]))
    base, pieces = net.base_values(), net.split(net.project(net.z))
    for name, scale in zip(net.names, (0.0, 1.0, 2.0, 0.0), strict=True):
        torch.testing.assert_close(net.values()[name], base[name] + scale * pieces[name])
    with pytest.raises(ValueError, match="dim above 4"):
        StructureAwareSubspace(module, 4)


def test_bad_subspaces():
    module = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="projection among"):
        RandomSubspace(module, 2, "random")
    with pytest.raises(ValueError, match="at most 6 coordinates"):
        RandomSubspace(module, 7, "coordinates")
    with pytest.raises(ValueError, match="dim"):
        RandomSubspace(module, 0)
    with pytest.raises(ValueError, match="trainable"):
        RandomSubspace(nn.ReLU(), 2)
    with pytest.raises(ValueError, match="trainable"):
        RandomSubspace(module.requires_grad_(False), 2)
    with pytest.raises(ValueError, match="lazy"):
        RandomSubspace(nn.LazyLinear(2), 2)
    with pytest.raises(ValueError, match="12 numbers"):
        FrozenModule(nn.Linear(3, 3)).split(torch.zeros(5))


def test_train_only_by_class_by_function_and_nothing():
    net = SmallCNN(width=4, seed=0)
    values = copy.deepcopy(net.state_dict())
    assert train_only(net, lambda name, p: name.startswith("head")) == ["head.weight", "head.bias"]
    assert [n for n, p in net.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    assert train_only(net, nn.Conv2d) == [n for n, p in net.named_parameters() if n.startswith("body")]
    assert all(torch.equal(values[k], v) for k, v in net.state_dict().items())
    with pytest.raises(ValueError, match="has parameters in"):
        train_only(net, nn.BatchNorm2d)
    with pytest.raises(TypeError, match="module class"):
        train_only(net, "BatchNorm")


def test_train_only_sees_a_tied_weight_under_either_name():
    net = Tied()
    assert train_only(net, nn.Linear) == ["embed.weight"]
    assert net.out.weight.requires_grad


def test_needed_dimension():
    assert needed_dimension([1, 10, 100], [0.1, 0.5, 0.9], 0.5) == pytest.approx(10)
    assert needed_dimension([1, 10, 100], [0.1, 0.5, 0.9], 0.7) == pytest.approx(math.sqrt(1000))
    assert needed_dimension([4, 8], [0.9, 1.0], 0.5) == 4
    assert needed_dimension([4, 8], [0.1, 0.2], 0.5) == math.inf
    with pytest.raises(ValueError, match="increasing"):
        needed_dimension([8, 4], [0.1, 0.2], 0.5)
    with pytest.raises(ValueError, match="one length"):
        needed_dimension([8, 4], [0.1], 0.5)


def test_quantize_keeps_the_range_and_halves_the_error_per_bit(generator):
    z = torch.randn(1000, generator=generator)
    errors = [(quantize(z, bits) - z).abs().max() for bits in (4, 5, 6)]
    width = z.max() - z.min()
    for bits, error in zip((4, 5, 6), errors, strict=True):
        assert error <= width / (2**bits - 1) / 2 * 1.001
    assert quantize(z, 4).unique().numel() <= 16
    assert torch.equal(quantize(torch.full((3,), 2.0), 4), torch.full((3,), 2.0))


def test_compressed_size_and_bound():
    assert compressed_size(100, bits=1) == 16 + 13
    # one hypothesis left when nothing is trained but one bit
    assert compression_bound(0.0, 100, 1, bits=1, delta=0.5) == pytest.approx(math.sqrt(2 * math.log(2) / 200))
    assert compression_bound(0.1, 10**9, 10) == pytest.approx(0.1, abs=1e-3)
    with pytest.raises(ValueError, match="train_error"):
        compression_bound(1.2, 100, 1)


def test_the_compression_bound_holds_on_coin_flips(generator):
    # the best of 2^d random classifiers of n coin flips: the bound has to cover 0.5 with probability 1 - delta
    n, d, failures = 200, 8, 0
    for _ in range(200):
        errors = (torch.rand(2**d, n, generator=generator) < 0.5).float().mean(1)
        failures += compression_bound(float(errors.min()), n, d, bits=1, delta=0.1) < 0.5
    assert failures <= 0.1 * 200
