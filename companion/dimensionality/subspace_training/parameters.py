"""Running a network with parameters that come from somewhere else: the plumbing every mechanism here shares.

Public: `train_only`, `trainable_count`, `FrozenModule`.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["FrozenModule", "train_only", "trainable_count"]

Selection = type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[str, nn.Parameter], bool]


def _selected_names(module: nn.Module, which: Selection) -> set[str]:
    if isinstance(which, type) or (isinstance(which, tuple) and which and all(isinstance(w, type) for w in which)):
        names = set()
        for path, child in module.named_modules():
            if isinstance(child, which):
                own = child.named_parameters(prefix=path, recurse=False)
                names |= {name for name, _ in own}
        return names
    if callable(which):
        return {name for name, p in module.named_parameters(remove_duplicate=False) if which(name, p)}
    raise TypeError(f"expected a module class, a tuple of them or a function (name, parameter) -> bool, got {which!r}")


def train_only(module: nn.Module, which: Selection) -> list[str]:
    r"""Freeze a module in place, except the parameters that are chosen.

    With $\theta = (\theta_S, \theta_{\bar S})$ only $\theta_S$ keeps `requires_grad`; everything else stays where its
    random or pretrained value put it. `train_only(net, nn.BatchNorm2d)` is the experiment of the paper.

    Args:
        module: any module; its `requires_grad` flags are changed, its values are not.
        which: a module class, a tuple of classes (their own parameters are trained), or a function that takes a
            parameter's name and value and says whether to train it.

    Returns:
        The names of the parameters that stay trainable, in the module's order. A tied weight is trainable when any
        of its names is chosen.

    Raises:
        ValueError: nothing was chosen, so nothing would be trained.
        TypeError: `which` is neither a class nor a function.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    >>> train_only(net, nn.BatchNorm2d)
    ['1.weight', '1.bias']
    >>> trainable_count(net)
    8

    Paper: frankle2021training
    Chapter: dimensionality/subspace-training
    """
    chosen = _selected_names(module, which)
    if not chosen:
        kinds = sorted(
            {type(m).__name__ for m in module.modules() if next(m.parameters(recurse=False), None) is not None}
        )
        raise ValueError(f"expected {which!r} to choose at least one parameter; the module has parameters in {kinds}")
    named = list(module.named_parameters(remove_duplicate=False))
    trained = {id(p) for name, p in named if name in chosen}
    for _, parameter in named:
        parameter.requires_grad_(id(parameter) in trained)
    return [name for name, p in module.named_parameters() if id(p) in trained]


def trainable_count(module: nn.Module) -> int:
    """Return how many numbers an optimizer would change: the trainable parameters, tied ones counted once.

    >>> trainable_count(nn.Linear(3, 2))
    8

    Paper: frankle2021training
    Chapter: dimensionality/subspace-training
    """
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


class FrozenModule(nn.Module):
    """A copy of a module that owns no parameters: its values became buffers and can be replaced in each call.

    Layers whose weights are computed (from a point in a subspace, from task vectors, from another network) derive
    from it. They then list as parameters only what they train, move with `.to()`, follow `.train()` and `.eval()`,
    and stack under `torch.func`. Tied weights stay tied and buffers (running statistics) stay live.

    Args:
        module: any module. It is copied, not changed.

    Attributes:
        names: the parameters that may be replaced: those with `requires_grad`, tied ones once.
        shapes: their shapes, in the same order.

    Raises:
        ValueError: the module has no trainable parameter, or one that is not materialised yet.

    >>> frozen = FrozenModule(nn.Linear(2, 2))
    >>> list(frozen.parameters()), frozen.names
    ([], ['weight', 'bias'])

    Paper: li2018measuring
    Chapter: dimensionality/subspace-training
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters()):
            raise ValueError("expected a module whose lazy parameters have been materialised by a first batch")
        named = list(module.named_parameters())
        # replacing a tied weight means replacing it under every name it has
        aliases = {id(p): [] for _, p in named}
        for name, p in module.named_parameters(remove_duplicate=False):
            aliases[id(p)].append(name)
        self._aliases = {name: tuple(aliases[id(p)]) for name, p in named}
        self.names = [name for name, p in named if p.requires_grad and p.is_floating_point()]
        if not self.names:
            raise ValueError("expected a module with at least one trainable floating-point parameter, got none")
        values = dict(named)
        self.shapes = [tuple(values[name].shape) for name in self.names]
        self.module = copy.deepcopy(module)
        for child in self.module.modules():
            for name, parameter in list(child._parameters.items()):
                if parameter is not None:
                    del child._parameters[name]
                    child.register_buffer(name, parameter.detach().clone())

    @property
    def size(self) -> int:
        """How many numbers the replaceable parameters hold together."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    def base_values(self) -> dict[str, Tensor]:
        """Return the frozen values theta_0 by name."""
        return {name: self.module.get_buffer(name) for name in self.names}

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Cut a vector of `size` numbers into one tensor per replaceable parameter.

        Raises:
            ValueError: the vector has another length.
        """
        if flat.shape != (self.size,):
            raise ValueError(f"expected a vector of {self.size} numbers, got shape {tuple(flat.shape)}")
        pieces = flat.split([torch.Size(shape).numel() for shape in self.shapes])
        return {name: piece.view(shape) for name, piece, shape in zip(self.names, pieces, self.shapes, strict=True)}

    def moved(self, delta: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return theta_0 + delta by name, in the dtype of each parameter."""
        return {name: base + delta[name].to(base.dtype) for name, base in self.base_values().items()}

    def call(self, values: dict[str, Tensor], *args, **kwargs):
        """Run the module with these values in place of its own."""
        everywhere = {alias: value for name, value in values.items() for alias in self._aliases[name]}
        # a weight that is tied but frozen lost its tie when it became a buffer; its values agree, so nothing is lost
        return functional_call(self.module, everywhere, args, kwargs, tie_weights=False)

    @torch.no_grad()
    def export(self, values: dict[str, Tensor]) -> nn.Module:
        """Return an ordinary module with these values as its parameters, ties included."""
        module = copy.deepcopy(self.module)
        for name, aliases in self._aliases.items():
            trained = name in values
            value = values[name] if trained else module.get_buffer(name)
            parameter = nn.Parameter(value.detach().clone(), requires_grad=trained)
            for alias in aliases:
                path, _, leaf = alias.rpartition(".")
                owner = module.get_submodule(path)
                del owner._buffers[leaf]
                owner.register_parameter(leaf, parameter)
        return module
