"""Weights in every type that files hold: real numbers are decoded, all else is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import message
from helpers.golden_files import golden_case
from helpers.model_directories import save_flow, write_image_model
from helpers.paths import DATA

from mlx_starflow.convert import convert_flow, convert_t5, convert_vae
from mlx_starflow.convert.common import open_tensors
from mlx_starflow.model_dir.directory import load_flow, load_text_encoder, load_vae
from mlx_starflow.model_dir.files import load_weights, read_safetensors
from mlx_starflow.model_dir.weights import parameters

LOAD = {".": load_flow, "text_encoder": load_text_encoder, "vae": load_vae}


def encode(array: mx.array, kind: str) -> bytes:
    numbers = array.astype(mx.float32)
    if kind == "F8_E4M3":
        return np.array(mx.to_fp8(numbers)).tobytes()
    dtypes = {"F64": "<f8", "F32": "<f4", "I8": "i1", "I64": "<i8", "BOOL": "?", "F8_E5M2": "i1", "C64": "<c8"}
    return np.array(numbers).astype(dtypes[kind]).tobytes()


def write(path: Path, arrays: dict[str, mx.array], kinds: dict[str, str]) -> Path:
    """A safetensors file whose tensors are of the types that `kinds` says; float32 where it says nothing."""
    header, data = {}, b""
    for name, array in sorted(arrays.items(), key=lambda item: kinds.get(item[0], "F32") != "F64"):
        part = encode(array, kinds.get(name, "F32"))
        offsets = [len(data), len(data) + len(part)]
        header[name] = {"dtype": kinds.get(name, "F32"), "shape": list(array.shape), "data_offsets": offsets}
        data += part
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def rewrite(path: Path, kind: str, only: str = "") -> dict[str, mx.array]:
    """The same file with its tensors, or only one of them, of another type; what they were before."""
    arrays = {name: array + 0 for name, array in mx.load(str(path)).items()}
    mx.eval(arrays)
    write(path, arrays, {name: kind for name in arrays if name == only or not only})
    return arrays


def close(found: dict[str, mx.array], expected: dict[str, mx.array], kind: str) -> None:
    for name, array in found.items():
        wanted = np.array(expected[name].astype(mx.float32))
        if kind == "F8_E4M3":
            wanted = np.array(mx.from_fp8(mx.to_fp8(mx.array(wanted)), dtype=mx.float32))
            assert np.abs(wanted).max() < 10  # taken for bytes, they are up to 255
        assert np.array_equal(np.array(array.astype(mx.float32)), wanted), name


def test_every_float8(tmp_path):
    torch = pytest.importorskip("torch")
    bits = np.arange(256, dtype=np.uint8)
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [256], "data_offsets": [0, 256]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bits.tobytes())
    tensor = torch.tensor(bits).view(torch.float8_e4m3fn)
    found = open_tensors(tmp_path / "a.safetensors")["w"]
    assert found.dtype == mx.bfloat16
    assert np.array_equal(np.array(found.read().astype(mx.float32)), tensor.float().numpy(), equal_nan=True)


@pytest.mark.parametrize("part", LOAD)
@pytest.mark.parametrize("kind", ["F8_E4M3", "F64"])
def test_loading_real_numbers(part, kind, tmp_path):
    folder = write_image_model(tmp_path) / part
    before = rewrite(folder / "model.safetensors", kind)
    network = LOAD[part](folder, dtype="float32")
    close(parameters(network[0] if part == "text_encoder" else network), before, kind)


@pytest.mark.parametrize("part", LOAD)
@pytest.mark.parametrize("kind", ["I8", "I64", "BOOL", "F8_E5M2", "C64"])
def test_loading_other_numbers(part, kind, tmp_path):
    folder = write_image_model(tmp_path) / part
    name = next(name for name, array in load_weights(folder).items() if array.ndim == 2 or part == "vae")
    rewrite(folder / "model.safetensors", kind, only=name)
    assert name in message(LOAD[part], folder)


CONVERT = {"flow": "t2i", "t5": "t5", "vae": "sd_vae"}


def converted(part: str, folder: Path, kind: str, name: str = "") -> tuple[Path, dict[str, mx.array]]:
    """A checkpoint with tensors of some type, converted, and the same with the tensors as they were."""
    outs = []
    for each in ("F32", kind):
        source = folder / each
        source.mkdir()
        for file in golden_case(CONVERT[part]).iterdir() if part != "flow" else ():
            (source / file.name).write_bytes(file.read_bytes())
        if part == "flow":
            file = source / "model.safetensors"
            tensors = open_tensors(golden_case("t2i") / "model.pth")
            mx.save_safetensors(str(file), {name: tensor.read() for name, tensor in tensors.items()})
        else:
            file = next(path for path in source.glob("*model.safetensors"))
        rewrite(file, each, name)
        outs.append(folder / f"out-{each}")
        if part == "flow":
            convert_flow(file, DATA / "t2i/config.yaml", outs[-1])
        else:
            (convert_t5 if part == "t5" else convert_vae)(source, outs[-1])
    return outs[1], load_weights(outs[0])


@pytest.mark.parametrize("part", CONVERT)
@pytest.mark.parametrize("kind", ["F8_E4M3", "F64"])
def test_converting_real_numbers(part, kind, tmp_path):
    out, before = converted(part, tmp_path, kind)
    found = load_weights(out)
    assert {array.dtype for array in found.values()} == {mx.bfloat16 if kind == "F8_E4M3" else mx.float32}
    close(found, before, kind)


@pytest.mark.parametrize("part", CONVERT)
@pytest.mark.parametrize("kind", ["I8", "I64", "BOOL", "F8_E5M2", "C64"])
def test_converting_other_numbers(part, kind, tmp_path):
    name = {
        "flow": "blocks.0.proj_in.weight",
        "t5": "encoder.final_layer_norm.weight",
        "vae": "decoder.conv_in.weight",
    }[part]
    text = message(converted, part, tmp_path, kind, name)
    assert name in text
    assert not (tmp_path / f"out-{kind}/model.safetensors").exists()


def test_a_pth_of_integers(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {name: tensor.read() for name, tensor in open_tensors(golden_case("t2i") / "model.pth").items()}
    state = {name: torch.tensor(np.array(array)) for name, array in tensors.items()}
    state["blocks.1.proj_in.weight"] = state["blocks.1.proj_in.weight"].to(torch.int8)
    torch.save(state, tmp_path / "a.pth")
    text = message(convert_flow, tmp_path / "a.pth", DATA / "t2i/config.yaml", tmp_path / "out")
    assert "blocks.1.proj_in.weight is int8, not real numbers" in text


def test_what_stands_beside_64_bits(tmp_path):
    arrays = {
        "a": mx.array([[0.5, 1e300], [1, -2]]),
        "b": mx.array([3.0, 0]),
        "c": mx.array(7.0),
        "d": mx.zeros((0, 2)),
    }
    write(tmp_path / "a.safetensors", arrays, {"a": "F64", "b": "BOOL", "c": "I64", "d": "F64"})
    found = read_safetensors(tmp_path / "a.safetensors")
    assert found["a"].tolist() == [[0.5, float("inf")], [1, -2]]
    assert found["b"].tolist() == [True, False] and found["c"].item() == 7 and found["d"].shape == (0, 2)


def test_an_adapter_of_integers(tmp_path):
    from mlx_starflow.model_dir.adapters import Adapter

    save_flow(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"kind": "lora", "scale": 1.0}')
    arrays = {"blocks.0.proj_in.lora_a": mx.ones((2, 1)), "blocks.0.proj_in.lora_b": mx.ones((1, 32))}
    write(tmp_path / "adapters.safetensors", arrays, {"blocks.0.proj_in.lora_b": "I8"})
    assert "blocks.0.proj_in.lora_b is int8" in message(Adapter.read, tmp_path)
