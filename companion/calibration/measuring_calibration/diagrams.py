"""The reliability diagram: what is said against what happens, with how sure one can be of either.

Public: `reliability_curve` and what it returns, `ReliabilityCurve`; `reliability_diagram` draws it.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from companion._style import lent_style
from companion.calibration.measuring_calibration.errors import (
    assign_bins,
    binary_calibration_error,
    check_options,
    confidence_and_outcome,
    ece_noise_floor,
)
from companion.checks import check_generator, check_in_range, check_positive_int

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ReliabilityCurve", "reliability_curve", "reliability_diagram"]


class ReliabilityCurve(NamedTuple):
    """One row per bin that holds a sample, and two numbers for all.

    Attributes:
        left: lower edges (the smallest confidence in the bin, for bins of equal mass).
        right: upper edges.
        count: samples.
        confidence: their mean confidence.
        accuracy: how often they are right.
        low: lower end of the bootstrap interval of the accuracy.
        high: its upper end.
        ece: the l1 calibration error.
        noise: the error to expect from an honest model with these confidences, see `ece_noise_floor`.
    """

    left: Tensor
    right: Tensor
    count: Tensor
    confidence: Tensor
    accuracy: Tensor
    low: Tensor
    high: Tensor
    ece: Tensor
    noise: Tensor


def reliability_curve(
    probs: Any,
    labels: Any,
    n_bins: int = 15,
    strategy: str = "width",
    *,
    level: float = 0.95,
    n_resamples: int = 1000,
    generator: torch.Generator | int | None = 0,
) -> ReliabilityCurve:
    r"""Return confidence and accuracy bin by bin, with a bootstrap interval for each accuracy.

    Samples are redrawn with replacement within each bin, so that the resampled number of right answers is
    $\mathrm{Binomial}(n_b, \mathrm{acc}(b))$: drawn directly, at no cost in n. A bin in which all are right, or none,
    gets an interval of width 0, as the bootstrap has it: read its count.

    Args:
        probs: (n, C) probabilities, judged by their top class, or (n,) confidences of one event.
        labels: (n,) true classes, or (n,) outcomes 0 and 1.
        n_bins: how many bins.
        strategy: "width" or "mass".
        level: how much of the bootstrap distribution the intervals cover, in (0, 1).
        n_resamples: how many resamples.
        generator: a cpu generator or a seed (None: torch's default generator).

    Returns:
        `ReliabilityCurve` of float64 tensors on the cpu, empty bins left out.

    Raises:
        ValueError: not probabilities, labels out of range, or an option out of range.

    >>> curve = reliability_curve([0.15, 0.19, 0.9, 0.9], [0, 1, 1, 1], n_bins=5)
    >>> curve.accuracy.tolist(), curve.count.tolist()
    ([0.5, 1.0], [2, 2])

    Chapter: calibration/measuring-calibration
    """
    n_bins = check_options(n_bins, "l1", strategy)
    level = check_in_range(level, "level", 0, 1, inclusive="neither")
    n_resamples, generator = check_positive_int(n_resamples, "n_resamples"), check_generator(generator)
    p, o = (v.detach().cpu().double() for v in confidence_and_outcome(probs, labels))
    p = p.clamp(max=1)  # what rounding put above
    ece, noise = binary_calibration_error(p, o, n_bins, "l1", strategy), ece_noise_floor(p, n_bins, strategy)
    bins = assign_bins(p, n_bins, strategy)
    zeros = torch.zeros(n_bins, dtype=torch.float64)
    count = torch.bincount(bins, minlength=n_bins)
    full = count > 0
    confidence, accuracy = (zeros.index_add(0, bins, v)[full] / count[full] for v in (p, o))
    if strategy == "width":
        edges = torch.arange(n_bins + 1, dtype=torch.float64) / n_bins
        left, right = edges[:-1], edges[1:]
    else:
        left, right = (zeros.scatter_reduce(0, bins, p, kind, include_self=False) for kind in ("amin", "amax"))
    size = count[full].double().expand(n_resamples, -1)
    drawn = torch.binomial(size.contiguous(), accuracy.expand_as(size).contiguous(), generator=generator) / size
    low, high = drawn.quantile(torch.tensor([0.5 - level / 2, 0.5 + level / 2], dtype=torch.float64), dim=0)
    return ReliabilityCurve(left[full], right[full], count[full], confidence, accuracy, low, high, ece, noise)


def reliability_diagram(
    probs: Any,
    labels: Any,
    n_bins: int = 15,
    strategy: str = "width",
    *,
    level: float = 0.95,
    n_resamples: int = 1000,
    generator: torch.Generator | int | None = 0,
    axes: Any = None,
    title: str | None = None,
    event: str = "accuracy",
) -> "Figure":
    """Draw a reliability diagram: bars, gaps, bootstrap intervals, and beneath them how many samples each bar has.

    A bar is how often the samples of a bin are right; the hatched piece reaches from there to their mean confidence,
    so that a hatched piece above the bar means "too sure". Whiskers are the bootstrap interval of the bar. The corner
    says the l1 calibration error and, as its noise, what an honest model would show with as many samples.

    Args:
        probs: (n, C) probabilities, judged by their top class, or (n,) confidences of one event.
        labels: (n,) true classes, or (n,) outcomes 0 and 1.
        n_bins: how many bins.
        strategy: "width" or "mass".
        level: of the bootstrap intervals.
        n_resamples: of the bootstrap.
        generator: a cpu generator or a seed (None: torch's default generator).
        axes: two matplotlib axes, diagram and histogram; None makes a figure in the style of the book.
        title: above the diagram.
        event: what the bars count, for the label of their axis.

    Returns:
        The figure: `fig.savefig(...)` keeps it, `companion.figures.show(fig, alt=..., caption=...)` shows it.

    Raises:
        ValueError: as `reliability_curve`, or other than two axes.

    >>> fig = reliability_diagram([0.2, 0.4, 0.7, 0.9], [0, 1, 1, 1], n_bins=5)
    >>> len(fig.axes)
    2

    Chapter: calibration/measuring-calibration
    """
    curve = reliability_curve(
        probs, labels, n_bins, strategy, level=level, n_resamples=n_resamples, generator=generator
    )
    with lent_style(use=axes is None) as figures:
        if axes is None:
            ratio = {"height_ratios": [3.2, 1]}
            _, axes = figures.subplots(2, 1, figsize=(4.4, 4.8), sharex=True, gridspec_kw=ratio)
        axes = np.ravel(axes)
        if len(axes) != 2:
            raise ValueError(f"expected two axes, diagram and histogram, got {len(axes)}")
        return _drawn(curve, *axes, title, event, figures.COLORS)


def _drawn(
    curve: ReliabilityCurve, top: Any, bottom: Any, title: str | None, event: str, colors: list[str]
) -> "Figure":
    left, width = curve.left.numpy(), (curve.right - curve.left).clamp(min=0.004).numpy()
    bar = {"align": "edge", "linewidth": 0.6}
    accuracy, gap = curve.accuracy.numpy(), (curve.confidence - curve.accuracy).numpy()
    blue, orange = colors[:2]
    top.bar(left, accuracy, width, color=blue, edgecolor="white", label=event, **bar)
    top.bar(
        left,
        gap,
        width,
        bottom=accuracy,
        color="none",
        edgecolor=orange,
        hatch="////",
        label="to confidence",
        **bar,
    )
    spread = torch.stack([curve.accuracy - curve.low, curve.high - curve.accuracy]).clamp(min=0).numpy()
    top.errorbar(left + width / 2, accuracy, spread, fmt="none", color="#222222", linewidth=1, capsize=2)
    top.plot([0, 1], [0, 1], color="#888888", linewidth=1, linestyle="--")
    top.text(0.03, 0.96, f"ECE {curve.ece:.3f}\nnoise {curve.noise:.3f}", transform=top.transAxes, va="top", fontsize=9)
    top.set(xlim=(0, 1), ylim=(0, 1.02), ylabel=event)
    if title is not None:
        top.set_title(title)
    bottom.bar(left, curve.count.numpy(), width, color="#777777", edgecolor="white", **bar)
    bottom.set(xlim=(0, 1), xlabel="confidence", ylabel="samples")
    return top.figure
