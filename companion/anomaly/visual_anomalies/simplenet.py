"""SimpleNet: noise around normal features plays the anomalies, and a small discriminator learns the border.

Public: `FeatureAdaptor`, `NoiseDiscriminator`, `truncated_l1_loss`, `SimpleNetDetector`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion.anomaly.visual_anomalies.detector import ImageDetector
from companion.checks import check_in_range, check_positive_int
from companion.runtime import has_fused

__all__ = ["FeatureAdaptor", "NoiseDiscriminator", "SimpleNetDetector", "truncated_l1_loss"]


def truncated_l1_loss(normal: Tensor, fake: Tensor, threshold: float = 0.5) -> Tensor:
    r"""Return the mean of $\max(0, t - D(x)) + \max(0, t + D(\tilde x))$.

    Beyond the threshold t an example no longer pulls: the discriminator need not be certain, only on the right side.

    Args:
        normal: discriminator outputs on normal features.
        fake: its outputs on noisy features.
        threshold: t.

    >>> truncated_l1_loss(torch.tensor([0.5, 0.0]), torch.tensor([-1.0, -0.5]))
    tensor(0.2500)

    Paper: liu2023simplenet
    Chapter: anomaly/visual-anomalies
    """
    return (threshold - normal).clamp(min=0).mean() + (threshold + fake).clamp(min=0).mean()


class FeatureAdaptor(nn.Linear):
    """One linear layer from backbone features towards the target domain, starting as the identity.

    >>> FeatureAdaptor(3)(torch.tensor([[1.0, 2.0, 3.0]])).tolist()
    [[1.0, 2.0, 3.0]]

    Paper: liu2023simplenet
    Chapter: anomaly/visual-anomalies
    """

    def __init__(self, dim: int):
        super().__init__(dim, dim)
        nn.init.eye_(self.weight)
        nn.init.zeros_(self.bias)


class NoiseDiscriminator(nn.Sequential):
    """Two layers that map a feature to one number: positive = normal.

    Args:
        dim: channels of a feature.
        hidden: width of the hidden layer.

    >>> NoiseDiscriminator(3, 8)(torch.zeros(5, 3)).shape
    torch.Size([5, 1])

    Paper: liu2023simplenet
    Chapter: anomaly/visual-anomalies
    """

    def __init__(self, dim: int, hidden: int = 64):
        super().__init__(nn.Linear(dim, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, 1, bias=False))


class _Members(nn.Module):
    """Pairs of adaptor and discriminator side by side: m networks, one matrix product per layer."""

    def __init__(self, pairs: list[tuple[FeatureAdaptor, NoiseDiscriminator]]):
        super().__init__()
        adaptors, first, last = [a for a, _ in pairs], [d[0] for _, d in pairs], [d[2] for _, d in pairs]
        # (m, dim, dim), (m, 1, dim)
        self.adaptors = nn.ParameterList([self._weights(adaptors), self._biases(adaptors)])
        self.discriminators = nn.ParameterList([self._weights(first), self._biases(first), self._weights(last)])

    @staticmethod
    def _weights(layers: list) -> Tensor:
        return torch.stack([layer.weight.detach().T for layer in layers])

    @staticmethod
    def _biases(layers: list) -> Tensor:
        return torch.stack([layer.bias.detach()[None] for layer in layers])

    def adapt(self, x: Tensor) -> Tensor:
        """Return adapted features (m, n, dim) of features (m, n, dim)."""
        weight, bias = self.adaptors
        return torch.baddbmm(bias, x, weight)

    def judge(self, x: Tensor) -> Tensor:
        """Return the discriminators' outputs (m, n) on adapted features (m, n, dim)."""
        weight, bias, last = self.discriminators
        return torch.bmm(F.leaky_relu(torch.baddbmm(bias, x, weight), 0.2), last).squeeze(2)


class SimpleNetDetector(ImageDetector):
    r"""Tell normal patch features from the same features with Gaussian noise; the discriminator is the score.

    Features are standardised per channel, adapted, and paired with $\tilde x = x + \sigma \varepsilon$. At test time
    the noise is gone and the map is $-D(G(x))$. The paper's $\sigma = 0.015$ belongs to features that are not
    standardised; in units of the standard deviation of a channel the right size is about 1.

    Args:
        backbone: images to a list of maps; None is the shipped network.
        patch: side of the averaged neighbourhood.
        noise_std: sigma, in units of each channel's standard deviation.
        hidden: width of the discriminator.
        steps: Adam steps.
        lr: learning rate of the adaptor; the discriminator takes ten times as much.
        patches_per_step: normal features drawn in each step.
        average: share of the steps, counted from the last one, whose weights are averaged; 0 keeps the last weights, as
            the paper does. Where a single training ends is a matter of luck; its average is less so.
        members: how many pairs of adaptor and discriminator, whose outputs are averaged. The paper trains one.
        corrupt: None for noise in feature space; a function (images, generator) -> images instead makes the negatives
            from damaged images, the alternative the paper argues against.
        batch_size: images per pass.
        device: "auto", or a torch device.
        random_state: seed for weights, draws and noise; None uses torch's default generator.

    >>> normal = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.2
    >>> SimpleNetDetector(steps=5, random_state=0).fit(normal).score_samples(normal).shape
    torch.Size([4])

    Paper: liu2023simplenet
    Chapter: anomaly/visual-anomalies
    """

    def __init__(
        self,
        backbone=None,
        patch: int = 3,
        noise_std: float = 1.0,
        hidden: int = 64,
        steps: int = 600,
        lr: float = 3e-4,
        patches_per_step: int = 256,
        average: float = 0.0,
        members: int = 1,
        corrupt: Callable[[Tensor, torch.Generator | None], Tensor] | None = None,
        batch_size: int = 64,
        device: str = "auto",
        random_state: int | None = None,
    ):
        self.backbone = backbone
        self.patch = patch
        self.noise_std = noise_std
        self.hidden = hidden
        self.steps = steps
        self.lr = lr
        self.patches_per_step = patches_per_step
        self.average = average
        self.members = members
        self.corrupt = corrupt
        self.batch_size = batch_size
        self.device = device
        self.random_state = random_state

    def _fit(self, images: Tensor) -> None:
        if self.corrupt is None:
            self._fit_patches(self._patches(images))
            return
        g = self._generator()
        normal = self._standardised(self._patches(images))
        damaged = self._patches(self.corrupt(images, g)).flatten(0, 2)
        damaged = (damaged - self.mean_) / self.std_
        changed = (damaged - normal).abs().amax(1) > 0.1
        self._train(normal, damaged[changed], g)

    def _fit_patches(self, grid: Tensor) -> None:
        if self.corrupt is not None:
            raise ValueError("expected images, since corrupt makes its negatives from them: call fit")
        self._train(self._standardised(grid), None, self._generator())

    def _standardised(self, grid: Tensor) -> Tensor:
        check_positive_int(self.steps, "steps")
        check_positive_int(self.members, "members")
        check_in_range(self.noise_std, "noise_std", 0.0)
        check_in_range(self.average, "average", 0.0, 1.0)
        normal = grid.flatten(0, 2)
        self.mean_, self.std_ = normal.mean(0), normal.std(0).clamp(min=1e-6)
        return (normal - self.mean_) / self.std_

    def _train(self, normal: Tensor, negatives: Tensor | None, g: torch.Generator | None) -> None:
        dim, m, b = normal.shape[1], self.members, self.patches_per_step
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(torch.randint(2**31, (), generator=g)))
            pairs = [(FeatureAdaptor(dim), NoiseDiscriminator(dim, self.hidden)) for _ in range(m)]
        self.members_ = _Members(pairs).to(normal)
        groups = [
            {"params": self.members_.adaptors, "lr": self.lr},
            {"params": self.members_.discriminators, "lr": 10 * self.lr},
        ]
        optimizer = torch.optim.Adam(groups, weight_decay=1e-5, fused=has_fused(normal.device))
        weights = list(self.members_.parameters())
        sums, first = [torch.zeros_like(w) for w in weights], self.steps - round(self.average * self.steps)
        self.loss_ = []
        for step in range(self.steps):
            x = self.members_.adapt(normal[torch.randint(len(normal), (m, b), generator=g).to(normal.device)])
            if negatives is None:
                fake = x + self.noise_std * torch.randn(x.shape, generator=g).to(x)
            else:
                rows = torch.randint(len(negatives), (m, b), generator=g).to(normal.device)
                fake = self.members_.adapt(negatives[rows])
            loss = truncated_l1_loss(self.members_.judge(x), self.members_.judge(fake))
            optimizer.zero_grad()
            (m * loss).backward()  # the gradient of each as if it were alone
            optimizer.step()
            if step >= first:
                torch._foreach_add_(sums, [w.detach() for w in weights])
            self.loss_.append(float(loss.detach()))
        if first < self.steps:
            with torch.no_grad():
                for weight, total in zip(weights, sums, strict=True):
                    weight.copy_(total / (self.steps - first))

    @torch.no_grad()
    def _score_patches(self, grid: Tensor) -> Tensor:
        x = ((grid - self.mean_) / self.std_).flatten(0, -2)
        x = x.expand(self.members, *x.shape)
        return -self.members_.judge(self.members_.adapt(x)).mean(0).view(grid.shape[:-1])
