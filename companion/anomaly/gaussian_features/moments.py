"""Reading a frozen network out by how its features vary together, beside their mean.

Public: `cross_covariance`, `LinearProbe`, `MomentProbe`, `oriented_noise`.
"""

import math

import torch
from torch import Tensor, nn

from companion.checks import check_generator, check_in_range, check_positive_int

__all__ = ["LinearProbe", "MomentProbe", "cross_covariance", "oriented_noise"]


def cross_covariance(tokens: Tensor, first: Tensor, second: Tensor) -> Tensor:
    r"""Return how two projections of the tokens of each sample vary together, $P\,\widehat{\mathrm{cov}}(x)\,Q^\top$.

    Args:
        tokens: (n, t, d).
        first: P (p, d).
        second: Q (q, d).

    Returns:
        (n, p, q).

    Raises:
        ValueError: shapes that do not fit.

    >>> tokens = torch.tensor([[[1.0, 2.0], [-1.0, -2.0]]])
    >>> cross_covariance(tokens, torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    tensor([[[2.]]])

    Paper: gao2023tuning
    Chapter: anomaly/gaussian-features
    """
    if tokens.ndim != 3 or not tokens.shape[-1] == first.shape[-1] == second.shape[-1]:
        raise ValueError(
            f"expected tokens (n, t, d) and projections (p, d), (q, d), got {tuple(tokens.shape)},"
            f" {tuple(first.shape)}, {tuple(second.shape)}"
        )
    centred = tokens - tokens.mean(1, keepdim=True)
    return (centred @ first.T).transpose(1, 2) @ (centred @ second.T) / tokens.shape[1]


class LinearProbe(nn.Module):
    """A linear classifier on the mean of the tokens.

    Args:
        dim: d of the tokens (n, t, d).
        n_classes: C.

    >>> LinearProbe(16, 4)(torch.zeros(2, 10, 16)).shape
    torch.Size([2, 4])

    Paper: gao2023tuning
    Chapter: anomaly/gaussian-features
    """

    def __init__(self, dim: int, n_classes: int):
        super().__init__()
        self.head = nn.Linear(dim, n_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (n, C)."""
        return self.head(tokens.mean(1))


class MomentProbe(nn.Module):
    r"""A linear classifier on the mean of the tokens and on a compact picture of how they vary together.

    Each head projects the tokens twice, to `proj` directions, and takes the `proj` x `proj` cross-covariance of the
    two; a 3 x 3 convolution may mix these maps. With `proj=None` the whole covariance, d (d + 1) / 2 numbers, is read
    instead: the larger model that the compact one has to be held against.

    Args:
        dim: d of the tokens (n, t, d).
        n_classes: C.
        heads: how many pairs of projections.
        proj: p, or None for the whole covariance.
        conv: whether the 3 x 3 convolution is there.
        root: take signed square roots, so that no direction drowns the others.

    Raises:
        ValueError: a size below one.

    >>> probe = MomentProbe(16, 4, proj=3)
    >>> probe(torch.zeros(2, 10, 16)).shape, sum(p.numel() for p in probe.parameters())
    (torch.Size([2, 4]), 200)

    Paper: gao2023tuning
    Chapter: anomaly/gaussian-features
    """

    def __init__(
        self, dim: int, n_classes: int, heads: int = 1, proj: int | None = 3, conv: bool = False, root: bool = False
    ):
        super().__init__()
        check_positive_int(dim, "dim"), check_positive_int(n_classes, "n_classes"), check_positive_int(heads, "heads")
        self.root = root
        if proj is None:
            self.first = self.second = self.conv = None
            self.register_buffer("upper", torch.triu_indices(dim, dim), persistent=False)
            size = dim * (dim + 1) // 2
        else:
            p = check_positive_int(proj, "proj")
            self.first = nn.Parameter(torch.randn(heads, p, dim) / math.sqrt(dim))
            self.second = nn.Parameter(torch.randn(heads, p, dim) / math.sqrt(dim))
            self.conv = nn.Conv2d(heads, heads, 3, padding=1) if conv else None
            size = heads * p * p
        self.head = nn.Linear(dim, n_classes)
        self.second_order = nn.Linear(size, n_classes, bias=False)

    def moments(self, tokens: Tensor) -> Tensor:
        """Return the second-order part (n, size) that the head reads beside the mean."""
        if self.first is None:
            eye = torch.eye(tokens.shape[-1], dtype=tokens.dtype, device=tokens.device)
            flat = cross_covariance(tokens, eye, eye)[:, self.upper[0], self.upper[1]]
        else:
            maps = torch.stack([cross_covariance(tokens, p, q) for p, q in zip(self.first, self.second)], 1)
            flat = (maps if self.conv is None else self.conv(maps)).flatten(1)
        return flat.sign() * (flat.abs() + 1e-6).sqrt() if self.root else flat

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (n, C)."""
        return self.head(tokens.mean(1)) + self.second_order(self.moments(tokens))


def oriented_noise(
    n: int,
    n_classes: int = 4,
    size: int = 32,
    elongation: float = 3.0,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Draw noise that is smooth along one direction; the class is the direction, and nothing else.

    Mean and variance of every pixel are the same for all classes, 0 and 1: only how neighbours vary together differs.
    Class c is smoothed along the angle $\pi c / C$.

    Args:
        n: pictures.
        n_classes: C directions.
        size: side in pixels.
        elongation: ratio of the smoothing along and across, at least 1 (1: no direction).
        generator: a cpu generator; None means torch's default one.

    Returns:
        Pictures (n, 1, size, size) and labels (n,), each class equally often.

    Raises:
        ValueError: a setting out of range.

    >>> images, labels = oriented_noise(8, size=16, generator=torch.Generator().manual_seed(0))
    >>> images.shape, labels.tolist()
    (torch.Size([8, 1, 16, 16]), [0, 1, 2, 3, 0, 1, 2, 3])

    Paper: gao2023tuning
    Chapter: anomaly/gaussian-features
    """
    n, n_classes = check_positive_int(n, "n"), check_positive_int(n_classes, "n_classes")
    size, elongation = check_positive_int(size, "size", 4), check_in_range(elongation, "elongation", 1)
    labels = torch.arange(n) % n_classes
    f = torch.fft.fftfreq(size)
    angle = math.pi * torch.arange(n_classes) / n_classes
    along = f[None, :] * angle.cos().view(-1, 1, 1) + f[:, None] * angle.sin().view(-1, 1, 1)
    across = f[:, None] * angle.cos().view(-1, 1, 1) - f[None, :] * angle.sin().view(-1, 1, 1)
    response = torch.exp(-8 * ((elongation * along).square() + across.square()))  # (C, size, size)
    response = response / response.square().mean((1, 2), keepdim=True).sqrt()  # variance 1 at every pixel
    noise = torch.fft.fft2(torch.randn(n, size, size, generator=check_generator(generator)))
    return torch.fft.ifft2(noise * response[labels]).real[:, None], labels
