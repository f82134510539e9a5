"""`mlx-starflow fuse` and `generate --lora`."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import Command
from helpers.model_directories import write_image_model
from helpers.precision import bound, roundings
from PIL import Image

from mlx_starflow import load, load_flow
from mlx_starflow.model_dir.quantization import quantized_layers
from mlx_starflow.model_dir.requantize import quantize_model
from mlx_starflow.training.finetuning.adapters import AdapterConfig, adapter_layers, attach, save_adapter

fuse, generate = Command("fuse"), Command("generate")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_image_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapter(model) -> Path:
    flow = load_flow(model)
    config = AdapterConfig(rank=2)
    attach(flow, config)
    mx.random.seed(1)
    for layer in adapter_layers(flow).values():
        layer.lora_b = 0.2 * mx.random.normal(layer.lora_b.shape)
    return save_adapter(model.parent / f"{model.name}-adapter", flow, config)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_fused_model_makes_the_adapters_pictures(model, adapter, tmp_path):
    done = fuse(model, "--lora", adapter, 0.5, "-o", tmp_path / "fused")
    assert done.exit_code == 0, done.output
    assert "11 layers changed" in done.stdout or "layers changed" in done.stdout
    with_adapter = load(model, adapters=[(adapter, 0.5)]).generate("a cat", seed=1).latents
    fused = load(tmp_path / "fused").generate("a cat", seed=1).latents
    plain = load(model).generate("a cat", seed=1).latents
    assert mx.abs(with_adapter - fused).max() < bound(1e-4, roundings(10)) < 1e-2 < mx.abs(with_adapter - plain).max()


def test_generate_lora(model, adapter, tmp_path):
    def picture(name: str, *options: object) -> np.ndarray:
        done = generate("a cat", "-m", model, "--seed", 1, "-o", tmp_path / name, *options)
        assert done.exit_code == 0, done.output
        return pixels(tmp_path / name)

    plain, adapted = picture("plain.png"), picture("adapted.png", "--lora", adapter, 1)
    halves = picture("halves.png", "--lora", adapter, 0.5, "--lora", adapter, 0.5)
    assert (picture("zero.png", "--lora", adapter, 0) == plain).all()
    assert (adapted != plain).any() and np.abs(halves - adapted).max() <= 1
    # The picture knows its adapters.
    done = generate("--from", tmp_path / "adapted.png", "-o", tmp_path / "again.png")
    assert done.exit_code == 0 and (pixels(tmp_path / "again.png") == adapted).all()


@pytest.mark.parametrize("dequantize", [False, True])
def test_quantized_layers(model, adapter, tmp_path, dequantize):
    quantized = quantize_model(model, tmp_path / "quantized", 8)
    done = fuse(quantized, "--lora", adapter, 1, "-o", tmp_path / "fused", *["--dequantize"] * dequantize)
    assert done.exit_code == 0, done.output
    flow, before = load_flow(tmp_path / "fused"), load_flow(quantized)
    assert bool(quantized_layers(flow)) != dequantize
    if not dequantize:
        assert quantized_layers(flow).keys() == quantized_layers(before).keys()
    x, text = mx.random.normal((1, 4, 4, 4)), mx.random.normal((1, 6, 32))
    adapted = load_flow(quantized, adapters=[(adapter, 1)])(x, text).z
    error = mx.abs(flow(x, text).z - adapted).max() / mx.abs(before(x, text).z - adapted).max()
    assert error < (bound(1e-4, roundings(10)) if dequantize else 0.1)
    assert ("quantization" in json.loads((tmp_path / "fused/config.json").read_text())) != dequantize


def test_mistakes(model, adapter, tmp_path):
    assert "Missing option '--lora'" in fuse.mistake(model, "-o", tmp_path / "x")
    assert "nothing to fuse" in fuse.mistake(model, "--lora", adapter, 0, "-o", tmp_path / "x")
    assert "own folder" in fuse.mistake(model, "--lora", adapter, 1, "-o", model)
    assert "is not a folder" in fuse.mistake(model, "--lora", tmp_path / "none", 1, "-o", tmp_path / "x")
    found = fuse.mistake("demo", "--lora", adapter, 1, "-o", tmp_path / "x")
    assert "does not fit this model: blocks.0.attn_blocks.0.attention.qkv is [768, 256] here and [192, 64]" in found
    assert not (tmp_path / "x").exists()
    assert "holds no adapter_config.json" in generate.mistake("a cat", "-m", model, "--lora", model, 1)
    assert "--backend mlx" in generate.mistake("a cat", "-m", model, "--lora", adapter, 1, "--backend", "torch")


def test_strengths_that_are_no_numbers(model, adapter, tmp_path):
    for strength in ("nan", "inf", "1e39"):
        error = fuse.mistake(model, "--lora", adapter, strength, "-o", tmp_path / "fused")
        assert "strength" in error
        assert not (tmp_path / "fused").exists()
