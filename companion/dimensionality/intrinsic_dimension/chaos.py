"""Chaotic flows as data sets with known invariants: regenerate them at any length, and forecast them.

Public: `FLOWS`, `Flow`, `integrate_flows`, `flow_period`, `lyapunov_exponents`, `RandomFeatureForecaster`,
`forecast_horizon`.

All flows here have right-hand sides of second order in three variables, so that ten numbers per equation are a whole
system and all systems run as one batch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from companion.checks import check_features, check_generator, check_in_range, check_positive_int

__all__ = [
    "FLOWS",
    "Flow",
    "RandomFeatureForecaster",
    "flow_period",
    "forecast_horizon",
    "integrate_flows",
    "lyapunov_exponents",
]

_MONOMIALS = ("1", "x", "y", "z", "xx", "xy", "xz", "yy", "yz", "zz")
# the two factors of each monomial, in the vector (1, x, y, z)
_LEFT = torch.tensor([0, 1, 2, 3, 1, 1, 1, 2, 2, 3])
_RIGHT = torch.tensor([0, 0, 0, 0, 1, 2, 3, 2, 3, 3])


class Flow(NamedTuple):
    """A quadratic flow: coefficients of dx, dy, dz by monomial, a point near the attractor, and its period."""

    equations: tuple[dict[str, float], dict[str, float], dict[str, float]]
    start: tuple[float, float, float]
    period: float


FLOWS: dict[str, Flow] = {
    "lorenz": Flow(
        ({"x": -10, "y": 10}, {"x": 28, "y": -1, "xz": -1}, {"z": -8 / 3, "xy": 1}), (-9.8, -9.0, 29.0), 0.83
    ),
    "roessler": Flow(({"y": -1, "z": -1}, {"x": 1, "y": 0.2}, {"1": 0.2, "z": -5.7, "xz": 1}), (6.5, -6.3, 0.03), 5.5),
    "chen": Flow(({"x": -35, "y": 35}, {"x": -7, "y": 28, "xz": -1}, {"z": -3, "xy": 1}), (-10.0, -10.0, 22.0), 0.42),
    "halvorsen": Flow(
        (
            {"x": -1.4, "y": -4, "z": -4, "yy": -1},
            {"y": -1.4, "z": -4, "x": -4, "zz": -1},
            {"z": -1.4, "x": -4, "y": -4, "xx": -1},
        ),
        (-8.6, 0.05, -2.4),
        1.12,
    ),
    "rucklidge": Flow(({"x": -2, "y": 6.7, "yz": -1}, {"x": 1}, {"z": -1, "yy": 1}), (1.0, 0.5, 4.5), 3.4),
    "sprott_a": Flow(({"y": 1}, {"x": -1, "yz": 1}, {"1": 1, "yy": -1}), (0.0, 5.0, 0.0), 5.1),
    "sprott_b": Flow(({"yz": 1}, {"x": 1, "y": -1}, {"1": 1, "xy": -1}), (0.5, 0.1, -0.2), 5.3),
    "sprott_c": Flow(({"yz": 1}, {"x": 1, "y": -1}, {"1": 1, "xx": -1}), (0.5, 0.3, 0.2), 7.0),
    "burke_shaw": Flow(({"x": -10, "y": -10}, {"y": -1, "xz": -10}, {"1": 4.272, "xy": 10}), (0.6, 0.2, -0.4), 0.77),
    "lorenz_84": Flow(
        (
            {"1": 2.0, "x": -0.25, "yy": -1, "zz": -1},
            {"1": 1.0, "y": -1, "xy": 1, "xz": -4},
            {"z": -1, "xy": 4, "xz": 1},
        ),
        (1.0, 0.5, 0.5),
        1.4,
    ),
    "rikitake": Flow(({"x": -2, "yz": 1}, {"x": -5, "y": -2, "xz": 1}, {"1": 1, "xy": -1}), (0.5, 1.0, 1.5), 3.2),
    "genesio_tesi": Flow(({"y": 1}, {"z": 1}, {"x": -1, "y": -1.1, "z": -0.44, "xx": 1}), (0.1, 0.1, 0.1), 6.0),
}
"""Twelve flows by name. Periods are what `flow_period` measures on a long orbit."""


def _coefficients(names: Sequence[str]) -> Tensor:
    unknown = sorted(set(names) - set(FLOWS))
    if unknown or not names:
        raise ValueError(f"expected names among {', '.join(FLOWS)}, got {unknown or names}")
    rows = [[[eq.get(m, 0.0) for m in _MONOMIALS] for eq in FLOWS[name].equations] for name in names]
    return torch.tensor(rows, dtype=torch.float64)  # (s, 3, 10)


def _velocity(coefficients: Tensor, state: Tensor) -> Tensor:
    """Return the right-hand side for states (s, b, 3)."""
    full = torch.nn.functional.pad(state, (1, 0), value=1.0)
    left, right = _LEFT.to(state.device), _RIGHT.to(state.device)
    monomials = full.index_select(-1, left) * full.index_select(-1, right)  # (s, b, 10)
    return monomials @ coefficients.to(state.device).mT


def _tangent_velocity(coefficients: Tensor, state: Tensor, tangent: Tensor) -> Tensor:
    """Return the Jacobian at each state times a tangent vector, both (s, b, 3), by the product rule."""
    full = torch.nn.functional.pad(state, (1, 0), value=1.0)
    change = torch.nn.functional.pad(tangent, (1, 0), value=0.0)
    left, right = full.index_select(-1, _LEFT), full.index_select(-1, _RIGHT)
    change_left, change_right = change.index_select(-1, _LEFT), change.index_select(-1, _RIGHT)
    return (change_left * right + left * change_right) @ coefficients.mT


def _runge_kutta(velocity: Any, state: Tensor, dt: Tensor) -> Tensor:
    a = velocity(state)
    b = velocity(state + 0.5 * dt * a)
    c = velocity(state + 0.5 * dt * b)
    return state + dt / 6 * (a + 2 * b + 2 * c + velocity(state + dt * c))


def integrate_flows(
    names: Sequence[str],
    n: int,
    *,
    per_period: int = 50,
    starts: int = 1,
    transient: float = 30.0,
    substeps: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return orbits of chaotic flows, all sampled equally often per period of their own.

    Runge-Kutta of fourth order. What comes before the transient has passed is thrown away, so that the points lie on
    the attractor.

    Args:
        names: keys of `FLOWS`.
        n: samples per orbit.
        per_period: samples per `Flow.period`: without a common clock, comparing systems compares clocks.
        starts: orbits per system, from starting points shaken a little.
        transient: periods thrown away.
        substeps: integration steps per sample.
        generator: shakes the starts (None: torch's default generator).

    Returns:
        (systems, starts, n, 3), float64.

    Raises:
        ValueError: an unknown name, or an orbit that left the attractor.

    >>> integrate_flows(["lorenz"], 100, transient=1.0, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([1, 1, 100, 3])

    Paper: gilpin2021chaos
    Chapter: dimensionality/intrinsic-dimension
    """
    coefficients, names = _coefficients(names), list(names)
    n, starts = check_positive_int(n, "n"), check_positive_int(starts, "starts")
    per_period, substeps = check_positive_int(per_period, "per_period"), check_positive_int(substeps, "substeps")
    skipped = int(check_in_range(transient, "transient", 0) * per_period)
    dt = torch.tensor([FLOWS[name].period for name in names], dtype=torch.float64) / per_period / substeps
    dt = dt[:, None, None]
    state = torch.tensor([FLOWS[name].start for name in names], dtype=torch.float64)[:, None]
    shake = torch.randn(len(names), starts, 3, generator=check_generator(generator), dtype=torch.float64)
    state = state * (1 + 0.01 * shake)
    orbit = torch.empty(n, len(names), starts, 3, dtype=torch.float64)
    for step in range(-skipped, n):
        if step >= 0:
            orbit[step] = state
        for _ in range(substeps):
            state = _runge_kutta(lambda s: _velocity(coefficients, s), state, dt)
    if not bool(torch.isfinite(orbit).all()):
        lost = [name for i, name in enumerate(names) if not bool(torch.isfinite(orbit[:, i]).all())]
        raise ValueError(f"expected orbits that stay bounded, got some that escape: {', '.join(lost)}; lower the step")
    return orbit.permute(1, 2, 0, 3).contiguous()


def flow_period(name: str, orbit: Any) -> float:
    r"""Return the mean period of an orbit, $2 \pi / \omega$ with $\omega^2 = \mathrm{Var}(\dot x) / \mathrm{Var}(x)$.

    The period of a sine wave, and Rice's mean period of a signal with many frequencies. Of the three coordinates the
    median counts, so that a pulsed one does not decide.

    Args:
        name: a key of `FLOWS`, for the velocity.
        orbit: (n, 3), long.

    Raises:
        ValueError: an unknown name, another shape.

    >>> orbit = integrate_flows(["roessler"], 2000, generator=torch.Generator().manual_seed(0))[0, 0]
    >>> 5 < flow_period("roessler", orbit) < 7
    True

    Paper: gilpin2021chaos
    Chapter: dimensionality/intrinsic-dimension
    """
    orbit = check_features(orbit, "orbit", min_samples=2).double()
    if orbit.shape[1] != 3:
        raise ValueError(f"expected orbit of shape (n, 3), got {tuple(orbit.shape)}")
    velocity = _velocity(_coefficients([name]), orbit[None])[0]
    rate = (velocity.var(0) / orbit.var(0)).median().sqrt()
    return float(2 * torch.pi / rate)


def lyapunov_exponents(
    names: Sequence[str],
    n: int = 4000,
    *,
    per_period: int = 50,
    starts: int = 8,
    transient: float = 30.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return the largest Lyapunov exponent of flows, per period of their own: how fast nearby orbits part.

    A tangent vector is carried along by the linearised flow and scaled back to length one at each step; the mean
    logarithm of the growth is the exponent. Divide by `Flow.period` for the usual unit.

    Args:
        names: keys of `FLOWS`.
        n: steps per orbit.
        per_period: steps per period.
        starts: orbits per system, averaged.
        transient: periods before the count begins.
        generator: shakes the starts (None: torch's default generator).

    Returns:
        (systems,), float64.

    Raises:
        ValueError: an unknown name, or an orbit that left the attractor.

    >>> g = torch.Generator().manual_seed(0)
    >>> bool(lyapunov_exponents(["lorenz"], 500, starts=4, transient=5.0, generator=g) > 0.2)
    True

    Paper: gilpin2021chaos
    Chapter: dimensionality/intrinsic-dimension
    """
    generator = check_generator(generator)
    state = integrate_flows(names, 1, per_period=per_period, starts=starts, transient=transient, generator=generator)
    state, coefficients = state[:, :, 0], _coefficients(names)
    n = check_positive_int(n, "n")
    dt = (torch.tensor([FLOWS[name].period for name in names], dtype=torch.float64) / per_period)[:, None, None]
    tangent = torch.nn.functional.normalize(torch.randn(state.shape, generator=generator, dtype=torch.float64), dim=-1)
    warmup, growth = n // 10, torch.zeros(state.shape[:-1], dtype=torch.float64)

    def both(pair: Tensor) -> Tensor:
        s, t = pair[..., :3], pair[..., 3:]
        return torch.cat([_velocity(coefficients, s), _tangent_velocity(coefficients, s, t)], -1)

    for step in range(warmup + n):
        moved = _runge_kutta(both, torch.cat([state, tangent], -1), dt)
        state, tangent = moved[..., :3], moved[..., 3:]
        length = torch.linalg.vector_norm(tangent, dim=-1, keepdim=True)
        tangent = tangent / length
        if step >= warmup:
            growth += length.squeeze(-1).log()
    if not bool(torch.isfinite(growth).all()):
        raise ValueError("expected orbits that stay bounded, got some that escape: raise per_period")
    return growth.mean(1) * per_period / n


class RandomFeatureForecaster(BaseEstimator):
    r"""A one-step forecaster: ridge regression of the next change on random features of the last few samples.

    $x_{t+1} - x_t = W \phi(u_t)$ with $u_t = (x_t, \dots, x_{t-p+1})$ and $\phi(u) = (1, u, \tanh(A u + b))$, A and b
    drawn once. Fed its own output it runs on: an echo-state network whose memory is a window.

    Args:
        n_features: random features.
        delays: samples in the window, p. One is enough where the whole state is seen; more can make the run unstable.
        ridge: penalty, relative to the mean square of the features.
        scale: size of A.
        random_state: draws A and b (None: torch's default generator).

    Attributes:
        weights_: W, transposed.
        center_, scale_: of the series, which is standardised first.

    >>> t = torch.linspace(0, 60, 600, dtype=torch.float64)
    >>> wave = torch.stack([t.sin(), t.cos()], 1)
    >>> model = RandomFeatureForecaster(50, delays=2, random_state=0).fit(wave[:400])
    >>> bool((model.forecast(wave[398:400], 100) - wave[400:500]).abs().max() < 0.1)
    True

    Paper: gilpin2021chaos
    Chapter: dimensionality/intrinsic-dimension
    """

    def __init__(
        self,
        n_features: int = 300,
        delays: int = 1,
        ridge: float = 1e-12,
        scale: float = 0.1,
        random_state: Any = None,
    ):
        self.n_features = n_features
        self.delays = delays
        self.ridge = ridge
        self.scale = scale
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> "RandomFeatureForecaster":
        """Learn one step from a series.

        Args:
            X: (n, c), samples in order.
            y: ignored.

        Raises:
            ValueError: fewer samples than the window needs, a constant coordinate, NaN.
        """
        delays = check_positive_int(self.delays, "delays")
        x = check_features(X, "X", min_samples=delays + 2).detach().double()
        generator = check_generator(self.random_state, "random_state")
        self.center_, self.scale_ = x.mean(0), x.std(0)
        if not bool((self.scale_ > 0).all()):
            raise ValueError("expected coordinates that vary, got a constant one")
        n_features = check_positive_int(self.n_features, "n_features")
        shape = (delays * x.shape[1], n_features)
        self.inner_ = self.scale * torch.randn(shape, generator=generator, dtype=torch.float64).to(x.device)
        self.bias_ = torch.randn(n_features, generator=generator, dtype=torch.float64).to(x.device)
        u = (x - self.center_) / self.scale_
        windows = torch.cat([u[delays - 1 - j : len(u) - 1 - j] for j in range(delays)], 1)
        features, target = self._features(windows), u[delays:] - u[delays - 1 : -1]
        gram = features.T @ features
        penalty = check_in_range(self.ridge, "ridge", 0, inclusive="neither") * gram.diagonal().mean()
        gram = gram + penalty * torch.eye(len(gram)).to(gram)
        self.weights_ = torch.linalg.solve(gram, features.T @ target)
        self.n_features_in_ = x.shape[1]
        return self

    def _features(self, windows: Tensor) -> Tensor:
        hidden = torch.tanh(windows @ self.inner_ + self.bias_)
        return torch.cat([torch.ones_like(hidden[..., :1]), windows, hidden], -1)

    def forecast(self, history: Any, steps: int) -> Tensor:
        """Run on from the last samples.

        Args:
            history: (delays, c), or (b, delays, c) for several starts, oldest first.
            steps: how far.

        Returns:
            (steps, c), or (b, steps, c).

        Raises:
            ValueError: a history of another shape.
        """
        check_is_fitted(self)
        history = torch.as_tensor(history, dtype=torch.float64).to(self.weights_.device)
        if history.shape[-2:] != (self.delays, self.n_features_in_) or history.dim() not in (2, 3):
            raise ValueError(
                f"expected history (..., {self.delays}, {self.n_features_in_}), got {tuple(history.shape)}"
            )
        batch = history if history.dim() == 3 else history[None]
        u = (batch - self.center_) / self.scale_
        window, out = u.flip(1).flatten(1), []  # newest first
        c = u.shape[2]
        for _ in range(check_positive_int(steps, "steps")):
            now = window[:, :c] + self._features(window) @ self.weights_
            now = now.clamp(-1e3, 1e3)  # a run that has escaped stays finite
            out.append(now)
            window = torch.cat([now, window[:, :-c]], 1)
        path = torch.stack(out, 1) * self.scale_ + self.center_
        return path if history.dim() == 3 else path[0]


def forecast_horizon(truth: Any, forecast: Any, tolerance: float = 0.4) -> Tensor:
    r"""Return how many steps a forecast stays close: until the error exceeds the tolerance for the first time.

    The error is the distance over the standard deviation of the truth,
    $\lVert \hat x_t - x_t \rVert / \sqrt{\sum_c \mathrm{Var}(x_c)}$.

    Args:
        truth: (b, steps, c).
        forecast: (b, steps, c).
        tolerance: in standard deviations.

    Returns:
        (b,), between 0 and steps.

    Raises:
        ValueError: shapes that differ.

    >>> truth = torch.tensor([[[0.0], [1.0], [0.0], [1.0]]])
    >>> forecast_horizon(truth, truth + torch.tensor([0.0, 0.0, 1.0, 0.0])[:, None])
    tensor([2])

    Paper: gilpin2021chaos
    Chapter: dimensionality/intrinsic-dimension
    """
    truth, forecast = torch.as_tensor(truth), torch.as_tensor(forecast)
    if truth.shape != forecast.shape or truth.dim() != 3:
        raise ValueError(f"expected two (b, steps, c), got {tuple(truth.shape)} and {tuple(forecast.shape)}")
    tolerance = check_in_range(tolerance, "tolerance", 0, inclusive="neither")
    spread = truth.var((0, 1)).sum().sqrt()
    error = torch.linalg.vector_norm(forecast - truth, dim=2) / spread
    bad = ~(error <= tolerance)  # NaN counts as off
    return torch.where(bad.any(1), bad.int().argmax(1), truth.shape[1])
