"""Mixing inside anyone's own loop: while a batch is collated, or between two layers.

Public: `MixupCollate`, `manifold_mixup`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from companion.checks import check_generator, check_in_range
from companion.mixing import Mixed, mixup

__all__ = ["MixupCollate", "manifold_mixup"]


class MixupCollate:
    """A collate function for a `DataLoader` that mixes every batch as it is put together.

    A worker process has a copy of the generator, the same in every worker and every epoch. So in a worker the copy is
    seeded anew, from its own seed and the one that the `DataLoader` gives the worker; with `DataLoader(generator=...)`
    a run can then be repeated.

    Args:
        alpha: of the Beta distribution.
        per_sample: one lam per sample.
        generator: None uses torch's default generator, which a `DataLoader` seeds per worker.
        collate: what stacks samples; default torch's.

    Raises:
        ValueError: alpha below 0; when called, samples that are no pairs (x, y).

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
        self._worker_seed: int | None = None

    def __call__(self, samples: Sequence[Any]) -> Mixed:
        """Return a `Mixed` for a list of samples (x, y)."""
        batch = self.collate(samples)
        if not isinstance(batch, Sequence) or len(batch) != 2:
            raise ValueError(f"expected samples (x, y), got batches of type {type(batch).__name__}")
        self._seed_in_worker()
        return mixup(*batch, self.alpha, per_sample=self.per_sample, generator=self.generator)

    def _seed_in_worker(self) -> None:
        worker = torch.utils.data.get_worker_info()
        if worker is None or self.generator is None or self._worker_seed == worker.seed:
            return
        seed = (self.generator.initial_seed() * 6_364_136_223_846_793_005 + worker.seed) % 2**63
        self.generator, self._worker_seed = torch.Generator().manual_seed(seed), worker.seed


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
