"""The features of a network that was trained for something else, as a scikit-learn transformer.

Public: `FrozenFeatures`, `few_shot_accuracy`, `retrieval_map`.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import LinearSVC
from torch import Tensor, nn
from torch.nn import functional as F

from companion.anomaly.visual_anomalies.backbone import load_backbone
from companion.checks import (
    as_tensor,
    check_features,
    check_generator,
    check_in_range,
    check_labels,
    check_positive_int,
)
from companion.geometry import single
from companion.layers import precision, read_layers
from companion.neighbors import knn
from companion.runtime import device as pick_device

__all__ = ["FrozenFeatures", "few_shot_accuracy", "retrieval_map"]

POOLS = ("mean", "moments", "flatten")


class FrozenFeatures(TransformerMixin, BaseEstimator):
    r"""Images in, features of a frozen layer out: for a pipeline with any detector or classifier on matrices.

    Args:
        model: any `nn.Module` that takes images; or a name: "texture" (the small network that ships with the book),
            "timm:NAME", "torchvision:NAME".
        layer: name of the layer to read, as in `model.named_modules()`, or several; None reads the output of the model.
            For a name as in `load_backbone`.
        pool: what becomes of maps (n, c, h, w) and tokens (n, t, c): their "mean"; "moments", mean and standard
            deviation over places; or "flatten".
        l2: divide each row by its length.
        mean: subtracted per channel before the model sees an image; None: nothing. Names bring their own.
        std: divides per channel; None: nothing.
        batch_size: images per pass.
        device: "auto", or a torch device.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    >>> FrozenFeatures(net, layer="1", pool="moments").transform(torch.rand(5, 3, 8, 8)).shape
    torch.Size([5, 8])

    Paper: razavian2014cnn
    Chapter: anomaly/gaussian-features
    """

    def __init__(
        self,
        model: nn.Module | str = "texture",
        layer: Any = None,
        pool: str = "mean",
        l2: bool = True,
        mean: Any = None,
        std: Any = None,
        batch_size: int = 64,
        device: str = "auto",
    ):
        self.model = model
        self.layer = layer
        self.pool = pool
        self.l2 = l2
        self.mean = mean
        self.std = std
        self.batch_size = batch_size
        self.device = device

    def __sklearn_is_fitted__(self) -> bool:
        return True  # frozen: there is nothing to learn

    def fit(self, X: Any, y: Any = None) -> "FrozenFeatures":
        """Learn nothing; look at one image, so that a wrong layer is found now."""
        self.n_features_out_ = self.transform(as_tensor(X, "X")[:1]).shape[1]
        return self

    @torch.no_grad()
    def transform(self, X: Any) -> Any:
        """Return features (n, d) of images (n, c, h, w), as a tensor for a tensor and an array otherwise.

        Raises:
            ValueError: not images, a layer that does not exist or did not run, a setting out of range.
            ImportError: the library of a named model is not installed.
        """
        images = as_tensor(X, "X")
        if images.ndim != 4 or not len(images):
            raise ValueError(f"expected images (n, c, h, w), got shape {tuple(images.shape)}")
        if self.pool not in POOLS:
            raise ValueError(f"expected pool among {POOLS}, got {self.pool!r}")
        where = pick_device(self.device)
        read = self._reader(where)
        blocks = images.split(check_positive_int(self.batch_size, "batch_size"))
        rows = torch.cat([self._pooled(read(self._scaled(block.to(where, torch.float32)))) for block in blocks])
        return rows.to(X.device) if isinstance(X, Tensor) else rows.cpu().numpy()

    def _reader(self, where: torch.device) -> Callable[[Tensor], list[Tensor]]:
        layers = [self.layer] if isinstance(self.layer, str) else self.layer
        if isinstance(self.model, str):
            return load_backbone(self.model, layers).to(where)
        model, names = self.model.to(where), layers or [""]
        dtype = precision(model, torch.float32)

        def read(images: Tensor) -> list[Tensor]:
            outputs, _ = read_layers(model, images.to(dtype), outputs_of=names)
            for name in names:
                out = outputs.get(name)
                if not isinstance(out, Tensor) or out.ndim < 2:
                    raise ValueError(f"expected a tensor (n, ...) from layer {name!r}, got {type(out).__name__}")
            return [single(outputs[name]) for name in names]

        return read

    def _scaled(self, images: Tensor) -> Tensor:
        for value, change in ((self.mean, torch.sub), (self.std, torch.div)):
            if value is not None:
                images = change(
                    images, torch.as_tensor(value, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)
                )
        return images

    def _pooled(self, outputs: Any) -> Tensor:
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        rows = torch.cat([_pool(out, self.pool) for out in outputs], 1)
        return F.normalize(rows, dim=1) if self.l2 else rows


def _pool(out: Tensor, pool: str) -> Tensor:
    if out.ndim == 2 or pool == "flatten":
        return out.flatten(1)
    places = out.flatten(2) if out.ndim == 4 else out.transpose(1, 2)  # (n, c, places)
    if pool == "mean":
        return places.mean(2)
    return torch.cat([places.mean(2), places.std(2, correction=0)], 1)


def few_shot_accuracy(
    features: Any,
    labels: Any,
    per_class: int,
    *,
    n_splits: int = 5,
    C: float = 1.0,
    generator: torch.Generator | int | None = None,
) -> Tensor:
    """Return the accuracy of a linear support vector machine trained on a few rows per class, per split.

    Columns are centred and scaled together, by the mean and the typical size of the training rows, so that C means the
    same for pixels and for features. C is a setting, never chosen on the rows that are scored.

    Args:
        features: (n, d).
        labels: (n,) in 0..C-1.
        per_class: training rows per class; all others are scored.
        n_splits: random choices of those rows.
        C: of the support vector machine.
        generator: draws the splits; a seed will do, None means torch's default generator.

    Returns:
        Accuracies (n_splits,).

    Raises:
        ValueError: not features, or a class without more than `per_class` rows.

    >>> x = torch.cat([torch.zeros(20, 2), torch.ones(20, 2)])
    >>> few_shot_accuracy(x, [0] * 20 + [1] * 20, per_class=3, n_splits=2)
    tensor([1., 1.])

    Paper: razavian2014cnn
    Chapter: anomaly/gaussian-features
    """
    x = single(check_features(features, "features").detach()).cpu()
    y = check_labels(labels, n=len(x)).cpu()
    generator = check_generator(generator)
    per_class, check = check_positive_int(per_class, "per_class"), check_in_range(C, "C", 0, inclusive="neither")
    rows_of = [(y == c).nonzero().flatten() for c in y.unique()]
    if min(map(len, rows_of)) <= per_class:
        raise ValueError(f"expected more than {per_class} rows in every class, got {min(map(len, rows_of))}")
    accuracies = []
    for _ in range(check_positive_int(n_splits, "n_splits")):
        train = torch.cat([rows[torch.randperm(len(rows), generator=generator)[:per_class]] for rows in rows_of])
        test = torch.ones(len(x), dtype=torch.bool)
        test[train] = False
        mean = x[train].mean(0)
        scale = (x[train] - mean).square().sum(1).mean().sqrt().clamp_min(1e-12)
        z = ((x - mean) / scale).numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = LinearSVC(C=check, dual=True, random_state=0).fit(z[train], y[train])
        accuracies.append(float(np.mean(model.predict(z[test]) == y[test].numpy())))
    return torch.tensor(accuracies)


def retrieval_map(features: Any, labels: Any, k: int | None = None) -> Tensor:
    r"""Return how well nearest neighbours find rows of the same class: mean average precision of ranking by distance.

    Args:
        features: (n, d).
        labels: (n,).
        k: how many neighbours are ranked; None: all others. With fewer, precision is averaged over the hits among them.

    Raises:
        ValueError: not features, labels that do not fit, k too large.

    >>> retrieval_map([[0.0], [0.1], [5.0], [5.1]], [0, 0, 1, 1])
    tensor(1.)

    Paper: razavian2014cnn
    Chapter: anomaly/gaussian-features
    """
    x = check_features(features, "features", min_samples=2).detach()
    y = check_labels(labels, n=len(x), device=x.device)
    neighbors = knn(x, k=len(x) - 1 if k is None else k).indices
    hits = (y[neighbors] == y[:, None]).to(x.dtype)
    ranks = torch.arange(1, hits.shape[1] + 1, device=x.device)
    precision = (hits.cumsum(1) / ranks * hits).sum(1) / hits.sum(1).clamp_min(1)
    return precision.mean()
