"""Draws the pictures of the landing page and of the six parts: `tools/hero.py` writes `book/_static/hero.png` and
`book/_static/question-<theme>.png`. Everything in them is computed by the companion, from the base seed.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from companion import figures
from companion.calibration import TemperatureScaler
from companion.data import (
    GaussianMixture,
    load_digits,
    make_color_digits,
    make_textures,
)
from companion.geometry import participation_ratio
from companion.mixing import mixup, mixup_loss
from companion.neighbors import knn
from companion.nets import MLP, SmallCNN
from companion.runtime import generator
from companion.training import fit

OUT = Path(__file__).resolve().parents[1] / "book" / "_static"
INK = "#1c2530"
TEN = plt.get_cmap("tab10").colors


def bare(ax):
    """A picture without axes: its caption says what it shows."""
    ax.set_xticks([])
    ax.set_yticks([])
    for side in ax.spines.values():
        side.set_visible(False)


def dimensionality(ax):
    """A noisy curve in the plane, each point coloured by how many directions its neighbourhood uses."""
    turn = torch.linspace(1.2, 13.5, 2600, dtype=torch.float64)
    noise = 0.12 + 0.9 * (torch.linspace(0, 1, 2600, dtype=torch.float64) - 0.25).clamp(min=0) ** 2
    x = torch.stack([turn * turn.cos(), turn * turn.sin()], 1)
    x = x + noise[:, None] * torch.randn(x.shape, generator=generator("hero/dimension"), dtype=x.dtype)
    around = knn(x, k=36).indices
    used = torch.stack([participation_ratio(x[row]) for row in around])  # (n,)
    dots = ax.scatter(*x.T, c=used, cmap="viridis", vmin=1, vmax=2, s=4, linewidths=0)
    bar = ax.figure.colorbar(dots, cax=ax.inset_axes((0.0, 0.72, 0.03, 0.26)), ticks=[1, 2])
    bar.outline.set_visible(False)
    ax.set_aspect("equal")
    bare(ax)


def collapse(ax):
    """The paths of a thousand digits through the two last features of a network, while it learns."""
    data = load_digits(test_fraction=0.4, generator=generator("hero/digits"))
    net = MLP((data.x_train.shape[1], 128, 64, 2), activation="tanh", seed=5)
    net = torch.nn.Sequential(net, torch.nn.Linear(2, 10))
    torch.nn.init.normal_(net[1].weight, generator=generator("hero/head"))
    torch.nn.init.zeros_(net[1].bias)
    steps = [net[0](data.x_train).detach()]
    fit(
        net,
        data.x_train,
        data.y_train,
        epochs=260,
        lr=4e-3,
        weight_decay=1e-3,
        schedule="cosine",
        generator=generator("hero/fit"),
        callback=lambda epoch, model: steps.append(model[0](data.x_train).detach()),
        progress=False,
    )
    paths = torch.stack([*steps[:: max(len(steps) // 60, 1)], steps[-1]]).numpy()  # (t, n, 2)
    for label in range(10):
        rows = (data.y_train == label).numpy()
        ax.plot(paths[:, rows, 0], paths[:, rows, 1], color=TEN[label], lw=0.25, alpha=0.12)
        ax.scatter(*paths[-1, rows].T, color=[TEN[label]], s=7, linewidths=0, zorder=3)
        far = paths[-1, rows][np.linalg.norm(paths[-1, rows], axis=1).argsort()[-20:]].mean(0)
        ax.text(*(1.17 * far), str(label), color=TEN[label], ha="center", va="center", fontsize=11, fontweight="bold")
    ax.margins(0.08)
    ax.set_aspect("equal")
    bare(ax)


def mix(ax):
    """What a network trained on blends of three classes says everywhere, and the blends it saw."""
    angles = torch.arange(3) * 2 * torch.pi / 3 + torch.pi / 2
    means = 2.2 * torch.stack([angles.cos(), angles.sin()], 1)
    x, y = GaussianMixture(means, 0.18).sample(240, generator=generator("hero/mixture"))
    x = x.float()
    net = MLP((2, 64, 64, 3), seed=0)
    draw = generator("hero/blends")

    def batch(x, y, generator):
        mixed = mixup(x, y, alpha=1.0, generator=generator)
        return mixed.x, mixed

    fit(net, x, y, epochs=160, lr=3e-3, batch_transform=batch, loss=mixup_loss, generator=draw, progress=False)
    line = torch.linspace(-3.6, 3.6, 320)
    grid = torch.cartesian_prod(line, line)
    with torch.no_grad():
        probs = net(grid).softmax(1)
    colors = torch.tensor([[0.0, 0.45, 0.70], [0.84, 0.37, 0.0], [0.0, 0.62, 0.45]])
    field = 1 - 0.62 * (1 - probs @ colors)
    ax.imshow(field.reshape(320, 320, 3).transpose(0, 1).numpy(), origin="lower", extent=(-3.6, 3.6, -3.6, 3.6))
    blends = torch.cat([mixup(x, y, alpha=1.0, per_sample=True, generator=draw).x for _ in range(3)])
    ax.scatter(*blends.T, s=1.6, color="white", alpha=0.8, linewidths=0)
    ax.scatter(*x.T, s=9, color=colors[y].numpy(), edgecolors="white", linewidths=0.3)
    bare(ax)


def calibration(ax):
    """Confidence against accuracy of a network that learnt overlapping classes by heart; then with one temperature."""
    mixture = GaussianMixture(1.1 * torch.eye(6, 12), 1.0)
    x, y = mixture.sample(500, generator=generator("hero/few"))
    x_new, y_new = mixture.sample(16000, generator=generator("hero/many"))
    net = MLP((12, 64, 6), seed=1)
    fit(net, x.float(), y, epochs=60, lr=2e-3, generator=generator("hero/overfit"), progress=False)
    with torch.no_grad():
        logits = net(x_new.float())
    half = len(logits) // 2
    scaler = TemperatureScaler().fit(logits[:half], y_new[:half])
    after = torch.as_tensor(np.asarray(scaler.predict_proba(logits[half:])))
    edges = torch.linspace(0, 1, 9)
    ax.plot([0, 1], [0, 1], color=INK, lw=0.8, ls=(0, (4, 3)))
    for probs, color, name in ((logits[half:].softmax(1), "#d55e00", "before"), (after, "#0072b2", "after")):
        confidence, predicted = probs.max(1)
        right = (predicted == y_new[half:]).double()
        place = torch.bucketize(confidence.float().contiguous(), edges[1:-1])
        count = torch.bincount(place, minlength=8)
        seen = count >= 40
        height = torch.bincount(place, right, minlength=8)[seen] / count[seen]
        middle = torch.bincount(place, confidence.double(), minlength=8)[seen] / count[seen]
        ax.plot(middle, height, color=color, lw=2, marker="o", ms=4.5, label=name)
    ax.set(xlim=(0.15, 1.02), ylim=(0.15, 1.02), xlabel="it says", ylabel="it is right")
    ax.set_xticks([0.25, 0.5, 0.75, 1.0], ["25 %", "50 %", "75 %", "100 %"])
    ax.set_yticks([0.25, 0.5, 0.75, 1.0], ["25 %", "50 %", "75 %", "100 %"])
    ax.legend(loc="upper left", frameon=False)
    ax.set_aspect("equal")


def shortcuts(ax):
    """Digits on the background colour of another digit, and what a network says that met few of those."""
    train, test = make_color_digits(0.98, generator=generator("hero/colors"))
    net = SmallCNN(3, 10, width=12, image_size=train.images.shape[-1], seed=0)
    fit(net, train.images, train.labels, epochs=4, lr=3e-3, generator=generator("hero/shortcut"), progress=False)
    odd = torch.nonzero(test.colors != test.labels).flatten()[:24]
    with torch.no_grad():
        said = net(test.images[odd]).argmax(1)
    size = test.images.shape[-1]
    gap, cell = 3, size + 3
    canvas = np.ones((4 * (cell + 5) + gap, 6 * cell + gap, 3)) * np.array([0.992, 0.988, 0.976])
    for i, row in enumerate(odd.tolist()):
        top, left = gap + (i // 6) * (cell + 5), gap + (i % 6) * cell
        canvas[top : top + size, left : left + size] = test.images[row].permute(1, 2, 0).numpy()
        fooled = bool(said[i] != test.labels[row])
        ax.text(left + size / 2, top + size + 2.6, f"{int(said[i])}", ha="center", va="center", fontsize=8,
                color="#d55e00" if fooled else "#007a5a", fontweight="bold")  # fmt: skip
    ax.imshow(canvas, interpolation="nearest")
    bare(ax)


def anomaly(ax):
    """Woven textures with a defect, and how far each of their patches is from any patch of normal weave."""

    def patches(images, size=9, stride=2):
        return F.unfold(images.mean(1, keepdim=True), size, stride=stride).transpose(1, 2)  # (n, places, size * size)

    normal = make_textures(16, "weave", size=64, generator=generator("hero/normal"))
    bank = patches(normal.images).flatten(0, 1)
    for row, defect in enumerate(("scratch", "missing")):
        broken = make_textures(8, "weave", defect=defect, size=64, generator=generator(f"hero/{defect}"))
        pick = int(broken.masks.flatten(1).sum(1).argmax())
        image = broken.images[pick : pick + 1]
        far = knn(patches(image)[0], bank, k=1).distances[:, 0].reshape(1, 1, 28, 28)
        shown = F.interpolate(far, size=56, mode="bilinear", align_corners=False)[0, 0].numpy()
        image = image[..., 4:-4, 4:-4]  # where patches have their centres
        bottom = 1.06 * (1 - row)
        ax.imshow(np.moveaxis(image[0].numpy(), 0, -1).squeeze(), extent=(0, 1, bottom, bottom + 1), cmap="gray")
        ax.imshow(shown, extent=(1.06, 2.06, bottom, bottom + 1), cmap="inferno")
    ax.set_xlim(0, 2.06)
    ax.set_ylim(0, 2.06)
    bare(ax)


PANELS = {
    "dimensionality": (dimensionality, "How many numbers does it need?"),
    "collapse": (collapse, "What shape does it end up in?"),
    "mixup": (mix, "What do blends do to it?"),
    "calibration": (calibration, "Can you believe it?"),
    "shortcuts": (shortcuts, "Is it right for the wrong reason?"),
    "anomaly": (anomaly, "Does it notice the new?"),
}


def save(fig, path):
    """The same bytes on every run on the same machine."""
    fig.savefig(path, dpi=160, metadata={"Software": None})
    with Image.open(path) as whole:  # a palette of 256 colours: a quarter of the bytes
        colours = whole.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        small = whole.convert("RGB").quantize(palette=colours, dither=Image.Dither.FLOYDSTEINBERG)
    small.save(path, optimize=True)
    plt.close(fig)


def main(wanted):
    """Draw the parts that are named, or all of them and the landing page's picture."""
    figures.use_style()
    names = wanted or list(PANELS)
    for name in names:
        fig, ax = plt.subplots(figsize=(4.6, 3.6), layout="constrained", facecolor=figures.BACKGROUND)
        PANELS[name][0](ax)
        save(fig, OUT / f"question-{name}.png")
    if not wanted:
        fig = plt.figure(figsize=(10.4, 7.3), layout="none", facecolor=figures.BACKGROUND)
        for i, (draw, question) in enumerate(PANELS.values()):
            left, bottom = 0.03 + 0.325 * (i % 3), 0.52 - 0.5 * (i // 3)
            labelled = draw is calibration  # leaves room for its axis labels
            box = (left + 0.045, bottom + 0.06, 0.245, 0.35) if labelled else (left, bottom, 0.295, 0.42)
            draw(fig.add_axes(box))
            fig.text(left + 0.004, bottom + 0.435, question, fontsize=11.5, color=INK, fontweight="bold")
        save(fig, OUT / "hero.png")


if __name__ == "__main__":
    main(sys.argv[1:])
