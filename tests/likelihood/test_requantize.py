"""Model directories quantized anew, and what that costs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import message
from helpers.examples import run_example
from helpers.images import write_gradients
from helpers.model_directories import same, write_trained_model
from PIL import Image, ImageDraw

from mlx_starflow import load
from mlx_starflow.likelihood.requantize import Comparison, measure, quantize_model, read_pictures
from mlx_starflow.model_dir.directory import load_flow, load_text_encoder
from mlx_starflow.model_dir.files import load_weights, read_config
from mlx_starflow.model_dir.quantization import QUANTIZATIONS, quantized_layers
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.weights import parameters

ON_CPU = mx.default_device().type == mx.cpu
BITS_A_WEIGHT = {"8": 9, "6": 7, "4": 5, "mxfp8": 8.25, "mxfp4": 4.25, "nvfp4": 4.5}
"""With a float32 scale and bias for 64 weights, or a byte for 32 or 16."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_gradients(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def model(tmp_path_factory, pictures):
    return write_trained_model(tmp_path_factory.mktemp("trained") / "model", pictures)


def size(directory: Path) -> int:
    return sum(value.nbytes for value in load_weights(directory).values())


@pytest.mark.parametrize("how", list(QUANTIZATIONS))
def test_a_quantized_directory(how, model, tmp_path):
    out = quantize_model(model, tmp_path / "out", how)
    assert (out / "NOTICE").read_text() == "whose it is"
    pipe = load(out)
    assert pipe.generate("a cat", seed=1).images[0].size == (8, 8)
    dense, layers = load_weights(model), quantized_layers(pipe.flow)
    quantization = read_config(out)["quantization"]
    expected = size(model)
    for path in layers:
        own = quantization.get(path, quantization)
        name = str(own["bits"]) if own["mode"] == "affine" else own["mode"]
        expected += dense[f"{path}.weight"].size * (BITS_A_WEIGHT[name] / 8 - 4)
    assert size(out) == expected
    assert not quantized_layers(pipe.text_encoder)
    for part in ("text_encoder", "vae"):
        assert same(load_weights(out / part), load_weights(model / part))
    assert read_config(out) == {**read_config(model), "quantization": quantization}


def test_mixed_survives(model, tmp_path):
    flow = load_flow(quantize_model(model, tmp_path / "out", "mixed"))
    bits = {path: layer.bits for path, layer in quantized_layers(flow).items()}
    assert {bits[path] for path in bits if path.startswith("blocks.2.")} == {4}
    assert {bits[path] for path in bits if not path.startswith("blocks.2.")} == {6}


def test_the_text_encoder_alone(model, tmp_path):
    out = quantize_model(model, tmp_path / "out", text_encoder="mxfp8")
    assert same(load_weights(out), load_weights(model))
    assert read_config(out) == read_config(model)
    encoder, tokenizer = load_text_encoder(out / "text_encoder")
    assert {layer.mode for layer in quantized_layers(encoder).values()} == {"mxfp8"}
    assert tokenizer.vocab_size == load(model).tokenizer.vocab_size
    assert size(out / "text_encoder") < 0.4 * size(model / "text_encoder")


def test_both_with_a_group_size(model, tmp_path):
    out = quantize_model(model, tmp_path / "out", "6", text_encoder=8, group_size=32)
    pipe = load(out)
    for network, bits in ((pipe.flow, 6), (pipe.text_encoder, 8)):
        assert {(layer.bits, layer.group_size) for layer in quantized_layers(network).values()} == {(bits, 32)}


def test_quantizing_again(model, tmp_path):
    """The same settings change nothing; others start from what the weights stand for."""
    four = quantize_model(model, tmp_path / "four", "4")
    assert same(load_weights(quantize_model(four, tmp_path / "same", "4")), load_weights(four))
    eight = quantize_model(four, tmp_path / "eight", "8")
    assert read_config(eight)["quantization"] == {"group_size": 64, "bits": 8, "mode": "affine"}
    path = "blocks.2.attn_blocks.0.mlp.main.0"
    weights = [quantized_layers(load_flow(each))[path] for each in (four, eight)]
    first, second = (mx.dequantize(w.weight, w.scales, w.biases, w.group_size, w.bits) for w in weights)
    assert mx.abs(first - second).max().item() < 0.01 * mx.abs(first).max().item()
    # Into a folder that holds a model of the same kind already.
    quantize_model(model, eight, "nvfp4")
    assert {layer.mode for layer in quantized_layers(load_flow(eight)).values()} == {"nvfp4"}


def test_dtypes_stay(model, tmp_path):
    flow = load_flow(model, "bfloat16")
    half = save_model(tmp_path / "half", parameters(flow), read_config(model))
    once = quantize_model(half, tmp_path / "once", "mxfp4")
    twice = quantize_model(once, tmp_path / "twice", "4")
    assert {value.dtype for value in load_weights(once).values()} == {mx.bfloat16, mx.uint32, mx.uint8}
    assert {value.dtype for value in load_weights(twice).values()} == {mx.bfloat16, mx.uint32}
    assert not (half / "text_encoder").exists()


def test_mistakes(model, tmp_path):
    out = tmp_path / "out"
    assert "nothing to quantize" in message(quantize_model, model, out)
    assert "must be one of 8, 6, 4, mxfp8, mxfp4, nvfp4, mixed" in message(quantize_model, model, out, "5")
    assert "groups of 128 do not divide" in message(quantize_model, model, out, "4", group_size=128)
    assert "The requested group size 16" in message(quantize_model, model, out, "4", group_size=16)
    assert "is for flows" in message(quantize_model, model, out, text_encoder="mixed")
    assert "no layer is a multiple of 64 wide" in message(quantize_model, model, out, text_encoder="8")
    assert "is the model's own folder" in message(quantize_model, model, model, "4")
    assert "holds no config.json" in message(quantize_model, tmp_path, out, "4")
    assert "unknown model" in message(quantize_model, tmp_path / "nowhere", out, "4")
    assert "is not a flow's" in message(quantize_model, model / "vae", out, "4")
    assert not out.exists()
    (tmp_path / "flow").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "flow" / name).write_bytes((model / name).read_bytes())
    assert "has no text encoder to quantize" in message(quantize_model, tmp_path / "flow", out, text_encoder="8")
    (tmp_path / "file").write_text("")
    assert "cannot write" in message(quantize_model, model, tmp_path / "file", "4")


def test_pictures(model, pictures):
    """Spread over the folder, as the autoencoder's latents; other splits are left out."""
    every = read_pictures(model, pictures)
    assert every.latents.shape == (23, 4, 4, 4)
    assert "another" not in every.captions
    few = read_pictures(model, pictures, 3)
    np.testing.assert_allclose(few.latents, every.latents[[0, 11, 22]], atol=1e-5)
    assert few.captions == [every.captions[index] for index in (0, 11, 22)]
    assert "2 pictures or more, not 1" in message(read_pictures, model, pictures, 1)
    assert "holds no training data" in message(read_pictures, model, model)


def test_what_it_costs(model, pictures, tmp_path):
    data = read_pictures(model, pictures)
    original = measure(model, data, draws=2)
    assert (original.flow_bytes, original.text_encoder_bytes) == (size(model), size(model / "text_encoder"))
    costs = {}
    for how in ("8", "4", "mixed"):
        out = quantize_model(model, tmp_path / how, how, text_encoder="mxfp8")
        costs[how] = Comparison(original, measure(out, data, draws=2))
        assert costs[how].quantized.flow_bytes == size(out)
    lost = {how: cost.change for how, cost in costs.items()}
    # This flow has hardly learned, so that a change may also be for the better; but not as large.
    size_of = {how: np.abs(change.blocks).mean() for how, change in lost.items()}
    assert 0 < size_of["8"] < 0.5 * size_of["4"]
    assert size_of["mixed"] < size_of["4"]
    # Paired: the pictures differ much more than the models.
    assert lost["8"].standard_error < 0.2 * original.nll.standard_error

    report = json.loads(json.dumps(costs["4"].to_dict()))
    assert report["pictures"] == 23
    assert report["mib"]["original"]["flow"] == size(model) / 2**20
    nats = report["nll"]
    assert list(nats) == ["total", "block 0", "block 1", "block 2", "prior"]
    assert nats["total"]["change"] == pytest.approx(lost["4"].mean)
    assert nats["total"]["standard_error"] == pytest.approx(lost["4"].standard_error)
    parts = [values["change"] for name, values in nats.items() if name != "total"]
    assert sum(parts) == pytest.approx(nats["total"]["change"], abs=1e-9)
    table = str(costs["4"]).splitlines()
    assert len({line.find("+-") for line in table if "+-" in line}) == 1
    assert f"{lost['4'].mean:+.5f} +- {lost['4'].standard_error:.5f}" in table[3]


def test_nothing_changes_nothing(model, pictures):
    data = read_pictures(model, pictures, 4)
    change = Comparison(*(measure(model, data, draws=1) for _ in range(2))).change
    assert change.mean == change.standard_error == 0
    assert not math.isnan(measure(model, data, draws=1, seed=1).nll.mean)


def test_the_example(model, pictures):
    words = [model, pictures, "--limit", 3, "--draws", 1, "--only", 4, "mixed"]
    lines = run_example("reports/quantization.py", *words).splitlines()
    assert lines[0].startswith("machine: ")
    assert [line.split()[0] for line in lines[-2:]] == ["4", "mixed"]
    assert all(line.count("+-") == 1 for line in lines[-2:])


def write_drawings(folder: Path) -> Path:
    lines = []
    for name, colour in (("red", "#d33"), ("orange", "#f80"), ("blue", "#36c"), ("purple", "#84b")):
        picture = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(picture).ellipse((6, 6, 58, 58), fill=colour)
        picture.save(folder / f"{name}.png")
        lines.append(json.dumps({"file_name": f"{name}.png", "text": f"{name} circle"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_the_embedded_model(tmp_path):
    """`mixed` loses less than half of what plain 4 bits lose, and is at most 15% larger."""
    data = read_pictures("demo", write_drawings(tmp_path))
    original = measure("demo", data, draws=1)
    found = {}
    for how in ("4", "mixed"):
        found[how] = measure(quantize_model("demo", tmp_path / how, how), data, draws=1)
    lost = {how: (each.nll - original.nll).mean for how, each in found.items()}
    assert lost["4"] > 0
    assert abs(lost["mixed"]) < 0.5 * lost["4"]
    assert found["4"].flow_bytes < found["mixed"].flow_bytes < 1.15 * found["4"].flow_bytes < original.flow_bytes
