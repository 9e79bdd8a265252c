import math

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn

from companion.mixing import LARGE_SAMPLE, Mixed, cutmix, mixup, mixup_loss

MIXERS = [mixup, cutmix]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def partners(y, y_b):
    """Where each y_b stands in y, for labels that are all different."""
    return torch.tensor([int((y == b).nonzero()) for b in y_b])


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("shape", [(7,), (7, 3), (6, 2, 5, 4), (5, 2, LARGE_SAMPLE), (1, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_mixup_is_the_formula(shape, per_sample, dtype, device):
    x, y = torch.randn(shape, dtype=dtype, device=device), torch.arange(shape[0], device=device) + 2**60
    before = x.clone()
    mixed = mixup(x, y, per_sample=per_sample, generator=seeded())
    assert torch.equal(x, before)
    assert torch.equal(mixed.y_a, y)
    assert sorted(mixed.y_b.tolist()) == y.tolist()  # a permutation, and exact far beyond float precision
    assert mixed.lam.shape == ((shape[0],) if per_sample else ())
    lam = mixed.lam.view(-1, *[1] * (x.dim() - 1)) if per_sample else mixed.lam
    expected = lam * x + (1 - lam) * x[partners(y, mixed.y_b)]
    assert mixed.x.dtype == dtype
    assert torch.allclose(mixed.x, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype_and_mixes_with_the_lam_it_reports(dtype):
    x, y = torch.randn(8, 5).to(dtype), torch.arange(8)
    mixed = mixup(x, y, generator=seeded())
    expected = mixed.lam * x.float() + (1 - mixed.lam) * x[partners(y, mixed.y_b)].float()
    assert mixed.x.dtype == dtype
    assert mixed.lam.dtype == torch.float32
    assert torch.allclose(mixed.x.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_whole_numbers_are_mixed_in_floats(dtype):
    x, y = torch.randint(0, 2, (6, 3)).to(dtype), torch.arange(6)
    mixed = mixup(x, y, generator=seeded())
    assert mixed.x.dtype == torch.float32
    assert torch.equal(mixed.x, mixup(x.float(), y, generator=seeded()).x)
    with pytest.raises(ValueError, match="floating"):
        mixup(x, y, out=x)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("shape", [(9, 3, 6, 5), (9, 2, 128, 64)])
def test_out_and_in_place_give_what_a_fresh_mix_gives(mixer, per_sample, shape):
    x, y = torch.randn(shape), torch.arange(shape[0])
    fresh = mixer(x, y, per_sample=per_sample, generator=seeded(3))
    out, copy = torch.full_like(x, math.nan), x.clone()
    other = mixer(x, y, per_sample=per_sample, generator=seeded(3), out=out)
    assert other.x is out
    assert torch.equal(out, fresh.x)
    assert torch.equal(x, copy)
    inplace = mixer(copy, y, per_sample=per_sample, generator=seeded(3), out=copy)
    assert inplace.x is copy
    assert torch.equal(copy, fresh.x)
    assert not torch.equal(fresh.x, x)


@pytest.mark.parametrize("mixer", MIXERS)
def test_an_out_that_does_not_fit(mixer):
    x, y = torch.randn(4, 1, 4, 4), torch.arange(4)
    memory = torch.randn(5, 1, 4, 4)
    for out in (torch.empty(3, 1, 4, 4), torch.empty(4, 1, 4, 4, dtype=torch.float64)):
        with pytest.raises(ValueError, match="expected out of shape"):
            mixer(x, y, out=out)
    with pytest.raises(ValueError, match="overlaps"):
        mixer(memory[:-1], y, out=memory[1:])
    with pytest.raises(ValueError, match="gradients"):
        mixer(x.requires_grad_(), y, out=torch.empty(4, 1, 4, 4))
    halves = torch.randn(8, 1, 4, 4)
    mixer(halves[:4], y, out=halves[4:])


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_the_same_generator_gives_the_same_mix(mixer, per_sample, device):
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8)
    before = torch.get_rng_state()
    a, b, c = (mixer(x, y, per_sample=per_sample, generator=seeded(s)) for s in (1, 1, 2))
    d = mixer(x.to(device), y.to(device), per_sample=per_sample, generator=seeded(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(a, b))
    assert not torch.equal(a.x, c.x)
    assert torch.allclose(d.x.cpu(), a.x, atol=1e-6)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_odd_and_single_item_batches(mixer, n):
    x, y = torch.randn(n, 1, 4, 4), torch.arange(n)
    mixed = mixer(x, y, generator=seeded())
    assert mixed.x.shape == x.shape
    if n == 1:
        assert torch.allclose(mixed.x, x)


@pytest.mark.parametrize("alpha", [0.01, 0.2, 1.0, 4.0])
def test_lam_follows_the_beta_distribution(alpha):
    lam = mixup(torch.zeros(4000, 1).double(), torch.zeros(4000), alpha, per_sample=True, generator=seeded()).lam
    assert ((lam >= 0) & (lam <= 1)).all()
    if alpha < 0.1:  # most of the mass lies closer to 0 and 1 than a float can tell: compare the spread instead
        assert abs(lam.var().item() - 0.25 / (2 * alpha + 1)) < 0.005
        assert abs(lam.mean().item() - 0.5) < 0.03
    else:
        assert scipy.stats.kstest(lam.numpy(), scipy.stats.beta(alpha, alpha).cdf).pvalue > 0.01


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("alpha", [1e-6, 1e-300, 1e6])
def test_extreme_alpha_stays_finite(mixer, alpha):
    mixed = mixer(torch.randn(9, 1, 8, 8), torch.arange(9), alpha, per_sample=True, generator=seeded())
    assert mixed.lam.isfinite().all()
    assert mixed.x.isfinite().all()


@pytest.mark.parametrize("mixer", MIXERS)
def test_alpha_zero_mixes_nothing(mixer):
    x = torch.randn(5, 1, 4, 4)
    mixed = mixer(x, torch.arange(5), 0.0)
    assert torch.equal(mixed.x, x)
    assert mixed.lam == 1


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64, torch.bfloat16])
def test_cutmix_pastes_one_rectangle_and_lam_is_its_area(per_sample, dtype, device):
    n, height, width = 9, 11, 8
    x = torch.arange(n, device=device).to(dtype).view(n, 1, 1, 1).expand(n, 2, height, width)
    y = torch.arange(n, device=device)
    boxes = set()
    for seed in range(30):
        mixed = cutmix(x, y, per_sample=per_sample, generator=seeded(seed))
        assert mixed.x.dtype == dtype
        lam = mixed.lam if per_sample else mixed.lam.expand(n)
        for i in range(n):
            if mixed.y_b[i] == i:
                assert (mixed.x[i] == i).all()
                continue
            pasted = mixed.x[i] == mixed.y_b[i]
            assert (pasted | (mixed.x[i] == i)).all()
            assert torch.equal(pasted[0], pasted[1])
            assert math.isclose(1 - pasted[0].double().mean().item(), lam[i].item(), abs_tol=1e-6)
            rows, columns = pasted[0].any(1), pasted[0].any(0)
            assert torch.equal(pasted[0], rows[:, None] & columns[None])
            assert rows.int().diff().abs().sum() <= 2
            assert columns.int().diff().abs().sum() <= 2
            boxes.add((int(rows.sum()), int(columns.sum())))
    assert len(boxes) > 10


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_gradients_flow_to_both_samples(mixer, per_sample):
    x = torch.randn(4, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: mixer(x, torch.arange(4), per_sample=per_sample, generator=seeded(5)).x, x
    )


@pytest.mark.parametrize("per_sample", [False, True])
def test_mixup_loss_is_the_loss_of_the_soft_labels(per_sample):
    z, y = torch.randn(9, 4), torch.arange(9) % 4
    mixed = mixup(torch.randn(9, 2), y, per_sample=per_sample, generator=seeded())
    expected = F.cross_entropy(z, mixed.targets(4))
    assert torch.allclose(mixup_loss(z, mixed), expected)
    built = nn.CrossEntropyLoss(reduction="none" if per_sample else "mean")
    assert torch.allclose(mixup_loss(z, mixed, built), expected)
    assert torch.allclose(mixed.targets(4).sum(1), torch.ones(9))


def test_mixup_loss_of_other_losses():
    z, y = torch.randn(6, 3, 2), torch.randn(6, 3, 2)
    mixed = mixup(torch.randn(6, 2), y, per_sample=True, generator=seeded())
    lam = mixed.lam.view(-1, 1, 1)
    expected = (lam * (z - mixed.y_a) ** 2 + (1 - lam) * (z - mixed.y_b) ** 2).mean()
    assert torch.allclose(mixup_loss(z, mixed, F.mse_loss), expected)
    with pytest.raises(ValueError, match="per sample"):
        mixup_loss(z, mixed, nn.MSELoss())
    whole = Mixed(mixed.x, y, mixed.y_b, torch.tensor(0.3))
    assert torch.allclose(mixup_loss(z, whole, nn.MSELoss()), 0.3 * F.mse_loss(z, y) + 0.7 * F.mse_loss(z, whole.y_b))


def test_many_models_mix_inside_their_own_batch():
    from companion.nets import MLP
    from companion.training import fit_many, per_model

    def mix(x, y, generator):
        mixed = mixup(x, y, generator=generator)
        return mixed.x, mixed

    x, y = torch.randn(40, 2), torch.arange(40) % 2
    settings = {"loss": mixup_loss, "epochs": 2, "batch_size": 16, "device": "cpu"}
    many = fit_many(lambda: MLP((2, 4, 2)), [0, 1, 2], x, y, batch_transform=per_model(mix), **settings)
    assert many.history.loss.isfinite().all()


@pytest.mark.parametrize("mixer", MIXERS)
def test_bad_input(mixer):
    x, y = torch.randn(4, 1, 4, 4), torch.arange(4)
    for bad_x, bad_y in ((x, y[:3]), (x[:0], y[:0]), (x, torch.tensor(1))):
        with pytest.raises(ValueError, match="expected inputs and targets"):
            mixer(bad_x, bad_y)
    for alpha in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="alpha"):
            mixer(x, y, alpha)
    with pytest.raises(ValueError, match="height"):
        cutmix(torch.randn(4, 4), y)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_seed_is_refused_because_every_batch_would_be_mixed_alike(mixer):
    with pytest.raises(TypeError, match=r"expected generator to be None or a torch\.Generator, .* got int"):
        mixer(torch.rand(6, 1, 8, 8), torch.arange(6), generator=3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool])
def test_soft_labels_of_short_whole_numbers(dtype):
    y = torch.tensor([0, 1], dtype=dtype)
    assert Mixed(torch.zeros(2, 1), y, y.flip(0), torch.tensor(0.75)).targets(2).tolist() == [
        [0.75, 0.25],
        [0.25, 0.75],
    ]


def test_soft_labels_of_soft_labels_are_refused():
    with pytest.raises(TypeError, match="expected labels that are whole numbers, got"):
        mixup(torch.eye(2), torch.eye(2)).targets(2)
