"""The few small networks the book uses, with penultimate features and named layers at hand.

Public: `MLP`, `SmallCNN`, `SmallResNet`. Each is a `body` of named layers, whose output `features(x)` returns, and a
linear `head`. Nothing in them depends on the rest of the batch (GroupNorm or no norm, never BatchNorm), so that
`companion.training.fit_many` can train many of them as one.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn

from companion.checks import check_positive_int

__all__ = ["MLP", "SmallCNN", "SmallResNet"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "identity": nn.Identity,
}


def _activation(activation: str | Callable[[], nn.Module]) -> nn.Module:
    if callable(activation):
        return activation()
    if activation not in ACTIVATIONS:
        raise ValueError(f"expected an activation among {sorted(ACTIVATIONS)} or a module class, got {activation!r}")
    return ACTIVATIONS[activation]()


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Draw the weights from a stream of their own; with None, from torch's default generator as usual."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed: that would also reseed the cuda generators, which are not forked here
        torch.default_generator.manual_seed(seed)
        yield


def _groups(channels: int) -> int:
    return next(g for g in (8, 4, 2, 1) if channels % g == 0)


class _Network(nn.Module):
    """A body of named layers and a linear head."""

    body: nn.Sequential
    head: nn.Linear

    def features(self, x: Tensor) -> Tensor:
        """Return the penultimate features, what the head reads: (n, h)."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return `head(features(x))`: (n, n_classes)."""
        return self.head(self.features(x))

    def named_layers(self) -> dict[str, nn.Module]:
        """Return the layers by name, in the order in which the input passes through them; the last is "head"."""
        return {**dict(self.body.named_children()), "head": self.head}

    def activations(self, x: Tensor) -> dict[str, Tensor]:
        """Return the output of every named layer, in order, from one forward pass."""
        outputs = {}
        for name, layer in self.named_layers().items():
            x = outputs[name] = layer(x)
        return outputs


class MLP(_Network):
    r"""A multilayer perceptron, $z = W_L\,\sigma(W_{L-1} \cdots \sigma(W_1 x + b_1) \cdots) + b_L$.

    Inputs with more than two dimensions, such as images, are flattened first. With `activation="identity"` it is a deep
    linear network; with two dims it is a linear classifier whose features are the (flattened) inputs.

    Args:
        dims: sizes from input to output, (in, hidden, ..., out).
        activation: "relu", "leaky_relu", "gelu", "silu", "tanh", "sigmoid", "identity", or a module class.
        bias: whether the linear layers have biases.
        seed: of the initial weights; None draws them from torch's default generator.

    Raises:
        ValueError: fewer than two dims, a dim below one, or an unknown activation.

    >>> net = MLP((2, 16, 8, 3), seed=0)
    >>> x = torch.zeros(5, 2)
    >>> net(x).shape, net.features(x).shape, list(net.named_layers())
    (torch.Size([5, 3]), torch.Size([5, 8]), ['layer1', 'layer2', 'head'])
    """

    def __init__(
        self,
        dims: Sequence[int],
        activation: str | Callable[[], nn.Module] = "relu",
        bias: bool = True,
        seed: int | None = None,
    ):
        super().__init__()
        self.dims = tuple(check_positive_int(d, "dims") for d in dims)
        if len(self.dims) < 2:
            raise ValueError(f"expected dims (in, hidden, ..., out) with at least two sizes, got {self.dims}")
        *sizes, n_out = self.dims
        with _seeded(seed):
            layers = OrderedDict(
                (
                    f"layer{i}",
                    nn.Sequential(
                        OrderedDict(linear=nn.Linear(n_in, n_hidden, bias=bias), activation=_activation(activation))
                    ),
                )
                for i, (n_in, n_hidden) in enumerate(pairwise(sizes), start=1)
            )
            self.body = nn.Sequential(layers)
            self.head = nn.Linear(sizes[-1], n_out, bias=bias)

    def features(self, x: Tensor) -> Tensor:
        """Return the penultimate features: (n, h)."""
        return self.body(x.flatten(1))

    def activations(self, x: Tensor) -> dict[str, Tensor]:
        """Return the output of every named layer, in order, from one forward pass."""
        return super().activations(x.flatten(1))


class _GlobalAverage(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((-2, -1))


class SmallCNN(_Network):
    """Two convolutions, each halving the image, and a linear head.

    The features are channel averages over the image, so that any image of at least 4 x 4 will do; with an `image_size`
    the last map is flattened instead, which keeps where things are.

    Args:
        in_channels: of the images (n, in_channels, height, width).
        n_classes: outputs.
        width: channels of the first convolution; the second has twice as many.
        image_size: side of the square images, to flatten instead of averaging.
        seed: of the initial weights; None draws them from torch's default generator.

    Raises:
        ValueError: a size below one, or an `image_size` below 4.

    >>> net = SmallCNN(in_channels=1, n_classes=10, width=8, seed=0)
    >>> net(torch.zeros(5, 1, 28, 28)).shape, net.features(torch.zeros(5, 1, 8, 8)).shape
    (torch.Size([5, 10]), torch.Size([5, 16]))
    """

    def __init__(
        self,
        in_channels: int = 1,
        n_classes: int = 10,
        width: int = 16,
        image_size: int | None = None,
        seed: int | None = None,
    ):
        super().__init__()
        for value, name in ((in_channels, "in_channels"), (n_classes, "n_classes"), (width, "width")):
            check_positive_int(value, name)
        if image_size is not None and check_positive_int(image_size, "image_size") < 4:
            raise ValueError(
                f"expected an image_size of at least 4, because the image is halved twice, got {image_size}"
            )
        with _seeded(seed):
            self.body = nn.Sequential(
                OrderedDict(
                    conv1=nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
                    conv2=nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
                    pool=_GlobalAverage() if image_size is None else nn.Flatten(),
                )
            )
            self.head = nn.Linear(2 * width * (1 if image_size is None else (image_size // 4) ** 2), n_classes)


class _ResidualBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))), with a 1 x 1 convolution on the shortcut where the shape changes."""

    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(_groups(n_in), n_in)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(_groups(n_out), n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        same = stride == 1 and n_in == n_out
        self.shortcut = nn.Identity() if same else nn.Conv2d(n_in, n_out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x).relu())
        return self.shortcut(x) + self.conv2(self.norm2(h).relu())


class SmallResNet(_Network):
    """A residual network of three stages with GroupNorm; each stage after the first halves the image.

    Args:
        in_channels: of the images (n, in_channels, height, width), at least 4 x 4.
        n_classes: outputs.
        width: channels of the first stage; the others have two and four times as many.
        depth: residual blocks per stage.
        seed: of the initial weights; None draws them from torch's default generator.

    Raises:
        ValueError: a size below one.

    >>> net = SmallResNet(in_channels=3, n_classes=10, width=8, seed=0)
    >>> net.features(torch.zeros(2, 3, 16, 16)).shape, list(net.named_layers())
    (torch.Size([2, 32]), ['stem', 'stage1', 'stage2', 'stage3', 'pool', 'head'])
    """

    def __init__(
        self, in_channels: int = 3, n_classes: int = 10, width: int = 16, depth: int = 1, seed: int | None = None
    ):
        super().__init__()
        sizes = ((in_channels, "in_channels"), (n_classes, "n_classes"), (width, "width"), (depth, "depth"))
        for value, name in sizes:
            check_positive_int(value, name)
        with _seeded(seed):
            layers: OrderedDict[str, nn.Module] = OrderedDict(
                stem=nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
            )
            n_in = width
            for stage, n_out in enumerate((width, 2 * width, 4 * width), start=1):
                blocks = [_ResidualBlock(n_in, n_out, stride=1 if stage == 1 else 2)]
                blocks += [_ResidualBlock(n_out, n_out, stride=1) for _ in range(depth - 1)]
                layers[f"stage{stage}"] = nn.Sequential(*blocks)
                n_in = n_out
            layers["pool"] = nn.Sequential(nn.GroupNorm(_groups(n_in), n_in), nn.ReLU(), _GlobalAverage())
            self.body = nn.Sequential(layers)
            self.head = nn.Linear(n_in, n_classes)
