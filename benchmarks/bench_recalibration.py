"""Temperature scaling, and two calibration errors, next to scikit-learn and torchmetrics: milliseconds, medians.

Run: python benchmarks/bench_recalibration.py
The runs are interleaved, so that a busy machine slows all of them alike. The slope says who has arrived: it is the
derivative of the mean log-loss in log T where each method stopped, 0 at the optimum.
"""

import statistics
import time

import torch
from sklearn.calibration import _TemperatureScaling
from torchmetrics.functional.classification import multiclass_calibration_error

from companion.calibration import TemperatureScaler, classwise_ece, expected_calibration_error, nll_slope

REPEATS = 7


def by_lbfgs(logits, labels):
    """The common recipe: fifty steps of LBFGS on the temperature itself."""
    temperature = torch.ones((), requires_grad=True)
    optimizer = torch.optim.LBFGS([temperature], lr=0.01, max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits / temperature, labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return temperature.item()


def one_mask_per_class(probs, labels, n_bins=15):
    """The class-wise ECE as a loop over classes in NumPy."""
    p, y = probs.numpy(), labels.numpy()
    total = 0.0
    for c in range(p.shape[1]):
        bins = (p[:, c] * n_bins).astype(int).clip(max=n_bins - 1)
        total += abs(torch.bincount(torch.from_numpy(bins), torch.from_numpy(p[:, c] - (y == c)), n_bins)).sum().item()
    return total / p.size


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
    logits = 3 * torch.randn(50_000, 100, generator=generator)
    labels = (logits / 1.7).softmax(1).multinomial(1, generator=generator).squeeze(1)
    arrays = logits.numpy(), labels.numpy()
    fits = {
        "TemperatureScaler": lambda: TemperatureScaler().fit(logits, labels).temperature_,
        "scikit-learn": lambda: 1 / _TemperatureScaling().fit(*arrays).beta_,
        "LBFGS recipe": lambda: by_lbfgs(logits, labels),
    }
    print("temperature, 50k x 100")
    for name, ms in medians(fits).items():
        T = float(fits[name]())
        print(f"  {name:24s} {ms:8.1f} ms   T = {T:.6f}   slope {nll_slope(logits, labels, T):+.1e}")
    probs = (3 * torch.randn(100_000, 100, generator=generator)).softmax(1)
    labels = probs.multinomial(1, generator=generator).squeeze(1)
    errors = {
        "expected_calibration_error": lambda: expected_calibration_error(probs, labels),
        "torchmetrics": lambda: multiclass_calibration_error(probs, labels, num_classes=100),
        "classwise_ece": lambda: classwise_ece(probs, labels),
        "class-wise, NumPy loop": lambda: one_mask_per_class(probs, labels),
    }
    print("calibration errors, 100k x 100, 15 bins")
    for name, ms in medians(errors).items():
        print(f"  {name:28s} {ms:8.1f} ms   {float(errors[name]()):.6f}")
