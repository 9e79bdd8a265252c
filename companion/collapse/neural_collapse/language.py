"""Collapse when the classes are the words of a language: more of them than dimensions, unequal, and never certain.

Public: `MarkovLanguage` (a language whose entropy is known), `ContextModel` (a small language model of given width),
`linguistic_collapse` and what it is made of: `cdnv`, `hyperspherical_uniformity`, `duality_spread`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from companion.checks import (
    as_tensor,
    check_features,
    check_generator,
    check_in_range,
    check_labels,
    check_positive_int,
)
from companion.collapse.neural_collapse.measures import each_pair
from companion.geometry import class_means, pairwise_cosine, single

__all__ = [
    "ContextModel",
    "MarkovLanguage",
    "cdnv",
    "duality_spread",
    "hyperspherical_uniformity",
    "linguistic_collapse",
]


class MarkovLanguage:
    r"""A language of order two with Zipfian words, of which the entropy is known.

    The next word c follows the last two, a and b, with probability
    $\tfrac12 P_1(c\mid b) + \tfrac12 P_2(c\mid a,b)$; every row of $P_1$ and $P_2$ is a random distribution around the
    same Zipfian frequencies $1/\mathrm{rank}^s$.

    Args:
        vocab: how many words V; memory grows with V^3.
        zipf: the exponent s.
        sharpness: how peaked the rows are: standard deviation of the random logits.
        generator: of the rows; None uses torch's default generator.

    >>> language = MarkovLanguage(vocab=8, generator=torch.Generator().manual_seed(0))
    >>> language.sample(3, 10).shape
    torch.Size([3, 10])

    Paper: wu2024linguistic
    Chapter: collapse/neural-collapse
    """

    def __init__(
        self,
        vocab: int = 64,
        *,
        zipf: float = 1.0,
        sharpness: float = 2.0,
        generator: torch.Generator | None = None,
    ):
        self.vocab = check_positive_int(vocab, "vocab", minimum=2)
        check_in_range(zipf, "zipf", low=0)
        check_in_range(sharpness, "sharpness", low=0)
        generator = check_generator(generator)
        ranks = -zipf * torch.arange(1, vocab + 1, dtype=torch.float64).log()

        def rows(*shape: int) -> Tensor:
            noise = torch.randn(*shape, vocab, generator=generator, dtype=torch.float64)
            return (ranks + sharpness * noise).softmax(-1)

        self.transition = (rows(vocab) + rows(vocab, vocab)) / 2  # (V, V, V): two words back, one back, next

    def sample(self, n: int, length: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n texts of that length, started from the language's own habit: (n, length) int64."""
        check_positive_int(n, "n")
        generator, burn_in = check_generator(generator), 20
        words = torch.randint(self.vocab, (n, 2), generator=generator)
        text = [words[:, 0], words[:, 1]]
        for _ in range(check_positive_int(length, "length") + burn_in - 2):
            text.append(torch.multinomial(self.transition[text[-2], text[-1]], 1, generator=generator)[:, 0])
        return torch.stack(text[-length:], 1)

    def entropy(self, contexts: Any) -> Tensor:
        """Return the mean entropy, in nats, of the word after each pair (n, 2): no model has a lower loss."""
        pairs = as_tensor(contexts, "contexts")
        p = self.transition[pairs[:, 0], pairs[:, 1]]
        return -torch.special.xlogy(p, p).sum(1).mean()


class ContextModel(nn.Module):
    """A language model that reads the last few words at once and predicts the next from d features.

    Args:
        vocab: words V.
        width: d, the dimensions of the features; the head has no bias.
        context: words it reads.
        hidden: width of the hidden layer.
        embedding: width of the word vectors.

    >>> ContextModel(vocab=8, width=4)(torch.zeros(5, 4, dtype=torch.int64)).shape
    torch.Size([5, 8])

    Chapter: collapse/neural-collapse
    """

    def __init__(self, vocab: int, width: int, context: int = 4, hidden: int = 64, embedding: int = 16):
        super().__init__()
        self.embed = nn.Embedding(vocab, embedding)
        self.body = nn.Sequential(
            nn.Linear(context * embedding, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.Tanh()
        )
        self.head = nn.Linear(width, vocab, bias=False)

    def features(self, words: Tensor) -> Tensor:
        """Return what the head reads: (n, d)."""
        return self.body(self.embed(words).flatten(1))

    def forward(self, words: Tensor) -> Tensor:
        """Return the logits of the next word: (n, V)."""
        return self.head(self.features(words))


def cdnv(means: Any, variances: Any) -> Tensor:
    r"""Return the class-distance normalised variance, mean over pairs of $\frac{v_i+v_j}{2\lVert\mu_i-\mu_j\rVert^2}$.

    Args:
        means: class means (C, d).
        variances: mean squared distance of each class from its mean, (C,).

    Raises:
        ValueError: shapes that do not fit, a negative variance.

    >>> cdnv([[0.0], [2.0]], [1.0, 3.0])
    tensor(0.5000)

    Paper: wu2024linguistic
    Chapter: collapse/neural-collapse
    """
    means = check_features(means, "means", min_samples=2)
    variances = as_tensor(variances, "variances").to(means)
    if variances.shape != means.shape[:1] or bool((variances < 0).any()):
        raise ValueError(f"expected variances ({len(means)},), none below zero, got shape {tuple(variances.shape)}")
    squared = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    return each_pair((variances[:, None] + variances) / (2 * squared)).mean()


def hyperspherical_uniformity(means: Any) -> Tensor:
    r"""Return the mean over pairs of $-\log\lVert u_i-u_j\rVert$ of the class means' directions.

    The directions are those of the centred means; lower is more even. It asks for what is possible: C points in
    d < C - 1 dimensions cannot be a simplex, but they can be spread out.

    Args:
        means: class means (C, d).

    Raises:
        ValueError: fewer than two classes, or a class mean at the centre.

    >>> round(float(hyperspherical_uniformity([[1.0], [-1.0]])), 4)
    -0.6931

    Paper: wu2024linguistic
    Chapter: collapse/neural-collapse
    """
    means = check_features(means, "means", min_samples=2)
    cosines = each_pair(pairwise_cosine(means - means.mean(0)))
    return -(2 - 2 * cosines).clamp(min=torch.finfo(cosines.dtype).tiny).log().mean() / 2


def duality_spread(means: Any, weight: Any) -> Tensor:
    """Return the standard deviation over classes of the cosine between centred class mean and classifier row.

    Zero when every class is aligned equally well, even if none is aligned perfectly: uniform duality.

    Args:
        means: class means (C, d).
        weight: classifier (C, d).

    Raises:
        ValueError: shapes that differ.

    >>> duality_spread([[1.0, 0.0], [-1.0, 0.0]], [[2.0, 0.0], [-3.0, 0.0]])
    tensor(0.)

    Paper: wu2024linguistic
    Chapter: collapse/neural-collapse
    """
    means, weight = check_features(means, "means", min_samples=2), check_features(weight, "weight")
    if means.shape != weight.shape:
        raise ValueError(f"expected weight of shape {tuple(means.shape)}, like the means, got {tuple(weight.shape)}")
    return torch.cosine_similarity(means - means.mean(0), weight.to(means), dim=1).std(correction=0)


def linguistic_collapse(
    features: Any, labels: Any, weight: Any, bias: Any = None, *, min_count: int = 20
) -> dict[str, Tensor]:
    """Measure collapse where classes are many, unequal and ambiguous, as the next words of a text are.

    Classes with too few samples are left out of the geometry, because the mean of a handful says nothing; how many were
    kept is reported. Half precision is measured in float32.

    Args:
        features: (n, d).
        labels: the next word, (n,).
        weight: of the head, (V, d).
        bias: of the head, (V,).
        min_count: samples a class needs to be kept.

    Returns:
        `cdnv`, `uniformity`, `equinorm` (coefficient of variation of the lengths of the class means), `equiangularity`
        (standard deviation of their cosines), `duality_spread`, `agreement` (the share of samples of kept classes for
        which the head, among kept classes, picks the nearest class mean) and `kept`, the number of classes.

    Raises:
        ValueError: shapes that do not fit, or fewer than two classes with enough samples.

    >>> h, y = torch.eye(3).repeat(20, 1), torch.arange(3).repeat(20)
    >>> float(linguistic_collapse(h, y, torch.eye(3))["agreement"])
    1.0

    Paper: wu2024linguistic
    Chapter: collapse/neural-collapse
    """
    features, weight = check_features(features, "features"), check_features(weight, "weight")
    if features.shape[1] != weight.shape[1]:
        raise ValueError(f"expected weight (V, {features.shape[1]}), as wide as features, got {tuple(weight.shape)}")
    labels = check_labels(labels, len(features), len(weight)).to(features.device)
    kept = (torch.bincount(labels, minlength=len(weight)) >= check_positive_int(min_count, "min_count")).nonzero()[:, 0]
    if len(kept) < 2:
        raise ValueError(f"expected at least two classes with {min_count} samples, got {len(kept)}")
    place = torch.full((len(weight),), -1, device=features.device)
    place[kept] = torch.arange(len(kept), device=features.device)
    rows = place[labels] >= 0
    h, y = single(features[rows]), place[labels[rows]]
    w = weight.to(h)[kept]

    means, counts = class_means(h, y, len(kept))
    means = means.to(h)
    squared = torch.zeros_like(counts, dtype=h.dtype).index_add_(0, y, ((h - means[y]) ** 2).sum(1))
    centred = means - means.mean(0)
    norms = centred.norm(dim=1)
    logits = h @ w.T
    if bias is not None:
        bias = as_tensor(bias, "bias").to(h)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"expected bias ({len(weight)},), got {tuple(bias.shape)}")
        logits = logits + bias[kept]
    nearest = ((h - means.mean(0)) @ centred.T - norms**2 / 2).argmax(1)  # far from the origin products are rounded
    return {
        "cdnv": cdnv(means, squared / counts),
        "uniformity": hyperspherical_uniformity(means),
        "equinorm": norms.std(correction=0) / norms.mean(),
        "equiangularity": each_pair(pairwise_cosine(centred)).std(correction=0),
        "duality_spread": duality_spread(means, w),
        "agreement": (logits.argmax(1) == nearest).to(h.dtype).mean(),
        "kept": torch.tensor(len(kept)),
    }
