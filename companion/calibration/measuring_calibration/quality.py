"""Judging image quality: what a ranking sees and an error sees, on photographs spoilt to a known degree.

Public: `degrade`, `make_quality_set` and `QualitySet`, `quality_features`; `IQAMetrics`, `LogisticMap`,
`rank_aggregate`, `count_macs`; `read_opinion_scores` for a table of your own.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import optimize, stats
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from companion.checks import as_tensor, check_generator, check_positive_int, check_same_length, check_scores
from companion.data import photo_crops
from companion.layers import read_layers

__all__ = [
    "IQAMetrics",
    "LogisticMap",
    "OpinionScores",
    "QualitySet",
    "count_macs",
    "degrade",
    "make_quality_set",
    "quality_features",
    "rank_aggregate",
    "read_opinion_scores",
]


class QualitySet(NamedTuple):
    """Images with known quality.

    Attributes:
        images: (n, 3, size, size) in [0, 1].
        quality: (n,) the true mean score, between 1 and 5.
        spread: (n,) how much raters disagree: the standard deviation of a single rating.
        rated: (n,) the mean of a few ratings, what one would observe.
    """

    images: Tensor
    quality: Tensor
    spread: Tensor
    rated: Tensor


def _check_images(images: Any) -> Tensor:
    images = as_tensor(images, "images")
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(f"expected float images (n, c, h, w), got {images.dtype} of shape {tuple(images.shape)}")
    return images


def degrade(
    images: Tensor,
    blur: Any = 0.0,
    noise: Any = 0.0,
    blocks: Any = 0.0,
    *,
    generator: torch.Generator | int | None = None,
) -> Tensor:
    """Spoil images by blur, noise and the coarse 8 x 8 cosine blocks of strong compression, each to its own degree.

    Args:
        images: (n, c, h, w) in [0, 1]; h and w divisible by 8 where blocks are asked for.
        blur: standard deviation of a Gaussian in pixels, a number or (n,).
        noise: standard deviation of white noise, a number or (n,).
        blocks: step by which the cosine coefficients are rounded, a number or (n,); 0 leaves them.
        generator: a cpu generator for the noise, or a seed (None: torch's default generator).

    Returns:
        Images of the same shape, clamped to [0, 1].

    Raises:
        ValueError: not images, negative degrees, sides that are not divisible by 8.

    >>> flat = torch.full((1, 1, 16, 16), 0.5)
    >>> torch.allclose(degrade(flat, blur=2.0), flat, atol=1e-6)
    True

    Paper: hosu2024aim

    Chapter: calibration/measuring-calibration
    """
    images = _check_images(images)
    n, _, height, width = images.shape
    degrees = {}
    for name, value in (("blur", blur), ("noise", noise), ("blocks", blocks)):
        degree = as_tensor(value, name).to(images).expand(n)
        if degree.min() < 0:
            raise ValueError(f"expected {name} of at least 0, got {degree.min().item():.4g}")
        degrees[name] = degree
    out = images
    if degrees["blur"].max() > 0:
        # a Gaussian is a product in the frequencies; reflecting the image keeps its borders from mixing
        padded = F.pad(out, (8, 8, 8, 8), mode="reflect")
        fy, fx = (torch.fft.fftfreq(padded.shape[d], device=images.device).to(images) for d in (2, 3))
        fx = fx[: padded.shape[3] // 2 + 1]
        square = fy[:, None].square() + fx[None].square()
        gain = (-2 * math.pi**2 * degrees["blur"].square()[:, None, None, None] * square).exp()
        out = torch.fft.irfft2(torch.fft.rfft2(padded) * gain, s=padded.shape[2:])[..., 8:-8, 8:-8]
    if degrees["noise"].max() > 0:
        white = torch.randn(images.shape, generator=check_generator(generator)).to(images)
        out = out + degrees["noise"][:, None, None, None] * white
    if degrees["blocks"].max() > 0:
        if height % 8 or width % 8:
            raise ValueError(f"expected sides divisible by 8 for blocks, got {height} x {width}")
        out = _compressed(out, degrees["blocks"])
    return out.clamp(0, 1)


def _cosines(k: int, like: Tensor) -> Tensor:
    t = torch.arange(k, dtype=torch.float64)
    basis = torch.cos(math.pi / k * (t[None] + 0.5) * t[:, None]) * math.sqrt(2 / k)
    basis[0] /= math.sqrt(2)
    return basis.to(like)


def _compressed(images: Tensor, step: Tensor) -> Tensor:
    n, c, h, w = images.shape
    basis = _cosines(8, images)
    tiles = images.reshape(n, c, h // 8, 8, w // 8, 8).transpose(3, 4)  # (n, c, h/8, w/8, 8, 8)
    coefficients = basis @ tiles @ basis.T
    step = step[:, None, None, None, None, None]
    rounded = torch.where(step > 0, (coefficients / step.clamp(min=1e-6)).round() * step, coefficients)
    rounded[..., 0, 0] = coefficients[..., 0, 0]  # the mean of a block stays
    return (basis.T @ rounded @ basis).transpose(3, 4).reshape(n, c, h, w)


def make_quality_set(
    n: int, size: int = 32, raters: int = 8, generator: torch.Generator | int | None = None
) -> QualitySet:
    r"""Cut squares out of two photographs, spoil each by one of three means, and let raters score them.

    With a severity $s \in [0, 1]$ the quality is $5 - 4 s^{0.8}$; raters scatter around it by
    $0.25 + 0.5 \cdot 4 s (1 - s)$: they agree on what is very good or very bad. Their scores are made up, not human.

    Args:
        n: images.
        size: their side, divisible by 8 and at most 424.
        raters: ratings per image.
        generator: a cpu generator or a seed (None: torch's default generator).

    Returns:
        `QualitySet(images, quality, spread, rated)`.

    Raises:
        ValueError: n, size or raters out of range.

    >>> make_quality_set(6, generator=0).images.shape
    torch.Size([6, 3, 32, 32])

    Paper: you2025teaching

    Paper: hosu2024aim

    Chapter: calibration/measuring-calibration
    """
    n, size = check_positive_int(n, "n"), check_positive_int(size, "size", minimum=16)
    raters, generator = check_positive_int(raters, "raters"), check_generator(generator)
    crops, _ = photo_crops(n, size, generator)
    severity, kind = torch.rand(n, generator=generator), torch.randint(3, (n,), generator=generator)
    degree = [torch.where(kind == k, severity, 0.0) for k in range(3)]
    images = degrade(crops, 2.5 * degree[0], 0.2 * degree[1], 1.2 * degree[2], generator=generator)
    quality = 5 - 4 * severity**0.8
    spread = 0.25 + 2 * severity * (1 - severity)
    rated = quality + spread / math.sqrt(raters) * torch.randn(n, generator=generator)
    return QualitySet(images, quality, spread, rated.clamp(1, 5))


def quality_features(images: Any) -> Tensor:
    """Return 22 numbers per image that change when it is spoilt: contrast, gradients, frequencies, block edges.

    Args:
        images: (n, c, h, w) in [0, 1], at least 16 pixels wide and high, sides divisible by 8.

    Returns:
        (n, 22) features.

    Raises:
        ValueError: not images, too small, or sides not divisible by 8.

    >>> quality_features(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 22])

    Paper: hosu2024aim

    Chapter: calibration/measuring-calibration
    """
    gray = _check_images(images).mean(1)  # (n, h, w)
    n, h, w = gray.shape
    if min(h, w) < 16 or h % 8 or w % 8:
        raise ValueError(f"expected sides of at least 16 pixels, divisible by 8, got {h} x {w}")
    dx, dy = gray.diff(dim=2), gray.diff(dim=1)
    lap = F.conv2d(gray[:, None], gray.new_tensor([[[[0, 1, 0], [1, -4, 1], [0, 1, 0]]]])).flatten(1)
    rows: list[Tensor] = [gray.flatten(1).std(1), gray.flatten(1).mean(1)]
    for values in (dx.flatten(1), dy.flatten(1), lap):
        magnitude = values.abs()
        rms = values.square().mean(1).sqrt()
        rows += [rms.clamp(min=1e-5).log(), (magnitude.mean(1) + 1e-5) / (rms + 1e-5), magnitude.median(1).values]
    # the share of still pixels, and the jumps at block edges against those elsewhere
    rows.append((dx.abs() < 2e-3).flatten(1).float().mean(1))
    for d, dim in ((dx, 2), (dy, 1)):
        at = torch.arange(d.shape[dim], device=gray.device) % 8 == 7
        edge, inner = (d.abs().index_select(dim, m.nonzero().squeeze(1)).flatten(1).mean(1) for m in (at, ~at))
        rows.append(((edge + 1e-4) / (inner + 1e-4)).log())
    basis = _cosines(8, gray)
    tiles = basis @ gray.reshape(n, h // 8, 8, w // 8, 8).transpose(2, 3) @ basis.T
    energy = tiles.square().mean((1, 2))  # (n, 8, 8)
    radius = torch.arange(8, device=gray.device)[:, None] + torch.arange(8, device=gray.device)
    for low, high in ((1, 2), (2, 4), (4, 6), (6, 8), (8, 11), (11, 15)):
        rows.append((energy[:, (radius >= low) & (radius < high)].mean(1) + 1e-7).log())
    flat = tiles[..., 1:, 1:].abs().flatten(1)
    rows += [(flat < 5e-3).float().mean(1), flat.median(1).values]
    return torch.stack(rows, dim=1)


class IQAMetrics(Metric):
    r"""The five numbers by which quality predictors are compared: three see the order, two see the values.

    SRCC and KRCC (Spearman's and Kendall's rank correlation, ties by midrank and tau-b) do not change under any
    strictly increasing map of the predictions; PLCC (Pearson's) does not change under a straight one; MAE and RMSE are
    errors in units of the score. Compute keeps all scores seen, in the order of processes and batches.

    Args:
        **kwargs: for `torchmetrics.Metric`.

    Raises:
        ValueError: NaN, lengths that differ; `compute` with fewer than two samples or with constant scores.

    >>> metrics = IQAMetrics()
    >>> metrics.update([1.0, 2.0, 3.0, 9.0], [1.0, 2.0, 3.0, 4.0])
    >>> {name: round(value.item(), 2) for name, value in metrics.compute().items()}
    {'SRCC': 1.0, 'PLCC': 0.9, 'KRCC': 1.0, 'MAE': 1.25, 'RMSE': 2.5}

    Paper: hosu2024aim

    Chapter: calibration/measuring-calibration
    """

    is_differentiable = False
    full_state_update = False
    predicted: list[Tensor]
    target: list[Tensor]

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_state("predicted", [], dist_reduce_fx="cat")
        self.add_state("target", [], dist_reduce_fx="cat")

    def update(self, predicted: Any, target: Any) -> None:
        """Take in predicted scores (n,) and true ones (n,)."""
        predicted = check_scores(predicted, "predicted", 1, device=self.device).detach().double()
        target = check_scores(target, "target", 1, device=self.device).detach().double()
        check_same_length(predicted=predicted, target=target)
        self.predicted.append(predicted)
        self.target.append(target)

    def compute(self) -> dict[str, Tensor]:
        """Return {"SRCC", "PLCC", "KRCC", "MAE", "RMSE"}, float64 scalars."""
        if not len(self.predicted):
            raise ValueError("expected at least 2 samples before compute(), got none")
        p, t = (dim_zero_cat(v) for v in (self.predicted, self.target))
        a, b = p.cpu().numpy(), t.cpu().numpy()
        if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
            raise ValueError(f"expected at least two different scores on both sides, got {len(a)} samples")
        correlations = {
            "SRCC": stats.spearmanr(a, b).statistic,
            "PLCC": stats.pearsonr(a, b).statistic,
            "KRCC": stats.kendalltau(a, b).statistic,
        }
        out = {name: torch.tensor(float(v), dtype=torch.float64, device=p.device) for name, v in correlations.items()}
        return out | {"MAE": (p - t).abs().mean(), "RMSE": (p - t).square().mean().sqrt()}


class LogisticMap(BaseEstimator):
    r"""The four-parameter logistic curve that quality contests fit between predictions and scores.

    $$f(x) = b_0 + \frac{b_1 - b_0}{1 + e^{-(x - b_2) / b_3}}, \qquad b_1 > b_0,\ b_3 > 0$$

    Strictly increasing by its parametrisation, so the order of predictions, and with it SRCC and KRCC, stays: what it
    mends is calibration. Least squares, from three starting points.

    Attributes:
        parameters_: (b0, b1, b2, b3).

    >>> x = torch.linspace(-2, 2, 50)
    >>> bent = LogisticMap().fit(x, 1 + 4 * torch.sigmoid(3 * (x - 1)))
    >>> [round(v, 2) for v in bent.parameters_]
    [1.0, 5.0, 1.0, 0.33]

    Paper: hosu2024aim

    Chapter: calibration/measuring-calibration
    """

    def fit(self, x: Any, y: Any) -> "LogisticMap":
        """Fit on predictions x (n,) and scores y (n,), n at least 4 and x not constant; return self."""
        x, y = (check_scores(v, name, 4).detach().cpu().double().numpy() for v, name in ((x, "x"), (y, "y")))
        check_same_length(x=x, y=y)
        if not (np.isfinite(x).all() and np.isfinite(y).all()) or np.ptp(x) == 0:
            raise ValueError("expected finite x and y with at least two different values of x")
        center, scale = np.median(x), x.std()
        u, low, height = (x - center) / scale, y.min(), max(np.ptp(y), 1e-9)

        def curve(b: np.ndarray) -> np.ndarray:
            # bounds on the logarithms keep the curve from becoming a step or a line of infinite reach
            return b[0] + math.exp(b[1]) / (1 + np.exp(-np.clip((u - b[2]) / math.exp(b[3]), -60, 60)))

        bounds = (
            [low - 100 * height, math.log(height) - 7, u.min() - 50, -4],
            [low + 100 * height, math.log(height) + 7, u.max() + 50, 5],
        )
        starts = [(low, math.log(height), 0.0, math.log(width)) for width in (0.3, 1.0)]
        starts.append((low - height, math.log(4 * height), 0.0, math.log(4.0)))
        fits = [optimize.least_squares(lambda b: curve(b) - y, start, bounds=bounds) for start in starts]
        b = min(fits, key=lambda f: f.cost).x
        self.parameters_ = (
            float(b[0]), float(b[0] + math.exp(b[1])), float(center + scale * b[2]), float(scale * math.exp(b[3])),
        )  # fmt: skip
        return self

    def transform(self, x: Any) -> Tensor:
        """Return f(x), float64, in the shape (n,) of x."""
        check_is_fitted(self)
        low, high, middle, width = self.parameters_
        return low + (high - low) * torch.sigmoid((check_scores(x, "x").detach().double() - middle) / width)


def rank_aggregate(
    table: Mapping[str, Mapping[str, Any]], lower_is_better: Sequence[str] = ("MAE", "RMSE")
) -> dict[str, float]:
    """Return the mean rank of each entry over all metrics, as contests do; ties share their ranks.

    Args:
        table: for each entry, its number under each metric, the same metrics for all.
        lower_is_better: metrics in which a small number wins.

    Returns:
        Mean ranks by entry, best (lowest) first.

    Raises:
        ValueError: no entries, or entries with different metrics.

    >>> rank_aggregate({"a": {"SRCC": 0.9, "MAE": 0.5}, "b": {"SRCC": 0.8, "MAE": 0.6}})
    {'a': 1.0, 'b': 2.0}

    Paper: hosu2024aim

    Chapter: calibration/measuring-calibration
    """
    if not table:
        raise ValueError("expected at least one entry, got none")
    names = list(next(iter(table.values())))
    if any(list(row) != names for row in table.values()):
        raise ValueError(f"expected the metrics {names} for every entry")
    ranks = np.zeros(len(table))
    for name in names:
        values = np.array([float(row[name]) for row in table.values()])
        ranks += stats.rankdata(values if name in lower_is_better else -values)
    mean = dict(zip(table, (ranks / len(names)).tolist()))
    return dict(sorted(mean.items(), key=lambda item: item[1]))


def count_macs(model: nn.Module, shape: Sequence[int]) -> int:
    """Return the multiply-accumulate operations of the convolutions and linear layers for one input.

    Args:
        model: any module; it is run once, in eval mode, on zeros; each part comes back in the mode it was in.
        shape: of one input, without the batch.

    Returns:
        A whole number. Attention written without linear layers, and normalisation, are not counted.

    >>> count_macs(nn.Conv2d(3, 8, 3, padding=1), (3, 32, 32))  # 8 * 3 * 9 per pixel
    221184

    Paper: hosu2024aim

    Chapter: calibration/measuring-calibration
    """
    total = 0

    def count(module: Any, inputs: Any, output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Linear):
            total += output.numel() * module.in_features
        else:
            total += output.numel() * module.in_channels // module.groups * math.prod(module.kernel_size)

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, kinds)]
    parameter = next(model.parameters(), torch.zeros(()))
    try:
        with torch.no_grad():
            read_layers(model, torch.zeros(1, *shape, dtype=parameter.dtype, device=parameter.device))
    finally:
        for hook in hooks:
            hook.remove()
    return total


class OpinionScores(NamedTuple):
    """A table of opinion scores: image names, mean scores (n,), their standard deviations (n,) or None, data sets."""

    image: list[str]
    mos: Tensor
    mos_std: Tensor | None
    dataset: list[str]


def read_opinion_scores(path: Any) -> OpinionScores:
    """Read a csv file with the columns image, mos, and, where there are any, mos_std and dataset.

    Args:
        path: of the file.

    Returns:
        `OpinionScores`; `dataset` holds empty names where the column is missing.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column is missing, a number is none, or there are no rows.

    Paper: you2025teaching

    Paper: hosu2024aim

    Chapter: calibration/measuring-calibration
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a csv file at {path}, found none")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        if missing := [name for name in ("image", "mos") if name not in columns]:
            raise ValueError(f"{path.name}: expected the columns image and mos, missing: {', '.join(missing)}")
        rows = list(reader)
    if not rows:
        raise ValueError(f"{path.name}: expected at least one row, got none")

    def numbers(name: str) -> Tensor:
        try:
            return torch.tensor([float(row[name]) for row in rows], dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path.name}: expected numbers in the column {name}: {error}") from error

    std = numbers("mos_std") if "mos_std" in columns else None
    return OpinionScores(
        [row["image"] for row in rows], numbers("mos"), std, [row.get("dataset") or "" for row in rows]
    )
