"""A block's network in C++ against the same in MLX."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map_with_path

from mlx_starflow import cpu
from mlx_starflow.cpu.network import MOST_ROWS, NativeNetwork, Unsuitable
from mlx_starflow.model_dir.adapters import AdaptedLinear
from mlx_starflow.model_dir.quantization import quantize_module
from mlx_starflow.models.flow import BlockConfig, Condition, FlowBlock
from mlx_starflow.models.tarflow import TarFlowBlock, TarFlowBlockConfig
from mlx_starflow.sampling.network import CompiledNetwork, cached_network

pytestmark = pytest.mark.skipif(not cpu.has_fast_networks(), reason="there is no compiler, or no Linux CPU")

LENGTH, PREFIX = 40, 5
PLAIN = {"channels": 64, "head_dim": 32, "num_heads": 2, "num_kv_heads": 2}
MODERN = {**PLAIN, "num_kv_heads": 1, "norm_type": "rms_norm", "use_swiglu": True, "use_qk_norm": True}
CONFIGS = {
    "plain": PLAIN,
    "modern": MODERN,
    "language_model": {**MODERN, "use_post_norm": True, "use_bias": False, "hf_style_rope": True},
    "odd": {"channels": 37, "head_dim": 16, "num_heads": 6, "num_kv_heads": 3, "expansion": 3, "use_final_norm": True},
    "wide_heads": {"channels": 48, "head_dim": 80, "num_heads": 3, "num_kv_heads": 3, "use_post_norm": True},
    "text": {**MODERN, "txt_dim": 7, "use_final_norm": True},
    "no_rotation": {**PLAIN, "hf_style_rope": False},
    "tarflow": PLAIN,
    "tarflow_vp": {**PLAIN, "flip": True, "nvp": False},
}


def draw(key: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(key))


def make(name: str) -> FlowBlock:
    mx.random.seed(0)
    options = {"in_channels": 3, "num_layers": 2, **CONFIGS[name]}
    if name.startswith("tarflow"):
        block = TarFlowBlock(TarFlowBlockConfig(num_patches=LENGTH, num_classes=4, **options))
    else:
        block = FlowBlock(BlockConfig(**options))
    # Weights of 0 and of 1 would hide mistakes.
    block.update(tree_map_with_path(lambda path, w: w + 0.1 * draw(len(path) + w.size, *w.shape), block.parameters()))
    return block


def networks(name: str, batch: int = 2, block: FlowBlock | None = None) -> list:
    """The one in C++ and MLX's, of the same block and condition."""
    block = block or make(name)
    text = draw(1, batch, PREFIX, 7) if block.config.txt_dim else None
    labels = mx.arange(batch) % 4 if name.startswith("tarflow") else None
    condition = block.condition(labels if text is None else text, batch)
    positions = LENGTH if text is None else PREFIX + LENGTH
    rope_frequencies = None
    if name not in ("tarflow", "tarflow_vp", "no_rotation"):
        angles = draw(2, positions, block.config.head_dim // 2)
        rope_frequencies = mx.cos(angles) + 1j * mx.sin(angles)
    temperature = mx.array([0.8, 1.3] * (batch // 2)).reshape(-1, 1, 1, 1) if batch > 1 else 1.2
    arguments = (block, batch, LENGTH, rope_frequencies, condition, temperature)
    return [cpu.fast_network(*arguments), CompiledNetwork(*arguments)]


def run(network, tokens: mx.array) -> np.ndarray:
    return np.array(network(tokens))


@pytest.mark.parametrize("name", CONFIGS)
def test_it_computes_what_mlx_does(name):
    x = draw(3, 2, LENGTH, 3)
    in_cpp, in_mlx = networks(name)
    for start, stop in ((0, 1), (1, 2), (2, 5), (5, 22), (22, LENGTH)):
        actual, expected = (run(network, x[:, start:stop]) for network in (in_cpp, in_mlx))
        assert actual.shape == expected.shape and actual.dtype == np.float32
        assert np.abs(actual - expected).max() < 1e-5 * max(1, np.abs(expected).max())
        assert in_cpp.known == in_mlx.known == stop


@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_does_not_see_what_is_evaluated_with_it(name):
    """One at a time or all at once, the numbers are the same to the last bit: so a residual that was measured holds."""
    x = draw(3, 2, LENGTH, 3)
    one, many = networks(name)[0], networks(name)[0]
    tokens = np.concatenate([run(one, x[:, n : n + 1]) for n in range(LENGTH)], axis=1)
    assert np.array_equal(tokens, run(many, x))


def test_many_rows_and_long_texts_go_in_parts():
    batch = 8
    assert batch * LENGTH > MOST_ROWS
    x = draw(3, batch, LENGTH, 3)
    actual, expected = (run(network, x) for network in networks("text", batch))
    assert np.abs(actual - expected).max() < 1e-5 * np.abs(expected).max()


def test_trimmed_tokens_are_forgotten():
    x, other = draw(3, 2, LENGTH, 3), draw(4, 2, LENGTH, 3)
    network, fresh = networks("text")[0], networks("text")[0]
    network.remember(other)
    network.trim(LENGTH - 3)
    assert network.known == 3
    network.trim(3)
    assert np.array_equal(run(network, x), run(fresh, x))


def test_more_tokens_than_there_is_room_for():
    network = networks("plain")[0]
    with pytest.raises(ValueError):
        run(network, draw(3, 2, LENGTH + 1, 3))


def test_several_callers_at_once():
    x = draw(3, 2, LENGTH, 3)
    pieces = [x[:, n : n + 2] for n in range(0, LENGTH, 2)]
    mx.eval(pieces)
    block = make("modern")
    callers = [networks("modern", block=block)[0] for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda network: [np.array(network(tokens)) for tokens in pieces], callers))
    assert all(np.array_equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def test_infinite_guesses_stay_where_they_are():
    x = np.array(draw(3, 2, LENGTH, 3))
    network, fresh = networks("plain")[0], networks("plain")[0]
    expected = run(fresh, mx.array(x))
    x[:, 21:] = np.inf
    actual = run(network, mx.array(x))
    assert np.array_equal(actual[:, :20], expected[:, :20])
    assert not np.isfinite(actual[:, 21:]).any()


@pytest.mark.parametrize("how", ["8", "6", "4"])
@pytest.mark.parametrize("group_size", [32, 64])
def test_quantized_weights(how, group_size):
    block = make("modern")
    quantize_module(block, how, group_size)
    x = draw(3, 2, LENGTH, 3)
    for start, stop in ((0, 1), (1, LENGTH)):
        actual, expected = (run(network, x[:, start:stop]) for network in networks("modern", block=block))
        assert np.abs(actual - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(run(networks("modern")[0], x[:, :1]) - run(networks("modern", block=block)[0], x[:, :1])).max() > 1e-4


def floating_point_quantization() -> FlowBlock:
    block = FlowBlock(BlockConfig(in_channels=3, num_layers=1, **PLAIN))
    quantize_module(block, "mxfp4")
    return block


def half() -> FlowBlock:
    block = make("plain")
    block.set_dtype(mx.bfloat16)
    return block


def other_layer() -> FlowBlock:
    class Other(nn.Linear):
        pass

    block = make("plain")
    block.attn_blocks[1].attention.proj = Other(64, 64)
    return block


def narrow_heads() -> FlowBlock:
    return FlowBlock(BlockConfig(in_channels=3, num_layers=1, channels=24, head_dim=8, num_heads=3, num_kv_heads=3))


def test_adapters_are_added_to_the_weights():
    block = make("modern")
    for parent, name in ((block.attn_blocks[0].attention, "qkv"), (block.attn_blocks[1].mlp, "down_proj")):
        outputs, inputs = parent[name].weight.shape
        parent[name] = AdaptedLinear(parent[name])
        parent[name].add(draw(5, inputs, 3), 0.1 * draw(6, 3, outputs), 0.1 * draw(7, outputs))
    x = draw(3, 2, LENGTH, 3)
    plain = run(networks("modern")[0], x)
    actual, expected = (run(network, x) for network in networks("modern", block=block))
    assert np.abs(actual - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(actual - plain).max() > 0.01


@pytest.mark.parametrize("block", [floating_point_quantization, half, other_layer, narrow_heads])
def test_mlx_computes_what_cpp_does_not_know(block):
    block = block()
    arguments = (block, 1, 4, None, Condition(), 1.0)
    with pytest.raises(Unsuitable):
        NativeNetwork(*arguments)
    network = cached_network(*arguments)
    assert isinstance(network, CompiledNetwork)
    assert np.isfinite(np.array(network(mx.zeros((1, 1, 3))).astype(mx.float32))).all()


def test_the_cache_is_counted():
    network = networks("text")[0]
    config = make("text").config
    assert network.cache_bytes == 2 * 2 * 2 * (PREFIX + LENGTH) * config.num_kv_heads * config.head_dim * 4
