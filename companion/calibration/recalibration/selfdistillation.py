"""Targets that soften themselves: each epoch's labels are blended with the model's own last predictions.

Public: `ProgressiveTargets`, `progressive_gradient_ratio`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from companion.checks import check_in_range, check_labels, check_positive_int, check_probs

__all__ = ["ProgressiveTargets", "progressive_gradient_ratio"]


class ProgressiveTargets:
    r"""Keep the last epoch's predictions, and blend them into this epoch's targets.

    In epoch t = 1..T of training the model is its own teacher, trusted a little more each time:

    $$\tilde y_i^{(t)} = (1 - \alpha_t)\, \mathrm{onehot}(y_i) + \alpha_t\, p_i^{(t-1)},
    \qquad \alpha_t = \alpha_T \frac{t}{T}$$

    Train with `torch.nn.functional.cross_entropy(logits, targets)`, whose gradient in the logits is then
    $(1-\alpha_t)(p - y) + \alpha_t (p - p^{(t-1)})$. Call `update` with the predictions of the whole training set after
    every epoch, from the model in evaluation mode. Before the first `update` the targets are the labels.

    Args:
        labels: (n,) training labels, in 0..n_classes-1; (m, n) where each of m models has its own.
        n_classes: C.
        epochs: T.
        alpha: alpha_T, the teacher's share in the last epoch.
        n_models: None for one model; m when m models are trained at once (`companion.training.fit_many`).

    Raises:
        ValueError: labels outside 0..C-1, alpha outside [0, 1], or a size below one.

    >>> targets = ProgressiveTargets(torch.tensor([0, 1]), n_classes=2, epochs=4, alpha=0.8)
    >>> targets.update(torch.tensor([[0.6, 0.4], [0.6, 0.4]]))  # after the first epoch
    >>> targets(torch.tensor([0, 1]))  # second epoch: alpha = 0.4
    tensor([[0.8400, 0.1600],
            [0.2400, 0.7600]])

    Paper: kim2021self
    Chapter: calibration/recalibration
    """

    def __init__(
        self, labels: Tensor, n_classes: int, epochs: int, alpha: float = 0.8, n_models: int | None = None
    ) -> None:
        check_positive_int(n_classes, "n_classes", 2)
        self.epochs = check_positive_int(epochs, "epochs")
        self.final_alpha = check_in_range(alpha, "alpha", 0, 1)
        if n_models is not None:
            labels = labels.expand(check_positive_int(n_models, "n_models"), -1)  # (m, n)
        shape, labels = labels.shape, check_labels(labels.flatten() if n_models else labels, n_classes=n_classes)
        self.one_hot = F.one_hot(labels.view(shape), n_classes).to(torch.get_default_dtype())  # ([m,] n, C)
        self.previous = self.one_hot
        self.epoch = 1

    @property
    def alpha(self) -> float:
        """The teacher's share in the current epoch."""
        return self.final_alpha * min(self.epoch, self.epochs) / self.epochs

    def __call__(self, index: Tensor) -> Tensor:
        """Return the targets of the samples at `index`.

        Args:
            index: (b,) positions in the training set; (m, b) with `n_models`.

        Returns:
            (b, C) or (m, b, C) probabilities.
        """
        return torch.lerp(self._rows(self.one_hot, index), self._rows(self.previous, index), self.alpha)

    def update(self, probs: Tensor) -> None:
        """Store the predictions after an epoch, in the order of the labels, and move on to the next epoch.

        Args:
            probs: (n, C) or (m, n, C), softmax outputs for the whole training set.

        Raises:
            ValueError: another shape, or not probabilities.
        """
        if probs.shape != self.one_hot.shape:
            raise ValueError(f"expected probs of shape {tuple(self.one_hot.shape)}, got {tuple(probs.shape)}")
        check_probs(probs.flatten(0, -2))
        self.previous = probs.detach().to(self.one_hot)
        self.epoch += 1

    @staticmethod
    def _rows(table: Tensor, index: Tensor) -> Tensor:
        if table.dim() == 2:
            return table[index]
        return table.gather(1, index[:, :, None].expand(-1, -1, table.shape[2]))


def progressive_gradient_ratio(probs: Tensor, previous: Tensor, labels: Tensor, alpha: float) -> Tensor:
    r"""Return how much of its gradient on the true class a sample keeps when its target is softened.

    $$r_i = \frac{|p_{i,y} - (1-\alpha) - \alpha\, p^{(t-1)}_{i,y}|}{|p_{i,y} - 1|}$$

    With plain cross-entropy the ratio is 1. What counts is what has changed since the last epoch: an unchanged
    prediction keeps exactly 1 - alpha, a sample that has become harder keeps more, one that has become easier less.

    Args:
        probs: (n, C) current predictions.
        previous: (n, C) the last epoch's.
        labels: (n,) true classes.
        alpha: the teacher's share.

    Returns:
        (n,) ratios; NaN where the current prediction is certain, because there is no gradient to compare with.

    Raises:
        ValueError: not probabilities, labels out of range, alpha outside [0, 1].

    >>> p = torch.tensor([[0.7, 0.3]])
    >>> progressive_gradient_ratio(p, p, torch.tensor([0]), alpha=0.4)
    tensor([0.6000])

    Paper: kim2021self
    Chapter: calibration/recalibration
    """
    probs, previous = check_probs(probs), check_probs(previous, "previous")
    labels = check_labels(labels, probs.shape[0], probs.shape[1])
    check_in_range(alpha, "alpha", 0, 1)
    now, then = (p.gather(1, labels[:, None]).squeeze(1) for p in (probs, previous))
    return (now - (1 - alpha) - alpha * then).abs() / (now - 1).abs()
