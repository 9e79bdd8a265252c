"""Tests of companion.figures: no picture without words, the same bytes each time, animations that need no network."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

import companion.figures
from companion.figures import COLORS, animate, show, subplots

WORDS = {"alt": "A line from 1 to 2.", "caption": "It rises."}


@pytest.fixture
def shown(monkeypatch):
    bundles = []
    monkeypatch.setattr(companion.figures, "put", bundles.append)
    yield bundles
    plt.close("all")


def line(ax, slope=1):
    ax.plot([0, 1], [0, slope])
    ax.set(xlabel="time (s)", ylabel="distance (m)", ylim=(0, 5))


def pictures(text):
    found = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", text)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def test_a_figure_carries_words_and_is_closed(shown):
    fig, ax = subplots()
    line(ax)
    show(fig, alt='A "line" < 2.', caption="It   rises & rises.")
    assert 'alt="A &quot;line&quot; &lt; 2."' in shown[0]["text/html"]
    assert "It rises &amp; rises.</figcaption>" in shown[0]["text/html"]
    assert shown[0]["text/plain"] == 'Figure: It rises & rises.\n[A "line" < 2.]'
    assert not plt.fignum_exists(fig.number)


def test_bytes_are_the_same_each_time_and_twice_as_dense(shown):
    for _ in range(2):
        fig, ax = subplots(height=2)
        line(ax)
        show(fig, **WORDS)
    assert shown[0] == shown[1]
    (image,) = pictures(shown[0]["text/html"])
    assert image.size == (1400, 400)
    assert "Software" not in image.info
    assert image.mode == "P"
    assert len(shown[0]["text/html"]) < 60_000


def test_the_palette_is_reduced_only_where_nobody_sees_it():
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (200, 200, 3), dtype=np.uint8))
    assert companion.figures._reduced(noise) is noise


@pytest.mark.parametrize(
    "words",
    [
        {"alt": "", "caption": "c"},
        {"alt": "a", "caption": " "},
        {"alt": None, "caption": "c"},
        {"alt": "a", "caption": "a"},
    ],
)
def test_no_picture_without_words(shown, words):
    fig, _ = subplots()
    with pytest.raises(ValueError, match="text"):
        show(fig, **words)
    assert not plt.fignum_exists(fig.number)
    with pytest.raises(ValueError, match="text"):
        animate(line, 3, **words)


NOTHING = {
    "not drawn in": lambda ax: None,
    "a line of NaN": lambda ax: ax.plot([0, 1], [np.nan, np.nan]),
    "never both finite": lambda ax: ax.plot([0, np.nan], [np.nan, 1]),
    "an empty line": lambda ax: ax.plot([], [], label="none"),
    "points of NaN": lambda ax: ax.scatter([0.0, np.nan], [np.nan, 1.0]),
    "one point of NaN": lambda ax: ax.scatter([np.nan], [np.nan]),
    "an area of NaN": lambda ax: ax.fill_between([0, 1], [np.nan] * 2, [np.nan] * 2),
}
SOMETHING = {
    "one point": lambda ax: ax.scatter([0.0], [1.0]),
    "a point beside NaN": lambda ax: ax.plot([0, 1], [np.nan, 1], "o"),
    "bars": lambda ax: ax.bar([0, 1], [1, 2]),
    "a picture": lambda ax: ax.imshow([[0, 1]]),
    "an area": lambda ax: ax.fill_between([0, 1], [0, 1]),
    "cells": lambda ax: ax.pcolormesh([[0, 1], [1, 0]]),
    "a contour": lambda ax: ax.contour([[0, 1], [1, 0]]),
    "bars of error": lambda ax: ax.errorbar([0], [1], yerr=[1], fmt="none"),
    "words": lambda ax: ax.text(0, 0, "none found"),
    "left out": lambda ax: ax.set_axis_off(),
}


@pytest.mark.parametrize("draw", NOTHING.values(), ids=NOTHING)
def test_an_empty_panel_is_refused(shown, draw):
    fig, axes = subplots(ncols=2)
    line(axes[0])
    draw(axes[1])
    with pytest.raises(ValueError, match="panel 2 of 2"):
        show(fig, **WORDS)
    assert not plt.fignum_exists(fig.number)


@pytest.mark.parametrize("draw", SOMETHING.values(), ids=SOMETHING)
def test_a_panel_with_something_is_shown(shown, draw):
    fig, ax = subplots()
    draw(ax)
    show(fig, **WORDS)
    assert len(shown) == 1


def test_only_figures_are_shown(shown):
    with pytest.raises(TypeError, match="matplotlib figure"):
        show(None, **WORDS)


def test_colors_differ_for_colour_blind_eyes():
    # Machado et al.'s matrices of full protanopia and deuteranopia, on linear rgb
    matrices = [
        np.eye(3),
        np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
        np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
    ]
    rgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in COLORS])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    for matrix in matrices:
        seen = np.clip(linear @ matrix.T, 0, 1) ** (1 / 2.2)
        distance = np.linalg.norm(seen[:, None] - seen[None], axis=-1) + np.eye(len(COLORS))
        assert distance.min() > 0.12


def test_sizes_of_the_house(shown):
    assert subplots()[0].get_size_inches().tolist() == [7.0, 4.0]
    assert subplots(ncols=3)[0].get_size_inches().tolist() == [7.0, 2.8]
    assert subplots(2, 2, sharex=True)[1].shape == (2, 2)


def test_an_animation_needs_no_network_and_has_stable_bytes(shown):
    for _ in range(2):
        animate(line, [1, 2, 3, 4], **WORDS, fps=5)
    text = shown[0]["text/html"]
    assert shown[0] == shown[1]
    assert not re.search(r"https?://|//cdn|<link|src=\"[^d]", text)
    assert "prefers-reduced-motion" in text
    assert re.search(r'id="animation-[0-9a-f]{12}"', text)
    assert shown[0]["text/plain"].startswith("Animation of 4 frames: It rises.")


def test_layers_over_the_still_frame_give_each_frame(shown):
    animate(line, [1, 2, 3, 3], **WORDS, still=1)
    text = shown[0]["text/html"]
    layers = json.loads(re.search(r"const layers = (\[.*\]), root", text)[1])
    base = pictures(text)[0].convert("RGB")
    assert layers[1] == []
    assert layers[2] == layers[3]
    fig, ax = subplots()
    line(ax, 3)
    want = np.asarray(companion.figures._picture(fig, companion.figures.DPI), dtype=float)
    left, top, _, _, data = layers[2]
    part = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA")
    base.paste(part, (round(left * base.width / 100), round(top * base.height / 100)), part)
    assert np.abs(np.asarray(base, dtype=float) - want).mean() < 1


def test_the_parts_of_the_player_are_balanced(shown):
    animate(line, 3, **WORDS)
    seen = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag not in ("img", "input"):
                seen.append(tag)

        def handle_endtag(self, tag):
            assert seen.pop() == tag

    Reader().feed(shown[0]["text/html"])
    assert seen == []


@pytest.mark.parametrize(
    "change", [{"frames": 1}, {"frames": []}, {"fps": 0}, {"fps": 100}, {"still": 3}, {"still": -4}]
)
def test_animations_that_cannot_be(shown, change):
    before = plt.get_fignums()
    with pytest.raises(ValueError, match="expected"):
        animate(line, **{"frames": 3, **WORDS, **change})
    assert plt.get_fignums() == before
