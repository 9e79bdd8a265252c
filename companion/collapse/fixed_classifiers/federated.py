"""One frozen head for many clients: a sparse simplex, and class norms that adapt it to the tail and to each client.

Public: `sparse_etf`, `dirichlet_partition`, `fedavg`, `realign_norms`, `FedLoGe`.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from companion.checks import (
    as_tensor,
    check_features,
    check_generator,
    check_in_range,
    check_labels,
    check_positive_int,
)
from companion.collapse.fixed_classifiers.basis import EBVHead
from companion.geometry import simplex_etf

__all__ = ["FedLoGe", "dirichlet_partition", "fedavg", "realign_norms", "sparse_etf"]


@torch.enable_grad()
def sparse_etf(
    n_classes: int,
    dim: int,
    sparsity: float = 0.6,
    steps: int = 500,
    *,
    generator: torch.Generator | int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Return class vectors that are nearly a simplex although most of their entries are zero.

    A simplex is turned at random, a share of its entries is set to zero at random, and the others are optimised on
    unit rows so that the angle to the closest other class, averaged over classes, is as large as possible:
    $\frac1C \sum_c \max_{c' \ne c} \cos(v_c, v_{c'})$ is minimised by Adam. Exact equal angles are lost; compare
    `coherence(v, signed=True)` with the simplex's $-1/(C-1)$. Every class reads only a few features.

    Args:
        n_classes: C, at least 2.
        dim: d, at least C - 1.
        sparsity: share of zeros in every row, in [0, 1); at least one entry stays.
        steps: of the optimiser.
        generator: draws rotation and zeros; a seed will do, None uses torch's default generator.
        dtype: of the result; None takes torch's default.

    Returns:
        Unit rows (C, d).

    Raises:
        ValueError: sizes that do not fit, a sparsity outside [0, 1).

    >>> v = sparse_etf(4, 16, sparsity=0.5, generator=torch.Generator().manual_seed(0))
    >>> (v == 0).sum(1).tolist(), bool((v @ v.T - 4 / 3 * torch.eye(4) < -0.3).all())
    ([8, 8, 8, 8], True)

    Paper: xiao2024fedloge
    Chapter: collapse/fixed-classifiers
    """
    check_in_range(sparsity, "sparsity", 0, 1, inclusive="low")
    check_positive_int(steps, "steps")
    generator = check_generator(generator)
    where = "cpu" if generator is None else generator.device
    rotation = torch.Generator(where).manual_seed(int(torch.randint(2**31, (), generator=generator, device=where)))
    start = simplex_etf(n_classes, dim, generator=rotation, device=where)
    n_zero = min(round(sparsity * dim), dim - 1)
    if n_zero == 0:
        return start.to(dtype or torch.get_default_dtype())
    keep = torch.ones_like(start)
    keep.scatter_(1, torch.rand(start.shape, generator=generator, device=where).argsort(1)[:, :n_zero], 0.0)
    raw = (start * keep + 1e-3 * keep).requires_grad_()
    others = torch.eye(n_classes, device=where) * 3  # more than any cosine
    optimizer = torch.optim.Adam([raw], lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        v = F.normalize(raw * keep, dim=1)
        closest = (v @ v.T - others).amax(1)
        optimizer.zero_grad()
        closest.mean().backward()
        optimizer.step()
        schedule.step()
    return F.normalize(raw.detach() * keep, dim=1).to(dtype or torch.get_default_dtype())


def dirichlet_partition(
    labels: Any,
    n_clients: int,
    alpha: float = 0.5,
    min_samples: int = 1,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Split samples over clients so that each has classes of its own: every class is shared out by Dir(alpha).

    Args:
        labels: (n,).
        n_clients: how many.
        alpha: small makes clients differ, large makes them alike.
        min_samples: draw again (up to 100 times) until every client has this many.
        generator: a cpu generator; None means torch's default one.

    Returns:
        One index tensor per client; together they hold every sample once.

    Raises:
        ValueError: more clients than samples, an alpha of at most 0, or no draw that gives everyone enough.

    >>> parts = dirichlet_partition([0, 1] * 50, 4, generator=torch.Generator().manual_seed(0))
    >>> sorted(torch.cat(parts).tolist()) == list(range(100))
    True

    Paper: xiao2024fedloge
    Chapter: collapse/fixed-classifiers
    """
    labels, generator = check_labels(labels).cpu(), check_generator(generator)
    check_positive_int(n_clients, "n_clients")
    check_positive_int(min_samples, "min_samples")
    alpha = check_in_range(alpha, "alpha", 0, inclusive="neither")
    if n_clients * min_samples > len(labels):
        raise ValueError(f"expected at least {n_clients * min_samples} samples, got {len(labels)}")
    concentration = torch.full((n_clients,), alpha, dtype=torch.float64)
    for _ in range(100):
        parts: list[list[Tensor]] = [[] for _ in range(n_clients)]
        for c in labels.unique():
            members = (labels == c).nonzero().flatten()
            members = members[torch.randperm(len(members), generator=generator)]
            # a Dirichlet vector: gamma variables over their sum; torch's own sampler takes no generator
            share = torch._standard_gamma(concentration, generator=generator)
            share = (share + 1e-300) / (share + 1e-300).sum()
            cuts = (share.cumsum(0) * len(members)).round().long()[:-1]
            for part, piece in zip(parts, torch.tensor_split(members, cuts.tolist())):
                part.append(piece)
        joined = [torch.cat(part) for part in parts]
        if min(len(part) for part in joined) >= min_samples:
            return joined
    raise ValueError(f"found no split that gives each of {n_clients} clients {min_samples} samples: raise alpha")


def fedavg(states: Sequence[Mapping[str, Tensor]], weights: Any) -> dict[str, Tensor]:
    r"""Average the parameters of clients, $\sum_i \frac{n_i}{\sum_j n_j}\,\theta_i$.

    Args:
        states: one state dict per client, with the same names and shapes.
        weights: n, how many samples each client has.

    Returns:
        The averaged state dict; whole numbers are taken from the first client.

    Raises:
        ValueError: no clients, different names, weights that do not fit or sum to zero.

    >>> fedavg([{"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}], [3, 1])
    {'w': tensor([1.])}

    Paper: xiao2024fedloge
    Chapter: collapse/fixed-classifiers
    """
    states = list(states)
    weights = as_tensor(weights, "weights").to(torch.float64).flatten()
    if not states or len(weights) != len(states):
        raise ValueError(f"expected one weight per client, got {len(states)} clients and {len(weights)} weights")
    if any(state.keys() != states[0].keys() for state in states[1:]):
        raise ValueError("expected state dicts with the same names, got different ones")
    if (weights < 0).any() or not weights.sum() > 0:
        raise ValueError(f"expected weights of at least 0 that do not all vanish, got {weights.tolist()}")
    share = (weights / weights.sum()).tolist()
    return {
        name: sum(part * state[name] for part, state in zip(share, states)) if value.is_floating_point() else value
        for name, value in states[0].items()
    }


def realign_norms(weight: Any, auxiliary: Any, kind: str = "global") -> Tensor:
    r"""Rescale the class vectors of a head by the norms of another head's.

    "global" divides, $w_c / \lVert u_c \rVert$: a head trained on a long tail gives frequent classes long vectors, so
    the tail gains. "local" multiplies, $w_c \lVert u_c \rVert$: with a client's own head as u, the classes this
    client has seen gain.

    Args:
        weight: w, (C, d), or scores (n, C) transposed: rows are classes.
        auxiliary: u, (C, d'), rows that are not zero.
        kind: "global" or "local".

    Returns:
        (C, d).

    Raises:
        ValueError: different numbers of classes, an unknown kind, a row of zeros.

    >>> realign_norms(torch.eye(2), [[4.0, 0.0], [0.0, 0.5]])
    tensor([[0.2500, 0.0000],
            [0.0000, 2.0000]])

    Paper: xiao2024fedloge
    Chapter: collapse/fixed-classifiers
    """
    weight, auxiliary = check_features(weight, "weight"), check_features(auxiliary, "auxiliary")
    if len(weight) != len(auxiliary):
        raise ValueError(f"expected heads of the same number of classes, got {len(weight)} and {len(auxiliary)}")
    norms = torch.linalg.vector_norm(auxiliary, dim=1, keepdim=True).to(weight)
    if (norms == 0).any():
        raise ValueError("expected class vectors with a length, got a row of zeros")
    if kind == "global":
        return weight / norms
    if kind == "local":
        return weight * norms
    raise ValueError(f"expected kind 'global' or 'local', got {kind!r}")


class _Scaled(nn.Module):
    """Cosine logits with class scores of different sizes: scale * <h / |h|, w_c>."""

    def __init__(self, backbone: nn.Module, weight: Tensor, scale: float) -> None:
        super().__init__()
        self.backbone, self.scale = backbone, scale
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.normalize(self.backbone(x), dim=-1) @ self.weight.T


class FedLoGe(BaseEstimator):
    r"""Federated training of one backbone against one frozen head, with a head of its own for every client.

    In every round each client copies the backbone and the auxiliary head, trains for `local_epochs`, and sends both
    back to be averaged (`fedavg`). On a batch with features h = backbone(x):

    - the backbone follows the cross-entropy of cosine logits $\rho\,\langle h / \lVert h \rVert, v_c \rangle$ against
      the frozen
      `sparse_etf` v, which is the same on all clients;
    - an auxiliary linear head, shared by averaging, and a local linear head, which stays on its client, follow their
      own
      cross-entropy on h, detached: they learn which classes are common, and shape nothing.

    Afterwards the norms of the auxiliary head's class vectors realign the frozen head for the tail, and those of a
    local head realign it for its client (`realign_norms`).

    Args:
        make_backbone: `make_backbone() -> nn.Module`, giving features (n, dim); called under `random_state`.
        n_classes: C.
        dim: d of the features.
        head: "sparse_etf", "etf" or "random" for a frozen head; "cosine" for one of the same form that is learned and
            averaged, the control.
        sparsity: of the sparse head.
        rounds: of communication.
        local_epochs: passes over a client's data per round.
        batch_size: of the clients.
        lr: of stochastic gradient descent with momentum 0.9.
        scale: rho.
        random_state: seed or generator for initial weights, head and order of batches.

    Attributes:
        backbone_: the averaged backbone, in eval mode.
        weight_: (C, d) unit class vectors.
        auxiliary_: (C, d) of the auxiliary head.
        local_: (clients, C, d) of the local heads.

    >>> g = torch.Generator().manual_seed(0)
    >>> x = torch.randn(80, 4, generator=g)
    >>> clients = [(x[:40], (x[:40, 0] > 0).long()), (x[40:], (x[40:, 0] > 0).long())]
    >>> fed = FedLoGe(lambda: nn.Linear(4, 4), n_classes=2, dim=4, rounds=5, lr=0.1, random_state=0).fit(clients)
    >>> bool((fed.global_model()(x).argmax(1) == (x[:, 0] > 0)).float().mean() > 0.8)
    True

    Paper: xiao2024fedloge
    Chapter: collapse/fixed-classifiers
    """

    def __init__(
        self,
        make_backbone: Callable[[], nn.Module],
        n_classes: int,
        dim: int,
        head: str = "sparse_etf",
        sparsity: float = 0.6,
        rounds: int = 25,
        local_epochs: int = 1,
        batch_size: int = 16,
        lr: float = 0.03,
        scale: float = 8.0,
        random_state: int | torch.Generator | None = None,
    ) -> None:
        self.make_backbone = make_backbone
        self.n_classes = n_classes
        self.dim = dim
        self.head = head
        self.sparsity = sparsity
        self.rounds = rounds
        self.local_epochs = local_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.scale = scale
        self.random_state = random_state

    def _fixed_head(self, generator: torch.Generator | None) -> Tensor:
        if self.head == "sparse_etf":
            return sparse_etf(self.n_classes, self.dim, self.sparsity, generator=generator)
        if self.head == "etf":
            return simplex_etf(self.n_classes, self.dim, generator=generator or torch.default_generator)
        if self.head in ("random", "cosine"):
            return F.normalize(torch.randn(self.n_classes, self.dim, generator=generator), dim=1)
        raise ValueError(f"expected head 'sparse_etf', 'etf', 'random' or 'cosine', got {self.head!r}")

    @torch.enable_grad()
    def fit(self, clients: Sequence[tuple[Any, Any]], y: None = None) -> "FedLoGe":
        """Train on the data of all clients.

        Args:
            clients: one (x, labels) per client.
            y: ignored, as in every scikit-learn estimator without targets of its own.

        Returns:
            The fitted estimator.

        Raises:
            ValueError: no clients, shapes that do not match, labels outside 0..C-1, an unknown head.
        """
        n_classes = check_positive_int(self.n_classes, "n_classes", minimum=2)
        check_positive_int(self.rounds, "rounds")
        check_positive_int(self.local_epochs, "local_epochs")
        check_positive_int(self.batch_size, "batch_size")
        check_in_range(self.lr, "lr", 0)
        data = [(as_tensor(x, "x").float(), check_labels(labels, len(x), n_classes)) for x, labels in clients]
        if not data:
            raise ValueError("expected at least one client, got none")
        generator = check_generator(self.random_state)
        if generator is None:
            generator = torch.Generator().manual_seed(torch.initial_seed() & 0x7FFFFFFF)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            weight = self._fixed_head(generator)
            model = nn.ModuleDict(
                {
                    "backbone": self.make_backbone(),
                    "head": EBVHead(weight, 1 / self.scale, trainable=self.head == "cosine"),
                    "auxiliary": nn.Linear(self.dim, n_classes, bias=False),
                }
            )
            local = [nn.Linear(self.dim, n_classes, bias=False) for _ in data]
        device = data[0][0].device  # drawn on the CPU, so that every device starts from the same
        model, local = model.to(device), [own.to(device) for own in local]
        sizes = [len(labels) for _, labels in data]
        for _ in range(self.rounds):
            states = []
            for (x, labels), own in zip(data, local):
                client = copy.deepcopy(model)
                self._train_client(client, own, x, labels, generator)
                states.append(client.state_dict())
            model.load_state_dict(fedavg(states, sizes))
        self.backbone_ = model["backbone"].eval().requires_grad_(False)
        self.weight_ = F.normalize(model["head"].basis.detach(), dim=1)
        self.auxiliary_ = model["auxiliary"].weight.detach()
        self.local_ = torch.stack([own.weight.detach() for own in local])
        return self

    def _train_client(
        self, model: nn.ModuleDict, own: nn.Linear, x: Tensor, labels: Tensor, generator: torch.Generator
    ) -> None:
        parameters = [p for p in (*model.parameters(), *own.parameters()) if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=self.lr, momentum=0.9)
        for _ in range(self.local_epochs):
            for rows in torch.randperm(len(x), generator=generator).split(self.batch_size):
                features, y = model["backbone"](x[rows]), labels[rows]
                # the two linear heads read detached features, so that one sum trains all three on their own
                detached = features.detach()
                loss = F.cross_entropy(model["head"](features), y)
                loss = loss + F.cross_entropy(model["auxiliary"](detached), y) + F.cross_entropy(own(detached), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    def global_model(self, realigned: bool = True) -> nn.Module:
        """Return the model for everybody; realigned for the tail by the norms of the auxiliary head.

        Raises:
            NotFittedError: `fit` has not been called.
        """
        check_is_fitted(self)
        weight = realign_norms(self.weight_, self.auxiliary_) if realigned else self.weight_
        return _Scaled(self.backbone_, weight, self.scale).eval()

    def local_model(self, client: int, realigned: bool = True) -> nn.Module:
        """Return the model of one client: the frozen head realigned by the norms of the local head, or the local head.

        Args:
            client: its index.
            realigned: False gives the local linear head as it was trained.

        Raises:
            NotFittedError: `fit` has not been called.
            ValueError: no such client.
        """
        check_is_fitted(self)
        if not 0 <= client < len(self.local_):
            raise ValueError(f"expected a client in 0..{len(self.local_) - 1}, got {client}")
        if realigned:
            return _Scaled(self.backbone_, realign_norms(self.weight_, self.local_[client], "local"), self.scale).eval()
        head = nn.Linear(self.dim, self.n_classes, bias=False)
        head.weight = nn.Parameter(self.local_[client].clone(), requires_grad=False)
        return nn.Sequential(self.backbone_, head).eval()
