"""Eight small networks trained one after the other (`fit`), and as one (`fit_many`): seconds, interleaved medians.

Run: python benchmarks/bench_training.py
"""

import statistics
import time

import torch

from companion.nets import MLP, SmallCNN
from companion.training import fit, fit_many

SEEDS = list(range(8))


def compare(name, make, x, y, repeats=5, **settings):
    def loop():
        models = [make(seed) for seed in SEEDS]
        for seed, model in zip(SEEDS, models):
            fit(model, x, y, generator=torch.Generator().manual_seed(seed), **settings)
        return models

    def stacked():
        return fit_many(make, SEEDS, x, y, **settings)

    seconds = {loop: [], stacked: []}
    for _ in range(repeats):
        for run, times in seconds.items():
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    one, many = (statistics.median(times) for times in seconds.values())
    print(f"{name:44s} loop {one:6.2f} s   stacked {many:6.2f} s   factor {one / many:4.1f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    order = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 2, generator=order)
    y = (x.norm(dim=1) > 1).long()
    for optimizer in ("adam", "sgd"):
        compare(
            f"8 MLPs 2-32-32-2, batches of 64, {optimizer}",
            lambda seed: MLP((2, 32, 32, 2), seed=seed),
            x,
            y,
            epochs=10,
            batch_size=64,
            optimizer=optimizer,
            device="cpu",
        )
    x = torch.randn(2000, 20, generator=order)
    y = (x[:, 0] * x[:, 1] > 0).long()
    compare(
        "8 MLPs 20-64-64-10, batches of 128, adam",
        lambda seed: MLP((20, 64, 64, 10), seed=seed),
        x,
        y,
        epochs=10,
        batch_size=128,
        device="cpu",
    )
    x, y = torch.randn(1000, 1, 8, 8, generator=order), torch.randint(10, (1000,), generator=order)
    compare(
        "8 CNNs of width 8 on 8 x 8, batches of 64",
        lambda seed: SmallCNN(1, 10, width=8, seed=seed),
        x,
        y,
        repeats=3,
        epochs=3,
        batch_size=64,
        device="cpu",
    )
