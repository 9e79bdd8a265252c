"""Mixing the samples of a batch with each other, as three themes need it.

Public: `mixup` (straight lines between samples), `cutmix` (a rectangle of one image in another), `mixup_loss`, and
`Mixed`, what the first two return.

The input is never changed, unless it is passed as `out=`; labels are carried along, never cast.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from companion.checks import as_tensor, check_in_range, check_positive_int

__all__ = ["Mixed", "cutmix", "mixup", "mixup_loss"]

# From this many numbers per sample on, mixing sample by sample beats gathering a permuted copy of the batch first.
LARGE_SAMPLE = 4096


class Mixed(NamedTuple):
    """A mixed batch: `x` is `lam` of the sample labelled `y_a` and `1 - lam` of the one labelled `y_b`.

    Attributes:
        x: mixed inputs (n, ...).
        y_a: targets as they came.
        y_b: targets of the partners.
        lam: share of the first, a scalar or (n,) with `per_sample=True`.
    """

    x: Tensor
    y_a: Tensor
    y_b: Tensor
    lam: Tensor

    def targets(self, n_classes: int) -> Tensor:
        """Return the soft labels, `lam * onehot(y_a) + (1 - lam) * onehot(y_b)`: (n, C) for integer labels (n,).

        Raises:
            TypeError: labels that are no whole numbers, such as soft labels.

        >>> mixed = Mixed(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([2]), torch.tensor(0.75))
        >>> mixed.targets(3)
        tensor([[0.7500, 0.0000, 0.2500]])
        """
        check_positive_int(n_classes, "n_classes")
        lam = self.lam.reshape(-1, 1)
        if self.y_a.is_floating_point():
            raise TypeError(f"expected labels that are whole numbers, got {self.y_a.dtype} of {tuple(self.y_a.shape)}")
        return lam * F.one_hot(self.y_a.long(), n_classes) + (1 - lam) * F.one_hot(self.y_b.long(), n_classes)


def mixup(
    x: Any,
    y: Any,
    alpha: float = 1.0,
    *,
    per_sample: bool = False,
    generator: torch.Generator | None = None,
    out: Tensor | None = None,
) -> Mixed:
    r"""Mix every sample of a batch with another one along the line between them.

    $\tilde x_i = \lambda x_i + (1 - \lambda) x_{\pi(i)}$ with a random permutation $\pi$ and
    $\lambda \sim \mathrm{Beta}(\alpha, \alpha)$.

    Any shape and any dtype: floats keep theirs, whole numbers (images in 0..255, say) become torch's default float.

    Args:
        x: inputs (n, ...).
        y: targets (n, ...): integer labels, soft labels or regression targets; not mixed, but paired.
        alpha: 1 draws lam uniformly, a small alpha mixes little, 0 not at all (lam = 1).
        per_sample: one lam per sample instead of one per batch.
        generator: draws pairs and lam; None uses torch's default generator.
        out: where to write the mixed inputs, of their shape, dtype and device; `out=x` mixes in place.

    Returns:
        `Mixed(x, y_a, y_b, lam)`; `y_a` is y itself.

    Raises:
        ValueError: empty or unequal batches, alpha below 0 or not finite, an `out` that does not fit or that
            overlaps x in part.
        TypeError: a seed in place of a generator: it would mix every batch in the same way.

    >>> x, y = torch.eye(4), torch.arange(4)
    >>> mixed = mixup(x, y, generator=torch.Generator().manual_seed(0))
    >>> torch.allclose(mixed.x, mixed.lam * x[mixed.y_a] + (1 - mixed.lam) * x[mixed.y_b])
    True

    Chapter: mixup/mixup-geometry
    """
    x, y = _check_batch(x, y, alpha)
    if not (x.is_floating_point() or x.is_complex()):
        if out is x:
            raise ValueError(f"expected a floating-point out: samples of {x.dtype} are mixed in floats, not in place")
        x = x.to(torch.get_default_dtype())
    _check_out(out, x)
    partner = torch.randperm(len(x), generator=generator, device=_home(generator)).to(x.device)
    lam = _draw_lam(alpha, len(x) if per_sample else None, x, generator)
    return Mixed(_lerp(x, partner, lam, out), y, y[partner.to(y.device)], lam)


def cutmix(
    x: Any,
    y: Any,
    alpha: float = 1.0,
    *,
    per_sample: bool = False,
    generator: torch.Generator | None = None,
    out: Tensor | None = None,
) -> Mixed:
    r"""Paste a rectangle of another image of the batch into every image.

    With $\lambda \sim \mathrm{Beta}(\alpha, \alpha)$ its sides are $\sqrt{1 - \lambda}$ of the image's, its centre is
    uniform; it is clipped at the border, and `lam` is then the share of pixels that were kept, exactly.

    Args:
        x: images (n, ..., height, width) of any dtype, which they keep.
        y: targets (n, ...), not mixed, but paired.
        alpha: as in `mixup`; 0 pastes nothing.
        per_sample: one rectangle per image instead of one per batch.
        generator: draws pairs and rectangles; None uses torch's default generator.
        out: where to write; `out=x` mixes in place.

    Returns:
        `Mixed(x, y_a, y_b, lam)`.

    Raises:
        ValueError: as `mixup`, or inputs without height and width.

    >>> x = torch.arange(2).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    >>> mixed = cutmix(x, torch.arange(2), generator=torch.Generator().manual_seed(1))
    >>> mixed.x.dtype, bool(0 <= mixed.lam <= 1)
    (torch.int64, True)

    Chapter: mixup/mixup-geometry
    """
    x, y = _check_batch(x, y, alpha)
    if x.dim() < 3:
        raise ValueError(f"expected images (n, ..., height, width), got shape {tuple(x.shape)}")
    _check_out(out, x)
    n, height, width = len(x), x.shape[-2], x.shape[-1]
    partner = torch.randperm(n, generator=generator, device=_home(generator)).to(x.device)
    lam = _draw_lam(alpha, n if per_sample else None, x, generator)
    home = _home(generator)
    side = (1 - lam).sqrt().to(home)
    top, bottom = _interval(side, height, generator)
    left, right = _interval(side, width, generator)
    area = (bottom - top) * (right - left)
    lam = (1 - area.double() / (height * width)).to(lam)

    if per_sample:
        rows, columns = torch.arange(height, device=home), torch.arange(width, device=home)
        in_rows = (rows >= top[:, None]) & (rows < bottom[:, None])  # (n, height)
        in_columns = (columns >= left[:, None]) & (columns < right[:, None])  # (n, width)
        inside = (in_rows[:, :, None] & in_columns[:, None, :]).to(x.device)
        mixed = torch.where(inside.view(n, *[1] * (x.dim() - 3), height, width), x[partner], x)
        if out is not None:
            mixed = out.copy_(mixed)
    else:
        box = (..., slice(int(top), int(bottom)), slice(int(left), int(right)))
        patch = x[box][partner]
        mixed = x.clone() if out is None else out.copy_(x)
        mixed[box] = patch
    return Mixed(mixed, y, y[partner.to(y.device)], lam)


def mixup_loss(outputs: Tensor, mixed: Mixed, loss: Callable[..., Tensor] = F.cross_entropy) -> Tensor:
    r"""Return the loss of a mixed batch: $\lambda\,\ell(z, y_a) + (1 - \lambda)\,\ell(z, y_b)$, on average.

    Args:
        outputs: what the model gives for `mixed.x`, (n, ...).
        mixed: from `mixup` or `cutmix`.
        loss: `loss(outputs, targets)`; with a lam per sample it must take `reduction="none"`, or be built with it.

    Returns:
        A scalar.

    Raises:
        ValueError: lam is per sample and the loss cannot be had per sample.

    >>> z = torch.tensor([[2.0, 0.0]])
    >>> mixed = Mixed(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([1]), torch.tensor(0.5))
    >>> mixup_loss(z, mixed)
    tensor(1.1269)

    Chapter: mixup/mixup-geometry
    """
    lam = mixed.lam.to(outputs.device)
    if lam.dim() == 0:
        return (lam * loss(outputs, mixed.y_a) + (1 - lam) * loss(outputs, mixed.y_b)).mean()
    settings = {"reduction": "none"} if _takes_reduction(loss) else {}
    loss_a, loss_b = (loss(outputs, y, **settings) for y in (mixed.y_a, mixed.y_b))
    if loss_a.shape[:1] != lam.shape:
        raise ValueError(
            f"expected one loss per sample, {tuple(lam.shape)}, because lam is per sample; got {tuple(loss_a.shape)}: "
            "use a loss with reduction='none'"
        )
    lam = lam.view(-1, *[1] * (loss_a.dim() - 1))
    return (lam * loss_a + (1 - lam) * loss_b).mean()


def _takes_reduction(loss: Callable[..., Tensor]) -> bool:
    try:
        return "reduction" in inspect.signature(loss).parameters
    except (TypeError, ValueError):
        return False


def _check_batch(x: Any, y: Any, alpha: float) -> tuple[Tensor, Tensor]:
    x, y = (t if isinstance(t, Tensor) else as_tensor(t, name) for t, name in ((x, "x"), (y, "y")))
    check_in_range(alpha, "alpha", low=0)
    if x.dim() == 0 or y.dim() == 0 or len(x) != len(y) or len(x) == 0:
        raise ValueError(
            f"expected inputs and targets of the same n >= 1 samples, got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )
    return x, y


def _check_out(out: Tensor | None, x: Tensor) -> None:
    if out is None:
        return
    if (out.shape, out.dtype, out.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"expected out of shape {tuple(x.shape)}, {x.dtype}, on {x.device}; "
            f"got {tuple(out.shape)}, {out.dtype}, on {out.device}"
        )
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        raise ValueError("expected no out= where gradients flow through the mix: leave it away, or use torch.no_grad()")
    if _shares_memory(out, x) and not _is_same(out, x):
        raise ValueError("expected out to be x itself or memory of its own, got one that overlaps x in part")


def _shares_memory(a: Tensor, b: Tensor) -> bool:
    def span(t: Tensor) -> tuple[int, int]:
        reach = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
        return t.data_ptr(), t.data_ptr() + (reach + 1) * t.element_size()

    (start_a, stop_a), (start_b, stop_b) = span(a), span(b)
    return a.numel() > 0 and start_a < stop_b and start_b < stop_a


def _home(generator: torch.Generator | None) -> torch.device:
    if not (generator is None or isinstance(generator, torch.Generator)):
        kind = type(generator).__name__
        # a seed would mix every batch in the same way
        raise TypeError(f"expected generator to be None or a torch.Generator, which moves on by itself, got {kind}")
    return torch.device("cpu") if generator is None else generator.device


def _draw_lam(alpha: float, n: int | None, x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw from Beta(alpha, alpha) in float64, and return it on the device of x, in float32 or the wider dtype of x."""
    shape = () if n is None else (n,)
    if alpha == 0:
        lam = torch.ones(shape, dtype=torch.float64)
    else:
        # log Gamma(a) = log Gamma(a + 1) + log(U) / a, so that a tiny alpha does not underflow to 0 / 0
        home = _home(generator)
        gamma = torch._standard_gamma(
            torch.full((2, *shape), alpha + 1.0, dtype=torch.float64, device=home), generator=generator
        )
        uniform = 1 - torch.rand((2, *shape), dtype=torch.float64, device=home, generator=generator)  # in (0, 1]
        log_gamma = gamma.log() + uniform.log() / alpha
        lam = torch.sigmoid(log_gamma[0] - log_gamma[1])
    wide = torch.float64 if x.dtype in (torch.float64, torch.complex128) else torch.float32
    return lam.to(wide).to(x.device)


def _interval(side: Tensor, size: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Return start and stop of an interval of `side` times size around a uniform centre, clipped to [0, size]."""
    half = (side * size).floor().long() // 2
    length = (side * size).floor().long()
    centre = torch.randint(size, side.shape, generator=generator, device=side.device)
    return (centre - half).clamp(0, size), (centre - half + length).clamp(0, size)


def _lerp(x: Tensor, partner: Tensor, lam: Tensor, out: Tensor | None) -> Tensor:
    """Return lam * x + (1 - lam) * x[partner]."""
    track = torch.is_grad_enabled() and x.requires_grad
    if x.device.type == "cpu" and not track and x[0].numel() >= LARGE_SAMPLE:
        return _lerp_by_sample(x, partner, lam, out)
    # half precision is mixed in float32, so that the weights are the ones that lam reports
    wide = torch.promote_types(x.dtype, lam.dtype)
    weight = (1 - lam).to(wide).view(-1, *[1] * (x.dim() - 1)) if lam.dim() else (1 - lam).to(wide)
    mixed = torch.lerp(x.to(wide), x[partner].to(wide), weight).to(x.dtype)
    return mixed if out is None else out.copy_(mixed)


def _lerp_by_sample(x: Tensor, partner: Tensor, lam: Tensor, out: Tensor | None) -> Tensor:
    """Mix one sample after the other, without a permuted copy of the batch.

    The order follows the cycles of the permutation: the partner just read is the sample mixed next, while the
    processor's cache still has it, and a mix in place has to remember one sample per cycle only.
    """
    partners = partner.tolist()
    weights = (1 - lam).expand(len(x)).tolist()
    in_place = out is not None and _is_same(out, x)
    out = torch.empty_like(x) if out is None else out
    done = [False] * len(x)
    for start in range(len(x)):
        if done[start]:
            continue
        # the sample that closes the cycle meets the first one as it was
        first, i = x[start].clone() if in_place else x[start], start
        while not done[i]:
            done[i] = True
            j = partners[i]
            torch.lerp(x[i], first if j == start else x[j], weights[i], out=out[i])
            i = j
    return out


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.shape == b.shape)
