"""Many small networks trained as one (`fit_many`) and one after the other (`fit`), side by side."""

from itertools import pairwise

import torch
from side_by_side import Comparison, OnCard, close

from companion.nets import MLP, SmallCNN
from companion.training import fit, fit_many

SEEDS = list(range(8))


def _both(name: str, make, x, y, **settings) -> Comparison:
    def one_by_one():
        losses = []
        for seed in SEEDS:
            generator = torch.Generator().manual_seed(seed)
            losses.append(fit(make(seed), x, y, generator=generator, device="cpu", **settings).loss[-1])
        return losses

    return Comparison(
        name,
        lambda: fit_many(make, SEEDS, x, y, device="cpu", **settings).history.loss[-1],
        {"one after the other": one_by_one},
        close(5e-2),
    )


def small_mlps(quick: bool) -> Comparison:
    x = torch.randn(2_000, 2, generator=torch.Generator().manual_seed(0))
    y = (x.norm(dim=1) > 1).long()
    return _both(
        "8 networks 2-32-32-2, batches of 64",
        lambda seed: MLP((2, 32, 32, 2), seed=seed),
        x,
        y,
        epochs=2 if quick else 10,
        batch_size=64,
    )


def larger_mlps(quick: bool) -> Comparison:
    x = torch.randn(2_000, 20, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] * x[:, 1] > 0).long()
    return _both(
        "8 networks 20-64-64-10, batches of 128",
        lambda seed: MLP((20, 64, 64, 10), seed=seed),
        x,
        y,
        epochs=2 if quick else 10,
        batch_size=128,
    )


def small_cnns(quick: bool) -> Comparison:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(1_000, 1, 8, 8, generator=generator), torch.randint(10, (1_000,), generator=generator)
    return _both(
        "8 convolutional networks of width 8 on 8 x 8, batches of 64",
        lambda seed: SmallCNN(1, 10, width=8, seed=seed),
        x,
        y,
        epochs=1 if quick else 3,
        batch_size=64,
    )


def many_networks() -> OnCard:
    count, n, dims, epochs = 256, 4_096, (64, 256, 256, 10), 10

    def prepare():
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(n, dims[0], generator=generator), torch.randint(10, (n,), generator=generator)
        return lambda: fit_many(
            lambda seed: MLP(dims, seed=seed), list(range(count)), x, y, epochs=epochs, batch_size=256, device="cuda"
        )

    weights = sum(a * b for a, b in pairwise(dims))
    return OnCard(f"fit_many, {count} networks {'-'.join(map(str, dims))}", prepare, 6.0 * weights * n * epochs * count)


COMPARISONS = [small_mlps, larger_mlps, small_cnns]
GROWTH: list = []
ON_CARD = [many_networks]
