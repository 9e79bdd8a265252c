"""EfficientAD: a student that copies its teacher on normal patches, and an autoencoder that knows the arrangement.

Public: `PatchDescriptionNetwork`, `hard_feature_loss`, `quantile_normalise`, `EfficientADDetector`, and
`make_logic_scenes`, scenes whose logical anomalies hold no new patch.
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from companion.anomaly.visual_anomalies.detector import ImageDetector
from companion.checks import check_in_range, check_positive_int
from companion.runtime import has_fused

__all__ = [
    "LOGIC_KINDS",
    "EfficientADDetector",
    "LogicScenes",
    "PatchDescriptionNetwork",
    "hard_feature_loss",
    "make_logic_scenes",
    "quantile_normalise",
]

LOGIC_KINDS = ("normal", "scratch", "swapped", "two discs", "missing")
"""What `make_logic_scenes` draws: one good arrangement, one local defect, three wrong arrangements."""


class LogicScenes(NamedTuple):
    """`images` (n, 1, 32, 48) in [0, 1]; `masks` (n, 1, 32, 48) bool, the pixels of a scratch, else empty."""

    images: Tensor
    masks: Tensor


def make_logic_scenes(n: int, kind: str = "normal", generator: torch.Generator | None = None) -> LogicScenes:
    """Draw scenes with a disc in the left half and a square in the right one, or with something wrong.

    No noise, whole-pixel positions, and at least seven pixels between an object and the border or the other half: a
    network that sees 7 x 7 pixels meets in a "swapped", "two discs" or "missing" scene only patches it knows.

    Args:
        n: scenes.
        kind: one of `LOGIC_KINDS`.
        generator: a cpu generator; None means torch's default one.

    Raises:
        ValueError: an unknown kind.

    >>> make_logic_scenes(2, "swapped", torch.Generator().manual_seed(0)).images.shape
    torch.Size([2, 1, 32, 48])

    Paper: batzner2024efficientad
    Chapter: anomaly/visual-anomalies
    """
    if kind not in LOGIC_KINDS:
        raise ValueError(f"expected kind to be one of {', '.join(LOGIC_KINDS)}, got {kind!r}")
    check_positive_int(n, "n")
    y, x = torch.meshgrid(torch.arange(32), torch.arange(48), indexing="ij")
    rows = torch.randint(11, 21, (n, 2), generator=generator)  # objects reach 4 from their centre
    columns = torch.randint(11, 13, (n, 2), generator=generator) + torch.tensor([0, 24])
    dy = y - rows[:, :, None, None]  # (n, 2, 32, 48)
    dx = x - columns[:, :, None, None]
    disc, square = dx.square() + dy.square() <= 16, (dx.abs() <= 3) & (dy.abs() <= 3)
    left, right = disc[:, 0], square[:, 1]
    if kind == "swapped":
        left, right = square[:, 0], disc[:, 1]
    elif kind == "two discs":
        right = disc[:, 1]
    elif kind == "missing":
        gone = torch.rand(n, 1, 1, generator=generator) < 0.5
        left, right = left & ~gone, right & gone
    images = 0.3 + 0.4 * (left | right).float()[:, None]
    masks = torch.zeros(n, 1, 32, 48, dtype=torch.bool)
    if kind == "scratch":
        r = torch.rand(n, 3, 1, 1, generator=generator)
        cy, cx, turn = 9 + 14 * r[:, 0], 9 + 30 * r[:, 1], 3.1416 * r[:, 2]
        along = (x - cx) * turn.cos() + (y - cy) * turn.sin()
        across = (y - cy) * turn.cos() - (x - cx) * turn.sin()
        masks = ((along.abs() < 5) & (across.abs() < 0.7))[:, None]
        images = torch.where(masks, images + torch.where(images > 0.5, -0.3, 0.3), images)
    return LogicScenes(images, masks)


class PatchDescriptionNetwork(nn.Sequential):
    """Three valid 3 x 3 convolutions: each output describes exactly one 7 x 7 patch.

    Args:
        in_channels: of the image.
        out_channels: length of a description.
        width: of the two hidden layers.
        seed: initialises the weights.

    >>> PatchDescriptionNetwork(1, 8, seed=0)(torch.zeros(1, 1, 32, 48)).shape
    torch.Size([1, 8, 26, 42])

    Paper: batzner2024efficientad
    Chapter: anomaly/visual-anomalies
    """

    def __init__(self, in_channels: int, out_channels: int, width: int = 16, seed: int | None = None):
        with torch.random.fork_rng(devices=[]):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            super().__init__(
                nn.Conv2d(in_channels, width, 3),
                nn.ReLU(),
                nn.Conv2d(width, width, 3),
                nn.ReLU(),
                nn.Conv2d(width, out_channels, 3),
            )


def hard_feature_loss(squared_error: Tensor, q: float = 0.999) -> Tensor:
    r"""Return the mean of the squared errors above their q-quantile: only the hardest positions teach.

    $L = \mathrm{mean}\{d : d \ge Q_q(d)\}$. A student that is allowed to neglect easy positions does not learn to
    imitate the teacher beyond the normal images.

    Args:
        squared_error: any shape.
        q: share of the values that is left out, in [0, 1).

    >>> hard_feature_loss(torch.tensor([1.0, 2.0, 3.0, 4.0]), q=0.75)
    tensor(4.)

    Paper: batzner2024efficientad
    Chapter: anomaly/visual-anomalies
    """
    check_in_range(q, "q", 0.0, 1.0, inclusive="low")
    flat = squared_error.flatten()
    return flat.topk(max(1, round(len(flat) * (1 - q)))).values.mean()


def quantile_normalise(values: Tensor, q_a: Tensor | float, q_b: Tensor | float) -> Tensor:
    r"""Return $0.1\,(m - q_a) / (q_b - q_a)$: two maps on one scale before they are added.

    Args:
        values: an anomaly map.
        q_a: its 0.9 quantile on held-out normal images.
        q_b: its 0.995 quantile there.

    >>> quantile_normalise(torch.tensor([1.0, 3.0]), 1.0, 3.0)
    tensor([0.0000, 0.1000])

    Paper: batzner2024efficientad
    Chapter: anomaly/visual-anomalies
    """
    return 0.1 * (values - q_a) / (torch.as_tensor(q_b) - q_a).clamp(min=1e-9)


class _SceneAutoencoder(nn.Sequential):
    """Predict the teacher's maps from a few numbers per image."""

    def __init__(self, shape: Sequence[int], latent: int, out_channels: int, out_size: Sequence[int], width: int = 16):
        channels, height, columns = shape
        h, w = -(-height // 8), -(-columns // 8)
        super().__init__(
            nn.Conv2d(channels, width, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(width, width, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(width, width, 4, 2, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d((h, w)),
            nn.Flatten(),
            nn.Linear(width * h * w, latent),
            nn.Linear(latent, width * h * w),
            nn.ReLU(),
            nn.Unflatten(1, (width, h, w)),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Upsample(size=tuple(out_size)),
            nn.Conv2d(width, out_channels, 3, padding=1),
        )


class EfficientADDetector(ImageDetector):
    r"""Two maps: where a student fails to copy its teacher, and where it fails to copy an autoencoder.

    Teacher T, student S with two heads and autoencoder A, all trained on normal images: S copies T with the hard loss,
    A predicts T through a bottleneck, and the second head of S copies A. At test time
    $m_{st} = \mathrm{mean}_c (T - S)^2$, $m_{ae} = \mathrm{mean}_c (A - S')^2$, both normalised by quantiles on
    held-out normal images, and the map is their mean.

    Args:
        teacher: maps images to (n, c, h', w'); None is a frozen random `PatchDescriptionNetwork`, which is enough for
            clean scenes. At real scale pass a distilled one.
        channels: of the default teacher.
        latent: size of the bottleneck.
        hard_quantile: q of the hard loss; 0 is the plain mean.
        steps: Adam steps.
        images_per_step: images per step.
        lr: learning rate, brought to a tenth over the last third of the steps.
        held_out: share of the training images kept for the quantiles.
        which: the map that `anomaly_map` returns: "both", "st" or "ae".
        batch_size: images per pass.
        device: "auto", or a torch device.
        random_state: seed for weights and draws; None uses torch's default generator.

    >>> scenes = make_logic_scenes(8, generator=torch.Generator().manual_seed(0)).images
    >>> EfficientADDetector(steps=2, random_state=0).fit(scenes).anomaly_map(scenes).shape
    torch.Size([8, 32, 48])

    Paper: batzner2024efficientad
    Chapter: anomaly/visual-anomalies
    """

    def __init__(
        self,
        teacher: nn.Module | None = None,
        channels: int = 8,
        latent: int = 8,
        hard_quantile: float = 0.99,
        steps: int = 400,
        images_per_step: int = 16,
        lr: float = 5e-3,
        held_out: float = 0.1,
        which: str = "both",
        batch_size: int = 64,
        device: str = "auto",
        random_state: int | None = None,
    ):
        self.teacher = teacher
        self.channels = channels
        self.latent = latent
        self.hard_quantile = hard_quantile
        self.steps = steps
        self.images_per_step = images_per_step
        self.lr = lr
        self.held_out = held_out
        self.which = which
        self.batch_size = batch_size
        self.device = device
        self.random_state = random_state

    def _fit(self, images: Tensor) -> None:
        check_positive_int(self.steps, "steps")
        check_in_range(self.held_out, "held_out", 0.0, 1.0, inclusive="neither")
        if self.which not in ("both", "st", "ae"):
            raise ValueError(f"expected which to be 'both', 'st' or 'ae', got {self.which!r}")
        g = self._generator()
        seed = int(torch.randint(2**31, (), generator=g))
        order = torch.randperm(len(images), generator=g).to(images.device)
        n_held = max(1, round(self.held_out * len(images)))
        held, train = images[order[:n_held]], images[order[n_held:]]
        teacher = self.teacher or PatchDescriptionNetwork(images.shape[1], self.channels, seed=seed)
        self.teacher_ = copy.deepcopy(teacher).to(images.device).eval()
        with torch.no_grad():
            target = torch.cat([self.teacher_(b) for b in train.split(self.batch_size)])
        self.mean_ = target.mean((0, 2, 3), keepdim=True)
        self.std_ = target.std((0, 2, 3), keepdim=True).clamp(min=1e-6)
        target = (target - self.mean_) / self.std_
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed + 1)
            c, size = target.shape[1], target.shape[2:]
            self.student_ = PatchDescriptionNetwork(images.shape[1], 2 * c, width=16).to(images.device)
            self.autoencoder_ = _SceneAutoencoder(images.shape[1:], self.latent, c, size).to(images.device)
        for net in (self.student_, self.autoencoder_):
            net.to(memory_format=torch.channels_last)  # a third less time on a processor
        self._train(train, target, g)
        maps = [self._both(b) for b in held.split(self.batch_size)]
        self.quantiles_ = [_quantiles(torch.cat(m)) for m in zip(*maps, strict=True)]

    def _train(self, images: Tensor, target: Tensor, g: torch.Generator | None) -> None:
        parameters = [*self.student_.parameters(), *self.autoencoder_.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=self.lr, fused=has_fused(images.device))
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, max(1, 2 * self.steps // 3), 0.1)
        self.loss_ = []
        for _ in range(self.steps):
            rows = torch.randint(len(images), (self.images_per_step,), generator=g).to(images.device)
            copies_teacher, copies_autoencoder = self.student_(images[rows]).chunk(2, 1)
            predicted = self.autoencoder_(images[rows])
            loss = (
                hard_feature_loss((copies_teacher - target[rows]).square(), self.hard_quantile)
                + F.mse_loss(predicted, target[rows])
                + F.mse_loss(copies_autoencoder, predicted.detach())
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            self.loss_.append(float(loss.detach()))

    @torch.no_grad()
    def _both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        teacher = (self.teacher_(images) - self.mean_) / self.std_
        copies_teacher, copies_autoencoder = self.student_(images).chunk(2, 1)
        st = (teacher - copies_teacher).square().mean(1)
        ae = (self.autoencoder_(images) - copies_autoencoder).square().mean(1)
        return st, ae

    def _map(self, images: Tensor) -> Tensor:
        st, ae = (quantile_normalise(m, *q) for m, q in zip(self._both(images), self.quantiles_, strict=True))
        grid = {"st": st, "ae": ae, "both": (st + ae) / 2}[self.which]
        margin = [(a - b) // 2 for a, b in zip(images.shape[2:], grid.shape[1:], strict=True)]
        if self.teacher is None:  # valid convolutions: an output sits at the centre of its patch
            return F.pad(grid, (margin[1], margin[1], margin[0], margin[0]), value=float(grid.min()))
        return F.interpolate(grid[:, None], images.shape[2:], mode="bilinear", align_corners=False)[:, 0]


def _quantiles(m: Tensor) -> tuple[float, float]:
    flat = m.flatten().sort().values
    return tuple(float(flat[min(len(flat) - 1, round(q * (len(flat) - 1)))]) for q in (0.9, 0.995))
