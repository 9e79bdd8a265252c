"""Majority against minority accuracy over many models: a line, or a crescent.

Public: `make_spurious_xor`, `accuracy_points`, `curve_fit_report`, and what they return: `SpuriousXor`,
`AccuracyPoints`, `CurveFit`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from companion.checks import check_generator, check_in_range, check_positive_int, check_scores
from companion.nets import MLP
from companion.training import fit_many

__all__ = ["AccuracyPoints", "CurveFit", "SpuriousXor", "accuracy_points", "curve_fit_report", "make_spurious_xor"]


class SpuriousXor(NamedTuple):
    """Inputs (n, 3), labels (n,) and whether the easy cue agrees with the label (n,) bool."""

    x: Tensor
    y: Tensor
    majority: Tensor


class AccuracyPoints(NamedTuple):
    """Accuracy on both groups for every checkpoint and model, (checkpoints, models), and the epochs (checkpoints,)."""

    majority: Tensor
    minority: Tensor
    epochs: Tensor


class CurveFit(NamedTuple):
    """How well a line and a parabola fit minority accuracy on majority accuracy, and how the parabola bends."""

    r2_linear: Tensor
    r2_quadratic: Tensor
    curvature: Tensor
    correlation: Tensor


def make_spurious_xor(
    n: int, rho: float = 0.9, *, noise: float = 0.5, generator: torch.Generator | None = None
) -> SpuriousXor:
    r"""Return a task with a hard cue that is always right and an easy one that is right with probability rho.

    The label is the sign of $u_1 u_2$, u standard normal: no straight line helps. The third input is
    $0.7\,a + \mathrm{noise}\cdot N(0, 1)$ with $a = \pm 1$ equal to the label's sign with probability rho.

    Args:
        n: samples.
        rho: in [0, 1]; 0.5 makes the easy cue worthless.
        noise: on the easy cue.
        generator: a cpu generator; None means torch's default one.

    Returns:
        `SpuriousXor(x, y, majority)`: majority samples are those where the easy cue agrees with the label.

    Raises:
        ValueError: rho outside [0, 1].

    >>> task = make_spurious_xor(1000, rho=1.0)
    >>> bool(task.majority.all())
    True

    Paper: liang2023accuracy
    Chapter: shortcuts/subgroups
    """
    n, rho = check_positive_int(n, "n"), check_in_range(rho, "rho", 0, 1)
    noise, generator = check_in_range(noise, "noise", 0), check_generator(generator)
    u = torch.randn(n, 2, generator=generator)
    sign = torch.where(u[:, 0] * u[:, 1] > 0, 1.0, -1.0)
    majority = torch.rand(n, generator=generator) < rho
    easy = 0.7 * torch.where(majority, sign, -sign) + noise * torch.randn(n, generator=generator)
    return SpuriousXor(torch.cat([u, easy[:, None]], 1), (sign > 0).long(), majority)


def accuracy_points(
    train: SpuriousXor,
    test: SpuriousXor,
    *,
    widths: Sequence[int] = (8, 16, 64),
    lrs: Sequence[float] = (0.02, 0.05, 0.15, 0.5),
    checkpoints: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 125, 250, 500),
    seed: int = 0,
    device: str | torch.device = "auto",
) -> AccuracyPoints:
    """Train a family of small networks and note majority and minority accuracy along the way.

    All learning rates of one width train as one stacked model, by full-batch gradient descent with momentum 0.9.

    Args:
        train: what they learn from.
        test: what they are judged on; use rho 0.5, so that both groups are equally large.
        widths: hidden units of the networks, one hidden layer.
        lrs: learning rates.
        checkpoints: epochs after which accuracy is noted.
        seed: of the initial weights.
        device: see `companion.runtime.device`.

    Returns:
        `AccuracyPoints(majority, minority, epochs)`.

    Raises:
        ValueError: no checkpoints, or a test set without one of the groups.

    >>> make = lambda n, rho: make_spurious_xor(n, rho, generator=torch.Generator().manual_seed(0))
    >>> points = accuracy_points(make(50, 0.9), make(50, 0.5), widths=[4], lrs=[0.1], checkpoints=[1, 3], device="cpu")
    >>> points.majority.shape
    torch.Size([2, 1])

    Paper: liang2023accuracy
    Chapter: shortcuts/subgroups
    """
    if not len(checkpoints):
        raise ValueError("expected at least one checkpoint, got none")
    if bool(test.majority.all()) or not bool(test.majority.any()):
        raise ValueError("expected a test set with both groups, got one only")
    wanted = sorted({check_positive_int(epoch, "checkpoints") for epoch in checkpoints})
    columns = []
    for width in widths:
        rows: list[Tensor] = []

        def note(epoch: int, many: Any, rows: list[Tensor] = rows) -> None:
            if epoch + 1 in wanted:
                right = (many(test.x).argmax(-1).to(test.y.device) == test.y).double()  # (m, n)
                rows.append(torch.stack([right[:, test.majority].mean(1), right[:, ~test.majority].mean(1)]))

        fit_many(
            lambda width=width: MLP((train.x.shape[1], width, 2)),
            [seed + i for i in range(len(lrs))],
            train.x,
            train.y,
            epochs=wanted[-1],
            batch_size=None,
            lr=list(lrs),
            optimizer="sgd",
            callback=note,
            device=device,
            progress=False,
        )
        columns.append(torch.stack(rows))  # (checkpoints, 2, m)
    both = torch.cat(columns, 2)
    return AccuracyPoints(both[:, 0], both[:, 1], torch.tensor(wanted))


def curve_fit_report(majority: Any, minority: Any, *, scale: str = "raw") -> CurveFit:
    r"""Return how far a line and a parabola explain minority accuracy by majority accuracy, over models.

    $R^2 = 1 - \sum (y - \hat y)^2 / \sum (y - \bar y)^2$ of the least-squares fits; the curvature is the coefficient
    of $x^2$, positive for a crescent that opens upwards. On the probit scale a line means what "accuracy on the line"
    claims.

    Args:
        majority: accuracies (m,), any shape, flattened.
        minority: accuracies, the same shape.
        scale: "raw", or "probit", where accuracies of 0 and 1 are refused.

    Returns:
        `CurveFit(r2_linear, r2_quadratic, curvature, correlation)`, float64.

    Raises:
        ValueError: fewer than four points, constant accuracies, an unknown scale, 0 or 1 on the probit scale.

    >>> x = torch.linspace(-1, 1, 21)
    >>> fit = curve_fit_report(0.7 + 0.1 * x, 0.5 + 0.2 * x**2)
    >>> bool(fit.r2_linear < 1e-6), bool(fit.r2_quadratic > 0.999), round(fit.curvature.item())
    (True, True, 20)

    Paper: liang2023accuracy
    Chapter: shortcuts/subgroups
    """
    x = check_scores(torch.as_tensor(majority).flatten(), "majority", 4).detach().double().cpu()
    y = check_scores(torch.as_tensor(minority).flatten(), "minority", 4).detach().double().cpu()
    if len(x) != len(y):
        raise ValueError(f"expected as many minority as majority accuracies, got {len(y)} and {len(x)}")
    if scale not in ("raw", "probit"):
        raise ValueError(f"expected scale 'raw' or 'probit', got {scale!r}")
    if scale == "probit":
        inside = bool(((x > 0) & (x < 1) & (y > 0) & (y < 1)).all())
        if not inside:
            raise ValueError("expected accuracies inside (0, 1) on the probit scale, got 0 or 1")
        x, y = torch.special.ndtri(x), torch.special.ndtri(y)
    if not float(x.std()) > 0 or not float(y.std()) > 0:
        raise ValueError("expected accuracies that differ between models, got constant ones")
    center = float(x.mean())
    shifted = (x - center).numpy()  # shifting does not change the curvature, and the fit is well conditioned
    residual = []
    for degree in (1, 2):
        coefficients = np.polyfit(shifted, y.numpy(), degree)
        residual.append(float(((y.numpy() - np.polyval(coefficients, shifted)) ** 2).sum()))
    total = float((y - y.mean()).square().sum())
    correlation = torch.corrcoef(torch.stack([x, y]))[0, 1]
    return CurveFit(
        x.new_tensor(1 - residual[0] / total),
        x.new_tensor(1 - residual[1] / total),
        x.new_tensor(coefficients[0]),
        correlation,
    )
