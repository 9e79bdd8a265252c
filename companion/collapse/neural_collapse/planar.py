"""Networks watched while they collapse: one whose features live in the plane, and class spread layer by layer.

Public: `PlanarNet`, `depthwise_spread`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from companion.checks import as_tensor, check_labels, check_positive_int
from companion.geometry import scatter_matrices
from companion.nets import MLP

__all__ = ["PlanarNet", "depthwise_spread"]


class PlanarNet(nn.Module):
    """A multilayer perceptron whose penultimate layer is linear and has two units, so that its features can be drawn.

    Args:
        in_features: size of an input.
        n_classes: C; up to three classes, a simplex fits into the plane.
        hidden: width of the two hidden layers.

    >>> PlanarNet(64)(torch.zeros(5, 64)).shape, PlanarNet(64).features(torch.zeros(5, 64)).shape
    (torch.Size([5, 3]), torch.Size([5, 2]))

    Chapter: collapse/neural-collapse
    """

    def __init__(self, in_features: int, n_classes: int = 3, hidden: int = 64):
        super().__init__()
        self.body = MLP((in_features, hidden, hidden, 2))
        self.head = nn.Linear(2, check_positive_int(n_classes, "n_classes", minimum=2))

    def features(self, x: Tensor) -> Tensor:
        """Return the points in the plane: (n, 2)."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits: (n, C)."""
        return self.head(self.features(x))


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
