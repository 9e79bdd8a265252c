"""The layers of a model that is frozen or somebody else's: what they read and what they return, in one pass.

Public: `read_layers`, `precision`. The networks of `companion.nets` have their own `activations`; these read any
`nn.Module`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["precision", "read_layers"]


def precision(model: nn.Module, default: torch.dtype | None = None) -> torch.dtype | None:
    """Return the dtype of a model's first floating parameter, in which it wants its input; the default without one.

    >>> precision(nn.Linear(2, 1).half()), precision(nn.ReLU())
    (torch.float16, None)
    """
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), default)


def read_layers(
    model: nn.Module, *args: Any, outputs_of: Sequence[str] = (), inputs_of: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a model in evaluation mode and return what its named layers gave and what they were given.

    Every part of the model is back in the mode it was in, and no hook is left, also after an error. Gradients are
    recorded as usual: call it under `torch.no_grad()` where nothing has to learn.

    Args:
        model: any module.
        *args: what it is called with.
        outputs_of: layers whose outputs are wanted, named as in `model.named_modules()`; "" is the model itself.
        inputs_of: layers whose first input is wanted.

    Returns:
        Outputs by name and inputs by name. A layer that did not run is absent; of one that ran several times, the last
        time counts. Tensors are copies, because what follows a layer may write over them (`nn.ReLU(inplace=True)`);
        anything else, such as a tuple, comes as it is.

    Raises:
        ValueError: no such layer.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True), nn.Linear(3, 1))
    >>> outputs, inputs = read_layers(net, torch.zeros(5, 2), outputs_of=["0", ""], inputs_of=["2"])
    >>> outputs["0"].shape, outputs[""].shape, inputs["2"].shape
    (torch.Size([5, 3]), torch.Size([5, 1]), torch.Size([5, 3]))
    """
    modules = dict(model.named_modules(remove_duplicate=False))  # a shared layer answers to all its names
    for name in (*outputs_of, *inputs_of):
        if name not in modules:
            near = [known for known in modules if known][:20]
            raise ValueError(f"expected layers among {near}, got {name!r}, which is not the name of a module")
    outputs: dict[str, Any] = {}
    inputs: dict[str, Any] = {}

    def keep_output(name: str) -> Any:
        return lambda module, given, output: outputs.update({name: _own(output)})

    def keep_input(name: str) -> Any:
        return lambda module, given, named: inputs.update({name: _own([*given, *named.values(), None][0])})

    handles = [modules[name].register_forward_hook(keep_output(name)) for name in outputs_of]
    handles += [modules[name].register_forward_pre_hook(keep_input(name), with_kwargs=True) for name in inputs_of]
    try:
        with _evaluating(model):
            result = model(*args)
    finally:
        for handle in handles:
            handle.remove()
    if "" in outputs_of:
        outputs[""] = result  # a compiled model returns it without calling its hooks
    return outputs, inputs


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        model.train(modes[model])  # in its own way, in case it does more than to set a flag
        for module, training in modes.items():
            module.training = training
