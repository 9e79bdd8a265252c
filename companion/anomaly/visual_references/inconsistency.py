"""Text against image: render the caption, render what the image says, and read the mismatch from the difference.

Public: `WORDS`, `make_text_image_pairs`, `CaptionDecoder`, `align_embedding`, `inconsistency_map`,
`word_attribution`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from companion.checks import check_positive_int
from companion.runtime import has_fused

__all__ = [
    "WORDS",
    "CaptionDecoder",
    "TextImagePairs",
    "align_embedding",
    "inconsistency_map",
    "make_text_image_pairs",
    "word_attribution",
]

WORDS = (
    ("red", "green", "blue", "yellow"),
    ("disc", "square", "cross", "bar"),
    ("top left", "top right", "bottom left", "bottom right"),
)
"""The words of a caption: colour, shape and place of each object."""

_COLOURS = torch.tensor([[0.9, 0.2, 0.2], [0.2, 0.75, 0.3], [0.25, 0.35, 0.95], [0.95, 0.85, 0.2]])


class TextImagePairs(NamedTuple):
    """`images` (n, 3, 32, 32); `captions` (n, 2, 3) words of two objects; `masks` (n, 32, 32) where text and image
    differ; `wrong` (n,) the wrong word as 3 * object + slot, or -1."""

    images: Tensor
    captions: Tensor
    masks: Tensor
    wrong: Tensor


def make_text_image_pairs(n: int, swap: str | None = None, generator: torch.Generator | None = None) -> TextImagePairs:
    """Draw scenes of two objects in two quarters of the picture, and captions with one wrong word or none.

    Args:
        n: pairs.
        swap: None for right captions, or "colour", "shape" or "place".
        generator: a cpu generator; None means torch's default one.

    Raises:
        ValueError: another kind of word.

    >>> pairs = make_text_image_pairs(3, "colour", torch.Generator().manual_seed(0))
    >>> pairs.images.shape, bool((pairs.wrong % 3 == 0).all())
    (torch.Size([3, 3, 32, 32]), True)

    Paper: huang2024exposing
    Chapter: anomaly/visual-references
    """
    kinds = (None, "colour", "shape", "place")
    if swap not in kinds:
        raise ValueError(f"expected swap to be None, 'colour', 'shape' or 'place', got {swap!r}")
    check_positive_int(n, "n")
    truth = torch.randint(4, (n, 2, 3), generator=generator)
    places = torch.rand(n, 4, generator=generator).argsort(1)
    truth[:, :, 2] = places[:, :2]  # two different quarters
    jitter = torch.randint(-2, 3, (n, 2, 2), generator=generator)
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    images = 0.12 + 0.02 * torch.randn(n, 3, 32, 32, generator=generator)
    objects = []
    for o in range(2):
        place = truth[:, o, 2]
        dx = x - (8 + 16 * (place % 2) + jitter[:, o, 0])[:, None, None]
        dy = y - (8 + 16 * (place // 2) + jitter[:, o, 1])[:, None, None]
        near = torch.maximum(dx.abs(), dy.abs())
        outlines = torch.stack(
            [
                dx.square() + dy.square() <= 20,
                near <= 4,
                (near <= 5) & ((dx.abs() <= 1) | (dy.abs() <= 1)),
                (dx.abs() <= 5) & (dy.abs() <= 1),
            ],
            1,
        )
        inside = outlines[torch.arange(n), truth[:, o, 1]]
        colour = _COLOURS[truth[:, o, 0]][:, :, None, None]
        images = torch.where(inside[:, None], colour + images - 0.12, images)
        objects.append(inside)
    captions, wrong = truth.clone(), torch.full((n,), -1)
    masks = torch.zeros(n, 32, 32, dtype=torch.bool)
    if swap is not None:
        slot, rows = kinds.index(swap) - 1, torch.arange(n)
        which = torch.randint(2, (n,), generator=generator)
        move = torch.randint(1, 4, (n,), generator=generator)
        captions[rows, which, slot] = (truth[rows, which, slot] + move) % 4
        if swap == "place":  # an empty quarter, so that the caption stays possible
            captions[rows, which, 2] = places[rows, 2]
        wrong = 3 * which + slot
        masks = torch.stack(objects, 1)[rows, which]
        if swap == "place":  # the object is missing there, and too much here
            named = captions[rows, which, 2]
            cx, cy = (8 + 16 * (named % 2))[:, None, None], (8 + 16 * (named // 2))[:, None, None]
            masks = masks | ((x - cx).square() + (y - cy).square() <= 20)
    return TextImagePairs(images.clamp(0, 1), captions, masks, wrong)


class CaptionDecoder(nn.Module):
    """Word embeddings to a picture: the stand-in for a text-to-image model.

    Each object's three word embeddings are decoded to a colour and an opacity per pixel and laid over the background.

    Args:
        dim: length of a word embedding.
        seed: initialises the weights.

    >>> decoder = CaptionDecoder(seed=0)
    >>> decoder(decoder.embed(torch.zeros(1, 2, 3, dtype=torch.int64))).shape
    torch.Size([1, 3, 32, 32])

    Paper: huang2024exposing
    Chapter: anomaly/visual-references
    """

    def __init__(self, dim: int = 8, seed: int | None = None):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            self.words = nn.Parameter(torch.randn(3, 4, dim))
            self.code = nn.Sequential(nn.Linear(3 * dim, 128), nn.ReLU(), nn.Linear(128, 16 * 8 * 8), nn.ReLU())
            self.picture = nn.Sequential(
                nn.Upsample(scale_factor=2),
                nn.Conv2d(16, 16, 3, padding=1),
                nn.ReLU(),
                nn.Upsample(scale_factor=2),
                nn.Conv2d(16, 4, 3, padding=1),
            )

    def embed(self, captions: Tensor) -> Tensor:
        """Return the embeddings (n, 2, 3, dim) of captions (n, 2, 3)."""
        return self.words[torch.arange(3), captions]

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return pictures (n, 3, 32, 32) of embeddings (n, 2, 3, dim)."""
        n = len(embeddings)
        code = self.code(embeddings.flatten(2).flatten(0, 1)).view(2 * n, 16, 8, 8)
        code = code.contiguous(memory_format=torch.channels_last)  # enlarging and convolving are faster so
        layers = self.picture(code).contiguous().unflatten(0, (n, 2))  # (n, 2, 4, 32, 32), each channel in one piece
        layers = torch.sigmoid(layers - layers.new_tensor([0.0, 0.0, 0.0, 2.0]).view(4, 1, 1))
        picture = torch.full_like(layers[:, 0, :3], 0.12)
        for layer in layers.unbind(1):
            picture = torch.lerp(picture, layer[:, :3], layer[:, 3:])
        return picture

    @torch.enable_grad()
    def fit(self, pairs: TextImagePairs, steps: int = 400, batch_size: int = 40, generator=None) -> "CaptionDecoder":
        """Learn to render right captions."""
        optimizer = torch.optim.Adam(self.parameters(), lr=4e-3, fused=has_fused(self.words.device))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            rows = torch.randint(len(pairs.images), (batch_size,), generator=generator)
            loss = F.mse_loss(self(self.embed(pairs.captions[rows])), pairs.images[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return self


@torch.enable_grad()
def align_embedding(
    images: Tensor, decoder: CaptionDecoder, init: Tensor, steps: int = 60, lr: float = 0.08, stay: float = 0.05
) -> Tensor:
    r"""Return embeddings fitted to images, each held near its caption's.

    $\arg\min_e \lVert D(e) - x \rVert^2 + \lambda \lVert e - e_{text} \rVert^2$: starting from the caption, the
    embedding changes where the image disagrees.

    Args:
        images: (n, 3, 32, 32).
        decoder: a trained decoder.
        init: the caption's embeddings (n, 2, 3, dim).
        steps: Adam steps.
        lr: learning rate.
        stay: lambda, relative to the sizes of both terms.

    >>> decoder = CaptionDecoder(seed=0)
    >>> e = decoder.embed(torch.zeros(1, 2, 3, dtype=torch.int64)).detach()
    >>> align_embedding(torch.zeros(1, 3, 32, 32), decoder, e, steps=1).shape
    torch.Size([1, 2, 3, 8])

    Paper: huang2024exposing
    Chapter: anomaly/visual-references
    """
    init = init.detach()
    fitted = init.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([fitted], lr=lr)
    for _ in range(steps):
        error = (decoder(fitted) - images).square().sum((1, 2, 3)).sum()
        loss = error + stay * (fitted - init).square().sum()
        (gradient,) = torch.autograd.grad(loss, [fitted])
        fitted.grad = gradient
        optimizer.step()
    return fitted.detach()


@torch.no_grad()
def inconsistency_map(decoder: CaptionDecoder, e_text: Tensor, e_image: Tensor) -> Tensor:
    r"""Return $\mathrm{mean}_c |D(e_{text}) - D(e_{image})|$, (n, 32, 32), higher = worse.

    Both renders share the decoder's own errors, which cancel.

    >>> decoder = CaptionDecoder(seed=0)
    >>> e = decoder.embed(torch.zeros(1, 2, 3, dtype=torch.int64))
    >>> float(inconsistency_map(decoder, e, e).sum())
    0.0

    Paper: huang2024exposing
    Chapter: anomaly/visual-references
    """
    return (decoder(e_text) - decoder(e_image)).abs().mean(1)


@torch.no_grad()
def word_attribution(images: Tensor, decoder: CaptionDecoder, captions: Tensor) -> Tensor:
    """Return how much the render improves when one word is replaced by its best alternative, (n, 6).

    The largest entry names the wrong word, as 3 * object + slot.

    >>> decoder = CaptionDecoder(seed=0)
    >>> word_attribution(torch.zeros(2, 3, 32, 32), decoder, torch.zeros(2, 2, 3, dtype=torch.int64)).shape
    torch.Size([2, 6])

    Paper: huang2024exposing
    Chapter: anomaly/visual-references
    """

    def error(c: Tensor) -> Tensor:
        return (decoder(decoder.embed(c)) - images).square().sum((1, 2, 3))

    now, gains = error(captions), []
    for o in range(2):
        for slot in range(3):
            tried = []
            for move in range(1, 4):
                other = captions.clone()
                other[:, o, slot] = (captions[:, o, slot] + move) % 4
                tried.append(error(other))
            gains.append(now - torch.stack(tried).amin(0))
    return torch.stack(gains, 1)
