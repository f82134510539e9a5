"""Quantized layers: settings, round trips, the mixed recipe, and dense again."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers.commands import message
from helpers.model_directories import config_of, edit_config, same
from helpers.tiny_flows import tiny_flow
from mlx.utils import tree_flatten

from mlx_starflow.model_dir.directory import load_flow
from mlx_starflow.model_dir.quantization import QUANTIZATIONS, dequantize_module, quantize_module, quantized_layers
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.weights import parameters, parse_dtype
from mlx_starflow.models.flow import is_layer_weight
from mlx_starflow.models.starflow import STARFlow
from mlx_starflow.models.t5 import T5Config, T5Encoder

ON_CPU = mx.default_device().type == mx.cpu


def deep_flow() -> STARFlow:
    """Wide enough to be quantized, with shallow blocks and a deep one."""
    return tiny_flow("wide", layers_per_block=[1, 2, 3])


def close(first: mx.array, second: mx.array, tolerance: float) -> bool:
    return (mx.abs(first - second).max() <= tolerance * mx.abs(second).max()).item()


@pytest.mark.parametrize("how", list(QUANTIZATIONS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(how, dtype, tmp_path):
    flow = deep_flow()
    quantization = quantize_module(flow, how)
    mode, bits, group_size = QUANTIZATIONS[how]
    own = {path: quantization.pop(path) for path in quantized_layers(flow) if path in quantization}
    assert quantization == {"group_size": group_size, "bits": bits, "mode": mode}
    assert bool(own) == (how == "mixed")
    quantization |= own
    save_model(tmp_path, parameters(flow), config_of(flow, quantization=quantization))
    loaded = load_flow(tmp_path, dtype=dtype)
    assert quantized_layers(loaded).keys() == quantized_layers(flow).keys()
    assert any("proj_txt" in path for path in quantized_layers(loaded))
    if dtype == "float32":
        assert same(parameters(loaded), parameters(flow))
    for name, weight in parameters(loaded).items():
        if mx.issubdtype(weight.dtype, mx.floating):
            whole = not is_layer_weight(name) or (name.endswith((".scales", ".biases")) and ON_CPU)
            assert weight.dtype == (mx.float32 if whole else parse_dtype(dtype))


def test_dense_layers_stay_dense():
    flow = tiny_flow("wide")
    flow.blocks[0].proj_out = nn.Linear(64, 64)
    quantize_module(flow, 8)
    kinds = {path.rpartition(".")[2] for path in quantized_layers(flow)}
    assert kinds == {"qkv", "proj", "0", "2", "proj_txt"}


def test_own_settings_of_a_layer(tmp_path):
    flow = tiny_flow("wide")
    path = "blocks.0.attn_blocks.0.attention.qkv"
    quantization = quantize_module(
        flow, 4, 32, lambda name, layer: {"bits": 8} if name == path else name.endswith(".proj_txt")
    )
    assert quantization == {
        "group_size": 32,
        "bits": 4,
        "mode": "affine",
        path: {"group_size": 32, "bits": 8, "mode": "affine"},
    }
    save_model(tmp_path, parameters(flow), config_of(flow, quantization=quantization))
    layers = quantized_layers(load_flow(tmp_path))
    assert {name.rpartition(".")[2]: layer.bits for name, layer in layers.items()} == {"qkv": 8, "proj_txt": 4}


def test_mixed():
    """More bits in the blocks that are less deep than the deepest, whatever their order and width."""
    flow = deep_flow()
    every = tree_flatten(flow.leaf_modules(), is_leaf=nn.Module.is_module)
    linear = {path: layer for path, layer in every if isinstance(layer, nn.Linear)}
    dense = {path: layer.weight.size for path, layer in linear.items() if not path.endswith(("proj_in", "proj_out"))}
    quantization = quantize_module(flow, "mixed")
    layers = quantized_layers(flow)
    assert layers.keys() == dense.keys()
    for path, layer in layers.items():
        shallow = not path.startswith("blocks.2.")
        assert (layer.bits, layer.group_size, layer.mode) == (6 if shallow else 4, 64, "affine")
        assert (path in quantization) == shallow
    # Bits of each weight, and a float32 scale and bias for every 64.
    expected = sum(size * (layers[path].bits + 1) / 8 for path, size in dense.items())
    found = sum(layer[kind].nbytes for layer in layers.values() for kind in ("weight", "scales", "biases"))
    assert found == expected


@pytest.mark.parametrize("sizes", [{"layers_per_block": [2, 2]}, {"layers_per_block": [2]}])
def test_mixed_needs_shallow_blocks(sizes):
    expected = "mixed quantization is for flows with shallow blocks and a deep one; use 8, 6 or 4"
    assert message(quantize_module, tiny_flow("wide", **sizes), "mixed") == expected


def test_mixed_is_not_for_text_encoders():
    encoder = T5Encoder(T5Config(vocab_size=99, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4))
    assert "is for flows" in message(quantize_module, encoder, "mixed")


@pytest.mark.parametrize("how", list(QUANTIZATIONS))
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_dense_again(how, dtype):
    # Weights of a new flow are uniform: bfloat16 rounds the scales of normal ones, which reach further, too coarsely.
    mx.random.seed(0)
    flow = STARFlow(deep_flow().config)
    flow.set_dtype(dtype)
    before = parameters(flow)
    quantize_module(flow, how)
    dequantize_module(flow)
    after = parameters(flow)
    assert after.keys() == before.keys()
    assert {w.dtype for w in after.values()} == {dtype}
    for name, weight in after.items():
        assert weight.shape == before[name].shape
        assert close(weight, before[name], 0.01 if how == "8" else 0.2)


def test_a_dense_embedding_again():
    encoder = T5Encoder(T5Config(vocab_size=99, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4))
    before = encoder.shared.weight
    quantize_module(encoder, 8)
    assert "shared" in quantized_layers(encoder)
    dequantize_module(encoder)
    assert isinstance(encoder.shared, nn.Embedding)
    assert not quantized_layers(encoder)
    assert close(encoder.shared.weight, before, 0.01)


def test_quantizing_again():
    """Layers whose settings stay the same are not packed anew; the others are, from what they now stand for."""
    flow = deep_flow()
    quantize_module(flow, 4)
    before = parameters(flow)
    assert quantize_module(flow, "4") == {"group_size": 64, "bits": 4, "mode": "affine"}
    assert same(parameters(flow), before)
    quantize_module(flow, "mixed")
    after = parameters(flow)
    deep = [name for name in before if name.startswith("blocks.2.")]
    assert all(mx.array_equal(after[name], before[name]).item() for name in deep)
    path = "blocks.0.attn_blocks.0.attention.qkv"
    assert (quantized_layers(flow)[path].bits, quantized_layers(flow)[path].mode) == (6, "affine")
    quantize_module(flow, "nvfp4")
    assert {layer.mode for layer in quantized_layers(flow).values()} == {"nvfp4"}


def test_a_group_size_that_does_not_divide():
    expected = (
        "groups of 128 do not divide the 64 columns of blocks.0.attn_blocks.0.attention.qkv; the usual size is 64"
    )
    assert expected in message(quantize_module, tiny_flow("wide"), 8, 128)
    # Without a group size of the user's, such layers stay dense.
    flow = tiny_flow(txt_dim=32)
    quantize_module(flow, 8)
    assert not any("proj_txt" in path for path in quantized_layers(flow))


def test_quantization_mistakes(tmp_path):
    assert "cannot quantize to 5; it must be one of 8, 6, 4, mxfp8" in message(quantize_module, tiny_flow("wide"), 5)
    assert "no layer is a multiple of 64 wide" in message(
        quantize_module, tiny_flow(channels=96, head_dim=32, expansion=1, txt_dim=32), 8
    )
    assert "cannot quantize to 8: " in message(quantize_module, tiny_flow("wide"), 8, 16)
    flow = tiny_flow("wide")
    quantization = quantize_module(flow, 8)
    save_model(tmp_path, parameters(flow), config_of(flow, quantization=quantization))
    edit_config(tmp_path, quantization=None)
    assert "config.json has no quantization" in message(load_flow, tmp_path)
    edit_config(tmp_path, quantization=quantization | {"bits": 4})
    assert "has shape" in message(load_flow, tmp_path)
    edit_config(tmp_path, quantization=quantization | {"bits": 77})
    assert "quantization of config.json" in message(load_flow, tmp_path)
    edit_config(tmp_path, quantization=quantization | {"mode": "nonsense"})
    assert "quantization of config.json" in message(load_flow, tmp_path)
    edit_config(tmp_path, quantization="8")
    assert "config.json: quantization must hold names and values" in message(load_flow, tmp_path)
