"""How sure a share is: intervals for one, for the difference of two, and for many tests at once.

Public: `wilson_interval`, `newcombe_interval`, `benjamini_hochberg`.
"""

from typing import Any

import torch
from torch import Tensor

from companion.checks import as_tensor, check_in_range

__all__ = ["benjamini_hochberg", "newcombe_interval", "wilson_interval"]


def _float(x: Any, name: str) -> Tensor:
    x = as_tensor(x, name)
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def _counts(successes: Any, counts: Any) -> tuple[Tensor, Tensor]:
    k, n = _float(successes, "successes"), _float(counts, "counts")
    if k.shape != n.shape:
        raise ValueError(f"expected one count per success, got shapes {tuple(k.shape)} and {tuple(n.shape)}")
    if not bool(((k >= 0) & (k <= n) & torch.isfinite(n)).all()):
        raise ValueError("expected 0 <= successes <= counts, got a pair outside")
    return k, n


def wilson_interval(successes: Any, counts: Any, level: float = 0.95) -> tuple[Tensor, Tensor]:
    r"""Return Wilson's interval of a share, which stays honest for a handful of samples.

    $$\frac{\hat p + z^2/2n \pm z\sqrt{\hat p(1-\hat p)/n + z^2/4n^2}}{1 + z^2/n}, \qquad \hat p = k / n$$

    Unlike $\hat p \pm z\,\mathrm{se}$ it never leaves [0, 1] and has a width when all or none succeed. Without samples
    it is [0, 1]: nothing is known.

    Args:
        successes: k, any shape.
        counts: n, the same shape.
        level: how often such intervals should cover the truth.

    Returns:
        (low, high), float64, in the shape of the counts.

    Raises:
        ValueError: more successes than samples, shapes that differ, a level outside (0, 1).

    >>> low, high = wilson_interval([0, 1, 50], [0, 1, 100])
    >>> low.round(decimals=2).tolist(), high.round(decimals=2).tolist()
    ([0.0, 0.21, 0.4], [1.0, 1.0, 0.6])

    Chapter: shortcuts/subgroups
    """
    k, n = _counts(successes, counts)
    level = check_in_range(level, "level", 0, 1, inclusive="neither")
    z = torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=k.dtype, device=k.device))
    center = (k + z**2 / 2) / (n + z**2)
    # k (n - k) / n is 0 where there are no samples, whatever the division says
    spread = torch.where(n > 0, k * (n - k) / n.clamp_min(1), 0)
    half = z * (spread + z**2 / 4).sqrt() / (n + z**2)
    low, high = (center - half).clamp(0, 1), (center + half).clamp(0, 1)
    return torch.where(k == 0, 0.0, low), torch.where(k == n, 1.0, high)


def newcombe_interval(
    successes_a: Any, counts_a: Any, successes_b: Any, counts_b: Any, level: float = 0.95
) -> tuple[Tensor, Tensor]:
    r"""Return Newcombe's interval for the difference of two shares, built from the Wilson interval of each.

    $$\big[d - \sqrt{(p_a - l_a)^2 + (u_b - p_b)^2},\; d + \sqrt{(u_a - p_a)^2 + (p_b - l_b)^2}\big],
    \qquad d = p_a - p_b$$

    Args:
        successes_a: successes of the first share, any shape.
        counts_a: its samples.
        successes_b: successes of the second share.
        counts_b: its samples.
        level: how often such intervals should cover the truth.

    Returns:
        (low, high), float64; [-1, 1] where either share has no samples.

    Raises:
        ValueError: as `wilson_interval`.

    >>> low, high = newcombe_interval(56, 70, 48, 80)
    >>> round(low.item(), 4), round(high.item(), 4)
    (0.0524, 0.3339)

    Chapter: shortcuts/subgroups
    """
    (ka, na), (kb, nb) = _counts(successes_a, counts_a), _counts(successes_b, counts_b)
    pa, pb = ka / na.clamp_min(1), kb / nb.clamp_min(1)
    (la, ua), (lb, ub) = wilson_interval(ka, na, level), wilson_interval(kb, nb, level)
    low = pa - pb - ((pa - la).square() + (ub - pb).square()).sqrt()
    high = pa - pb + ((ua - pa).square() + (pb - lb).square()).sqrt()
    known = (na > 0) & (nb > 0)
    return torch.where(known, low.clamp_min(-1), -1.0), torch.where(known, high.clamp_max(1), 1.0)


def benjamini_hochberg(p_values: Any, rate: float = 0.05) -> Tensor:
    r"""Return which of many tests to flag so that about the share `rate` of the flags is false.

    With sorted $p_{(1)} \le \dots \le p_{(m)}$, flag the smallest $i$ of them, $i$ being the largest with
    $p_{(i)} \le \mathrm{rate}\, i / m$. When there is nothing to find, any flag at all appears in about the share
    `rate` of the runs, however many tests there are.

    Args:
        p_values: one per test, in [0, 1]; NaN where there was nothing to test, which is never flagged nor counted.
        rate: the false discovery rate to allow.

    Returns:
        bool, in the shape of the p-values.

    Raises:
        ValueError: p-values outside [0, 1], a rate outside (0, 1).

    >>> benjamini_hochberg([0.01, 0.02, 0.04, 0.5, float("nan")])
    tensor([ True,  True, False, False, False])

    Paper: gustafson2023facet
    Chapter: shortcuts/subgroups
    """
    p = _float(p_values, "p_values")
    rate = check_in_range(rate, "rate", 0, 1, inclusive="neither")
    tested = ~torch.isnan(p)
    flat, order = p[tested].sort()
    if len(flat) and not (flat[0] >= 0 and flat[-1] <= 1):
        raise ValueError(f"expected p_values in [0, 1], got {flat[0].item():g} to {flat[-1].item():g}")
    m = len(flat)
    passed = (flat <= rate * torch.arange(1, m + 1, device=p.device) / max(m, 1)).nonzero()
    n_flagged = int(passed[-1]) + 1 if len(passed) else 0
    flags = torch.zeros(m, dtype=torch.bool, device=p.device)
    flags[order[:n_flagged]] = True
    return torch.zeros_like(tested).masked_scatter(tested, flags)
