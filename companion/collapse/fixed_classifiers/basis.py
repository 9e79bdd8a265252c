"""Class directions that are chosen before training: as far apart as they can be, also when there are many.

Public: `welch_bound`, `coherence`, `equiangular_basis`, `EBVHead`.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion.checks import check_features, check_generator, check_in_range, check_positive_int
from companion.geometry import random_orthonormal, simplex_etf

__all__ = ["EBVHead", "coherence", "equiangular_basis", "welch_bound"]

CHUNK = 1024  # rows of the Gram matrix in memory at a time
_SHARPNESS = (3.0, 300.0)  # of the soft maximum, from the first step to the last
_RATE = 0.05


def welch_bound(n_classes: int, dim: int) -> float:
    r"""Return the least possible value of the largest $|\cos|$ between C unit vectors in d dimensions.

    $$\max_{i \ne j} |\langle v_i, v_j \rangle| \;\ge\; \sqrt{\frac{C - d}{d\,(C - 1)}}, \qquad C > d$$

    and 0 for $C \le d$, where an orthonormal set exists. Equality needs an equiangular tight frame, which most pairs
    (C, d) do not have.

    Args:
        n_classes: C, at least 2.
        dim: d.

    Returns:
        The bound, between 0 and 1.

    Raises:
        ValueError: fewer than two vectors, or no dimension.

    >>> welch_bound(3, 2), welch_bound(10, 10)
    (0.5, 0.0)

    Paper: shen2023equiangular
    Chapter: collapse/fixed-classifiers
    """
    check_positive_int(n_classes, "n_classes", minimum=2)
    check_positive_int(dim, "dim")
    if n_classes <= dim:
        return 0.0
    return math.sqrt((n_classes - dim) / (dim * (n_classes - 1)))


def coherence(basis: Any, signed: bool = False) -> Tensor:
    r"""Return how close the closest two directions are: $\max_{i \ne j} |\cos(v_i, v_j)|$.

    Memory is that of a chunk of rows.

    Args:
        basis: v, (C, d), rows that are not zero.
        signed: take the largest cosine instead of its absolute value: opposite vectors then count as far apart.

    Returns:
        A scalar.

    Raises:
        ValueError: fewer than two rows, a row of zeros, NaN or infinity.

    >>> round(coherence([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]).item(), 4)
    0.7071
    >>> coherence([[1.0, 0.0], [-1.0, 0.0]]).item(), coherence([[1.0, 0.0], [-1.0, 0.0]], signed=True).item()
    (1.0, -1.0)

    Paper: shen2023equiangular
    Chapter: collapse/fixed-classifiers
    """
    v = _unit(check_features(basis, "basis", min_samples=2))
    largest = []
    for start in range(0, len(v), CHUNK):
        cosines = v[start : start + CHUNK] @ v.T  # (chunk, C)
        if not signed:
            cosines = cosines.abs()
        rows = torch.arange(len(cosines), device=v.device)
        largest.append(cosines.index_put((rows, rows + start), cosines.new_tensor(-math.inf)).amax())
    return torch.stack(largest).amax()


def _unit(v: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    if (norms == 0).any():
        raise ValueError("expected rows with a direction, got a row of zeros")
    return v / norms


def equiangular_basis(
    n_classes: int,
    dim: int,
    max_cos: float = 0.0,
    steps: int = 600,
    *,
    signed: bool = False,
    generator: torch.Generator | int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Return C unit vectors in d dimensions that are spread so that the largest $|\cos|$ is small.

    Where a perfect answer is known it is returned: an orthonormal set for $C \le d$, and with `signed` a simplex for
    $C \le d + 1$. Otherwise the soft maximum

    $$\frac1s \log \sum_{i \ne j} \exp\big(s\,|\langle v_i, v_j \rangle|\big)$$

    is minimised on the sphere by Adam, while s rises. The gradient is summed over chunks of rows, so that memory grows
    with C and not with its square. The result comes near `welch_bound`, which few (C, d) can reach.

    Args:
        n_classes: C, at least 2.
        dim: d, at least 2 where C is larger than d.
        max_cos: stop as soon as `coherence` is at most this.
        steps: of the optimiser, at most.
        signed: spread by the cosine instead of its absolute value. Bounding $|\cos|$ forbids opposite vectors, which a
            classifier has no reason to avoid: with few dimensions the signed basis leaves more room.
        generator: draws the start; a seed will do, None uses torch's default generator.
        dtype: of the result; None takes torch's default.
        device: where it is computed; None is the generator's device, or the cpu.

    Returns:
        Unit rows (C, d).

    Raises:
        ValueError: fewer than two classes, no dimension, a bound outside [0, 1].

    >>> basis = equiangular_basis(6, 3, generator=torch.Generator().manual_seed(0))  # six diagonals of an icosahedron
    >>> round(coherence(basis).item(), 3), round(welch_bound(6, 3), 3)
    (0.447, 0.447)

    Paper: shen2023equiangular
    Chapter: collapse/fixed-classifiers
    """
    check_positive_int(n_classes, "n_classes", minimum=2)
    check_positive_int(dim, "dim")
    check_positive_int(steps, "steps")
    check_in_range(max_cos, "max_cos", 0, 1)
    generator = check_generator(generator)
    where = torch.device(device) if device is not None else generator.device if generator is not None else "cpu"
    dtype = dtype or torch.get_default_dtype()
    if signed and n_classes <= dim + 1:
        return simplex_etf(n_classes, dim, generator=generator, dtype=dtype, device=where)
    if n_classes <= dim:
        return random_orthonormal(dim, n_classes, generator=generator, dtype=dtype).T.to(where).contiguous()
    if dim == 1:
        raise ValueError(f"expected dim of at least 2 for {n_classes} classes, got 1: a line has two directions")
    drawn = torch.randn(n_classes, dim, generator=generator, device="cpu" if generator is None else generator.device)
    return _spread(_unit(drawn).to(where), max_cos, steps, signed).to(dtype)


def _spread(v: Tensor, max_cos: float, steps: int, signed: bool) -> Tensor:
    """Minimise the soft maximum of the cosines by Adam on the sphere and return the best basis seen."""
    best, least = v, math.inf
    first, second = torch.zeros_like(v), torch.zeros_like(v)
    low, high = _SHARPNESS
    for step in range(steps + 1):
        progress = step / steps
        gradient, largest = _soft_maximum(v, low * (high / low) ** progress, signed)
        if largest < least:
            best, least = v, largest
        if least <= max_cos or step == steps:
            break
        gradient = gradient - (gradient * v).sum(1, keepdim=True) * v  # along the sphere
        first = torch.lerp(gradient, first, 0.9)
        second = torch.lerp(gradient.square(), second, 0.99)
        corrected = (second / (1 - 0.99 ** (step + 1))).sqrt() + 1e-12
        rate = _RATE * (1 - progress) / (1 - 0.9 ** (step + 1))
        v = F.normalize(v - rate * first / corrected, dim=1)
    return best


def _soft_maximum(v: Tensor, sharpness: float, signed: bool) -> tuple[Tensor, float]:
    """Return the gradient of the soft maximum over off-diagonal cosines, and the hard maximum."""
    gradient, total, largest = torch.zeros_like(v), v.new_zeros(()), -math.inf
    for start in range(0, len(v), CHUNK):
        cosines = v[start : start + CHUNK] @ v.T
        sizes = cosines if signed else cosines.abs()
        rows = torch.arange(len(cosines), device=v.device)
        sizes = sizes.index_put((rows, rows + start), sizes.new_tensor(-math.inf))
        largest = max(largest, sizes.amax().item())
        weights = (sharpness * (sizes - 1)).exp()  # at most one, whatever the sharpness
        total = total + weights.sum()
        gradient[start : start + CHUNK] = 2 * (weights if signed else weights * cosines.sign()) @ v
    return gradient / total.clamp(min=torch.finfo(v.dtype).tiny), largest


class EBVHead(nn.Module):
    r"""A last layer whose class vectors are given: the logits are cosines over a temperature.

    $$z_c = \frac{\langle h, v_c \rangle}{\tau\,\|h\| \, \|v_c\|}$$

    With cross-entropy it turns every feature towards the vector of its class. There is nothing to train in it; the
    basis is a buffer that moves and saves with the model. `trainable=True` makes it the control: the same head,
    learned.

    Args:
        basis: v, (C, d), rows that are not zero, such as `equiangular_basis` or `simplex_etf`.
        temperature: tau, above 0.
        trainable: make the class vectors a parameter.

    Raises:
        ValueError: fewer than two rows, a row of zeros, or a temperature of at most 0.

    >>> head = EBVHead(simplex_etf(3, 2))
    >>> head(5 * simplex_etf(3, 2)).argmax(1), sum(p.numel() for p in head.parameters())
    (tensor([0, 1, 2]), 0)

    Paper: shen2023equiangular
    Chapter: collapse/fixed-classifiers
    """

    def __init__(self, basis: Any, temperature: float = 0.07, trainable: bool = False) -> None:
        super().__init__()
        basis = _unit(check_features(basis, "basis", min_samples=2).detach()).clone()
        self.temperature = check_in_range(temperature, "temperature", 0, inclusive="neither")
        if trainable:
            self.basis = nn.Parameter(basis)
        else:
            self.register_buffer("basis", basis)

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits (n, C) of features (n, d)."""
        if features.shape[-1] != self.basis.shape[1]:
            raise ValueError(f"expected features of {self.basis.shape[1]} dimensions, got {features.shape[-1]}")
        basis = F.normalize(self.basis, dim=-1) if isinstance(self.basis, nn.Parameter) else self.basis
        unit = F.normalize(features, dim=-1)
        return unit @ basis.mT.to(unit.dtype) / self.temperature

    def extra_repr(self) -> str:
        """Say the sizes and the temperature where the module is printed."""
        return f"{tuple(self.basis.shape)}, temperature={self.temperature:g}"
