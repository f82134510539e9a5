"""Adapters: zero, whole, fused and several of them; over dense and quantized weights; what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import message
from helpers.tiny_flows import tiny_flow

from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir.adapters import Adapter, add_adapters, fuse_adapters, linear_layers
from mlx_starflow.model_dir.quantization import quantize_module, quantized_layers
from mlx_starflow.models.starflow import STARFlow
from mlx_starflow.training.finetuning.adapters import (
    AdapterConfig,
    adapter_layers,
    attach,
    detach,
    dropout_key,
    save_adapter,
    without_adapters,
)
from mlx_starflow.training.loop.objective import batch_loss
from mlx_starflow.training.loop.weights import trainable

RNG = np.random.default_rng(0)


def normal(*shape: int) -> mx.array:
    return mx.array(RNG.standard_normal(shape).astype(np.float32))


X, TEXT = normal(2, 4, 4, 4), normal(2, 4, 64)


def make(quantization: str | None) -> STARFlow:
    flow = tiny_flow("wide")
    if quantization:
        quantize_module(flow, quantization)
    return flow


def train(flow: STARFlow, seed: int = 0, **settings: object) -> AdapterConfig:
    """Put an adapter on a flow whose change is not nothing."""
    config = AdapterConfig(**{"rank": 4, **settings})
    attach(flow, config, seed)
    mx.random.seed(seed)
    for layer in adapter_layers(flow).values():
        layer.lora_b = 0.05 * mx.random.normal(layer.lora_b.shape)
        if "m" in layer:
            layer.m = layer.m * (1 + 0.1 * mx.random.normal(layer.m.shape))
    return config


def saved(folder: Path, quantization: str | None = None, **settings: object) -> tuple[Path, mx.array]:
    """An adapter's folder, and what the flow with it makes of X."""
    flow = make(quantization)
    config = train(flow, **settings)
    return save_adapter(folder, flow, config), flow(X, TEXT).z


def run(*adapters: tuple[Path, float], quantization: str | None = None) -> mx.array:
    flow = make(quantization)
    add_adapters(flow, adapters)
    return flow(X, TEXT).z


def difference(first: mx.array, second: mx.array) -> float:
    return mx.abs(first - second).max().item()


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("quantization", [None, "8", "4"])
def test_strength_zero_is_the_base_and_one_what_was_trained(tmp_path, kind, quantization):
    folder, trained = saved(tmp_path / "a", quantization, kind=kind)
    base = make(quantization)(X, TEXT).z
    assert difference(trained, base) > 1e-2
    assert mx.array_equal(run((folder, 0), quantization=quantization), base)
    assert difference(run((folder, 1), quantization=quantization), trained) < 1e-5


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("quantization", [None, "8"])
@pytest.mark.parametrize("strength", [1, 0.4])
def test_fused_is_the_same(tmp_path, kind, quantization, strength):
    folder, _ = saved(tmp_path / "a", quantization, kind=kind)
    flow = make(quantization)
    add_adapters(flow, [(folder, strength)])
    before = flow(X, TEXT).z
    assert set(fuse_adapters(flow, dequantize=True)) == set(Adapter.read(folder).layers)
    assert flow.parameters().keys() == make(quantization).parameters().keys()
    assert difference(flow(X, TEXT).z, before) < 1e-5


def test_fusing_into_quantized_layers_keeps_their_settings(tmp_path):
    folder, trained = saved(tmp_path / "a", "8")
    flow = make("8")
    settings = {path: (layer.bits, layer.group_size, layer.mode) for path, layer in quantized_layers(flow).items()}
    add_adapters(flow, [(folder, 1)])
    fuse_adapters(flow)
    assert {p: (m.bits, m.group_size, m.mode) for p, m in quantized_layers(flow).items()} == settings
    assert difference(flow(X, TEXT).z, trained) < 0.1 * difference(make("8")(X, TEXT).z, trained)


def test_changes_add_up(tmp_path):
    first, _ = saved(tmp_path / "a", seed=1)
    second, _ = saved(tmp_path / "b", kind="dora", seed=2, blocks="deep")
    flow = make(None)
    weights = {path: layer.weight for path, layer in linear_layers(flow).items()}

    def changes(*adapters: tuple[Path, float]) -> dict[str, mx.array]:
        flow = make(None)
        add_adapters(flow, adapters)
        fuse_adapters(flow)
        return {path: layer.weight - weights[path] for path, layer in linear_layers(flow).items()}

    one, other, both = changes((first, 0.5)), changes((second, 0.7)), changes((second, 0.7), (first, 0.5))
    assert all(difference(both[path], one[path] + other[path]) < 1e-6 for path in weights)
    assert difference(run((first, 0.5), (first, 0.5)), run((first, 1))) < 1e-5
    one_by_one = make(None)
    add_adapters(one_by_one, [(first, 0.5)])
    add_adapters(one_by_one, [(second, 0.7)])
    assert difference(one_by_one(X, TEXT).z, run((second, 0.7), (first, 0.5))) < 1e-5


def test_only_the_adapter_is_trained():
    flow = make("8")
    paths = attach(flow, AdapterConfig(kind="dora", rank=2))
    assert set(trainable(flow)) == {f"{path}.{part}" for path in paths for part in ("lora_a", "lora_b", "m")}


def test_new_adapters_change_nothing_and_come_off_again():
    flow, base = make("8"), make("8")(X, TEXT).z
    attach(flow, AdapterConfig(rank=2))
    assert mx.array_equal(flow(X, TEXT).z, base)
    train_ = adapter_layers(flow)
    for layer in train_.values():
        layer.lora_b = layer.lora_b + 0.1
    with without_adapters(flow):
        assert mx.array_equal(flow(X, TEXT).z, base)
    assert difference(flow(X, TEXT).z, base) > 1e-3
    detach(flow)
    assert mx.array_equal(flow(X, TEXT).z, base)


def test_layers_and_blocks_are_chosen():
    flow = tiny_flow(layers_per_block=[1, 1, 2])
    assert {path.split(".")[1] for path in AdapterConfig(blocks="deep").paths(flow)} == {"2"}
    assert {path.split(".")[1] for path in AdapterConfig(blocks="shallow").paths(flow)} == {"0", "1"}
    assert {path.split(".")[1] for path in AdapterConfig(blocks="0,2").paths(flow)} == {"0", "2"}
    chosen = AdapterConfig(layers=("qkv", "main.2"), blocks="1").paths(flow)
    assert chosen == ["blocks.1.attn_blocks.0.attention.qkv", "blocks.1.attn_blocks.0.mlp.main.2"]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"kind": "ia3"}, "kind must be lora or dora"),
        ({"rank": 0}, "rank must be 1 or more"),
        ({"scale": 0.0}, "scale must be greater than 0"),
        ({"dropout": 1.0}, "dropout must be in 0..1"),
        ({"layers": ("qvk",)}, "no layer is called 'qvk'"),
        ({"blocks": "9"}, "there is no block 9; this flow has 0 to 1"),
        ({"blocks": "top"}, "blocks must be all, deep, shallow"),
        ({"layers": ("gate_proj",)}, "have none of the layers gate_proj"),
    ],
)
def test_mistakes_in_the_config(settings, problem):
    assert problem in message(lambda: AdapterConfig(**settings).paths(tiny_flow()))


def test_dropout_follows_its_key():
    flow = make(None)
    train(flow, dropout=0.5)
    plain = flow(X, TEXT).z
    with dropout_key(flow, mx.array([1, 2], mx.uint32)):
        first, again = flow(X, TEXT).z, flow(X, TEXT).z
    with dropout_key(flow, mx.array([1, 3], mx.uint32)):
        other = flow(X, TEXT).z
    assert mx.array_equal(first, again)
    assert difference(first, other) > 1e-3 and difference(first, plain) > 1e-3
    assert mx.array_equal(flow(X, TEXT).z, plain)


def test_gradients_of_an_adapter_are_those_of_finite_differences():
    flow = make("8")
    train(flow, kind="lora")
    batch = {"latents": X, "noise": normal(*X.shape), "text": TEXT}
    layer = next(iter(adapter_layers(flow).values()))
    direction = normal(*layer.lora_b.shape)

    def loss(step: mx.array) -> mx.array:
        before = layer.lora_b
        layer.lora_b = before + step * direction
        value = batch_loss(flow, batch, gradient_checkpointing=True)[0]
        layer.lora_b = before
        return value

    slope = mx.grad(loss)(mx.array(0.0)).item()
    step = 1e-2
    assert slope == pytest.approx((loss(mx.array(step)) - loss(mx.array(-step))).item() / (2 * step), rel=2e-2)


# ---- adapters that cannot be used


def test_another_models_adapter_names_the_first_layer(tmp_path):
    folder, _ = saved(tmp_path / "a")
    flow = tiny_flow("wide", channels=128)
    found = message(add_adapters, flow, [(folder, 1.0)])
    assert "blocks.0.attn_blocks.0.attention.qkv is [384, 128] here and [192, 64] there" in found
    assert not [path for path, layer in flow.named_modules() if "lora_a" in layer]
    assert "no linear layer blocks.1" in message(add_adapters, tiny_flow("wide", layers_per_block=[1]), [(folder, 0.0)])


def test_missing_and_damaged_files(tmp_path):
    folder, _ = saved(tmp_path / "a")
    flow = make(None)
    assert "is not a folder" in message(add_adapters, flow, [(tmp_path / "b", 1)])
    assert "holds no adapter_config.json" in message(add_adapters, flow, [(tmp_path, 1)])
    weights = folder / "adapters.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    assert "cannot read" in message(add_adapters, flow, [(folder, 1)])
    weights.unlink()
    assert "adapters.safetensors is missing" in message(add_adapters, flow, [(folder, 1)])
    arrays = {"blocks.0.attn_blocks.0.attention.qkv.lora_a": mx.zeros((64, 4))}
    mx.save_safetensors(str(weights), arrays)
    assert "lora_b" in message(add_adapters, flow, [(folder, 1)])
    weights.write_bytes(whole)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "kind": "ia3"}))
    with pytest.raises(StarflowError, match="'ia3'"):
        Adapter.read(folder)
