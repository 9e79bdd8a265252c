"""What organises an embedding: what you want to know of a sample, or where it came from.

Public: `robustness_index`, `neighbor_composition`, `error_attribution`, `remove_site_effect`, and what they return:
`NeighborComposition`, `ErrorAttribution`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from companion.checks import check_features, check_labels, check_positive_int
from companion.neighbors import knn

__all__ = [
    "ErrorAttribution",
    "NeighborComposition",
    "error_attribution",
    "neighbor_composition",
    "remove_site_effect",
    "robustness_index",
]


class NeighborComposition(NamedTuple):
    """Shares of neighbours by rank (k,): same class and site, class only, site only, neither; and by chance (4,)."""

    both: Tensor
    class_only: Tensor
    site_only: Tensor
    neither: Tensor
    chance: Tensor


class ErrorAttribution(NamedTuple):
    """Errors of a nearest-neighbour vote and whether the site made them.

    `accuracy` of the vote; `errors`, how many; `same_site`, the share of errors whose wrong-class neighbours come
    mostly from the sample's own site (NaN without errors); `chance`, that share if sites did not matter.
    """

    accuracy: Tensor
    errors: Tensor
    same_site: Tensor
    chance: Tensor


def _neighbors(x: Tensor, k: int, metric: str, groups: Any) -> Tensor:
    """Return the k nearest neighbours of each row (n, k), none of its own group."""
    k = check_positive_int(k, "k")
    if groups is None:
        return knn(x, k=k, metric=metric).indices
    groups = check_labels(groups, n=len(x), name="exclude", device=x.device)
    groups = groups.unique(return_inverse=True)[1]  # names of patients may be large numbers
    largest = int(torch.bincount(groups).max())
    if k > len(x) - largest:
        raise ValueError(f"expected k to be at most n - largest group = {len(x) - largest}, got k={k}")
    wide = knn(x, k=k + largest - 1, metric=metric).indices
    own = groups[wide] == groups[:, None]
    # a stable sort moves neighbours of the own group to the end and keeps the order of the others
    return wide.gather(1, own.to(torch.uint8).argsort(dim=1, stable=True)[:, :k])


def _checked(embeddings: Any, labels: Any, sites: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = check_features(embeddings, "embeddings", min_samples=2).detach()
    labels = check_labels(labels, n=len(x), device=x.device)
    return x, labels, check_labels(sites, n=len(x), name="sites", device=x.device)


def neighbor_composition(
    embeddings: Any, labels: Any, sites: Any, k: int = 50, *, metric: str = "cosine", exclude: Any = None
) -> NeighborComposition:
    """Return how often the neighbours of each rank share the class, the site, both or neither.

    Args:
        embeddings: (n, d).
        labels: (n,) what the embedding should be organised by (the biology, in pathology).
        sites: (n,) where each sample came from (the hospital).
        k: neighbours; keep it below the smallest class-and-site cell.
        metric: "cosine" or "euclidean".
        exclude: (n,) groups such as patients or slides, None for none: neighbours of the same group do not count.

    Returns:
        `NeighborComposition(both, class_only, site_only, neither, chance)`.

    Raises:
        ValueError: lengths that differ, k too large.

    >>> x = torch.tensor([[0.0], [0.1], [5.0], [5.1]])
    >>> neighbor_composition(x, [0, 0, 1, 1], [0, 1, 0, 1], k=1, metric="euclidean").class_only
    tensor([1.], dtype=torch.float64)

    Paper: jong2025current
    Chapter: shortcuts/subgroups
    """
    x, labels, sites = _checked(embeddings, labels, sites)
    near = _neighbors(x, k, metric, exclude)
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    same_class, same_site = labels[near] == labels[:, None], sites[near] == sites[:, None]  # (n, k)
    kinds = (same_class & same_site, same_class & ~same_site, ~same_class & same_site, ~same_class & ~same_site)
    return NeighborComposition(*(kind.to(wide).mean(0) for kind in kinds), _chance(labels, sites).to(wide))


def _chance(labels: Tensor, sites: Tensor) -> Tensor:
    """Return the four shares among all pairs of different samples."""
    n, n_sites = len(labels), int(sites.max()) + 1
    cells = torch.bincount(labels * n_sites + sites).double()

    def pairs(counts: Tensor) -> Tensor:
        return (counts * (counts - 1)).sum() / (n * (n - 1))

    both, of_class, of_site = (
        pairs(cells),
        pairs(torch.bincount(labels).double()),
        pairs(torch.bincount(sites).double()),
    )
    return torch.stack([both, of_class - both, of_site - both, 1 - of_class - of_site + both])


def robustness_index(
    embeddings: Any, labels: Any, sites: Any, k: int = 50, *, metric: str = "cosine", exclude: Any = None
) -> Tensor:
    r"""Return how often neighbours share the class and not the site, for each time that they share the site only.

    $$R_k = \frac{\#\{(i, j) : j \in N_k(i),\; c_j = c_i,\; s_j \ne s_i\}}
    {\#\{(i, j) : j \in N_k(i),\; c_j \ne c_i,\; s_j = s_i\}}$$

    Above 1 the class organises the neighbourhoods, below 1 the site. The number of classes and sites moves it too:
    without any structure it is the ratio of `class_only` to `site_only` in `neighbor_composition(...).chance`, and so
    is its value on a table in which class and site are not crossed evenly; subsample such a table first.

    Args:
        embeddings: (n, d).
        labels: (n,) what the embedding should be organised by (the biology, in pathology).
        sites: (n,) where each sample came from (the hospital).
        k: neighbours; keep it below the smallest class-and-site cell.
        metric: "cosine" or "euclidean".
        exclude: (n,) groups such as patients or slides, None for none: neighbours of the same group do not count.

    Returns:
        A float64 scalar; infinite where no neighbour shares the site only, NaN where none of either kind was met.

    Raises:
        ValueError: lengths that differ, k too large.

    >>> x = torch.tensor([[0.0], [0.1], [0.3], [5.0], [5.1], [5.3]])
    >>> robustness_index(x, [0, 0, 1, 1, 1, 0], [0, 1, 0, 0, 1, 0], k=2, metric="euclidean")
    tensor(1., dtype=torch.float64)

    Paper: jong2025current
    Chapter: shortcuts/subgroups
    """
    shares = neighbor_composition(embeddings, labels, sites, k, metric=metric, exclude=exclude)
    return shares.class_only.sum() / shares.site_only.sum()


def error_attribution(
    embeddings: Any, labels: Any, sites: Any, k: int = 50, *, metric: str = "cosine", exclude: Any = None
) -> ErrorAttribution:
    """Return how often a nearest-neighbour vote errs because of neighbours from the sample's own site.

    Args:
        embeddings: (n, d).
        labels: (n,) classes.
        sites: (n,) where each sample came from.
        k: neighbours that vote; ties go to the lower class.
        metric: "cosine" or "euclidean".
        exclude: (n,) groups whose members do not vote for each other, None for none.

    Returns:
        `ErrorAttribution(accuracy, errors, same_site, chance)`. An error counts as the site's when more than half of
        the wrong-class neighbours share the sample's site; `chance` is how often they would by a binomial draw, from
        the share of same-site samples among all of other classes.

    Raises:
        ValueError: lengths that differ, k too large.

    >>> x = torch.tensor([[0.0], [0.1], [0.3], [5.0], [5.1], [5.3]])
    >>> error_attribution(x, [0, 0, 1, 1, 1, 0], [0, 1, 0, 0, 1, 0], k=1, metric="euclidean").errors
    tensor(2)

    Paper: jong2025current
    Chapter: shortcuts/subgroups
    """
    x, labels, sites = _checked(embeddings, labels, sites)
    near = _neighbors(x, k, metric, exclude)
    votes = torch.zeros(len(x), int(labels.max()) + 1, device=x.device).scatter_add_(
        1, labels[near], torch.ones(near.shape, device=x.device)
    )
    wrong = votes.argmax(1) != labels
    confounders = labels[near] != labels[:, None]
    n_confounders = confounders.sum(1)
    from_site = (confounders & (sites[near] == sites[:, None])).sum(1)
    mostly = 2 * from_site > n_confounders
    chance = _chance(labels, sites)
    share = chance[2] / (chance[2] + chance[3])  # of the site, among pairs of different classes
    by_draw = _majority_by_chance(n_confounders[wrong].double().cpu(), share.cpu())
    return ErrorAttribution(
        (~wrong).double().mean(), wrong.sum(), mostly[wrong].double().mean(), by_draw.mean().to(x.device)
    )


def _majority_by_chance(n: Tensor, p: Tensor) -> Tensor:
    from scipy.stats import binom  # only here, because it is slow to import

    return torch.as_tensor(binom.sf((n // 2).numpy(), n.numpy(), float(p)), dtype=torch.float64)


def remove_site_effect(embeddings: Any, sites: Any) -> Tensor:
    r"""Return embeddings with each site's mean moved to the common mean, $z_i - \bar z_{s_i} + \bar z$.

    It takes the shift of a site away and nothing else. Where classes are spread unevenly over sites it takes part of
    the class away too: balance first.

    Args:
        embeddings: (n, d).
        sites: (n,).

    Returns:
        (n, d), in the dtype of the embeddings.

    Raises:
        ValueError: lengths that differ.

    >>> remove_site_effect([[0.0], [2.0], [10.0], [12.0]], [0, 0, 1, 1]).squeeze().tolist()
    [5.0, 7.0, 5.0, 7.0]

    Paper: jong2025current
    Chapter: shortcuts/subgroups
    """
    x = check_features(embeddings, "embeddings")
    sites = check_labels(sites, n=len(x), name="sites", device=x.device)
    counts = torch.bincount(sites).clamp_min(1).to(x.dtype)[:, None]
    center = x.mean(0)
    means = (
        torch.zeros(len(counts), x.shape[1], dtype=x.dtype, device=x.device).index_add(0, sites, x - center) / counts
    )
    return x - means[sites]
