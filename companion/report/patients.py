"""Four small networks on one task, to try a check-up on: a healthy one and three that are sick in a known way.

Public: `Patient`, `train_patients`, `train_wards`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from companion.calibration import TemperatureScaler
from companion.checks import check_positive_int
from companion.data import ColorDigits, color_digits, load_digits_images, long_tailed, noisy_labels, stratified_split
from companion.nets import MLP
from companion.training import fit_many

__all__ = ["Patient", "train_patients", "train_wards"]

NOISE = 0.12  # of the pixels
WRONG = 0.25  # of the labels of every class: a class with more wrong ones than others would fail for that reason too
EPOCHS = 40
TELLING = 0.99  # how closely colour follows the digit where it is a shortcut
COLORS = 2  # the background says even or odd, when it says anything


class Patient(NamedTuple):
    """A trained network, with what a check-up of it needs.

    Attributes:
        model: the network.
        temperature: by which its logits are divided.
        test: images whose colour says nothing.
        lucky: the same digits, coloured as the network with the shortcut was trained.
        strangers: images without digits.
    """

    model: nn.Module
    temperature: float
    test: ColorDigits
    lucky: ColorDigits
    strangers: Tensor

    def inputs(self, test: ColorDigits | None = None, temperature: float | None = None) -> dict[str, Any]:
        """Return the arguments of `companion.checkup`: features, labels, logits, last layer, groups and outliers.

        Args:
            test: images other than those of `test`.
            temperature: other than the network's own.
        """
        test = self.test if test is None else test
        temperature = self.temperature if temperature is None else temperature
        with torch.no_grad():
            h, head = self.model.features(test.images), self.model.head
            return {
                "features": h,
                "labels": test.labels,
                "logits": head(h) / temperature,
                "weight": head.weight.detach() / temperature,
                "bias": head.bias.detach() / temperature,
                "groups": {"colour": test.colors},
                "outliers": self.model.features(self.strangers),
            }


def train_patients(seed: int = 0) -> dict[str, Patient]:
    """Train four networks to read digits on coloured grounds, and return them by name.

    - "healthy": fresh pixel noise in every epoch, colours that say nothing, one temperature from held-out images;
    - "overconfident": the same images, a quarter of the labels of every class wrong, learnt by heart at a rate that
      never falls, no temperature;
    - "shortcut": trained like the healthy one, on images whose colour nearly always says even or odd;
    - "minority": trained like the healthy one, with two images of each of the digits 5 to 9 (and all of the others).

    All four are tested on the same images, where colour says nothing and classes are equally frequent. The strangers
    are the same images with their pixels shuffled.

    Args:
        seed: of the split, the noise and the weights.

    >>> patients = train_patients()
    >>> list(patients), patients["healthy"].inputs()["features"].shape[1]
    (['healthy', 'overconfident', 'shortcut', 'minority'], 64)
    """
    return train_wards([seed])[0]


def train_wards(seeds: Sequence[int]) -> list[dict[str, Patient]]:
    """Train the four networks of `train_patients` for several seeds, those of a kind as one.

    Args:
        seeds: one per ward.

    Raises:
        ValueError: no seeds, or one below 0.

    >>> [list(ward) for ward in train_wards([0, 1])][1]
    ['healthy', 'overconfident', 'shortcut', 'minority']
    """
    if not seeds:
        raise ValueError("expected at least one seed, got none")
    lessons = [_Lessons(check_positive_int(seed, "seed", minimum=0)) for seed in seeds]

    def learn(name: str, epochs: int, noise: bool, scaled: bool) -> list[Patient]:
        taught, transform = [lesson.taught[name] for lesson in lessons], _fresh_noise(seeds) if noise else None
        many = fit_many(
            lambda seed: MLP((192, 64, 10), activation="gelu", seed=seed), seeds,
            torch.stack([data.images for data in taught]), torch.stack([data.labels for data in taught]),
            epochs=epochs, lr=2e-3, weight_decay=1e-4, batch_size=64, schedule="cosine" if noise else None,
            batch_transform=transform, stacked=True, device="cpu", progress=False,
        )  # fmt: skip
        return [lesson.examined(model, scaled) for lesson, model in zip(lessons, many.models())]

    kinds = {
        "healthy": learn("plain", EPOCHS, noise=True, scaled=True),
        "overconfident": learn("noisy", 8 * EPOCHS, noise=False, scaled=False),
        "shortcut": learn("telling", 2 * EPOCHS, noise=True, scaled=True),
        "minority": learn("rare", 2 * EPOCHS, noise=True, scaled=True),
    }
    return [dict(zip(kinds, ward)) for ward in zip(*kinds.values())]


def _fresh_noise(seeds: Sequence[int]) -> Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]:
    """Noise on the pixels of every batch, from one stream for each network: each ends where it would alone."""
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]

    def transform(x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        noise = torch.stack([torch.randn(x.shape[1:], generator=draw) for draw in draws])
        return (x + NOISE * noise).clamp(0, 1), y

    return transform


class _Lessons:
    """What the networks of one seed are taught and tested on."""

    def __init__(self, seed: int):
        draw = torch.Generator().manual_seed(seed)
        images, labels = load_digits_images()
        train, held, test = stratified_split(labels, (0.4, 0.2, 0.4), draw)

        def paint(rows: Tensor, correlation: float = 0.0, noise: float = NOISE, shown: Tensor = images) -> ColorDigits:
            return color_digits(shown[rows], labels[rows], correlation, COLORS, noise=noise, generator=draw)

        def both(rows: Tensor) -> ColorDigits:
            """Each image once on either ground, so that two images of a digit cannot suggest a colour."""
            halves = [color_digits(images[rows], torch.full_like(rows, c), 1.0, COLORS) for c in range(COLORS)]
            return ColorDigits(*(torch.cat(column) for column in zip(*halves)))._replace(
                labels=labels[rows].repeat(COLORS)
            )

        self.tuning, self.shown = paint(held), paint(test)
        shuffled = images.flatten(1)[:, torch.randperm(64, generator=draw)].view_as(images)
        self.strangers = paint(test, shown=shuffled).images
        plain, telling, noisy = both(train), paint(train, TELLING, noise=0.0), paint(train)
        self.lucky = paint(test, TELLING)
        wrong, (rows, _) = noisy.labels.clone(), stratified_split(noisy.labels, (WRONG, 1 - WRONG), draw)
        wrong[rows] = noisy_labels(wrong[rows], 1.0, n_classes=10, generator=draw)[0]
        rare = both(train[long_tailed(labels[train], 36, "step", generator=draw)])
        self.taught = {"plain": plain, "noisy": noisy._replace(labels=wrong), "telling": telling, "rare": rare}

    def examined(self, model: nn.Module, scaled: bool) -> Patient:
        temperature = 1.0
        if scaled:
            with torch.no_grad():
                logits = model(self.tuning.images)
            temperature = float(TemperatureScaler().fit(logits, self.tuning.labels).temperature_)
        return Patient(model, temperature, self.shown, self.lucky, self.strangers)
