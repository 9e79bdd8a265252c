"""Train the small backbone that the visual anomaly chapters use, and write its weights.

    python tools/train_backbone.py            # about three minutes on one core

A `TextureNet` learns to name 48 procedural textures under random contrast, brightness, colour and position. The
families are drawn here and not taken from `companion.data`, so that nothing the chapters test on was seen.
"""

import argparse
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from companion.anomaly.visual_anomalies.backbone import WEIGHTS, TextureNet

N_CLASSES = 48


def texture_parameters(label: int) -> Tensor:
    """Return seven numbers in [0, 1] that fix a texture."""
    return torch.rand(7, generator=torch.Generator().manual_seed(90_000 + label))


def texture(label: int, size: int, g: torch.Generator) -> Tensor:
    """Draw one grey image (size, size) of the texture, standardised, at a random position."""
    a, b, c, d, e, f, _ = texture_parameters(label).tolist()
    angle, frequency = math.pi * a, 2.5 + 9 * b
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    u = math.cos(angle) * x + math.sin(angle) * y
    v = -math.sin(angle) * x + math.cos(angle) * y
    phase = torch.rand(4, generator=g) * 2 * math.pi
    noise = torch.randn(size, size, generator=g)
    family = label % 6
    if family == 0:  # oriented band-pass noise
        image = band_pass(noise, frequency, 0.15 + 0.4 * c, angle if d > 0.3 else None)
    elif family == 1:  # stripes that wander
        warp = band_pass(noise, 2.0, 0.5, None) * (0.2 + 0.8 * c)
        image = torch.sin(2 * math.pi * frequency * u + warp + phase[0])
        image = image if d > 0.5 else image.sign() * image.abs().sqrt()
    elif family == 2:  # woven threads
        image = torch.sin(2 * math.pi * frequency * u + phase[0]) + torch.sin(2 * math.pi * frequency * v + phase[1])
        image = image + (c - 0.5) * torch.sin(2 * math.pi * frequency * (u + v) + phase[2])
        image = image + 0.5 * e * band_pass(noise, 12.0, 0.6, None)
    elif family == 3:  # bumps on a jittered lattice
        n = int(4 + 6 * b)
        cells = torch.cartesian_prod(torch.arange(-1, n + 1), torch.arange(-1, n + 1)).float()
        centres = (cells + torch.rand(2, generator=g) + (0.2 + 0.8 * c) * torch.rand(len(cells), 2, generator=g)) / n
        distance = (x[..., None] - centres[:, 0]).square() + (y[..., None] - centres[:, 1]).square()
        width = (0.15 + 0.25 * d) / n
        image = torch.exp(-distance / (2 * width**2)).amax(-1) * (1 if e > 0.5 else -1)
    elif family == 4:  # cells: difference of the two nearest seeds
        n = int(20 + 60 * b)
        centres = torch.rand(n, 2, generator=g) * torch.tensor([1.0, 1 + 2 * c])
        distance = (x[..., None] - centres[:, 0]).square() + ((1 + 2 * c) * y[..., None] - centres[:, 1]).square()
        two = distance.sqrt().topk(2, dim=-1, largest=False).values
        image = (two[..., 1] - two[..., 0]).clamp(max=0.05 + 0.1 * d)
    else:  # two scales of noise, one thresholded
        coarse = band_pass(noise, 1.5 + 4 * b, 0.4, angle if e > 0.5 else None)
        fine = band_pass(torch.randn(size, size, generator=g), 8 + 8 * c, 0.3, None)
        image = torch.tanh(3 * coarse) + (0.3 + f) * fine
    return (image - image.mean()) / image.std()


def band_pass(noise: Tensor, frequency: float, width: float, angle: float | None) -> Tensor:
    """Filter white noise around a frequency (cycles per image of side 1) and, if given, an angle."""
    size = noise.shape[-1]
    axis = torch.fft.fftfreq(size, 1 / size)
    fy, fx = torch.meshgrid(axis, axis, indexing="ij")
    radius = torch.hypot(fx, fy).clamp(min=1e-3)
    window = torch.exp(-(torch.log(radius / frequency) ** 2) / (2 * width**2))
    if angle is not None:
        window = window * torch.exp(4 * (torch.cos(2 * (torch.atan2(fy, fx) - angle)) - 1))
    image = torch.fft.ifft2(torch.fft.fft2(noise) * window).real
    return image / image.std()


def draw(n: int, size: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw images (n, 3, size, size) in [0, 1] with random contrast, colour and noise, and their labels."""
    labels = torch.randint(N_CLASSES, (n,), generator=g)
    grey = torch.stack([texture(label, size, g) for label in labels.tolist()])[:, None]
    contrast = 0.05 + 0.17 * torch.rand(n, 1, 1, 1, generator=g)
    tint = 1 + 0.3 * (torch.rand(n, 3, 1, 1, generator=g) - 0.5)
    level = 0.35 + 0.3 * torch.rand(n, 1, 1, 1, generator=g) + 0.1 * (torch.rand(n, 3, 1, 1, generator=g) - 0.5)
    images = level + contrast * tint * grey + 0.02 * torch.randn(n, 1, size, size, generator=g)
    return images.clamp(0, 1), labels


def main() -> None:
    """Train and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--pool", type=int, default=3000, help="images drawn once and cropped again and again")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    images, labels = draw(options.pool, 64, g)
    test_images, test_labels = draw(480, 64, g)
    net = TextureNet(n_classes=N_CLASSES, seed=0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=options.steps)
    for step in range(options.steps):
        index = torch.randint(len(images), (48,), generator=g)
        top, left = torch.randint(17, (2,), generator=g).tolist()
        batch = images[index, :, top : top + 48, left : left + 48]
        gain = 0.7 + 0.6 * torch.rand(len(batch), 1, 1, 1, generator=g)
        batch = ((batch - 0.5) * gain + 0.5).clamp(0, 1)
        loss = F.cross_entropy(net.logits(batch), labels[index], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            with torch.no_grad():
                accuracy = (net.logits(test_images).argmax(1) == test_labels).float().mean()
            print(f"step {step + 1}: loss {loss:.3f}, held-out accuracy {accuracy:.3f}", flush=True)
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, options.out)
    print(f"wrote {options.out} ({options.out.stat().st_size / 1e3:.0f} kB)")


if __name__ == "__main__":
    main()
