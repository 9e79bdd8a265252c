"""The house style of pictures: figures with alt text and caption, and animations that play offline.

Public: `use_style` (importing this module calls it), `COLORS`, `subplots`, `show`, `animate`.
"""

import base64
import hashlib
import html
import io
import json
from collections.abc import Callable, Iterable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from PIL import Image

from companion.show import put

__all__ = ["BACKGROUND", "COLORS", "animate", "show", "subplots", "use_style"]

# Okabe and Ito's palette without its yellow, which is too light for lines: told apart in every kind of colour vision.
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d"]
BACKGROUND = "#fbfbf8"
WIDTH = 7.0  # inches
DPI = 100  # dots per css inch; files hold twice as many for sharp screens

_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#555555",
    "axes.facecolor": BACKGROUND,
    "axes.grid": True,
    "axes.labelsize": 10,
    "axes.prop_cycle": plt.cycler(color=COLORS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.dpi": DPI,
    "figure.facecolor": BACKGROUND,
    "figure.figsize": (WIDTH, 4.0),
    "font.family": ["DejaVu Sans"],  # comes with matplotlib, so that every machine draws the same
    "font.size": 10,
    "grid.alpha": 0.6,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.8,
    "image.cmap": "viridis",
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "savefig.facecolor": BACKGROUND,
    "svg.hashsalt": "companion",
    "text.color": "#222222",
    "axes.labelcolor": "#222222",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


def use_style() -> None:
    """Set matplotlib to the style of the book. `matplotlib.rcdefaults()` undoes it.

    >>> use_style()
    >>> plt.rcParams["figure.figsize"]
    [7.0, 4.0]
    """
    plt.rcParams.update(_STYLE)


def subplots(nrows: int = 1, ncols: int = 1, height: float | None = None, **keywords: Any) -> tuple[Figure, Any]:
    """Return a figure of the book's width and its axes, as `matplotlib.pyplot.subplots` does.

    Args:
        nrows: rows of axes.
        ncols: columns of axes.
        height: in inches; 4, or 2.8 for a single row of several axes.
        **keywords: passed on, such as `sharey=True`.

    >>> fig, axes = subplots(ncols=2)
    >>> fig.get_size_inches().tolist(), axes.shape
    ([7.0, 2.8], (2,))
    >>> plt.close(fig)
    """
    if height is None:
        height = 2.8 if nrows == 1 and ncols > 1 else 4.0
    return plt.subplots(nrows, ncols, figsize=keywords.pop("figsize", (WIDTH, height)), **keywords)


def show(fig: Figure, *, alt: str, caption: str) -> None:
    """Display a figure with alt text and caption, and close it.

    The picture is a png twice as dense as the screen, with a reduced palette where the eye cannot tell; its bytes are
    the same on every run.

    Args:
        fig: a matplotlib figure.
        alt: what the figure shows, for those who do not see it.
        caption: what the figure finds, in a sentence.

    Raises:
        ValueError: alt text or caption are missing, the alt text only repeats the caption, or a panel is empty: nothing
            was drawn in it, or nothing but NaN.
        TypeError: fig is no figure.
    """
    if not isinstance(fig, Figure):
        raise TypeError(f"expected a matplotlib figure, got {type(fig).__name__}")
    try:
        alt, caption = _words(alt, caption)
        for place, ax in enumerate(fig.axes, 1):
            if ax.axison and ax.get_visible() and not _shows_something(ax):
                raise ValueError(
                    f"expected something to see in each panel, got nothing, or nothing but NaN, in panel {place} of"
                    f" {len(fig.axes)}; ax.set_axis_off() leaves one out"
                )
            if ax.images:
                ax.grid(False)  # lines across a picture hide it
        image = _picture(fig, 2 * DPI)
        width = round(fig.get_size_inches()[0] * DPI)
    finally:
        plt.close(fig)
    bundle = {
        "text/html": _figure(_img(_encode(_reduced(image)), alt, width), caption),
        "text/plain": f"Figure: {caption}\n[{alt}]",
    }
    put(bundle)


def _shows_something(ax: Axes) -> bool:
    """Say whether axes have a picture, a shape, a text, or a point or line that is not all NaN."""
    if ax.images or ax.patches or ax.texts or ax.tables:
        return True
    points = [line.get_xydata() for line in ax.lines]
    for collection in ax.collections:
        if isinstance(collection, PathCollection):  # points; the rest are lines and areas
            points.append(collection.get_offsets())
        else:
            points.extend(path.vertices for path in collection.get_paths())
    return any(np.isfinite(np.ma.filled(np.ma.asarray(xy, dtype=float), np.nan)).all(1).any() for xy in points)


def animate(
    draw: Callable[[Any, Any], Any],
    frames: int | Iterable[Any],
    *,
    alt: str,
    caption: str,
    fps: float = 10,
    still: int = -1,
    height: float | None = None,
    nrows: int = 1,
    ncols: int = 1,
) -> None:
    """Display an animation with play button and slider; it plays offline and starts still.

    Where no script runs, and in print, the still frame stays. Frames store only what differs from it.

    Args:
        draw: called as `draw(ax, frame)` for each frame on fresh axes (an array of axes where there are several).
        frames: how many frames (0, 1, ..., n-1 are drawn), or the frames themselves.
        alt: what the animation shows, its course included.
        caption: what it finds, in a sentence.
        fps: frames per second.
        still: the frame shown before it plays, by position.
        height: in inches.
        nrows: rows of axes.
        ncols: columns of axes.

    Raises:
        ValueError: alt text or caption are missing, there are fewer than two frames, or fps is not positive.
    """
    alt, caption = _words(alt, caption)
    frames = list(range(frames)) if isinstance(frames, int) else list(frames)
    if len(frames) < 2:
        raise ValueError(f"expected at least two frames, got {len(frames)}")
    if not 0 < fps <= 60:
        raise ValueError(f"expected between 0 and 60 frames per second, got {fps}")
    if not -len(frames) <= still < len(frames):
        raise ValueError(f"expected the still frame among {len(frames)}, got {still}")
    fig, _ = subplots(nrows, ncols, height=height)
    width = round(fig.get_size_inches()[0] * DPI)
    pictures = []
    try:
        for frame in frames:
            fig.clear()
            draw(fig.subplots(nrows, ncols), frame)
            pictures.append(_picture(fig, DPI))
    finally:
        plt.close(fig)
    base, layers = _layers(pictures, still)
    put(
        {
            "text/html": _player(base, layers, alt, caption, width, fps, still % len(frames)),
            "text/plain": f"Animation of {len(frames)} frames: {caption}\n[{alt}]",
        }
    )


def _words(alt: Any, caption: Any) -> tuple[str, str]:
    for name, text in (("alt", alt), ("caption", caption)):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"expected {name} text that says what the figure shows, got {text!r}")
    alt, caption = " ".join(alt.split()), " ".join(caption.split())
    if alt == caption:
        raise ValueError(
            "expected alt text that describes the picture and a caption that states the finding, got twins"
        )
    return alt, caption


def _picture(fig: Figure, dpi: int) -> Image.Image:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return Image.open(buffer).convert("RGB")


def _reduced(image: Image.Image) -> Image.Image:
    """The picture with 256 colours where nobody sees a difference (40 dB), else the picture."""
    palette = image.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    difference = np.asarray(palette.convert("RGB"), dtype=np.float32) - np.asarray(image, dtype=np.float32)
    return palette if float((difference**2).mean()) < 6.5 else image


def _encode(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _img(data: str, alt: str, width: int) -> str:
    # Without max-width a wide picture would push the page sideways on a phone.
    return (
        f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}" '
        f'style="width:{width}px;max-width:100%;height:auto;display:block;border-radius:4px">'
    )


def _figure(inside: str, caption: str, attributes: str = 'class="companion-figure"') -> str:
    return (
        f'<figure {attributes} style="margin:1em 0">{inside}\n'
        f'<figcaption style="margin:.4em 0;max-width:46em">{html.escape(caption)}</figcaption></figure>'
    )


def _layers(pictures: list[Image.Image], still: int) -> tuple[str, list[list[Any]]]:
    """The still frame, and for each frame what to lay over it: [left, top, width, height in percent, png]."""
    codes = [_codes(picture) for picture in pictures]
    colors, counts = np.unique(np.concatenate([np.unique(code) for code in codes]), return_counts=True)
    if len(colors) > 127:
        # The commonest colours stay exact (background, lines); the rest share what is left of the palette.
        ranked = colors[np.argsort(-counts, kind="stable")]
        common = np.unique(np.concatenate([_commonest(codes[still], 48), ranked[:15]]))
        strip = Image.fromarray(_rgb(np.setdiff1d(colors, common))[None])
        shared = strip.quantize(127 - len(common), method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        colors = np.unique(np.concatenate([common, _codes(shared.convert("RGB")).ravel()]))
    indexed = [_nearest(code, colors) for code in codes]
    flat = _rgb(colors).ravel().tolist()
    palette = [*flat, *[0] * (384 - len(flat))]

    def encode(pixels: np.ndarray, clear: bool) -> str:
        image = Image.frombytes("P", pixels.shape[::-1], np.ascontiguousarray(pixels).tobytes())
        image.putpalette(palette)
        buffer = io.BytesIO()
        image.save(buffer, format="png", optimize=True, **({"transparency": 127} if clear else {}))
        return base64.b64encode(buffer.getvalue()).decode("ascii")

    base = indexed[still]
    height, width = base.shape
    layers: list[list[Any]] = []
    for pixels in indexed:
        changed = pixels != base
        if not changed.any():
            layers.append([])
            continue
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        part = np.where(changed, pixels, 127)[box].astype(np.uint8)
        place = [100 * box[1].start / width, 100 * box[0].start / height]
        place += [100 * part.shape[1] / width, 100 * part.shape[0] / height]
        layers.append([*(round(float(p), 4) for p in place), encode(part, clear=True)])
    return encode(base, clear=False), layers


def _codes(picture: Image.Image) -> np.ndarray:
    """Each pixel as one number, red first."""
    red, green, blue = np.moveaxis(np.asarray(picture, dtype=np.int64), -1, 0)
    return (red << 16) + (green << 8) + blue


def _rgb(codes: np.ndarray) -> np.ndarray:
    return np.stack([codes >> 16, codes >> 8 & 255, codes & 255], -1).astype(np.uint8)


def _commonest(codes: np.ndarray, n: int) -> np.ndarray:
    values, counts = np.unique(codes, return_counts=True)
    return values[np.argsort(-counts, kind="stable")[:n]]


def _nearest(codes: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """The position of the nearest colour of the palette, for each pixel."""
    values, inverse = np.unique(codes, return_inverse=True)
    have, want = _rgb(values).astype(np.float32), _rgb(colors).astype(np.float32)
    squared = (have**2).sum(1)[:, None] - 2 * have @ want.T + (want**2).sum(1)
    return squared.argmin(1)[inverse].reshape(codes.shape).astype(np.uint8)


def _player(base: str, layers: list, alt: str, caption: str, width: int, fps: float, still: int) -> str:
    data = json.dumps(layers, separators=(",", ":"))
    name = "animation-" + hashlib.sha256(f"{data}{alt}{caption}{fps}".encode()).hexdigest()[:12]
    last = len(layers) - 1
    inside = (
        f'<div style="position:relative;width:{width}px;max-width:100%">{_img(base, alt, width)}'
        f'<img class="companion-layer" alt="" aria-hidden="true" style="position:absolute;display:none"></div>\n'
        f'<div class="companion-controls" hidden style="align-items:center;gap:.6em;width:{width}px;max-width:100%">'
        f'<button type="button" style="min-width:5.5em;padding:.3em .6em;font:inherit">Play</button>'
        f'<input type="range" min="0" max="{last}" value="{still}" step="1" aria-label="Frame" style="flex:1">'
        f'<output style="min-width:5em;text-align:right">{still + 1} / {last + 1}</output></div>\n'
        f"<style>@media print{{#{name} .companion-layer,#{name} .companion-controls{{display:none!important}}}}</style>"
    )
    script = _SCRIPT.replace("NAME", json.dumps(name)).replace("LAYERS", data).replace("PAUSE", f"{1000 / fps:g}")
    attributes = f'class="companion-figure companion-animation" id="{name}"'
    return f"{_figure(inside, caption, attributes)}\n<script>{script}</script>"


# A reader who asks for less motion gets a button that steps; nothing starts by itself.
_SCRIPT = """
(function () {
  const layers = LAYERS, root = document.getElementById(NAME);
  if (!root) return;
  const layer = root.querySelector(".companion-layer"), bar = root.querySelector(".companion-controls");
  const button = root.querySelector("button"), slider = root.querySelector("input"), out = root.querySelector("output");
  const calm = window.matchMedia && window.matchMedia("(prefers-reduced-motion: reduce)").matches;
  let timer = null;
  function draw() {
    const i = Number(slider.value), part = layers[i];
    layer.style.display = part.length ? "block" : "none";
    if (part.length) {
      ["left", "top", "width", "height"].forEach((side, j) => { layer.style[side] = part[j] + "%"; });
      layer.src = "data:image/png;base64," + part[4];
    }
    out.textContent = (i + 1) + " / " + layers.length;
  }
  function stop() { clearInterval(timer); timer = null; button.textContent = calm ? "Next" : "Play"; }
  function step() { slider.value = (Number(slider.value) + 1) % layers.length; draw(); }
  button.addEventListener("click", () => {
    if (calm) { step(); return; }
    if (timer) { stop(); return; }
    if (Number(slider.value) === layers.length - 1) { slider.value = 0; draw(); }
    button.textContent = "Pause";
    timer = setInterval(() => { step(); if (Number(slider.value) === layers.length - 1) stop(); }, PAUSE);
  });
  slider.addEventListener("input", () => { stop(); draw(); });
  bar.hidden = false;
  bar.style.display = "flex";
  stop();
})();
"""

use_style()
