"""Coresets, nearest-neighbour scores, Gaussians and ranking metrics, side by side."""

from types import SimpleNamespace

import numpy as np
import torch
from side_by_side import Comparison, Growth, OnCard, close

from companion.anomaly import k_center
from companion.neighbors import knn
from companion.ranking import auroc, average_precision

PRODUCTS = (
    "the products over all rows are most of it, though a quarter is left out where a matrix is symmetric or triangular"
)


def draw(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def radius(x: torch.Tensor, chosen) -> float:
    """How far the farthest row is from the nearest chosen one."""
    return float(torch.cdist(x, x[torch.as_tensor(chosen)]).amin(1).max())


def coreset_by_anomalib(x: torch.Tensor, n: int) -> list[int]:
    from anomalib.models.components import KCenterGreedy

    torch.manual_seed(0)
    return KCenterGreedy(x, (n + 0.5) / len(x)).select_coreset_idxs()


def coreset_in_torch(x: torch.Tensor, n: int) -> list[int]:
    """What one writes first: a distance to the last chosen row in every step."""
    chosen = [int((x - x.mean(0)).square().sum(1).argmax())]
    nearest = torch.full((len(x),), torch.inf)
    for _ in range(n - 1):
        nearest = torch.minimum(nearest, (x - x[chosen[-1]]).square().sum(1))
        chosen.append(int(nearest.argmax()))
    return chosen


def coreset(quick: bool) -> Comparison:
    n, d, size = (2_000, 64, 50) if quick else (20_000, 384, 200)
    x = draw(n, d)
    return Comparison(
        f"k-center coreset, {n} x {d} -> {size}",
        lambda: k_center(x, size),
        {"anomalib": lambda: coreset_by_anomalib(x, size), "torch, straight": lambda: coreset_in_torch(x, size)},
        lambda ours, theirs: len(ours) == size and radius(x, ours) <= 1.02 * radius(x, theirs),
        3.9,
        {"anomalib": "projects at random first, so that it covers less well"},
    )


def nearest_by_anomalib(x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    only = SimpleNamespace(memory_bank=memory, euclidean_dist=PatchcoreModel.euclidean_dist)
    return PatchcoreModel.nearest_neighbors(only, x, n_neighbors=1)[0]


def nearest_by_faiss(x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    import faiss

    index = faiss.IndexFlatL2(x.shape[1])
    index.add(memory.numpy())
    return torch.from_numpy(index.search(x.numpy(), 1)[0][:, 0]).clamp_min(0).sqrt()


def nearest_score(quick: bool) -> Comparison:
    n, m, d = (2_000, 200, 64) if quick else (25_000, 2_000, 384)
    x, memory = draw(n, d), draw(m, d, seed=1)
    return Comparison(
        f"Nearest-neighbour score, {n} x {d} against {m}",
        lambda: knn(x, memory, k=1).distances[:, 0],
        {"anomalib": lambda: nearest_by_anomalib(x, memory), "faiss": lambda: nearest_by_faiss(x, memory)},
        close(1e-3),
        1.2,
        limit="faiss selects while it multiplies, in compiled code",
    )


def gaussian_data(quick: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n, d, classes = (3_000, 32, 10) if quick else (50_000, 512, 100)
    labels = torch.arange(n) % classes
    means = draw(classes, d, seed=1)
    return draw(n, d) + means[labels], labels, draw(n // 5, d, seed=2)


def classes_by_pytorch_ood(x, y, test):
    from pytorch_ood.detector import Mahalanobis

    return Mahalanobis(torch.nn.Identity()).fit_features(x, y).predict_features(test)


def classes_by_sklearn(x, y, test):
    """scikit-learn's covariance of what is left without the class means, and a product per class."""
    from sklearn.covariance import EmpiricalCovariance

    x, y, test = x.numpy(), y.numpy(), test.numpy()
    means = np.stack([x[y == c].mean(0) for c in range(y.max() + 1)])
    precision = EmpiricalCovariance(assume_centered=True).fit(x - means[y]).precision_.astype(np.float32)
    a, b = test @ precision, means @ precision
    squares = (a * test).sum(1)[:, None] - 2 * a @ means.T + (b * means).sum(1)
    return squares.min(1)


def class_gaussians(quick: bool) -> Comparison:
    from companion.anomaly import MahalanobisOOD

    x, y, test = gaussian_data(quick)
    return Comparison(
        f"A Gaussian per class: fit {len(x)} x {x.shape[1]}, score {len(test)}",
        lambda: MahalanobisOOD(shrinkage=0.0).fit(x, y).ood_score(test),
        {
            "pytorch-ood": lambda: classes_by_pytorch_ood(x, y, test),
            "scikit-learn": lambda: classes_by_sklearn(x, y, test),
        },
        close(1e-2),
        3.2,
        {"pytorch-ood": "does not divide the covariance by n"},
        limit=PRODUCTS,
    )


def one_by_sklearn(x, test):
    from sklearn.covariance import LedoitWolf

    return -LedoitWolf().fit(x.numpy()).mahalanobis(test.numpy())


def one_gaussian(quick: bool) -> Comparison:
    from companion.anomaly import MVGDetector

    x, _, _ = gaussian_data(quick)
    return Comparison(
        f"One Gaussian: fit and score {len(x)} x {x.shape[1]}",
        lambda: MVGDetector().fit(x).score_samples(x),
        {"scikit-learn": lambda: one_by_sklearn(x, x)},
        close(1e-2),
        22,
        limit=PRODUCTS,
    )


def ranking_data(quick: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(20_000 if quick else 1_000_000, generator=generator)
    return scores, (torch.rand(len(scores), generator=generator) < scores).long()


def auroc_by_torchmetrics(scores, labels):
    from torchmetrics.functional.classification import binary_auroc

    return binary_auroc(scores, labels)


def auroc_by_sklearn(scores, labels):
    from sklearn.metrics import roc_auc_score

    return roc_auc_score(labels.numpy(), scores.numpy())


def roc_area(quick: bool) -> Comparison:
    scores, labels = ranking_data(quick)
    return Comparison(
        f"AUROC, {len(scores)} scores",
        lambda: auroc(scores, labels),
        {
            "torchmetrics": lambda: auroc_by_torchmetrics(scores, labels),
            "scikit-learn": lambda: auroc_by_sklearn(scores, labels),
        },
        close(1e-5),
        4.7,
    )


def precision_by_torchmetrics(scores, labels):
    from torchmetrics.functional.classification import binary_average_precision

    return binary_average_precision(scores, labels)


def precision_by_sklearn(scores, labels):
    from sklearn.metrics import average_precision_score

    return average_precision_score(labels.numpy(), scores.numpy())


def precision_area(quick: bool) -> Comparison:
    scores, labels = ranking_data(quick)
    return Comparison(
        f"Average precision, {len(scores)} scores",
        lambda: average_precision(scores, labels),
        {
            "torchmetrics": lambda: precision_by_torchmetrics(scores, labels),
            "scikit-learn": lambda: precision_by_sklearn(scores, labels),
        },
        close(1e-4),
        1.3,
    )


def anomaly_maps(images: int, side: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Maps of noise; every other image has a square of the side's eighth that scores higher."""
    maps = torch.randn(images, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    masks = torch.zeros(images, side, side, dtype=torch.bool, device=device)
    masks[1::2, side // 4 : side // 4 + side // 8, side // 4 : side // 4 + side // 8] = True
    return maps + 3.5 * masks, masks


def ours_aupimo(maps, masks):
    from companion.anomaly import AUPIMO

    metric = AUPIMO().to(maps.device)
    metric.update(maps, masks)
    return metric.compute()


def aupimo_by_anomalib(maps, masks, thresholds: int):
    from anomalib.metrics.pimo.pimo import _AUPIMO

    metric = _AUPIMO(num_thresholds=thresholds, return_average=False)
    metric.update(maps, masks)
    return metric.compute()[1].aupimos


def aupimo(quick: bool) -> Comparison:
    from companion.anomaly import AUPIMO  # noqa: F401 - the comparison is left out without it

    images, side = (20, 128) if quick else (200, 256)
    maps, masks = anomaly_maps(images, side)
    return Comparison(
        f"AUPIMO, {images} images of {side} x {side}",
        lambda: ours_aupimo(maps, masks),
        {
            "anomalib, 300 000 thresholds": lambda: aupimo_by_anomalib(maps, masks, 300_000),
            "anomalib, 30 000 thresholds": lambda: aupimo_by_anomalib(maps, masks, 30_000),
        },
        close(0, 2e-2),
        24,
    )


def coreset_rows(quick: bool) -> Growth:
    def prepare(n):
        x = draw(n, 384)
        return lambda: k_center(x, 100)

    return Growth(
        "k-center coreset of 100", "rows, 384 columns", [1_000] if quick else [5_000, 20_000, 80_000], prepare
    )


def coreset_columns(quick: bool) -> Growth:
    def prepare(d):
        x = draw(20_000, d)
        return lambda: k_center(x, 100)

    return Growth("k-center coreset of 100", "columns, 20 000 rows", [32] if quick else [64, 256, 1_024], prepare)


def aupimo_images(quick: bool) -> Growth:
    from companion.anomaly import AUPIMO  # noqa: F401

    def prepare(n):
        maps, masks = anomaly_maps(n, 256)
        return lambda: ours_aupimo(maps, masks)

    return Growth("AUPIMO", "images of 256 x 256", [10] if quick else [50, 200, 800], prepare)


def many_images() -> OnCard:
    from companion.anomaly import AUPIMO  # noqa: F401

    n = 2_000

    def prepare():
        maps, masks = anomaly_maps(n, 256, "cuda")
        return lambda: ours_aupimo(maps, masks)

    return OnCard(f"AUPIMO, {n} images of 256 x 256", prepare, bytes=5.0 * n * 256 * 256)


COMPARISONS = [
    coreset,
    nearest_score,
    class_gaussians,
    one_gaussian,
    roc_area,
    precision_area,
    aupimo,
]
GROWTH = [coreset_rows, coreset_columns, aupimo_images]
ON_CARD = [many_images]
