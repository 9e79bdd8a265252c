"""Two latent cues, one more often right, one easier to read, and how far a rule leans on the easy one.

Public: `TwoFeatureTask`, `make_two_feature_task`, `linear_reliance`, `bayes_reliance`, `reliance`, `shortcut_bias`,
`relu_ntk`, `ntk_rule`; `FootprintSprites`, `make_footprint_sprites`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from scipy.special import ndtri
from torch import Tensor

from companion.checks import (
    as_tensor,
    check_binary,
    check_features,
    check_generator,
    check_in_range,
    check_positive_int,
    check_same_length,
)
from companion.data import make_sprites
from companion.geometry import random_orthonormal

__all__ = [
    "FootprintSprites",
    "TwoFeatureTask",
    "bayes_reliance",
    "linear_reliance",
    "make_footprint_sprites",
    "make_two_feature_task",
    "ntk_rule",
    "reliance",
    "relu_ntk",
    "shortcut_bias",
]

_LEAK = 0.2  # of the layers that hide a nested cue: small enough to bend, large enough to be undone


class TwoFeatureTask(NamedTuple):
    """Samples of the two-cue task, and the map from cues to inputs.

    `x` (n, dim) inputs, `y` (n,) labels 0 or 1, `z` (n, 2) the latent cues, shortcut first; `rho_s`, `rho_c` how often
    the sign of each cue alone is right; `embed(z) -> x` makes inputs of any cues.
    """

    x: Tensor
    y: Tensor
    z: Tensor
    rho_s: float
    rho_c: float
    embed: Callable[[Tensor], Tensor]


class _Reader:
    """One cue as an input block: a direction times the cue, then `nesting` fixed layers that can be undone."""

    def __init__(self, dim: int, nesting: int, scale: float, generator: torch.Generator | None):
        self.direction = random_orthonormal(dim, 1, generator=generator)[:, 0] if dim > 1 else torch.ones(1)
        # biases put the kinks at different values of the cue: a single kink at 0 would hide nothing
        self.layers = [
            (random_orthonormal(dim, dim, generator=generator), torch.randn(dim, generator=generator))
            for _ in range(nesting)
        ]
        self.scale = scale

    def __call__(self, z: Tensor) -> Tensor:
        h = z[:, None] * self.direction.to(z)  # (n, dim)
        for rotation, bias in self.layers:
            h = torch.nn.functional.leaky_relu(h @ rotation.to(h) + bias.to(h), _LEAK)
        return self.scale * h


def make_two_feature_task(
    n: int,
    rho_s: float = 0.85,
    rho_c: float = 0.90,
    alpha_s: float = 1.0,
    *,
    nesting_s: int = 0,
    nesting_c: int = 0,
    dim: int = 2,
    generator: torch.Generator | None = None,
) -> TwoFeatureTask:
    r"""Draw a task with two cues whose predictivity and availability are set independently.

    $$z_i = (2y - 1)\,\Phi^{-1}(\rho_i) + \varepsilon_i, \qquad x = \big(\alpha_s\, g_s(z_s),\; g_c(z_c)\big)$$

    The sign of $z_i$ is right with probability $\rho_i$ whatever $\alpha_s$ is: amplifying a cue makes it no more
    informative, only easier to read. $g_i$ is the identity along one direction; with a nesting of k it passes through k
    fixed invertible layers, which hides the cue without removing it.

    Args:
        n: samples; classes are balanced up to one.
        rho_s: how often the shortcut alone is right, above 0.5 and below 1.
        rho_c: how often the core cue alone is right.
        alpha_s: amplification of the shortcut.
        nesting_s: layers that hide the shortcut.
        nesting_c: layers that hide the core cue.
        dim: of the inputs, even; half for each cue. Nesting needs at least 4.
        generator: None means torch's default generator.

    Returns:
        `TwoFeatureTask(x, y, z, rho_s, rho_c, embed)`.

    Raises:
        ValueError: a setting out of range.

    >>> task = make_two_feature_task(40_000, rho_s=0.85, generator=torch.Generator().manual_seed(0))
    >>> right = ((task.z > 0) == task.y[:, None]).double().mean(0)
    >>> [round(share, 2) for share in right.tolist()]
    [0.85, 0.9]

    Paper: hermann2024foundations
    Chapter: shortcuts/shortcut-learning
    """
    n, generator = check_positive_int(n, "n", 2), check_generator(generator)
    shift = torch.tensor([_shift(rho_s, "rho_s"), _shift(rho_c, "rho_c")])
    check_in_range(alpha_s, "alpha_s", 0, inclusive="neither")
    nesting = [check_positive_int(v, name, 0) for v, name in ((nesting_s, "nesting_s"), (nesting_c, "nesting_c"))]
    if check_positive_int(dim, "dim", 2) % 2 or (max(nesting) and dim < 4):
        raise ValueError(f"expected an even dim, and at least 4 with nesting, got {dim}")
    readers = [_Reader(dim // 2, k, scale, generator) for k, scale in zip(nesting, (alpha_s, 1.0))]

    def embed(z: Tensor) -> Tensor:
        return torch.cat([reader(z[:, i]) for i, reader in enumerate(readers)], dim=1)

    y = torch.arange(n)[torch.randperm(n, generator=generator)] % 2
    z = (2 * y - 1)[:, None] * shift + torch.randn(n, 2, generator=generator)
    return TwoFeatureTask(embed(z), y, z, float(rho_s), float(rho_c), embed)


def _shift(rho: float, name: str) -> float:
    return float(ndtri(check_in_range(rho, name, 0.5, 1, inclusive="neither")))


def linear_reliance(w_s: float, w_c: float) -> float:
    r"""Return the reliance of a linear rule, $\mathrm{sign}(w_s z_s + w_c z_c)$, on the shortcut over the core cue.

    Over cues spread evenly on a square around the origin, with $r = w_s / w_c$ and both weights positive:

    $$R = \frac{r - 1}{2} \;\; (r \le 1), \qquad R = \frac{1 - 1/r}{2} \;\; (r \ge 1)$$

    Args:
        w_s: weight of the shortcut, at least 0.
        w_c: weight of the core cue, at least 0; not both 0.

    Returns:
        A number in [-1/2, 1/2]: -1/2 follows the core alone, 1/2 the shortcut alone.

    Raises:
        ValueError: a negative weight, or two zeros.

    >>> linear_reliance(1, 1), linear_reliance(1, 2), linear_reliance(1, 0)
    (0.0, -0.25, 0.5)

    Paper: hermann2024foundations
    Chapter: shortcuts/shortcut-learning
    """
    w_s, w_c = check_in_range(w_s, "w_s", 0), check_in_range(w_c, "w_c", 0)
    if w_s == w_c == 0:
        raise ValueError("expected a rule that uses a cue, got two zero weights")
    return (w_s - w_c) / (2 * max(w_s, w_c))


def bayes_reliance(rho_s: float, rho_c: float) -> float:
    r"""Return the reliance of the best possible rule, $\mathrm{sign}(\Phi^{-1}(\rho_s) z_s + \Phi^{-1}(\rho_c) z_c)$.

    It is what the data justify: below 0 when the core cue is the more predictive one, whatever the amplification.

    Args:
        rho_s: how often the shortcut alone is right, above 0.5 and below 1.
        rho_c: how often the core cue alone is right.

    Returns:
        `linear_reliance` of the two shifts.

    Raises:
        ValueError: a predictivity out of range.

    >>> round(bayes_reliance(0.85, 0.90), 4)
    -0.0956

    Paper: hermann2024foundations
    Chapter: shortcuts/shortcut-learning
    """
    return linear_reliance(_shift(rho_s, "rho_s"), _shift(rho_c, "rho_c"))


def reliance(
    rule: Callable[[Tensor], Any],
    embed: Callable[[Tensor], Tensor] | None = None,
    *,
    n_probe: int = 100,
    limit: float = 3,
) -> Tensor:
    r"""Measure which of two cues a rule sides with, on an even grid of cues.

    $$R = \Pr[\mathrm{sign} f = \mathrm{sign} z_s] - \Pr[\mathrm{sign} f = \mathrm{sign} z_c]$$

    over an even grid on $[-3, 3]^2$. Only the quarter planes in which the cues disagree contribute.

    Args:
        rule: maps inputs (k, dim) to scores (..., k) whose sign is the decision, or to logits (..., k, 2); several
            models at once give leading dimensions.
        embed: maps cues (k, 2), shortcut first, to inputs; None: the rule reads the cues themselves.
        n_probe: grid points per axis, even, so that none lies on an axis.
        limit: half the side of the square.

    Returns:
        float64 scalar in [-1/2, 1/2], or one number per model; `linear_reliance` is its closed form for linear rules.

    Raises:
        ValueError: a setting out of range, or outputs of another shape.

    >>> round(reliance(lambda z: z[:, 0] + 2 * z[:, 1]).item(), 3)  # closed form: -0.25
    -0.25

    Paper: hermann2024foundations
    Chapter: shortcuts/shortcut-learning
    """
    if check_positive_int(n_probe, "n_probe", 2) % 2:
        raise ValueError(f"expected an even n_probe, so that no point lies on an axis, got {n_probe}")
    limit = check_in_range(limit, "limit", 0, inclusive="neither")
    axis = ((torch.arange(n_probe) + 0.5) / n_probe * 2 - 1) * limit
    z = torch.cartesian_prod(axis, axis)  # (k, 2)
    with torch.no_grad():
        f = as_tensor(rule(z if embed is None else embed(z)), "the rule's output").cpu().double()
    if f.shape[-2:] == (len(z), 2):
        f = f[..., 1] - f[..., 0]
    if f.shape[-1:] != (len(z),):
        raise ValueError(f"expected scores (..., {len(z)}) or logits (..., {len(z)}, 2), got shape {tuple(f.shape)}")
    s, c = z.double().sign().T
    return (f.sign() * (s - c)).mean(-1) / 2


def shortcut_bias(rule: Callable[[Tensor], Any], task: TwoFeatureTask, *, n_probe: int = 100) -> Tensor:
    r"""Return how much more a rule relies on the shortcut than the best possible rule does.

    $$B = R(f) - R(f_\mathrm{Bayes})$$

    Without the subtraction a rule would be blamed for using a cue that deserves use.

    Args:
        rule: as in `reliance`, a function of the task's inputs.
        task: what the rule was fitted on.
        n_probe: as in `reliance`.

    Returns:
        float64 scalar, or one per model; 0 for the best possible rule.

    Raises:
        ValueError: outputs of another shape.

    >>> task = make_two_feature_task(10, alpha_s=10.0, generator=torch.Generator().manual_seed(0))
    >>> abs(shortcut_bias(lambda x: x @ torch.tensor([1.0364 / 10, 1.2816]), task).item()) < 0.001
    True
    >>> round(shortcut_bias(lambda x: x[:, 0], task).item(), 3)
    0.596

    Paper: hermann2024foundations
    Chapter: shortcuts/shortcut-learning
    """
    return reliance(rule, task.embed, n_probe=n_probe) - bayes_reliance(task.rho_s, task.rho_c)


def relu_ntk(x: Any, y: Any = None, depth: int = 1, *, bias: float = 0.0) -> Tensor:
    r"""Return the tangent kernel of an infinitely wide ReLU network with `depth` hidden layers.

    With $\Sigma_0 = \Theta_0 = x^\top x' + \beta^2$, $c_l$ the cosine that belongs to $\Sigma_l$, and

    $$\kappa_0(c) = 1 - \tfrac{\arccos c}{\pi}, \qquad
      \kappa_1(c) = \tfrac{1}{\pi}\big(\sqrt{1 - c^2} + c\,(\pi - \arccos c)\big),$$

    $$\Sigma_{l+1} = \sqrt{\Sigma_l(x,x)\,\Sigma_l(x',x')}\;\kappa_1(c_l) + \beta^2, \qquad
      \Theta_{l+1} = \Sigma_{l+1} + \Theta_l\,\kappa_0(c_l).$$

    Weights have variance $2/\mathrm{width}$ (the first layer 1). `depth=0` is the kernel of a linear model.

    Args:
        x: (n, d).
        y: (m, d); None takes x.
        depth: hidden layers, at least 0.
        bias: $\beta$, the scale of the biases.

    Returns:
        (n, m), in the dtype of x; computed in float64.

    Raises:
        ValueError: not features, different dimensions, a setting out of range.

    >>> relu_ntk([[1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]).round(decimals=4)  # 2, and 1/pi
    tensor([[2.0000, 0.3183]])

    Paper: hermann2024foundations
    Chapter: shortcuts/shortcut-learning
    """
    x = check_features(x, "x")
    y = x if y is None else check_features(y, "y", device=x.device)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"expected x and y of the same dimension, got {x.shape[1]} and {y.shape[1]}")
    depth, bias = check_positive_int(depth, "depth", 0), check_in_range(bias, "bias", 0) ** 2
    a, b = x.double(), y.double()
    sigma = a @ b.T + bias  # (n, m)
    norm_a, norm_b = a.square().sum(1) + bias, b.square().sum(1) + bias
    theta = sigma
    for _ in range(depth):
        scale = (norm_a[:, None] * norm_b).sqrt()
        c = (sigma / scale.clamp_min(torch.finfo(torch.float64).tiny)).clamp(-1, 1)
        angle = c.acos()
        sigma = scale * ((1 - c.square()).sqrt() + c * (math.pi - angle)) / math.pi + bias
        theta = sigma + theta * (1 - angle / math.pi)
        norm_a, norm_b = norm_a + bias, norm_b + bias
    return theta.to(x.dtype)


def ntk_rule(x: Any, y: Any, depth: int = 1, *, ridge: float = 1e-2, bias: float = 0.0) -> Callable[[Any], Tensor]:
    r"""Fit kernel ridge regression with `relu_ntk`: what an infinitely wide network learns, without training one.

    $$f(x') = \Theta(x', X)\,\big(\Theta(X, X) + \lambda \bar\Theta\, n I\big)^{-1} (2y - 1)$$

    Args:
        x: inputs (n, d).
        y: labels (n,) 0 or 1.
        depth: hidden layers; 0 is a linear model.
        ridge: $\lambda$, in units of the mean diagonal $\bar\Theta$. Infinite stands for a single gradient step:
            $f(x') = \Theta(x', X)(2y - 1) / n$.
        bias: as in `relu_ntk`.

    Returns:
        A function from inputs (k, d) to scores (k,), above 0 for class 1.

    Raises:
        ValueError: not features, labels other than 0 and 1, a ridge of at most 0.

    >>> rule = ntk_rule([[-1.0, 0.2], [1.0, 0.1]], [0, 1])
    >>> (rule([[-3.0, 0.0], [2.0, 0.0]]) > 0).tolist()
    [False, True]

    Paper: hermann2024foundations
    Chapter: shortcuts/shortcut-learning
    """
    x = check_features(x, "x", min_samples=2)
    y = check_binary(y, name="y").to(x.device)
    check_same_length(x=x, y=y)
    if not ridge > 0:
        raise ValueError(f"expected ridge above 0, got {ridge}")
    sign = 2 * y.double() - 1
    if math.isinf(ridge):
        weights = sign / len(x)
    else:
        gram = relu_ntk(x.double(), depth=depth, bias=bias)
        gram.diagonal().add_(ridge * gram.diagonal().mean() * len(x))
        weights = torch.cholesky_solve(sign[:, None], torch.linalg.cholesky(gram))[:, 0]

    def rule(points: Any) -> Tensor:
        points = check_features(points, "points", device=x.device)
        return (relu_ntk(points.double(), x.double(), depth, bias=bias) @ weights).to(points.dtype)

    return rule


class FootprintSprites(NamedTuple):
    """Pictures with a shape and a coloured patch.

    `images` (n, 3, 16, 16); `labels`, `core` (what the shape says) and `shortcut` (what the patch says), (n,) 0 or 1.
    """

    images: Tensor
    labels: Tensor
    core: Tensor
    shortcut: Tensor


_TINTS = torch.tensor([[1.0, 0.3, 0.3], [0.3, 1.0, 0.3]])


def make_footprint_sprites(
    n: int,
    footprint: int,
    rho_s: float = 0.85,
    rho_c: float = 0.95,
    *,
    conflict: bool = False,
    noise: float = 0.1,
    generator: torch.Generator | None = None,
) -> FootprintSprites:
    """Draw pictures whose shape is right more often than the colour of a patch, whatever the size of the patch.

    The core cue is a white disc (0) or cross (1); the shortcut is a square in the corner, red (0) or green (1), whose
    side is the footprint. Each is right with its own probability, independently of the other. The best rule always
    follows the shape, however large the patch is: where the two disagree, the shape is more often right.

    Args:
        n: pictures.
        footprint: side of the patch in pixels, 1 to 16; it covers what lies beneath.
        rho_s: how often the patch is right, above 0.5 and at most 1.
        rho_c: how often the shape is right.
        conflict: the shape is always right and the patch always wrong: a test of which one is followed.
        noise: standard deviation of the pixels' noise.
        generator: a cpu generator; None means torch's default one.

    Returns:
        `FootprintSprites(images, labels, core, shortcut)`.

    Raises:
        ValueError: a setting out of range.

    >>> test = make_footprint_sprites(50, footprint=4, conflict=True, generator=torch.Generator().manual_seed(0))
    >>> bool((test.core == test.labels).all()), bool((test.shortcut == test.labels).any())
    (True, False)

    Paper: hermann2024foundations
    Chapter: shortcuts/shortcut-learning
    """
    n, generator = check_positive_int(n, "n"), check_generator(generator)
    footprint = int(check_in_range(check_positive_int(footprint, "footprint"), "footprint", 1, 16))
    rho = [check_in_range(v, name, 0.5, 1) for v, name in ((rho_s, "rho_s"), (rho_c, "rho_c"))]
    labels = torch.randint(2, (n,), generator=generator)
    right = torch.rand(2, n, generator=generator) < torch.tensor(rho)[:, None]
    if conflict:
        right = torch.tensor([[False], [True]]).expand(2, n)
    shortcut, core = torch.where(right, labels, 1 - labels)
    sprites = make_sprites(
        n,
        shape=core,
        shapes=("disc", "cross"),
        colors=("white",),
        sizes=(0.26,),
        image_size=16,
        generator=generator,
    )
    images = sprites.images.clone()
    images[:, :, :footprint, :footprint] = _TINTS[shortcut][:, :, None, None]
    return FootprintSprites(images + noise * torch.randn(images.shape, generator=generator), labels, core, shortcut)
