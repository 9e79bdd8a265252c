"""Networks watched while they collapse: features that can be drawn, features that pay, and spread layer by layer.

Public: `LinearFeatureNet`, `priced_feature_loss`, `depthwise_spread`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion.checks import as_tensor, check_in_range, check_labels, check_positive_int
from companion.geometry import scatter_matrices
from companion.nets import MLP

__all__ = ["LinearFeatureNet", "depthwise_spread", "priced_feature_loss"]


class LinearFeatureNet(nn.Module):
    """A multilayer perceptron whose penultimate layer is linear, so that features are free to point anywhere.

    With two features they can be drawn; up to three classes, a simplex fits into the plane.

    Args:
        in_features: size of an input.
        n_classes: C.
        dim: features d.
        hidden: widths of the hidden layers below the features.
        bias: whether the head has one. Without, it starts with orthonormal rows.
        return_features: return (logits, features) from `forward`, for losses that look at both.

    >>> net = LinearFeatureNet(64, n_classes=3)
    >>> net(torch.zeros(5, 64)).shape, net.features(torch.zeros(5, 64)).shape
    (torch.Size([5, 3]), torch.Size([5, 2]))

    Chapter: collapse/neural-collapse
    """

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        dim: int = 2,
        *,
        hidden: tuple[int, ...] = (64, 64),
        bias: bool = True,
        return_features: bool = False,
    ):
        super().__init__()
        self.body = MLP((in_features, *hidden, dim))
        self.head = nn.Linear(dim, check_positive_int(n_classes, "n_classes", minimum=2), bias=bias)
        if not bias:
            nn.init.orthogonal_(self.head.weight)
        self.return_features = return_features

    def features(self, x: Tensor) -> Tensor:
        """Return what the head reads: (n, d)."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return the logits (n, C), or logits and features."""
        h = self.features(x)
        return (self.head(h), h) if self.return_features else self.head(h)


def priced_feature_loss(lam_h: float, n: int) -> Callable[[tuple[Tensor, Tensor], Tensor], Tensor]:
    r"""Return the loss that charges a network for its features as the unconstrained-feature model does.

    $$ \tfrac{1}{2N}\sum_i\lVert z_i - y_i\rVert^2 + \tfrac{\lambda_H}{2}\sum_i\lVert h_i\rVert^2 , $$

    estimated from a batch. The weight decay of the head is the caller's.

    Args:
        lam_h: price of a feature, per sample of the whole training set.
        n: N, the size of that set.

    Returns:
        A function of ((logits, features), labels), for `companion.training.fit` and a `LinearFeatureNet` that returns
        its features.

    >>> loss = priced_feature_loss(lam_h=0.5, n=2)
    >>> loss((torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.ones(2, 1)), torch.tensor([0, 1]))
    tensor(0.7500)

    Paper: dang2023neural
    Chapter: collapse/neural-collapse
    """
    check_in_range(lam_h, "lam_h", low=0)
    check_positive_int(n, "n")

    def loss(outputs: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        logits, features = outputs
        targets = F.one_hot(labels, logits.shape[-1]).to(logits)
        fit = ((logits - targets) ** 2).sum(-1).mean() / 2
        return fit + lam_h / 2 * n * (features**2).sum(-1).mean()

    return loss


@torch.no_grad()
def depthwise_spread(model: MLP, x: Any, labels: Any) -> dict[str, float]:
    r"""Return $\mathrm{tr}\,\Sigma_W/\mathrm{tr}\,\Sigma_B$, spread within over between classes, after each layer.

    The ratio of traces, not the product with a pseudo-inverse: it stays well-conditioned where a layer has more
    dimensions than there are classes.

    Args:
        model: has `activations(x)`, as the networks of `companion.nets` do.
        x: inputs (n, ...).
        labels: (n,).

    Returns:
        The ratio by the name of the layer, "input" first, without the head.

    >>> spread = depthwise_spread(MLP((2, 8, 2), seed=0), torch.eye(2).repeat(3, 1), [0, 1] * 3)
    >>> list(spread), round(spread["input"], 6)
    (['input', 'layer1'], 0.0)

    Paper: tirer2023perturbation
    Chapter: collapse/neural-collapse
    """
    x = as_tensor(x)
    labels = check_labels(labels, len(x))
    outputs = {"input": x.flatten(1), **model.activations(x)}
    ratios = {}
    for name, h in outputs.items():
        if name != "head":
            within, between = scatter_matrices(h.flatten(1), labels)
            ratios[name] = float(within.trace() / between.trace())
    return ratios
