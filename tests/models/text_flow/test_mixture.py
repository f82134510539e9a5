"""The mixture coupling: exact, invertible, and right in the tails."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_starflow.models.text_flow.mixture import HALF_LOG_2PI, Mixture, log_quantile, log_tails

MIXTURES = [Mixture(5, 1, 1), Mixture(6, 2, 3), Mixture(1, 1, 2), Mixture(40, 1, 4)]


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> mx.array:
    return mx.array(scale * np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def log_normal_cdf(x: float) -> float:
    """log Phi(x) in float64: by erfc, and far out by its asymptotic series."""
    if x > 0:
        return math.log1p(-math.erfc(x / math.sqrt(2)) / 2)
    if x > -10:
        return math.log(math.erfc(-x / math.sqrt(2)) / 2)
    series = 1 - 1 / x**2 + 3 / x**4 - 15 / x**6 + 105 / x**8
    return -(x**2) / 2 - math.log(-x * math.sqrt(2 * math.pi)) + math.log(series)


def test_tails_of_the_normal_distribution():
    x = np.linspace(-40, 40, 4001)
    lower, upper = (np.array(each) for each in log_tails(mx.array(x.astype(np.float32))))
    right = np.array([log_normal_cdf(float(each)) for each in x.astype(np.float32)])
    assert np.max(np.abs(lower - right) / np.abs(right).clip(1e-30)) < 5e-5
    assert np.array_equal(lower, upper[::-1])


def test_the_quantile_inverts_the_tails_where_the_distribution_function_is_0_or_1_in_float32():
    x = np.concatenate([np.linspace(-60, 60, 2401), [1e-4, -1e-4]])
    found = np.array(log_quantile(*log_tails(mx.array(x.astype(np.float32)))))
    assert np.abs(found - x).max() < 2e-5


@pytest.mark.parametrize("mixture", MIXTURES)
def test_inverse(mixture):
    parameters, z = normal(2, 5, mixture.outputs), normal(2, 5, mixture.groups * mixture.size, seed=1)
    x = mixture.inverse(parameters, z)
    again, _ = mixture.forward(parameters, x)
    assert np.abs(np.array(again - z)).max() < 2e-5
    # Also of components far apart, with a gap between them where F stands still.
    log_weights, mean, log_std = mixture.parts(parameters)
    apart = mixture.outputs_of(log_weights, 5 * mean, log_std - 1)
    x = mixture.inverse(apart, z)
    again, _ = mixture.forward(apart, x)
    # x is about 10, and sigma 0.03 at least: rounding one number moves the log-weights of the next by 10^-4.
    assert np.abs(np.array(again - z)).max() < 1e-3


def test_the_inverse_is_exact_where_it_is_well_conditioned():
    mixture = Mixture(3, 1, 1)
    weights, mean = mx.array([[0.5, 0.3, 0.2]]), mx.array([[[-0.5], [0.0], [0.7]]])
    parameters = mixture.outputs_of(mx.log(weights), mean, mx.zeros((1, 3, 1)))[None, None]
    parameters = mx.broadcast_to(parameters, (1, 401, mixture.outputs))
    x = mx.linspace(-4, 4, 401).reshape(1, 401, 1)
    z, _ = mixture.forward(parameters, x)
    assert np.abs(np.array(mixture.inverse(parameters, z) - x)).max() < 4e-6


@pytest.mark.parametrize("scale", [5.0, 20.0, 60.0])
def test_far_tails_stay_finite_and_invertible(scale):
    mixture = Mixture(4, 1, 2)
    parameters, z = normal(3, 7, mixture.outputs), normal(3, 7, 2, seed=2, scale=scale)
    x = mixture.inverse(parameters, z)
    again, log_det = mixture.forward(parameters, x)
    assert np.isfinite(np.array(log_det)).all()
    assert np.abs(np.array(again - z)).max() < 1e-4 * scale
    z, log_det = mixture.forward(parameters, 100 * x)
    assert np.isfinite(np.array(z)).all() and np.isfinite(np.array(log_det)).all()


@pytest.mark.parametrize("mixture", MIXTURES)
def test_the_log_det_is_that_of_the_numerical_jacobian(mixture):
    width = mixture.groups * mixture.size
    parameters, x = normal(1, 1, mixture.outputs), normal(1, 1, width, seed=3)
    _, log_det = mixture.forward(parameters, x)
    step = 1e-2
    rows = []
    for index in range(width):
        move = mx.array(np.eye(width, dtype=np.float32)[index] * step)
        above, below = (mixture.forward(parameters, x + sign * move)[0] for sign in (1, -1))
        rows.append(np.array(above - below)[0, 0].astype(np.float64) / (2 * step))
    _, right = np.linalg.slogdet(np.array(rows))
    assert abs(float(log_det.sum()) - right) < 5e-3


@pytest.mark.parametrize("mixture", MIXTURES)
def test_the_change_of_variables_gives_the_mixture_s_density(mixture):
    parameters, x = normal(2, 3, mixture.outputs), normal(2, 3, mixture.groups * mixture.size, seed=4)
    z, log_det = mixture.forward(parameters, x)
    found = (log_det - 0.5 * mx.square(z) - HALF_LOG_2PI).sum(axis=-1)
    assert np.abs(np.array(found - mixture.log_likelihood(parameters, x))).max() < 5e-5


def test_gradients_are_those_of_differences():
    mixture = Mixture(4, 1, 3)
    parameters, x = normal(1, 2, mixture.outputs), normal(1, 2, 3, seed=5)
    weights = normal(2, 1, 2, 3, seed=6)

    def value(parameters: mx.array, x: mx.array) -> mx.array:
        z, log_det = mixture.forward(parameters, x)
        return (weights[0] * z + weights[1] * log_det).sum()

    gradients = mx.grad(value, argnums=(0, 1))(parameters, x)
    rng = np.random.default_rng(7)
    for which, gradient in enumerate(gradients):
        move = mx.array(rng.standard_normal(gradient.shape).astype(np.float32))
        step, given = 2e-3, [parameters, x]
        ends = []
        for sign in (1, -1):
            given = [parameters, x]
            given[which] = given[which] + sign * step * move
            ends.append(float(value(*given)))
        right = (ends[0] - ends[1]) / (2 * step)
        assert abs(float((gradient * move).sum()) - right) < 1e-2 * max(1, abs(right))
