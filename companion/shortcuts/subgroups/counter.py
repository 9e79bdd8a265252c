"""Common and counter groups: which backgrounds a reference model finds easy, and what other models lose elsewhere.

Public: `counter_split`, `group_drop`, `CaptionedDigits`, `make_captioned_digits`, `TinyCLIP`, `caption_loss`, and what
the first two return: `CounterSplit`, `GroupDrop`.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion.checks import check_binary, check_generator, check_in_range, check_labels, check_positive_int
from companion.data.glyphs import PALETTE, load_digits_images
from companion.nets import MLP
from companion.shortcuts.subgroups.intervals import newcombe_interval
from companion.shortcuts.subgroups.metrics import predicted_classes

__all__ = [
    "CaptionedDigits",
    "CounterSplit",
    "GroupDrop",
    "TinyCLIP",
    "caption_loss",
    "counter_split",
    "group_drop",
    "make_captioned_digits",
]


class CounterSplit(NamedTuple):
    """Which samples are `common` and which `counter`, (n,) bool, and the two backgrounds of each class.

    `common_background` and `counter_background` (C,) are -1 for a class in neither group;
    `accuracy` (C, B) is that of the reference model, NaN where a class never has a background; `counts` (C, B).
    """

    common: Tensor
    counter: Tensor
    common_background: Tensor
    counter_background: Tensor
    accuracy: Tensor
    counts: Tensor


class GroupDrop(NamedTuple):
    """Accuracy on both groups, the drop from common to counter with its interval, and the two counts."""

    common: Tensor
    counter: Tensor
    drop: Tensor
    low: Tensor
    high: Tensor
    counts: Tensor


class CaptionedDigits(NamedTuple):
    """Digits on coloured grounds: `images` (n, 3, 8, 8), `labels` (n,), `backgrounds` (n,)."""

    images: Tensor
    labels: Tensor
    backgrounds: Tensor


def counter_split(predictions: Any, labels: Any, background: Any, *, min_count: int = 20) -> CounterSplit:
    """Choose, per class, the background a reference model does best on and the one it does worst on.

    Split with one model and measure others with `group_drop`: the model that chose the groups also chose its own
    mistakes, and shows a drop even if the background does nothing.

    Args:
        predictions: of the reference model, classes (n,) or logits (n, C).
        labels: (n,) classes.
        background: (n,) whole numbers.
        min_count: backgrounds with fewer samples of a class are not chosen for it.

    Returns:
        `CounterSplit`; a class without two backgrounds of `min_count` samples is in neither group.

    Raises:
        ValueError: lengths that differ, no class with two such backgrounds.

    >>> split = counter_split([0, 0, 1, 1], [0, 0, 0, 0], [3, 3, 1, 1], min_count=2)
    >>> split.common.tolist(), split.counter_background.tolist()
    ([True, True, False, False], [1])

    Paper: wang2024clips
    Chapter: shortcuts/subgroups
    """
    predictions = predicted_classes(predictions)
    labels = check_labels(labels, n=len(predictions), device=predictions.device)
    background = check_labels(background, n=len(labels), name="background", device=labels.device)
    min_count = check_positive_int(min_count, "min_count")
    n_classes, n_backgrounds = int(labels.max()) + 1, int(background.max()) + 1
    cells, size = labels * n_backgrounds + background, n_classes * n_backgrounds
    counts = torch.bincount(cells, minlength=size).view(n_classes, n_backgrounds)
    right = torch.bincount(cells[predictions == labels], minlength=size).view(n_classes, n_backgrounds)
    accuracy = right.double() / counts
    enough = counts >= min_count
    best = torch.where(enough, accuracy, -1.0).argmax(1)
    # equal accuracies would make one background both: the last of the smallest is taken instead of the first
    worst = n_backgrounds - 1 - torch.where(enough, accuracy, 2.0).flip(1).argmin(1)
    split = (enough.sum(1) > 1) & (best != worst)
    if not bool(split.any()):
        raise ValueError(f"expected a class with two backgrounds of at least {min_count} samples, got none")
    best, worst = torch.where(split, best, -1), torch.where(split, worst, -1)
    return CounterSplit(background == best[labels], background == worst[labels], best, worst, accuracy, counts)


def group_drop(correct: Any, common: Any, counter: Any, level: float = 0.95) -> GroupDrop:
    """Return how much accuracy a model loses from the common to the counter group, with an interval.

    Args:
        correct: (n,) whether each prediction is right.
        common: (n,) bool.
        counter: (n,) bool.
        level: of Newcombe's interval.

    Returns:
        `GroupDrop(common, counter, drop, low, high, counts)`; NaN with the interval [-1, 1] where a group is empty.

    Raises:
        ValueError: lengths that differ, samples in both groups.

    >>> drop = group_drop([1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 1, 1])
    >>> drop.drop.item(), drop.low.item() < 0  # four samples say little
    (0.5, True)

    Paper: wang2024clips
    Chapter: shortcuts/subgroups
    """
    correct = check_binary(correct, name="correct")
    common = check_binary(common, n=len(correct), name="common", device=correct.device)
    counter = check_binary(counter, n=len(correct), name="counter", device=correct.device)
    if bool((common & counter).any()):
        raise ValueError(f"expected groups without common samples, got {int((common & counter).sum())} in both")
    n = torch.stack([common.sum(), counter.sum()])
    k = torch.stack([(correct & common).sum(), (correct & counter).sum()])
    low, high = newcombe_interval(k[0], n[0], k[1], n[1], level)
    shares = k.to(low.dtype) / n
    return GroupDrop(shares[0], shares[1], shares[0] - shares[1], low, high, n)


def make_captioned_digits(
    correlation: float = 0.95,
    n_classes: int = 4,
    copies: int = 1,
    part: str = "train",
    generator: torch.Generator | None = None,
) -> CaptionedDigits:
    """Return digits 0..C-1 of which each usually stands on a background of its own.

    Args:
        correlation: probability that digit c stands on background c; otherwise on one of the others.
        n_classes: C, 2 to 10.
        copies: how often each digit image is used, with backgrounds drawn anew.
        part: "train" or "test", which share no digit.
        generator: a cpu generator; None means torch's default one.

    Raises:
        ValueError: a correlation outside [0, 1], an unknown part.

    >>> digits = make_captioned_digits(1.0)
    >>> bool((digits.labels == digits.backgrounds).all()), digits.images.shape[1:]
    (True, torch.Size([3, 8, 8]))

    Paper: wang2024clips
    Chapter: shortcuts/subgroups
    """
    correlation = check_in_range(correlation, "correlation", 0, 1)
    n_classes, copies = check_positive_int(n_classes, "n_classes", 2), check_positive_int(copies, "copies")
    generator = check_generator(generator)
    if part not in ("train", "test") or n_classes > len(PALETTE):
        raise ValueError(
            f"expected part 'train' or 'test' and at most {len(PALETTE)} classes, got {part!r}, {n_classes}"
        )
    images, labels = load_digits_images(classes=range(n_classes))
    rows = torch.arange(len(labels))
    rows = (rows[rows % 5 < 3] if part == "train" else rows[rows % 5 >= 3]).repeat(copies)
    images, labels = images[rows], labels[rows]
    usual = torch.rand(len(labels), generator=generator) < correlation
    other = (labels + torch.randint(1, n_classes, labels.shape, generator=generator)) % n_classes
    backgrounds = torch.where(usual, labels, other)
    paint = PALETTE[backgrounds][:, :, None, None]
    return CaptionedDigits(images + (1 - images) * paint, labels, backgrounds)


class TinyCLIP(nn.Module):
    """An image tower and a text tower that meet: matching pairs get similar unit vectors.

    Captions are bags of words. So that one tensor is one sample, the forward pass takes images and captions joined by
    `pack`.

    Args:
        image_size: numbers per image, c * h * w.
        n_words: size of the vocabulary.
        dim: of the shared space.
        width: hidden units of the image tower.
        seed: of the initial weights; None draws them from torch's default generator.

    >>> clip = TinyCLIP(image_size=192, n_words=8, seed=0)
    >>> x = clip.pack(torch.zeros(5, 3, 8, 8), torch.eye(8)[:5])
    >>> image, text, scale = clip(x)
    >>> image.shape, text.shape, scale.shape
    (torch.Size([5, 16]), torch.Size([5, 16]), torch.Size([5]))

    Paper: wang2024clips
    Chapter: shortcuts/subgroups
    """

    def __init__(self, image_size: int, n_words: int, dim: int = 16, width: int = 64, seed: int | None = None):
        super().__init__()
        self.image_size = check_positive_int(image_size, "image_size")
        self.tower = MLP((image_size, width, dim), seed=seed)
        self.words = MLP(
            (check_positive_int(n_words, "n_words"), dim), bias=False, seed=None if seed is None else seed + 1
        )
        self.log_scale = nn.Parameter(torch.tensor(2.3))

    @staticmethod
    def pack(images: Tensor, captions: Tensor) -> Tensor:
        """Return images (n, ...) and captions (n, n_words) as one tensor (n, image_size + n_words)."""
        return torch.cat([images.flatten(1), captions.to(images.dtype)], 1)

    def image(self, x: Tensor) -> Tensor:
        """Return unit vectors (n, dim) of images, or of packed samples."""
        return F.normalize(self.tower(x.flatten(1)[:, : self.image_size]), dim=1)

    def text(self, captions: Tensor) -> Tensor:
        """Return unit vectors (n, dim) of captions (n, n_words)."""
        return F.normalize(self.words(captions), dim=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return image vectors, text vectors and the scale of their similarities, for packed samples."""
        scale = self.log_scale.clamp(max=4.6).exp()
        return self.image(x), self.text(x[:, self.image_size :]), scale.expand(len(x))


def caption_loss(outputs: tuple[Tensor, Tensor, Tensor], captions: Tensor) -> Tensor:
    r"""Return the symmetric InfoNCE loss in which equal captions count as matches.

    $$-\frac1{2n} \sum_i \sum_j p_{ij} \log \mathrm{softmax}_j(s\, u_i^\top v_j) + (\text{texts against images}),
    \qquad p_{ij} \propto 1[t_i = t_j]$$

    Without that, two images with one caption would be pushed apart.

    Args:
        outputs: image vectors u (n, dim), text vectors v (n, dim) and scale s (n,), from `TinyCLIP`.
        captions: (n,) a whole number per distinct caption.

    Returns:
        A scalar.

    >>> u = torch.eye(2)
    >>> loss = caption_loss((u, u, torch.full((2,), 100.0)), torch.tensor([0, 1]))
    >>> bool(loss < 1e-6)
    True

    Paper: wang2024clips
    Chapter: shortcuts/subgroups
    """
    image, text, scale = outputs
    logits = scale[0] * image @ text.T
    match = (captions[:, None] == captions).to(logits.dtype)
    match = match / match.sum(1, keepdim=True)
    rows, columns = F.log_softmax(logits, 1), F.log_softmax(logits.T, 1)
    return -0.5 * (match * (rows + columns)).sum(1).mean()
