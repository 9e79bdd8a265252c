"""Mixup of a batch of images: fresh, into `out=` and in place, next to timm's in-place recipe: milliseconds, medians.

Run: python benchmarks/bench_mixing.py
timm itself is not needed: `flip_and_add` is what its `Mixup._mix_batch` does.
"""

import statistics
import time

import torch

from companion.mixing import mixup


def flip_and_add(x, lam=0.7):
    flipped = x.flip(0).mul_(1 - lam)
    return x.mul_(lam).add_(flipped)


if __name__ == "__main__":
    torch.set_num_threads(1)
    x, y = torch.rand(256, 3, 224, 224), torch.arange(256)
    out, g = torch.empty_like(x), torch.Generator().manual_seed(0)
    runs = {
        "timm's recipe, in place": lambda: flip_and_add(x),
        "mixup, fresh": lambda: mixup(x, y, generator=g),
        "mixup, out=": lambda: mixup(x, y, generator=g, out=out),
        "mixup, out=, per_sample": lambda: mixup(x, y, generator=g, out=out, per_sample=True),
        "mixup, in place": lambda: mixup(x, y, generator=g, out=x),
    }
    times = {name: [] for name in runs}
    for _ in range(9):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    for name, values in times.items():
        print(f"{name:26s} {statistics.median(values):7.1f} ms")
