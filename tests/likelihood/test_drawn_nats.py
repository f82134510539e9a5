"""Likelihood token by token: its sum, its order, its log-determinants, and the noise it is about."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny_flows import tiny_flow

from mlx_starflow.likelihood.nll import (
    HALF_LOG_2PI,
    bits_per_dimension,
    drawn_nats,
    noise_and_nats,
    token_nats,
    training_noise,
    with_noise,
)
from mlx_starflow.models.tarflow import PixelFlow, TarFlow, TarFlowConfig


def log_det(tiny) -> float:
    """Of the first sample, summed over dimensions."""
    out = tiny.flow(tiny.x[:1], None if tiny.text is None else tiny.text[:1])
    return float(np.array(out.log_det, np.float64).sum())


def jacobian(tiny) -> np.ndarray:
    """dz/dx of the first sample by five-point differences, `[D, D]`."""
    point = np.array(tiny.x[:1])
    text = None if tiny.text is None else mx.repeat(tiny.text[:1], point.size, axis=0)
    step = 2e-2
    moves = step * np.eye(point.size, dtype=np.float32).reshape(-1, *point.shape[1:])

    def z(x: np.ndarray) -> np.ndarray:
        return np.array(tiny.flow(mx.array(x), text).z, np.float64)

    near, far = ((z(point + k * moves) - z(point - k * moves)) / (2 * k * step) for k in (1, 2))
    return ((4 * near - far) / 3).reshape(point.size, -1).T


def test_log_dets_are_those_of_the_jacobian(tiny):
    sign, expected = np.linalg.slogdet(jacobian(tiny))
    assert sign != 0
    assert log_det(tiny) == pytest.approx(expected, abs=1e-3)


def test_tokens_sum_to_the_likelihood(tiny):
    nats = token_nats(tiny.flow, tiny.x, tiny.text)
    out = tiny.flow(tiny.x, tiny.text)
    noise = np.array(tiny.noise(out.z), np.float64).reshape(len(tiny.x), -1)
    variance = np.array(tiny.flow.var, np.float64) if isinstance(tiny.flow, PixelFlow) else np.ones(1)
    jacobian = np.array(out.log_det, np.float64).reshape(len(tiny.x), -1).sum(axis=1) - 0.5 * np.log(variance).sum()
    expected = 0.5 * np.square(noise).sum(axis=1) + noise.shape[1] * HALF_LOG_2PI - jacobian
    np.testing.assert_allclose(nats.sum(axis=(1, 2)), expected, rtol=1e-5, atol=1e-4)
    assert nats.shape[:2] == (len(tiny.x), 1 + len(tiny.flow.blocks))


def test_noise_and_nats_are_one_pass(tiny):
    z, nats = noise_and_nats(tiny.flow, tiny.x, tiny.text)
    expected = tiny.noise(tiny.flow(tiny.x, tiny.text).z)
    if not isinstance(tiny.flow, PixelFlow):
        expected = tiny.flow.tokens(expected)
    np.testing.assert_array_equal(np.array(z), np.array(expected))
    np.testing.assert_array_equal(nats, token_nats(tiny.flow, tiny.x, tiny.text))


@pytest.mark.parametrize("flip", [True, False])
def test_tokens_are_in_the_pictures_order(flip):
    """One block reads its tokens last to first (or first to last): the token it reads last changes only itself."""
    flow = tiny_flow(layers_per_block=[1], seq_order="L2R" if flip else "R2L", txt_size=0, txt_dim=0)
    assert flow.blocks[0].config.flip == flip
    x = np.random.default_rng(0).standard_normal((1, 4, 4, 4)).astype(np.float32)
    moved = x.copy()
    last_read, first_read = ((0, 0), (3, 3)) if flip else ((3, 3), (0, 0))
    moved[0][last_read] += 1
    before, after = (token_nats(flow, mx.array(each)).sum(axis=1).reshape(4, 4) for each in (x, moved))
    changed = np.abs(after - before) > 1e-5
    assert changed[last_read] and changed.sum() == 1
    moved = x.copy()
    moved[0][first_read] += 1
    after = token_nats(flow, mx.array(moved)).sum(axis=1).reshape(4, 4)
    assert (np.abs(after - before) > 1e-5).sum() > 8


def test_noise_follows_from_the_pictures_number():
    noise = training_noise(3, (2, 2, 1), draw=1, seed=4)
    assert np.array_equal(training_noise(2, (2, 2, 1), 1, 4, numbers=[2, 0]), noise[[2, 0]])
    flow = tiny_flow(txt_size=0, txt_dim=0)
    x = np.random.default_rng(0).standard_normal((3, 4, 4, 4)).astype(np.float32)
    nats = drawn_nats(flow, x, draws=2)
    assert nats.shape == (2, 3, 3, 16)
    np.testing.assert_allclose(drawn_nats(flow, x[2:], draws=2, numbers=[2])[:, 0], nats[:, 2], rtol=1e-5, atol=1e-4)
    assert np.abs(nats[0] - nats[1]).max() > 0.1


def pixel_flow(**changes: object) -> TarFlow:
    values = {"img_size": 4, "channel_size": 3, "patch_size": 2, "channels": 32, "blocks": 2, "layers_per_block": 1}
    return TarFlow(TarFlowConfig(**{**values, "head_dim": 16, **changes}))


def test_dequantization_stays_within_the_level():
    flow = pixel_flow(noise_type="uniform")
    levels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3))
    noisy = with_noise(flow, (levels / 127.5 - 1).astype(np.float32), draw=3)
    assert noisy.dtype == np.float32
    np.testing.assert_array_equal(np.floor((noisy + 1) * 128), levels)
    spread = (noisy + 1) * 128 - levels
    assert 0 <= spread.min() < 0.1 and 0.9 < spread.max() < 1
    gaussian = with_noise(pixel_flow(noise_std=0.5), np.zeros((20, 4, 4, 3), np.float32), draw=0)
    assert gaussian.std() == pytest.approx(0.5, rel=0.1)


def test_bits_per_dimension():
    """Pixels that are equally likely to have any level take 8 bits."""
    assert bits_per_dimension(math.log(2)) == pytest.approx(8)
    assert bits_per_dimension(math.log(2 / 256)) == pytest.approx(0)
