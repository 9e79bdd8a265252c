"""Mixing images, and filling up rare classes, side by side."""

import numpy as np
import torch
from side_by_side import Comparison, close

from companion.mixing import mixup


def images(quick: bool) -> tuple[torch.Tensor, torch.Tensor]:
    side, n = (32, 64) if quick else (224, 256)
    x = torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0))
    return x, torch.arange(n) % 10


def by_timm(x, y):
    from timm.data import Mixup

    return Mixup(mixup_alpha=1.0, num_classes=10)(x, y)[0]


def by_torchvision(x, y):
    from torchvision.transforms.v2 import MixUp

    return MixUp(num_classes=10)(x, y)[0]


def by_kornia(x, y):
    from kornia.augmentation import RandomMixUpV2

    return RandomMixUpV2(p=1.0, data_keys=["input", "class"])(x, y)[0]


def same_kind(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """The pairs are drawn anew by everybody: of a mixture of its own rows a batch keeps shape, mean and range."""
    near = abs(float(ours.mean() - theirs.mean())) < 5e-3
    return ours.shape == theirs.shape and near and float(theirs.max()) <= 1 and float(theirs.min()) >= 0


def mixed_fresh(quick: bool) -> Comparison:
    x, y = images(quick)
    generator = torch.Generator().manual_seed(0)
    return Comparison(
        f"Mixup, {' x '.join(map(str, x.shape))}, a fresh batch",
        lambda: mixup(x, y, generator=generator).x,
        {"torchvision": lambda: by_torchvision(x, y), "kornia": lambda: by_kornia(x, y)},
        same_kind,
        1.4,
    )


def mixed_in_place(quick: bool) -> Comparison:
    x, y = images(quick)
    out, theirs = torch.empty_like(x), x.clone()
    generator = torch.Generator().manual_seed(0)
    return Comparison(
        f"Mixup, {' x '.join(map(str, x.shape))}, without new memory",
        lambda: mixup(x, y, generator=generator, out=out).x,
        {"timm": lambda: by_timm(theirs, y)},
        same_kind,
        4.2,
        {"timm": "overwrites its input; ours writes to out="},
        limit="little slower than a copy of the batch, and memory decides: timm passes over it a few times more",
    )


def filled_by_faiss(x: np.ndarray, n: int) -> np.ndarray:
    import faiss

    index = faiss.IndexFlatL2(x.shape[1])
    index.add(x)
    neighbors = index.search(x, 6)[1][:, 1:]
    rng = np.random.default_rng(0)
    row = rng.integers(len(x), size=n)
    other = neighbors[row, rng.integers(5, size=n)]
    share = rng.random((n, 1), dtype=np.float32)
    return x[row] + share * (x[other] - x[row])


def filled_up(quick: bool) -> Comparison:
    from companion.mixup import SMOTE

    n = 1_000 if quick else 20_000
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3 * n, 64, generator=generator).numpy()
    y = np.repeat([0, 1], [2 * n, n])
    rare = np.ascontiguousarray(x[y == 1])

    def theirs():
        from imblearn.over_sampling import SMOTE as Theirs

        return Theirs(random_state=0).fit_resample(x, y)[0][len(x) :]

    return Comparison(
        f"SMOTE, {n} x 64 -> {2 * n}",
        lambda: SMOTE(random_state=0).fit_resample(x, y)[0][len(x) :],
        {"imbalanced-learn": theirs, "faiss and lerp": lambda: filled_by_faiss(rare, n)},
        lambda a, b: close(0.05)(np.linalg.norm(a, axis=1).mean(), np.linalg.norm(b, axis=1).mean()),
        2.1,
        limit="the search for neighbours is most of it: faiss selects while it multiplies, and stays in float32",
    )


COMPARISONS = [mixed_fresh, mixed_in_place, filled_up]
GROWTH: list = []
ON_CARD: list = []
