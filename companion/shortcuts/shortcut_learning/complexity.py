"""How much work a network has to do before a feature can be read off linearly.

Public: `readability`, `v_information`, `feature_complexity`, `GlyphPairs`, `make_glyph_pairs`, `GlyphNet`.
"""

from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion.checks import as_tensor, check_features, check_generator, check_in_range, check_positive_int

__all__ = ["GlyphNet", "GlyphPairs", "feature_complexity", "make_glyph_pairs", "readability", "v_information"]

_RIDGES = tuple(10.0**k for k in range(-4, 5))  # relative to the mean eigenvalue of the features' covariance


def readability(features: Any, target: Any, *, folds: int = 3) -> Tensor:
    r"""Return how much of a feature's variance a linear probe finds in a layer, cross-validated.

    $$R^2 = \max\Big(0,\; 1 - \frac{\sum_i (z_i - \hat z_i)^2}{\sum_i (z_i - \bar z)^2}\Big)$$

    $\hat z_i$ comes from ridge regression on the other folds; the penalty is chosen inside each of them by generalised
    cross-validation, so that no sample helps to predict itself.

    Args:
        features: (n, d), or (n, ...) which is flattened.
        target: (n,) numbers, or (n, k) for k features at once. Classes 0 and 1 will do.
        folds: at least 2; sample i is in fold i mod folds.

    Returns:
        A scalar in [0, 1], or (k,).

    Raises:
        ValueError: different lengths, fewer samples than two per fold, a constant target.

    >>> x = torch.arange(12.0)[:, None]
    >>> round(readability(x, 2 * x[:, 0] + 1).item(), 3), readability(x, (-1.0) ** x[:, 0]).item()
    (1.0, 0.0)

    Paper: fel2024understanding
    Chapter: shortcuts/shortcut-learning
    """
    folds = check_positive_int(folds, "folds", 2)
    h = as_tensor(features, "features")
    h = check_features(h.flatten(1) if h.dim() > 2 else h, "features", min_samples=2 * folds).detach().double()
    z = as_tensor(target, "target", h.device).detach().double()
    if z.dim() not in (1, 2) or len(z) != len(h) or not torch.isfinite(z).all():
        raise ValueError(f"expected a finite target ({len(h)},) or ({len(h)}, k), got shape {tuple(z.shape)}")
    columns = z[:, None] if z.dim() == 1 else z
    total = (columns - columns.mean(0)).square().sum(0)
    if (total <= 1e-12 * columns.square().sum(0).clamp_min(1e-300)).any():
        raise ValueError("expected a target that varies from sample to sample, got a constant one")
    fold = torch.arange(len(h), device=h.device) % folds
    residual = sum(_held_out_error(h, columns, fold == k) for k in range(folds))
    r2 = (1 - residual / total).clamp_min(0)
    return r2[0] if z.dim() == 1 else r2


def _held_out_error(h: Tensor, z: Tensor, test: Tensor) -> Tensor:
    """Return the squared error (k,) on the rows of `test` of ridge regressions on the other rows."""
    train = ~test
    centre_h, centre_z = h[train].mean(0), z[train].mean(0)
    a, b = h[train] - centre_h, z[train] - centre_z
    u, s, vt = torch.linalg.svd(a, full_matrices=False)
    if not len(s) or s[0] == 0:  # a constant layer: the mean is all there is to say
        return (z[test] - centre_z).square().sum(0)
    rotated = u.T @ b  # (r, k)
    eigen = s.square()
    ridges = torch.tensor(_RIDGES, dtype=s.dtype, device=s.device) * eigen.sum() / h.shape[1]
    keep = eigen / (eigen + ridges[:, None])  # (ridges, r): what the penalty leaves of each direction
    rest = b.square().sum(0) - rotated.square().sum(0)
    error = rest.clamp_min(0) + ((1 - keep)[:, :, None] * rotated).square().sum(1)  # (ridges, k)
    free = (len(a) - 1 - keep.sum(1)).clamp_min(1e-3)
    best = (error / free.square()[:, None]).argmin(0)  # generalised cross-validation, per target
    weights = vt.T @ (keep[best].T * rotated / s.clamp_min(s[0] * 1e-12)[:, None])  # (d, k)
    return (z[test] - centre_z - (h[test] - centre_h) @ weights).square().sum(0)


def v_information(features: Any, target: Any, *, folds: int = 3) -> Tensor:
    r"""Return the information about a feature that a linear reader can use in a layer, in nats.

    $$I_\mathcal{V}(h \to z) = H_\mathcal{V}(z) - H_\mathcal{V}(z \mid h) = -\tfrac12 \log(1 - R^2)$$

    for the family of linear readers with Gaussian errors. Unlike mutual information it can grow from layer to layer:
    computation makes information usable, though it cannot create any.

    Args:
        features: (n, d), or (n, ...) which is flattened.
        target: (n,), or (n, k) for k features at once.
        folds: as in `readability`.

    Returns:
        A scalar of at least 0, or (k,); infinite when the probe is exact.

    Raises:
        ValueError: as `readability`.

    >>> generator = torch.Generator().manual_seed(0)
    >>> z = torch.randn(20_000, generator=generator)
    >>> h = z + torch.randn(20_000, generator=generator)  # half of the variance is signal: log(2) / 2
    >>> round(v_information(h[:, None], z).item(), 2)
    0.35

    Paper: fel2024understanding
    Chapter: shortcuts/shortcut-learning
    """
    return -0.5 * torch.log1p(-readability(features, target, folds=folds))


def feature_complexity(activations: Mapping[str, Any], target: Any, *, folds: int = 3) -> Tensor:
    r"""Return a feature's complexity: one minus its mean readability over the layers, the input included.

    $$K(z) = 1 - \frac1L \sum_{l=1}^{L} R^2_l(z)$$

    0: readable in the pixels and everywhere after; near 1: readable in the last layer only, or never. A feature the
    network never learns has complexity 1 as well, so look at the last layer's `readability` too. We average $R^2$,
    which is bounded and increases with `v_information`, so that one exact layer cannot outweigh all others.

    Args:
        activations: {layer: (n, ...)}, in any order; pool maps to the same size first, or wide layers win by width.
        target: (n,), or (n, k) for k features at once.
        folds: as in `readability`.

    Returns:
        A scalar in [0, 1], or (k,).

    Raises:
        ValueError: no layers, or as `readability`.

    >>> x = torch.arange(12.0)[:, None]
    >>> layers = {"input": x, "last": torch.cat([x, (-1.0) ** x], dim=1)}
    >>> [round(k.item(), 2) for k in feature_complexity(layers, torch.cat([x, (-1.0) ** x], dim=1))]
    [0.0, 0.5]

    Paper: fel2024understanding
    Chapter: shortcuts/shortcut-learning
    """
    if not activations:
        raise ValueError("expected the activations of at least one layer, got none")
    r2 = torch.stack([readability(h, target, folds=folds) for h in activations.values()])
    return 1 - r2.mean(0)


class GlyphPairs(NamedTuple):
    """Pictures of two glyphs.

    `images` (n, 3, 16, 16); `factors` (n, 3) 0 or 1: the colour, the left glyph, whether the two glyphs are the same.
    """

    images: Tensor
    factors: Tensor


_PLUS = torch.zeros(5, 5)
_PLUS[2, :] = _PLUS[:, 2] = 1
_CROSS = torch.eye(5).maximum(torch.eye(5).flip(1))
_TINTS = torch.tensor([[1.0, 0.45, 0.45], [0.45, 1.0, 0.45]])


def make_glyph_pairs(n: int, *, noise: float = 0.15, generator: torch.Generator | None = None) -> GlyphPairs:
    """Draw pictures whose three binary factors need more and more of a network, by construction.

    Two glyphs, each a plus or a cross of nine pixels, one in the left and one in the right half, in random rows and
    columns. Their common colour is visible in every pixel of them; the left one's shape needs a filter as large as the
    glyph; whether the two are the same needs a receptive field that holds both.

    Args:
        n: pictures.
        noise: standard deviation of the pixels' noise.
        generator: a cpu generator; None means torch's default one.

    Returns:
        `GlyphPairs(images, factors)`; the factors are independent and balanced.

    Raises:
        ValueError: a setting out of range.

    >>> pairs = make_glyph_pairs(500, generator=torch.Generator().manual_seed(0))
    >>> pairs.images.shape, bool((pairs.factors.float().mean(0) - 0.5).abs().max() < 0.1)
    (torch.Size([500, 3, 16, 16]), True)

    Paper: fel2024understanding
    Chapter: shortcuts/shortcut-learning
    """
    n, generator = check_positive_int(n, "n"), check_generator(generator)
    noise = check_in_range(noise, "noise", 0)
    color, left, relation = factors = torch.randint(2, (3, n), generator=generator)
    right = torch.where(relation == 1, left, 1 - left)  # 1: the same glyph twice
    glyphs = torch.stack([_PLUS, _CROSS])
    canvas = torch.zeros(n, 16, 16, dtype=glyphs.dtype)
    at = torch.arange(n)[:, None, None]
    span = torch.arange(5)
    for side, kind in enumerate((left, right)):
        row = torch.randint(12, (n, 1, 1), generator=generator) + span[:, None]
        column = torch.randint(4, (n, 1, 1), generator=generator) + 8 * side + span
        canvas[at, row, column] = glyphs[kind]
    brightness = 0.6 + 0.8 * torch.rand(n, 1, 1, 1, generator=generator)
    images = canvas[:, None] * brightness * _TINTS[color][:, :, None, None]
    return GlyphPairs(images + noise * torch.randn(images.shape, generator=generator), factors.T.contiguous())


class GlyphNet(nn.Module):
    """A residual network small enough to know what each layer can see: a stem and four blocks of two convolutions.

    Maps are halved after the first and the second block. One output of the stem sees 3 pixels, of block 1 seven, of
    block 2 sixteen. No normalisation: what a branch adds is added.

    Args:
        n_outputs: of the head.
        width: channels.
        seed: of the initial weights; None draws them from torch's default generator.

    Raises:
        ValueError: a size below one.

    >>> net = GlyphNet(seed=0)
    >>> taps = net.activations(torch.zeros(2, 3, 16, 16))
    >>> list(taps), taps["block4"].shape
    (['input', 'stem', 'block1', 'block2', 'block3', 'block4'], torch.Size([2, 16, 4, 4]))

    Paper: fel2024understanding
    Chapter: shortcuts/shortcut-learning
    """

    def __init__(self, n_outputs: int = 3, width: int = 16, seed: int | None = None):
        super().__init__()
        check_positive_int(n_outputs, "n_outputs"), check_positive_int(width, "width")
        with torch.random.fork_rng(devices=[]):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            self.stem = nn.Conv2d(3, width, 3, padding=1)
            self.branches = nn.ModuleDict(
                OrderedDict(
                    (
                        f"block{i}",
                        nn.Sequential(
                            nn.ReLU(),
                            nn.Conv2d(width, width, 3, padding=1),
                            nn.ReLU(),
                            nn.Conv2d(width, width, 3, padding=1),
                        ),
                    )
                    for i in range(1, 5)
                )
            )
            self.head = nn.Linear(width * 16, n_outputs)

    def activations(self, x: Tensor, without: Collection[str] = ()) -> dict[str, Tensor]:
        """Return the input and the output of every layer, all averaged to 4 x 4 maps.

        Args:
            x: (n, 3, 16, 16).
            without: blocks whose residual branch is switched off, such as ("block1",): only the skip path remains.

        Raises:
            ValueError: there is no such block.
        """
        unknown = set(without) - set(self.branches)
        if unknown:
            raise ValueError(f"expected blocks among {list(self.branches)}, got {sorted(unknown)}")
        taps = {"input": x}
        h = taps["stem"] = self.stem(x)
        for name, branch in self.branches.items():
            h = h if name in without else h + branch(h)
            if name in ("block1", "block2"):
                h = F.max_pool2d(h, 2)
            taps[name] = h
        return {name: F.adaptive_avg_pool2d(tap, 4) for name, tap in taps.items()}

    def features(self, x: Tensor) -> Tensor:
        """Return what the head reads: (n, 16 * width)."""
        return self.activations(x)["block4"].relu().flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return one logit per factor: (n, n_outputs)."""
        return self.head(self.features(x))
