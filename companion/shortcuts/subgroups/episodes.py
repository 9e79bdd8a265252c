"""Few-shot episodes whose context helps or misleads, as you set it.

Public: `ContextEpisodeSampler`, `Episode`, `prototype_accuracy`, `spurious_shift_score`, `ShiftScore`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Sampler

from companion.checks import check_features, check_generator, check_in_range, check_labels, check_positive_int
from companion.geometry import single

__all__ = ["ContextEpisodeSampler", "Episode", "ShiftScore", "prototype_accuracy", "spurious_shift_score"]


class Episode(NamedTuple):
    """Places in the data of support (n_way, k_shot) and query (n_way, n_query); row i of both is class `classes[i]`."""

    support: Tensor
    query: Tensor
    classes: Tensor


class ShiftScore(NamedTuple):
    """Share of an embedding's variance that the context and the concept explain, and the context's part of the two."""

    context: Tensor
    concept: Tensor
    score: Tensor


class ContextEpisodeSampler(Sampler):
    """Draw few-shot episodes in which the context of a query image agrees with its class, or with another one.

    Each class of an episode gets a context of its own, and its support images carry it. A query image carries, with
    probability `shift`, the context of another class of the episode, otherwise that of its own: at 0 a learner that
    only reads the context is right, at 1 it is wrong every time. Support and query never share an image.

    Iterating yields flat lists of places, class by class, support before query: pass it as `batch_sampler` to a
    `torch.utils.data.DataLoader`, or take `episodes()`.

    Args:
        concept: (n,) classes of all images.
        context: (n,) contexts of all images, such as backgrounds.
        n_way: classes per episode, at most the number of contexts.
        k_shot: support images per class.
        n_query: query images per class.
        shift: in [0, 1]; None draws every image of an episode from one context, the same for all: a control without
            any cue.
        n_episodes: per pass.
        generator: draws the episodes (None: torch's default generator).

    Raises:
        ValueError: too few classes or contexts; a class and context with too few images for an episode.

    >>> concept, context = torch.arange(3).repeat_interleave(12), torch.arange(3).repeat(12)
    >>> sampler = ContextEpisodeSampler(concept, context, n_way=3, k_shot=1, n_query=2, shift=1.0, n_episodes=5)
    >>> episode = next(sampler.episodes())
    >>> bool((context[episode.query] == context[episode.support]).any()), len(sampler)
    (False, 5)

    Paper: zhang2024metacoco
    Chapter: shortcuts/subgroups
    """

    def __init__(
        self,
        concept: Any,
        context: Any,
        n_way: int = 5,
        k_shot: int = 1,
        n_query: int = 5,
        shift: float | None = 0.0,
        n_episodes: int = 200,
        generator: torch.Generator | None = None,
    ):
        self.concept = check_labels(concept, name="concept").cpu()
        self.context = check_labels(context, n=len(self.concept), name="context").cpu()
        self.n_way, self.k_shot = check_positive_int(n_way, "n_way", 2), check_positive_int(k_shot, "k_shot")
        self.n_query = check_positive_int(n_query, "n_query")
        self.shift = None if shift is None else check_in_range(shift, "shift", 0, 1)
        self.n_episodes = check_positive_int(n_episodes, "n_episodes")
        self.generator = check_generator(generator)
        self.classes, self.contexts = self.concept.unique(), self.context.unique()
        if len(self.classes) < n_way or len(self.contexts) < n_way:
            found = f"{len(self.classes)} classes and {len(self.contexts)} contexts"
            raise ValueError(f"expected at least n_way={n_way} classes and contexts, got {found}")
        self.cells = {
            (c, b): ((self.concept == c) & (self.context == b)).nonzero().squeeze(1)
            for c in self.classes.tolist()
            for b in self.contexts.tolist()
        }
        (c, b), smallest = min(self.cells.items(), key=lambda item: len(item[1]))
        if len(smallest) < self.k_shot + self.n_query:
            raise ValueError(
                f"expected at least k_shot + n_query = {self.k_shot + self.n_query} images of every class in every "
                f"context, got {len(smallest)} of class {c} in context {b}"
            )

    def __len__(self) -> int:
        return self.n_episodes

    def __iter__(self) -> Iterator[list[int]]:
        for episode in self.episodes():
            yield torch.cat([episode.support, episode.query], 1).flatten().tolist()

    def episodes(self) -> Iterator[Episode]:
        """Yield `Episode(support, query, classes)`, `n_episodes` of them."""
        for _ in range(self.n_episodes):
            yield self._episode()

    def _episode(self) -> Episode:
        classes = self._pick(self.classes)
        contexts = self._pick(self.contexts)
        if self.shift is None:
            contexts = contexts[:1].expand(self.n_way)
        support, query = [], []
        for i, c in enumerate(classes.tolist()):
            own = self._shuffled(self.cells[c, int(contexts[i])])
            support.append(own[: self.k_shot])
            misled = torch.rand(self.n_query, generator=self.generator) < (self.shift or 0.0)
            step = torch.randint(1, self.n_way, (self.n_query,), generator=self.generator)
            asked = torch.where(misled, contexts[(i + step) % self.n_way], contexts[i])  # (q,)
            rest = {int(contexts[i]): own[self.k_shot :]}
            query.append(torch.stack([self._take(rest, c, b) for b in asked.tolist()]))
        return Episode(torch.stack(support), torch.stack(query), classes)

    def _take(self, rest: dict[int, Tensor], c: int, b: int) -> Tensor:
        pool = rest.get(b)
        pool = self._shuffled(self.cells[c, b]) if pool is None else pool
        rest[b] = pool[1:]
        return pool[0]

    def _pick(self, values: Tensor) -> Tensor:
        return self._shuffled(values)[: self.n_way]

    def _shuffled(self, values: Tensor) -> Tensor:
        return values[torch.randperm(len(values), generator=self.generator)]


def prototype_accuracy(embeddings: Any, episode: Episode, metric: str = "cosine") -> Tensor:
    """Return the share of an episode's queries that lie nearest to their own class's mean support embedding.

    Args:
        embeddings: of all images, (n, d).
        episode: places in them.
        metric: "cosine" or "euclidean".

    Returns:
        A float64 scalar.

    Raises:
        ValueError: an unknown metric, places outside the embeddings.

    >>> episode = Episode(torch.tensor([[0], [1]]), torch.tensor([[2], [3]]), torch.tensor([0, 1]))
    >>> prototype_accuracy([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [3.0, 1.0]], episode)
    tensor(0.5000, dtype=torch.float64)

    Paper: zhang2024metacoco
    Chapter: shortcuts/subgroups
    """
    x = single(check_features(embeddings, "embeddings").detach())
    if int(max(episode.support.max(), episode.query.max())) >= len(x):
        raise ValueError(f"expected places below {len(x)}, the number of embeddings, got larger ones")
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"expected metric 'cosine' or 'euclidean', got {metric!r}")
    if metric == "cosine":
        x = F.normalize(x, dim=1)
    else:
        x = x - x.mean(0)  # distances do not change, and their squares keep the digits that an offset would take
    prototypes = x[episode.support].mean(1)  # (n_way, d)
    queries = x[episode.query]  # (n_way, q, d)
    nearest = torch.cdist(queries.flatten(0, 1), prototypes).argmin(1).view(episode.query.shape)
    return (nearest == torch.arange(len(prototypes), device=x.device)[:, None]).double().mean()


def spurious_shift_score(embeddings: Any, concept: Any, context: Any) -> ShiftScore:
    r"""Return how much of an embedding is context and how much is concept: the fall that shifted episodes will show.

    $$\eta^2_{\text{context}} = \frac{\sum_b n_b \lVert \bar z_b - \bar z \rVert^2}
    {\sum_i \lVert z_i - \bar z \rVert^2}, \qquad
    \mathrm{score} = \frac{\eta^2_{\text{context}}}{\eta^2_{\text{context}} + \eta^2_{\text{concept}}}$$

    The benchmark measures shift with a vision-language model's similarities to the words for concept and context; this
    score needs labels instead of words, and no such model. Measure it on images in which concept and context are
    crossed evenly, otherwise each takes part of the other's variance.

    Args:
        embeddings: (n, d).
        concept: (n,) classes.
        context: (n,) contexts.

    Returns:
        `ShiftScore(context, concept, score)`, float64; NaN when all embeddings are equal.

    Raises:
        ValueError: lengths that differ.

    >>> spurious_shift_score([[0.0], [0.1], [1.0], [1.1]], [0, 1, 0, 1], [0, 0, 1, 1]).score.round(decimals=2)
    tensor(0.9900, dtype=torch.float64)

    Paper: zhang2024metacoco
    Chapter: shortcuts/subgroups
    """
    x = check_features(embeddings, "embeddings", min_samples=2).detach()
    wide = x if x.device.type == "mps" else x.double()
    wide = wide - wide.mean(0)
    total = wide.square().sum()

    def explained(groups: Tensor) -> Tensor:
        counts = torch.bincount(groups).clamp_min(1).to(wide.dtype)[:, None]
        sums = torch.zeros(len(counts), x.shape[1], dtype=wide.dtype, device=x.device).index_add_(0, groups, wide)
        return (sums.square() / counts).sum() / total

    by_context = explained(check_labels(context, n=len(x), name="context", device=x.device))
    by_concept = explained(check_labels(concept, n=len(x), name="concept", device=x.device))
    return ShiftScore(by_context, by_concept, by_context / (by_context + by_concept))
