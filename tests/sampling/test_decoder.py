"""The KV cache, a block fed a few tokens at a time, Jacobi's sweeps, and the guidance rules."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny_flows import tiny_case

from mlx_starflow.models.flow import frame_count
from mlx_starflow.sampling import JacobiSettings, SamplingTrace, sample
from mlx_starflow.sampling.cache import KVCache
from mlx_starflow.sampling.decoder import BlockDecoder
from mlx_starflow.sampling.guidance import Guidance, guidance_function, starflow_guidance, tarflow_guidance


def test_cache_keeps_and_trims():
    keys = mx.random.normal((2, 3, 7, 4), key=mx.random.key(0))
    values = mx.random.normal((2, 3, 7, 4), key=mx.random.key(1))
    cache = KVCache(7)
    for start, stop in ((0, 2), (2, 3), (3, 6)):
        k, v = cache.update_and_fetch(keys[:, :, start:stop], values[:, :, start:stop])
        assert cache.offset == stop
        assert np.array_equal(np.array(k), np.array(keys[:, :, :stop]))
        assert np.array_equal(np.array(v), np.array(values[:, :, :stop]))
    cache.trim(4)
    assert cache.offset == 2
    k, v = cache.update_and_fetch(keys[:, :, 4:6], values[:, :, 4:6])
    assert np.array_equal(np.array(k), np.array(mx.concatenate([keys[:, :, :2], keys[:, :, 4:6]], axis=2)))
    assert np.array_equal(np.array(v), np.array(mx.concatenate([values[:, :, :2], values[:, :, 4:6]], axis=2)))
    cache.trim(100)
    assert cache.offset == 0
    k, _ = cache.update_and_fetch(keys[:, :, :1], values[:, :, :1])
    assert np.array_equal(np.array(k), np.array(keys[:, :, :1]))


def decoders(tiny):
    """A decoder of each block, what the block reads (for the decoder) and makes, and log sigma, in its order."""
    out = tiny.flow(tiny.x, tiny.text)
    conditions = tiny.flow.conditions(tiny.x.shape, tiny.text)
    for index, block in enumerate(tiny.flow.blocks):
        if block.is_identity:
            continue
        parts = (out.hidden[index], out.hidden[index + 1], -out.block_log_dets[index])
        frames = frame_count(tiny.x.shape)
        x, z, log_sigma = (block.permute(tiny.flow.tokens(part), frames) for part in parts)
        rope_frequencies, condition = conditions.rope_frequencies[index], conditions.blocks[index]
        decoder = BlockDecoder(block, x.shape[0], x.shape[1], rope_frequencies, condition, None, frames=frames)
        yield decoder, x, np.array(z), np.array(log_sigma)


def test_tokens_can_be_fed_in_any_portions(tiny):
    for decoder, x, z, expected in decoders(tiny):
        length = x.shape[1]
        first = decoder.first
        decoder.begin(x)
        for start, stop in ((first, first + 1), (first + 1, length - 1), (length - 1, length)):
            mu, log_sigma = map(np.array, decoder.predict(start, stop))
            assert np.abs(log_sigma - expected[:, start:stop]).max() < 1e-5
            assert np.abs(mu + z[:, start:stop] * np.exp(log_sigma) - np.array(x)[:, start:stop]).max() < 1e-4
        assert decoder.evaluations == 3
        assert decoder.known == length - first


def test_a_trimmed_decoder_forgets(tiny):
    for decoder, x, _, expected in decoders(tiny):
        first, length = decoder.first, x.shape[1]
        decoder.begin(x + 1)
        decoder.predict(first, length)
        # A start token stays, and so does the text.
        decoder.trim(length - 1)
        assert decoder.known == 1 - first
        decoder.begin(x)
        _, log_sigma = decoder.predict(1, length)
        assert np.abs(np.array(log_sigma) - expected[:, 1:]).max() < 1e-5


@pytest.mark.parametrize("size", [1, 4, 100])
def test_jacobi_is_exact_after_as_many_sweeps_as_tokens(tiny, size):
    flow = tiny.flow
    noise = tiny.noise(flow(tiny.x, tiny.text).z)
    length, frames = flow.tokens(tiny.x).shape[1], frame_count(tiny.x.shape)
    tokens = max(frames * block.sequences(1, length, frames)[1] for block in flow.blocks if not block.config.local)
    # Blocks of a video grow fourfold after the first frame, and the first sweep reads the frame before.
    sweeps = min(size if frame_count(tiny.x.shape) == 1 else 4 * size + 1, tokens)
    settings = JacobiSettings(block_size=size, threshold=0.0, max_iterations=sweeps)
    trace = SamplingTrace()
    x = sample(flow, noise, tiny.text, method=settings, trace=trace)
    assert np.abs(np.array(x - tiny.x)).max() < 2e-4
    assert max(trace.evaluations) <= (2 if frame_count(tiny.x.shape) == 1 else 4) * tokens


def test_jacobi_stops_early():
    tiny = tiny_case("softplus")
    noise = tiny.flow(tiny.x, tiny.text).z
    counts = []
    for threshold in (1.0, 1e-2, 1e-12):
        trace = SamplingTrace()
        settings = JacobiSettings(threshold=threshold)
        sample(tiny.flow, noise, tiny.text, method=settings, trace=trace)
        counts.append(sum(trace.evaluations))
    assert counts[0] < counts[1] < counts[2]


def gaussian(key: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(key))


def test_starflow_guidance_is_the_quotient_of_gaussians():
    """p_cond^(1 + w) / p_null^w, computed by precisions."""
    w = 1.7
    mu, mu_null, log_null = gaussian(0, 50), gaussian(1, 50), gaussian(2, 50)
    log_sigma = log_null - mx.abs(gaussian(3, 50))
    a, b = np.exp(-2 * np.array(log_sigma, np.float64)), np.exp(-2 * np.array(log_null, np.float64))
    precision = (1 + w) * a - w * b
    mean = ((1 + w) * a * np.array(mu) - w * b * np.array(mu_null)) / precision
    guided, log_guided = starflow_guidance(mu, log_sigma, mu_null, log_null, w)
    assert np.abs(np.array(guided) - mean).max() < 1e-4
    assert np.abs(np.array(log_guided) + 0.5 * np.log(precision)).max() < 1e-4


def test_starflow_guidance_is_safe_where_the_condition_is_wider():
    mu, mu_null, log_null = gaussian(0, 50), gaussian(1, 50), gaussian(2, 50)
    log_sigma = log_null + 0.1
    guided, log_guided = starflow_guidance(mu, log_sigma, mu_null, log_null, 2.0)
    assert np.abs(np.array(guided - (3 * mu - 2 * mu_null))).max() < 1e-5
    assert np.abs(np.array(log_guided - log_sigma)).max() < 1e-6


def test_itarflow_guidance():
    mu, mu_null = gaussian(0, 2, 5, 3), gaussian(1, 2, 5, 3)
    log_sigma, log_null = 0.2 * gaussian(2, 2, 5, 3), 0.2 * gaussian(3, 2, 5, 3)
    guided, log_guided = guidance_function("itarflow")(mu, log_sigma, mu_null, log_null, 0.8)
    assert np.abs(np.array(guided - (mu + 0.8 * (mu - mu_null)))).max() < 1e-5
    sigma, null = mx.exp(log_sigma), mx.exp(log_null)
    assert np.abs(np.array(mx.exp(log_guided) - (sigma + 0.8 * (sigma - null)))).max() < 1e-5
    assert np.array_equal(
        np.array(guidance_function("itarflow", "b")(mu, log_sigma, mu_null, log_null, 0.8)[1]), np.array(log_sigma)
    )
    # Where it would turn the sign of sigma, a thousandth stays.
    _, least = guidance_function("itarflow")(mu, log_sigma, mu_null, log_sigma + 3, 0.8)
    assert np.abs(np.array(least - log_sigma) - np.log(1e-3)).max() < 1e-4


def test_tarflow_guidance():
    parts = [gaussian(key, 9) for key in range(4)]
    mu, log_sigma, mu_null, log_null = parts
    moved = (2.5 * mu - 1.5 * mu_null, 2.5 * log_sigma - 1.5 * log_null)
    for target, expected in (("ab", moved), ("b", (moved[0], log_sigma)), ("a", (mu, moved[1]))):
        for combine in (partial(tarflow_guidance, target=target), guidance_function("tarflow", target)):
            for actual, wanted in zip(combine(*parts, 1.5), expected, strict=True):
                assert np.abs(np.array(actual - wanted)).max() < 1e-5
    assert guidance_function("starflow") is starflow_guidance


def test_annealed_weight_grows_to_the_whole():
    guidance = Guidance(starflow_guidance, 3.0, annealed=True)
    weights = mx.concatenate([guidance.at(0, 2, 6), guidance.at(2, 4, 6)], axis=1)
    assert np.abs(np.array(weights)[0, :, 0] - 3.0 * np.arange(1, 7) / 6).max() < 1e-6
    assert Guidance(starflow_guidance, 3.0).at(2, 4, 6) == 3.0
