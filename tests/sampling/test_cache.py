"""Keys and values in 8 and 4 bits: what a cache keeps, what sampling makes of it, and what it costs."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.examples import example_module
from helpers.tiny_flows import tiny_case, tiny_flow

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.noise import draw_noise
from mlx_starflow.models.starflow import FlowConfig
from mlx_starflow.sampling import (
    GuidedFlow,
    JacobiSettings,
    RollingSettings,
    SamplingOptions,
    SamplingTrace,
    cache,
    certify,
    sample,
    sample_frames,
)
from mlx_starflow.sampling.cache import QuantizedKVCache, block_kv_bits, check_quantizable


@pytest.fixture
def nothing_recent(monkeypatch):
    """Short sequences are quantized too."""
    monkeypatch.setattr(cache, "RECENT", 2)


def read(rows) -> np.ndarray:
    """What a cache gives, unpacked."""
    parts = []
    if rows.packed is not None:
        parts.append(mx.dequantize(*rows.packed, group_size=rows.group_size, bits=rows.bits))
    return np.array(mx.concatenate([*parts, rows.dense], axis=2))


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.03), (4, 0.4)])
def test_it_keeps_and_trims(nothing_recent, bits, bound):
    a = mx.random.normal((2, 3, 20, 64), key=mx.random.key(0))
    kept = QuantizedKVCache(20, 64, bits)

    def feed(start: int, stop: int) -> None:
        keys, values = kept.update_and_fetch(a[:, :, start:stop], -a[:, :, start:stop])
        assert kept.offset == keys.positions == stop
        off = np.abs(read(keys) - np.array(a[:, :, :stop]))
        assert off.max() < bound
        assert not off[:, :, max(stop - 2, start) :].any()  # the last ones are as they were
        assert np.array_equal(read(values), -read(keys)) or bits == 4

    for start, stop in ((0, 5), (5, 6), (6, 12), (12, 13), (13, 14)):
        feed(start, stop)
    assert kept.update_and_fetch(a[:, :, :1], a[:, :, :1])[0].packed is not None
    kept.trim(1)
    kept.trim(3)
    feed(11, 15)
    kept.trim(13)
    feed(2, 20)
    kept.trim(100)
    assert kept.offset == 0
    feed(0, 4)


def test_a_long_past_is_quantized_as_it_is_read(monkeypatch):
    monkeypatch.setattr(cache, "MOST_DENSE", 100)
    kept = QuantizedKVCache(300, 64, 8)
    keys, _ = kept.update_and_fetch(mx.ones((1, 1, 201, 64)), mx.ones((1, 1, 201, 64)))
    assert (keys.packed_positions, keys.dense.shape[2]) == (201 - cache.RECENT, cache.RECENT)


@pytest.mark.parametrize(("bits", "share"), [(8, 0.55), (4, 0.3)])
def test_bytes_in_half_precision(bits, share):
    kept, length = QuantizedKVCache(16384, 64, bits), 16384
    for _ in range(0, length, 64):
        part = mx.zeros((1, 2, 64, 64), mx.float16)
        kept.update_and_fetch(part, part)
    held = sum(array.nbytes for array in kept.arrays)
    assert held / (2 * 2 * length * 64 * 2) < share


def test_heads_that_cannot_be_quantized():
    with pytest.raises(StarflowError, match="heads of 24 numbers cannot be quantized"):
        QuantizedKVCache(4, 24, 8)
    tiny = tiny_case("modern")
    with pytest.raises(StarflowError, match="heads of 24 numbers"):
        sample(tiny.flow, tiny.x, tiny.text, kv_bits=8)
    with pytest.raises(StarflowError, match="heads of 24 numbers"):
        check_quantizable([block.config for block in tiny.flow.blocks], 4)
    with pytest.raises(
        StarflowError, match=r"in 8 or 4 bits, in \(8, 4\), the null branch's in 4, or 0 as they are, not 5"
    ):
        sample(tiny.flow, tiny.x, tiny.text, kv_bits=5)


def test_small_caches_and_those_of_single_frames_stay_as_they_are():
    released = FlowConfig(32, 4, 1, 3072, [2, 2, 2, 2, 2, 24], txt_size=128, txt_dim=2048)
    assert block_kv_bits(released.blocks, 8) == [0, 0, 0, 0, 0, 8]
    assert block_kv_bits(released.blocks, (8, 4)) == [0, 0, 0, 0, 0, (8, 4)]
    assert block_kv_bits(released.blocks, 0) == [0] * 6
    tarflow = [block.config for block in tiny_flow("tarflow").blocks]
    assert set(block_kv_bits(tarflow, 4)) == {4}
    frames = [block.config for block in tiny_flow("frames").blocks]
    assert block_kv_bits(frames, 8)[:-1] == [0] * (len(frames) - 1)


@pytest.mark.parametrize("family", ["softplus", "exp_all_text", "shifted", "frames"])
@pytest.mark.parametrize("kv_bits", [8, (8, 4)])
@pytest.mark.parametrize("method", ["sequential", JacobiSettings(block_size=2), RollingSettings(window=3)])
def test_samples_are_nearly_those_of_dense_caches(nothing_recent, family, method, kv_bits):
    tiny = tiny_case(family)
    guidance = 1.0
    exact = sample(tiny.flow, tiny.x, tiny.text, tiny.null_text, guidance, method)
    found = sample(tiny.flow, tiny.x, tiny.text, tiny.null_text, guidance, method, kv_bits=kv_bits)
    off = np.abs(np.array(found - exact))
    assert 0 < off.max() < (0.2 if kv_bits == 8 else 1)


@pytest.mark.parametrize("step", [1, 3])
def test_each_branch_has_its_bits(nothing_recent, step):
    """Its part of the network's outputs is that of a cache whose bits are the same for both."""
    tiny = tiny_case("softplus")
    index = len(tiny.flow.blocks) - 1
    z = tiny.flow.noise_tokens(tiny.x)
    inputs = mx.concatenate([z, z])
    found = {}
    for bits in (8, (8, 4), 4):
        guided = GuidedFlow(tiny.flow, tiny.x.shape, tiny.text, tiny.null_text, SamplingOptions(1.0, kv_bits=bits))
        network = guided.decoder(index, *z.shape[:2]).network
        outputs = [network(inputs[:, start : start + step]) for start in range(0, z.shape[1], step)]
        network.trim(2)
        outputs.append(network(inputs[:, -2:]))
        found[bits] = np.array(mx.concatenate(outputs, axis=1))
        assert network.known == z.shape[1]
    half = len(z)
    assert np.abs(found[8] - found[4]).max() > 1e-3
    assert np.abs(found[8, 4][:half] - found[8][:half]).max() < 1e-5
    assert np.abs(found[8, 4][half:] - found[4][half:]).max() < 1e-5


def test_without_guidance_there_is_no_null_branch(nothing_recent):
    tiny = tiny_case("softplus")
    eight, both = (sample(tiny.flow, tiny.x, tiny.text, kv_bits=bits) for bits in (8, (8, 4)))
    assert mx.array_equal(eight, both).item()


def test_a_video_frame_by_frame(nothing_recent):
    """The deep block's cache is quantized, over windows, with what the text is at the front."""
    tiny = tiny_case("frames", batch=1)
    z = mx.array(draw_noise([3], (4, *tiny.x.shape[2:])))
    options = {"text": tiny.text, "null_text": tiny.null_text, "guidance": 1.0}
    for more in ({}, {"window": 3, "context": 1}, {"given": tiny.x[:, :1]}):
        exact = np.concatenate([np.array(part) for part in sample_frames(tiny.flow, z, **options, **more)], axis=1)
        made = sample_frames(tiny.flow, z, **options, **more, kv_bits=8)
        found = np.concatenate([np.array(part) for part in made], axis=1)
        assert 0 < np.abs(found - exact).max() < 0.2, more


# ---- a flow that has learnt something


@pytest.fixture(scope="module")
def kv_cache():
    return example_module("reports/kv_cache.py")


@pytest.fixture(scope="module")
def trained(kv_cache):
    return kv_cache.pictures(kv_cache.trained(4), 4)


@pytest.mark.parametrize(
    ("bits", "nats", "largest", "more"), [(8, 1e-4, 0.05, 1.1), ((8, 4), 1e-4, 0.5, 1.3), (4, 1e-3, 0.6, 1.4)]
)
def test_what_it_costs(kv_cache, trained, bits, nats, largest, more):
    """Exact likelihood, computed as samplers read, the certificate, and evaluations of a window."""
    for step in (1, 64):
        dense, size = kv_cache.cached_nll(trained.flow, trained.data, trained.data_text, 0, step)
        nll, held = kv_cache.cached_nll(trained.flow, trained.data, trained.data_text, bits, step)
        assert abs((nll - dense).mean()) < nats
        assert held < 0.8 * size
    dense, _ = trained.guided_nll(0)
    nll, held = trained.guided_nll(bits)
    assert abs((nll - dense).mean()) < 1e-3
    task = (trained.z[:1], trained.text[:1], trained.null, trained.guidance)
    counts = []
    for own in (0, bits):
        trace = SamplingTrace()
        x = sample(trained.flow, *task, "rolling", kv_bits=own, trace=trace)
        counts.append(sum(trace.evaluations))
    assert certify(trained.flow, x, *task).max < largest
    assert counts[1] <= more * counts[0]


def test_the_likelihood_through_dense_caches_is_that_of_one_pass(kv_cache, trained):
    dense, _ = kv_cache.cached_nll(trained.flow, trained.data, trained.data_text, 0, 64)
    assert dense == pytest.approx(np.array(trained.flow(trained.data, trained.data_text).nll()), abs=1e-5)


def test_decoders_say_what_they_hold(trained):
    guided = GuidedFlow(trained.flow, trained.z.shape, trained.text, None, SamplingOptions(kv_bits=8))
    tokens = trained.flow.noise_tokens(trained.z)
    deep = len(trained.flow.blocks) - 1
    decoder = guided.decoder(deep, 1, tokens.shape[1])
    decoder.begin(tokens[:1])
    held = []
    for _ in range(2):
        decoder.feed(tokens.shape[1])
        held.append(decoder.network.cache_bytes)
        decoder.rewind()
    assert held[0] == held[1]


def test_guidance_of_a_part_of_the_tokens(kv_cache, trained):
    """Of all it is guidance, of none it is none."""
    noise = mx.array(draw_noise(range(2000, 2000 + len(trained.data)), trained.data.shape[1:]))
    none = sample(trained.flow, noise, trained.data_text)
    for share, expected in ((1.0, trained.guided_data), (0.0, none)):
        assert mx.abs(kv_cache.partly_guided(trained, share) - expected).mean().item() < 5e-3
