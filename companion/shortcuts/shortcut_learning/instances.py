"""Bags of instances, attention that looks only at the obvious ones, and training that hides those.

Public: `Bags`, `make_bags`, `GatedAttentionMIL`, `mask_instances`, `MHIM`.
"""

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion.checks import as_tensor, check_generator, check_in_range, check_positive_int

__all__ = ["MHIM", "Bags", "GatedAttentionMIL", "make_bags", "mask_instances"]

STRATEGIES = ("high", "low-high", "random")


class Bags(NamedTuple):
    """Bags with one label each.

    `x` (n, size, dim); `y` (n,) 0 or 1; `kind` (n, size): 0 normal, 1 subtle, 2 obvious.
    """

    x: Tensor
    y: Tensor
    kind: Tensor


def make_bags(
    n: int,
    size: int = 60,
    dim: int = 16,
    *,
    easy: int = 2,
    hard: int = 2,
    easy_shift: float = 4.0,
    hard_shift: float = 2.0,
    noise: float = 0.5,
    generator: torch.Generator | None = None,
) -> Bags:
    """Draw bags whose positives contain a few obvious and a few subtle instances, in two different directions.

    Normal instances are noise around 0. Obvious ones are shifted along the first axis, subtle ones less far along the
    second. Test with `easy=0` whether a model knows the subtle ones.

    Args:
        n: bags; classes are balanced up to one.
        size: instances per bag.
        dim: of an instance, at least 2.
        easy: obvious instances per positive bag.
        hard: subtle instances per positive bag.
        easy_shift: how far the obvious ones lie off.
        hard_shift: how far the subtle ones lie off.
        noise: standard deviation of every coordinate.
        generator: a cpu generator; None means torch's default one.

    Returns:
        `Bags(x, y, kind)`.

    Raises:
        ValueError: a setting out of range, or more positive instances than a bag has.

    >>> bags = make_bags(4, size=10, generator=torch.Generator().manual_seed(0))
    >>> bags.x.shape, (bags.kind > 0).sum(1).tolist() == (4 * bags.y).tolist()
    (torch.Size([4, 10, 16]), True)

    Paper: tang2023multiple
    Chapter: shortcuts/shortcut-learning
    """
    n, size, dim = check_positive_int(n, "n"), check_positive_int(size, "size"), check_positive_int(dim, "dim", 2)
    easy, hard = check_positive_int(easy, "easy", 0), check_positive_int(hard, "hard", 0)
    if easy + hard > size:
        raise ValueError(f"expected at most size={size} positive instances, got {easy} + {hard}")
    generator, noise = check_generator(generator), check_in_range(noise, "noise", 0)
    y = torch.arange(n)[torch.randperm(n, generator=generator)] % 2
    order = torch.rand(n, size, generator=generator).argsort(1)
    kind = torch.where(order < easy, 2, torch.where(order < easy + hard, 1, 0)) * y[:, None]
    x = noise * torch.randn(n, size, dim, generator=generator)
    x[..., 0] += easy_shift * (kind == 2)
    x[..., 1] += hard_shift * (kind == 1)
    return Bags(x, y, kind)


class GatedAttentionMIL(nn.Module):
    r"""Classify a bag by a weighted mean of its instances, with weights that a gated network chooses.

    $$a_i = \mathrm{softmax}_i\; w^\top\big(\tanh(V h_i) \odot \sigma(U h_i)\big), \qquad
      z = C \sum_i a_i h_i, \qquad h_i = \mathrm{relu}(E x_i)$$

    Any bag size and any order of instances; `mask` leaves instances out, be they padding or hidden on purpose.

    Args:
        dim: of an instance.
        hidden: of its embedding and of the gate.
        n_classes: outputs.
        seed: of the initial weights; None draws them from torch's default generator.

    Raises:
        ValueError: a size below one.

    >>> model, bag = GatedAttentionMIL(16, seed=0), torch.randn(2, 5, 16)
    >>> model(bag).shape, torch.allclose(model(bag), model(bag.flip(1)), atol=1e-6)
    (torch.Size([2, 2]), True)
    >>> model.attention(bag).sum(1).round(decimals=4).tolist()
    [1.0, 1.0]

    Paper: tang2023multiple
    Chapter: shortcuts/shortcut-learning
    """

    def __init__(self, dim: int, hidden: int = 32, n_classes: int = 2, seed: int | None = None):
        super().__init__()
        for value, name in ((dim, "dim"), (hidden, "hidden"), (n_classes, "n_classes")):
            check_positive_int(value, name)
        with torch.random.fork_rng(devices=[]):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            self.embed = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU())
            self.value, self.gate = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
            self.score = nn.Linear(hidden, 1)
            self.head = nn.Linear(hidden, n_classes)

    def pool(self, bags: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return bag embeddings (n, hidden) and attention (n, size), which is 0 where `mask` is False.

        Args:
            bags: (n, size, dim).
            mask: (n, size) bool, True for instances that take part; None: all of them.

        Raises:
            ValueError: another shape, or a bag of which nothing is left.
        """
        if bags.dim() != 3:
            raise ValueError(f"expected bags (n, size, dim), got shape {tuple(bags.shape)}")
        h = self.embed(bags)
        scores = self.score(torch.tanh(self.value(h)) * torch.sigmoid(self.gate(h))).squeeze(-1)
        if mask is not None:
            if mask.shape != scores.shape or not mask.any(1).all():
                raise ValueError(
                    f"expected a mask {tuple(scores.shape)} that leaves an instance in every bag, "
                    f"got shape {tuple(mask.shape)}"
                )
            scores = scores.masked_fill(~mask, -torch.inf)
        attention = scores.softmax(1)
        return (attention[:, :, None] * h).sum(1), attention

    def attention(self, bags: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the attention of every instance: (n, size), rows summing to one."""
        return self.pool(bags, mask)[1]

    def forward(self, bags: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return one row of logits per bag: (n, n_classes)."""
        return self.head(self.pool(bags, mask)[0])


def mask_instances(
    attention: Any,
    ratio: float,
    strategy: str = "high",
    *,
    rate: float = 1.0,
    low_ratio: float = 0.2,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Decide which instances a student may see: the ones its teacher looks at most are hidden.

    Args:
        attention: (n, size), of the teacher.
        ratio: share of a bag's instances that are candidates for hiding, at least 0 and below 1; rounded up.
        strategy: "high" hides the most attended; "low-high" the least attended `low_ratio` as well, which is cheaper
            and removes noise; "random" any, the control.
        rate: probability with which each candidate is hidden, so that no instance is lost for good.
        low_ratio: for "low-high".
        mask: (n, size) bool, False for padding, which never counts and stays hidden; None: no padding.
        generator: a cpu generator; None means torch's default one.

    Returns:
        (n, size) bool, True for what the student sees; at least one instance of each bag.

    Raises:
        ValueError: a setting out of range, an unknown strategy, another shape.

    >>> mask_instances([[0.7, 0.1, 0.15, 0.05]], ratio=0.5)
    tensor([[False,  True, False,  True]])

    Paper: tang2023multiple
    Chapter: shortcuts/shortcut-learning
    """
    attention = as_tensor(attention, "attention").detach()
    if attention.dim() != 2:
        raise ValueError(f"expected attention (n, size), got shape {tuple(attention.shape)}")
    if strategy not in STRATEGIES:
        raise ValueError(f"expected strategy among {STRATEGIES}, got {strategy!r}")
    ratio, rate = check_in_range(ratio, "ratio", 0, 1, inclusive="low"), check_in_range(rate, "rate", 0, 1)
    low_ratio = check_in_range(low_ratio, "low_ratio", 0, 1, inclusive="low")
    generator = check_generator(generator)
    real = torch.ones_like(attention, dtype=torch.bool) if mask is None else mask
    size = real.sum(1, keepdim=True)  # (n, 1)

    def uniform() -> Tensor:
        return torch.rand(attention.shape, generator=generator).to(attention.device)

    def top(scores: Tensor, share: float) -> Tensor:
        rank = scores.masked_fill(~real, -torch.inf).argsort(1, descending=True).argsort(1)
        return rank < torch.ceil(share * size)

    candidates = top(uniform() if strategy == "random" else attention.double(), ratio)
    hidden = candidates & (uniform() < rate)
    if strategy == "low-high":
        hidden = hidden | top(-attention.double(), low_ratio)
    visible = real & ~hidden
    least = (attention.double().masked_fill(~real, torch.inf)).argmin(1, keepdim=True)
    return visible.scatter(1, least, visible.gather(1, least) | ~visible.any(1, keepdim=True))


class MHIM(nn.Module):
    r"""Train an attention model on what its own slow average does not look at yet (masked hard instance mining).

    A teacher, the exponential moving average of the student, attends to the whole bag; the instances it attends to most
    are hidden; the student has to decide from the rest, and to stay close to the teacher's embedding of the whole bag:

    $$\ell = \mathrm{CE}(z_\mathrm{student}, y)
      - \gamma \sum_j \mathrm{softmax}(e_\mathrm{teacher}/\tau)_j \log\mathrm{softmax}(e_\mathrm{student})_j, \qquad
      \theta_\mathrm{teacher} \leftarrow m\,\theta_\mathrm{teacher} + (1 - m)\,\theta_\mathrm{student}$$

    Call `loss`, step your optimizer on `student`, then call `update`. Predict with `forward`, which hides nothing.

    Args:
        base: the student: a module with `pool(bags, mask) -> (embedding, attention)` and `head`, trained in place.
        momentum: m, of the teacher.
        mask_ratio: share of a bag's instances that are candidates for hiding.
        rate: as in `mask_instances`.
        strategy: as in `mask_instances`.
        consistency: $\gamma$.
        temperature: $\tau$, of the teacher.
        warm_up: updates before anything is hidden: a teacher that knows nothing hides at random.

    Raises:
        ValueError: a setting out of range.

    >>> mhim, bags = MHIM(GatedAttentionMIL(16, seed=0)), make_bags(8, generator=torch.Generator().manual_seed(0))
    >>> mhim.loss(bags.x, bags.y).backward()
    >>> mhim.update()
    >>> mhim(bags.x).shape, any(p.requires_grad for p in mhim.teacher.parameters())
    (torch.Size([8, 2]), False)

    Paper: tang2023multiple
    Chapter: shortcuts/shortcut-learning
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        momentum: float = 0.999,
        mask_ratio: float = 0.05,
        rate: float = 0.7,
        strategy: str = "high",
        consistency: float = 0.1,
        temperature: float = 0.1,
        warm_up: int = 0,
    ):
        super().__init__()
        if strategy not in STRATEGIES:
            raise ValueError(f"expected strategy among {STRATEGIES}, got {strategy!r}")
        self.student = base
        self.teacher = copy.deepcopy(base).requires_grad_(False)
        self.momentum = check_in_range(momentum, "momentum", 0, 1, inclusive="low")
        self.mask_ratio = check_in_range(mask_ratio, "mask_ratio", 0, 1, inclusive="low")
        self.rate, self.strategy = check_in_range(rate, "rate", 0, 1), strategy
        self.consistency = check_in_range(consistency, "consistency", 0)
        self.temperature = check_in_range(temperature, "temperature", 0, inclusive="neither")
        self.warm_up = check_positive_int(warm_up, "warm_up", 0)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def loss(
        self, bags: Tensor, y: Tensor, mask: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the student's loss on bags of which the teacher has hidden the most attended instances.

        Args:
            bags: (n, size, dim).
            y: (n,) classes.
            mask: (n, size) bool, False for padding.
            generator: a cpu generator for the hiding; None means torch's default one.
        """
        with torch.no_grad():
            wanted, attention = self.teacher.pool(bags, mask)
        visible = mask
        if self.updates >= self.warm_up and self.mask_ratio > 0:
            visible = mask_instances(
                attention, self.mask_ratio, self.strategy, rate=self.rate, mask=mask, generator=generator
            )
        embedding, _ = self.student.pool(bags, visible)
        loss = F.cross_entropy(self.student.head(embedding), y)
        if self.consistency:
            target = (wanted / self.temperature).softmax(1)
            loss = loss - self.consistency * (target * embedding.log_softmax(1)).sum(1).mean()
        return loss

    @torch.no_grad()
    def update(self) -> None:
        """Move the teacher a little towards the student; call it after each step of the optimizer."""
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters()):
            slow.lerp_(fast, 1 - self.momentum)
        for slow, fast in zip(self.teacher.buffers(), self.student.buffers()):
            slow.copy_(fast)
        self.updates += 1

    def forward(self, bags: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the student's logits on whole bags: (n, n_classes)."""
        return self.student(bags, mask)

    def extra_repr(self) -> str:
        """Return the settings for `repr`."""
        return f"momentum={self.momentum}, mask_ratio={self.mask_ratio}, strategy={self.strategy!r}"
