"""What a student takes from its teacher: probabilities, and the direction and length of features.

Public: `NDLoss`, `KDLoss`, `ProjectedStudent`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion.checks import check_features, check_in_range, check_positive_int

__all__ = ["KDLoss", "NDLoss", "ProjectedStudent"]


class NDLoss(nn.Module):
    r"""Ask a student's feature to point along the teacher's class mean, and to be as long as the teacher's.

    $$L = 1 - \frac{\langle s, e_y \rangle}{\max(\lVert s \rVert, \lVert t \rVert)}, \qquad
    e_c = \frac{\mu_c}{\lVert \mu_c \rVert}$$

    s is the student's feature, t the teacher's of the same sample, $\mu_c$ the teacher's class mean. While s is
    shorter than t, the gradient is $-e_y / \lVert t \rVert$: it turns s and lengthens it. Once s is longer, the loss
    is one minus a cosine, whose gradient is orthogonal to s: it only turns.

    Args:
        class_means: mu, (C, d), rows that are not zero: `companion.geometry.class_means` of the teacher in eval mode.

    Raises:
        ValueError: not a matrix, a row of zeros or NaN (a class without samples).

    >>> loss = NDLoss([[2.0, 0.0], [0.0, 1.0]])
    >>> s, t = torch.tensor([[3.0, 0.0]]), torch.tensor([[4.0, 0.0]])
    >>> loss(s, t, torch.tensor([0])).item(), loss(2 * s, t, torch.tensor([0])).item()
    (0.25, 0.0)

    Paper: wang2024improving
    Chapter: collapse/fixed-classifiers
    """

    def __init__(self, class_means: Any) -> None:
        super().__init__()
        means = check_features(class_means, "class_means").detach()
        norms = torch.linalg.vector_norm(means, dim=1, keepdim=True)
        if (norms == 0).any():
            raise ValueError("expected class means with a direction, got a row of zeros")
        self.register_buffer("directions", means / norms)

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of features (n, d) of student and teacher, and labels (n,)."""
        if student.shape != teacher.shape or student.shape[-1:] != self.directions.shape[-1:]:
            raise ValueError(
                f"expected features of shape (n, {self.directions.shape[1]}) of both, got {tuple(student.shape)} and "
                f"{tuple(teacher.shape)}: project the student's, as ProjectedStudent does"
            )
        along = (student * self.directions[labels].to(student.dtype)).sum(-1)
        longer = torch.maximum(torch.linalg.vector_norm(student, dim=-1), torch.linalg.vector_norm(teacher, dim=-1))
        return (1 - along / longer.clamp_min(torch.finfo(along.dtype).tiny)).mean()


class KDLoss(nn.Module):
    r"""The classic distillation loss: match the teacher's softened probabilities.

    $$L = T^2\;\mathrm{KL}\big(\mathrm{softmax}(z_t / T)\,\big\Vert\,\mathrm{softmax}(z_s / T)\big)$$

    $T^2$ keeps the size of the gradient as T grows.

    Args:
        temperature: T, above 0.

    Raises:
        ValueError: a temperature of at most 0.

    >>> z = torch.tensor([[1.0, 2.0, 3.0]])
    >>> KDLoss()(z, z + 5).abs().item() < 1e-5
    True

    Paper: wang2024improving
    Chapter: collapse/fixed-classifiers
    """

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        self.temperature = check_in_range(temperature, "temperature", 0, inclusive="neither")

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean loss of logits (n, C) of student and teacher."""
        s, t = ((z / self.temperature).log_softmax(-1) for z in (student, teacher))
        return self.temperature**2 * (t.exp() * (t - s)).sum(-1).mean()


class ProjectedStudent(nn.Module):
    r"""A one-hidden-layer student whose features are projected linearly to the teacher's width.

    $s = P\,\mathrm{relu}(W x + b) + p$, and the logits are linear in s. Where widths differ, a projector is what makes
    features comparable; as it is linear, head and projector can be folded into one layer after training.

    Args:
        n_inputs: dimension of x.
        width: of the hidden layer.
        dim: d, the teacher's feature dimension.
        n_classes: C.

    Raises:
        ValueError: a size below one.

    >>> student = ProjectedStudent(64, 16, 128, 10)
    >>> features, logits = student(torch.zeros(5, 64))
    >>> features.shape, logits.shape
    (torch.Size([5, 128]), torch.Size([5, 10]))

    Paper: wang2024improving
    Chapter: collapse/fixed-classifiers
    """

    def __init__(self, n_inputs: int, width: int, dim: int, n_classes: int) -> None:
        super().__init__()
        sizes = {"n_inputs": n_inputs, "width": width, "dim": dim, "n_classes": n_classes}
        n_inputs, width, dim, n_classes = (check_positive_int(size, name) for name, size in sizes.items())
        self.hidden = nn.Linear(n_inputs, width)
        self.projector = nn.Linear(width, dim)
        self.head = nn.Linear(dim, n_classes)

    def features(self, x: Tensor) -> Tensor:
        """Return the projected features (n, d)."""
        return self.projector(F.relu(self.hidden(x.flatten(1))))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (n, d) and logits (n, C)."""
        features = self.features(x)
        return features, self.head(features)
