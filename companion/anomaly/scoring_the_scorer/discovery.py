"""A regressor judged by the decision it serves: what is found, what it costs, and where the errors sit.

Public: `discovery_report` and what it returns, `DiscoveryReport`; `cumulative_precision`, `rolling_error`;
`make_candidates` and `Candidates`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from companion.checks import as_tensor, check_generator, check_in_range, check_positive_int

__all__ = [
    "Candidates",
    "DiscoveryReport",
    "cumulative_precision",
    "discovery_report",
    "make_candidates",
    "rolling_error",
]


class DiscoveryReport(NamedTuple):
    """Regression errors, the decision they lead to, and the discovery acceleration factor (DAF)."""

    mae: Tensor
    rmse: Tensor
    r2: Tensor
    precision: Tensor
    recall: Tensor
    f1: Tensor
    fpr: Tensor
    prevalence: Tensor
    daf: Tensor


class Candidates(NamedTuple):
    """Features (n, d) and the energy (n,) each candidate really has; at most 0 is stable."""

    x: Tensor
    energy: Tensor


def _check(true: Any, predicted: Any) -> tuple[Tensor, Tensor]:
    true = as_tensor(true, "true").detach()
    predicted = as_tensor(predicted, "predicted", true.device).detach()
    if true.dim() != 1 or true.shape != predicted.shape or len(true) == 0:
        raise ValueError(
            f"expected true and predicted of one shape (n,), got {tuple(true.shape)}, {tuple(predicted.shape)}"
        )
    wide = torch.float32 if true.device.type == "mps" else torch.float64
    true, predicted = true.to(wide), predicted.to(wide)
    if not bool(true.isfinite().all() & predicted.isfinite().all()):
        raise ValueError("expected finite values, got NaN or infinity: leave failed predictions out, and say how many")
    return true, predicted


def discovery_report(true: Any, predicted: Any, threshold: float = 0.0) -> DiscoveryReport:
    r"""Judge predicted energies by the question they answer: is this candidate at or below the threshold?

    $$\mathrm{DAF} = \frac{P(\text{stable} \mid \text{called stable})}{P(\text{stable})}$$

    says how many times more often a candidate that the model picks is stable than one picked blindly; its ceiling is
    one over the prevalence. The prevalence is that of these candidates, never of the training set.

    Args:
        true: what each candidate really has, shape (n,), lower = more stable.
        predicted: what the model says, shape (n,).
        threshold: stable means at most this much.

    Returns:
        `DiscoveryReport(mae, rmse, r2, precision, recall, f1, fpr, prevalence, daf)`. With nothing called stable,
        precision and DAF are NaN, F1 is 0.

    Raises:
        ValueError: shapes that differ, NaN, or candidates of one kind only.

    >>> report = discovery_report([-0.1, 0.1, 0.2, 0.3], [-0.2, -0.1, 0.2, 0.3])
    >>> report.precision.item(), report.daf.item(), round(report.mae.item(), 3)
    (0.5, 2.0, 0.075)

    Paper: riebesell2025matbench
    Chapter: anomaly/scoring-the-scorer
    """
    true, predicted = _check(true, predicted)
    stable, called = true <= threshold, predicted <= threshold
    if bool(stable.all()) or not bool(stable.any()):
        raise ValueError(f"expected candidates on both sides of {threshold}, got {int(stable.sum())} of {len(stable)}")
    hits, wide = (stable & called).sum(), true.dtype
    precision, recall = hits.to(wide) / called.sum(), hits.to(wide) / stable.sum()
    error, prevalence = predicted - true, stable.to(wide).mean()
    return DiscoveryReport(
        mae=error.abs().mean(),
        rmse=error.square().mean().sqrt(),
        r2=1 - error.square().sum() / (true - true.mean()).square().sum(),
        precision=precision,
        recall=recall,
        f1=2 * hits.to(wide) / (called.sum() + stable.sum()),
        fpr=(called & ~stable).sum().to(wide) / (~stable).sum(),
        prevalence=prevalence,
        daf=precision / prevalence,
    )


def cumulative_precision(true: Any, predicted: Any, k: Any, threshold: float = 0.0) -> Tensor:
    """Return the share of stable candidates among the k that the model likes best.

    Divided by the prevalence it is the acceleration of the first k experiments; at k = n that is 1, whatever the
    model. Ties are taken in the order the candidates came.

    Args:
        true: what each candidate really has, shape (n,), lower = more stable.
        predicted: what the model says, shape (n,).
        k: how many experiments you can pay for: a number or several, each from 1 to n.
        threshold: stable means at most this much.

    Raises:
        ValueError: shapes that differ, NaN, or k out of range.

    >>> cumulative_precision([-0.1, 0.1, 0.2, -0.3], [-0.2, -0.1, 0.2, 0.3], [1, 2, 4])
    tensor([1.0000, 0.5000, 0.5000], dtype=torch.float64)

    Paper: riebesell2025matbench
    Chapter: anomaly/scoring-the-scorer
    """
    true, predicted = _check(true, predicted)
    k = as_tensor(k, "k").long().to(true.device)
    if k.numel() == 0 or not bool(((k >= 1) & (k <= len(true))).all()):
        raise ValueError(f"expected k from 1 to {len(true)}, got {k.tolist()}")
    found = (true[predicted.argsort(stable=True)] <= threshold).cumsum(0)
    return found[k - 1].to(true.dtype) / k


def rolling_error(true: Any, predicted: Any, at: Any, window: float = 0.04) -> Tensor:
    r"""Return the mean absolute error of the candidates whose true value lies within half a window of each place.

    Where it is larger than the distance to the threshold, the model cannot be trusted with the decision.

    Args:
        true: what each candidate really has, shape (n,).
        predicted: what the model says, shape (n,).
        at: places, shape (m,).
        window: full width of the window.

    Returns:
        Mean absolute errors, shape (m,); NaN where no candidate is near.

    Raises:
        ValueError: shapes that differ, NaN, a window that is not positive.

    >>> rolling_error([0.0, 0.01, 1.0], [0.1, 0.11, 1.5], at=[0.0, 1.0])
    tensor([0.1000, 0.5000], dtype=torch.float64)

    Paper: riebesell2025matbench
    Chapter: anomaly/scoring-the-scorer
    """
    true, predicted = _check(true, predicted)
    half = check_in_range(window, "window", low=0, inclusive="neither") / 2
    at = as_tensor(at, "at").to(true)
    ordered, place = true.sort()
    error = torch.cat([true.new_zeros(1), (predicted - true).abs()[place].cumsum(0)])
    first, last = torch.searchsorted(ordered, at - half), torch.searchsorted(ordered, at + half, right=True)
    return (error[last] - error[first]) / (last - first)


def make_candidates(
    n: int,
    dim: int = 8,
    *,
    stable: float = 0.15,
    shift: float = 0.0,
    generator: torch.Generator | int | None = None,
) -> Candidates:
    """Draw candidates whose energy above the hull is a known function of their features.

    Most lie just above zero and a few far above, as crystals do: a rugged landscape near the hull, and a steep wall
    that dwarfs it. The landscape is the same in every call.

    Args:
        n: how many.
        dim: d, at least 4.
        stable: about which share has an energy of at most 0, in (0, 1).
        shift: moves the features by so much: candidates from elsewhere.
        generator: draws the features (None: torch's default generator).

    Returns:
        `Candidates(x, energy)`, float32.

    Raises:
        ValueError: out of range.

    >>> x, energy = make_candidates(1000, generator=0)
    >>> x.shape, bool(0.1 < (energy <= 0).float().mean() < 0.2)
    (torch.Size([1000, 8]), True)

    Paper: riebesell2025matbench
    Chapter: anomaly/scoring-the-scorer
    """
    n, dim = check_positive_int(n, "n"), check_positive_int(dim, "dim", minimum=4)
    stable = check_in_range(stable, "stable", 0, 1, inclusive="neither")
    x = torch.randn(n, dim, generator=check_generator(generator)) + check_in_range(shift, "shift")
    reference = torch.randn(20_000, dim, generator=torch.Generator().manual_seed(0))
    zero = torch.quantile(_landscape(reference), stable)
    return Candidates(x, _landscape(x) - zero)


def _landscape(x: Tensor) -> Tensor:
    near = 0.05 * ((1.5 * x[:, 0]).sin() + (1.5 * x[:, 1]).cos() + x[:, 2] * x[:, 3].tanh())
    return near + 0.25 * x[:, -1].relu().square()
