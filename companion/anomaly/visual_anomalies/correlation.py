"""Focus the discrepancy: how a patch's attention spreads over its own image and over a bank of normal patches.

Public: `rbf_target`, `attention_entropy`, `correlation_loss`, `I2Correlation`, `FODDetector`.
"""

import math

import torch
from torch import Tensor, nn

from companion.anomaly.visual_anomalies.detector import ImageDetector
from companion.anomaly.visual_anomalies.memory import k_center
from companion.checks import check_in_range, check_positive_int
from companion.neighbors import knn
from companion.runtime import has_fused

__all__ = ["FODDetector", "I2Correlation", "attention_entropy", "correlation_loss", "rbf_target"]


def rbf_target(x: Tensor, reference: Tensor, log_sigma: Tensor, mask_self: bool = False) -> Tensor:
    r"""Return the correlation a patch ought to have: $A_{ij} \propto \exp(-\lVert x_i - r_j \rVert^2 / 2 \sigma_i^2)$.

    Args:
        x: patches (..., n, d).
        reference: patches to correlate with (..., m, d).
        log_sigma: the logarithm of each patch's width (..., n, 1).
        mask_self: leave out i = j, where the references are the patches themselves.

    Returns:
        Rows that sum to one (..., n, m).

    >>> x = torch.tensor([[0.0], [1.0], [9.0]])
    >>> rbf_target(x, x, torch.zeros(3, 1), mask_self=True).round(decimals=2)[0].tolist()
    [0.0, 1.0, 0.0]

    Paper: yao2023focus
    Chapter: anomaly/visual-anomalies
    """
    centre = reference.mean(-2, keepdim=True)  # far from the origin products are rounded
    logits = -torch.cdist(x - centre, reference - centre).square() / (2 * (2 * log_sigma).exp())
    return _softmax(logits, mask_self)


def _softmax(logits: Tensor, mask_self: bool) -> Tensor:
    if mask_self:
        eye = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(eye, -torch.inf)
    return logits.softmax(-1)


def attention_entropy(attention: Tensor) -> Tensor:
    r"""Return $-\sum_j A_{ij} \log A_{ij}$ of each row: 0 for a point, $\log m$ for an even spread.

    >>> attention_entropy(torch.full((1, 4), 0.25)).exp()
    tensor([4.])

    Paper: yao2023focus
    Chapter: anomaly/visual-anomalies
    """
    # not xlogy: its gradient at a masked zero is NaN
    return -(attention * attention.clamp(min=1e-30).log()).sum(-1)


def correlation_loss(attention: Tensor, target: Tensor) -> Tensor:
    r"""Return the symmetric divergence $KL(A \Vert T) + KL(T \Vert A)$ of each row.

    >>> correlation_loss(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.5, 0.5]]))
    tensor([0.])

    Paper: yao2023focus
    Chapter: anomaly/visual-anomalies
    """
    log_ratio = attention.clamp(min=1e-9).log() - target.clamp(min=1e-9).log()
    return ((attention - target) * log_ratio).sum(-1)


class I2Correlation(nn.Module):
    """Attention of patches over their own image and over normal reference patches, with learned target widths.

    Args:
        dim: channels of a patch.
        inner: length of queries and keys.

    >>> layer = I2Correlation(6, 4)
    >>> out, intra, inter = layer(torch.rand(2, 9, 6), torch.rand(5, 6))
    >>> out.shape, intra.shape, inter.shape
    (torch.Size([2, 9, 6]), torch.Size([2, 9, 9]), torch.Size([2, 9, 5]))

    Paper: yao2023focus
    Chapter: anomaly/visual-anomalies
    """

    def __init__(self, dim: int, inner: int = 32):
        super().__init__()
        self.query = nn.Linear(dim, inner)
        self.key_intra = nn.Linear(dim, inner)
        self.key_inter = nn.Linear(dim, inner)
        self.value = nn.Linear(dim, dim)
        self.log_sigma = nn.Linear(dim, 2)
        nn.init.zeros_(self.log_sigma.weight)
        nn.init.constant_(self.log_sigma.bias, 0.5 * math.log(dim))  # the usual distance of standardised patches

    def forward(self, x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the fused features (b, n, d), A_intra (b, n, n) and A_inter (b, n, m)."""
        q, scale = self.query(x), self.query.out_features**-0.5
        intra = _softmax(scale * q @ self.key_intra(x).transpose(-1, -2), mask_self=True)
        inter = _softmax(scale * q @ self.key_inter(reference).transpose(-1, -2), mask_self=False)
        fused = 0.5 * (intra @ self.value(x) + inter @ self.value(reference))
        return fused, intra, inter

    def targets(self, x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Return the RBF targets of both maps, their widths read from the patches."""
        intra, inter = self.log_sigma(x).chunk(2, -1)
        return rbf_target(x, x, intra, mask_self=True), rbf_target(x, reference.expand(len(x), -1, -1), inter)


class FODDetector(ImageDetector):
    r"""Three discrepancies of a patch: to the bank, within its image, and to what attention predicts.

    - bank: distance to the nearest normal patch;
    - intra: $-\log$ of the mean RBF affinity to the rest of its own image;
    - learned: error of reconstructing the patch from where its attention falls.

    Each map is standardised on the normal training images, and the final map is the largest of the three or, with
    `which`, one of them. The attention is trained towards RBF targets, alternating which side is held fixed, while
    an entropy term keeps rows from collapsing to a point (the alternation follows the wording of the paper; its
    constants are ours).

    Args:
        backbone: images to a list of maps; None is the shipped network.
        patch: side of the averaged neighbourhood.
        grid: the patch grid is averaged down to this side, since attention is quadratic in it.
        bank: normal patches that are kept.
        inner: length of queries and keys.
        entropy_weight: weight of the entropy term; 0 switches it off.
        steps: Adam steps; 0 leaves the learned part out.
        which: "max", "bank", "intra" or "learned".
        batch_size: images per pass.
        device: "auto", or a torch device.
        random_state: seed; None uses torch's default generator.

    >>> normal = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    >>> FODDetector(steps=2, bank=32, random_state=0).fit(normal).score_samples(normal).shape
    torch.Size([4])

    Paper: yao2023focus
    Chapter: anomaly/visual-anomalies
    """

    def __init__(
        self,
        backbone=None,
        patch: int = 3,
        grid: int = 8,
        bank: int = 256,
        inner: int = 32,
        entropy_weight: float = 0.5,
        steps: int = 200,
        which: str = "max",
        batch_size: int = 64,
        device: str = "auto",
        random_state: int | None = None,
    ):
        self.backbone = backbone
        self.patch = patch
        self.grid = grid
        self.bank = bank
        self.inner = inner
        self.entropy_weight = entropy_weight
        self.steps = steps
        self.which = which
        self.batch_size = batch_size
        self.device = device
        self.random_state = random_state

    def _fit_patches(self, grid: Tensor) -> None:
        check_positive_int(self.grid, "grid")
        check_in_range(self.entropy_weight, "entropy_weight", 0.0)
        if self.which not in ("max", "bank", "intra", "learned"):
            raise ValueError(f"expected which to be 'max', 'bank', 'intra' or 'learned', got {self.which!r}")
        g = self._generator()
        self.mean_ = grid.mean((0, 1, 2))
        self.std_ = grid.std((0, 1, 2)).clamp(min=1e-6)
        x = self._tokens(grid)  # (n, grid^2, d)
        patches = x.flatten(0, 1)
        self.bank_ = patches[k_center(patches, min(self.bank, len(patches)))]
        # affinity width: the usual distance between patches of one normal image
        sample = x[:: max(1, len(x) // 64)]
        self.width_ = float(torch.cdist(sample, sample).flatten(1).median(1).values.mean()) / 2
        seed = int(torch.randint(2**31, (), generator=g))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.layer_ = I2Correlation(x.shape[-1], self.inner).to(x)
        self._train(x, g)
        maps = self._maps(x)
        self.scales_ = {name: (m.mean(), m.std().clamp(min=1e-9)) for name, m in maps.items()}

    @torch.no_grad()
    def attention(self, images) -> tuple[Tensor, Tensor]:
        """Return the learned attention of each patch over its image (n, t, t) and over the bank (n, t, m)."""
        x = self._tokens(self._patches(self._checked(images)))
        _, intra, inter = self.layer_(x, self.bank_)
        return intra, inter

    def _tokens(self, grid: Tensor) -> Tensor:
        x = ((grid - self.mean_) / self.std_).permute(0, 3, 1, 2)
        return torch.nn.functional.adaptive_avg_pool2d(x, self.grid).flatten(2).transpose(1, 2)

    def _train(self, x: Tensor, g: torch.Generator | None) -> None:
        optimizer = torch.optim.Adam(self.layer_.parameters(), lr=3e-3, fused=has_fused(x.device))
        self.entropy_ = []
        for step in range(self.steps):
            batch = x[torch.randint(len(x), (16,), generator=g).to(x.device)]
            # leave this image's own patches out of the bank as far as a random half allows
            rows = torch.randperm(len(self.bank_), generator=g)[: max(1, len(self.bank_) // 2)]
            reference = self.bank_[rows.to(x.device)]
            fused, intra, inter = self.layer_(batch, reference)
            target_intra, target_inter = self.layer_.targets(batch, reference)
            if step % 2:  # the targets follow the attention, then the attention follows the targets
                pairs = ((intra.detach(), target_intra), (inter.detach(), target_inter))
            else:
                pairs = ((intra, target_intra.detach()), (inter, target_inter.detach()))
            divergence = sum(correlation_loss(a, t).mean() for a, t in pairs)
            entropy = sum(
                (attention_entropy(a) / math.log(a.shape[-1])).mean()
                for a in (intra, inter, target_intra, target_inter)
            )
            loss = (fused - batch).square().mean() + 0.1 * divergence - self.entropy_weight * entropy / 4
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            self.entropy_.append(float((attention_entropy(inter) / math.log(inter.shape[-1])).mean().detach()))

    @torch.no_grad()
    def _maps(self, x: Tensor) -> dict[str, Tensor]:
        n, tokens, _ = x.shape
        bank = knn(x.flatten(0, 1), self.bank_, k=1)[0].view(n, tokens)
        affinity = (-torch.cdist(x, x).square() / (2 * self.width_**2)).exp()
        mean_affinity = (affinity.sum(-1) - 1) / (tokens - 1)  # without the patch itself
        fused, _, _ = self.layer_(x, self.bank_)
        return {
            "bank": bank,
            "intra": -mean_affinity.clamp(min=1e-12).log(),
            "learned": (fused - x).square().mean(-1),
        }

    def _score_patches(self, grid: Tensor) -> Tensor:
        maps = self._maps(self._tokens(grid))
        scaled = {name: (m - self.scales_[name][0]) / self.scales_[name][1] for name, m in maps.items()}
        if self.steps == 0:
            scaled.pop("learned")
        chosen = torch.stack(list(scaled.values())).amax(0) if self.which == "max" else scaled[self.which]
        return chosen.view(len(grid), self.grid, self.grid)
