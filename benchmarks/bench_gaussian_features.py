"""Gaussians on features next to scikit-learn: milliseconds, medians.

Run: python benchmarks/bench_gaussian_features.py
Class Gaussians with one covariance, fitted on 50k x 512 with 100 classes and scored on 10k; one Gaussian on 50k x 512,
fitted and scored. The runs are interleaved, so that a busy machine slows all of them alike.
"""

import statistics
import time

import numpy as np
import torch
from sklearn.covariance import EmpiricalCovariance, LedoitWolf

from companion.anomaly import MahalanobisOOD, MVGDetector

REPEATS = 5


def sklearn_classes(x, y, new):
    """Class means by a loop, scikit-learn's covariance of what is left, one product per class for the distances."""
    means = np.stack([x[y == c].mean(0) for c in range(100)])
    precision = EmpiricalCovariance(assume_centered=True).fit(x - means[y]).precision_.astype(np.float32)
    half = new @ precision
    cross = half @ means.T
    own = np.einsum("cd,cd->c", means @ precision, means)
    return ((half * new).sum(1, keepdims=True) - 2 * cross + own).min(1)


def sklearn_one(x):
    """scikit-learn's Ledoit-Wolf and its Mahalanobis distance, a row at a time inside."""
    return LedoitWolf().fit(x).mahalanobis(x)


def medians(runs):
    times = {name: [] for name in runs}
    for _ in range(REPEATS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    print(f"{torch.get_num_threads()} thread(s)")
    y = torch.randint(100, (50_000,), generator=generator)
    x = torch.randn(100, 512, generator=generator)[y] + torch.randn(50_000, 512, generator=generator)
    new = x[:10_000] + 0.5
    arrays = x.numpy(), y.numpy(), new.numpy()
    classes = {
        "MahalanobisOOD": lambda: MahalanobisOOD(shrinkage=0.0).fit(x, y).ood_score(new),
        "scikit-learn + gemm": lambda: sklearn_classes(*arrays),
    }
    one = {
        "MVGDetector": lambda: MVGDetector().fit(x).score_samples(x),
        "MVGDetector, empirical": lambda: MVGDetector("empirical").fit(x).score_samples(x),
        "scikit-learn": lambda: sklearn_one(x.numpy()),
    }
    for title, runs in (
        ("100 classes: fit 50k x 512, score 10k", classes),
        ("one Gaussian: fit and score 50k x 512", one),
    ):
        print(title)
        for name, ms in medians(runs).items():
            print(f"  {name:24s} {ms:8.1f} ms   first score {float(runs[name]()[0]):+.4f}")
