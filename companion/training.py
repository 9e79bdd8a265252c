"""One training loop, and the same loop for many small models at once.

Public: `fit` trains one model; `fit_many` trains one model per seed as a single stacked model, with `torch.func` and
`vmap`, and returns `ManyModels`; `per_model` lifts a batch transform (mixup, say) to such a stack; `History` keeps the
losses.
"""

import copy
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

from companion import runtime
from companion._stacked import (
    BETAS,
    EPSILON,
    Rows,
    StackedOptimizer,
    StackedState,
    read_shapes,
    stacked_forward,
    stacked_loss,
)
from companion.checks import as_tensor, check_generator, check_in_range, check_positive_int

__all__ = ["History", "ManyModels", "fit", "fit_many", "per_model"]

DELAY = 1.0  # seconds before a progress bar appears, so that short trainings do not flicker
OPTIMIZERS = ("adam", "adamw", "sgd")


@dataclass
class History:
    """What a training run leaves behind.

    Attributes:
        loss: mean training loss per epoch: a list of floats from `fit`, a tensor (epochs, m) from `fit_many`.
    """

    loss: Any = field(default_factory=list)


@torch.enable_grad()
def fit(
    model: nn.Module,
    x: Any,
    y: Any,
    *,
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy,
    epochs: int = 20,
    batch_size: int | None = 128,
    lr: float = 1e-3,
    optimizer: str = "adam",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    schedule: str | Callable[[float], float] | None = None,
    batch_transform: Callable[[Tensor, Any, torch.Generator | None], tuple[Tensor, Any]] | None = None,
    penalty: Callable[[dict[str, Tensor]], Tensor] | None = None,
    callback: Callable[[int, nn.Module], Any] | None = None,
    device: str | torch.device = "auto",
    generator: torch.Generator | int | None = None,
    progress: bool | None = None,
) -> History:
    """Train a model in place by mini-batches and return the history of its loss.

    The model moves to the device, stays there, and comes back in eval mode. Data stay where they are; each batch moves.
    Gradients are recorded, also under `torch.no_grad()`.

    Args:
        model: any module; parameters that do not require a gradient stay as they are.
        x: inputs (n, ...); floats are cast to the dtype of the model, whole numbers are left alone.
        y: targets (n, ...), or a tuple or dict of such tensors, which `loss` then gets batch by batch:
            `y=(labels, weights)` and a loss that weighs is how samples are weighted.
        loss: `loss(outputs, targets)`, a mean over the batch.
        epochs: passes over the data.
        batch_size: the last batch may be smaller; None, or anything of at least n, takes all in one (unshuffled) batch.
        lr: learning rate.
        optimizer: "adam", "adamw" or "sgd", as in `torch.optim`.
        momentum: for "sgd".
        weight_decay: decoupled for "adamw", added to the gradient otherwise.
        schedule: None, "cosine" (from lr to 0, step by step), or a function of the progress in [0, 1) giving a factor.
        batch_transform: `(x, y, generator) -> (x, y)` applied to every batch before the model sees it.
        penalty: `penalty(parameters by name)`, added to the loss.
        callback: `callback(epoch, model)` after each epoch, in eval mode; training stops when it returns True.
        device: see `companion.runtime.device`.
        generator: draws the order of the batches and seeds dropout; a seed will do, None uses torch's default
            generator.
        progress: a progress bar; None shows one on a terminal and in a live notebook, and nowhere else.

    Returns:
        `History` with one mean loss per epoch.

    Raises:
        ValueError: lengths differ, no data, a setting out of range, nothing to train.

    >>> from companion.nets import MLP
    >>> x = torch.linspace(-1, 1, 64)[:, None]
    >>> model, order = MLP((1, 16, 2), seed=0), torch.Generator().manual_seed(0)
    >>> history = fit(model, x, (x[:, 0] > 0).long(), epochs=20, lr=0.01, generator=order, device="cpu")
    >>> len(history.loss), history.loss[-1] < history.loss[0]
    (20, True)
    """
    _check_settings(epochs, batch_size, optimizer, momentum, schedule)
    generator = check_generator(generator)
    check_in_range(lr, "lr", low=0)
    check_in_range(weight_decay, "weight_decay", low=0)
    where = runtime.device(device)
    model.to(where)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("expected a model with parameters that require a gradient, got none")
    dtype = next(iter(trained.values())).dtype
    x, y = _as_data(x, dtype), tree_map(lambda leaf: _as_data(leaf, dtype), y)
    n = _shared_length(x, y)
    optim = _torch_optimizer(optimizer, list(trained.values()), lr, momentum, weight_decay)
    steps, history = _Steps(n, batch_size, epochs, schedule), History()

    with _own_randomness(generator, where):
        for epoch in _epochs(epochs, progress):
            model.train()
            total = torch.zeros((), dtype=dtype, device=where)
            for batch in steps.batches([generator]):
                rows = slice(None) if batch is None else batch[0]
                bx, by = x[rows].to(where), tree_map(lambda leaf, rows=rows: leaf[rows].to(where), y)
                if batch_transform is not None:
                    bx, by = batch_transform(bx, by, generator)
                for group in optim.param_groups:
                    group["lr"] = lr * steps.factor()
                optim.zero_grad()
                value = data_value = loss(model(bx), by)
                if penalty is not None:
                    value = value + penalty(trained)
                value.backward()
                optim.step()
                total += data_value.detach() * (steps.size(batch) / n)
            history.loss.append(total.item())
            model.eval()
            if callback is not None and callback(epoch, model) is True:
                break
    model.eval()
    return history


@torch.enable_grad()
def fit_many(
    make_model: Callable[..., nn.Module],
    seeds: Sequence[int],
    x: Any,
    y: Any,
    *,
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy,
    epochs: int = 20,
    batch_size: int | None = 128,
    lr: float | Sequence[float] = 1e-3,
    optimizer: str = "adam",
    momentum: float = 0.9,
    weight_decay: float | Sequence[float] = 0.0,
    schedule: str | Callable[[float], float] | None = None,
    batch_transform: Callable[[Tensor, Any, torch.Generator], tuple[Tensor, Any]] | None = None,
    penalty: Callable[[dict[str, Tensor]], Tensor] | None = None,
    callback: Callable[[int, "ManyModels"], Any] | None = None,
    device: str | torch.device = "auto",
    generator: torch.Generator | int | None = None,
    progress: bool | None = None,
    stacked: bool | None = None,
) -> "ManyModels":
    """Train one model per seed, all of them at once, as one model with stacked parameters.

    Model i starts from weights drawn with seeds[i] and sees the batches in the order that `fit` takes with
    `generator=torch.Generator().manual_seed(seeds[i])`, so that it ends where `fit` ends, up to rounding. Networks with
    BatchNorm's running averages are refused: use GroupNorm.

    Args:
        make_model: called once per seed, under that seed: `lambda: MLP((2, 16, 2))`; it gets the seed if it takes one.
        seeds: one per model; m of them.
        x: inputs (n, ...) shared by all models, or (m, n, ...), one set per model.
        y: targets (n, ...) or (m, n, ...), or a tuple or dict of such tensors.
        loss: `loss(outputs, targets)` of one model on one batch.
        epochs: passes over the data.
        batch_size: as in `fit`.
        lr: learning rate, or one per model.
        optimizer: "adam", "adamw" or "sgd".
        momentum: for "sgd".
        weight_decay: or one per model.
        schedule: as in `fit`.
        batch_transform: `(x, y, generator) -> (x, y)` on the stacked batch (m, b, ...); see `per_model`.
        penalty: `penalty(parameters by name)` of one model, added to its loss.
        callback: `callback(epoch, many)` after each epoch; training stops when it returns True.
        device: see `companion.runtime.device`.
        generator: what `batch_transform` gets, or its seed; None makes one from the seeds.
        progress: as in `fit`.
        stacked: whether x and y are given per model; None reads it off their shapes: (m, n, ...) and (m, n, ...), m
            being the number of models, are per model, and so is one of them where only that fits.

    Returns:
        `ManyModels`, in eval mode, with `history.loss` of shape (epochs, m).

    Raises:
        ValueError: as in `fit`; models of different shapes; data that fit neither way.

    >>> from companion.nets import MLP
    >>> x = torch.linspace(-1, 1, 64)[:, None]
    >>> y = (x[:, 0] > 0).long()
    >>> many = fit_many(lambda: MLP((1, 16, 2)), [0, 1, 2], x, y, epochs=20, lr=0.01, device="cpu")
    >>> many(x).shape, many.history.loss.shape, bool((many.accuracy(x, y) > 0.9).all())
    (torch.Size([3, 64, 2]), torch.Size([20, 3]), True)
    """
    _check_settings(epochs, batch_size, optimizer, momentum, schedule)
    generator = check_generator(generator)
    seeds = [int(seed) for seed in seeds]
    if not seeds:
        raise ValueError("expected at least one seed, got none")
    where = runtime.device(device)
    many = ManyModels([_make_seeded(make_model, seed).to(where) for seed in seeds])
    m, names = len(many), many._trained
    if not names:
        raise ValueError("expected models with parameters that require a gradient, got none")

    state = StackedState([many.params[name] for name in names])
    many.params.update(zip(names, state.views))
    step = StackedOptimizer(optimizer, state, lr, momentum, weight_decay)
    trained = {name: view.detach().requires_grad_() for name, view in zip(names, state.views)}
    leaves = list(trained.values())
    fixed = {name: p for name, p in many.params.items() if name not in trained}

    x, y = _as_data(x, state.flat.dtype), tree_map(lambda leaf: _as_data(leaf, state.flat.dtype), y)
    x_stacked, y_stacked, n = read_shapes(x, y, m, stacked)
    x, y = Rows(x, x_stacked, m, where), tree_map(lambda leaf: Rows(leaf, y_stacked, m, where), y)
    many._sample_dim = x.sample_dim

    base = many._base
    base.train()

    forward, losses_of = stacked_forward(base), stacked_loss(loss)
    penalties_of = None if penalty is None else vmap(penalty)
    orders = [torch.Generator().manual_seed(seed) for seed in seeds]
    if generator is None:
        generator = torch.Generator().manual_seed(hash(tuple(seeds)) & 0x7FFFFFFF)
    steps, losses = _Steps(n, batch_size, epochs, schedule), []

    with _own_randomness(orders[0], where):
        for epoch in _epochs(epochs, progress):
            base.train()
            total = torch.zeros(m, dtype=state.flat.dtype, device=where)
            for batch in steps.batches(orders):
                rows = None if batch is None else torch.stack(batch).to(where)  # (m, b)
                bx, by = x.take(rows), tree_map(lambda leaf, rows=rows: leaf.take(rows), y)
                if batch_transform is not None:
                    bx, by = batch_transform(bx, by, generator)
                values = losses_of(forward(trained | fixed, many.buffers, bx), by)  # (m,)
                value = values.sum() if penalty is None else (values + penalties_of(trained)).sum()
                # the models share no parameter, so the gradient of the sum holds the gradient of each
                step(torch.autograd.grad(value, leaves, allow_unused=True), steps.factor())
                total += values.detach() * (steps.size(batch) / n)
            losses.append(total)
            many.history.loss = torch.stack(losses).cpu()
            base.eval()
            if callback is not None and callback(epoch, many) is True:
                break
    base.eval()
    return many


class ManyModels:
    """Models of one architecture, evaluated as one: what `fit_many` returns.

    Args:
        models: modules with the same parameter names and shapes; they are copied.

    Attributes:
        params: stacked parameters by name, each (m, ...); detached.
        buffers: stacked buffers by name.
        history: `History`, with `loss` of shape (epochs, m) after training.

    Raises:
        ValueError: no models, models of different shapes, or BatchNorm with running averages.

    >>> from companion.nets import MLP
    >>> many = ManyModels([MLP((2, 8, 3), seed=seed) for seed in range(4)])
    >>> len(many), many(torch.zeros(5, 2)).shape, many.features(torch.zeros(5, 2)).shape
    (4, torch.Size([4, 5, 3]), torch.Size([4, 5, 8]))
    """

    def __init__(self, models: Sequence[nn.Module]):
        models = list(models)
        if not models:
            raise ValueError("expected at least one model, got none")
        shapes = [{name: tuple(t.shape) for name, t in model.state_dict().items()} for model in models]
        if any(other != shapes[0] for other in shapes[1:]):
            raise ValueError("expected models with the same parameter names and shapes, got different ones")
        for name, module in models[0].named_modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
                raise ValueError(
                    f"expected a network without running averages, got {module} at {name!r}: use GroupNorm"
                )
        params, buffers = stack_module_state(models)
        self.params: dict[str, Tensor] = {name: p.detach() for name, p in params.items()}
        self.buffers: dict[str, Tensor] = {name: b.detach() for name, b in buffers.items()}
        self.history = History(loss=torch.zeros(0, len(models)))
        self._trained = [name for name, p in models[0].named_parameters() if p.requires_grad]
        self._base = copy.deepcopy(models[0]).eval()
        self._size = len(models)
        self._sample_dim: int | None = None

    def __len__(self) -> int:
        return self._size

    def __repr__(self) -> str:
        return f"ManyModels({len(self)} x {type(self._base).__name__})"

    def __call__(self, x: Any, *, batch_size: int = 4096, stacked: bool | None = None) -> Tensor:
        """Return the outputs of all models: (m, n, ...).

        A graph is built only where x requires a gradient; the parameters are detached.

        Args:
            x: inputs (n, ...), seen by every model, or (m, n, ...), one set per model.
            batch_size: how many samples per model pass at a time.
            stacked: whether x is given per model; None reads it off the number of dimensions seen in training
                (and means shared for models that were not trained by `fit_many`).
        """
        return self.call(None, x, batch_size=batch_size, stacked=stacked)

    def features(self, x: Any, *, batch_size: int = 4096, stacked: bool | None = None) -> Tensor:
        """Return the penultimate features of all models: (m, n, h), from their method `features`."""
        return self.call("features", x, batch_size=batch_size, stacked=stacked)

    def call(self, method: str | None, x: Any, *, batch_size: int = 4096, stacked: bool | None = None) -> Any:
        """Return what a method of the models, such as "activations", gives for x, stacked over models.

        Args:
            method: name of a method that takes one batch (None: the forward pass).
            x: as in `__call__`.
            batch_size: as in `__call__`.
            stacked: as in `__call__`.
        """
        check_positive_int(batch_size, "batch_size")
        reference = next(iter(self.params.values()))
        x = _as_data(x, reference.dtype).to(reference.device)
        if stacked is None:
            stacked = self._sample_dim is not None and x.dim() == self._sample_dim + 2
        if stacked and x.shape[0] != len(self):
            raise ValueError(f"expected inputs (m, n, ...) for m={len(self)} models, got shape {tuple(x.shape)}")
        module = self._base if method is None else _Method(self._base, method)
        prefix = "" if method is None else "model."
        state = {prefix + name: tensor for name, tensor in (*self.params.items(), *self.buffers.items())}

        def one_model(state: dict[str, Tensor], x: Tensor) -> Any:
            return functional_call(module, state, (x,))

        all_models = vmap(one_model, in_dims=(0, 0 if stacked else None), randomness="different")
        chunks = [all_models(state, chunk) for chunk in x.split(batch_size, dim=int(stacked))]
        return chunks[0] if len(chunks) == 1 else tree_map(lambda *parts: torch.cat(parts, 1), *chunks)

    def accuracy(self, x: Any, y: Any, *, batch_size: int = 4096, stacked: bool | None = None) -> Tensor:
        """Return the share of samples whose largest output is their label, per model: (m,).

        Args:
            x: as in `__call__`.
            y: labels (n,), or (m, n), one set per model.
            batch_size: as in `__call__`.
            stacked: as in `__call__`.
        """
        predicted = self(x, batch_size=batch_size, stacked=stacked).argmax(-1)  # (m, n)
        y = torch.as_tensor(y, device=predicted.device)
        if y.shape not in (predicted.shape, predicted.shape[1:]):
            raise ValueError(f"expected labels (n,) or (m, n) for predictions {tuple(predicted.shape)}, got {y.shape}")
        return (predicted == y).float().mean(1)

    def models(self) -> list[nn.Module]:
        """Return the models one by one, as independent copies in eval mode."""
        singles = []
        for i in range(len(self)):
            single = copy.deepcopy(self._base).eval()
            with torch.no_grad():
                for name, p in single.named_parameters():
                    p.copy_(self.params[name][i])
                for name, b in single.named_buffers():
                    b.copy_(self.buffers[name][i])
            singles.append(single)
        return singles


def per_model(
    transform: Callable[[Tensor, Any, torch.Generator], tuple[Tensor, Any]],
) -> Callable[[Tensor, Any, torch.Generator], tuple[Tensor, Any]]:
    """Lift a batch transform of one model to the stacked batch of `fit_many`: each model's batch is transformed alone.

    Args:
        transform: `(x, y, generator) -> (x, y)` on a batch (b, ...); y may be a tensor, tuple, named tuple or dict.

    Returns:
        The same on a stacked batch (m, b, ...).

    >>> double = per_model(lambda x, y, generator: (2 * x, y))
    >>> x, y = double(torch.ones(3, 4, 2), torch.zeros(3, 4), torch.Generator())
    >>> x.shape, y.shape
    (torch.Size([3, 4, 2]), torch.Size([3, 4]))
    """

    def stacked_transform(x: Tensor, y: Any, generator: torch.Generator) -> tuple[Tensor, Any]:
        pairs = [transform(x[i], tree_map(lambda leaf, i=i: leaf[i], y), generator) for i in range(len(x))]
        xs, ys = zip(*pairs)
        return torch.stack(xs), tree_map(lambda *leaves: torch.stack(leaves), *ys)

    return stacked_transform


class _Method(nn.Module):
    """Makes `functional_call` reach a method other than forward."""

    def __init__(self, model: nn.Module, method: str):
        super().__init__()
        if not callable(getattr(model, method, None)):
            raise ValueError(f"expected a model with a method {method!r}, got {type(model).__name__} without one")
        self.model, self.method = model, method

    def forward(self, x: Tensor) -> Any:
        return getattr(self.model, self.method)(x)


class _Steps:
    """The order of the batches and the learning-rate factor of the current step."""

    def __init__(self, n: int, batch_size: int | None, epochs: int, schedule: str | Callable[[float], float] | None):
        self.n = n
        self.batch_size = n if batch_size is None else min(batch_size, n)
        self.total = epochs * math.ceil(n / self.batch_size)
        self.schedule, self.done = schedule, -1

    def batches(self, generators: Sequence[torch.Generator | None]) -> Iterator[Sequence[Tensor] | None]:
        """Yield the rows of each batch, one tensor per generator; None means all rows in their order."""
        if self.batch_size == self.n:
            self.done += 1
            yield None
            return
        orders = [_permutation(self.n, generator).split(self.batch_size) for generator in generators]
        for batch in zip(*orders):
            self.done += 1
            yield batch

    def size(self, batch: Sequence[Tensor] | None) -> int:
        return self.n if batch is None else len(batch[0])

    def factor(self) -> float:
        progress = self.done / self.total
        if self.schedule is None:
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * progress)) if self.schedule == "cosine" else float(self.schedule(progress))


def _permutation(n: int, generator: torch.Generator | None) -> Tensor:
    where = "cpu" if generator is None else generator.device
    return torch.randperm(n, generator=generator, device=where).cpu()


def _torch_optimizer(
    kind: str, parameters: list[nn.Parameter], lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
    make = torch.optim.Adam if kind == "adam" else torch.optim.AdamW
    return make(parameters, lr=lr, betas=BETAS, eps=EPSILON, weight_decay=weight_decay)


def _make_seeded(make_model: Callable[..., nn.Module], seed: int) -> nn.Module:
    """Call make_model under the seed, with the seed when it asks for one."""
    try:
        parameters = inspect.signature(make_model).parameters
    except (TypeError, ValueError):
        parameters = {}
    required = [
        p
        for p in parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if "seed" in parameters:
            return make_model(seed=seed)
        return make_model(seed) if required else make_model()


@contextmanager
def _own_randomness(generator: torch.Generator | None, where: torch.device) -> Iterator[None]:
    """Seed dropout and the like from a copy of the generator and put torch's own generators back afterwards."""
    if generator is None:
        yield
        return
    clone = torch.Generator(generator.device).set_state(generator.get_state())
    seed = int(torch.randint(2**31, (), generator=clone, device=generator.device))
    cuda = where.type == "cuda"
    with torch.random.fork_rng(devices=[where] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(where):
                torch.cuda.manual_seed(seed)
        yield


def _as_data(data: Any, dtype: torch.dtype) -> Tensor:
    data = as_tensor(data)
    return data.to(dtype) if data.is_floating_point() else data


def _shared_length(x: Tensor, y: Any) -> int:
    lengths = {leaf.shape[0] if leaf.dim() else 0 for leaf in (x, *tree_leaves(y))}
    if len(lengths) != 1 or lengths == {0}:
        shapes = [tuple(leaf.shape) for leaf in (x, *tree_leaves(y))]
        raise ValueError(f"expected inputs and targets for the same n >= 1 samples, got shapes {shapes}")
    return lengths.pop()


def _check_settings(epochs: int, batch_size: int | None, optimizer: str, momentum: float, schedule: Any) -> None:
    check_positive_int(epochs, "epochs")
    if batch_size is not None:
        check_positive_int(batch_size, "batch_size")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"expected an optimizer among {OPTIMIZERS}, got {optimizer!r}")
    check_in_range(momentum, "momentum", low=0)
    if not (schedule is None or schedule == "cosine" or callable(schedule)):
        raise ValueError(f"expected schedule None, 'cosine' or a function of the progress, got {schedule!r}")


def _epochs(epochs: int, progress: bool | None) -> Iterator[int]:
    show = _someone_watches() if progress is None else progress
    return iter(tqdm(range(epochs), unit="epoch", leave=False, delay=DELAY, disable=not show, file=sys.stderr))


def _someone_watches() -> bool:
    """Whether there is a terminal or a live notebook; a notebook that a tool executes has neither."""
    setting = os.environ.get("COMPANION_PROGRESS")
    if setting in ("0", "1"):
        return setting == "1"
    if os.environ.get("CI"):
        return False
    # Jupyter's server and VS Code name the notebook in the kernel's environment; nbclient and nbval do not
    live = "JPY_SESSION_NAME" in os.environ or ("VSCODE_PID" in os.environ and "ipykernel" in sys.modules)
    return sys.stderr.isatty() or live or "google.colab" in sys.modules
