"""Mixing for losses on pairs: a label between "same" and "different", for any metric loss that is a sum over pairs.

Public: `generic_metric_loss`, `mix_labels`, `metrix_loss`, `MetrixLoss`, `utilization`, `recall_at`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion.checks import check_features, check_generator, check_in_range, check_labels, check_positive_int
from companion.geometry import single
from companion.mixing import Mixed, mixup
from companion.neighbors import knn

__all__ = ["MetrixLoss", "generic_metric_loss", "metrix_loss", "mix_labels", "recall_at", "utilization"]

MARGIN, PULL, PUSH = 0.5, 2.0, 40.0  # similarity at which pairs start to count, and the sharpness of either side


class _Form(NamedTuple):
    """The four functions that make a metric loss: of a similarity, and of the sum over an anchor's pairs."""

    rho_pos: Callable[[Tensor], Tensor]
    rho_neg: Callable[[Tensor], Tensor]
    sigma_pos: Callable[[Tensor], Tensor]
    sigma_neg: Callable[[Tensor], Tensor]


CONTRASTIVE = _Form(lambda s: 1 - s, lambda s: (s - MARGIN).relu(), lambda t: t, lambda t: t)
MULTI_SIMILARITY = _Form(
    lambda s: torch.exp(-PULL * (s - MARGIN)),
    lambda s: torch.exp(PUSH * (s - MARGIN)),
    lambda t: torch.log1p(t) / PULL,
    lambda t: torch.log1p(t) / PUSH,
)
BASES = {"contrastive": CONTRASTIVE, "ms": MULTI_SIMILARITY, "proxy": MULTI_SIMILARITY}


def generic_metric_loss(similarity: Tensor, target: Tensor, base: str = "ms", mask: Tensor | None = None) -> Tensor:
    r"""Return a metric loss whose pairs are the same to a degree.

    For each anchor a, with $s_v$ its similarity to v and $y_v \in [0, 1]$ how much v is of its class,

    $$\ell(a) = \sigma^+\Big(\sum_v y_v\,\rho^+(s_v)\Big) + \sigma^-\Big(\sum_v (1 - y_v)\,\rho^-(s_v)\Big),$$

    on average over the anchors. With $y_v \in \{0, 1\}$ this is the loss one started from.

    Args:
        similarity: (A, V), cosines of A anchors with V samples.
        target: (A, V), in [0, 1].
        base: "contrastive" ($\rho^+ = 1 - s$, $\rho^- = [s - m]_+$, $\sigma$ the identity), "ms" or "proxy"
            ($\rho^\pm = e^{\mp\beta_\pm(s - m)}$, $\sigma^\pm = \log(1 + \cdot)/\beta_\pm$).
        mask: (A, V), which pairs count; None: all.

    Returns:
        A scalar.

    Raises:
        ValueError: an unknown base, or shapes that differ.

    >>> s, same = torch.tensor([[0.9, 0.8]]), torch.tensor([[1.0, 0.0]])
    >>> generic_metric_loss(s, same, "contrastive")  # 1 - 0.9 from the first, 0.8 - 0.5 from the second
    tensor(0.4000)

    Paper: venkataramanan2022takes
    Chapter: mixup/mixing-beyond-labels
    """
    if base not in BASES:
        raise ValueError(f"expected base among {sorted(BASES)}, got {base!r}")
    if similarity.shape != target.shape:
        raise ValueError(f"expected one target per similarity, got {tuple(similarity.shape)} and {tuple(target.shape)}")
    rho_pos, rho_neg, sigma_pos, sigma_neg = BASES[base]
    similarity, target = single(similarity), single(target)  # the exponentials leave the range of a short float
    same, different = target, 1 - target
    if mask is not None:
        same, different = same * mask, different * mask
    pull = sigma_pos((same * rho_pos(similarity)).sum(1))  # (A,)
    push = sigma_neg((different * rho_neg(similarity)).sum(1))
    return (pull + push).mean()


def mix_labels(y_a: Tensor, y_b: Tensor, lam: Tensor, anchors: Tensor) -> Tensor:
    r"""Return how much each mixed sample is of each anchor's class, $\lambda\,[y_a = y] + (1 - \lambda)\,[y_b = y]$.

    Args:
        y_a: (V,) classes of the first parents.
        y_b: (V,) classes of the second ones.
        lam: share of the first, a scalar or (V,).
        anchors: (A,) classes of the anchors.

    Returns:
        (A, V), in [0, 1].

    >>> mix_labels(torch.tensor([0]), torch.tensor([1]), torch.tensor(0.75), torch.tensor([0, 1, 2]))
    tensor([[0.7500],
            [0.2500],
            [0.0000]])

    Paper: venkataramanan2022takes
    Chapter: mixup/mixing-beyond-labels
    """
    first, second = y_a == anchors[:, None], y_b == anchors[:, None]
    return lam * first + (1 - lam) * second


def metrix_loss(
    embeddings: Tensor,
    labels: Tensor,
    mixed: Mixed,
    *,
    base: str = "ms",
    weight: float = 0.4,
    anchors: tuple[Tensor, Tensor] | None = None,
    soft: bool = True,
) -> Tensor:
    r"""Return a metric loss on clean pairs plus `weight` times the same loss of anchors with mixed samples.

    $L = \tfrac1A\sum_a \ell(a; \text{clean}) + w\,\tfrac1A\sum_a \ell(a; \text{mixed})$: two terms, each with its own
    sums. Anchors are clean; a mixed sample counts for the anchors that share a class with exactly one of its parents.

    Args:
        embeddings: (n, d), of any length; cosines are compared.
        labels: (n,) classes.
        mixed: what the anchors meet: embeddings (v, d) with both parents' classes and lam.
        base: "contrastive", "ms" or "proxy".
        weight: w; 0 leaves the clean loss.
        anchors: (points (A, d), classes (A,)); None: the embeddings themselves, each without its pair with itself.
        soft: False rounds the mixed labels to 0 or 1, a control.

    Returns:
        A scalar.

    >>> z, y = torch.eye(4), torch.tensor([0, 0, 1, 1])
    >>> mixed = Mixed(z, y, y.flip(0), torch.tensor(0.7))
    >>> bool(metrix_loss(z, y, mixed) > metrix_loss(z, y, mixed, weight=0.0))
    True

    Paper: venkataramanan2022takes
    Chapter: mixup/mixing-beyond-labels
    """
    z = F.normalize(embeddings, dim=1)
    if anchors is None:
        points, classes, clean = z, labels, ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    else:
        points, classes, clean = F.normalize(anchors[0], dim=1), anchors[1], None
    loss = generic_metric_loss(points @ z.T, (labels == classes[:, None]).to(z), base, clean)
    v = F.normalize(mixed.x, dim=1)
    target = mix_labels(mixed.y_a, mixed.y_b, mixed.lam, classes).to(z)
    crossing = (mixed.y_a == classes[:, None]) != (mixed.y_b == classes[:, None])
    if not soft:
        target = (target > 0.5).to(z)
    return loss + weight * generic_metric_loss(points @ v.T, target, base, crossing)


class MetrixLoss(nn.Module):
    r"""Metric learning with mixed pairs, `loss(embeddings, labels)`, for any training loop.

    Called like this it mixes the embeddings themselves, $v = \lambda z_i + (1 - \lambda) z_j$ with a
    $\lambda \sim \mathrm{Beta}(\alpha, \alpha)$ per sample. To mix inputs or inner features instead, mix them with
    `companion.mixing.mixup`, pass them through the rest of the network and hand over the result:
    `loss(net(x), y, mixed=m._replace(x=net(m.x)))` with `m = mixup(x, y, alpha=2)`.

    Args:
        base: "ms" (multi-similarity), "contrastive" or "proxy" (proxy anchor: one learnt point per class).
        alpha: of the Beta distribution.
        weight: of the mixed term.
        n_classes: with "proxy", how many proxies.
        dim: with "proxy", dimensions of the embeddings.
        generator: draws pairs and lam; a seed will do, None uses torch's default generator.

    Attributes:
        proxies: (C, d) with "proxy", else None. Give the loss's parameters to the optimizer too.

    >>> loss = MetrixLoss("contrastive", generator=torch.Generator().manual_seed(0))
    >>> loss(torch.eye(4), torch.tensor([0, 0, 1, 1])).shape
    torch.Size([])

    Paper: venkataramanan2022takes
    Chapter: mixup/mixing-beyond-labels
    """

    def __init__(
        self,
        base: str = "ms",
        alpha: float = 2.0,
        weight: float = 0.4,
        *,
        n_classes: int | None = None,
        dim: int | None = None,
        generator: torch.Generator | int | None = None,
    ):
        super().__init__()
        if base not in BASES:
            raise ValueError(f"expected base among {sorted(BASES)}, got {base!r}")
        self.base, self.generator = base, check_generator(generator)
        self.alpha, self.weight = check_in_range(alpha, "alpha", 0), check_in_range(weight, "weight", 0)
        self.proxies: nn.Parameter | None = None
        if base == "proxy":
            shape = check_positive_int(n_classes, "n_classes"), check_positive_int(dim, "dim")
            self.proxies = nn.Parameter(torch.randn(shape, generator=self.generator))

    def forward(self, embeddings: Tensor, labels: Tensor, mixed: Mixed | None = None) -> Tensor:
        """Return the loss of a batch.

        Args:
            embeddings: (n, d).
            labels: (n,) classes.
            mixed: embeddings of mixed samples with both parents' classes and lam; None mixes the embeddings.

        Raises:
            ValueError: lengths that differ, labels out of range.
        """
        labels = check_labels(labels, n=len(embeddings), n_classes=None if self.proxies is None else len(self.proxies))
        if mixed is None:
            unit = F.normalize(embeddings, dim=1)
            mixed = mixup(unit, labels, self.alpha, per_sample=True, generator=self.generator)
        anchors = None
        if self.proxies is not None:
            anchors = self.proxies, torch.arange(len(self.proxies), device=self.proxies.device)
        return metrix_loss(embeddings, labels, mixed, base=self.base, weight=self.weight, anchors=anchors)

    def extra_repr(self) -> str:
        """Return the settings, for `repr`."""
        return f"base={self.base!r}, alpha={self.alpha}, weight={self.weight}"


def utilization(queries: Any, references: Any) -> Tensor:
    r"""Return how far queries are from where training has been: $\tfrac1q\sum_i \min_j \lVert q_i - r_j \rVert^2$.

    Lower: the embeddings of new classes fall where the training embeddings were.

    Args:
        queries: embeddings of new samples (q, d).
        references: embeddings seen in training (r, d).

    Returns:
        A scalar, at least 0.

    >>> utilization([[0.0, 0.0], [2.0, 0.0]], [[0.0, 1.0], [2.0, 0.0]])
    tensor(0.5000)

    Paper: venkataramanan2022takes
    Chapter: mixup/mixing-beyond-labels
    """
    return knn(queries, references, k=1).distances.square().mean()


def recall_at(embeddings: Any, labels: Any, k: int = 1) -> Tensor:
    """Return how often one of the k nearest neighbours of a sample, by cosine, is of its class.

    Args:
        embeddings: (n, d).
        labels: (n,) classes.
        k: neighbours to look at.

    Returns:
        A float64 scalar.

    Raises:
        ValueError: not features, a row of zeros, labels of another length, k not below n.

    >>> recall_at([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]], [0, 0, 1])
    tensor(0.6667, dtype=torch.float64)

    Paper: venkataramanan2022takes
    Chapter: mixup/mixing-beyond-labels
    """
    embeddings = check_features(embeddings, "embeddings")
    labels = check_labels(labels, n=len(embeddings), device=embeddings.device)
    found = knn(embeddings, k=k, metric="cosine").indices
    return (labels[found] == labels[:, None]).any(1).double().mean()
