"""A Gaussian process over skip vectors, and the point it would like scored next (SWIFT, arXiv 2410.06916, §4.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# The variance of a score around the function it samples, in units of the scores' own variance.
NOISE: Final = 1e-2
LENGTH_SCALES: Final = (0.05, 50.0)
_GRID: Final = 12
_REFINEMENTS: Final = 12
_RANDOM_POINTS: Final = 256
_STARTS: Final = 12
_STEPS: Final = 60


@dataclass(frozen=True, eq=False)
class GaussianProcess:
    """The posterior given n scored points, with a Matérn kernel of ν = 2.5 and variance 1 over normalised targets.

    `mean`, `scale`: of the targets. `inverse`: of the kernel matrix with noise; `weights`: its product with the
    normalised targets.
    """

    points: Array  # [n, D]
    mean: float
    scale: float
    length_scale: float
    inverse: Array  # [n, n]
    weights: Array  # [n]

    def predict(self, points: Array) -> tuple[Array, Array]:
        """Mean and standard deviation [m] of the function (without noise) at points [m, D], in the targets' units."""
        kernel = _matern(_distances(points, self.points) / self.length_scale)
        deviation = np.sqrt(_variance(kernel, kernel @ self.inverse))
        return self.mean + self.scale * (kernel @ self.weights), self.scale * deviation

    def upper_bound(self, points: Array, kappa: float) -> tuple[Array, Array]:
        """mean + kappa·std [m] at points [m, D] in the targets' units, and its gradients [m, D]."""
        stretched = _distances(points, self.points) / self.length_scale
        kernel = _matern(stretched)
        # The factor of (x - y) in the kernel's gradient by x.
        slope = -5 / (3 * self.length_scale**2) * (1 + stretched) * np.exp(-stretched)
        explained = kernel @ self.inverse
        deviation = np.sqrt(_variance(kernel, explained))
        pull = (self.weights - kappa * explained / deviation[:, None]) * slope
        gradient = pull.sum(1, keepdims=True) * points - pull @ self.points
        return self.mean + self.scale * (kernel @ self.weights + kappa * deviation), self.scale * gradient


def fit(points: Array, targets: Array, length_scale: float | None = None) -> GaussianProcess:
    """The process given targets [n] at points [n, D], n ≥ 1; without a length scale, the most likely one."""
    distances = _distances(points, points)
    mean, scale = _location(targets)
    normalised = (targets - mean) / scale
    if length_scale is None:
        length_scale = _most_likely(distances, normalised)
    inverse = np.asarray(np.linalg.inv(_covariance(distances, length_scale)), dtype=np.float64)
    return GaussianProcess(points, mean, scale, length_scale, inverse, inverse @ normalised)


def suggest(points: Array, targets: Array, rng: np.random.Generator, *, kappa: float = 2.5) -> Array:
    """The point [D] of [0, 1]^D with the highest upper confidence bound that is found, given targets [n] at [n, D].

    Projected gradient ascent from the best of random points, random corners and the points with the highest targets.
    """
    process = fit(points, targets)
    dimensions = points.shape[1]
    inner = rng.random((_RANDOM_POINTS, dimensions))
    corners = np.round(rng.random((_RANDOM_POINTS, dimensions)))
    best = points[np.argsort(-targets, kind="stable")[:_STARTS]]
    starts = np.concatenate([best, inner, corners])
    mean, deviation = process.predict(starts)
    order = np.argsort(-(mean + kappa * deviation), kind="stable")
    return _ascend(process, starts[order[:_STARTS]], kappa)


def _ascend(process: GaussianProcess, points: Array, kappa: float) -> Array:
    """The best point reached from any of `points`, each with its own step: longer after a gain, shorter after none."""
    values, gradients = process.upper_bound(points, kappa)
    steps = np.full(len(points), 0.5)
    for _ in range(_STEPS):
        longest = np.maximum(np.abs(gradients).max(1), np.finfo(float).tiny)
        moved = np.minimum(np.maximum(points + (steps / longest)[:, None] * gradients, 0.0), 1.0)
        moved_values, moved_gradients = process.upper_bound(moved, kappa)
        gained = moved_values > values
        points = np.where(gained[:, None], moved, points)
        gradients = np.where(gained[:, None], moved_gradients, gradients)
        values = np.where(gained, moved_values, values)
        steps = np.where(gained, 1.5 * steps, 0.4 * steps)
    return points[np.argmax(values)]


def _most_likely(distances: Array, targets: Array) -> float:
    """The length scale of the highest likelihood: the best of a logarithmic grid, refined by golden section."""
    grid = np.linspace(math.log(LENGTH_SCALES[0]), math.log(LENGTH_SCALES[1]), _GRID)

    def likelihood(log_scale: float) -> float:
        return _likelihood(distances, targets, math.exp(log_scale))

    best = int(np.argmax([likelihood(float(log_scale)) for log_scale in grid]))
    low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, _GRID - 1)])
    golden = (math.sqrt(5) - 1) / 2
    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = likelihood(left), likelihood(right)
    for _ in range(_REFINEMENTS):
        if at_left >= at_right:
            high, right, at_right = right, left, at_left
            left = high - golden * (high - low)
            at_left = likelihood(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + golden * (high - low)
            at_right = likelihood(right)
    refined = left if at_left >= at_right else right
    return math.exp(max(float(grid[best]), refined, key=likelihood))


def _likelihood(distances: Array, targets: Array, length_scale: float) -> float:
    """Log density of normalised targets [n] at points with distances [n, n]."""
    n = len(targets)
    # The factor's last row solves for the targets: numpy has no triangular solver. Its corner only has to be positive.
    bordered = np.empty((n + 1, n + 1))
    bordered[:n, :n] = _covariance(distances, length_scale)
    bordered[n, :n] = bordered[:n, n] = targets
    bordered[n, n] = 1 + targets @ targets / NOISE
    factor = np.linalg.cholesky(bordered)
    fit_term = factor[n, :n] @ factor[n, :n]
    return float(-0.5 * (fit_term + n * math.log(2 * math.pi)) - np.log(np.diagonal(factor)[:n]).sum())


def _covariance(distances: Array, length_scale: float) -> Array:
    covariance = _matern(distances / length_scale)
    np.fill_diagonal(covariance, 1 + NOISE)
    return covariance


def _matern(stretched: Array) -> Array:
    return (1 + stretched + stretched * stretched / 3) * np.exp(-stretched)


def _distances(left: Array, right: Array) -> Array:
    """Distances [m, n] between points [m, D] and [n, D], times √5: the kernel knows no others."""
    products: Array = left @ np.transpose(right)
    squares = (left * left).sum(1)[:, None] + (right * right).sum(1) - 2 * products
    return np.sqrt(5 * np.maximum(squares, 0.0))


def _variance(kernel: Array, explained: Array) -> Array:
    # Rounding must not make it negative; the noise keeps the true value far above this.
    return np.maximum(1 - (kernel * explained).sum(1), 1e-12)


def _location(targets: Array) -> tuple[float, float]:
    """Mean and standard deviation, the latter 1 where the targets are constant."""
    deviation = float(targets.std())
    return float(targets.mean()), deviation if deviation > 10 * np.finfo(float).eps else 1.0
