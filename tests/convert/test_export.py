"""Model directories back to PyTorch: every tensor bit for bit, in files that PyTorch reads."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import yaml
from helpers.golden_files import golden_case
from helpers.paths import DATA

from mlx_starflow.convert import archive, convert_flow, convert_t5, convert_vae, export_model, read_checkpoint
from mlx_starflow.convert.archive import write_archive
from mlx_starflow.convert.common import open_tensors
from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir.directory import load_flow
from mlx_starflow.model_dir.files import Spec, load_weights, read_config
from mlx_starflow.models.starflow import FlowConfig, is_dead_buffer

CASES = sorted(path.parent.name for path in DATA.glob("*/config.yaml"))
SUFFIXES = [".pth", ".safetensors"]


def convert(case: str, out: Path, **options: object) -> Path:
    return convert_flow(golden_case(case) / "model.pth", DATA / case / "config.yaml", out, **options)


def read(path: Path) -> dict[str, mx.array]:
    return {name: tensor.read() for name, tensor in open_tensors(path).items()}


def bits(array: mx.array) -> tuple[object, ...]:
    return array.dtype, array.shape, np.array(array.reshape(-1).view(mx.uint8)).tobytes()


def assert_same(found: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    assert found.keys() == expected.keys()
    assert all(bits(found[name]) == bits(expected[name]) for name in expected)


# ---- what comes back


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("case", CASES)
def test_flows_come_back(case, suffix, tmp_path):
    model = convert(case, tmp_path / "model")
    exported = export_model(model, tmp_path / f"out{suffix}")
    official = read(golden_case(case) / "model.pth")
    if not case.startswith(("tarflow", "itarflow")):
        official = {name: tensor for name, tensor in official.items() if not is_dead_buffer(name)}
    assert_same(read(exported), official)
    again = convert_flow(exported, DATA / case / "config.yaml", tmp_path / "again")
    assert_same(load_weights(again), load_weights(model))
    assert (again / "config.json").read_bytes() == (model / "config.json").read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_text_encoder_comes_back(suffix, tmp_path):
    exported = export_model(convert_t5(golden_case("t5"), tmp_path / "model"), tmp_path / f"out{suffix}")
    assert_same(read(exported), read(golden_case("t5") / "model.safetensors"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_autoencoder_comes_back(suffix, tmp_path):
    exported = export_model(convert_vae(golden_case("sd_vae"), tmp_path / "model"), tmp_path / f"out{suffix}")
    assert_same(read(exported), read(golden_case("sd_vae") / "diffusion_pytorch_model.safetensors"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_dtypes(suffix, dtype, tmp_path):
    model = convert("t2i", tmp_path / "model", dtype=dtype)
    assert_same(read(export_model(model, tmp_path / f"out{suffix}")), load_weights(model))


def test_shards(tmp_path):
    from mlx_starflow.model_dir.saving import save_model

    model = convert("t2i", tmp_path / "model")
    save_model(tmp_path / "shards", load_weights(model), read_config(model), max_shard_gb=1e-3)
    assert len(list((tmp_path / "shards").glob("model-*"))) > 2
    paths = [export_model(tmp_path / name, tmp_path / f"{name}.pth") for name in ("model", "shards")]
    assert_same(*map(read, paths))


@pytest.mark.parametrize(
    ("quantize", "bound"), [("8", 0.01), ("6", 0.04), ("4", 0.15), ("mxfp8", 0.06), ("mxfp4", 0.3), ("nvfp4", 0.25)]
)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_quantized_weights_are_dequantized(quantize, bound, dtype, tmp_path):
    dense = read(export_model(convert("t2i", tmp_path / "dense", dtype=dtype), tmp_path / "dense.pth"))
    model = convert("t2i", tmp_path / "model", quantize=quantize, dtype=dtype)
    found = read(export_model(model, tmp_path / "out.pth"))
    assert {name: (w.shape, w.dtype) for name, w in found.items()} == {
        name: (w.shape, w.dtype) for name, w in dense.items()
    }
    packed = {name.removesuffix("scales") + "weight" for name in load_weights(model) if name.endswith("scales")}
    assert packed
    for name, weight in dense.items():
        if name not in packed:
            assert bits(weight) == bits(found[name])
            continue
        difference = mx.abs(weight - found[name]).max() / mx.abs(weight).max()
        # In bfloat16 the groups' scales are rounded as well.
        assert difference.item() < bound + 0.01 * (dtype is not None)


def test_layers_with_settings_of_their_own(tmp_path):
    model = convert("t2i", tmp_path / "model", quantize=8)
    config = read_config(model)
    weights = load_weights(model)
    path = "blocks.0.attn_blocks.0.mlp.main.0"
    dense = mx.random.normal((512, 128))
    parts = mx.quantize(dense, group_size=32, bits=4)
    weights |= zip([f"{path}.{part}" for part in ("weight", "scales", "biases")], parts, strict=True)
    config["quantization"][path] = {"group_size": 32, "bits": 4, "mode": "affine"}
    from mlx_starflow.model_dir.saving import save_model

    save_model(model, weights, config)
    found = read(export_model(model, tmp_path / "out.pth"))[f"{path}.weight"]
    assert bits(found) == bits(mx.dequantize(*parts, group_size=32, bits=4))


def test_an_exported_quantized_flow_is_the_quantized_flow(tmp_path, golden):
    model = convert("t2i", tmp_path / "model", quantize=4)
    dense = convert_flow(export_model(model, tmp_path / "out.pth"), DATA / "t2i/config.yaml", tmp_path / "dense")
    x, y = golden("t2i")["x"], golden("t2i")["y"]
    a, b = (load_flow(path, dtype="float32")(x, y).z for path in (model, dense))
    assert mx.abs(a - b).max().item() < 1e-5 * mx.abs(a).max().item()


# ---- the file


def test_a_pth_is_laid_out_as_pytorch_does(tmp_path):
    model = convert("t2i", tmp_path / "model")
    path = export_model(model, tmp_path / "out.pth")
    count = len(load_weights(model))
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        names = [f"archive/data/{i}" for i in range(count)]
        assert file.namelist() == ["archive/data.pkl", "archive/byteorder", *names, "archive/version"]
        assert file.read("archive/byteorder") == b"little"
        assert file.read("archive/version") == b"3\n"
        assert all(info.compress_type == zipfile.ZIP_STORED for info in file.infolist())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.pth"]
    again = export_model(model, tmp_path / "deeper/folder/out.pth")
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_odd_tensors(suffix, tmp_path, monkeypatch):
    arrays = {
        "scalar": mx.array(1.5),
        "empty": mx.zeros((0, 3)),
        "größe": mx.arange(6, dtype=mx.int64).reshape(2, 3).T,
        "bool": mx.array([True, False, True]),
        **{f"{d}": mx.ones((3,), getattr(mx, d)) for d in ("bfloat16", "float16", "int32", "int16", "int8", "uint8")},
        "long": mx.random.normal((1000, 3)),
    }
    layout = {name: Spec(array.shape, array.dtype) for name, array in arrays.items()}
    path = write_archive(tmp_path / f"a{suffix}", layout, arrays.items())
    assert_same(read(path), arrays)
    # As if 4 KB were more than 32 bits can count.
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1 << 12)
    assert_same(read(write_archive(tmp_path / f"b{suffix}", layout, arrays.items())), arrays)


@pytest.mark.parametrize("value", [0, 255, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 40])
def test_numbers_of_the_pickle(value):
    assert pickle.loads(pickle.PROTO + b"\2" + archive._number(value) + pickle.STOP) == value


def test_memory(tmp_path):
    """Many layers are written in the memory of a few tensors."""
    source = read_checkpoint(golden_case("t2i") / "model.pth")
    weights = {name: source.mx(name) for name in source}
    for name in [name for name in weights if name.startswith("blocks.2.attn_blocks.0.")]:
        for layer in range(2, 60):
            weights[name.replace("attn_blocks.0", f"attn_blocks.{layer}")] = weights[name]
    values = yaml.safe_load((DATA / "t2i/config.yaml").read_text())["arguments"]
    values = {key: value for entry in values for key, value in entry.items()} | {"layers_per_block": "1 1 60"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    mx.save_safetensors(str(tmp_path / "deep.safetensors"), weights)
    del weights
    for quantize in (None, 8):
        model = convert_flow(tmp_path / "deep.safetensors", tmp_path / "config.yaml", tmp_path / "m", quantize=quantize)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        out = export_model(model, tmp_path / "out.pth")
        assert mx.get_peak_memory() - before < out.stat().st_size / 20
    shutil.rmtree(tmp_path)


# ---- mistakes


def mistake(model: Path, path: Path) -> str:
    with pytest.raises(StarflowError) as error:
        export_model(model, path)
    assert "\n" not in str(error.value)
    return str(error.value)


def change_config(model: Path, change: Callable[[dict], object]) -> None:
    config = read_config(model)
    change(config)
    (model / "config.json").write_text(json.dumps(config))


def test_mistakes(tmp_path):
    assert "is not a folder" in mistake(tmp_path / "nowhere", tmp_path / "out.pth")
    model = convert("tarflow", tmp_path / "model", quantize=8)
    assert "must end in .pth (PyTorch) or in .safetensors" in mistake(model, tmp_path / "out.onnx")
    for name in ("out.pth", "model.safetensors"):
        assert "is in the model's own folder" in mistake(model, model / name)
    (tmp_path / "file").write_text("")
    assert "cannot be written" in mistake(model, tmp_path / "file/out.pth")
    change_config(model, lambda c: c["quantization"].update(bits=3))
    assert "qkv.weight has shape (384, 32), but its config says (384, 12)" in mistake(model, tmp_path / "out.pth")
    change_config(model, lambda c: c.pop("quantization"))
    assert "config.json has no quantization" in mistake(model, tmp_path / "out.pth")
    change_config(model, lambda c: c.update(model_type="bert"))
    assert "model_type 'bert' is not known; it must be one of 'starflow'" in mistake(model, tmp_path / "out.pth")
    (model / "config.json").unlink()
    assert "holds no config.json" in mistake(model, tmp_path / "out.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failure_leaves_the_old_file(suffix, tmp_path):
    path = tmp_path / f"out{suffix}"
    path.write_bytes(b"old")

    def arrays():
        yield "a", mx.zeros(3)
        raise StarflowError("the disk is gone")

    layout = {name: Spec((3,), mx.float32) for name in "ab"}
    with pytest.raises(StarflowError, match="the disk is gone"):
        write_archive(path, layout, arrays())
    with pytest.raises(KeyError, match="no array came for b"):
        write_archive(path, layout, [("a", mx.zeros(3))])
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# ---- PyTorch reads it


@pytest.mark.torch
@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_it(mmap, tmp_path):
    torch = pytest.importorskip("torch")
    for dtype in (None, "bfloat16"):
        path = export_model(convert("t2i", tmp_path / "model", dtype=dtype), tmp_path / "out.pth")
        state = torch.load(path, weights_only=True, mmap=mmap)
        expected = torch.load(golden_case("t2i") / "model.pth", weights_only=True)
        assert state.keys() == {name for name in expected if not is_dead_buffer(name)}
        for name, tensor in state.items():
            assert torch.equal(tensor, expected[name].to(tensor.dtype))
            assert tensor.dtype == getattr(torch, dtype or "float32")
            assert tensor.is_contiguous()
            assert not mmap or tensor.data_ptr() % 64 == 0


@pytest.mark.torch
@pytest.mark.parametrize("limit", [zipfile.ZIP64_LIMIT, 1 << 12])
def test_torch_loads_odd_tensors(limit, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    arrays = {"scalar": mx.array(2.5), "empty": mx.zeros((0, 3)), "b": mx.array([True, False]), "l": mx.ones((99, 99))}
    layout = {name: Spec(array.shape, array.dtype) for name, array in arrays.items()}
    state = torch.load(write_archive(tmp_path / "a.pth", layout, arrays.items()), weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {n: a.shape for n, a in arrays.items()}
    assert all(np.array_equal(state[name].numpy(), np.array(arrays[name])) for name in arrays)


@pytest.mark.torch
@pytest.mark.parametrize(
    "case", [case for case in CASES if case != "t2v" and not case.startswith(("tarflow", "itarflow"))]
)
def test_the_reference_runs_it(case, tmp_path, golden):
    torch = pytest.importorskip("torch")
    from mlx_starflow.reference.starflow import STARFlow

    model = convert(case, tmp_path / "model")
    torch_model = STARFlow(FlowConfig.from_dict(read_config(model)))
    torch_model.load_state_dict(torch.load(export_model(model, tmp_path / "out.pth"), weights_only=True), strict=True)
    arrays = golden(case).arrays
    x, y = (torch.from_numpy(arrays[name].copy()) for name in ("x", "y"))
    with torch.no_grad():
        z = torch_model(x, y).z.numpy()
    assert np.abs(z - arrays["z"]).max() < 1e-5 * np.abs(arrays["z"]).max()


@pytest.mark.torch
def test_transformers_reads_the_text_encoder(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = convert_t5(golden_case("t5"), tmp_path / "model")
    (tmp_path / "hf").mkdir()
    shutil.copy(model / "config.json", tmp_path / "hf")
    export_model(model, tmp_path / "hf/model.safetensors")
    encoder, loading = transformers.T5EncoderModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not loading["unexpected_keys"]
    assert not loading["missing_keys"]
    expected = read(golden_case("t5") / "model.safetensors")
    assert np.array_equal(encoder.shared.weight.detach().numpy(), np.array(expected["shared.weight"]))
