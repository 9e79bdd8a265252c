"""The curvature of the loss at a point: the exact Hessian of a small model, the spectrum of any other.

Public: `exact_hessian`, `gauss_newton`, `hessian_spectrum` (stochastic Lanczos quadrature), `HessianSpectrum`,
`count_outliers`, `interpolate_loss`.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from companion.checks import as_tensor, check_generator, check_in_range, check_positive_int, check_same_length

__all__ = [
    "HessianSpectrum",
    "count_outliers",
    "exact_hessian",
    "gauss_newton",
    "hessian_spectrum",
    "interpolate_loss",
]

Loss = Callable[[Tensor, Tensor], Tensor]


def _flat(model: nn.Module) -> tuple[Tensor, Callable[[Tensor], dict[str, Tensor]]]:
    """Return the trainable parameters as one vector, and the way back to names and shapes."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("expected a model with parameters that require a gradient, got none")
    sizes = [p.numel() for p in named.values()]

    def unflatten(vector: Tensor) -> dict[str, Tensor]:
        return {name: part.view_as(p) for (name, p), part in zip(named.items(), vector.split(sizes))}

    return parameters_to_vector(named.values()).detach(), unflatten


def exact_hessian(model: nn.Module, x: Any, y: Any, *, loss: Loss = F.cross_entropy) -> Tensor:
    r"""Return the full matrix of second derivatives of the loss, $\nabla^2_\theta L(\theta)$: (p, p).

    Args:
        model: with p trainable parameters; memory and time grow with p^2, a few thousand are fine.
        x: inputs (n, ...), in the dtype of the model. For a trustworthy count of zeros use float64.
        y: targets (n, ...).
        loss: `loss(outputs, targets)`, a mean over the samples.

    Returns:
        The Hessian, (p, p), in the order of `model.parameters()`.

    Raises:
        ValueError: nothing to differentiate.

    >>> exact_hessian(nn.Linear(1, 1, bias=False), [[2.0]], [[0.0]], loss=F.mse_loss)
    tensor([[8.]])

    Paper: sagun2017empirical
    Chapter: collapse/neural-collapse
    """
    x, y = as_tensor(x), as_tensor(y, "y")
    theta, unflatten = _flat(model)
    return hessian(lambda v: loss(functional_call(model, unflatten(v), (x,)), y))(theta)


def gauss_newton(model: nn.Module, x: Any) -> Tensor:
    r"""Return the part of a classifier's Hessian that comes from the outputs' gradients.

    With cross-entropy, $\nabla^2 L = G + \ldots$, where
    $G = \frac1n\sum_i J_i^\top(\mathrm{diag}(p_i) - p_ip_i^\top)J_i$ and $J_i$ is the Jacobian of the logits. The rest
    is weighted by $p - y$ and fades as the fit improves. G is the covariance of output gradients: one large direction
    for every contrast between classes.

    Args:
        model: returns logits (n, C).
        x: inputs (n, ...).

    Returns:
        G, (p, p).

    >>> gauss_newton(nn.Linear(1, 2, bias=False), [[0.0]])
    tensor([[0., 0.],
            [0., 0.]])

    Paper: sagun2017empirical
    Chapter: collapse/neural-collapse
    """
    x = as_tensor(x)
    theta, unflatten = _flat(model)

    def logits(v: Tensor, sample: Tensor) -> Tensor:
        return functional_call(model, unflatten(v), (sample[None],))[0]

    with torch.no_grad():
        p = model(x).softmax(1)  # (n, C)
    jacobian = vmap(jacrev(logits), (None, 0))(theta, x)  # (n, C, p)
    centred = jacobian - (p[:, :, None] * jacobian).sum(1, keepdim=True)
    rows = (p.sqrt()[:, :, None] * centred).flatten(0, 1)  # (n C, p)
    return rows.T @ rows / len(x)


class HessianSpectrum(NamedTuple):
    """A spectrum as a set of weighted eigenvalues, from stochastic Lanczos quadrature.

    Attributes:
        nodes: Ritz values of each probe, ascending: (n_probes, n_steps).
        weights: what share of the spectrum each stands for; rows sum to one.
        size: number of parameters p.
    """

    nodes: Tensor
    weights: Tensor
    size: int

    @property
    def extremes(self) -> tuple[float, float]:
        """The smallest and the largest eigenvalue found."""
        return float(self.nodes.min()), float(self.nodes.max())

    def trace(self) -> Tensor:
        """Return the estimated trace of the Hessian."""
        return self.size * (self.nodes * self.weights).sum(1).mean()

    def density(self, grid: Any, width: float) -> Tensor:
        """Return the spectral density on a grid, each eigenvalue blurred by a Gaussian of that width.

        Args:
            grid: where, (m,).
            width: standard deviation of the blur, above 0.
        """
        if check_in_range(width, "width", low=0) == 0:
            raise ValueError("expected a width above 0, got 0")
        grid = as_tensor(grid, "grid").to(self.nodes)
        normal = torch.distributions.Normal(self.nodes.flatten()[:, None], width)
        return (self.weights.flatten()[:, None] * normal.log_prob(grid).exp()).sum(0) / len(self.nodes)

    def share_below(self, bound: float) -> Tensor:
        """Return which share of all eigenvalues is at most `bound` in absolute value."""
        return (self.weights * (self.nodes.abs() <= bound)).sum(1).mean()


@torch.enable_grad()
def hessian_spectrum(
    model: nn.Module,
    data: Any,
    *,
    loss: Loss = F.cross_entropy,
    n_probes: int = 4,
    n_steps: int = 60,
    generator: torch.Generator | int | None = None,
) -> HessianSpectrum:
    r"""Estimate the spectrum of a loss Hessian that is too large to write down, by stochastic Lanczos quadrature.

    From a random unit vector v, Lanczos builds a small tridiagonal matrix whose eigenvalues $\theta_j$, weighted by the
    squared first components $\tau_j^2$ of its eigenvectors, are the Gauss quadrature of the spectral measure:
    $v^\top f(H)\,v \approx \sum_j \tau_j^2 f(\theta_j)$. Averaged over random v this is $\mathrm{tr} f(H)/p$. Only
    products of H with a vector are needed, two backward passes each; memory is `n_steps` vectors of p numbers.

    Args:
        model: any module; used in the mode it is in.
        data: a pair (x, y), or something that yields such pairs anew each time it is gone through, such as a
            `DataLoader` (its order does not matter). Batches go to the device of the model.
        loss: `loss(outputs, targets)`, a mean over the samples of a batch.
        n_probes: random vectors; they are independent estimates.
        n_steps: Lanczos steps per probe; the outermost eigenvalues converge first. Cut to p.
        generator: of the random vectors; a seed will do, None uses torch's default generator.

    Returns:
        A `HessianSpectrum`, computed in float64 where the device has it.

    Raises:
        ValueError: no data, or nothing to differentiate.

    >>> line = nn.Linear(2, 1, bias=False)
    >>> spectrum = hessian_spectrum(line, (torch.eye(2), torch.zeros(2, 1)), loss=F.mse_loss)
    >>> [round(value, 4) for value in spectrum.extremes]
    [1.0, 1.0]

    Paper: sagun2017empirical
    Chapter: collapse/neural-collapse
    """
    check_positive_int(n_probes, "n_probes")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("expected a model with parameters that require a gradient, got none")
    generator = check_generator(generator)
    size = sum(p.numel() for p in parameters)
    n_steps = min(check_positive_int(n_steps, "n_steps"), size)
    batches = [data] if isinstance(data, tuple) else data

    def product(vector: Tensor) -> Tensor:
        total, n = torch.zeros_like(vector), 0
        for x, y in _on(parameters[0], batches):
            value = loss(model(x), y)
            grads = torch.autograd.grad(value, parameters, create_graph=True, materialize_grads=True)
            along = (torch.cat([g.flatten() for g in grads]) * vector.to(grads[0].dtype)).sum()
            if along.requires_grad:
                second = torch.autograd.grad(along, parameters, materialize_grads=True)
                total += len(x) * torch.cat([h.flatten() for h in second]).to(total.dtype)
            n += len(x)
        if n == 0:
            raise ValueError("expected data with at least one sample, got none")
        return total / n

    exact = torch.float32 if parameters[0].device.type == "mps" else torch.float64
    runs = [_lanczos(product, size, n_steps, generator, parameters[0].device, exact) for _ in range(n_probes)]
    return HessianSpectrum(torch.stack([r[0] for r in runs]), torch.stack([r[1] for r in runs]), size)


def _on(parameter: Tensor, batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TypeError(f"expected batches (x, y), got {type(batch).__name__}")
        x, y = as_tensor(batch[0]), as_tensor(batch[1], "y")
        check_same_length(x=x, y=y)
        yield x.to(parameter.device), y.to(parameter.device)


def _lanczos(
    product: Callable[[Tensor], Tensor],
    size: int,
    n_steps: int,
    generator: torch.Generator | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return the Ritz values and quadrature weights, (n_steps,) each; fully reorthogonalised."""
    v = torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype)
    basis = torch.zeros(n_steps, size, device=device, dtype=dtype)
    basis[0] = v / v.norm()
    diagonal, side = torch.zeros(n_steps, dtype=dtype), torch.zeros(n_steps, dtype=dtype)
    done = n_steps
    for j in range(n_steps):
        w = product(basis[j])
        diagonal[j] = w @ basis[j]
        for _ in range(2):  # twice is enough to keep the basis orthogonal to rounding
            w = w - basis[: j + 1].T @ (basis[: j + 1] @ w)
        if j + 1 == n_steps:
            break
        side[j] = w.norm()
        if side[j] <= 1e-8 * diagonal[: j + 1].abs().max().clamp(min=1e-30):
            done = j + 1  # the space is used up: what was found is exact
            break
        basis[j + 1] = w / side[j]
    small = diagonal[:done].diag() + side[: done - 1].diag(1) + side[: done - 1].diag(-1)
    values, vectors = torch.linalg.eigh(small)
    nodes = F.pad(values, (0, n_steps - done), value=float(values[-1]))
    return nodes, F.pad(vectors[0] ** 2, (0, n_steps - done))


def count_outliers(eigenvalues: Any, top: int = 10) -> int:
    """Return after which of the largest eigenvalues the widest gap, as a ratio, lies.

    Args:
        eigenvalues: (p,), in any order; at least two positive ones.
        top: how many of the largest to look at.

    Returns:
        How many eigenvalues stand above the gap.

    Raises:
        ValueError: fewer than two positive eigenvalues among the `top` largest.

    >>> count_outliers([9.0, 8.0, 7.0, 0.5, 0.4, 0.3])
    3

    Paper: sagun2017empirical
    Chapter: collapse/neural-collapse
    """
    values = as_tensor(eigenvalues, "eigenvalues").flatten().sort(descending=True).values
    values = values[: check_positive_int(top, "top", minimum=2)]
    values = values[values > 0]
    if len(values) < 2:
        raise ValueError("expected at least two positive eigenvalues among the largest, got fewer")
    return int((values[:-1] / values[1:]).argmax()) + 1


@torch.no_grad()
def interpolate_loss(
    first: nn.Module, second: nn.Module, x: Any, y: Any, *, n: int = 21, loss: Loss = F.cross_entropy
) -> Tensor:
    r"""Return the loss on the straight line between two solutions, $L((1-t)\,\theta_a + t\,\theta_b)$.

    Args:
        first: a model; stays as it is.
        second: one of the same shape.
        x: inputs (m, ...).
        y: targets (m, ...).
        n: points from t = 0 to t = 1.
        loss: `loss(outputs, targets)`.

    Returns:
        (n,) losses.

    Raises:
        ValueError: the models have different numbers of parameters.

    >>> a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    >>> a.weight.data[:], b.weight.data[:] = 1.0, -1.0
    >>> interpolate_loss(a, b, [[1.0]], [[0.0]], n=3, loss=F.mse_loss)
    tensor([1., 0., 1.])

    Paper: sagun2017empirical
    Chapter: collapse/neural-collapse
    """
    x, y = as_tensor(x), as_tensor(y, "y")
    start, end = parameters_to_vector(first.parameters()), parameters_to_vector(second.parameters())
    if start.shape != end.shape:
        raise ValueError(f"expected two models of one shape, got {len(start)} and {len(end)} parameters")
    between, losses = copy.deepcopy(first), []
    for t in torch.linspace(0, 1, check_positive_int(n, "n", minimum=2)):
        vector_to_parameters(torch.lerp(start, end, float(t)), between.parameters())
        losses.append(loss(between(x), y))
    return torch.stack(losses)
