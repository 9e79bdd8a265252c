"""Estimators of intrinsic dimension with scikit-learn's manners and scikit-dimension's attributes.

Public: `TwoNN`, `MLE`, `LocalPCA`, `CorrelationDimension`, `DimensionEnsemble`.

Each has `fit(X)`, `dimension_`, `dimension_pw_` (one value per row) and `dimension_interval_`, a bootstrap interval.
The bootstrap draws the per-point statistics again, not the points: a point drawn twice would be its own neighbour. It
shows the noise of the estimate and knows nothing of its bias.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, clone
from sklearn.utils.validation import validate_data
from torch import Tensor

from companion import runtime
from companion.checks import check_features, check_generator, check_in_range, check_positive_int
from companion.dimensionality.intrinsic_dimension import ratios
from companion.geometry import single
from companion.neighbors import Neighbors, knn

__all__ = ["MLE", "CorrelationDimension", "DimensionEnsemble", "LocalPCA", "TwoNN"]

_CHUNK = 32_000_000  # bytes of one block of distances or neighbourhoods


class _CopiesError(ValueError):
    """Points at distance zero, where ratios of distances mean nothing."""


class _DimensionEstimator(BaseEstimator):
    """What the estimators share: input, copies of points, neighbours, bootstrap."""

    _needs_distinct = True

    def fit(self, X: Any, y: Any = None) -> "_DimensionEstimator":
        """Estimate the dimension of X.

        Args:
            X: (n, d) array or tensor.
            y: ignored, as scikit-learn has it.

        Raises:
            ValueError: NaN, too few points, copies of a point with duplicates="error", settings out of range.
        """
        x = self._validated(X)
        if self.duplicates not in ("warn", "drop", "error"):
            raise ValueError(f"expected duplicates to be 'warn', 'drop' or 'error', got {self.duplicates!r}")
        if self.duplicates != "drop":
            try:
                self._search_and_fit(x)
                return self
            except _CopiesError as copies:
                if self.duplicates == "error":
                    raise
                warnings.warn(f"{copies}; each point is counted once", UserWarning, stacklevel=2)
        x, place = x.unique(dim=0, return_inverse=True)
        self._search_and_fit(x)
        self.dimension_pw_ = self.dimension_pw_[place.cpu().numpy()]
        return self

    def _search_and_fit(self, x: Tensor) -> None:
        k = self._n_neighbors()
        if len(x) <= max(k, 2):
            raise ValueError(
                f"expected more than {max(k, 2)} points for {k} neighbours, got {len(x)} distinct sample(s)"
            )
        self._fit(x, knn(x, k=k, memory=self.memory) if k else None)

    def _validated(self, X: Any) -> Tensor:
        if isinstance(X, Tensor):
            x = single(check_features(X, "X", min_samples=3).detach())
            self.n_features_in_ = x.shape[1]
            return x if self.device == "auto" else x.to(runtime.device(self.device))
        X = validate_data(self, X, dtype=[np.float64, np.float32], ensure_min_samples=3)
        return check_features(X, "X").to(runtime.device(self.device))

    def _n_neighbors(self) -> int:
        raise NotImplementedError

    def _measure(self, x: Tensor, neighbors: Neighbors | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return the dimension per point, and the dimension of the set when row i counts as often as counts[i] says."""
        raise NotImplementedError

    def _fit(self, x: Tensor, neighbors: Neighbors | None) -> None:
        n_bootstrap = check_positive_int(self.n_bootstrap, "n_bootstrap", minimum=0)
        level = check_in_range(self.level, "level", 0, 1, inclusive="neither")
        if self._needs_distinct and neighbors is not None:
            copies = int((neighbors.distances[:, 0] == 0).sum())
            if copies:
                raise _CopiesError(f"expected distinct points, got {copies} of {len(x)} with a copy at distance zero")
        pointwise, statistic = self._measure(x, neighbors)
        self.dimension_pw_ = pointwise.cpu().numpy().astype(np.float64)
        self.dimension_ = float(statistic(torch.ones(len(x), dtype=torch.int64, device=x.device)))
        generator, n = check_generator(self.random_state, "random_state"), len(x)
        draws = [
            float(statistic(torch.bincount(torch.randint(n, (n,), generator=generator), minlength=n).to(x.device)))
            for _ in range(n_bootstrap)
        ]
        self.dimension_draws_ = np.array(draws)
        self.dimension_interval_ = _interval(self.dimension_draws_, level)


def _interval(draws: np.ndarray, level: float) -> tuple[float, float] | None:
    if not len(draws):
        return None
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


class TwoNN(_DimensionEstimator):
    r"""Dimension from the ratio of the second to the first neighbour distance.

    $-\log(1 - F(\mu)) = d \log \mu$ with $\mu = r_2 / r_1$; see `twonn`. It looks at the smallest scale the data have,
    so it sees noise first, and needs the density to be even only between a point and its second neighbour.

    Args:
        discard_fraction: share of the largest ratios left out.
        method: "linear", the fit of Facco et al., or "mle".
        duplicates: copies of a point are counted once, with a warning ("warn") or without ("drop"), or refused
            ("error").
        n_bootstrap: draws behind `dimension_interval_`; 0 for none.
        level: of the interval.
        random_state: draws the bootstrap (None: torch's default generator).
        memory: working memory of the neighbour search.
        device: where to compute arrays; "auto" leaves tensors where they are.

    Attributes:
        dimension_: the estimate.
        dimension_pw_: $1 / \log \mu$ of each point: very noisy alone, to be combined by its harmonic mean.
        dimension_interval_: bootstrap interval, or None.
        dimension_draws_: the bootstrap draws.
        n_features_in_: columns seen in fit.

    >>> x = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0))
    >>> bool(2.7 < TwoNN(random_state=0).fit(x).dimension_ < 3.3)
    True

    Chapter: dimensionality/intrinsic-dimension
    """

    def __init__(
        self,
        discard_fraction: float = 0.1,
        method: str = "linear",
        *,
        duplicates: str = "warn",
        n_bootstrap: int = 100,
        level: float = 0.95,
        random_state: Any = None,
        memory: str | int = "256MB",
        device: str = "auto",
    ):
        self.discard_fraction = discard_fraction
        self.method = method
        self.duplicates = duplicates
        self.n_bootstrap = n_bootstrap
        self.level = level
        self.random_state = random_state
        self.memory = memory
        self.device = device

    def _n_neighbors(self) -> int:
        ratios.check_twonn(self.discard_fraction, self.method)
        return 2

    def _measure(self, x: Tensor, neighbors: Neighbors | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        log_ratio = ratios.log_ratios(neighbors.distances)
        ordered = log_ratio.sort().values

        def statistic(counts: Tensor) -> Tensor:
            resampled = ordered.repeat_interleave(counts)  # still sorted
            return ratios.twonn_from_ratios(resampled, self.discard_fraction, self.method)

        return 1 / log_ratio, statistic


class MLE(_DimensionEstimator):
    r"""Maximum-likelihood dimension from the distances to the k nearest neighbours.

    $\hat d_i^{-1} = \frac{1}{k-1} \sum_{j<k} \log (T_k / T_j)$, combined by the mean of the inverses; see
    `mle_dimension`.

    Args:
        n_neighbors: k. Larger is steadier and reads a larger scale, where curvature and edges enter.
        reduce: "mle", "mean" or "median" over points.
        duplicates: copies of a point are counted once, with a warning ("warn") or without ("drop"), or refused
            ("error").
        n_bootstrap: draws behind `dimension_interval_`; 0 for none.
        level: of the interval.
        random_state: draws the bootstrap (None: torch's default generator).
        memory: working memory of the neighbour search.
        device: where to compute arrays; "auto" leaves tensors where they are.

    Attributes:
        dimension_: the estimate.
        dimension_pw_: the local intrinsic dimension of each point.
        dimension_interval_: bootstrap interval, or None.
        dimension_draws_: the bootstrap draws.
        n_features_in_: columns seen in fit.

    >>> x = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0))
    >>> bool(2.7 < MLE(random_state=0).fit(x).dimension_ < 3.3)
    True

    Chapter: dimensionality/intrinsic-dimension
    """

    def __init__(
        self,
        n_neighbors: int = 20,
        reduce: str = "mle",
        *,
        duplicates: str = "warn",
        n_bootstrap: int = 100,
        level: float = 0.95,
        random_state: Any = None,
        memory: str | int = "256MB",
        device: str = "auto",
    ):
        self.n_neighbors = n_neighbors
        self.reduce = reduce
        self.duplicates = duplicates
        self.n_bootstrap = n_bootstrap
        self.level = level
        self.random_state = random_state
        self.memory = memory
        self.device = device

    def _n_neighbors(self) -> int:
        return check_positive_int(self.n_neighbors, "n_neighbors", minimum=2)

    def _measure(self, x: Tensor, neighbors: Neighbors | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        if self.reduce not in ("mle", "mean", "median"):
            raise ValueError(f"expected reduce to be 'mle', 'mean' or 'median', got {self.reduce!r}")
        inverse = ratios.inverse_dimensions(neighbors.distances)
        if not bool(inverse.any()):
            raise ValueError("expected neighbours at different distances, got ties only: a lattice?")

        def statistic(counts: Tensor) -> Tensor:
            if self.reduce == "mle":
                return counts.sum() / (counts.to(inverse.dtype) @ inverse)
            return ratios.combine_inverses(inverse.repeat_interleave(counts), self.reduce)

        return 1 / inverse, statistic


class LocalPCA(_DimensionEstimator):
    r"""Dimension as the number of principal directions of each point's neighbourhood, averaged over points.

    The covariance of the k nearest neighbours has d large eigenvalues where the set is flat at that scale. Counted are
    those of at least `threshold` times the largest ("largest"), those needed for a share 1 - `threshold` of the
    variance ("variance"), or $(\sum \lambda)^2 / \sum \lambda^2$ ("participation", which needs no threshold).

    Args:
        n_neighbors: k; at least twice the dimension you expect, or it cannot be seen.
        criterion: "largest", "variance" or "participation".
        threshold: share below which a direction does not count.
        duplicates: copies of a point are counted once, with a warning ("warn") or without ("drop"), or refused
            ("error").
        n_bootstrap: draws behind `dimension_interval_`; 0 for none.
        level: of the interval.
        random_state: draws the bootstrap (None: torch's default generator).
        memory: working memory of the neighbour search.
        device: where to compute arrays; "auto" leaves tensors where they are.

    Attributes:
        dimension_: the mean of `dimension_pw_`.
        dimension_pw_: directions counted at each point.
        dimension_interval_: bootstrap interval, or None.
        dimension_draws_: the bootstrap draws.
        n_features_in_: columns seen in fit.

    >>> x = torch.rand(500, 2, generator=torch.Generator().manual_seed(0)) @ torch.eye(2, 5)
    >>> LocalPCA(n_neighbors=30, random_state=0).fit(x).dimension_
    2.0

    Chapter: dimensionality/intrinsic-dimension
    """

    _needs_distinct = False

    def __init__(
        self,
        n_neighbors: int = 100,
        criterion: str = "largest",
        threshold: float = 0.05,
        *,
        duplicates: str = "warn",
        n_bootstrap: int = 100,
        level: float = 0.95,
        random_state: Any = None,
        memory: str | int = "256MB",
        device: str = "auto",
    ):
        self.n_neighbors = n_neighbors
        self.criterion = criterion
        self.threshold = threshold
        self.duplicates = duplicates
        self.n_bootstrap = n_bootstrap
        self.level = level
        self.random_state = random_state
        self.memory = memory
        self.device = device

    def _n_neighbors(self) -> int:
        if self.criterion not in ("largest", "variance", "participation"):
            raise ValueError(
                f"expected criterion to be 'largest', 'variance' or 'participation', got {self.criterion!r}"
            )
        check_in_range(self.threshold, "threshold", 0, 1, inclusive="neither")
        return check_positive_int(self.n_neighbors, "n_neighbors", minimum=2)

    def _measure(self, x: Tensor, neighbors: Neighbors | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        if not bool((neighbors.distances[:, -1] > 0).all()):
            raise _CopiesError("expected distinct points, got one with copies only among its neighbours")
        size = max(1, _CHUNK // (neighbors.indices.shape[1] * x.shape[1] * x.element_size()))
        pointwise = torch.cat([self._count(x[index]) for index in neighbors.indices.split(size)]).double()
        return pointwise, lambda counts: (counts.to(pointwise.dtype) @ pointwise) / counts.sum()

    def _count(self, patches: Tensor) -> Tensor:
        """Return the dimension of each patch (b, k, d)."""
        patches = patches - patches.mean(1, keepdim=True)
        patches = patches / patches.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(patches.dtype).tiny)
        wide = patches.shape[2] > patches.shape[1]
        gram = patches @ patches.mT if wide else patches.mT @ patches  # the smaller side
        values = torch.linalg.eigvalsh(gram).flip(1).clamp(min=0)  # (b, min(k, d)), largest first
        values = values / values.sum(1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
        if self.criterion == "participation":
            return 1 / values.square().sum(1)
        if self.criterion == "largest":
            return (values > self.threshold * values[:, :1]).sum(1)
        return (values.cumsum(1) < 1 - self.threshold).sum(1) + 1


class CorrelationDimension(_DimensionEstimator):
    r"""Grassberger and Procaccia's dimension: the slope of the log share of close pairs against the log of how close.

    $C(r) = \Pr(\lVert x_i - x_j \rVert < r) \propto r^d$. The slope is fitted over radii between two shares of close
    pairs, so that the range follows the data. For a time series, pairs close in time are close in space and would add a
    dimension of one: the Theiler window leaves them out.

    Args:
        fractions: share of pairs within the smallest and the largest radius.
        n_radii: radii in between, evenly spaced in the logarithm.
        theiler: rows i, j with $|i - j| \le$ theiler are no pair; 0 for data without order.
        n_references: points whose pairs are counted, drawn at random; None for all. Time grows with it, memory does
            not.
        duplicates: copies of a point are counted once, with a warning ("warn") or without ("drop"), or refused
            ("error"). Counting once forgets the order of the rows.
        n_bootstrap: draws behind `dimension_interval_`, over reference points; 0 for none.
        level: of the interval.
        random_state: draws references and bootstrap (None: torch's default generator).
        memory: kept for the common contract; blocks are of fixed size.
        device: where to compute arrays; "auto" leaves tensors where they are.

    Attributes:
        dimension_: the estimate.
        dimension_pw_: slope between first and last radius at each reference; NaN at other points and where the
            smallest ball is empty.
        radii_, correlation_: C(r), what the slope is fitted to.
        dimension_interval_: bootstrap interval, or None.
        dimension_draws_: the bootstrap draws.
        n_features_in_: columns seen in fit.

    >>> x = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0))
    >>> bool(1.8 < CorrelationDimension(random_state=0).fit(x).dimension_ < 2.2)
    True

    Paper: gilpin2021chaos
    Chapter: dimensionality/intrinsic-dimension
    """

    def __init__(
        self,
        fractions: tuple[float, float] = (5e-4, 1e-2),
        n_radii: int = 10,
        *,
        theiler: int = 0,
        n_references: int | None = 2048,
        duplicates: str = "warn",
        n_bootstrap: int = 100,
        level: float = 0.95,
        random_state: Any = None,
        memory: str | int = "256MB",
        device: str = "auto",
    ):
        self.fractions = fractions
        self.n_radii = n_radii
        self.theiler = theiler
        self.n_references = n_references
        self.duplicates = duplicates
        self.n_bootstrap = n_bootstrap
        self.level = level
        self.random_state = random_state
        self.memory = memory
        self.device = device

    def _n_neighbors(self) -> int:
        try:
            low, high = self.fractions
        except (TypeError, ValueError) as error:
            raise ValueError(f"expected fractions to be two shares of pairs, got {self.fractions!r}") from error
        low = check_in_range(low, "fractions[0]", 0, 1, inclusive="neither")
        check_in_range(high, "fractions[1]", low, 1, inclusive="neither")
        check_positive_int(self.n_radii, "n_radii", minimum=2)
        check_positive_int(self.theiler, "theiler", minimum=0)
        if self.n_references is not None:
            check_positive_int(self.n_references, "n_references")
        return 0

    def _measure(self, x: Tensor, neighbors: Neighbors | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        x = x.to(torch.float32 if x.device.type == "mps" else torch.float64)
        x = x - x.mean(0)
        n = len(x)
        references = torch.randperm(n, generator=check_generator(self.random_state, "random_state"))
        references = references[: self.n_references].sort().values.to(x.device)
        self.radii_ = self._radii(x, references).cpu().numpy()
        counts = self._counts(x, references, torch.as_tensor(self.radii_, device=x.device))  # (references, radii)
        log_r = torch.as_tensor(self.radii_, device=x.device).log()
        row = torch.full((n,), len(references), device=x.device)
        row[references] = torch.arange(len(references), device=x.device)

        def statistic(weights: Tensor) -> Tensor:
            weight = weights[references].to(counts.dtype)
            pairs = weight @ counts
            centred = log_r - log_r.mean()
            return (centred @ pairs.clamp_min(0.5).log()) / (centred @ centred)

        possible = sum(n - (min(n, i + self.theiler + 1) - max(0, i - self.theiler)) for i in references.tolist())
        self.correlation_ = (counts.sum(0) / possible).cpu().numpy()
        pointwise = torch.full((n,), torch.nan, dtype=counts.dtype, device=x.device)
        slopes = (counts[:, -1] / counts[:, 0]).log() / (log_r[-1] - log_r[0])
        pointwise[references] = torch.where(counts[:, 0] > 0, slopes, torch.nan)
        return pointwise, statistic

    def _blocks(self, x: Tensor, references: Tensor):
        """Yield reference rows with their distances to all points, infinite where there is no pair."""
        for rows in references.split(max(1, _CHUNK // (8 * len(x)))):
            distances = torch.cdist(x[rows], x)
            offsets = torch.arange(-self.theiler, self.theiler + 1, device=x.device)
            near = rows[:, None] + offsets
            valid = (near >= 0) & (near < len(x))
            at = torch.arange(len(rows), device=x.device)[:, None].expand_as(near)
            distances[at[valid], near[valid]] = torch.inf
            yield rows, distances

    def _radii(self, x: Tensor, references: Tensor) -> Tensor:
        few = references[:: math.ceil(len(references) / 256)]
        distances = torch.cat([block[torch.isfinite(block)] for _, block in self._blocks(x, few)])
        if not len(distances):
            raise ValueError(f"expected pairs outside the Theiler window, got none: {len(x)} points, {self.theiler=}")
        ranks = [min(len(distances) - 1, int(share * len(distances))) for share in self.fractions]
        low, high = (distances.kthvalue(rank + 1).values for rank in ranks)
        if not low > 0:
            raise _CopiesError("expected distinct points, got pairs at distance zero")
        if not high > low * (1 + 1e-9):  # on a lattice all close pairs are as close, up to rounding
            raise ValueError(
                f"expected shares of pairs apart enough to give two radii, got {self.fractions} of {len(distances)}"
                " pairs: raise fractions[1] or use more points"
            )
        return torch.logspace(
            math.log10(low), math.log10(high), self.n_radii, dtype=distances.dtype, device=distances.device
        )

    def _counts(self, x: Tensor, references: Tensor, radii: Tensor) -> Tensor:
        """Return how many points lie within each radius of each reference."""
        counts, copies = [], 0
        for rows, distances in self._blocks(x, references):
            row, column = (distances < radii[-1]).nonzero(as_tuple=True)
            near = distances[row, column]
            copies += int((near == 0).sum())
            ring = torch.searchsorted(radii, near, right=True)
            flat = torch.bincount(row * len(radii) + ring, minlength=len(rows) * len(radii))
            counts.append(flat.view(len(rows), len(radii)).cumsum(1))
        if copies:
            raise _CopiesError(f"expected distinct points, got {copies} pairs at distance zero")
        return torch.cat(counts).to(x.dtype)


class DimensionEnsemble(_DimensionEstimator):
    """Several estimators on one set: their median, and how far they disagree, which tells more.

    Neighbours are searched once. `dimension_interval_` is the interval of the median under one bootstrap; `spread_`,
    the range over the estimators, is usually wider, and is the honest error bar.

    Args:
        estimators: list of (name, estimator); None for TwoNN, MLE, LocalPCA and CorrelationDimension as they come.
        duplicates: copies of a point are counted once, with a warning ("warn") or without ("drop"), or refused
            ("error"); decided here for all members.
        n_bootstrap: draws behind `dimension_interval_`; 0 for none; overrides that of the members.
        level: of the interval.
        random_state: draws the bootstrap, the same for all members (None: torch's default generator).
        memory: working memory of the neighbour search.
        device: where to compute arrays; "auto" leaves tensors where they are.

    Attributes:
        dimension_: the median of the members.
        dimensions_: the estimate of each member, by name.
        spread_: (smallest, largest) estimate.
        dimension_pw_: per point, the median of the members that have a value there.
        estimators_: the fitted members.
        dimension_interval_: bootstrap interval, or None.
        dimension_draws_: the bootstrap draws.
        n_features_in_: columns seen in fit.

    >>> x = torch.rand(500, 2, generator=torch.Generator().manual_seed(0))
    >>> fitted = DimensionEnsemble(n_bootstrap=0).fit(x)
    >>> sorted(fitted.dimensions_), bool(1.7 < fitted.dimension_ < 2.3)
    (['correlation', 'local_pca', 'mle', 'twonn'], True)

    Chapter: dimensionality/intrinsic-dimension
    """

    def __init__(
        self,
        estimators: list[tuple[str, Any]] | None = None,
        *,
        duplicates: str = "warn",
        n_bootstrap: int = 100,
        level: float = 0.95,
        random_state: Any = None,
        memory: str | int = "256MB",
        device: str = "auto",
    ):
        self.estimators = estimators
        self.duplicates = duplicates
        self.n_bootstrap = n_bootstrap
        self.level = level
        self.random_state = random_state
        self.memory = memory
        self.device = device

    def _members(self) -> list[tuple[str, _DimensionEstimator]]:
        members = self.estimators
        if members is None:
            members = [
                ("twonn", TwoNN()),
                ("mle", MLE()),
                ("local_pca", LocalPCA()),
                ("correlation", CorrelationDimension()),
            ]
        members = [(name, clone(member)) for name, member in members]
        if not members or not all(isinstance(member, _DimensionEstimator) for _, member in members):
            raise ValueError("expected estimators to be a list of (name, estimator of this module)")
        return members

    def _n_neighbors(self) -> int:
        return max(member._n_neighbors() for _, member in self._members())

    def _fit(self, x: Tensor, neighbors: Neighbors | None) -> None:
        seed = torch.randint(2**31 - 1, (), generator=check_generator(self.random_state, "random_state")).item()
        self.estimators_ = self._members()
        for _, member in self.estimators_:
            member.set_params(n_bootstrap=self.n_bootstrap, level=self.level, random_state=seed)
            member.n_features_in_ = x.shape[1]
            k = member._n_neighbors()
            member._fit(x, Neighbors(neighbors.distances[:, :k], neighbors.indices[:, :k]) if k else None)
        self.dimensions_ = {name: member.dimension_ for name, member in self.estimators_}
        self.dimension_ = float(np.median(list(self.dimensions_.values())))
        self.spread_ = (min(self.dimensions_.values()), max(self.dimensions_.values()))
        self.dimension_pw_ = np.nanmedian([member.dimension_pw_ for _, member in self.estimators_], axis=0)
        self.dimension_draws_ = np.median([member.dimension_draws_ for _, member in self.estimators_], axis=0)
        self.dimension_interval_ = _interval(self.dimension_draws_, self.level)
