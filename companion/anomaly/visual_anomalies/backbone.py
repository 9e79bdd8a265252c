"""Where patch features come from: the small shipped network, or any torch backbone you have.

A backbone is a callable that maps images (n, c, h, w) in [0, 1] to a list of feature maps (n, c_l, h_l, w_l). Public:
`TextureNet` and `texture_backbone` (trained by `tools/train_backbone.py`, shipped with the package),
`HookedBackbone` (named layers of any torch model), `load_backbone` (also timm and torchvision, where installed),
`local_patch_features` (the maps as one grid of patch vectors), `check_images`.
"""

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from companion.checks import as_tensor
from companion.layers import read_layers

__all__ = [
    "HookedBackbone",
    "TextureNet",
    "check_images",
    "load_backbone",
    "local_patch_features",
    "texture_backbone",
]

WEIGHTS = Path(__file__).with_name("texture_net.safetensors")
BLOCK = 8  # images at a time on a processor, so that their maps stay in its cache: more than twice as fast as 64
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def check_images(images, name: str = "images", min_samples: int = 1) -> Tensor:
    """Return images as a float tensor (n, c, h, w), or say what is wrong with them.

    Args:
        images: anything `torch.as_tensor` accepts, with four axes and finite values in [0, 1].
        name: what to call them in the message.
        min_samples: how many images there must be.

    Returns:
        The same values, float32 unless they were float64.

    Raises:
        TypeError: the values are not numbers.
        ValueError: wrong number of axes, too few images, NaN or infinity, values outside [0, 1].

    >>> check_images([[[[0.0, 0.5], [1.0, 0.25]]]]).shape
    torch.Size([1, 1, 2, 2])

    Chapter: anomaly/visual-anomalies
    """
    tensor = as_tensor(images, name)
    if tensor.ndim != 4 or 0 in tensor.shape[1:]:
        raise ValueError(f"expected {name} of shape (n, c, h, w), got {tuple(tensor.shape)}")
    if tensor.shape[0] < min_samples:
        raise ValueError(f"expected at least {min_samples} {name}, got {tensor.shape[0]}")
    if tensor.dtype == torch.uint8:
        raise ValueError(f"expected {name} in [0, 1], got bytes: divide by 255")
    tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
    low, high = tensor.aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise ValueError(f"expected finite {name}, got NaN or infinity")
    if low < -1e-6 or high > 1 + 1e-6:
        raise ValueError(f"expected {name} in [0, 1], got values from {low:.3g} to {high:.3g}")
    return tensor


class TextureNet(nn.Module):
    """Three stages of plain convolutions, strides 2, 4 and 8, without any normalisation across the image.

    Reflection padding keeps borders from looking odd; no layer mixes far positions, so a patch feature depends on its
    neighbourhood only. Grey images are repeated over three channels.

    Args:
        widths: channels of the three stages.
        n_classes: size of the classification head that is used in training and then left alone.
        layers: which stages `forward` returns, counted from 1.
        seed: initialises the weights.

    >>> [tuple(m.shape) for m in TextureNet(seed=0)(torch.zeros(2, 1, 64, 64))]
    [(2, 48, 16, 16), (2, 48, 8, 8)]

    Chapter: anomaly/visual-anomalies
    """

    def __init__(
        self,
        widths: Sequence[int] = (32, 48, 48),
        n_classes: int = 48,
        layers: Sequence[int] = (2, 3),
        seed: int | None = None,
    ):
        super().__init__()
        if not layers or not set(layers) <= set(range(1, len(widths) + 1)):
            raise ValueError(f"expected layers among 1..{len(widths)}, got {tuple(layers)}")
        self.layers = tuple(layers)
        with torch.random.fork_rng(devices=[]):
            if seed is not None:
                torch.manual_seed(seed)
            stages, previous = [], 3
            for width in widths:
                stages.append(
                    nn.Sequential(
                        nn.Conv2d(previous, width, 3, padding=1, padding_mode="reflect"),
                        nn.ReLU(),
                        nn.Conv2d(width, width, 3, stride=2, padding=1, padding_mode="reflect"),
                        nn.ReLU(),
                    )
                )
                previous = width
            self.stages = nn.ModuleList(stages)
            self.head = nn.Linear(previous, n_classes)
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                    nn.init.zeros_(module.bias)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the output of every stage."""
        return self._maps(images, len(self.stages))

    def _maps(self, images: Tensor, n: int) -> list[Tensor]:
        h = (images.expand(-1, 3, -1, -1) - 0.5) * 4
        maps = []
        for stage in self.stages[:n]:
            h = stage(h)
            maps.append(h)
        return maps

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the chosen stages' feature maps."""
        blocks = images.split(BLOCK) if images.device.type == "cpu" else [images]
        maps = [self._maps(block, max(self.layers)) for block in blocks]
        return [torch.cat([stages[layer - 1] for stages in maps]) for layer in self.layers]

    def logits(self, images: Tensor) -> Tensor:
        """Return the texture classifier's logits, used in training only."""
        return self.head(self.maps(images)[-1].mean((2, 3)))


@lru_cache(maxsize=4)
def texture_backbone(layers: Sequence[int] = (2, 3)) -> TextureNet:
    """Return the shipped `TextureNet`, frozen, trained to tell 48 procedural textures apart.

    It has seen no defect and none of the textures the chapters test on; `tools/train_backbone.py` makes the file.

    >>> sum(p.numel() for p in texture_backbone().parameters()) < 250_000
    True

    Chapter: anomaly/visual-anomalies
    """
    from safetensors.torch import load_file

    net = TextureNet(layers=layers, seed=0)
    net.load_state_dict(load_file(WEIGHTS))
    return net.eval().requires_grad_(False)


class HookedBackbone(nn.Module):
    """Named layers of any torch model as a backbone, read with forward hooks.

    Convolutional outputs are taken as they are; transformer tokens (n, t, c) are laid out on a square grid after any
    prefix tokens are dropped. Hooks live only during the call, so the model is left as it was.

    Args:
        model: any `nn.Module` that takes images; it is frozen and set to eval mode.
        layers: names as in `model.named_modules()`.
        mean: subtracted per channel before the model sees an image.
        std: divides per channel.

    Raises:
        ValueError: a layer does not exist, did not run, or gave something that is not a map.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3, stride=2))
    >>> [tuple(m.shape) for m in HookedBackbone(net, ["0", "2"])(torch.zeros(1, 3, 16, 16))]
    [(1, 4, 14, 14), (1, 8, 6, 6)]

    Chapter: anomaly/visual-anomalies
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ):
        super().__init__()
        names = dict(model.named_modules())
        missing = [layer for layer in layers if layer not in names]
        if missing or not layers:
            raise ValueError(f"expected layers among {list(names)[1:20]}..., got {missing or 'none'}")
        self.model = model.eval().requires_grad_(False)
        self.layers = tuple(layers)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "HookedBackbone":
        """Stay in eval mode: a frozen backbone must not update its batch statistics."""
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one map per layer."""
        scaled = (images.expand(-1, len(self.mean.flatten()), -1, -1) - self.mean) / self.std
        kept, _ = read_layers(self.model, scaled, outputs_of=self.layers)
        return [_as_map(kept.get(name), name) for name in self.layers]


def _as_map(out, name: str) -> Tensor:
    if isinstance(out, Tensor) and out.ndim == 4:
        return out
    if isinstance(out, Tensor) and out.ndim == 3:  # tokens (n, t, c)
        side = int(out.shape[1] ** 0.5)
        return out[:, out.shape[1] - side * side :].transpose(1, 2).unflatten(2, (side, side))
    what = "nothing (it did not run)" if out is None else getattr(out, "shape", type(out).__name__)
    raise ValueError(f"expected a map or tokens from layer {name!r}, got {what}")


def load_backbone(name: str = "texture", layers: Sequence[str] | None = None) -> nn.Module:
    """Return a frozen backbone by name.

    Args:
        name: "texture" for the shipped network, "timm:NAME" or "torchvision:NAME" for a pretrained one.
        layers: names of the layers to read; the default suits residual networks.

    Raises:
        ImportError: the library of that name is not installed.
        ValueError: the name has another form.

    >>> load_backbone().layers
    (2, 3)

    Chapter: anomaly/visual-anomalies
    """
    if name == "texture":
        return texture_backbone()
    library, _, model = name.partition(":")
    if library not in ("timm", "torchvision") or not model:
        raise ValueError(f"expected 'texture', 'timm:NAME' or 'torchvision:NAME', got {name!r}")
    try:
        if library == "timm":
            import timm

            net = timm.create_model(model, pretrained=True, num_classes=0)
        else:
            import torchvision

            net = torchvision.models.get_model(model, weights="DEFAULT")
    except ImportError as error:
        raise ImportError(f"backbone {name!r} needs {library}: pip install {library}") from error
    return HookedBackbone(net, layers or ("layer2", "layer3"))


@torch.no_grad()
def local_patch_features(
    images: Tensor,
    backbone: Callable[[Tensor], list[Tensor]] | None = None,
    patch: int = 3,
    batch_size: int = 64,
) -> Tensor:
    r"""Return the grid of patch vectors of each image.

    Every map is averaged over $p \times p$ neighbourhoods, resized to the grid of the finest map, and all maps are
    joined along the channels: $x_{ij} = [\mathrm{mean}_{N_p(i,j)} \phi_1, \ldots, \mathrm{mean}_{N_p(i,j)} \phi_L]$.

    Args:
        images: (n, c, h, w) in [0, 1].
        backbone: images to a list of maps; None is the shipped network. A module on another device is copied to the
            images' device: put a large one there yourself.
        patch: side p of the averaged neighbourhood, odd.
        batch_size: images per forward pass, which bounds the memory.

    Returns:
        (n, rows, columns, channels) on the device of the images.

    >>> local_patch_features(torch.rand(2, 1, 64, 64)).shape
    torch.Size([2, 16, 16, 96])

    Paper: liu2023simplenet
    Chapter: anomaly/visual-anomalies
    """
    images = check_images(images)
    if patch < 1 or patch % 2 == 0:
        raise ValueError(f"expected an odd patch of at least 1, got {patch}")
    backbone = texture_backbone() if backbone is None else backbone
    weight = next(backbone.parameters(), None) if isinstance(backbone, nn.Module) else None
    if weight is not None and weight.device != images.device:
        backbone = copy.deepcopy(backbone).to(images.device)  # the caller's own stays where it is
    grids = []
    for batch in images.to(torch.float32 if weight is None else weight.dtype).split(batch_size):
        maps = [F.avg_pool2d(m, patch, 1, patch // 2, count_include_pad=False) for m in backbone(batch)]
        size = maps[0].shape[2:]
        maps = [maps[0], *(F.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps[1:])]
        grids.append(torch.cat(maps, 1).permute(0, 2, 3, 1))
    return torch.cat(grids)
