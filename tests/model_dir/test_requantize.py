"""Model directories quantized anew."""

from __future__ import annotations

import mlx.core as mx
import pytest
from helpers.commands import message
from helpers.model_directories import same, size

from mlx_starflow import load
from mlx_starflow.model_dir.directory import load_flow, load_text_encoder
from mlx_starflow.model_dir.files import load_weights, read_config
from mlx_starflow.model_dir.quantization import QUANTIZATIONS, quantized_layers
from mlx_starflow.model_dir.requantize import quantize_model
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.weights import parameters

ON_CPU = mx.default_device().type == mx.cpu
BITS_A_WEIGHT = {"8": 9, "6": 7, "4": 5, "mxfp8": 8.25, "mxfp4": 4.25, "nvfp4": 4.5}
"""With a float32 scale and bias for 64 weights, or a byte for 32 or 16."""


@pytest.mark.parametrize("how", list(QUANTIZATIONS))
def test_a_quantized_directory(how, trained_model, tmp_path):
    out = quantize_model(trained_model, tmp_path / "out", how)
    assert (out / "NOTICE").read_text() == "whose it is"
    pipe = load(out)
    assert pipe.generate("a cat", seed=1).images[0].size == (8, 8)
    dense, layers = load_weights(trained_model), quantized_layers(pipe.flow)
    quantization = read_config(out)["quantization"]
    expected = size(trained_model)
    for path in layers:
        own = quantization.get(path, quantization)
        name = str(own["bits"]) if own["mode"] == "affine" else own["mode"]
        expected += dense[f"{path}.weight"].size * (BITS_A_WEIGHT[name] / 8 - 4)
    assert size(out) == expected
    assert not quantized_layers(pipe.text_encoder)
    for part in ("text_encoder", "vae"):
        assert same(load_weights(out / part), load_weights(trained_model / part))
    assert read_config(out) == {**read_config(trained_model), "quantization": quantization}


def test_mixed_survives(trained_model, tmp_path):
    flow = load_flow(quantize_model(trained_model, tmp_path / "out", "mixed"))
    bits = {path: layer.bits for path, layer in quantized_layers(flow).items()}
    assert {bits[path] for path in bits if path.startswith("blocks.2.")} == {4}
    assert {bits[path] for path in bits if not path.startswith("blocks.2.")} == {6}


def test_the_text_encoder_alone(trained_model, tmp_path):
    out = quantize_model(trained_model, tmp_path / "out", text_encoder="mxfp8")
    assert same(load_weights(out), load_weights(trained_model))
    assert read_config(out) == read_config(trained_model)
    encoder, tokenizer = load_text_encoder(out / "text_encoder")
    assert {layer.mode for layer in quantized_layers(encoder).values()} == {"mxfp8"}
    assert tokenizer.vocab_size == load(trained_model).tokenizer.vocab_size
    assert size(out / "text_encoder") < 0.4 * size(trained_model / "text_encoder")


def test_both_with_a_group_size(trained_model, tmp_path):
    out = quantize_model(trained_model, tmp_path / "out", "6", text_encoder=8, group_size=32)
    pipe = load(out)
    for network, bits in ((pipe.flow, 6), (pipe.text_encoder, 8)):
        assert {(layer.bits, layer.group_size) for layer in quantized_layers(network).values()} == {(bits, 32)}


def test_quantizing_again(trained_model, tmp_path):
    """The same settings change nothing; others start from what the weights stand for."""
    four = quantize_model(trained_model, tmp_path / "four", "4")
    assert same(load_weights(quantize_model(four, tmp_path / "same", "4")), load_weights(four))
    eight = quantize_model(four, tmp_path / "eight", "8")
    assert read_config(eight)["quantization"] == {"group_size": 64, "bits": 8, "mode": "affine"}
    path = "blocks.2.attn_blocks.0.mlp.main.0"
    weights = [quantized_layers(load_flow(each))[path] for each in (four, eight)]
    first, second = (mx.dequantize(w.weight, w.scales, w.biases, w.group_size, w.bits) for w in weights)
    assert mx.abs(first - second).max().item() < 0.01 * mx.abs(first).max().item()
    # Into a folder that holds a model of the same kind already.
    quantize_model(trained_model, eight, "nvfp4")
    assert {layer.mode for layer in quantized_layers(load_flow(eight)).values()} == {"nvfp4"}


def test_dtypes_stay(trained_model, tmp_path):
    flow = load_flow(trained_model, "bfloat16")
    half = save_model(tmp_path / "half", parameters(flow), read_config(trained_model))
    once = quantize_model(half, tmp_path / "once", "mxfp4")
    twice = quantize_model(once, tmp_path / "twice", "4")
    assert {value.dtype for value in load_weights(once).values()} == {mx.bfloat16, mx.float32, mx.uint32, mx.uint8}
    assert {value.dtype for value in load_weights(twice).values()} == {mx.bfloat16, mx.float32, mx.uint32}
    assert not (half / "text_encoder").exists()


def test_mistakes(trained_model, tmp_path):
    out = tmp_path / "out"
    assert "nothing to quantize" in message(quantize_model, trained_model, out)
    assert "must be one of 8, 6, 4, mxfp8, mxfp4, nvfp4, mixed" in message(quantize_model, trained_model, out, "5")
    assert "groups of 128 do not divide" in message(quantize_model, trained_model, out, "4", group_size=128)
    assert "The requested group size 16" in message(quantize_model, trained_model, out, "4", group_size=16)
    assert "is for flows" in message(quantize_model, trained_model, out, text_encoder="mixed")
    assert "no layer is a multiple of 64 wide" in message(quantize_model, trained_model, out, text_encoder="8")
    assert "is the model's own folder" in message(quantize_model, trained_model, trained_model, "4")
    assert "holds no config.json" in message(quantize_model, tmp_path, out, "4")
    assert "unknown model" in message(quantize_model, tmp_path / "nowhere", out, "4")
    assert "is not a flow's" in message(quantize_model, trained_model / "vae", out, "4")
    assert not out.exists()
    (tmp_path / "flow").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "flow" / name).write_bytes((trained_model / name).read_bytes())
    assert "has no text encoder to quantize" in message(quantize_model, tmp_path / "flow", out, text_encoder="8")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in message(quantize_model, trained_model, tmp_path / "file", "4")
