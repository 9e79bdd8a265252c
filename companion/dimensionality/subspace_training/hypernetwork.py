"""Networks that write the weights of another network, and the size of what they write.

Public: `HyperNetwork`, `circle_encode`.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from companion.checks import as_tensor, check_positive_int
from companion.dimensionality.subspace_training.parameters import FrozenModule

__all__ = ["HyperNetwork", "circle_encode"]


def circle_encode(c: Any) -> Tensor:
    r"""Put each number of [0, 1] on a quarter circle: $c \mapsto (\cos \tfrac{\pi c}{2}, \sin \tfrac{\pi c}{2})$.

    The encoding has length $\sqrt k$ whatever the k numbers are, so that nothing downstream can scale with them.

    Args:
        c: (..., k).

    Returns:
        (..., 2k).

    >>> circle_encode(torch.tensor([0.0]))
    tensor([1., 0.])

    Paper: ortiz2024magnitude
    Chapter: dimensionality/subspace-training
    """
    c = as_tensor(c, "c")
    angle = (c if c.is_floating_point() else c.float()) * (math.pi / 2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class HyperNetwork(FrozenModule):
    r"""A network whose weights are written by a second one from a conditioning value c.

    - "default": $\theta = h(c)$. With ReLU layers and no biases $h(\gamma c) = \gamma h(c)$ for $\gamma \ge 0$, so
      the size of the written weights is proportional to the size of the input.
    - "encoding": $\theta = h(E(c))$ with the circle encoding E of constant length.
    - "residual": $\theta = \theta_0 + h(c)$ with learned base weights $\theta_0$.
    - "mip": both, the magnitude-invariant parametrisation of the paper.

    Args:
        main: the network whose trainable parameters are written. It is copied; its own values become $\theta_0$.
        cond_dim: k, how many numbers condition it, each in [0, 1].
        hidden: widths of the writing network.
        parametrization: one of the four above.
        output_scale: factor on the initial last layer; 0.3 without and 0.1 with base weights when left out.
        random_state: seed of the writing network.

    Raises:
        ValueError: an unknown parametrisation, or a main network without trainable parameters.

    >>> hyper = HyperNetwork(nn.Linear(2, 1), cond_dim=1, hidden=(8,))
    >>> hyper(torch.randn(5, 2), torch.tensor([0.3])).shape
    torch.Size([5, 1])

    Paper: ortiz2024magnitude
    Chapter: dimensionality/subspace-training
    """

    def __init__(
        self,
        main: nn.Module,
        cond_dim: int = 1,
        hidden: Sequence[int] = (32, 128),
        parametrization: str = "mip",
        output_scale: float | None = None,
        *,
        random_state: int = 0,
    ):
        super().__init__(main)
        if parametrization not in ("default", "encoding", "residual", "mip"):
            raise ValueError(
                f"expected parametrization 'default', 'encoding', 'residual' or 'mip', got {parametrization!r}"
            )
        self.cond_dim = check_positive_int(cond_dim, "cond_dim")
        self.encodes = parametrization in ("encoding", "mip")
        self.base = None
        if parametrization in ("residual", "mip"):
            self.base = nn.Parameter(torch.cat([v.flatten() for v in self.base_values().values()]).clone())
        if output_scale is None:
            output_scale = 0.3 if self.base is None else 0.1
        dims = [cond_dim * (2 if self.encodes else 1), *hidden, self.size]
        generator = torch.Generator().manual_seed(random_state)
        like = self.base_values()[self.names[0]]
        self.layers = nn.ModuleList()
        for i, (n_in, n_out) in enumerate(itertools.pairwise(dims)):
            layer = nn.utils.skip_init(nn.Linear, n_in, n_out)
            scale = output_scale if i == len(hidden) else 1.0
            weight = torch.randn(n_out, n_in, generator=generator) * (scale * math.sqrt(2 / n_in))
            # zero biases: with others the proportionality at the start is hidden, and comes back as training goes on
            layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(torch.zeros(n_out))
            self.layers.append(layer.to(like))

    def write(self, cond: Tensor) -> Tensor:
        """Return the written weights, one flat vector per conditioning value: (..., k) to (..., D)."""
        h = circle_encode(cond) if self.encodes else cond
        for layer in self.layers[:-1]:
            h = torch.relu(layer(h))
        flat = self.layers[-1](h)
        return flat if self.base is None else self.base + flat

    def weight_scale(self, cond: Tensor) -> Tensor:
        """Return the standard deviation of the written weights for each conditioning value, (...,)."""
        return self.write(cond).std(dim=-1, correction=0)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Run the main network on x with the weights written for cond.

        Args:
            x: a batch for one conditioning value, (n, ...), or one batch for each, (g, n, ...).
            cond: (k,), or (g, k).

        Raises:
            ValueError: another number of conditioning values than k, or of batches than g.
        """
        if cond.ndim not in (1, 2) or cond.shape[-1] != self.cond_dim:
            raise ValueError(
                f"expected cond of shape ({self.cond_dim},) or (g, {self.cond_dim}), got {tuple(cond.shape)}"
            )
        if cond.ndim == 1:
            return self.call(self.split(self.write(cond)), x)
        if x.shape[0] != cond.shape[0]:
            raise ValueError(f"expected one batch per conditioning value, got {x.shape[0]} and {cond.shape[0]}")
        return torch.func.vmap(lambda flat, batch: self.call(self.split(flat), batch))(self.write(cond), x)
