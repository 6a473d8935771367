"""The Gaussian process against scikit-learn's, and its suggestions against other optimisers and random search."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import optimize

from skipjack.runtime.gaussian import LENGTH_SCALES, NOISE, Array, _distances, _likelihood, fit, suggest

KAPPA = 2.5


def scored_sets(count: int, dimensions: int, seed: int) -> tuple[Array, Array]:
    """Random sets of 45 % of the dimensions and shares of 32 tokens that depend on them."""
    rng = np.random.default_rng(seed)
    points = np.zeros((count, dimensions))
    for point in points:
        point[rng.permutation(dimensions)[: int(0.45 * dimensions)]] = 1
    effects = rng.normal(size=dimensions)
    return points, np.round(32 / (1 + np.exp(-(points @ effects) / 3))) / 32


def oracle(length_scale: float, optimizer: str | None = None) -> Any:
    process = pytest.importorskip("sklearn.gaussian_process", reason="scikit-learn is not installed")
    kernel = process.kernels.Matern(nu=2.5, length_scale=length_scale, length_scale_bounds=LENGTH_SCALES)
    return process.GaussianProcessRegressor(
        kernel, alpha=NOISE, normalize_y=True, optimizer=optimizer, n_restarts_optimizer=5, random_state=0
    )


def likelihood(points: Array, targets: Array, length_scale: float) -> float:
    normalised = (targets - targets.mean()) / (targets.std() or 1)
    return _likelihood(_distances(points, points), normalised, length_scale)


@pytest.mark.parametrize("length_scale", [0.05, 0.7, 3.0, 12.0, 50.0])
@pytest.mark.parametrize(("count", "dimensions"), [(1, 8), (40, 20), (120, 56)])
def test_posterior_and_likelihood_agree_with_scikit_learn(count: int, dimensions: int, length_scale: float) -> None:
    points, targets = scored_sets(count, dimensions, seed=1)
    expected = oracle(length_scale).fit(points, targets)
    queries = np.concatenate([np.random.default_rng(2).random((50, dimensions)), points[:10]])
    mean, deviation = fit(points, targets, length_scale).predict(queries)
    expected_mean, expected_deviation = expected.predict(queries, return_std=True)
    np.testing.assert_allclose(mean, expected_mean, rtol=0, atol=1e-8)
    np.testing.assert_allclose(deviation, expected_deviation, rtol=1e-6, atol=1e-8)
    ours = likelihood(points, targets, length_scale)
    assert ours == pytest.approx(expected.log_marginal_likelihood_value_, rel=1e-9)


def test_duplicates_and_constant_targets_agree_with_scikit_learn() -> None:
    points, targets = scored_sets(10, 12, seed=3)
    for points_, targets_ in (
        (np.repeat(points, 4, axis=0), np.repeat(targets, 4) + np.tile([0.0, 0.1, 0.0, 0.05], 10)),
        (points, np.full(10, 0.5)),
    ):
        expected_mean, expected_deviation = oracle(2.0).fit(points_, targets_).predict(points, return_std=True)
        mean, deviation = fit(points_, targets_, 2.0).predict(points)
        np.testing.assert_allclose(mean, expected_mean, rtol=0, atol=1e-8)
        np.testing.assert_allclose(deviation, expected_deviation, rtol=1e-6)


def test_rounding_in_constant_targets_is_no_deviation() -> None:
    points, _ = scored_sets(10, 12, seed=3)
    assert np.full(10, 0.3).std() > 0
    mean, deviation = fit(points, np.full(10, 0.3), 2.0).predict(points)
    np.testing.assert_allclose(mean, 0.3)
    np.testing.assert_allclose(deviation, fit(points, np.full(10, 0.5), 2.0).predict(points)[1])


@pytest.mark.parametrize("seed", range(5))
def test_fitted_length_scale_is_as_likely_as_scikit_learns(seed: int) -> None:
    points, targets = scored_sets(30 + 10 * seed, 16, seed)
    expected = oracle(1.0, "fmin_l_bfgs_b").fit(points, targets)
    fitted = fit(points, targets).length_scale
    assert LENGTH_SCALES[0] * 0.999 <= fitted <= LENGTH_SCALES[1] * 1.001
    assert likelihood(points, targets, fitted) >= expected.log_marginal_likelihood_value_ - 1e-3


def test_gradient_of_the_upper_bound_against_differences() -> None:
    points, targets = scored_sets(40, 12, seed=4)
    process = fit(points, targets)
    queries = np.concatenate([np.random.default_rng(5).random((10, 12)), points[:5] + 1e-3])
    values, gradients = process.upper_bound(queries, KAPPA)
    mean, deviation = process.predict(queries)
    np.testing.assert_allclose(values, mean + KAPPA * deviation)
    for axis, offset in enumerate(1e-5 * np.eye(12)):
        above, below = (process.upper_bound(moved, KAPPA)[0] for moved in (queries + offset, queries - offset))
        np.testing.assert_allclose(gradients[:, axis], (above - below) / 2e-5, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("count", "dimensions"), [(300, 56), (50, 20), (8, 4)])
def test_suggestion_is_as_good_as_other_optimisers(count: int, dimensions: int) -> None:
    points, targets = scored_sets(count, dimensions, seed=6)
    process = fit(points, targets)
    suggested = suggest(points, targets, np.random.default_rng(0), kappa=KAPPA)
    assert suggested.shape == (dimensions,)
    assert ((suggested >= 0) & (suggested <= 1)).all()
    found = process.upper_bound(suggested[None], KAPPA)[0][0]
    rng = np.random.default_rng(7)
    drawn, _ = process.upper_bound(rng.random((20_000, dimensions)), KAPPA)
    assert found >= drawn.max()

    def cost(point: Array) -> tuple[float, Array]:
        values, gradients = process.upper_bound(point[None], KAPPA)
        return -values[0], -gradients[0]

    bounds = [(0.0, 1.0)] * dimensions
    for _ in range(20):
        other = optimize.minimize(cost, rng.random(dimensions), jac=True, method="L-BFGS-B", bounds=bounds)
        assert found >= -other.fun - 1e-3


def test_one_point_duplicates_and_seeds() -> None:
    points, targets = scored_sets(6, 10, seed=8)
    same = np.repeat(points[:1], 30, axis=0)
    for points_, targets_ in ((points[:1], targets[:1]), (same, np.full(30, 0.5)), (same, np.arange(30) / 30)):
        suggested = suggest(points_, targets_, np.random.default_rng(1))
        assert np.isfinite(suggested).all()
        assert np.array_equal(suggested, suggest(points_, targets_, np.random.default_rng(1)))


def best_score(seed: int, guided: bool, evaluations: int = 30) -> float:
    """The highest share of a hidden set of 9 of 20 found in so many tries."""
    rng = np.random.default_rng(seed)
    hidden = set(rng.permutation(20)[:9])
    points = np.zeros((evaluations, 20))
    scores = np.zeros(evaluations)
    for i in range(evaluations):
        chosen = rng.permutation(20)
        if guided and i >= 5:
            chosen = np.argsort(-suggest(points[:i], scores[:i], rng), kind="stable")
        points[i, chosen[:9]] = 1
        scores[i] = len(hidden & set(chosen[:9])) / 9
    return float(scores.max())


def test_guided_search_beats_random_search() -> None:
    pairs = [(best_score(seed, guided=True), best_score(seed, guided=False)) for seed in range(5)]
    assert all(guided >= random for guided, random in pairs)
    assert np.mean([guided - random for guided, random in pairs]) >= 0.1
