"""Model directories: reading, strictness, quantizing, and writing all or nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from tiny_model import tiny_flow

from mlx_starflow.convert import convert_t5, convert_vae
from mlx_starflow.errors import StarflowError
from mlx_starflow.models.starflow import STARFlow
from mlx_starflow.models.t5 import T5Encoder
from mlx_starflow.weights import (
    QUANTIZATIONS,
    default_dtype,
    load_flow,
    load_module,
    load_text_encoder,
    load_vae,
    load_weights,
    parameters,
    parse_dtype,
    quantize_module,
    quantized_layers,
    read_config,
    save_model,
    save_tensors,
)

DATA = Path(__file__).parent / "data"
ON_CPU = mx.default_device().type == mx.cpu
WIDE = {"channels": 64, "head_dim": 16, "txt_dim": 64, "txt_size": 4}


def wide_flow() -> STARFlow:
    """Wide enough to be quantized."""
    return tiny_flow(**WIDE)


def config_of(flow: STARFlow, **more: object) -> dict[str, object]:
    return {"model_type": "starflow", **flow.config.to_dict(), **more}


def save_flow(directory: Path, flow: STARFlow | None = None, **options: object) -> Path:
    flow = flow or tiny_flow()
    return save_model(directory, parameters(flow), config_of(flow), **options)


def same(first: dict[str, mx.array], second: dict[str, mx.array]) -> bool:
    return first.keys() == second.keys() and all(mx.array_equal(first[name], second[name]).item() for name in first)


def message(function, *args, **options) -> str:
    with pytest.raises(StarflowError) as error:
        function(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def edit_config(directory: Path, **changes: object) -> None:
    config = read_config(directory) | changes
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_weights(directory: Path, **changes: mx.array | None) -> None:
    weights = {name: mx.array(w) for name, w in load_weights(directory).items()}
    weights |= {name.replace("__", "."): value for name, value in changes.items()}
    mx.save_safetensors(str(directory / "model.safetensors"), {n: w for n, w in weights.items() if w is not None})


# ---- dtypes


def test_dtypes():
    assert default_dtype() == (mx.float32 if ON_CPU else mx.bfloat16)
    assert parse_dtype("bfloat16") == parse_dtype(mx.bfloat16) == mx.bfloat16
    assert parse_dtype(None) is None
    assert message(parse_dtype, "int8") == "dtype 'int8' is not one of float32, bfloat16, float16"
    assert "is not one of" in message(parse_dtype, mx.int32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", mx.float16, None])
def test_loading_in_a_dtype(dtype, tmp_path):
    flow = load_flow(save_flow(tmp_path), dtype=dtype)
    assert {w.dtype for w in parameters(flow).values()} == {parse_dtype(dtype) or default_dtype()}


# ---- saving and loading


def test_round_trip(tmp_path):
    flow = tiny_flow()
    out = save_flow(tmp_path / "deep" / "model", flow)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_flow(str(out), dtype="float32")
    assert same(parameters(loaded), parameters(flow))
    assert loaded.config == flow.config


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16, mx.uint32, mx.uint8, mx.int32, mx.bool_])
def test_files_are_what_others_read(dtype, tmp_path):
    from safetensors.mlx import load_file

    weights = {
        "odd": mx.arange(3).astype(dtype),
        "scalar": mx.array(1).astype(dtype),
        "empty": mx.zeros((0, 4), dtype),
        "transposed": mx.arange(6).reshape(2, 3).T.astype(dtype),
        "bytes": mx.arange(5).astype(mx.uint8),
        "floats": mx.arange(5).astype(mx.float32),
    }
    save_model(tmp_path, weights, {})
    assert same(load_weights(tmp_path), weights)
    if dtype == mx.bfloat16:
        return  # the other reader goes through NumPy, which has no such type
    read = load_file(tmp_path / "model.safetensors")
    assert same(read, weights)
    assert {name: w.dtype for name, w in read.items()} == {name: w.dtype for name, w in weights.items()}


def test_shards(tmp_path):
    flow = tiny_flow()
    out = save_flow(tmp_path, flow, max_shard_gb=3e-5)
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    largest = max(w.nbytes for w in parameters(flow).values())
    assert all((out / shard).stat().st_size < max(30_000, largest) + 5000 for shard in shards)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in parameters(flow).values())
    assert set(index["weight_map"].values()) == set(shards)
    assert same(parameters(load_flow(out, dtype="float32")), parameters(flow))


def test_shards_that_do_not_fit_together(tmp_path):
    out = save_flow(tmp_path, max_shard_gb=3e-5)
    shard = min(out.glob("model-*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    assert f"cannot read {shard}, download it again" in message(load_flow, out)
    shard.unlink()
    assert f"{shard} is missing" in message(load_flow, out)
    for index in ("{}", '{"weight_map": {"a": 1}}'):
        (out / "model.safetensors.index.json").write_text(index)
        assert "has no weight_map" in message(load_flow, out)


@pytest.mark.parametrize(("first", "second"), [(3e-5, 5), (5, 3e-5), (3e-5, 5e-5)])
def test_saving_again(first, second, tmp_path):
    """Nothing of the old model is left, whatever its files were; other files are not touched."""
    save_flow(tmp_path, max_shard_gb=first)
    for name in ("mine.txt", "model_of_mine.safetensors", "model.safetensors.bak"):
        (tmp_path / name).write_text("keep")
    flow = tiny_flow(channels=128)
    save_flow(tmp_path, flow, max_shard_gb=second)
    assert same(parameters(load_flow(tmp_path, dtype="float32")), parameters(flow))
    shards = sorted(tmp_path.glob("model*.safetensors"))
    single = tmp_path / "model.safetensors" in shards
    assert single == (second == 5)
    assert (tmp_path / "model.safetensors.index.json").exists() != single
    assert (tmp_path / "model_of_mine.safetensors").read_text() == "keep"
    assert not list(tmp_path.glob("partial-*"))


def test_lazy_weights_of_the_same_directory(tmp_path):
    flow = tiny_flow()
    save_flow(tmp_path, flow)
    save_model(tmp_path, {n: w + 1 for n, w in load_weights(tmp_path).items()}, config_of(flow))
    assert same(load_weights(tmp_path), {name: w + 1 for name, w in parameters(flow).items()})


def test_further_files(tmp_path):
    save_flow(tmp_path, files={"NOTICE": b"whose it is"})
    assert (tmp_path / "NOTICE").read_bytes() == b"whose it is"


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("shard_gb", [5, 3e-5])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_interrupted(existing, shard_gb, error, tmp_path, monkeypatch):
    """Wherever saving stops, what loads is the old model, the new one, or nothing."""
    old, new = tiny_flow(), tiny_flow()
    new.blocks[0].proj_in.bias = new.blocks[0].proj_in.bias + 1
    replace, outcomes, stop_at = os.replace, [], 0
    while True:
        directory = tmp_path / str(stop_at)
        if existing:
            save_flow(directory, old)
        calls = 0

        def stop(source, target, limit=stop_at):
            nonlocal calls
            calls += 1
            if calls > limit:
                raise error
            replace(source, target)

        monkeypatch.setattr(os, "replace", stop)
        try:
            save_flow(directory, new, max_shard_gb=shard_gb)
            break
        except KeyboardInterrupt:
            pass
        except StarflowError as failure:
            assert str(failure) == f"cannot write {directory}: No space left on device"
        finally:
            monkeypatch.setattr(os, "replace", replace)
        assert not list(directory.glob("partial-*"))
        outcomes.append(message(load_flow, directory))
        stop_at += 1
    assert len(outcomes) == stop_at >= 2
    assert all(
        "config.json" in outcome or "is a folder" in outcome or "unknown model" in outcome for outcome in outcomes
    )
    assert same(parameters(load_flow(tmp_path / str(stop_at), dtype="float32")), parameters(new))


@pytest.mark.parametrize("existing", [False, True])
def test_interrupted_while_writing_tensors(existing, tmp_path):
    flow = tiny_flow()
    directory = tmp_path / "model"
    if existing:
        save_flow(directory, flow)
    names = parameters(flow)

    def tensors():
        yield from [(name, mx.zeros_like(w)) for name, w in names.items()][:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_tensors(directory, names, tensors(), config_of(flow))
    if existing:
        assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors"]
        assert same(parameters(load_flow(directory, dtype="float32")), names)
    else:
        assert not directory.exists()


def test_where_it_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert message(save_flow, tmp_path / "file").startswith(f"cannot write {tmp_path / 'file'}")
    assert message(save_flow, tmp_path / "file" / "below").startswith("cannot write")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    assert "Permission denied" in message(save_flow, tmp_path / "model")


def test_another_kind_of_model_is_not_overwritten(tmp_path):
    out = convert_t5(DATA / "t5", tmp_path / "model")
    assert "holds another model ('t5', not 'starflow'); give another folder" in message(save_flow, out)
    load_text_encoder(out)
    (out / "config.json").write_text("{")
    assert "is not valid JSON" in message(save_flow, out)


# ---- damage


def test_not_a_model(tmp_path):
    assert "holds no config.json" in message(read_config, tmp_path)
    assert "is not a folder" in message(read_config, tmp_path / "nowhere")
    assert "holds no config.json" in message(load_flow, tmp_path)
    assert "holds no config.json" in message(load_text_encoder, tmp_path)
    assert "is not a folder" in message(load_vae, tmp_path / "vae")
    for content, text in (("{", "is not valid JSON"), ("[]", "holds a JSON list"), ("\udcff", "is not valid JSON")):
        (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
        assert text in message(load_flow, tmp_path)
        assert str(tmp_path / "config.json") in message(load_flow, tmp_path)


def test_damaged_weights(tmp_path):
    out = save_flow(tmp_path)
    path = out / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert message(load_flow, out).startswith(f"cannot read {path}, download it again")
    path.write_bytes(b"\xff" * 1000)
    assert message(load_flow, out).startswith(f"cannot read {path}, download it again")
    path.unlink()
    assert "holds no model.safetensors" in message(load_flow, out)


def test_wrong_tensors(tmp_path):
    out = save_flow(tmp_path)
    name = "blocks.0.proj_in.weight"
    width = load_weights(out)[name].shape[0]
    edit_weights(out, blocks__0__proj_in__weight=None)
    assert f"{out} lacks the tensor {name};" in message(load_flow, out)
    edit_weights(out, blocks__0__proj_in__weight=mx.zeros((width, 99)), a=mx.zeros(1), b=mx.zeros(1))
    assert "does not account for: a (and 1 more)" in message(load_flow, out)
    edit_weights(out, a=None, b=None)
    assert f"{name} has shape ({width}, 99), but its config says" in message(load_flow, out)
    edit_weights(out, blocks__0__proj_in__weight=mx.zeros((width, 4), mx.int32))
    assert f"{name} is int32, not float32" in message(load_flow, out)


def test_configs_that_do_not_fit(tmp_path):
    out = save_flow(tmp_path)
    edit_config(out, surprise=1)
    assert f"{out / 'config.json'}: flow config: unknown key surprise" in message(load_flow, out)
    edit_config(out, surprise=None, model_type="llama")
    assert "model_type 'llama' is not a flow's, starflow or tarflow" in message(load_flow, out)
    edit_config(out, model_type=None)
    assert "model_type None is not a flow's" in message(load_flow, out)


# ---- quantization


@pytest.mark.parametrize("how", list(QUANTIZATIONS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantized_round_trip(how, dtype, tmp_path):
    flow = wide_flow()
    quantization = quantize_module(flow, how)
    mode, bits, group_size = QUANTIZATIONS[how]
    assert quantization == {"group_size": group_size, "bits": bits, "mode": mode}
    save_model(tmp_path, parameters(flow), config_of(flow, quantization=quantization))
    loaded = load_flow(tmp_path, dtype=dtype)
    assert quantized_layers(loaded).keys() == quantized_layers(flow).keys()
    assert any("proj_txt" in path for path in quantized_layers(loaded))
    if dtype == "float32":
        assert same(parameters(loaded), parameters(flow))
    for name, weight in parameters(loaded).items():
        if name.endswith((".scales", ".biases")) and mode == "affine":
            assert weight.dtype == (mx.float32 if ON_CPU else parse_dtype(dtype))
        elif mx.issubdtype(weight.dtype, mx.floating):
            assert weight.dtype == parse_dtype(dtype)


def test_dense_layers_stay_dense():
    flow = wide_flow()
    flow.blocks[0].proj_out = nn.Linear(64, 64)
    quantize_module(flow, 8)
    kinds = {path.rpartition(".")[2] for path in quantized_layers(flow)}
    assert kinds == {"qkv", "proj", "0", "2", "proj_txt"}


def test_own_settings_of_a_layer(tmp_path):
    flow = wide_flow()
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


def test_quantization_mistakes(tmp_path):
    assert "cannot quantize to 5; it must be one of 8, 6, 4, mxfp8" in message(quantize_module, wide_flow(), 5)
    assert "no layer is a multiple of 64 wide" in message(
        quantize_module, tiny_flow(channels=96, head_dim=32, expansion=1, txt_dim=32), 8
    )
    assert "cannot quantize to 8: " in message(quantize_module, wide_flow(), 8, 16)
    flow = wide_flow()
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
    assert "config.json has no quantization" in message(load_flow, tmp_path)


def test_load_module_keeps_dtypes():
    flow = tiny_flow()
    weights = {name: w.astype(mx.bfloat16) for name, w in parameters(flow).items()}
    assert load_module(flow, weights, "weights") is flow
    assert {w.dtype for w in parameters(flow).values()} == {mx.bfloat16}


# ---- text encoder and autoencoder


def test_text_encoder(tmp_path):
    out = convert_t5(DATA / "t5", tmp_path / "t5")
    golden = mx.load(str(DATA / "t5/golden.safetensors"))
    encoder, tokenizer = load_text_encoder(out, dtype="float32")
    hidden = encoder.encode(golden["input_ids"], golden["attention_mask"])
    assert (mx.abs(hidden - golden["masked"]).max() / mx.abs(golden["masked"]).max()).item() < 1e-5
    assert tokenizer.vocab_size == 1000
    edit_config(out, vocab_size=900)
    edit_weights(out, shared__weight=mx.zeros((900, 64)))
    assert "has 1000 tokens but the model only 900" in message(load_text_encoder, out)
    (out / "spiece.model").unlink()
    assert "spiece.model: No such file" in message(load_text_encoder, out)


def test_quantized_text_encoder(tmp_path):
    out = convert_t5(DATA / "t5", tmp_path / "t5", quantize=8)
    golden = mx.load(str(DATA / "t5/golden.safetensors"))
    encoder, _ = load_text_encoder(out, dtype="float32")
    assert isinstance(encoder, T5Encoder)
    layers = quantized_layers(encoder)
    assert "shared" in layers
    assert not any("relative_attention_bias" in path for path in layers)
    hidden = encoder.encode(golden["input_ids"], golden["attention_mask"])
    assert (mx.abs(hidden - golden["masked"]).max() / mx.abs(golden["masked"]).max()).item() < 0.05


def test_autoencoder(tmp_path):
    out = convert_vae(DATA / "sd_vae", tmp_path / "vae")
    golden = mx.load(str(DATA / "sd_vae/golden.safetensors"))
    pictures = load_vae(out, dtype="float32").decode(golden["latents"].transpose(0, 2, 3, 1))
    expected = np.array(golden["decoded_raw"]).transpose(0, 2, 3, 1)
    assert np.abs(np.array(pictures) - expected).max() / np.abs(expected).max() < 1e-4
    shutil.copy(convert_t5(DATA / "t5", tmp_path / "t5") / "config.json", out)
    assert f"{out / 'config.json'}: autoencoder config" in message(load_vae, out)
