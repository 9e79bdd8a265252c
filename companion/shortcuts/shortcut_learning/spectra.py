"""How a picture's power falls with frequency, a detector that lives on it, and a last layer that blinds the detector.

Public: `radial_power_spectrum`, `SpectralDecay`, `spectral_decay_fit`, `SpectrumDetector`, `make_random_fields`,
`Upsampler`, `match_spectrum`.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from companion.checks import as_tensor, check_binary, check_generator, check_in_range, check_positive_int
from companion.geometry import single

__all__ = [
    "SpectralDecay",
    "SpectrumDetector",
    "Upsampler",
    "make_random_fields",
    "match_spectrum",
    "radial_power_spectrum",
    "spectral_decay_fit",
]

KINDS = ("zero", "nearest", "bilinear")
WINDOWS = ("hann", "none")
_FLOOR = 1e-12  # of the power, before its logarithm is taken


def _check_images(images: Any, name: str = "images") -> Tensor:
    x = as_tensor(images, name)
    x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
    x = x[:, None] if x.dim() == 3 else x
    if x.dim() != 4 or min(x.shape) < 1 or min(x.shape[2:]) < 4:
        raise ValueError(
            f"expected {name} (n, c, h, w) or (n, h, w) of at least 4 x 4, got shape {tuple(as_tensor(images).shape)}"
        )
    if not torch.isfinite(x.detach()).all():
        raise ValueError(f"expected finite {name}, got NaN or infinity")
    return x


def radial_power_spectrum(images: Any, *, window: str = "hann", corners: bool = False, log: bool = True) -> Tensor:
    r"""Return each picture's power per ring of spatial frequencies, from the coarsest to the Nyquist frequency.

    $$S(r) = \log\, \frac{1}{|R_r|} \sum_{(u, v) \in R_r} \big|\hat x(u, v)\big|^2, \qquad
      R_r = \{(u, v) : \mathrm{round}\sqrt{u^2 + v^2} = r\}$$

    u and v count periods per side (per shorter side when the picture is not square). Ring 0, the mean, is left out. A
    window fades the borders, which otherwise leak a cross of high frequencies that belongs to the frame and not to the
    picture; the mean is removed first.

    Args:
        images: (n, c, h, w) or (n, h, w); power is averaged over the channels.
        window: "hann", or "none".
        corners: keep the rings beyond half the side, which exist in diagonal directions only.
        log: False gives the power itself.

    Returns:
        (n, rings), differentiable; column k is ring k + 1. There are side // 2 rings without corners.

    Raises:
        ValueError: not pictures, an unknown window.

    >>> x = torch.cos(2 * math.pi * 3 * torch.arange(16) / 16).expand(1, 16, 16)  # three periods
    >>> power = radial_power_spectrum(x, window="none", log=False)
    >>> power.shape, int(power[0].argmax()) + 1
    (torch.Size([1, 8]), 3)

    Paper: chandrasegaran2021closer
    Chapter: shortcuts/shortcut-learning
    """
    x = _check_images(images)
    if window not in WINDOWS:
        raise ValueError(f"expected window among {WINDOWS}, got {window!r}")
    height, width = x.shape[2:]
    dtype, x = x.dtype, single(x)
    x = x - x.mean((2, 3), keepdim=True)
    if window == "hann":
        fade = [torch.hann_window(side, periodic=False, dtype=x.dtype, device=x.device) for side in (height, width)]
        x = x * fade[0][:, None] * fade[1]
    power = torch.fft.fft2(x, norm="ortho").abs().square().mean(1).flatten(1)  # (n, h * w)
    ring = _rings(height, width)
    member = F.one_hot(ring)[:, 1 : None if corners else min(height, width) // 2 + 1].to(power)  # (h * w, rings)
    mean = power @ (member / member.sum(0).clamp_min(1))
    return (mean.clamp_min(_FLOOR).log() if log else mean).to(dtype)


def _rings(height: int, width: int) -> Tensor:
    """Return the ring (h * w,) of each frequency: its distance from 0, rounded."""
    side = min(height, width)
    u = torch.fft.fftfreq(height, dtype=torch.float64) * side
    v = torch.fft.fftfreq(width, dtype=torch.float64) * side
    return (u[:, None].square() + v.square()).sqrt().round().long().flatten()


class SpectralDecay(NamedTuple):
    """A straight line through a log-log spectrum. `slope` (n,), negative for natural pictures; `intercept` (n,)."""

    slope: Tensor
    intercept: Tensor


def spectral_decay_fit(spectrum: Any, first: int = 1, last: int | None = None) -> SpectralDecay:
    r"""Fit a power law to spectra: $S(r) \approx \mathrm{intercept} + \mathrm{slope} \cdot \log r$, by least squares.

    Args:
        spectrum: (n, rings) log power, as `radial_power_spectrum` returns it.
        first: first ring that counts, from 1.
        last: last ring that counts; None: all of them.

    Returns:
        `SpectralDecay(slope, intercept)`, one number per picture.

    Raises:
        ValueError: not spectra, or fewer than two rings.

    >>> r = torch.arange(1.0, 17.0)
    >>> slope, intercept = spectral_decay_fit((5 - 3 * r.log())[None])
    >>> round(slope.item(), 3), round(intercept.item(), 3)
    (-3.0, 5.0)

    Paper: chandrasegaran2021closer
    Chapter: shortcuts/shortcut-learning
    """
    s = as_tensor(spectrum, "spectrum")
    if s.dim() != 2 or not s.is_floating_point():
        raise ValueError(f"expected log power (n, rings), got shape {tuple(s.shape)} of {s.dtype}")
    first = check_positive_int(first, "first")
    last = s.shape[1] if last is None else check_positive_int(last, "last")
    if not first < last <= s.shape[1]:
        raise ValueError(f"expected first < last <= {s.shape[1]}, got {first} and {last}")
    r = torch.arange(first, last + 1, dtype=s.dtype, device=s.device).log()
    y, centred = s[:, first - 1 : last], r - r.mean()
    slope = y @ centred / centred.square().sum()
    return SpectralDecay(slope, y.mean(1) - slope * r.mean())


class SpectrumDetector(ClassifierMixin, BaseEstimator):
    """Tell generated pictures from real ones by their radial power spectrum alone: logistic regression on `S(r)`.

    It reads no content, which is its strength and its weakness: whatever fixes the spectrum is invisible to it.

    Args:
        C: inverse strength of the penalty.
        window: as in `radial_power_spectrum`.

    Attributes:
        classes_: 0 (real) and 1 (generated).
        n_rings_: length of the spectra.
        model_: the fitted pipeline.

    >>> rng = torch.Generator().manual_seed(0)
    >>> smooth, rough = make_random_fields(80, 16, 1.5, generator=rng), make_random_fields(80, 16, 0.5, generator=rng)
    >>> detector = SpectrumDetector().fit(torch.cat([smooth, rough]), [0] * 80 + [1] * 80)
    >>> float(detector.score(torch.cat([smooth, rough]), [0] * 80 + [1] * 80)) > 0.95
    True

    Paper: chandrasegaran2021closer
    Chapter: shortcuts/shortcut-learning
    """

    def __init__(self, C: float = 1.0, window: str = "hann") -> None:
        self.C = C
        self.window = window

    def _spectra(self, images: Any) -> np.ndarray:
        with torch.no_grad():
            return radial_power_spectrum(images, window=self.window).cpu().double().numpy()

    def fit(self, images: Any, labels: Any) -> "SpectrumDetector":
        """Fit on pictures (n, c, h, w) or (n, h, w) with labels (n,): 0 real, 1 generated.

        Raises:
            ValueError: not pictures, labels other than 0 and 1, a single class.
        """
        check_in_range(self.C, "C", 0, inclusive="neither")
        spectra = self._spectra(images)
        y = check_binary(labels, len(spectra)).cpu().numpy().astype(np.int64)
        if y.min() == y.max():
            raise ValueError(f"expected real (0) and generated (1) pictures, got only {y[0]}")
        self.model_ = make_pipeline(StandardScaler(), LogisticRegression(C=self.C, max_iter=1000)).fit(spectra, y)
        self.classes_ = np.array([0, 1])
        self.n_rings_ = spectra.shape[1]
        return self

    def decision_function(self, images: Any) -> np.ndarray:
        """Return scores (n,), above 0 for pictures taken for generated.

        Raises:
            NotFittedError: `fit` has not been called.
            ValueError: not pictures, or pictures of another size.
        """
        check_is_fitted(self)
        spectra = self._spectra(images)
        if spectra.shape[1] != self.n_rings_:
            raise ValueError(f"expected pictures as in fit ({self.n_rings_} rings), got {spectra.shape[1]} rings")
        return self.model_.decision_function(spectra)

    def predict_proba(self, images: Any) -> np.ndarray:
        """Return probabilities (n, 2): real, generated."""
        p = 1 / (1 + np.exp(-self.decision_function(images)))
        return np.stack([1 - p, p], axis=1)

    def predict(self, images: Any) -> np.ndarray:
        """Return classes (n,): 0 real, 1 generated."""
        return (self.decision_function(images) > 0).astype(np.int64)


def make_random_fields(
    n: int, size: int = 32, exponent: float = 1.5, *, generator: torch.Generator | None = None
) -> Tensor:
    r"""Draw random pictures whose amplitude falls as $1/f^{\,\mathrm{exponent}}$, as that of natural pictures does.

    Args:
        n: pictures.
        size: side in pixels.
        exponent: of the amplitude; the power falls twice as fast. Natural pictures lie between 1 and 1.5.
        generator: a cpu generator; None means torch's default one.

    Returns:
        (n, 1, size, size), mean 0 and standard deviation 1 each.

    Raises:
        ValueError: a setting out of range.

    >>> fields = make_random_fields(200, 64, exponent=1.0, generator=torch.Generator().manual_seed(0))
    >>> spectrum = radial_power_spectrum(fields, window="none", log=False).mean(0, keepdim=True).log()
    >>> round(spectral_decay_fit(spectrum, 2, 32).slope.item(), 1)
    -2.0

    Paper: chandrasegaran2021closer
    Chapter: shortcuts/shortcut-learning
    """
    n, size = check_positive_int(n, "n"), check_positive_int(size, "size", 4)
    exponent = check_in_range(exponent, "exponent", 0)
    f = torch.fft.fftfreq(size) * size
    radius = (f[:, None].square() + f.square()).sqrt()
    amplitude = torch.where(radius > 0, radius.clamp_min(1) ** -exponent, 0.0)
    noise = torch.fft.fft2(torch.randn(n, 1, size, size, generator=check_generator(generator)))
    x = torch.fft.ifft2(noise * amplitude).real
    return x / x.std((2, 3), keepdim=True)


class Upsampler(nn.Module):
    r"""The last layer of a generator: double the side, then one convolution.

    "zero" puts a zero after every pixel (a transposed convolution); "nearest" repeats, "bilinear" interpolates. The
    zeros mirror the coarse spectrum into the high frequencies, and only the kernel can take the mirror image away.

    Args:
        kind: "zero", "nearest" or "bilinear".
        in_channels: of the coarse pictures.
        kernel_size: k; there are in_channels * k * k weights.
        seed: of the initial weights; None draws them from torch's default generator.

    Raises:
        ValueError: an unknown kind, a size below one.

    >>> up = Upsampler("zero", in_channels=2, kernel_size=4, seed=0)
    >>> up(torch.zeros(3, 2, 16, 16)).shape, sum(p.numel() for p in up.parameters())
    (torch.Size([3, 1, 32, 32]), 32)

    Paper: chandrasegaran2021closer
    Chapter: shortcuts/shortcut-learning
    """

    def __init__(self, kind: str = "zero", in_channels: int = 2, kernel_size: int = 5, seed: int | None = None):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"expected kind among {KINDS}, got {kind!r}")
        self.kind = kind
        self.kernel_size = check_positive_int(kernel_size, "kernel_size")
        fan = check_positive_int(in_channels, "in_channels") * self.kernel_size**2
        with torch.random.fork_rng(devices=[]):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            kernel = torch.randn(1, in_channels, self.kernel_size, self.kernel_size) / math.sqrt(fan)
        self.kernel = nn.Parameter(2 * kernel if kind == "zero" else kernel)  # three of four inputs are zeros

    def forward(self, coarse: Tensor) -> Tensor:
        """Return pictures (n, 1, 2h, 2w) from coarse ones (n, in_channels, h, w)."""
        if self.kind == "zero":
            x = coarse.new_zeros(*coarse.shape[:2], 2 * coarse.shape[2], 2 * coarse.shape[3])
            x[..., ::2, ::2] = coarse
        elif self.kind == "nearest":
            x = F.interpolate(coarse, scale_factor=2, mode="nearest")
        else:
            x = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
        left = (self.kernel_size - 1) // 2
        right = self.kernel_size - 1 - left
        return F.conv2d(F.pad(x, (left, right, left, right), mode="circular"), self.kernel)


def match_spectrum(
    upsampler: Upsampler, coarse: Tensor, target: Tensor, *, last: int | None = None, steps: int = 60
) -> list[float]:
    r"""Tune an upsampler's kernel, in place, until the mean spectrum of its pictures is the one you want.

    $$\ell = \frac1{|r|} \sum_r \big(\log \bar P_\mathrm{made}(r) - \log \bar P_\mathrm{target}(r)\big)^2$$

    with the power $\bar P$ averaged over pictures. The loss sees no content, only how power falls with frequency. The
    problem is small and smooth: L-BFGS with a line search.

    Args:
        upsampler: whose kernel is tuned.
        coarse: what it upsamples (n, c, h, w).
        target: mean power (rings,) of real pictures, `radial_power_spectrum(real, log=False).mean(0)`.
        last: the last ring that counts; None: all of them. A layer that is fitted to coarse structure only is left with
            whatever tail its architecture gives it.
        steps: of L-BFGS, at most.

    Returns:
        The loss at each evaluation.

    Raises:
        ValueError: steps or last below one, a target of another length.

    >>> rng = torch.Generator().manual_seed(0)
    >>> coarse, real = torch.randn(8, 1, 8, 8, generator=rng), make_random_fields(8, 16, generator=rng)
    >>> target = radial_power_spectrum(real, log=False).mean(0)
    >>> losses = match_spectrum(Upsampler("zero", in_channels=1, seed=0), coarse, target, steps=20)
    >>> losses[-1] < losses[0]
    True

    Paper: chandrasegaran2021closer
    Chapter: shortcuts/shortcut-learning
    """
    check_positive_int(steps, "steps")
    rings = slice(None if last is None else check_positive_int(last, "last"))
    wanted, losses = target.detach().clamp_min(_FLOOR).log(), []
    optimizer = torch.optim.LBFGS([upsampler.kernel], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        made = radial_power_spectrum(upsampler(coarse), log=False).mean(0)
        if made.shape != wanted.shape:
            raise ValueError(f"expected a target of {len(made)} rings, got {tuple(wanted.shape)}")
        loss = (made.clamp_min(_FLOOR).log() - wanted)[rings].square().mean()
        loss.backward()
        losses.append(loss.item())
        return loss

    optimizer.step(closure)
    return losses
