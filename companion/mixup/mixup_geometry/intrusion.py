"""Mixed points that land on real ones: how often, and mixup that learns where not to mix.

Public: `make_bands`, `intrusion_rate`, `Paired`, `AdaMixUp`, `pair_up`, `adamixup_loss`.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from companion.checks import (
    as_tensor,
    check_features,
    check_generator,
    check_in_range,
    check_labels,
    check_positive_int,
)
from companion.mixing import Mixed
from companion.neighbors import knn
from companion.nets import MLP

__all__ = ["AdaMixUp", "Paired", "adamixup_loss", "intrusion_rate", "make_bands", "pair_up"]


def make_bands(
    n: int,
    n_bands: int = 7,
    *,
    spacing: float = 0.33,
    half_width: float = 0.1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw points from thin parallel bands in the plane whose labels alternate: 0, 1, 0, ...

    Between two bands of one class lies one of the other, so that the straight line between them crosses it.

    Args:
        n: how many points.
        n_bands: bands, stacked in the first coordinate.
        spacing: between the centres of neighbouring bands.
        half_width: of a band; below half the spacing.
        generator: None uses torch's default generator.

    Returns:
        x (n, 2), the second coordinate uniform in [-1, 1], and labels (n,).

    Raises:
        ValueError: bands that overlap, or a number below one.

    >>> x, y = make_bands(100, generator=torch.Generator().manual_seed(0))
    >>> x.shape, y.unique().tolist()
    (torch.Size([100, 2]), [0, 1])

    Paper: guo2019mixup
    Chapter: mixup/mixup-geometry
    """
    check_positive_int(n, "n")
    check_positive_int(n_bands, "n_bands")
    if not 0 < half_width < spacing / 2:
        raise ValueError(f"expected 0 < half_width < spacing / 2 = {spacing / 2:g}, got {half_width:g}")
    generator = check_generator(generator)
    band = torch.randint(n_bands, (n,), generator=generator)
    across = (band - (n_bands - 1) / 2) * spacing + half_width * (2 * torch.rand(n, generator=generator) - 1)
    return torch.stack([across, 2 * torch.rand(n, generator=generator) - 1], 1), band % 2


def intrusion_rate(mixed: Mixed, x: Any, y: Any, radius: float) -> Tensor:
    """Return the share of mixed points that land on real examples of a class that was not mixed in.

    A mixed point intrudes when its nearest real example is no further than the radius and has neither of its two
    labels. A pair from one class can intrude too: its label is pure, and wrong. Points whose label is wrong in part
    only, such as an even mixture that lands on one of its own two classes, are not counted.

    Args:
        mixed: from `mixup`, with integer labels.
        x: real examples (n, ...).
        y: their labels (n,).
        radius: how close counts as landing on an example; a typical distance between neighbours of one class.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: shapes that do not fit, a radius not above 0.

    >>> mixed = Mixed(torch.tensor([[0.0]]), torch.tensor([0]), torch.tensor([0]), torch.tensor(0.5))
    >>> intrusion_rate(mixed, [[-1.0], [0.05], [1.0]], [0, 1, 0], radius=0.1)
    tensor(1.)

    Paper: guo2019mixup
    Chapter: mixup/mixup-geometry
    """
    check_in_range(radius, "radius", low=0, inclusive="neither")
    x = check_features(as_tensor(x).flatten(1), "x").to(mixed.x.device)
    labels = check_labels(y, len(x)).to(x.device)
    distances, indices = knn(mixed.x.detach().flatten(1).to(x), x, k=1)
    nearest = labels[indices[:, 0]]
    strange = (nearest != mixed.y_a.to(x.device)) & (nearest != mixed.y_b.to(x.device))
    return (strange & (distances[:, 0] <= radius)).to(x.dtype).mean()


class Paired(NamedTuple):
    """What an `AdaMixUp` in training mode returns for a batch of pairs; what is real is the first sample of each.

    Attributes:
        real: logits of the real examples (n, C).
        mixed: logits of the mixed ones (n, C); they teach the classifier, not the policy.
        through: the same logits again; they teach the policy, not the classifier.
        lam: share of the first sample of each pair (n,).
        found_real: the discriminator's logit that a real example is real, (n,).
        found_mixed: that a mixed one is real; teaches the discriminator.
        fooled: the same again; teaches the policy.
        x: the mixed inputs (n, ...).
    """

    real: Tensor
    mixed: Tensor
    through: Tensor
    lam: Tensor
    found_real: Tensor
    found_mixed: Tensor
    fooled: Tensor
    x: Tensor


def _frozen(module: nn.Module, x: Tensor) -> Tensor:
    """Run a module whose parameters get no gradient; the input does."""
    state = {name: p.detach() for name, p in [*module.named_parameters(), *module.named_buffers()]}
    return functional_call(module, state, (x,))


class AdaMixUp(nn.Module):
    r"""Mixup that learns, pair by pair, which mixing weights are safe.

    A policy network looks at a pair and returns three numbers that sum to one, $(a, w, \cdot)$; the mixing weight is
    $\lambda = a + u\,w$ with $u$ uniform. A discriminator learns to tell real examples from mixed ones; the policy is
    asked for mixtures that the discriminator finds unreal (no intrusion) and that the classifier can learn. Half of
    what the classifier sees are real examples.

    In eval mode `forward(x)` is the classifier's. In training mode it takes the pairs of `pair_up` and returns a
    `Paired`, and `adamixup_loss` is one scalar in which each of the three parts gets only its own gradient, so that any
    loop and any optimizer will do.

    Args:
        model: the classifier.
        in_shape: shape of an input: its size for vectors, such as (1, 28, 28) for images.
        hidden: width of the two hidden layers of policy and discriminator.
        min_width: of the interval of mixing weights. With 0, as published, the safest interval is a point, which is no
            mixing at all.

    Raises:
        ValueError: a size below one, min_width outside [0, 1]; in training mode, inputs that are not pairs.

    >>> ada = AdaMixUp(MLP((2, 8, 2)), in_shape=2).eval()
    >>> ada(torch.zeros(5, 2)).shape
    torch.Size([5, 2])

    Paper: guo2019mixup
    Chapter: mixup/mixup-geometry
    """

    def __init__(self, model: nn.Module, in_shape: int | Sequence[int], *, hidden: int = 64, min_width: float = 0.0):
        super().__init__()
        self.model = model
        self.min_width = check_in_range(min_width, "min_width", low=0, high=1)
        sizes = in_shape if isinstance(in_shape, Sequence) else (in_shape,)
        self.in_shape = tuple(check_positive_int(size, "in_shape") for size in sizes)
        size = math.prod(self.in_shape)
        self.policy = MLP((2 * size, hidden, hidden, 3))
        self.discriminator = MLP((size, hidden, hidden, 1))

    def interval(self, x_a: Tensor, x_b: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lower end and the width of the interval of mixing weights for each pair, (n,) each."""
        parts = self.policy(torch.cat([x_a.flatten(1), x_b.flatten(1)], 1)).softmax(1)
        room = 1 - self.min_width
        return room * parts[:, 0], self.min_width + room * parts[:, 1]

    def forward(self, x: Tensor) -> Any:
        """Return logits (n, C) for inputs in eval mode, a `Paired` for the pairs of `pair_up` in training mode."""
        return self.pairs(x) if self.training else self.model(x)

    def pairs(self, packed: Tensor) -> Paired:
        """Return everything `adamixup_loss` needs for packed pairs (n, 2 d + 1), with d numbers per input."""
        d = math.prod(self.in_shape)
        if packed.dim() != 2 or packed.shape[1] != 2 * d + 1:
            raise ValueError(
                f"expected pairs (n, {2 * d + 1}) from pair_up for inputs {self.in_shape}, got {tuple(packed.shape)}; "
                "call eval() to classify single inputs"
            )
        x_a, x_b, u = packed[:, :d], packed[:, d:-1], packed[:, -1]
        lower, width = self.interval(x_a, x_b)
        lam = lower + u * width
        flat = lam[:, None] * x_a + (1 - lam)[:, None] * x_b
        real, x = x_a.unflatten(1, self.in_shape), flat.unflatten(1, self.in_shape)
        logits = self.model(torch.cat([real, x.detach()]))
        found = self.discriminator(torch.cat([x_a, flat.detach()]))[:, 0]
        return Paired(
            real=logits[: len(x)],
            mixed=logits[len(x) :],
            through=_frozen(self.model, x),
            lam=lam,
            found_real=found[: len(x)],
            found_mixed=found[len(x) :],
            fooled=_frozen(self.discriminator, flat)[:, 0],
            x=x,
        )


def pair_up(x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return a batch as pairs for `AdaMixUp`: sample, partner and a uniform number side by side, and both labels.

    A batch transform for `companion.training.fit`, and with `per_model` for `fit_many`.

    Args:
        x: inputs (n, ...).
        y: labels (n,).
        generator: draws partners and numbers; None uses torch's default generator.

    Returns:
        Packed pairs (n, 2 d + 1) and the labels (y, y of the partner).

    >>> packed, (y_a, y_b) = pair_up(torch.zeros(4, 3), torch.arange(4))
    >>> packed.shape
    torch.Size([4, 7])

    Paper: guo2019mixup
    Chapter: mixup/mixup-geometry
    """
    home = "cpu" if generator is None else generator.device
    partner = torch.randperm(len(x), generator=generator, device=home).to(x.device)
    u = torch.rand(len(x), 1, generator=generator, device=home).to(x)
    flat = x.flatten(1)
    return torch.cat([flat, flat[partner], u], 1), (y, y[partner])


def adamixup_loss(
    outputs: Paired, labels: tuple[Tensor, Tensor], *, discriminate: bool = True, fit: bool = True
) -> Tensor:
    r"""Return the sum of what classifier, discriminator and policy minimise.

    Classifier: the mean of the cross-entropies on real and on mixed examples. Discriminator: the logistic loss of real
    against mixed. Policy: $\log(1 + e^{D(\tilde x)})$, not to be found real, plus the cross-entropy of the classifier
    on the mixture.

    Args:
        outputs: of an `AdaMixUp` in training mode.
        labels: of the first and second sample of each pair.
        discriminate: leave the discriminator out of the policy's objective with False (an ablation).
        fit: leave the classifier's loss out of it with False (another).

    Returns:
        A scalar.

    >>> ada = AdaMixUp(MLP((2, 8, 2)), in_shape=2)
    >>> packed, labels = pair_up(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]))
    >>> adamixup_loss(ada(packed), labels).shape
    torch.Size([])

    Paper: guo2019mixup
    Chapter: mixup/mixup-geometry
    """
    y_a, y_b = labels

    def soft(logits: Tensor, lam: Tensor) -> Tensor:
        each = F.cross_entropy(logits, y_a, reduction="none"), F.cross_entropy(logits, y_b, reduction="none")
        return (lam * each[0] + (1 - lam) * each[1]).mean()

    value = (F.cross_entropy(outputs.real, y_a) + soft(outputs.mixed, outputs.lam.detach())) / 2
    value = value + (F.softplus(-outputs.found_real) + F.softplus(outputs.found_mixed)).mean()
    if discriminate:
        value = value + F.softplus(outputs.fooled).mean()
    if fit:
        value = value + soft(outputs.through, outputs.lam)
    return value
