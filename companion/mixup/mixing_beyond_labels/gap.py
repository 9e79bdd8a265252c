"""Two clouds of embeddings that should be one: how far apart they are, and training on one for use on the other.

Public: `modality_gap`, `close_gap`, `embedding_noise`, `instance_replacement`, `memory_projection`, `retrieve_tags`,
`CaptionSpace`, `TextOnlyDecoder`, and what they return: `ModalityGap`, `Captions`.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion.checks import check_features, check_generator, check_in_range, check_positive_int, check_same_length
from companion.neighbors import knn
from companion.nets import MLP
from companion.ranking import auroc

__all__ = [
    "CaptionSpace",
    "Captions",
    "ModalityGap",
    "TextOnlyDecoder",
    "close_gap",
    "embedding_noise",
    "instance_replacement",
    "memory_projection",
    "modality_gap",
    "retrieve_tags",
]


class ModalityGap(NamedTuple):
    """How two clouds of embeddings lie.

    Attributes:
        vector: (d,), the mean of the first minus the mean of the second.
        distance: its length.
        share: squared distance over the mean squared distance between a point of one cloud and a point of the other;
            0 where the means agree, towards 1 where the clouds are small for their distance.
        separability: how well the side of the mid-plane between the means tells the clouds apart, as an AUROC.
    """

    vector: Tensor
    distance: Tensor
    share: Tensor
    separability: Tensor


def modality_gap(a: Any, b: Any) -> ModalityGap:
    r"""Return how far apart two clouds of embeddings are, and how much of their distance is one constant shift.

    With means $\mu_a$, $\mu_b$ and total variances $v_a$, $v_b$ the gap is $\lVert\mu_a - \mu_b\rVert$, and
    $\mathbb{E}\lVert a - b\rVert^2 = \lVert\mu_a - \mu_b\rVert^2 + v_a + v_b$ for independent draws.

    Args:
        a: embeddings of one kind (n, d), say sounds.
        b: embeddings of the other kind (m, d), say texts; not necessarily of the same things.

    Returns:
        `ModalityGap(vector, distance, share, separability)`.

    Raises:
        ValueError: dimensions that differ, NaN or infinity.

    >>> gap = modality_gap([[1.0, 3.0], [3.0, 3.0]], [[1.0, 0.0], [3.0, 0.0]])
    >>> float(gap.distance), round(float(gap.share), 3), float(gap.separability)
    (3.0, 0.818, 1.0)

    Paper: zhang2024zero
    Chapter: mixup/mixing-beyond-labels
    """
    a = check_features(a, "a")
    b = check_features(b, "b", device=a.device)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"expected embeddings of one dimension, got {a.shape[1]} and {b.shape[1]}")
    vector = a.mean(0) - b.mean(0)
    squared = vector.square().sum()
    spread = sum(x.var(0, correction=0).sum() for x in (a, b))
    side = torch.cat([a, b]) @ vector
    kind = torch.arange(len(side), device=side.device) < len(a)
    share = squared / (squared + spread).clamp_min(torch.finfo(a.dtype).tiny)
    return ModalityGap(vector, squared.sqrt(), share, auroc(side, kind))


def close_gap(z: Any, source: Any, target: Any) -> Tensor:
    r"""Return z moved by the constant part of the gap, $z - (\mu_{source} - \mu_{target})$.

    It needs no pairs: a few unlabelled embeddings of either kind give the means.

    Args:
        z: embeddings (n, d) of the source's kind.
        source: embeddings whose mean is taken away.
        target: embeddings whose mean is put in its place.

    Raises:
        ValueError: not embeddings of one width.

    >>> close_gap([[5.0]], source=[[4.0], [6.0]], target=[[0.0]])
    tensor([[0.]])

    Paper: zhang2024zero
    Chapter: mixup/mixing-beyond-labels
    """
    z = check_features(z, "z")
    source, target = check_features(source, "source").to(z), check_features(target, "target").to(z)
    _check_widths(z=z, source=source, target=target)
    return z - (source.mean(0) - target.mean(0))


def _check_widths(**embeddings: Tensor) -> None:
    widths = {name: x.shape[1] for name, x in embeddings.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(f"expected embeddings of one width d, got {widths}")


def embedding_noise(z: Tensor, std: float, generator: torch.Generator | int | None = None) -> Tensor:
    """Return z with Gaussian noise of deviation `std` in every dimension, one half of the soft prompt's mixing.

    Args:
        z: embeddings (..., d).
        std: of the noise, per dimension; its length is about `std * sqrt(d)`.
        generator: a seed will do, None uses torch's default generator.

    Raises:
        ValueError: a deviation below zero.

    >>> embedding_noise(torch.zeros(1, 3), 0.0)
    tensor([[0., 0., 0.]])

    Paper: zhang2024zero
    Chapter: mixup/mixing-beyond-labels
    """
    check_in_range(std, "std", 0)
    generator = check_generator(generator)
    home = z.device if generator is None else generator.device
    return z + std * torch.randn(z.shape, generator=generator, device=home).to(z)


def instance_replacement(z: Any, k: int = 5, p: float = 0.5, generator: torch.Generator | int | None = None) -> Tensor:
    """Return z in which each row, with probability p, is replaced by one of its k nearest rows by cosine.

    The captions stay: a decoder that sees a neighbour's embedding with its own caption learns not to rely on detail.
    Where neighbours have other captions, this is label noise.

    Args:
        z: embeddings (n, d).
        k: neighbours to choose from.
        p: probability of a replacement.
        generator: a seed will do, None uses torch's default generator.

    Raises:
        ValueError: no features, a row of zeros, k not below n, p outside [0, 1].

    >>> instance_replacement([[1.0, 0.0], [0.9, 0.1]], k=1, p=1.0)
    tensor([[0.9000, 0.1000],
            [1.0000, 0.0000]])

    Paper: zhang2024zero
    Chapter: mixup/mixing-beyond-labels
    """
    z = check_features(z, "z")
    check_in_range(p, "p", 0, 1)
    neighbours = knn(z, k=k, metric="cosine").indices
    generator = check_generator(generator)
    home = "cpu" if generator is None else generator.device
    rank = torch.randint(k, (len(z), 1), generator=generator, device=home).to(z.device)
    replaced = (torch.rand(len(z), generator=generator, device=home) < p).to(z.device)
    return torch.where(replaced[:, None], z[neighbours.gather(1, rank)[:, 0]], z)


def memory_projection(z: Any, bank: Any, temperature: float = 0.05) -> Tensor:
    r"""Return each embedding as a mixture of the bank's, $\sum_j \mathrm{softmax}_j(\cos(z, b_j)/\tau)\, b_j$.

    What comes out lies in the convex hull of the bank, whatever went in: the most radical way to close a gap. Where the
    gap tilts the similarities, it lands on the wrong entries.

    Args:
        z: embeddings (n, d).
        bank: embeddings of the kind wanted (m, d).
        temperature: tau; small picks the nearest entry.

    Raises:
        ValueError: not embeddings of one width, a temperature of at most 0.

    >>> memory_projection([[2.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]], temperature=0.001)
    tensor([[1., 0.]])

    Paper: zhang2024zero
    Chapter: mixup/mixing-beyond-labels
    """
    z = check_features(z, "z")
    bank = check_features(bank, "bank", device=z.device).to(z)
    _check_widths(z=z, bank=bank)
    check_in_range(temperature, "temperature", 0, inclusive="neither")
    return (F.normalize(z, dim=1) @ F.normalize(bank, dim=1).T / temperature).softmax(1) @ bank


def retrieve_tags(z: Any, tags: Any, k: int = 3) -> Tensor:
    """Return which k tags are nearest to each embedding by cosine, as zeros and ones: the hard prompt.

    Only an order of similarities is used. A shift at right angles to all tags changes none of it.

    Args:
        z: embeddings (n, d), of either kind.
        tags: embeddings of the tag words (t, d).
        k: how many to retrieve.

    Returns:
        (n, t) float, k ones per row.

    Raises:
        ValueError: not embeddings of one width, a row of zeros, k above the number of tags.

    >>> retrieve_tags([[0.9, 0.1, 5.0]], [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], k=1)
    tensor([[1., 0.]])

    Paper: zhang2024zero
    Chapter: mixup/mixing-beyond-labels
    """
    z = check_features(z, "z")
    tags = check_features(tags, "tags", device=z.device)
    found = knn(z, tags.to(z), k=k, metric="cosine").indices
    return torch.zeros(len(z), len(tags), dtype=z.dtype, device=z.device).scatter_(1, found, 1.0)


class Captions(NamedTuple):
    """Scenes seen from both sides.

    Attributes:
        text: (n, d) embeddings of their descriptions.
        audio: (n, d) embeddings of their sounds.
        words: (n, slots), the word in each slot of the caption.
    """

    text: Tensor
    audio: Tensor
    words: Tensor


class CaptionSpace:
    r"""A shared space of texts and sounds whose gap is known.

    A scene is one word for each of three slots (what, where, how). Its meaning is
    $m = \mathrm{unit}(\sum_s w_s + c\,\tanh(Aw))$, words along some `meaning` dimensions of the space. A text is
    $m$ plus noise; a sound is $m$ plus more noise plus a constant shift, the gap, in a direction that words never use
    ("outside") or along theirs ("inside"), plus a bend of its own, $t\tanh(2Bm)$, that no shift undoes.

    Args:
        dim: d, dimensions of the space.
        meaning: how many of them words use.
        slots: words per caption.
        choices: words per slot.
        gap: "outside" or "inside".
        curvature: c, how far meanings bend away from a sum of words.
        twist: t, how far sounds bend away from texts.
        generator: draws the words; a seed will do, None uses torch's default generator.

    Attributes:
        tags: (slots * choices, d), unit embeddings of the words.
        direction: (d,), unit vector along the gap.

    >>> space = CaptionSpace(generator=torch.Generator().manual_seed(0))
    >>> scenes = space.sample(500, shift=1.0, generator=torch.Generator().manual_seed(1))
    >>> scenes.text.shape, round(float(modality_gap(scenes.audio, scenes.text).distance), 1)
    (torch.Size([500, 128]), 1.0)

    Paper: zhang2024zero
    Chapter: mixup/mixing-beyond-labels
    """

    def __init__(
        self,
        dim: int = 128,
        meaning: int = 24,
        slots: int = 3,
        choices: int = 6,
        gap: str = "outside",
        curvature: float = 0.5,
        twist: float = 0.1,
        generator: torch.Generator | int | None = None,
    ):
        if gap not in ("outside", "inside"):
            raise ValueError(f"expected gap 'outside' or 'inside', got {gap!r}")
        dim, meaning = check_positive_int(dim, "dim", 2), check_positive_int(meaning, "meaning")
        if meaning >= dim:
            raise ValueError(f"expected meaning below dim={dim}, so that there is an outside, got {meaning}")
        self.slots, self.choices = check_positive_int(slots, "slots"), check_positive_int(choices, "choices", 2)
        self.curvature, self.twist = check_in_range(curvature, "curvature", 0), check_in_range(twist, "twist", 0)
        generator = check_generator(generator)
        frame = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
        self._frame = frame[:meaning]  # (meaning, d)
        words = torch.randn(slots * choices, meaning, generator=generator)
        self._words = F.normalize(words, dim=1)
        self._bend = torch.randn(meaning, meaning, generator=generator)
        self._twist = torch.randn(meaning, meaning, generator=generator)
        self.tags = self._words @ self._frame
        inside = F.normalize(torch.randn(meaning, generator=generator), dim=0) @ self._frame
        self.direction = frame[meaning] if gap == "outside" else inside

    def sample(
        self,
        n: int,
        shift: float = 1.0,
        text_noise: float = 0.01,
        audio_noise: float = 0.06,
        generator: torch.Generator | int | None = None,
    ) -> Captions:
        """Draw scenes.

        Args:
            n: how many.
            shift: length of the gap.
            text_noise: standard deviation per dimension.
            audio_noise: standard deviation per dimension.
            generator: a seed will do, None uses torch's default generator.

        Returns:
            `Captions(text, audio, words)`.
        """
        generator = check_generator(generator)
        words = torch.randint(self.choices, (n, self.slots), generator=generator)
        places = words + self.choices * torch.arange(self.slots)
        total = self._words[places].sum(1)  # (n, meaning)
        meaning = F.normalize(total + self.curvature * torch.tanh(2 * total @ self._bend), dim=1)  # (n, meaning)
        heard = meaning + self.twist * torch.tanh(2 * meaning @ self._twist)
        text = embedding_noise(meaning @ self._frame, text_noise, generator)
        audio = embedding_noise(heard @ self._frame, audio_noise, generator) + shift * self.direction
        return Captions(text, audio, words)


class TextOnlyDecoder(nn.Module):
    """Reads an embedding and says one word per slot; trained on texts, used on sounds.

    Args:
        dim: d, of the embeddings (and of the tags behind them, where a hard prompt is appended).
        slots: words per caption.
        choices: words per slot.
        width: hidden units.
        seed: of the initial weights; None draws them from torch's default generator.

    >>> TextOnlyDecoder(128, seed=0)(torch.zeros(5, 128)).shape  # (n, choices, slots), as cross_entropy takes it
    torch.Size([5, 6, 3])

    Paper: zhang2024zero
    Chapter: mixup/mixing-beyond-labels
    """

    def __init__(self, dim: int, slots: int = 3, choices: int = 6, width: int = 128, seed: int | None = None):
        super().__init__()
        self.slots, self.choices = check_positive_int(slots, "slots"), check_positive_int(choices, "choices")
        self.net = MLP((dim, width, slots * choices), seed=seed)

    def forward(self, z: Tensor) -> Tensor:
        """Return the logits (n, choices, slots)."""
        return self.net(z).unflatten(1, (self.choices, self.slots))

    def caption(self, z: Tensor) -> Tensor:
        """Return the likeliest word of each slot: (n, slots)."""
        return self(z).argmax(1)

    def word_accuracy(self, z: Tensor, words: Tensor) -> Tensor:
        """Return the share of words that are right."""
        check_same_length(z=z, words=words)
        return (self.caption(z) == words).double().mean()
