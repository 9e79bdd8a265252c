"""The machinery under `companion.training.fit_many`: parameters, optimizer, data and forward pass of m stacked models.

Private to the package; `companion.training` is what people import.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_leaves

from companion.checks import check_in_range
from companion.nets import ACTIVATIONS, MLP

__all__ = ["Rows", "StackedOptimizer", "StackedState", "read_shapes", "stacked_forward", "stacked_loss"]

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class StackedState:
    """All trained parameters of all models in one matrix, so that the optimizer is a handful of operations."""

    def __init__(self, tensors: list[Tensor]):
        if len({t.dtype for t in tensors}) > 1:
            raise ValueError("expected trained parameters of one dtype")
        m = tensors[0].shape[0]
        self.flat = torch.cat([t.reshape(m, -1) for t in tensors], 1)  # (m, parameters of one model)
        self.grad = torch.zeros_like(self.flat)
        sizes = [t[0].numel() for t in tensors]
        self.views = [part.view(t.shape) for part, t in zip(self.flat.split(sizes, 1), tensors)]
        self.grad_views = [part.view(t.shape) for part, t in zip(self.grad.split(sizes, 1), tensors)]

    def collect(self, grads: Sequence[Tensor | None]) -> Tensor:
        """Write the gradients, one per tensor, into one matrix; None counts as zero."""
        grads = [torch.zeros_like(view) if g is None else g for g, view in zip(grads, self.grad_views)]
        torch._foreach_copy_(self.grad_views, grads)
        return self.grad


class StackedOptimizer:
    """Adam, AdamW and SGD with momentum as in `torch.optim`, on stacked parameters, with settings per model."""

    def __init__(self, kind: str, state: StackedState, lr: Any, momentum: float, weight_decay: Any):
        self.kind, self.state, self.momentum = kind, state, momentum
        self.lr, self.weight_decay = (
            _per_model(lr, "lr", state.flat),
            _per_model(weight_decay, "weight_decay", state.flat),
        )
        self.decays = bool(torch.as_tensor(self.weight_decay).any())
        self.count = 0
        self.first = torch.zeros_like(state.flat)
        self.second = torch.zeros_like(state.flat) if kind != "sgd" else None

    @torch.no_grad()
    def __call__(self, grads: Sequence[Tensor | None], factor: float) -> None:
        flat, grad, lr = self.state.flat, self.state.collect(grads), self.lr * factor
        self.count += 1
        if self.decays:
            if self.kind == "adamw":
                flat.mul_(1 - lr * self.weight_decay)
            else:
                grad.add_(flat * self.weight_decay)
        if self.kind == "sgd":
            update = self.first.mul_(self.momentum).add_(grad) if self.momentum else grad
        else:
            self.first.lerp_(grad, 1 - BETAS[0])
            self.second.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
            scale = 1 / math.sqrt(1 - BETAS[1] ** self.count)
            update = self.first / (self.second.sqrt().mul_(scale).add_(EPSILON))
            lr = lr / (1 - BETAS[0] ** self.count)
        if isinstance(lr, Tensor):
            flat.sub_(lr * update)
        else:
            flat.sub_(update, alpha=lr)


class Rows:
    """Picks the rows of a batch for every model, from data that are shared or per model."""

    def __init__(self, data: Tensor, stacked: bool, m: int, where: torch.device):
        self.shape = data.shape[1 + stacked :]
        self.sample_dim, self.m = len(self.shape), m
        self.n = data.shape[int(stacked)]
        self.rows = data.to(where).reshape(-1, *self.shape)
        self.offset = torch.arange(m, device=where)[:, None] * (self.n if stacked else 0)
        self.stacked = stacked

    def take(self, rows: Tensor | None) -> Tensor:
        """Return the rows (m, b) of each model, (m, b, ...), or with None all rows."""
        if rows is None:
            if self.stacked:
                return self.rows.view(self.m, self.n, *self.shape)
            return self.rows.expand(self.m, *self.rows.shape)
        if self.stacked:
            rows = rows + self.offset
        return self.rows.index_select(0, rows.flatten()).view(*rows.shape, *self.shape)


def _per_model(value: Any, name: str, flat: Tensor) -> float | Tensor:
    values = [value] if isinstance(value, int | float) else torch.as_tensor(value).flatten().tolist()
    for v in values:
        check_in_range(v, name, low=0)
    if isinstance(value, int | float):
        return float(value)
    if len(values) != len(flat):
        raise ValueError(f"expected one {name}, or one per model ({len(flat)}), got {len(values)}")
    return torch.tensor(values, dtype=flat.dtype, device=flat.device)[:, None]


def stacked_forward(model: nn.Module) -> Callable[[dict[str, Tensor], dict[str, Tensor], Tensor], Any]:
    """Return `(parameters, buffers, x) -> outputs` for stacked models of this architecture, x being (m, b, ...).

    A chain of linear layers and activations becomes one `baddbmm` per layer, which for tiny networks takes a third of
    the time of `vmap`; everything else goes through `vmap`.
    """
    chain = _chain(model)

    def one_model(params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Any:
        return functional_call(model, (params, buffers), (x,))

    general = vmap(one_model, randomness="different")

    def forward(params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        if isinstance(model, MLP):
            x = x.flatten(2)
        if x.dim() != 3:
            return general(params, buffers, x)
        for name, layer in chain:
            if not isinstance(layer, nn.Linear):
                x = layer(x)
            elif layer.bias is None:
                x = x @ params[f"{name}.weight"].mT
            else:
                x = torch.baddbmm(params[f"{name}.bias"][:, None], x, params[f"{name}.weight"].mT)
        return x

    return general if chain is None else forward


def _chain(model: nn.Module) -> list[tuple[str, nn.Module]] | None:
    """Return the layers of a plain chain of linear layers and activations by name, or None if it is not one."""
    if type(model) not in (MLP, nn.Sequential):
        return None
    plain = (nn.Linear, *ACTIVATIONS.values())
    chain = []
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return None
        if type(module) in (MLP, nn.Sequential):
            continue
        # exact types: a subclass or a parametrized layer computes something else
        if type(module) not in plain:
            return None
        chain.append((name, module))
    shared = len({id(p) for _, layer in chain for p in layer.parameters()}) < sum(
        len(list(layer.parameters())) for _, layer in chain
    )
    return None if shared or not chain else chain


def stacked_loss(loss: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
    """Return the loss of one model as a function of stacked outputs and targets: (m,)."""
    each = vmap(loss, randomness="different")
    if loss is not F.cross_entropy:
        return each

    def cross_entropy(outputs: Any, y: Any) -> Tensor:
        if not isinstance(outputs, Tensor) or not isinstance(y, Tensor) or outputs.dim() != 3:
            return each(outputs, y)
        m, b = outputs.shape[:2]
        values = F.cross_entropy(outputs.flatten(0, 1), y.flatten(0, 1), reduction="none").view(m, b)
        # as F.cross_entropy does, leave samples with the label -100 out of the mean
        return values.mean(1) if y.is_floating_point() else values.sum(1) / (y != -100).sum(1)

    return cross_entropy


def read_shapes(x: Tensor, y: Any, m: int, stacked: bool | None) -> tuple[bool, bool, int]:
    """Say whether x and y are given per model, and how many samples each model has."""
    leaves = tree_leaves(y)
    for x_stacked, y_stacked in ((True, True), (False, False), (False, True), (True, False)):
        if stacked is not None and not x_stacked == y_stacked == stacked:
            continue
        # inputs of shape (m, n) would be n single numbers per model, which no network takes
        if x.dim() < 1 or (x_stacked and x.dim() < (2 if stacked else 3)):
            continue
        n = x.shape[int(x_stacked)]
        x_lead, y_lead = ((m, n) if per_model else (n,) for per_model in (x_stacked, y_stacked))
        if n and all(t.shape[: len(lead)] == lead for t, lead in [(x, x_lead), *((leaf, y_lead) for leaf in leaves)]):
            return x_stacked, y_stacked, n
    raise ValueError(
        f"expected inputs and targets (n, ...), or (m, n, ...) for m={m} models, with the same n >= 1, "
        f"got shapes {tuple(x.shape)} and {[tuple(leaf.shape) for leaf in leaves]}"
    )
