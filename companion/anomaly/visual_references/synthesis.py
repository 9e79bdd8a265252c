"""Recombine what four real defects show: shape from one, contrast from another, and a mask that comes with it.

Public: `make_factor_defects`, `AttributeTokenGenerator`, `synth_augment`, `decoupled_alignment_loss`,
`train_segmenter`, `mask_iou`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from companion.anomaly.visual_anomalies.parts import SmallUNet
from companion.checks import check_positive_int
from companion.runtime import has_fused

__all__ = [
    "CONTRASTS",
    "SHAPES",
    "AttributeTokenGenerator",
    "FactorDefects",
    "decoupled_alignment_loss",
    "make_factor_defects",
    "mask_iou",
    "synth_augment",
    "train_segmenter",
]

SHAPES = ("disc", "bar", "ring")
CONTRASTS = (-0.3, 0.18, 0.45)


class FactorDefects(NamedTuple):
    """`images` (n, 1, s, s) in [0, 1]; `masks` (n, s, s) bool; `pairs` (n, 2): shape and contrast of each defect."""

    images: Tensor
    masks: Tensor
    pairs: Tensor


def make_factor_defects(
    n: int,
    pairs: Sequence[tuple[int, int]] | None,
    size: int = 32,
    generator: torch.Generator | None = None,
) -> FactorDefects:
    """Draw brushed plates with one defect each, whose shape and contrast are two separate factors.

    Args:
        n: pictures.
        pairs: (shape, contrast) indices into `SHAPES` and `CONTRASTS`, taken in turn; None for whole plates.
        size: side in pixels.
        generator: a cpu generator; None means torch's default one.

    >>> data = make_factor_defects(2, [(0, 1)], generator=torch.Generator().manual_seed(0))
    >>> data.images.shape, data.pairs.tolist()
    (torch.Size([2, 1, 32, 32]), [[0, 1], [0, 1]])

    Paper: dai2025seas
    Chapter: anomaly/visual-references
    """
    check_positive_int(n, "n")
    y, x = torch.meshgrid(torch.arange(size).float(), torch.arange(size).float(), indexing="ij")
    images = 0.5 + 0.03 * torch.randn(n, size, 1, generator=generator)
    images = images + 0.03 * torch.randn(n, size, size, generator=generator)
    r = torch.rand(n, 4, 1, 1, generator=generator)
    if pairs is None:
        empty = torch.zeros(n, size, size, dtype=torch.bool)
        return FactorDefects(images.clamp(0, 1)[:, None], empty, torch.full((n, 2), -1))
    which = torch.tensor([pairs[i % len(pairs)] for i in range(n)])
    cx, cy, turn = size * (0.25 + 0.5 * r[:, 0]), size * (0.25 + 0.5 * r[:, 1]), math.pi * r[:, 2]
    u = (x - cx) * turn.cos() + (y - cy) * turn.sin()
    v = (y - cy) * turn.cos() - (x - cx) * turn.sin()
    radius = (u.square() + v.square()).sqrt()
    shape = which[:, 0, None, None]
    masks = torch.where(
        shape == 0, radius <= 3.2, torch.where(shape == 1, (u.abs() <= 6) & (v.abs() <= 1.3), (radius - 4.3).abs() <= 1)
    )
    contrast = torch.tensor(CONTRASTS)[which[:, 1], None, None]
    return FactorDefects((images + contrast * masks).clamp(0, 1)[:, None], masks, which)


class AttributeTokenGenerator:
    """Read shape and contrast tokens from a few masked defects, and render any pair of them on a normal image.

    A shape token is the defect's mask about its centre; a contrast token is the mean difference to the surround, with
    what is left over kept as texture. A stand-in for the fine-tuned diffusion model of the paper: the tokens are
    measured on the crops, not fine-tuned, and the way they combine is given.

    Args:
        reach: half the side of the square that holds a shape token.

    >>> seen = make_factor_defects(2, [(0, 0), (1, 1)], generator=torch.Generator().manual_seed(0))
    >>> tokens = AttributeTokenGenerator().encode(seen.images, seen.masks)
    >>> len(tokens.shapes_), len(tokens.contrasts_)
    (2, 2)

    Paper: dai2025seas
    Chapter: anomaly/visual-references
    """

    def __init__(self, reach: int = 8):
        self.reach = reach

    def encode(self, images: Tensor, masks: Tensor) -> "AttributeTokenGenerator":
        """Measure the tokens of each masked defect."""
        self.shapes_, self.contrasts_, self.textures_ = [], [], []
        side = 2 * self.reach + 1
        for image, mask in zip(images[:, 0], masks, strict=True):
            if not mask.any():
                raise ValueError("expected every mask to mark a defect, got an empty one")
            cy, cx = (int(c.float().mean().round()) for c in mask.nonzero(as_tuple=True))
            padded_mask = F.pad(mask.float(), (self.reach,) * 4)[cy : cy + side, cx : cx + side]
            padded = F.pad(image[None, None], (self.reach,) * 4, mode="reflect")[0, 0, cy : cy + side, cx : cx + side]
            level = padded[padded_mask == 0].median()
            contrast = padded[padded_mask > 0].mean() - level
            self.shapes_.append(padded_mask)
            self.contrasts_.append(float(contrast))
            self.textures_.append((padded - level - contrast) * padded_mask)
        return self

    def sample(
        self,
        images: Tensor,
        shapes: Tensor,
        contrasts: Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Render one defect on each normal image, at a random place and turn.

        Args:
            images: normal images (n, 1, s, s).
            shapes: index of the shape token of each.
            contrasts: index of the contrast token of each; equal indices paste the example as it was.
            generator: for places and turns.

        Returns:
            Images and their masks (n, s, s) bool: the generator's own, not the renderer's.
        """
        n, _, h, w = images.shape
        r = torch.rand(n, 3, generator=generator).to(images.device)
        turn = 2 * math.pi * r[:, 0]
        shift_x, shift_y = (2 * (0.25 + 0.5 * r[:, i]) - 1 for i in (1, 2))
        scale_x, scale_y = w / (2 * self.reach + 1), h / (2 * self.reach + 1)
        # where in the token each pixel of the image looks
        cos, sin = turn.cos(), turn.sin()
        theta = torch.stack(
            [
                torch.stack([scale_x * cos, scale_y * sin, -scale_x * cos * shift_x - scale_y * sin * shift_y], 1),
                torch.stack([-scale_x * sin, scale_y * cos, scale_x * sin * shift_x - scale_y * cos * shift_y], 1),
            ],
            1,
        )
        grid = F.affine_grid(theta, [n, 1, h, w], align_corners=False)
        shapes, contrasts = shapes.to(images.device), contrasts.to(images.device)
        shape = torch.stack(self.shapes_)[shapes][:, None]
        texture = torch.stack(self.textures_)[shapes][:, None]
        soft = F.grid_sample(shape, grid, align_corners=False)
        left_over = F.grid_sample(texture, grid, align_corners=False)
        masks = soft > 0.5
        contrast = torch.tensor(self.contrasts_, device=images.device)[contrasts].view(n, 1, 1, 1)
        return (images + contrast * masks + left_over * masks).clamp(0, 1), masks[:, 0]


def synth_augment(
    normal: Tensor, generator_of_defects: AttributeTokenGenerator, recombine: bool = True, generator=None
) -> tuple[Tensor, Tensor]:
    """Put a defect on three quarters of the normal images; the rest stays whole.

    Args:
        normal: images (n, 1, s, s).
        generator_of_defects: with encoded tokens.
        recombine: draw shape and contrast separately (False: copy and paste whole examples).
        generator: for all draws.

    Returns:
        Images and masks.

    >>> g = torch.Generator().manual_seed(0)
    >>> seen = make_factor_defects(2, [(0, 0), (1, 1)], generator=g)
    >>> tokens = AttributeTokenGenerator().encode(seen.images, seen.masks)
    >>> images, masks = synth_augment(make_factor_defects(8, None, generator=g).images, tokens, generator=g)
    >>> masks.any((1, 2)).tolist()
    [False, True, True, True, False, True, True, True]

    Paper: dai2025seas
    Chapter: anomaly/visual-references
    """
    n, k = len(normal), len(generator_of_defects.shapes_)
    shapes = torch.randint(k, (n,), generator=generator)
    other = torch.randint(k, (n,), generator=generator)
    images, masks = generator_of_defects.sample(normal, shapes, other if recombine else shapes, generator)
    whole = torch.arange(n, device=normal.device) % 4 == 0
    images[whole], masks[whole] = normal[whole], False
    return images, masks


def decoupled_alignment_loss(attention: Tensor, mask: Tensor) -> Tensor:
    r"""Return $\lVert A_{defect} - M \rVert^2 + \lVert A_{normal} \odot M \rVert^2$, averaged over positions.

    Token 0 is the normal token, the others are defect tokens whose attention is averaged: defect tokens attend inside
    the mask and the normal token outside. The weights of the terms in the paper were not checked.

    Args:
        attention: (n, tokens, h, w) in [0, 1].
        mask: (n, h, w).

    >>> mask = torch.tensor([[[1.0, 0.0]]])
    >>> decoupled_alignment_loss(torch.stack([1 - mask, mask], 1), mask)
    tensor(0.)

    Paper: dai2025seas
    Chapter: anomaly/visual-references
    """
    mask = mask.to(attention)
    return (attention[:, 1:].mean(1) - mask).square().mean() + (attention[:, 0] * mask).square().mean()


@torch.enable_grad()
def train_segmenter(
    images: Tensor, masks: Tensor, steps: int = 300, batch_size: int = 16, lr: float = 1e-2, seed: int = 0
) -> SmallUNet:
    """Train a `SmallUNet` on images and masks, input centred and scaled, warm-up and cosine decay.

    Args:
        images: (n, 1, h, w) in [0, 1].
        masks: (n, h, w) bool.
        steps: Adam steps.
        batch_size: images per step.
        lr: largest learning rate.
        seed: for weights and batches.

    >>> data = make_factor_defects(8, [(0, 2)], generator=torch.Generator().manual_seed(0))
    >>> train_segmenter(data.images, data.masks, steps=2)((data.images - 0.5) * 4).shape
    torch.Size([8, 32, 32])

    Paper: dai2025seas
    Chapter: anomaly/visual-references
    """
    g = torch.Generator().manual_seed(seed)
    net = SmallUNet(1, seed=seed).to(images.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, fused=has_fused(images.device))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(2, steps))  # warm-up: no dead nets
    for _ in range(steps):
        rows = torch.randint(len(images), (batch_size,), generator=g)
        # centred and scaled: without it nets of this size hardly learn
        loss = F.binary_cross_entropy_with_logits(net((images[rows] - 0.5) * 4), masks[rows].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def mask_iou(net: SmallUNet, images: Tensor, masks: Tensor) -> Tensor:
    """Return the intersection over union of predicted and true masks of each image (n,).

    >>> blank = SmallUNet(1, seed=0)
    >>> mask_iou(blank, torch.full((1, 1, 8, 8), 0.5), torch.zeros(1, 8, 8, dtype=torch.bool))
    tensor([0.])

    Paper: dai2025seas
    Chapter: anomaly/visual-references
    """
    predicted = net((images - 0.5) * 4) > 0
    both, either = (predicted & masks).sum((1, 2)), (predicted | masks).sum((1, 2))
    return both / either.clamp(min=1)
