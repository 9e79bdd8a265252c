"""Mixing inside anyone's own loop: while a batch is collated, or between two layers.

Public: `MixupCollate`, `manifold_mixup`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from companion.checks import (
    check_generator,
    check_in_range,
)
from companion.mixing import Mixed, mixup

__all__ = ["MixupCollate", "manifold_mixup"]


class MixupCollate:
    """A collate function for a `DataLoader` that mixes every batch as it is put together.

    Args:
        alpha: of the Beta distribution.
        per_sample: one lam per sample.
        generator: None uses torch's default generator, which a `DataLoader` seeds per worker.
        collate: what stacks samples; default torch's.

    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> data = TensorDataset(torch.ones(5, 3), torch.arange(5))
    >>> [mixed.x.shape[0] for mixed in DataLoader(data, batch_size=2, collate_fn=MixupCollate())]
    [2, 2, 1]

    Chapter: mixup/mixup-geometry
    """

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        per_sample: bool = False,
        generator: torch.Generator | None = None,
        collate: Callable[[Sequence[Any]], Any] | None = None,
    ):
        self.alpha = check_in_range(alpha, "alpha", low=0)
        self.per_sample, self.generator = per_sample, generator
        self.collate = collate or torch.utils.data.default_collate

    def __call__(self, samples: Sequence[Any]) -> Mixed:
        """Return a `Mixed` for a list of samples (x, y)."""
        x, y = self.collate(samples)
        return mixup(x, y, self.alpha, per_sample=self.per_sample, generator=self.generator)


def manifold_mixup(
    layers: Sequence[nn.Module],
    x: Tensor,
    y: Tensor,
    alpha: float = 1.0,
    *,
    layer: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Mixed]:
    """Run a chain of layers and mix the batch in front of one of them, drawn at random.

    Args:
        layers: applied one after the other, such as an `nn.Sequential`.
        x: inputs (n, ...).
        y: targets (n, ...).
        alpha: of the Beta distribution.
        layer: in front of which layer to mix; 0 is plain mixup, None draws one.
        generator: draws layer, pairs and lam; None uses torch's default generator.

    Returns:
        The outputs, and the `Mixed` at that layer, for `mixup_loss`.

    Raises:
        ValueError: no layers, or a layer that is not there.

    >>> outputs, mixed = manifold_mixup(nn.Sequential(nn.Linear(2, 4), nn.ReLU()), torch.zeros(3, 2), torch.arange(3))
    >>> outputs.shape
    torch.Size([3, 4])

    Chapter: mixup/mixup-geometry
    """
    layers = list(layers)
    if not layers:
        raise ValueError("expected at least one layer, got none")
    if layer is None:
        layer = int(torch.randint(len(layers), (), generator=check_generator(generator)))
    if not 0 <= layer < len(layers):
        raise ValueError(f"expected a layer from 0 to {len(layers) - 1}, got {layer}")
    for module in layers[:layer]:
        x = module(x)
    mixed = mixup(x, y, alpha, generator=generator)
    outputs = mixed.x
    for module in layers[layer:]:
        outputs = module(outputs)
    return outputs, mixed
