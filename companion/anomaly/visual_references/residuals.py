"""ResAD: subtract the nearest normal reference, so that one detector serves products it has never seen.

Public: `residual_features`, `class_correlation`, `LogBarrierOCCLoss`, `ResADDetector`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from companion.anomaly.visual_anomalies.backbone import check_images
from companion.anomaly.visual_anomalies.detector import ImageDetector
from companion.anomaly.visual_anomalies.simplenet import NoiseDiscriminator, truncated_l1_loss
from companion.checks import check_features, check_in_range, check_labels
from companion.neighbors import knn
from companion.runtime import device as pick_device
from companion.runtime import has_fused

__all__ = ["LogBarrierOCCLoss", "ResADDetector", "class_correlation", "residual_features"]


def residual_features(features: Any, pool: Any) -> Tensor:
    r"""Return $f - r^*(f)$ with $r^*(f) = \arg\min_{r \in \text{pool}} \lVert f - r \rVert$.

    Args:
        features: patches (n, d).
        pool: normal reference patches (m, d). It must not hold patches of the images that are scored.

    >>> residual_features([[1.0, 2.0], [5.0, 5.0]], [[1.0, 1.0], [5.0, 6.0]])
    tensor([[ 0.,  1.],
            [ 0., -1.]])

    Paper: yao2025resad
    Chapter: anomaly/visual-references
    """
    features, pool = check_features(features), check_features(pool, "pool")
    _, nearest = knn(features, pool, k=1)
    return features - pool[nearest[:, 0]]


def class_correlation(features: Any, labels: Any, ridge: float = 1e-3) -> Tensor:
    """Return how well a linear probe reads the product from the features: accuracy on held-out rows.

    A least-squares probe on one-hot targets, fitted on the even rows and tested on the odd ones: shuffle rows first.

    Args:
        features: (n, d).
        labels: the product of each row.
        ridge: added to the diagonal, relative to its mean.

    >>> x = torch.eye(2).repeat(20, 1)[torch.arange(40) // 2 % 2]
    >>> class_correlation(x, torch.arange(40) // 2 % 2)
    tensor(1.)

    Paper: yao2025resad
    Chapter: anomaly/visual-references
    """
    x = check_features(features, min_samples=4).double()
    labels = check_labels(labels, len(x)).to(x.device)
    x = (x - x[::2].mean(0)) / x[::2].std(0).clamp(min=1e-6)
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    train, target = x[::2], F.one_hot(labels[::2], int(labels.max()) + 1).to(x)
    gram = train.T @ train
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    weights = torch.linalg.solve(gram, train.T @ target)
    return ((x[1::2] @ weights).argmax(1) == labels[1::2]).float().mean()


class LogBarrierOCCLoss(nn.Module):
    r"""Pull normal radii into a shell $[r_{min}, r_{max}]$ from both sides, with a logarithmic barrier.

    $L(r) = -\log(1 - \mathrm{clip}((r - r_{max})_+ + (r_{min} - r)_+) / s)$, with the excess clipped just below the
    scale s: zero inside the shell, steeper the farther outside. Written from the idea in the abstract; the paper's own
    constants were not checked.

    Args:
        r_min: inner radius.
        r_max: outer radius.
        scale: the excess at which the barrier stands.

    >>> LogBarrierOCCLoss(0.5, 1.0)(torch.tensor([[0.6, 0.0], [0.0, 1.0]]))
    tensor(0.)

    Paper: yao2025resad
    Chapter: anomaly/visual-references
    """

    def __init__(self, r_min: float = 0.4, r_max: float = 1.0, scale: float = 10.0):
        super().__init__()
        if not 0 <= r_min < r_max:
            raise ValueError(f"expected 0 <= r_min < r_max, got {r_min} and {r_max}")
        self.r_min, self.r_max, self.scale = r_min, r_max, scale

    def forward(self, features: Tensor) -> Tensor:
        """Return the mean barrier over the rows of features (n, d)."""
        radius = features.norm(dim=-1)
        excess = (radius - self.r_max).clamp(min=0) + (self.r_min - radius).clamp(min=0)
        share = excess / self.scale
        # past 0.99 of the barrier go on in a straight line, so that gradients stay finite and alive
        barrier = -torch.log1p(-share.clamp(max=0.99)) + (share - 0.99).clamp(min=0) / 0.01
        return barrier.mean()


class ResADDetector(ImageDetector):
    r"""A head trained on the patches of several products, used on another product through a few normal references.

    On residual features the head sees "how far and in which direction from the nearest normal patch" and little of the
    product; on raw features (`residual=False`) it sees the product itself. The head is a small discriminator against
    Gaussian noise, as in `SimpleNetDetector`. `score="norm"` leaves the head out: the residual's length is the
    few-shot nearest-neighbour score, the baseline to beat.

    Args:
        backbone: images to a list of maps; None is the shipped network.
        patch: side of the averaged neighbourhood.
        residual: subtract references (False: the head reads raw features).
        score: "head" or "norm".
        hypersphere: divide residuals by their usual length on the reference images, one against the others.
        noise_std: the noise of the fake negatives, in units of each channel's standard deviation.
        references: normal images per source product that play the references in training.
        steps: Adam steps.
        batch_size: images per pass.
        device: "auto", or a torch device.
        random_state: seed; None uses torch's default generator.

    >>> g = torch.Generator().manual_seed(0)
    >>> products = [torch.rand(4, 1, 32, 32, generator=g) * s for s in (0.3, 0.9)]
    >>> detector = ResADDetector(steps=2, references=2, random_state=0).fit(products)
    >>> detector.set_reference(products[0][:2]).score_samples(products[0][2:]).shape
    torch.Size([2])

    Paper: yao2025resad
    Chapter: anomaly/visual-references
    """

    def __init__(
        self,
        backbone=None,
        patch: int = 3,
        residual: bool = True,
        score: str = "head",
        hypersphere: bool = True,
        noise_std: float = 1.0,
        references: int = 4,
        steps: int = 400,
        batch_size: int = 64,
        device: str = "auto",
        random_state: int | None = None,
    ):
        self.backbone = backbone
        self.patch = patch
        self.residual = residual
        self.score = score
        self.hypersphere = hypersphere
        self.noise_std = noise_std
        self.references = references
        self.steps = steps
        self.batch_size = batch_size
        self.device = device
        self.random_state = random_state

    @torch.enable_grad()
    def fit(self, images: Sequence[Any], y: Any = None) -> "ResADDetector":
        """Train the head on source products.

        Args:
            images: one batch of normal images per product.
            y: ignored.

        Raises:
            ValueError: fewer than two products, or one with no image besides its references.
        """
        where = pick_device(self.device)
        products = [check_images(p, min_samples=self.references + 1).detach().to(where) for p in _products(images)]
        self.__dict__.pop("offset_", None)
        self.image_shape_ = tuple(products[0].shape[1:])
        self._fit_patches([self._patches(product) for product in products])
        return self

    @torch.enable_grad()
    def fit_patches(self, grid: Sequence[Any]) -> "ResADDetector":
        """Train the head on patch vectors computed before, so that detectors can share one pass of the backbone.

        Args:
            grid: one grid (n, rows, columns, channels) per product, as `local_patch_features` gives them.
        """
        grids = [self._checked_grid(product).detach() for product in _products(grid)]
        for product in grids:
            if len(product) <= self.references:
                raise ValueError(f"expected at least {self.references + 1} images per product, got {len(product)}")
        self.__dict__.pop("offset_", None)
        self.__dict__.pop("image_shape_", None)
        self.patch_shape_ = tuple(grids[0].shape[1:])
        self._fit_patches(grids)
        return self

    def _fit_patches(self, grids: list[Tensor]) -> None:
        if self.score not in ("head", "norm"):
            raise ValueError(f"expected score to be 'head' or 'norm', got {self.score!r}")
        check_in_range(self.noise_std, "noise_std", 0.0)
        g, where, rows = self._generator(), grids[0].device, []
        for grid in grids:
            self._reference(grid[: self.references])
            rows.append(self._rows(grid[self.references :].flatten(0, 2)))
        self.__dict__.pop("pool_", None)
        x = torch.cat(rows)
        self.mean_, self.std_ = x.mean(0), x.std(0).clamp(min=1e-6)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(torch.randint(2**31, (), generator=g)))
            self.head_ = NoiseDiscriminator(x.shape[1]).to(x)
        optimizer = torch.optim.Adam(self.head_.parameters(), lr=2e-3, fused=has_fused(where))
        for _ in range(self.steps):
            real = (x[torch.randint(len(x), (256,), generator=g).to(where)] - self.mean_) / self.std_
            fake = real + self.noise_std * torch.randn(real.shape, generator=g).to(where)
            loss = truncated_l1_loss(self.head_(real), self.head_(fake))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def set_reference(self, images: Any) -> "ResADDetector":
        """Set the few normal images of the product that is scored next; nothing is trained.

        Args:
            images: at least two normal images, which must not be scored themselves.
        """
        self._reference(self._patches(self._checked(check_images(images, "reference images", min_samples=2))))
        return self

    def set_reference_patches(self, grid: Any) -> "ResADDetector":
        """Set the references from patch vectors (n, rows, columns, channels) of at least two normal images."""
        grid = self._checked_grid(grid)
        if len(grid) < 2:
            raise ValueError(f"expected at least 2 reference images, got {len(grid)}")
        self._reference(grid)
        return self

    def _reference(self, grid: Tensor) -> None:
        self.pool_ = grid.flatten(0, 2)
        self.radius_ = 1.0
        if self.hypersphere and self.residual:
            # each reference against the others: the usual length of a normal residual
            lengths = [
                residual_features(grid[i].flatten(0, 1), grid[torch.arange(len(grid)) != i].flatten(0, 2)).norm(dim=1)
                for i in range(len(grid))
            ]
            self.radius_ = float(torch.cat(lengths).median().clamp(min=1e-6))

    def _rows(self, patches: Tensor) -> Tensor:
        return residual_features(patches, self.pool_) / self.radius_ if self.residual else patches

    @torch.no_grad()
    def _score_patches(self, grid: Tensor) -> Tensor:
        if not hasattr(self, "pool_"):
            raise ValueError("expected set_reference(images) of the product before scoring it")
        rows = self._rows(grid.flatten(0, 2))
        if self.score == "norm":
            return rows.norm(dim=1).view(grid.shape[:3])
        return -self.head_((rows - self.mean_) / self.std_).view(grid.shape[:3])


def _products(products: Sequence[Any]) -> Sequence[Any]:
    if isinstance(products, Tensor) or len(products) < 2:
        raise ValueError("expected a list of at least two products, each a batch of its own")
    return products
