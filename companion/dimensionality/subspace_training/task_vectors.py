"""Combining what fine-tuned copies of a network learned, one coefficient per block.

Public: `task_vector`, `ATLAS`.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from companion.dimensionality.subspace_training.parameters import FrozenModule

__all__ = ["ATLAS", "task_vector"]


@torch.no_grad()
def task_vector(base: nn.Module, tuned: nn.Module) -> dict[str, Tensor]:
    r"""Return what fine-tuning changed: $\tau = \theta_{tuned} - \theta_0$, by parameter name.

    Args:
        base: the network before.
        tuned: the same architecture after; it must have started from `base`, or the difference means nothing.

    Raises:
        ValueError: the two do not have the same parameters.

    >>> base = nn.Linear(2, 1)
    >>> {name: float(t.abs().sum()) for name, t in task_vector(base, base).items()}
    {'weight': 0.0, 'bias': 0.0}

    Paper: zhang2024knowledge
    Chapter: dimensionality/subspace-training
    """
    before, after = dict(base.named_parameters()), dict(tuned.named_parameters())
    shapes = [{name: tuple(p.shape) for name, p in side.items()} for side in (before, after)]
    if shapes[0] != shapes[1]:
        differ = sorted(name for name in {*before, *after} if shapes[0].get(name) != shapes[1].get(name))
        raise ValueError(f"expected two networks of one architecture, they differ in {differ}")
    return {name: after[name].detach() - before[name].detach() for name in before}


class ATLAS(FrozenModule):
    r"""A network moved along several task vectors, with one learned coefficient per vector and block.

    $\theta^{(b)} = \theta_0^{(b)} + \sum_t \lambda_{t,b}\, \tau_t^{(b)}$. Only $\lambda$ is trained: T vectors times B
    blocks, a few dozen numbers. With `blocks="whole"` there is one coefficient per vector, which is ordinary task
    arithmetic with learned weights.

    Args:
        module: the base network; it is copied.
        task_vectors: dictionaries as `task_vector` makes them, all from this base.
        blocks: "parameter" (every tensor is a block), "whole" (one block), or a function from a parameter's name to
            any label; names with one label form a block.
        initial: first value of every coefficient. 0 starts at the base, 1 / T at the mean of the tuned networks.

    Raises:
        ValueError: no task vectors, or one that does not fit the module.

    >>> base = nn.Linear(3, 2)
    >>> taus = [{"weight": torch.ones(2, 3), "bias": torch.zeros(2)}] * 4
    >>> ATLAS(base, taus).coefficients.shape, ATLAS(base, taus, blocks="whole").coefficients.shape
    (torch.Size([4, 2]), torch.Size([4, 1]))

    Paper: zhang2024knowledge
    Chapter: dimensionality/subspace-training
    """

    def __init__(
        self,
        module: nn.Module,
        task_vectors: Sequence[Mapping[str, Tensor]],
        blocks: str | Callable[[str], object] = "parameter",
        initial: float = 0.0,
    ):
        super().__init__(module)
        if len(task_vectors) == 0:
            raise ValueError("expected at least one task vector, got none")
        if isinstance(blocks, str) and blocks not in ("parameter", "whole"):
            raise ValueError(f"expected blocks 'parameter', 'whole' or a function of the name, got {blocks!r}")
        base = self.base_values()
        for t, vector in enumerate(task_vectors):
            wrong = [n for n in self.names if n not in vector or vector[n].shape != base[n].shape]
            if wrong:
                raise ValueError(f"expected task vector {t} to fit the module, it does not for {wrong}")
        labels = [name if blocks == "parameter" else 0 if blocks == "whole" else blocks(name) for name in self.names]
        self.blocks = list(dict.fromkeys(labels))
        self._block_of = [self.blocks.index(label) for label in labels]
        for i, name in enumerate(self.names):
            self.register_buffer(f"_tau{i}", torch.stack([v[name].detach().to(base[name]) for v in task_vectors]))
        first = base[self.names[0]]
        self.coefficients = nn.Parameter(first.new_full((len(task_vectors), len(self.blocks)), float(initial)))

    def values(self) -> dict[str, Tensor]:
        """Return the parameters the network runs with, by name."""
        delta = {}
        for i, name in enumerate(self.names):
            coefficient = self.coefficients[:, self._block_of[i]]  # (T,)
            delta[name] = torch.tensordot(coefficient, getattr(self, f"_tau{i}"), dims=1)
        return self.moved(delta)

    def forward(self, *args, **kwargs):
        """Run the module at the combined parameters."""
        return self.call(self.values(), *args, **kwargs)

    def to_module(self) -> nn.Module:
        """Return an ordinary module with the combined parameters."""
        return self.export(self.values())
