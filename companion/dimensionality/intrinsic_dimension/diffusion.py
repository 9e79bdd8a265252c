"""A small diffusion model, and what samples from it can and cannot look like.

Public: `edm_transform`, `edm_denoise`, `edm_sample`, `norm_tail_ratio`, `gaussian_twin`, `moment_probe`.

A sampler turns Gaussian noise into data by a map whose slope is bounded. Such a map cannot stretch the thin tail of a
Gaussian into a thick one, and a linear classifier sees no more of its samples than their first two moments.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from companion.checks import (
    check_binary,
    check_features,
    check_generator,
    check_in_range,
    check_labels,
    check_positive_int,
    check_same_length,
)
from companion.geometry import single

__all__ = ["edm_denoise", "edm_sample", "edm_transform", "gaussian_twin", "moment_probe", "norm_tail_ratio"]


def _scales(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return c_in, c_skip and c_out: what keeps inputs and targets of the network at unit variance."""
    total = (sigma**2 + sigma_data**2).sqrt()
    return 1 / total, sigma_data**2 / total**2, sigma * sigma_data / total


def _network_input(noisy: Tensor, sigma: Tensor, c_in: Tensor) -> Tensor:
    level = (0.25 * sigma.log()).expand_as(noisy[..., :1])
    return torch.cat([c_in * noisy, level], -1)  # (..., d + 1)


def edm_transform(
    sigma_data: float = 1.0, log_mean: float = -0.5, log_sd: float = 1.5
) -> Callable[[Tensor, Any, torch.Generator | None], tuple[Tensor, Tensor]]:
    r"""Return a `batch_transform` that turns denoising into plain regression.

    With $\sigma$ log-normal and $\tilde x = x + \sigma \varepsilon$, the network F sees
    $(c_\text{in} \tilde x, \tfrac14 \log \sigma)$ and has to return
    $(x - c_\text{skip} \tilde x) / c_\text{out}$; squared error on that is the weighted denoising loss of Karras et al.
    Any network from d + 1 to d numbers will do.

    Args:
        sigma_data: standard deviation of the data.
        log_mean: mean of log sigma in training.
        log_sd: its standard deviation.

    Returns:
        `transform(x, y, generator) -> (inputs, targets)`, for `companion.training.fit` with `F.mse_loss`; y is ignored.

    Raises:
        ValueError: a deviation of the data of at most 0.

    >>> transform = edm_transform()
    >>> inputs, targets = transform(torch.randn(5, 2), None, torch.Generator().manual_seed(0))
    >>> inputs.shape, targets.shape
    (torch.Size([5, 3]), torch.Size([5, 2]))

    Paper: ghane2025concentration
    Chapter: dimensionality/intrinsic-dimension
    """
    sigma_data = check_in_range(sigma_data, "sigma_data", 0, inclusive="neither")

    def transform(x: Tensor, y: Any, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        level = torch.randn((*x.shape[:-1], 1), generator=generator, dtype=x.dtype).to(x.device)
        sigma = (log_mean + log_sd * level).exp()
        c_in, c_skip, c_out = _scales(sigma, sigma_data)
        noisy = x + sigma * noise
        return _network_input(noisy, sigma, c_in), (x - c_skip * noisy) / c_out

    return transform


def edm_denoise(net: Callable[[Tensor], Tensor], noisy: Tensor, sigma: Any, sigma_data: float = 1.0) -> Tensor:
    r"""Return the denoised mean, $D(\tilde x; \sigma) = c_\text{skip} \tilde x + c_\text{out} F$.

    Args:
        net: F, trained with `edm_transform`; a module or `companion.training.ManyModels`.
        noisy: (..., d).
        sigma: the noise level, a number or (..., 1).
        sigma_data: as in training.

    Returns:
        (..., d).

    >>> edm_denoise(lambda z: torch.zeros_like(z[..., :-1]), torch.ones(1, 2), sigma=1.0)
    tensor([[0.5000, 0.5000]])

    Paper: ghane2025concentration
    Chapter: dimensionality/intrinsic-dimension
    """
    sigma = torch.as_tensor(sigma, dtype=noisy.dtype, device=noisy.device)
    c_in, c_skip, c_out = _scales(sigma, sigma_data)
    return c_skip * noisy + c_out * net(_network_input(noisy, sigma, c_in))


@torch.no_grad()
def edm_sample(
    net: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    *,
    steps: int = 30,
    sigma_max: float = 20.0,
    sigma_min: float = 0.01,
    sigma_data: float = 1.0,
    heun: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    r"""Draw samples by following $\mathrm d x / \mathrm d\sigma = (x - D(x; \sigma)) / \sigma$ from noise to data.

    Levels are spaced evenly in $\sigma^{1/7}$. Deterministic given the first noise: a map, and a Lipschitz one.

    Args:
        net: as in `edm_denoise`.
        shape: (n, d), or (m, n, d) for m stacked models.
        steps: levels.
        sigma_max: where to start. Far above the data's bulk, or the tail is cut off by the start already.
        sigma_min: where the last step begins.
        sigma_data: as in training.
        heun: correct each Euler step by the slope at its end.
        generator: draws the noise, on the cpu (None: torch's default generator).
        device: where to compute.

    Returns:
        Samples of that shape.

    Raises:
        ValueError: levels that are not in order.

    >>> points = edm_sample(lambda z: 0 * z[..., :-1], (4, 2), generator=torch.Generator().manual_seed(0))
    >>> points.shape
    torch.Size([4, 2])

    Paper: ghane2025concentration
    Chapter: dimensionality/intrinsic-dimension
    """
    steps = check_positive_int(steps, "steps", minimum=2)
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"expected 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    levels = torch.linspace(sigma_max ** (1 / 7), sigma_min ** (1 / 7), steps).pow(7).tolist()
    x = sigma_max * torch.randn(shape, generator=check_generator(generator)).to(device)
    for sigma, after in zip(levels, [*levels[1:], 0.0]):
        slope = (x - edm_denoise(net, x, sigma, sigma_data)) / sigma
        moved = x + (after - sigma) * slope
        if heun and after > 0:
            end = (moved - edm_denoise(net, moved, after, sigma_data)) / after
            moved = x + (after - sigma) * 0.5 * (slope + end)
        x = moved
    return x


def norm_tail_ratio(x: Any, q: float = 0.9999) -> Tensor:
    r"""Return how far the tail of the norms reaches: their q-quantile over their median.

    Near 1 where norms concentrate, as for a Gaussian in many dimensions; it has no unit.

    Args:
        x: (n, d); for a quantile q you want several times 1 / (1 - q) rows.
        q: between one half and 1.

    Raises:
        ValueError: NaN, q out of range, a median norm of zero.

    >>> norm_tail_ratio([[1.0], [2.0], [3.0]], q=1.0)
    tensor(1.5000)

    Paper: ghane2025concentration
    Chapter: dimensionality/intrinsic-dimension
    """
    norms = torch.linalg.vector_norm(check_features(x), dim=1).sort().values
    q = check_in_range(q, "q", 0.5, 1)
    median = norms[(len(norms) - 1) // 2]
    if not median > 0:
        raise ValueError("expected rows away from the origin, got a median norm of zero")
    return norms[math.ceil(q * (len(norms) - 1))] / median


def gaussian_twin(x: Any, labels: Any = None, n: int | None = None, generator: torch.Generator | None = None) -> Tensor:
    """Draw Gaussians with the mean and covariance of the data, class by class.

    Args:
        x: (n, d).
        labels: (n,), one Gaussian per class; the draw for row i comes from the class of row i.
        n: how many, where there are no labels; as many as x by default.
        generator: a cpu generator; None means torch's default one.

    Returns:
        (n, d), row i with the label of row i.

    Raises:
        ValueError: a class with fewer than two rows, NaN, n together with labels.

    >>> twin = gaussian_twin(torch.rand(1000, 2), generator=torch.Generator().manual_seed(0))
    >>> bool((twin.mean(0) - 0.5).abs().max() < 0.1)
    True

    Paper: ghane2025concentration
    Chapter: dimensionality/intrinsic-dimension
    """
    x = check_features(x, min_samples=2)
    if labels is None:
        return _one_twin(x, len(x) if n is None else check_positive_int(n, "n"), check_generator(generator))
    if n is not None:
        raise ValueError("expected labels or n, got both: with labels there is one draw per row")
    labels, generator = check_labels(labels, len(x), device=x.device), check_generator(generator)
    out = torch.empty_like(x)
    for label in labels.unique():
        rows = labels == label
        if int(rows.sum()) < 2:
            raise ValueError(f"expected at least two rows of each class, got one of class {int(label)}")
        out[rows] = _one_twin(x[rows], int(rows.sum()), generator)
    return out


def _one_twin(x: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    # through the singular vectors, so that a covariance without full rank needs no repair
    dtype, x = x.dtype, single(x)
    mean = x.mean(0)
    _, sigma, axes = torch.linalg.svd(x - mean, full_matrices=False)
    z = torch.randn(n, len(sigma), generator=generator, dtype=x.dtype).to(x.device)
    return (mean + (z * sigma / math.sqrt(len(x) - 1)) @ axes).to(dtype)


def moment_probe(
    x_train: Any, y_train: Any, x_test: Any, y_test: Any, *, ridge: float = 1e-2, quadratic: bool = False
) -> Tensor:
    """Return the test error of a least-squares classifier of two classes, linear or with all products of features.

    The linear one is the classifier whose error on diffusion samples is that on their Gaussian twins; the quadratic
    one sees more.

    Args:
        x_train: (n, d).
        y_train: (n,), 0 or 1.
        x_test: (m, d).
        y_test: (m,).
        ridge: penalty on the weights, times the number of rows.
        quadratic: whether products of two features are added.

    Returns:
        The share of wrong predictions, a scalar.

    Raises:
        ValueError: shapes that do not fit, labels other than 0 and 1.

    >>> moment_probe([[-1.0], [1.0]], [0, 1], [[-2.0], [2.0], [3.0]], [0, 1, 0])
    tensor(0.3333)

    Paper: ghane2025concentration
    Chapter: dimensionality/intrinsic-dimension
    """
    x_train, x_test = check_features(x_train, "x_train"), check_features(x_test, "x_test")
    check_same_length(x_train=x_train, y_train=y_train)
    if x_train.shape[1] != x_test.shape[1]:
        raise ValueError(f"expected x_train and x_test of one width, got {x_train.shape[1]} and {x_test.shape[1]}")
    y_train, y_test = check_binary(y_train, name="y_train"), check_binary(y_test, len(x_test), name="y_test")
    ridge = check_in_range(ridge, "ridge", 0, inclusive="neither")
    a, b = (_expanded(x, quadratic).double() for x in (x_train, x_test))
    center = a.mean(0)
    target = 2 * y_train.double() - 1
    offset = target.mean()
    gram = (a - center).T @ (a - center) + ridge * len(a) * torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
    weights = torch.linalg.solve(gram, (a - center).T @ (target - offset))
    return ((((b - center) @ weights + offset) > 0) != y_test).to(x_test.dtype).mean()


def _expanded(x: Tensor, quadratic: bool) -> Tensor:
    if not quadratic:
        return x
    i, j = torch.triu_indices(x.shape[1], x.shape[1], device=x.device)
    return torch.cat([x, x[:, i] * x[:, j]], 1)
