"""Editing one answer of a network with one neuron, and the dimension that says how rarely it misfires.

Public: `separability_dimension`, `JetPack`, `response_to`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from companion.checks import as_tensor, check_features, check_in_range, check_positive_int

__all__ = ["JetPack", "response_to", "separability_dimension"]


def separability_dimension(x: Any, theta: float = 0.0, *, center: bool = True, chunk: int = 1024) -> float:
    r"""Measure how hard it is to tell one sample from the others with a plane: a dimension of the data.

    $n(\theta) = -1 - \log_2 P[\langle x - y, y \rangle \ge -\theta]$ over pairs of different samples. For points spread
    evenly in the unit ball of dimension d it equals d at $\theta = 0$: the x with $\langle x-y,y\rangle \ge 0$ as seen
    from y fill, seen from x, the ball with diameter $\|x\|$, so $P = E(\|x\|/2)^d = 2^{-d}/2$. A detector with
    tolerance $\theta$ around a random sample misfires on another one with probability $2^{-(n(\theta)+1)}$.

    Args:
        x: (n, d) features. Normalise them first when the detector does.
        theta: the detector's tolerance; the paper's $\delta$ is $-\theta$.
        center: subtract the mean first.
        chunk: rows handled at a time; memory is chunk times n numbers.

    Returns:
        The dimension; infinity when no pair comes that close, so that the probability is below what n samples can show.

    Raises:
        ValueError: fewer than two samples, NaN, or theta outside [0, 1].

    >>> separability_dimension([[1.0], [-1.0]])
    inf

    Paper: sutton2024stealth
    Chapter: dimensionality/subspace-training
    """
    x = check_features(x, min_samples=2)
    check_in_range(theta, "theta", 0, 1)
    n = x.shape[0]
    if center:
        x = x - x.mean(dim=0)
    bar = x.square().sum(dim=1) - theta  # <x, y> has to reach this
    hits = 0
    for rows in x.split(check_positive_int(chunk, "chunk")):
        hits += int((rows @ x.T >= bar).sum())
    # every sample meets its own detector; a pair with itself is no pair
    own = int((x.square().sum(dim=1) >= bar).sum())
    probability = max(hits - own, 0) / (n * (n - 1))
    return float("inf") if probability == 0 else -1.0 - float(torch.tensor(probability, dtype=torch.float64).log2())


class JetPack(nn.Module):
    r"""A block of single-purpose neurons: each answers to one chosen feature vector and adds one chosen response.

    With $\hat x = (x - \mu) / \|x - \mu\|$ the block computes

    $$x \mapsto x + \sum_i \frac{1}{\theta}\,\mathrm{relu}(\langle \hat x, \hat y_i \rangle - (1 - \theta))\, r_i$$

    so that at the trigger $y_i$ exactly $r_i$ is added and outside a cap of height $\theta$ nothing at all. No
    training; put it between the features and the head, or behind any named layer.

    Args:
        dim: number of features d.
        theta: tolerance, the height of the cap; larger generalises more and misfires more.
        center: $\mu$, the mean of ordinary features, (d,). Zero when left out: then a direction common to all
            features makes every detector fire.

    Raises:
        ValueError: theta outside (0, 1].

    >>> block = JetPack(3, theta=0.5)
    >>> block.add(torch.tensor([2.0, 0, 0]), torch.tensor([0.0, 5, 0]))
    0
    >>> block(torch.tensor([[2.0, 0, 0], [0, 2, 0]]))
    tensor([[2., 5., 0.],
            [0., 2., 0.]])

    Paper: sutton2024stealth
    Chapter: dimensionality/subspace-training
    """

    def __init__(self, dim: int, theta: float = 0.05, center: Any = None):
        super().__init__()
        self.dim = check_positive_int(dim, "dim")
        self.theta = check_in_range(theta, "theta", 0, 1, inclusive="high")
        center = torch.zeros(dim) if center is None else as_tensor(center, "center").detach().clone()
        if center.shape != (dim,):
            raise ValueError(f"expected center of shape ({dim},), got {tuple(center.shape)}")
        self.register_buffer("center", center)
        self.register_buffer("detectors", center.new_zeros(0, dim))
        self.register_buffer("responses", center.new_zeros(0, dim))

    def __len__(self) -> int:
        return self.detectors.shape[0]

    def normalize(self, x: Tensor) -> Tensor:
        """Return the direction of each feature vector as seen from the centre, (..., d)."""
        return nn.functional.normalize(x - self.center, dim=-1)

    @torch.no_grad()
    def add(self, trigger: Tensor, response: Tensor) -> int:
        """Add a neuron: at the features `trigger` the block adds `response`. Return its index.

        Raises:
            ValueError: a wrong shape, or a trigger at the centre, which has no direction.
        """
        for name, vector in (("trigger", trigger), ("response", response)):
            if vector.shape != (self.dim,) or not torch.isfinite(vector).all():
                raise ValueError(f"expected a finite {name} of shape ({self.dim},), got shape {tuple(vector.shape)}")
        direction = self.normalize(trigger.to(self.center))
        if not direction.any():
            raise ValueError("expected a trigger away from the centre, got the centre itself: it has no direction")
        self.detectors = torch.cat([self.detectors, direction[None]])
        self.responses = torch.cat([self.responses, response.to(self.center)[None]])
        return len(self) - 1

    def remove(self, index: int) -> None:
        """Take a neuron out; the ones behind it move up.

        Raises:
            IndexError: there is no such neuron.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"expected an index in 0..{len(self) - 1}, got {index}")
        keep = [i for i in range(len(self)) if i != index]
        self.detectors, self.responses = self.detectors[keep], self.responses[keep]

    def activation(self, x: Tensor) -> Tensor:
        """Return how strongly each neuron answers, (..., neurons): 1 at its trigger, 0 outside its cap."""
        cosine = self.normalize(x) @ self.detectors.T
        return torch.relu(cosine - (1 - self.theta)) / self.theta

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus the responses of the neurons that fire, (..., d)."""
        return x + self.activation(x) @ self.responses

    def misfire_rate(self, x: Tensor) -> Tensor:
        """Return, per neuron, the share of feature vectors (n, d) it answers to at all, (neurons,)."""
        return (self.activation(x) > 0).double().mean(dim=0)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        stored = state_dict.get(prefix + "detectors")
        if stored is not None and stored.ndim == 2 and stored.shape[1] == self.dim:
            # edits come and go, so the number of neurons is part of the state
            self.detectors = self.detectors.new_zeros(stored.shape)
            self.responses = self.responses.new_zeros(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@torch.no_grad()
def response_to(head: nn.Linear, features: Tensor, target: int, margin: float = 5.0) -> Tensor:
    r"""Return the shortest change of a feature vector after which a linear head prefers one class by a margin.

    With logits $z = W f + b$ the wanted logits are z with entry `target` raised to $\max z$ + margin; the change r
    solves $W r = z_{wanted} - z$ with least norm, $r = W^+ (z_{wanted} - z)$.

    Args:
        head: the last layer; its rows should be linearly independent (fewer classes than features).
        features: f, (h,).
        target: the class that is wanted.
        margin: by how much it should lead.

    Returns:
        r, (h,).

    >>> head = nn.Linear(4, 2)
    >>> f = torch.ones(4)
    >>> int(head(f + response_to(head, f, target=1)).argmax())
    1

    Paper: sutton2024stealth
    Chapter: dimensionality/subspace-training
    """
    logits = head(features)
    if not 0 <= target < logits.numel():
        raise ValueError(f"expected a class in 0..{logits.numel() - 1}, got {target}")
    change = torch.zeros_like(logits)
    change[target] = logits.max() + margin - logits[target]
    return torch.linalg.pinv(head.weight) @ change
