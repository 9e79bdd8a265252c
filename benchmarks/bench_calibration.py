"""Calibration errors and temperature scaling, side by side."""

import numpy as np
import torch
from side_by_side import Comparison, Growth, close

from companion.calibration import CalibrationError, TemperatureScaler, classwise_ece, expected_calibration_error


def draw(n: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities that are too sure of themselves, and labels."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(n, classes, generator=generator)
    labels = (logits / 1.7).softmax(1).multinomial(1, generator=generator).squeeze(1)
    return logits, labels


def ece_by_torchmetrics(probs, labels):
    from torchmetrics.functional.classification import multiclass_calibration_error

    return multiclass_calibration_error(probs, labels, num_classes=probs.shape[1], n_bins=15)


def ece_by_torch_uncertainty(probs, labels):
    from torch_uncertainty.metrics.classification import CalibrationError as Theirs

    metric = Theirs(task="multiclass", num_bins=15, num_classes=probs.shape[1])
    metric.update(probs, labels)
    return metric.compute()


def ece_by_netcal(probs, labels):
    from netcal.metrics import ECE

    return ECE(bins=15).measure(probs, labels)


def ece_by_uncertainty_calibration(probs, labels):
    import calibration  # the name under which that library installs

    return calibration.get_ece(probs, labels, num_bins=15)


def ece(quick: bool) -> Comparison:
    n, classes = (5_000, 10) if quick else (100_000, 100)
    logits, labels = draw(n, classes)
    probs = logits.softmax(1)
    arrays = probs.numpy(), labels.numpy()
    return Comparison(
        f"ECE, 15 bins, {n} x {classes}",
        lambda: expected_calibration_error(probs, labels),
        {
            "torchmetrics": lambda: ece_by_torchmetrics(probs, labels),
            "torch-uncertainty": lambda: ece_by_torch_uncertainty(probs, labels),
            "netcal": lambda: ece_by_netcal(*arrays),
            "uncertainty-calibration": lambda: ece_by_uncertainty_calibration(*arrays),
        },
        close(1e-3),
        3.3,
        limit="three passes at the speed of memory, for the sums, the smallest and the largest, and a search for ties",
    )


def ece_streamed(quick: bool) -> Comparison:
    n, classes = (5_000, 10) if quick else (100_000, 100)
    logits, labels = draw(n, classes)
    batches = list(zip(logits.softmax(1).split(n // 100), labels.split(n // 100)))

    def stream(metric):
        for probs, y in batches:
            metric.update(probs, y)
        return metric.compute()

    def theirs():
        from torchmetrics.classification import MulticlassCalibrationError

        return stream(MulticlassCalibrationError(num_classes=classes, n_bins=15))

    return Comparison(
        f"ECE of a stream, 100 batches of {n // 100} x {classes}",
        lambda: stream(CalibrationError()),
        {"torchmetrics": theirs},
        close(1e-3),
        1.9,
        limit="an update is some forty calls of a few microseconds, to check, to settle ties and to bin",
    )


def loop_in_numpy(p: np.ndarray, y: np.ndarray, n_bins: int = 15) -> float:
    """The class-wise ECE as a loop over classes."""
    total = 0.0
    for c in range(p.shape[1]):
        bins = np.minimum((p[:, c] * n_bins).astype(np.int64), n_bins - 1)
        total += np.abs(np.bincount(bins, p[:, c] - (y == c), n_bins)).sum()
    return total / p.size


def loop_over_netcal(p: np.ndarray, y: np.ndarray) -> float:
    from netcal.metrics import ECE

    return float(np.mean([ECE(bins=15).measure(p[:, c], (y == c).astype(int)) for c in range(p.shape[1])]))


def classwise_by_torch_uncertainty(probs, labels):
    from torch_uncertainty.metrics.classification.calibration.classwise_calibration_error import (
        ClasswiseCalibrationError,
    )

    metric = ClasswiseCalibrationError(num_classes=probs.shape[1], num_bins=15)
    metric.update(probs, labels)
    return metric.compute()


def classwise(quick: bool) -> Comparison:
    n, classes = (5_000, 10) if quick else (100_000, 100)
    logits, labels = draw(n, classes)
    probs = logits.softmax(1)
    arrays = probs.numpy(), labels.numpy()
    return Comparison(
        f"Class-wise ECE, {n} x {classes}",
        lambda: classwise_ece(probs, labels),
        {
            "NumPy loop": lambda: loop_in_numpy(*arrays),
            "netcal loop": lambda: loop_over_netcal(*arrays),
            "torch-uncertainty": lambda: classwise_by_torch_uncertainty(probs, labels),
        },
        close(1e-2),
        4.6,
        limit="half of it is finding, on one core, the few probabilities of ten million that lie above the first bin",
    )


def kernel_error(quick: bool) -> Comparison:
    from companion.calibration import mmce

    n = 1_000 if quick else 10_000
    logits, labels = draw(n, 10)
    probs = logits.softmax(1)
    arrays = probs.numpy(), labels.numpy()

    def theirs():
        from netcal.metrics import MMCE

        return MMCE().measure(*arrays)

    return Comparison(f"MMCE, {n} x 10", lambda: mmce(probs, labels), {"netcal": theirs}, close(1e-2), 440)


def temperature_by_sklearn(logits: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.calibration import _TemperatureScaling

    return float(1 / _TemperatureScaling().fit(logits, labels).beta_)


def temperature_by_netcal(logits: np.ndarray, labels: np.ndarray) -> float:
    from netcal.scaling import TemperatureScaling

    probs = torch.from_numpy(logits).double().softmax(1).numpy()  # on float32 it stays at 1
    fitted = TemperatureScaling().fit(probs, labels)
    return float(1 / np.ravel(fitted.temperature)[0])


def temperature_by_torch_uncertainty(logits: torch.Tensor, labels: torch.Tensor) -> float:
    from torch.utils.data import DataLoader, TensorDataset
    from torch_uncertainty.post_processing import TemperatureScaler as Theirs

    scaler = Theirs(model=torch.nn.Identity())
    scaler.fit(DataLoader(TensorDataset(logits, labels), batch_size=len(labels)), progress=False)
    return float(scaler.temperature[0])


def temperature_by_lbfgs(logits: torch.Tensor, labels: torch.Tensor) -> float:
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


def temperature(quick: bool) -> Comparison:
    n, classes = (2_000, 10) if quick else (50_000, 100)
    logits, labels = draw(n, classes)
    arrays = logits.numpy(), labels.numpy()
    return Comparison(
        f"Temperature scaling, {n} x {classes}",
        lambda: TemperatureScaler().fit(logits, labels).temperature_,
        {
            "netcal": lambda: temperature_by_netcal(*arrays),
            "scikit-learn": lambda: temperature_by_sklearn(*arrays),
            "torch-uncertainty": lambda: temperature_by_torch_uncertainty(logits, labels),
            "LBFGS recipe": lambda: temperature_by_lbfgs(logits, labels),
        },
        close(2e-2),
        8.8,
        {"LBFGS recipe": "stops short of the optimum"},
        limit="half of it is one pass in float64, an exponential of every logit, so that the slope is 0 to rounding",
    )


def _ece_curve(axis: str, sizes: list[int], shape) -> Growth:
    def prepare(size):
        logits, labels = draw(*shape(size))
        probs = logits.softmax(1)
        return lambda: expected_calibration_error(probs, labels)

    return Growth("ECE", axis, sizes, prepare)


def ece_rows(quick: bool) -> Growth:
    return _ece_curve("rows, 10 classes", [10_000] if quick else [10_000, 100_000, 1_000_000], lambda n: (n, 10))


def ece_classes(quick: bool) -> Growth:
    return _ece_curve("classes, 20 000 rows", [10] if quick else [10, 100, 1_000], lambda c: (20_000, c))


COMPARISONS = [ece, ece_streamed, classwise, kernel_error, temperature]
GROWTH = [ece_rows, ece_classes]
ON_CARD: list = []
