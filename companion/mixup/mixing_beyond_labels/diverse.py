"""Generated samples for a rare class: why variety counts, and how to see that it is missing.

Public: `DiverseGenerator`, `SpriteSource`, `energy_score`, `energy_gap`, `coverage`, `similarity_filter`, and what the
generator returns: `Generated`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from companion.checks import (
    check_features,
    check_generator,
    check_in_range,
    check_labels,
    check_logits,
    check_positive_int,
)
from companion.data import make_sprites
from companion.neighbors import knn

__all__ = [
    "DiverseGenerator",
    "Generated",
    "SpriteSource",
    "coverage",
    "energy_gap",
    "energy_score",
    "similarity_filter",
]

Source = Callable[..., Tensor]


class Generated(NamedTuple):
    """Generated samples, and where each comes from.

    Attributes:
        x: (n, ...) samples.
        labels: (n,) classes.
        source: (n,) places in the generator's sources.
        prompt: (n,) places in its prompts.
    """

    x: Tensor
    labels: Tensor
    source: Tensor
    prompt: Tensor


class DiverseGenerator:
    """Splits a budget of synthetic samples evenly over sources and prompts.

    A source is any function `source(label, n, prompt, generator) -> (n, ...)`: a renderer, a diffusion model behind a
    folder of its pictures, a resampler. A prompt is whatever the sources understand; for one that takes none, leave
    the default.

    Args:
        sources: by name, or a list.
        prompts: variations to ask each source for.
        extra_classes: classes that are not in the task and are generated too, as classes of their own.

    Raises:
        ValueError: no source, or no prompt.

    >>> flat = lambda label, n, prompt, generator: torch.full((n, 2), float(prompt))
    >>> maker = DiverseGenerator({"flat": flat}, prompts=(1.0, 2.0, 3.0))
    >>> maker.sample(0, 5).x[:, 0].tolist()
    [1.0, 1.0, 2.0, 2.0, 3.0]

    Paper: fan2024divergen
    Chapter: mixup/mixing-beyond-labels
    """

    def __init__(
        self,
        sources: Mapping[str, Source] | Sequence[Source],
        prompts: Sequence[Any] = (None,),
        extra_classes: Sequence[int] = (),
    ):
        named = sources if isinstance(sources, Mapping) else {str(i): source for i, source in enumerate(sources)}
        if not named or not len(prompts):
            raise ValueError(f"expected at least one source and one prompt, got {len(named)} and {len(prompts)}")
        self.sources, self.prompts = dict(named), tuple(prompts)
        self.extra_classes = tuple(extra_classes)

    def sample(self, label: int, n: int, generator: torch.Generator | int | None = None) -> Generated:
        """Draw n samples of a class, the same number (give or take one) from every pair of source and prompt.

        Args:
            label: the class.
            n: how many; the first pairs get one more where n does not divide.
            generator: handed to the sources; a seed becomes a generator first.
        """
        n, generator = check_positive_int(n, "n"), check_generator(generator)
        pairs = list(product(range(len(self.sources)), range(len(self.prompts))))
        shares = [n // len(pairs) + (i < n % len(pairs)) for i in range(len(pairs))]
        functions = list(self.sources.values())
        parts = [
            functions[s](label, share, self.prompts[p], generator) for (s, p), share in zip(pairs, shares) if share
        ]
        owners = torch.repeat_interleave(torch.tensor(pairs), torch.tensor(shares), dim=0)
        return Generated(torch.cat(parts), torch.full((n,), label), owners[:, 0], owners[:, 1])

    def sample_extra(self, n: int, generator: torch.Generator | int | None = None) -> Generated | None:
        """Draw n samples of every extra class, or return None where there is none."""
        generator = check_generator(generator)
        parts = [self.sample(label, n, generator) for label in self.extra_classes]
        return Generated(*(torch.cat(field) for field in zip(*parts))) if parts else None

    def __repr__(self) -> str:
        return f"DiverseGenerator(sources={list(self.sources)}, prompts={self.prompts})"


class SpriteSource:
    """A renderer of sprites with a bias of its own, in place of a text-to-image model.

    Args:
        angles: how many different turns it knows, evenly spaced; None: all. Its prompts, where given, name one turn.
        polarity: "both", "bright" or "dark" shapes on a grey ground.
        sizes: radii it draws, as fractions of the side.
        blur: width in pixels of a box blur it leaves on its pictures; 1 for none.
        shapes: names among `companion.data.SHAPES`, one per class.
        image_size: side in pixels.
        noise: standard deviation of pixel noise.

    Raises:
        ValueError: an unknown polarity.

    >>> stiff = SpriteSource(angles=1, polarity="bright")
    >>> stiff(0, 4, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([4, 1, 16, 16])

    Paper: fan2024divergen
    Chapter: mixup/mixing-beyond-labels
    """

    def __init__(
        self,
        angles: int | None = None,
        polarity: str = "both",
        sizes: Sequence[float] = (0.2, 0.25, 0.3),
        blur: int = 1,
        shapes: Sequence[str] = ("disc", "square", "triangle", "cross", "star", "ring"),
        image_size: int = 16,
        noise: float = 0.08,
    ):
        if polarity not in ("both", "bright", "dark"):
            raise ValueError(f"expected polarity 'both', 'bright' or 'dark', got {polarity!r}")
        self.angles = None if angles is None else check_positive_int(angles, "angles")
        self.polarity, self.sizes, self.shapes = polarity, tuple(sizes), tuple(shapes)
        self.blur, self.image_size = check_positive_int(blur, "blur"), check_positive_int(image_size, "image_size")
        self.noise = check_in_range(noise, "noise", 0)

    def __call__(
        self, label: int, n: int, prompt: Any = None, generator: torch.Generator | int | None = None
    ) -> Tensor:
        """Draw n pictures of a class: (n, 1, size, size) in [0, 1]."""
        generator = check_generator(generator)
        turns = torch.rand(n, generator=generator)
        if self.angles is not None:
            turns = (turns * self.angles).floor() / self.angles
        bright = torch.rand(n, generator=generator) < 0.5
        if self.polarity != "both":
            bright = torch.full((n,), self.polarity == "bright")
        middle = 0.5 + (torch.rand(2, n, generator=generator) - 0.5) * 2 / self.image_size
        sprites = make_sprites(
            n,
            shape=label,
            color=0,
            x=middle[0],
            y=middle[1],
            angle=2 * math.pi * (turns if prompt is None else torch.full((n,), float(prompt))),
            background=0,
            filled=True,
            shapes=self.shapes,
            colors=torch.ones(1, 3),
            sizes=self.sizes,
            backgrounds=("black",),
            image_size=self.image_size,
            generator=generator,
        )
        ink = sprites.images[:, :1]
        images = 0.5 + 0.35 * ink * (2 * bright.view(-1, 1, 1, 1).to(ink) - 1)
        if self.blur > 1:
            images = torch.nn.functional.avg_pool2d(images, self.blur, 1, self.blur // 2, count_include_pad=False)
        return (images + self.noise * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def energy_score(logits: Any) -> Tensor:
    r"""Return the energy of each sample, $E(x) = -\log\sum_c e^{z_c}$: low where the classifier is at home.

    Args:
        logits: (n, C).

    Returns:
        (n,).

    Raises:
        ValueError: not logits.

    >>> energy_score([[0.0, 0.0]])
    tensor([-0.6931])

    Paper: fan2024divergen
    Chapter: mixup/mixing-beyond-labels
    """
    return -check_logits(logits).logsumexp(1)


def energy_gap(train_logits: Any, test_logits: Any) -> Tensor:
    r"""Return the mean energy on new samples minus that on training samples, $\bar E_{test} - \bar E_{train}$.

    Zero where training has covered what comes; large where the classifier is at home in its training samples only.

    Args:
        train_logits: (n, C).
        test_logits: (m, C).

    Raises:
        ValueError: not logits.

    >>> energy_gap([[4.0, 0.0]], [[0.0, 0.0]])
    tensor(3.3250)

    Paper: fan2024divergen
    Chapter: mixup/mixing-beyond-labels
    """
    return energy_score(test_logits).mean() - energy_score(train_logits).mean()


def coverage(train: Any, test: Any) -> Tensor:
    """Return how far new samples are from training, as a multiple of how far they are from each other.

    The median over the new samples of the distance to the nearest training sample, over the distance to the nearest
    other new sample: about 1 where both come from one distribution (and are as many), more where modes are missing.

    Args:
        train: features (n, d).
        test: features (m, d).

    Raises:
        ValueError: not features of one width, fewer than two new samples.

    >>> coverage([[0.0], [1.0]], [[0.0], [1.0], [5.0], [6.0]])
    tensor(0.)
    >>> coverage([[0.0], [1.0]], [[4.0], [5.0], [6.0]])
    tensor(4.)

    Paper: fan2024divergen
    Chapter: mixup/mixing-beyond-labels
    """
    train, test = check_features(train, "train"), check_features(test, "test", min_samples=2)
    to_train, to_each_other = knn(test, train, k=1).distances, knn(test, k=1).distances
    return to_train.median() / to_each_other.median().clamp_min(torch.finfo(test.dtype).tiny)


def similarity_filter(generated: Any, real: Any, keep: float = 0.8, labels: Any = None) -> Tensor:
    """Return which generated samples to keep: the share whose features are most like the mean of the real ones.

    Args:
        generated: features of generated samples (n, d), from any encoder.
        real: features of real samples of the same class (m, d).
        keep: share to keep.
        labels: (n,) the sources of the generated samples, to filter each on its own; None: all together. Together, a
            source that looks less like the real samples loses more.

    Returns:
        (k,) indices, ascending.

    Raises:
        ValueError: not features of one width, a share outside (0, 1], labels of another length.

    >>> similarity_filter([[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.0]], keep=0.5)
    tensor([0])

    Paper: fan2024divergen
    Chapter: mixup/mixing-beyond-labels
    """
    generated = check_features(generated, "generated")
    real = check_features(real, "real", device=generated.device)
    if generated.shape[1] != real.shape[1]:
        raise ValueError(f"expected features of one width d, got {generated.shape[1]} and {real.shape[1]}")
    check_in_range(keep, "keep", 0, 1, "high")
    centre = torch.nn.functional.normalize(real, dim=1).mean(0)
    similarity = torch.nn.functional.normalize(generated, dim=1) @ centre.to(generated)
    if labels is None:
        groups = [torch.arange(len(similarity), device=similarity.device)]
    else:
        labels = check_labels(labels, n=len(similarity), device=similarity.device)
        groups = [(labels == c).nonzero()[:, 0] for c in labels.unique()]
    kept = [rows[similarity[rows].topk(max(1, round(keep * len(rows)))).indices] for rows in groups]
    return torch.cat(kept).sort().values
