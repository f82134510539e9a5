"""Reading model directories: dtypes, strictness, damage."""

from __future__ import annotations

import shutil

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import message
from helpers.golden_files import golden_case
from helpers.model_directories import edit_config, edit_weights, save_flow
from helpers.paths import DATA
from helpers.tiny_flows import tiny_flow

from mlx_starflow.convert import convert_t5, convert_vae
from mlx_starflow.model_dir import weights
from mlx_starflow.model_dir.directory import load_flow, load_text_encoder, load_vae
from mlx_starflow.model_dir.files import load_weights, read_config
from mlx_starflow.model_dir.quantization import quantized_layers
from mlx_starflow.model_dir.weights import automatic_dtype, load_module, parameters, parse_dtype
from mlx_starflow.models.flow import products_in
from mlx_starflow.models.t5 import T5Encoder

ON_CPU = mx.default_device().type == mx.cpu


# ---- dtypes


@pytest.mark.usefixtures("chosen_here")
def test_dtypes():
    assert automatic_dtype() == (mx.float32 if ON_CPU else mx.float16)
    assert parse_dtype("auto") is None
    assert parse_dtype("bfloat16") == parse_dtype(mx.bfloat16) == mx.bfloat16
    assert parse_dtype(None) is None
    assert message(parse_dtype, "int8") == "dtype 'int8' is not one of float32, bfloat16, float16"
    assert "is not one of" in message(parse_dtype, mx.int32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", mx.float16, None])
def test_loading_in_a_dtype(dtype, tmp_path):
    """Of a flow the linear layers within transformer layers alone; all that is small is float32."""
    flow = load_flow(save_flow(tmp_path), dtype=dtype)
    wanted = parse_dtype(dtype) or automatic_dtype()
    layers = ("attention.qkv", "attention.proj", "mlp.main.0", "mlp.main.2")
    for name, weight in parameters(flow).items():
        within = name.rpartition(".")[0].endswith(layers)
        assert weight.dtype == (wanted if within else mx.float32), name
    assert products_in(flow) == wanted


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_networks_are_of_one_dtype(dtype, tmp_path):
    """A T5 encoder keeps its residual stream in float32 by itself."""
    encoder, _ = load_text_encoder(convert_t5(golden_case("t5"), tmp_path / "t5"), dtype=dtype)
    assert {w.dtype for w in parameters(encoder).values()} == {parse_dtype(dtype)}


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
    assert "model_type 'llama' is not a flow's, starflow, tarflow, itarflow" in message(load_flow, out)
    edit_config(out, model_type=None)
    assert "model_type None is not a flow's" in message(load_flow, out)


# ---- modules


def test_load_module_keeps_dtypes():
    flow = tiny_flow()
    weights = {name: w.astype(mx.bfloat16) for name, w in parameters(flow).items()}
    assert load_module(flow, weights, "weights") is flow
    assert {w.dtype for w in parameters(flow).values()} == {mx.bfloat16}


# ---- text encoder and autoencoder


def test_weights_are_read_some_at_a_time(tmp_path, monkeypatch):
    flow = tiny_flow()
    save_flow(tmp_path, flow)
    most = max(weight.nbytes for weight in parameters(flow).values())
    evaluate, groups = mx.eval, []
    monkeypatch.setattr(weights, "READ_AT_ONCE", most)
    monkeypatch.setattr(mx, "eval", lambda *arrays: (groups.append(arrays), evaluate(*arrays)))
    read = load_flow(tmp_path, dtype="float16")
    sizes = [sum(weight.nbytes for weight in group[0]) for group in groups if group and isinstance(group[0], list)]
    assert len(sizes) > 2 and max(sizes) < 2 * most
    assert sum(sizes) == sum(weight.nbytes for weight in parameters(read).values())


def test_text_encoder(tmp_path):
    out = convert_t5(golden_case("t5"), tmp_path / "t5")
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
    out = convert_t5(golden_case("t5"), tmp_path / "t5", quantize=8)
    golden = mx.load(str(DATA / "t5/golden.safetensors"))
    encoder, _ = load_text_encoder(out, dtype="float32")
    assert isinstance(encoder, T5Encoder)
    layers = quantized_layers(encoder)
    assert "shared" in layers
    assert not any("relative_attention_bias" in path for path in layers)
    hidden = encoder.encode(golden["input_ids"], golden["attention_mask"])
    assert (mx.abs(hidden - golden["masked"]).max() / mx.abs(golden["masked"]).max()).item() < 0.05


def test_autoencoder(tmp_path):
    out = convert_vae(golden_case("sd_vae"), tmp_path / "vae")
    golden = mx.load(str(DATA / "sd_vae/golden.safetensors"))
    pictures = load_vae(out, dtype="float32").decode(golden["latents"].transpose(0, 2, 3, 1))
    expected = np.array(golden["decoded_raw"]).transpose(0, 2, 3, 1)
    assert np.abs(np.array(pictures) - expected).max() / np.abs(expected).max() < 1e-4
    shutil.copy(convert_t5(golden_case("t5"), tmp_path / "t5") / "config.json", out)
    assert f"{out / 'config.json'}: autoencoder config" in message(load_vae, out)
