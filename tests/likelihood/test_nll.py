"""Exact likelihood: what it is made of, its noise, and paired differences."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import message
from helpers.tiny_flows import tiny_case, tiny_flow

from mlx_starflow.likelihood import HALF_LOG_2PI, Nll, exact_nll, standard_error, training_noise
from mlx_starflow.model_dir.quantization import quantize_module


def latents(flow, count: int = 3) -> np.ndarray:
    config = flow.config
    return np.random.default_rng(0).standard_normal((count, 4, 4, config.channel_size)).astype(np.float32)


def text_for(flow, count: int = 3) -> mx.array | None:
    if not flow.config.txt_size:
        return None
    return mx.array(np.random.default_rng(1).standard_normal((count, 3, flow.config.txt_dim)).astype(np.float32))


@pytest.mark.parametrize("family", ["softplus", "exp_all_text", "patches", "no_text", "identity_block"])
def test_it_is_the_flows_likelihood(family):
    flow = tiny_case(family).flow
    x, text = latents(flow), text_for(flow)
    nll = exact_nll(flow, x, text, draws=2, seed=5, batch_size=2)
    expected = []
    for draw in range(2):
        noisy = x + flow.config.noise_std * training_noise(3, x.shape[1:], draw, 5)
        expected.append(np.array(flow(mx.array(noisy), text).nll()) + HALF_LOG_2PI)
    np.testing.assert_allclose(nll.total, np.mean(expected, axis=0), rtol=1e-5, atol=1e-5)
    assert nll.blocks.shape == (3, len(flow.blocks))
    assert nll.mean == pytest.approx(nll.total.mean())
    assert nll.standard_error == pytest.approx(nll.total.std(ddof=1) / math.sqrt(3))


def test_a_new_flow_is_the_prior():
    """With the identity, the likelihood is the normal distribution's, and blocks contribute nothing."""
    flow = tiny_case("softplus").flow
    for block in flow.blocks:
        block.proj_out.weight = mx.zeros_like(block.proj_out.weight)
        block.proj_out.bias = mx.zeros_like(block.proj_out.bias)
    x = latents(flow)
    nll = exact_nll(flow, x, text_for(flow), draws=1)
    noisy = x + flow.config.noise_std * training_noise(3, x.shape[1:], 0)
    log_density = -0.5 * np.square(noisy) - 0.5 * math.log(2 * math.pi)
    np.testing.assert_allclose(nll.total, -log_density.reshape(3, -1).mean(1), rtol=1e-5)
    np.testing.assert_allclose(nll.blocks, 0, atol=1e-6)


def test_noise_is_each_pictures_own():
    noise = training_noise(5, (4, 4, 2), draw=1, seed=3)
    assert noise.dtype == np.float32
    assert np.array_equal(noise[:2], training_noise(2, (4, 4, 2), draw=1, seed=3))
    others = [training_noise(5, (4, 4, 2), 0, 3), training_noise(5, (4, 4, 2), 1, 4), noise[1:]]
    assert not any(np.isclose(noise[: len(other)], other).any(axis=(1, 2, 3)).all() for other in others)
    assert abs(training_noise(50, (16, 16, 4), 0).std() - 1) < 0.01


def test_batches_do_not_matter():
    flow = tiny_case("softplus").flow
    results = [exact_nll(flow, latents(flow), text_for(flow), draws=2, batch_size=size) for size in (1, 2, 16)]
    for other in results[1:]:
        np.testing.assert_allclose(results[0].blocks, other.blocks, atol=1e-5)
        np.testing.assert_allclose(results[0].prior, other.prior, atol=1e-5)


def test_differences_are_paired():
    rng = np.random.default_rng(0)
    first = Nll(rng.normal(size=100), rng.normal(size=(100, 3)))
    second = Nll(first.prior + 0.1, first.blocks + 0.01 * rng.normal(size=(100, 3)))
    change = second - first
    assert change.mean == pytest.approx(second.mean - first.mean)
    assert change.standard_error < 0.02 * first.standard_error
    assert math.isnan(standard_error(np.ones(1)))
    assert str(change) == f"{change.mean:.4f} +- {change.standard_error:.4f} nats per dimension (100 pictures)"


def test_what_cannot_be_scored():
    flow = tiny_case("softplus").flow
    x, text = latents(flow), text_for(flow)
    assert "there are 2 texts for 3 pictures" in message(exact_nll, flow, x, text[:2])
    assert "nothing to score" in message(exact_nll, flow, x[:0], text[:0])
    assert "drawn 1 to 10,000 times" in message(exact_nll, flow, x, text, draws=0)
    assert "reads text" in message(exact_nll, flow, x)
    assert "latents have shape" in message(exact_nll, flow, x[..., :1], text)
    assert "not finite" in message(exact_nll, flow, x * np.nan, text)


def test_quantized_flows_are_scored():
    flow = tiny_flow("wide")
    x = latents(flow)
    text = mx.array(np.random.default_rng(1).standard_normal((3, 4, 64)).astype(np.float32))
    before = exact_nll(flow, x, text)
    quantize_module(flow, 8)
    change = exact_nll(flow, x, text) - before
    assert 0 < np.abs(change.total).max() < 0.01
