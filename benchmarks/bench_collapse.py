"""The measures of neural collapse, side by side."""

import numpy as np
import torch
from side_by_side import Comparison, Growth, OnCard, close

from companion.collapse import NeuralCollapse, neural_collapse


def draw(n: int, d: int, classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    weight = torch.randn(classes, d, generator=generator)
    return torch.randn(n, d, generator=generator) + weight[labels], labels, weight


def recipe_in_numpy(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> list[float]:
    """nc1 with a pseudo-inverse, and nc4, as most published code has them."""
    classes, d = w.shape
    means = np.stack([x[y == c].mean(0) for c in range(classes)])
    centred = means - means.mean(0)
    within = np.zeros((d, d), dtype=np.float64)
    for c in range(classes):
        rest = (x[y == c] - means[c]).astype(np.float64)
        within += rest.T @ rest
    between = (centred.T @ centred).astype(np.float64) / classes
    nc1 = np.trace(within / len(x) @ np.linalg.pinv(between, rcond=1e-6)) / classes
    distances = (means**2).sum(1) - 2 * x @ means.T
    nc4 = np.mean((x @ w.T).argmax(1) != distances.argmin(1))
    return [float(nc1), float(nc4)]


def by_rhubarbwu(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> list[float]:
    from neural_collapse.accumulate import CovarAccumulator, DecAccumulator, MeanAccumulator
    from neural_collapse.measure import clf_ncc_agreement, covariance_pinv

    shape = (*w.shape, "cpu")
    accumulator = MeanAccumulator(*shape)
    accumulator.accumulate(x, y)
    means, mean = accumulator.compute()
    within = CovarAccumulator(*shape, M=means)
    within.accumulate(x, y, means)
    decisions = DecAccumulator(*shape, M=means, W=w)
    decisions.accumulate(x, y, w, means)
    nc1 = covariance_pinv(means, within.compute(), mean)
    return [float(nc1), 1 - float(clf_ncc_agreement(decisions))]


def measures(quick: bool) -> Comparison:
    n, d, classes = (5_000, 64, 10) if quick else (50_000, 512, 100)
    x, y, w = draw(n, d, classes)
    arrays = x.numpy(), y.numpy(), w.numpy()

    def ours():
        found = neural_collapse(x, y, w)
        return [float(found["nc1"]), float(found["nc4"])]

    return Comparison(
        f"NC1 to NC4, {n} x {d}, {classes} classes",
        ours,
        {
            "neural-collapse (rhubarbwu)": lambda: by_rhubarbwu(x, y, w),
            "NumPy recipe": lambda: recipe_in_numpy(*arrays),
        },
        close(1e-2, 1e-3),
        1.5,
    )


def _curve(axis: str, sizes: list[int], shape) -> Growth:
    def prepare(size):
        x, y, w = draw(*shape(size))
        return lambda: neural_collapse(x, y, w)

    return Growth("NC1 to NC4", axis, sizes, prepare)


def measures_rows(quick: bool) -> Growth:
    return _curve(
        "rows, 256 columns, 10 classes", [1_000] if quick else [5_000, 20_000, 80_000], lambda n: (n, 256, 10)
    )


def measures_columns(quick: bool) -> Growth:
    return _curve("columns, 10 000 rows, 10 classes", [64] if quick else [64, 256, 1_024], lambda d: (10_000, d, 10))


def measures_classes(quick: bool) -> Growth:
    return _curve("classes, 10 000 rows, 256 columns", [10] if quick else [10, 100, 1_000], lambda c: (10_000, 256, c))


def imagenet_stream() -> OnCard:
    n, d, classes, batch = 1_281_167, 2_048, 1_000, 16_384

    def prepare():
        x = torch.randn(batch, d, device="cuda")
        y = torch.arange(batch, device="cuda") % classes

        def run():
            metric = NeuralCollapse(classes, d).to("cuda")
            for start in range(0, n, batch):
                rows = min(batch, n - start)
                metric.update(x[:rows], y[:rows])
            return metric.compute()

        return run

    return OnCard(f"NC1 and NC2 of a stream, {n} x {d}, {classes} classes", prepare, flops=2.0 * n * d * d)


COMPARISONS = [measures]
GROWTH = [measures_rows, measures_columns, measures_classes]
ON_CARD = [imagenet_stream]
