"""A model directory's files lie in it: nothing else is read, whatever its files and links say."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import message
from helpers.golden_files import golden_case
from helpers.model_directories import edit_config, save_flow, write_image_model

from mlx_starflow.convert import convert_t5
from mlx_starflow.likelihood.calibration import CalibrationStatistics
from mlx_starflow.model_dir.adapters import Adapter
from mlx_starflow.model_dir.directory import ModelDirectory, load_flow, load_text_encoder
from mlx_starflow.model_dir.files import load_weights, read_config
from mlx_starflow.model_dir.hub import converted_directory, find_model
from mlx_starflow.sampling.methods import SamplingPlan


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_flow(tmp_path / "model")


def write_index(model: Path, file: str) -> None:
    names = dict.fromkeys(load_weights(model), file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize("absolute", [False, True])
def test_an_index_that_leads_out(absolute, model):
    outside = model.parent / "x.safetensors"
    shutil.copy(model / "model.safetensors", outside)
    write_index(model, str(outside) if absolute else "../x.safetensors")
    assert "leads out of" in message(load_flow, model)


def test_an_index_of_a_t5_that_leads_out(tmp_path):
    source = tmp_path / "t5"
    shutil.copytree(golden_case("t5"), source)
    (source / "model.safetensors").rename(tmp_path / "x.safetensors")
    names = dict.fromkeys(mx.load(str(tmp_path / "x.safetensors")), "../x.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert "leads out of" in message(convert_t5, source, tmp_path / "out")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("to", ["outside", "/dev/zero", "pipe"])
def test_links_pipes_and_devices(name, to, model):
    (model / name).rename(model.parent / "outside")
    if to == "pipe":
        os.mkfifo(model / name)
    else:
        (model / name).symlink_to(to if to.startswith("/") else model.parent / to)
    assert "leads out of" in (text := message(load_flow, model)) or "not a regular file" in text


@pytest.mark.parametrize("name", ["spiece.model", "config.json"])
def test_a_text_encoders_files(name, tmp_path):
    folder = write_image_model(tmp_path / "model") / "text_encoder"
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    assert "leads out of" in message(load_text_encoder, folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert "is not a regular file" in message(load_text_encoder, folder)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("sampling_plan.json", SamplingPlan.find),
        ("likelihood.json", CalibrationStatistics.find),
        ("adapter_config.json", Adapter.read),
    ],
)
def test_files_beside_a_flow(name, read, model):
    (model / name).symlink_to("/dev/zero")
    assert "leads out of" in message(read, model)
    (model / name).unlink()
    (model / name).write_text("[" * 100_000)
    assert name in message(read, model)


PLAN = {"version": 1, "tolerance": 1e-3, "blocks": [{"method": "rolling", "window": 4}]}


@pytest.mark.parametrize(
    "change",
    [
        {"version": []}, {"blocks": 3}, {"blocks": [3]}, {"blocks": [{"method": []}]},
        {"blocks": [{"method": "jacobi", "block_size": "x"}]}, {"blocks": [{"method": "rolling", "window": 1.5}]},
        {"blocks": [{"method": "rolling", "tolerance": None}]}, {"tolerance": "x"}, {"tolerance": 10**400},
        {"measured": 3},
    ],
)  # fmt: skip
def test_plans_of_wrong_types(change, model):
    (model / "sampling_plan.json").write_text(json.dumps(PLAN))
    assert SamplingPlan.find(model).blocks[0].window == 4
    (model / "sampling_plan.json").write_text(json.dumps({**PLAN, **change}))
    assert "mlx-starflow tune" in message(SamplingPlan.find, model)


@pytest.mark.parametrize("config", [{"kind": []}, {"kind": "lora", "scale": 10**400}, {"kind": "lora", "scale": "1"}])
def test_adapters_of_wrong_types(config, model):
    (model / "adapter_config.json").write_text(json.dumps(config))
    assert "an adapter of mlx-starflow has a kind" in message(Adapter.read, model)


def test_parts_of_a_config_of_wrong_types(model):
    for value in ([], "x", 3):
        edit_config(model, quantization=value, pipeline=value)
        directory = ModelDirectory(model)
        assert "quantization must hold names and values" in message(directory.flow.load)
        assert "pipeline must hold names and values" in message(getattr, directory, "pipeline")
    edit_config(model, model_type=["starflow"])
    assert "is not a flow's" in message(load_flow, model)


@pytest.mark.parametrize(
    "settings", [{"bits": []}, {"bits": 3.5}, {"group_size": 0}, {"mode": {}}, {"group_size": 10**9}]
)
def test_quantization_of_wrong_types(settings, tmp_path):
    folder = save_flow(tmp_path)
    weights = dict(mx.load(str(folder / "model.safetensors")))
    layer = next(name.removesuffix(".weight") for name, w in weights.items() if w.ndim == 2 and w.shape[1] % 32 == 0)
    parts = mx.quantize(weights[f"{layer}.weight"], group_size=32, bits=8)
    weights.update(zip((f"{layer}.weight", f"{layer}.scales", f"{layer}.biases"), parts, strict=True))
    mx.save_safetensors(str(folder / "model.safetensors"), {name: mx.array(w) for name, w in weights.items()})
    good = {"group_size": 32, "bits": 8, "mode": "affine"}
    edit_config(folder, quantization=good)
    load_flow(folder)
    edit_config(folder, quantization={**good, **settings})
    message(load_flow, folder)


def test_names_that_no_file_system_has(tmp_path, monkeypatch):
    for name in ("x" * 300, "a/" + "b" * 300, "a\0b"):
        message(find_model, name)
        message(read_config, tmp_path / name)
        message(Adapter.read, tmp_path / name)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("MLX_STARFLOW_CACHE", raising=False)
    monkeypatch.setattr(Path, "expanduser", _homeless)
    assert "no home folder" in message(find_model, "~/model")
    assert "no home folder" in message(converted_directory, "someone/flow")


def _homeless(path: Path) -> Path:
    if str(path).startswith("~"):
        raise RuntimeError("Could not determine home directory.")
    return path


def test_noise_of_other_numbers(tmp_path):
    from safetensors.numpy import save_file

    from mlx_starflow.editing.inversion import Encoded
    from mlx_starflow.media.noise import read_noise

    for noise, what in (
        (np.zeros((1, 2), np.int32), "holds no noise"),
        (np.array(1.0, np.float32), "holds no noise"),
        (np.full((1, 2), np.nan, np.float32), "the noise is not finite"),
    ):
        save_file({"noise": noise}, tmp_path / "a.safetensors")
        assert what in message(read_noise, tmp_path / "a.safetensors")
        assert what in message(Encoded.load, tmp_path / "a.safetensors")
    save_file({"noise": np.ones((1, 2), np.float64)}, tmp_path / "a.safetensors")
    assert read_noise(tmp_path / "a.safetensors").tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("kind", ["configs", "new", "old"])
@pytest.mark.parametrize("absolute", [False, True])
def test_a_commit_that_leads_out(kind, absolute, model):
    """What a cut-off writer left is finished before a model is read: a stranger's may not touch other files."""
    outside = model.parent / "mine"
    outside.write_text("mine")
    stage = model / ".writing"
    (stage / "new").mkdir(parents=True)
    (stage / "mine").write_text("not yours")
    names = {"configs": [], "new": [], "old": [], kind: [str(outside) if absolute else "../mine"]}
    (stage / "commit").write_text(json.dumps(names))
    assert "leads out of" in message(load_flow, model)
    assert outside.read_text() == "mine"


@pytest.mark.parametrize("content", ["[]", "{}", '{"configs": 3, "new": [], "old": []}', "[" * 100_000, "\0"])
def test_a_commit_that_is_none(content, model):
    (model / ".writing").mkdir()
    (model / ".writing/commit").write_text(content)
    assert "is damaged" in message(load_flow, model)
