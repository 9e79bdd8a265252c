"""Sprites on which several cues name the class, and which of them a network follows when they disagree.

Public: `FactorSprites`, `make_factor_sprites`, `cue_preference`, `loss_around`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from companion.checks import as_tensor, check_generator, check_in_range, check_labels, check_positive_int
from companion.data import make_sprites

__all__ = ["CUES", "FactorSprites", "cue_preference", "loss_around", "make_factor_sprites"]

CUES = ("color", "size", "shape")
"""The cues of `make_factor_sprites`; each takes as many values as there are classes."""

_SIZES = (0.15, 0.205, 0.26)


class FactorSprites(NamedTuple):
    """Pictures, labels, and what each cue says.

    `images` (n, 3, h, w) in [0, 1]; `labels` (n,) int64 in 0..2; `factors` the class each cue names: {cue: (n,)}.
    """

    images: Tensor
    labels: Tensor
    factors: dict[str, Tensor]


def make_factor_sprites(
    n: int,
    *,
    tied: Sequence[str] = CUES,
    conflict: bool = False,
    image_size: int = 16,
    noise: float = 0.05,
    generator: torch.Generator | None = None,
) -> FactorSprites:
    """Draw sprites of three classes whose colour, size and shape name the class, or contradict one another.

    In training all cues lie on the diagonal of the table of factors: each is enough to tell the class, so that no
    loss prefers one to another. In conflict all three name different classes: a prediction follows exactly one. Shapes
    have the same area at one size, so that shape says nothing about size.

    Args:
        n: pictures.
        tied: cues that equal the label; the others are drawn independently of everything. Without effect in conflict.
        conflict: every picture's cues name three different classes; the label is the shape.
        image_size: side in pixels.
        noise: standard deviation of the pixels' noise.
        generator: a cpu generator; None means torch's default one.

    Returns:
        `FactorSprites(images, labels, factors)`.

    Raises:
        ValueError: an unknown cue, or a setting out of range.

    >>> test = make_factor_sprites(100, conflict=True, generator=torch.Generator().manual_seed(0))
    >>> votes = torch.stack(list(test.factors.values()), dim=1)  # (n, 3)
    >>> bool((votes.sort(dim=1).values == torch.arange(3)).all())
    True

    Paper: scimeca2022which
    Chapter: shortcuts/shortcut-learning
    """
    n, generator = check_positive_int(n, "n"), check_generator(generator)
    if isinstance(tied, str) or set(tied) - set(CUES):
        raise ValueError(f"expected tied to be a sequence of cues among {CUES}, got {tied!r}")
    if conflict:
        votes = torch.rand(n, 3, generator=generator).argsort(1)  # each row a random order of the classes
        factors = {cue: votes[:, i] for i, cue in enumerate(CUES)}
        labels = factors["shape"]
    else:
        labels = torch.randint(3, (n,), generator=generator)
        free = torch.randint(3, (n, 3), generator=generator)
        factors = {cue: labels if cue in tied else free[:, i] for i, cue in enumerate(CUES)}
    sprites = make_sprites(n, **factors, sizes=_SIZES, image_size=image_size, noise=noise, generator=generator)
    return FactorSprites(sprites.images, labels, factors)


def cue_preference(predictions: Any, factors: Mapping[str, Any]) -> dict[str, Tensor]:
    r"""Return how often predictions name the class that each cue names.

    $$P_\mathrm{cue} = \frac1n \sum_i \mathbf 1[\hat y_i = f_\mathrm{cue}(x_i)]$$

    On pictures whose cues all disagree the shares add up to the share of predictions that follow any cue at all. On
    pictures whose cues agree they say nothing.

    Args:
        predictions: classes (n,), or (m, n) for m models; not logits.
        factors: the class each cue names, {cue: (n,)}.

    Returns:
        {cue: float64 scalar, or (m,)}.

    Raises:
        ValueError: no cues, different lengths, predictions that are not classes.

    >>> preference = cue_preference([0, 1, 2, 2], {"color": [0, 1, 2, 0], "shape": [1, 2, 0, 2]})
    >>> {cue: share.item() for cue, share in preference.items()}
    {'color': 0.75, 'shape': 0.25}

    Paper: scimeca2022which
    Chapter: shortcuts/shortcut-learning
    """
    predictions = as_tensor(predictions, "predictions")
    if predictions.dim() not in (1, 2) or predictions.shape[-1] == 0:
        raise ValueError(f"expected predictions (n,) or (m, n), got shape {tuple(predictions.shape)}")
    if predictions.is_floating_point():
        raise ValueError("expected predicted classes, got floats: looks like logits, pass logits.argmax(-1)")
    if not factors:
        raise ValueError("expected at least one cue, got none")
    n = predictions.shape[-1]
    named = {cue: check_labels(value, n, name=cue).to(predictions.device) for cue, value in factors.items()}
    return {cue: (predictions == value).double().mean(-1) for cue, value in named.items()}


def loss_around(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    radii: Sequence[float],
    *,
    n_directions: int = 10,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return the loss at distances from a trained model, along random directions scaled filter by filter.

    A direction is drawn from a normal distribution, and every filter (row of a weight) is given the norm of the filter
    it disturbs: $d_f \leftarrow d_f\,\|w_f\| / \|d_f\|$, so that a network and a rescaled copy that computes the same
    are disturbed equally. Biases stay. A radius of 0.5 therefore moves each filter by half its length.

    Read it as a curve: one number hides that a basin can be flat near the minimum and steep further out. Compare
    models at the same training loss only.

    Args:
        model: in eval mode; it is not changed.
        x: inputs (n, ...), on the model's device.
        y: targets (n, ...).
        radii: distances, at least 0.
        n_directions: how many, shared by all radii.
        loss: `loss(outputs, targets)`.
        generator: a cpu generator; None means torch's default one.

    Returns:
        (len(radii), n_directions).

    Raises:
        ValueError: no radii, a negative one, no directions.

    >>> model, x = nn.Linear(2, 2, bias=False), torch.eye(2)
    >>> curve = loss_around(model, x, torch.tensor([0, 1]), [0.0, 1.0], n_directions=3)
    >>> curve.shape, bool((curve[0] == curve[0, 0]).all())
    (torch.Size([2, 3]), True)

    Paper: scimeca2022which
    Chapter: shortcuts/shortcut-learning
    """
    check_positive_int(n_directions, "n_directions")
    if not len(radii):
        raise ValueError("expected at least one radius, got none")
    radii = [check_in_range(radius, "radii", 0) for radius in radii]
    generator = check_generator(generator)
    params = {name: p.detach() for name, p in model.named_parameters()}
    curve = torch.empty(len(radii), n_directions)
    with torch.no_grad():
        for j in range(n_directions):
            direction = {name: _filter_normalised(p, generator) for name, p in params.items()}
            for i, radius in enumerate(radii):
                moved = {name: p + radius * direction[name] for name, p in params.items()}
                curve[i, j] = loss(functional_call(model, moved, (x,)), y)
    return curve


def _filter_normalised(p: Tensor, generator: torch.Generator | None) -> Tensor:
    if p.dim() < 2:
        return torch.zeros_like(p)
    direction = torch.randn(p.shape, generator=generator).to(p)
    norm = direction.flatten(1).norm(dim=1)
    scale = p.flatten(1).norm(dim=1) / norm.clamp_min(torch.finfo(p.dtype).tiny)
    return direction * scale.view(-1, *(1,) * (p.dim() - 1))
