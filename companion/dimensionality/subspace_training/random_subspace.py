"""Training in a random subspace: how few directions does a task need?

Public: `RandomSubspace`, `StructureAwareSubspace`, `fastfood`, `FastfoodDraw`, `fastfood_draw`,
`hadamard_transform`, `needed_dimension`, `quantize`, `compressed_size`, `compression_bound`.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from companion.checks import as_tensor, check_generator, check_in_range, check_positive_int
from companion.dimensionality.subspace_training.parameters import FrozenModule

__all__ = [
    "FastfoodDraw",
    "RandomSubspace",
    "StructureAwareSubspace",
    "compressed_size",
    "compression_bound",
    "fastfood",
    "fastfood_draw",
    "hadamard_transform",
    "needed_dimension",
    "quantize",
]

PROJECTIONS = ("dense", "sparse", "fastfood", "coordinates")
_FACTOR_BITS = 5  # a transform of length 1024 is two products with a 32 x 32 matrix, faster than ten butterflies


class FastfoodDraw(NamedTuple):
    """The random parts of a Fastfood projection, one row per block of n outputs.

    Paper: li2018measuring
    Chapter: dimensionality/subspace-training
    """

    signs: Tensor  # (blocks, n) of +1 and -1
    permutation: Tensor  # (blocks, n) int64
    gaussians: Tensor  # (blocks, n)


def _hadamard_matrix(n: int, like: Tensor) -> Tensor:
    h = torch.ones(1, 1, dtype=like.dtype, device=like.device)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def hadamard_transform(x: Tensor) -> Tensor:
    r"""Multiply the last axis by the Hadamard matrix $H_n$ of signs, without ever building it.

    $H_1 = 1$ and $H_{2n} = \begin{pmatrix} H_n & H_n \\ H_n & -H_n \end{pmatrix}$, so $H_{ab} = H_a \otimes H_b$: the
    axis is folded into factors of at most 32 and each factor is one small matrix product, $O(n \log n)$ in all.

    Args:
        x: (..., n), n a power of two.

    Returns:
        (..., n), $H_n x$, not normalised: $\|H_n x\|^2 = n \|x\|^2$.

    Raises:
        ValueError: n is not a power of two.

    >>> hadamard_transform(torch.tensor([1.0, 2.0]))
    tensor([ 3., -1.])

    Paper: li2018measuring
    Chapter: dimensionality/subspace-training
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ValueError(f"expected the last axis to be a power of two, got {n}")
    return _scaled_transform(x, 1.0)


def _scaled_transform(x: Tensor, scale: float) -> Tensor:
    """Return scale * H_n x; the scale goes into one of the small matrices, where it costs nothing."""
    shape, bits, stride = x.shape, x.shape[-1].bit_length() - 1, 1
    factors = max(1, -(-bits // _FACTOR_BITS))
    for i in range(factors):
        # equal factors, each multiplied from the left where the axis lies: nothing has to be turned around
        factor = 1 << (bits * (i + 1) // factors - bits * i // factors)
        h = _hadamard_matrix(factor, x)
        if i == 0:
            x = x.reshape(-1, factor) @ (scale * h)  # h is symmetric, and this is one large product
        else:
            x = h @ x.reshape(-1, factor, stride)
        stride *= factor
    return x.reshape(shape)


def fastfood_draw(dim: int, out_dim: int, *, random_state: int | torch.Generator | None = 0) -> FastfoodDraw:
    """Draw the signs, permutations and Gaussians of a Fastfood projection from dim to out_dim numbers.

    Memory is proportional to out_dim, whatever dim is.

    Args:
        dim: length of the vectors to be projected.
        out_dim: length of what comes out.
        random_state: a seed, a generator, or None for torch's default generator.

    >>> fastfood_draw(3, 10).signs.shape  # blocks of 4, the next power of two
    torch.Size([3, 4])

    Paper: li2018measuring
    Chapter: dimensionality/subspace-training
    """
    dim, out_dim = check_positive_int(dim, "dim"), check_positive_int(out_dim, "out_dim")
    generator = check_generator(random_state)
    n = 1 << (dim - 1).bit_length()
    blocks = -(-out_dim // n)
    signs = torch.randint(0, 2, (blocks, n), generator=generator).float().mul_(2).sub_(1)
    permutation = torch.rand(blocks, n, generator=generator).argsort(dim=1)
    gaussians = torch.randn(blocks, n, generator=generator)
    return FastfoodDraw(signs, permutation, gaussians)


def fastfood(
    z: Any, out_dim: int, draw: FastfoodDraw | None = None, *, random_state: int | torch.Generator | None = 0
) -> Tensor:
    r"""Project z from d to D numbers at random, in O(D log d) time and O(D) memory.

    Each block of n outputs (n the power of two that z is padded to) is $\tfrac{1}{\sqrt{nD}} H G \Pi H B z$: random
    signs B, a Hadamard transform, a permutation, Gaussian weights G, a second transform. The matrix has no
    entries anywhere, and $E\|P z\|^2 = \|z\|^2$: B makes the columns of P orthogonal in expectation, and each output
    coordinate has expected square $\|z\|^2 / D$.

    Args:
        z: (..., d).
        out_dim: D, the length of the result.
        draw: the random parts from `fastfood_draw(d, D)`; drawn from `random_state` when left out.
        random_state: a seed, a generator, or None for torch's default generator.

    Returns:
        (..., D), differentiable in z.

    Raises:
        ValueError: the draw was made for other sizes.

    >>> fastfood(torch.zeros(3), 10).shape
    torch.Size([10])

    Paper: li2018measuring
    Chapter: dimensionality/subspace-training
    """
    z = as_tensor(z, "z")
    z = z if z.is_floating_point() else z.float()
    if z.ndim < 1 or z.shape[-1] < 1:
        raise ValueError(f"expected z of shape (..., d) with d at least 1, got shape {tuple(z.shape)}")
    dim, out_dim = z.shape[-1], check_positive_int(out_dim, "out_dim")
    if draw is None:
        draw = fastfood_draw(dim, out_dim, random_state=random_state)
    signs, permutation, gaussians = (part.to(z.device) for part in draw)
    blocks, n = signs.shape
    if n != 1 << (dim - 1).bit_length() or blocks != -(-out_dim // n):
        raise ValueError(f"expected a draw for {dim} -> {out_dim} numbers, got one of {blocks} blocks of {n}")
    padded = nn.functional.pad(z, (0, n - dim)).unsqueeze(-2)
    # 1 / sqrt(n D), half before and half after, so that no intermediate leaves the range of a short float
    mixed = _scaled_transform(signs.to(z.dtype) * padded, 1 / math.sqrt(n))  # (..., blocks, n)
    mixed = mixed.gather(-1, permutation.expand(mixed.shape)) * gaussians.to(z.dtype)
    return _scaled_transform(mixed, 1 / math.sqrt(out_dim)).flatten(-2)[..., :out_dim]


def _slices(size: int) -> list[tuple[int, int]]:
    """Return (how many, how wide) for sqrt(size) slices of rows as equal as can be: the wider ones, then the others."""
    count = math.isqrt(size - 1) + 1
    width, wider = divmod(size, count)
    return [(wider, width + 1), (count - wider, width)]


def _sparse_draw(dim: int, size: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """One random row in each of sqrt(size) equal slices, per column: distinct rows, every row equally likely.

    Returns the place inside its slice and the entry, (slices, dim) both: one slice after the other, because a slice
    fits into the processor's cache, and different slices never meet.
    """
    widths = torch.cat([torch.full((count, 1), width) for count, width in _slices(size)])
    place = (torch.rand(len(widths), dim, generator=generator) * widths).long().minimum(widths - 1)
    signs = torch.randint(0, 2, (len(widths), dim), generator=generator).float().mul_(2).sub_(1)
    return place, signs / math.sqrt(len(widths))


def _sparse_product(place: Tensor, values: Tensor, z: Tensor, size: int) -> Tensor:
    """Return P z, (size,), of the P that `_sparse_draw` describes."""
    pieces, start = [], 0
    for count, width in _slices(size):
        rows = slice(start, start + count)
        zeros = torch.zeros(count, width, dtype=z.dtype, device=z.device)
        pieces.append(zeros.scatter_add(1, place[rows], values[rows] * z).flatten())
        start += count
    return torch.cat(pieces)


class RandomSubspace(FrozenModule):
    r"""Any network, trainable only inside a random d-dimensional subspace around its starting point.

    $\theta = \theta_0 + P z$, with $\theta_0$ frozen, P a fixed random D x d matrix with columns of length one and
    z the only parameter, zero at first, so that the wrapped module's outputs are the starting point. Frozen
    parameters of the module stay out of the subspace: combine with `train_only`.

    Because the columns have length one, a step of size s in z moves the network by s, spread over D numbers: learning
    rates for z are 10 to 100 times those for theta (0.1 to 0.3 with Adam is a good start).

    Args:
        module: any `nn.Module`: normalisation layers, tied weights, buffers and recurrent layers included. It is
            copied.
        dim: d, how many numbers are trained.
        projection: "dense" (Gaussian columns, D d numbers of memory), "sparse" (about sqrt(D) signs per column),
            "fastfood" (O(D) memory, nothing materialised) or "coordinates" (d single parameters drawn at random:
            the baseline of training an equal count of weights).
        random_state: seed of P. The same seed gives the same P on every device, so a trained network is stored as
            (seed, z).

    Raises:
        ValueError: an unknown projection, a module without trainable parameters, or more coordinates than there are.

    >>> net = RandomSubspace(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), dim=20)
    >>> [(name, p.shape) for name, p in net.named_parameters()], net.size
    ([('z', torch.Size([20]))], 2410)

    Paper: li2018measuring
    Chapter: dimensionality/subspace-training
    """

    def __init__(self, module: nn.Module, dim: int, projection: str = "dense", *, random_state: int = 0):
        super().__init__(module)
        self.dim = check_positive_int(dim, "dim")
        self.projection = projection
        random_state = check_positive_int(random_state, "random_state", minimum=0)
        first = self.base_values()[self.names[0]]
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        self.z = nn.Parameter(torch.zeros(self.dim, dtype=dtype, device=first.device))
        for name, part in self._draw(torch.Generator().manual_seed(random_state)).items():
            part = part.to(first.device, dtype if part.is_floating_point() else part.dtype)
            # it follows from the seed, so it is not stored with the weights
            self.register_buffer(f"_{name}", part, persistent=False)
        drawn_from = torch.tensor([self.dim, self.size, PROJECTIONS.index(projection), random_state])
        self.register_buffer("_drawn_from", drawn_from.to(first.device))

    def _draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        if self.projection == "dense":
            directions = torch.randn(self.dim, self.size, generator=generator)  # rows in memory: the columns of P
            return {"directions": nn.functional.normalize(directions, dim=1)}
        if self.projection == "sparse":
            place, values = _sparse_draw(self.dim, self.size, generator)
            return {"place": place, "values": values}
        if self.projection == "fastfood":
            return fastfood_draw(self.dim, self.size, random_state=generator)._asdict()
        if self.projection == "coordinates":
            if self.dim > self.size:
                raise ValueError(f"expected at most {self.size} coordinates, one per parameter, got dim={self.dim}")
            return {"rows": torch.randperm(self.size, generator=generator)[: self.dim]}
        raise ValueError(f"expected projection among {PROJECTIONS}, got {self.projection!r}")

    def project(self, z: Tensor) -> Tensor:
        """Return P z, (D,): the displacement of all the network's parameters, one after the other."""
        if self.projection == "dense":
            return z @ self._directions
        if self.projection == "fastfood":
            return fastfood(z, self.size, FastfoodDraw(self._signs, self._permutation, self._gaussians))
        if self.projection == "sparse":
            return _sparse_product(self._place, self._values, z, self.size)
        return torch.zeros(self.size, dtype=z.dtype, device=z.device).index_add(0, self._rows, z)

    def values(self) -> dict[str, Tensor]:
        """Return the parameters the network runs with: theta_0 + P z, by name."""
        return self.moved(self.split(self.project(self.z)))

    def forward(self, *args, **kwargs):
        """Run the wrapped module at theta_0 + P z; arguments and result are the wrapped module's own."""
        return self.call(self.values(), *args, **kwargs)

    def to_module(self) -> nn.Module:
        """Return an ordinary module with the trained values, free of the subspace."""
        return self.export(self.values())

    @property
    def random_state(self) -> int:
        """The seed P was drawn with."""
        return int(self._drawn_from[-1])

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        stored, own = state_dict.get(prefix + "_drawn_from"), self._drawn_from
        if stored is not None and not torch.equal(stored.to(own), own):
            # the same z means another network under another P
            errors.append(f"expected a z trained with (d, D, kind, seed) {own.tolist()}, got {stored.tolist()}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)


class StructureAwareSubspace(RandomSubspace):
    r"""A random subspace in which each parameter tensor also learns how far to follow it.

    $\theta_i = \theta_{0,i} + \lambda_i (P z)_i$ with one scale per parameter tensor, so of `dim` trained numbers m are
    scales (1 at first) and dim - m span the subspace. Where layers need moves of very different size, the scales
    save the random directions from having to cancel each other.

    Args:
        module: any `nn.Module`; it is copied.
        dim: d, how many numbers are trained in all; more than the module has trainable tensors.
        projection: as in `RandomSubspace`; "fastfood" as in the paper.
        random_state: seed of P.

    Raises:
        ValueError: dim leaves nothing for the subspace, and as `RandomSubspace`.

    >>> net = StructureAwareSubspace(nn.Linear(8, 8), dim=10)
    >>> {name: p.numel() for name, p in net.named_parameters()}
    {'z': 8, 'scales': 2}

    Paper: aghajanyan2021intrinsic
    Chapter: dimensionality/subspace-training
    """

    def __init__(self, module: nn.Module, dim: int, projection: str = "fastfood", *, random_state: int = 0):
        tensors = len([p for p in module.parameters() if p.requires_grad and p.is_floating_point()])
        if check_positive_int(dim, "dim") <= tensors:
            raise ValueError(f"expected dim above {tensors}, the number of scales (one per trained tensor), got {dim}")
        super().__init__(module, dim - tensors, projection, random_state=random_state)
        self.scales = nn.Parameter(torch.ones(tensors, dtype=self.z.dtype, device=self.z.device))

    def values(self) -> dict[str, Tensor]:
        """Return theta_0 + lambda * P z, by name."""
        pieces = self.split(self.project(self.z))
        return self.moved({name: scale * pieces[name] for name, scale in zip(self.names, self.scales, strict=True)})


def needed_dimension(dims: Any, scores: Any, target: float) -> float:
    r"""Return the dimension at which a rising curve of scores first reaches its target, $d_{90}$ for instance.

    Between the last dimension below the target and the first one that reaches it the score is taken to be linear
    in $\log d$. The convention of the paper is `target = 0.9 * score of ordinary training`.

    Args:
        dims: increasing dimensions, (k,).
        scores: the score at each, (k,).
        target: the level to reach.

    Returns:
        The interpolated dimension; the smallest one when all scores reach the target, infinity when none does.

    Raises:
        ValueError: dims do not increase, or the lengths differ.

    >>> needed_dimension([10, 20, 40], [0.5, 0.7, 0.9], target=0.8)
    28.284...

    Paper: li2018measuring
    Chapter: dimensionality/subspace-training
    """
    dims, scores = as_tensor(dims, "dims").double(), as_tensor(scores, "scores").double()
    if dims.ndim != 1 or dims.shape != scores.shape or dims.numel() == 0:
        raise ValueError(f"expected dims and scores of one length, got {tuple(dims.shape)} and {tuple(scores.shape)}")
    if (dims[1:] <= dims[:-1]).any() or dims[0] <= 0:
        raise ValueError(f"expected positive, increasing dims, got {dims.tolist()}")
    reached = (scores >= target).nonzero()
    if reached.numel() == 0:
        return math.inf
    i = int(reached[0])
    if i == 0:
        return float(dims[0])
    share = float((target - scores[i - 1]) / (scores[i] - scores[i - 1]))
    return float(dims[i - 1] * (dims[i] / dims[i - 1]) ** share)


def quantize(z: Any, bits: int) -> Tensor:
    """Round a vector to 2^bits evenly spaced values between its smallest and its largest.

    Args:
        z: (d,).
        bits: bits per number, 1 to 16.

    >>> quantize([0.0, 0.4, 1.0], bits=1)
    tensor([0., 0., 1.])

    Paper: aghajanyan2021intrinsic
    Chapter: dimensionality/subspace-training
    """
    z = as_tensor(z, "z")
    z = z if z.is_floating_point() else z.float()
    levels = 2 ** int(check_in_range(check_positive_int(bits, "bits"), "bits", 1, 16)) - 1
    low, high = z.min(), z.max()
    step = ((high - low) / levels).clamp_min(torch.finfo(z.dtype).tiny)
    return low + ((z - low) / step).round() * step


def compressed_size(dim: int, bits: int = 32) -> int:
    r"""Return the bytes a network trained in a subspace takes: the seed (8), the range of z (8) and z itself.

    The full network is rebuilt from $\theta_0$ and P, which both follow from the seed.

    Args:
        dim: d, the trained numbers.
        bits: bits kept per number (see `quantize`).

    >>> compressed_size(750), compressed_size(750, bits=8)
    (3016, 766)

    Paper: li2018measuring
    Chapter: dimensionality/subspace-training
    """
    return 16 + -(-check_positive_int(dim, "dim") * check_positive_int(bits, "bits") // 8)


def compression_bound(train_error: float, n: int, dim: int, *, bits: int = 8, delta: float = 0.05) -> float:
    r"""Bound the true error of a network that is described by `dim` numbers of `bits` bits.

    There are $2^{bd}$ such networks once the seed is fixed, so with probability $1 - \delta$ over n training samples

    $$\mathrm{err} \le \widehat{\mathrm{err}} + \sqrt{\frac{d\,b \ln 2 + \ln(1/\delta)}{2n}}$$

    (Hoeffding and a union bound; the range of z must be fixed in advance). The number of parameters D is not in it.

    Args:
        train_error: fraction of wrong predictions on the training set, of the quantised network.
        n: training samples.
        dim: d.
        bits: b.
        delta: how often the bound may fail.

    Returns:
        The bound; a value of 1 or more says nothing.

    >>> compression_bound(0.05, n=100_000, dim=200)
    0.12...

    Paper: aghajanyan2021intrinsic
    Chapter: dimensionality/subspace-training
    """
    check_in_range(train_error, "train_error", 0, 1)
    check_in_range(delta, "delta", 0, 1, inclusive="neither")
    code_length = check_positive_int(dim, "dim") * check_positive_int(bits, "bits") * math.log(2)
    return train_error + math.sqrt((code_length + math.log(1 / delta)) / (2 * check_positive_int(n, "n")))
