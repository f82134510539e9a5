"""Clip, softplus, guidance and the affine map: plain MLX against the formula, the kernels against plain MLX."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_starflow.kernels.affine import GUIDANCE_MODES, LEAST_SCALE, AffineMap, affine_forward, affine_inverse, predict
from mlx_starflow.sampling import guidance

WEIGHT = 1.7
BOUND = 4e-6 if mx.metal.is_available() else 1e-6
"""Difference of the kernel from plain MLX, relative to the terms. Metal's own exp, log and tanh are good to 4 ulp."""

SHAPES = [(1, 1, 1), (2, 1, 16), (3, 7, 5), (1, 37, 11)]
DTYPES = [mx.float32, mx.float16, mx.bfloat16]
PARAMETRIZATIONS = [(0.0, False), (0.0, True), (4.0, False), (4.0, True)]
GUIDED = [(None, "ab"), ("starflow", "ab"), ("tarflow", "ab"), ("tarflow", "a"), ("tarflow", "b"), ("itarflow", "ab")]


def normal(key: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(key))


def draw_parameters(batch: int, length: int, channels: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return (2 * normal(0, batch, length, 2 * channels)).astype(dtype)


def annealed(batch: int, length: int, per_sample: bool) -> mx.array:
    weights = WEIGHT * mx.arange(1, length + 1)[None, :, None] / length
    return (
        mx.broadcast_to(weights, (batch, length, 1)) * mx.arange(1, batch + 1).reshape(-1, 1, 1)
        if per_sample
        else weights
    )


def numpy_map(parameters: mx.array, clip: float, softplus: bool) -> tuple[np.ndarray, np.ndarray]:
    """(mu, log sigma) in double precision."""
    values = np.array(parameters.astype(mx.float32), np.float64)
    if clip:
        values = clip * np.tanh(values / clip)
    scale, mu = np.split(values, 2, axis=-1)
    return mu, np.log(np.log1p(np.exp(scale + math.log(math.e - 1)))) if softplus else scale


def sizes(
    parameters: mx.array, clip: float, softplus: bool, mode: str | None, weight: float | mx.array = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """How large the terms are that a token's mu and its log sigma are sums of, at least 1."""
    exact = numpy_map(parameters, clip, softplus)
    mu, log_sigma = (np.maximum(np.abs(part), 1) for part in exact)
    if mode is None:
        return mu, log_sigma
    both = [(1 + 3 * WEIGHT) * sum(np.split(part, 2)) for part in (mu, log_sigma)]
    if mode == "itarflow":  # the logarithm of a difference, which may be small
        own, null = np.split(exact[1], 2)
        taken = np.array(weight) * np.exp(null - own)
        both[1] = both[1] * (1 + taken / np.maximum(1 + np.array(weight) - taken, LEAST_SCALE))
    return both[0], both[1]


def check(actual: mx.array, expected: mx.array, size: np.ndarray) -> None:
    assert actual.dtype == expected.dtype == mx.float32 and actual.shape == expected.shape
    assert (np.abs(np.array(actual, np.float64) - np.array(expected, np.float64)) <= BOUND * size).all()


@pytest.mark.parametrize(("clip", "softplus"), PARAMETRIZATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_version_is_the_formula(clip, softplus, dtype):
    parameters, x = draw_parameters(2, 5, 3, dtype), normal(1, 2, 5, 3)
    mu, log_sigma = numpy_map(parameters, clip, softplus)
    z, log_det = affine_forward(parameters, x, AffineMap(clip, softplus))
    assert z.dtype == log_det.dtype == mx.float32
    assert np.abs(np.array(log_det) + log_sigma).max() < 2e-6
    expected = (np.array(x) - mu) * np.exp(-log_sigma)
    assert (np.abs(np.array(z) - expected) <= 2e-5 * np.maximum(np.abs(expected), 1)).all()
    back = affine_inverse(parameters, z, AffineMap(clip, softplus))
    assert np.abs(np.array(back - x)).max() < 2e-5
    for actual, wanted in zip(predict(parameters, AffineMap(clip, softplus)), (mu, log_sigma), strict=True):
        assert np.abs(np.array(actual) - wanted).max() < 2e-6


@pytest.mark.parametrize("weight", [WEIGHT, "annealed"])
def test_guidance_is_that_of_the_samplers(weight):
    parameters, z = draw_parameters(4, 5, 3), normal(1, 2, 5, 3)
    weight = annealed(2, 5, False) if weight == "annealed" else weight
    with_condition, without = (predict(half, AffineMap(4.0, True)) for half in mx.split(parameters, 2))
    for name, target in GUIDED[1:]:
        mu, log_sigma = guidance.guidance_function(name, target)(*with_condition, *without, weight)
        actual = predict(parameters, AffineMap(4.0, True), name, weight, target)
        assert np.array_equal(np.array(actual[0]), np.array(mu))
        assert np.array_equal(np.array(actual[1]), np.array(log_sigma))
        x = affine_inverse(parameters, z, AffineMap(4.0, True), name, weight, target)
        assert np.array_equal(np.array(x), np.array(z * mx.exp(log_sigma) + mu))


@pytest.mark.parametrize(("clip", "softplus"), PARAMETRIZATIONS)
def test_forward_kernel_is_the_plain_version(kernels_on, clip, softplus):
    for dtype in DTYPES:
        for batch, length, channels in SHAPES:
            parameters, x = draw_parameters(batch, length, channels, dtype), normal(1, batch, length, channels)
            with kernels_on():
                z, log_det = affine_forward(parameters, x, AffineMap(clip, softplus))
            expected = affine_forward(parameters, x, AffineMap(clip, softplus))
            mean, scale = sizes(parameters, clip, softplus, None)
            check(log_det, expected[1], scale)
            inverse = np.exp(np.array(expected[1], np.float64))
            check(z, expected[0], scale * (np.abs(np.array(x)) + mean) * inverse)


@pytest.mark.parametrize(("mode", "target"), GUIDED)
@pytest.mark.parametrize(("clip", "softplus"), PARAMETRIZATIONS)
def test_inverse_kernels_are_the_plain_versions(kernels_on, clip, softplus, mode, target):
    for number, (batch, length, channels) in enumerate(SHAPES):
        parameters = draw_parameters(batch * (2 if mode else 1), length, channels, DTYPES[(number + 1) % 3])
        z = normal(1, batch, length, channels)
        weights = (WEIGHT, annealed(batch, length, False), annealed(batch, length, True))
        arguments = (AffineMap(clip, softplus), mode, weights[number % 3], target)
        with kernels_on():
            mu, log_sigma = predict(parameters, *arguments)
            x = affine_inverse(parameters, z, *arguments)
        expected = predict(parameters, *arguments)
        mean, scale = sizes(parameters, clip, softplus, mode, arguments[2])
        check(mu, expected[0], mean)
        check(log_sigma, expected[1], scale)
        sigma = np.exp(np.array(expected[1], np.float64))
        check(x, affine_inverse(parameters, z, *arguments), mean + np.abs(np.array(z)) * sigma * scale)


@pytest.mark.parametrize(("clip", "softplus"), PARAMETRIZATIONS)
def test_extreme_outputs(kernels_on, clip, softplus):
    """No overflow in between, and a NaN stays one."""
    values = [0.0, -0.0, 1e-30, 20.0, -20.0, 88.0, -60.0, 1e4, 1e30, -1e30, math.inf, -math.inf, math.nan]
    grid = np.array([(a, b) for a in values for b in values], np.float32)
    parameters = mx.array(np.concatenate([grid, grid[::-1]])[:, None])
    z = mx.ones((len(grid), 1, 1))
    for mode in (None, *GUIDANCE_MODES):
        part = parameters if mode else parameters[: len(grid)]
        arguments = (AffineMap(clip, softplus), mode, WEIGHT)
        with kernels_on():
            actual = [*predict(part, *arguments), affine_inverse(part, z, *arguments)]
        expected = [*predict(part, *arguments), affine_inverse(part, z, *arguments)]
        if not mode:
            assert np.isfinite(np.array(predict(mx.array([[[1e4, 1e4]]]), AffineMap(clip, softplus)))).all()
        mu = np.abs(np.array(expected[0]))
        for found, wanted in zip(map(np.array, actual), map(np.array, expected), strict=True):
            assert np.array_equal(np.isnan(found), np.isnan(wanted))
            with np.errstate(invalid="ignore"):
                # z * sigma + mu may be the small difference of large numbers.
                good = np.isclose(found, wanted, 1e-5, 1e-5, equal_nan=True) | (np.abs(found - wanted) <= 1e-5 * mu)
            assert good.all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mode", "target"), GUIDED)
def test_gradients_are_those_of_the_plain_version(kernels_on, mode, target, dtype):
    parameters, x = draw_parameters(2 if mode is None else 4, 3, 5, dtype), normal(1, 2, 3, 5)
    weight = annealed(2, 3, False)
    cotangents = [normal(key, 2, 3, 5) for key in (2, 3)]

    def gradients() -> list[mx.array]:
        arguments = (AffineMap(4.0, True), mode, weight, target)
        found = mx.vjp(
            lambda parameters, x: affine_inverse(parameters, x, *arguments), [parameters, x], cotangents[:1]
        )[1]
        found += mx.vjp(lambda parameters: list(predict(parameters, *arguments)), [parameters], cotangents)[1]
        if mode is None:
            found += mx.vjp(
                lambda parameters, x: list(affine_forward(parameters, x, AffineMap(4.0, True))),
                [parameters, x],
                cotangents,
            )[1]
        return found

    with kernels_on():
        actual = gradients()
    for gradient, wanted in zip(actual, gradients(), strict=True):
        assert gradient.dtype == wanted.dtype
        assert np.array_equal(np.array(gradient.astype(mx.float32)), np.array(wanted.astype(mx.float32)))
    with kernels_on():
        first = mx.grad(lambda parameters: predict(parameters, AffineMap(4.0, True))[1].sum())
        second = mx.grad(lambda parameters: mx.square(first(parameters)).sum())(parameters)
    assert mx.isfinite(second).all().item()
