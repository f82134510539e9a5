"""Models into the PyTorch reference, from model directories and official checkpoints; and what is refused."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import message
from helpers.golden_files import golden_case
from helpers.model_directories import (
    config_of,
    edit_config,
    edit_weights,
    save_flow,
    write_image_model,
    write_video_model,
)
from helpers.paths import DATA
from helpers.tiny_flows import tiny_flow
from helpers.torch_reference import DEVICES, both, relative, to_numpy

from mlx_starflow import load_flow as load_mlx
from mlx_starflow.convert import convert_flow
from mlx_starflow.model_dir.directory import load_text_encoder as load_mlx_encoder
from mlx_starflow.model_dir.directory import load_vae as load_mlx_vae
from mlx_starflow.model_dir.quantization import QUANTIZATIONS, quantize_module
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.models.tarflow import TarFlow, TarFlowConfig

pytestmark = [pytest.mark.torch, pytest.mark.parametrize("device", DEVICES)]


@pytest.fixture
def loading():
    from mlx_starflow.reference import loading

    return loading


def assert_same_flow(ours, torch_model, device: str, tolerance: float = 1e-5) -> None:
    """Both give the same noise."""
    config = ours.config
    rng = np.random.default_rng(0)
    x, x_torch = both(
        rng.standard_normal((1, config.img_size, config.img_size, config.channel_size)).astype(np.float32), device
    )
    text = text_torch = None
    if getattr(config, "txt_size", 0):
        text, text_torch = both(rng.standard_normal((1, 4, config.txt_dim)).astype(np.float32), device)
    assert relative(ours(x, text).z, torch_model(x_torch, text_torch).z) < tolerance
    assert not torch_model.training and not any(parameter.requires_grad for parameter in torch_model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_directory(loading, tmp_path, device, dtype):
    import torch

    directory = save_flow(tmp_path)
    torch_model = loading.load_flow(directory, device, dtype)
    assert {value.dtype for value in torch_model.parameters()} == {getattr(torch, dtype)}
    assert {value.device.type for value in torch_model.parameters()} == {device}
    assert_same_flow(load_mlx(directory, "float32"), torch_model, device, 1e-5 if dtype == "float32" else 0.03)


def test_default_precision(loading, tmp_path, device):
    import torch

    wanted = torch.float32 if device == "cpu" else torch.bfloat16
    assert loading.load_flow(save_flow(tmp_path), device).blocks[0].dtype == wanted


def test_shards(loading, tmp_path, device):
    directory = save_flow(tmp_path, max_shard_gb=1e-4)
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    assert_same_flow(load_mlx(directory, "float32"), loading.load_flow(directory, device, "float32"), device)


@pytest.mark.parametrize("stored", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("how", list(QUANTIZATIONS))
def test_quantized_weights(loading, tmp_path, device, how, stored):
    flow = tiny_flow("wide", layers_per_block=[1, 2, 3])
    flow.set_dtype(stored)
    quantization = quantize_module(flow, how)
    save_model(tmp_path, parameters(flow), config_of(flow, quantization=quantization))
    assert_same_flow(load_mlx(tmp_path, "float32"), loading.load_flow(tmp_path, device, "float32"), device)


def test_a_tarflow(loading, tmp_path, device):
    flow = TarFlow(TarFlowConfig(4, 1, 2, 32, 2, 1, head_dim=16, nvp=False))
    flow.var = 2 * flow.var
    save_model(tmp_path, parameters(flow), {"model_type": "tarflow", **flow.config.to_dict()})
    torch_model = loading.load_flow(tmp_path, device, "float32")
    assert_same_flow(load_mlx(tmp_path, "float32"), torch_model, device)
    assert (to_numpy(torch_model.var) == 2).all()


@pytest.mark.parametrize("case", ["t2i", "tarflow", "tarflow_vp"])
def test_an_official_checkpoint(loading, tmp_path, device, case):
    checkpoint, config = golden_case(case) / "model.pth", DATA / case / "config.yaml"
    torch_model = loading.load_flow(checkpoint, device, "float32", config=config)
    other = loading.load_flow(convert_flow(checkpoint, config, tmp_path / "model"), device, "float32")
    assert torch_model.config == other.config and torch_model.state_dict().keys() == other.state_dict().keys()
    assert all((value == other.state_dict()[name]).all() for name, value in torch_model.state_dict().items())


def test_text_encoder_and_autoencoder(loading, tmp_path, device):
    directory = write_image_model(tmp_path)
    encoder, tokenizer = loading.load_text_encoder(directory / "text_encoder", device, "float32")
    ours, our_tokenizer = load_mlx_encoder(directory / "text_encoder", "float32")
    ids, mask, _ = tokenizer.batch(["a cat", ""], 6)
    assert (ids == our_tokenizer.batch(["a cat", ""], 6)[0]).all()
    (ids, ids_torch), (mask, mask_torch) = both(ids, device), both(mask, device)
    assert relative(ours.encode(ids, mask), encoder.encode(ids_torch, mask_torch)) < 1e-5
    vae = loading.load_vae(directory / "vae", device, "float32")
    z, z_torch = both(np.random.default_rng(0).standard_normal((1, 4, 4, 4)).astype(np.float32), device)
    decoded = vae.decode(z_torch.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert relative(load_mlx_vae(directory / "vae", "float32").decode(z), decoded) < 1e-5


# ---- what is refused


def test_tensors_that_do_not_fit(loading, tmp_path, device):
    directory = save_flow(tmp_path)
    name = "blocks.1.proj_in.weight"
    edit_weights(directory, blocks__1__proj_in__weight=mx.zeros((3, 3)))
    assert f"{name} has shape (3, 3)" in message(loading.load_flow, directory, device)
    edit_weights(directory, blocks__1__proj_in__weight=None)
    assert f"lacks the tensor {name}" in message(loading.load_flow, directory, device)
    save_flow(directory)
    edit_weights(directory, extra=mx.zeros(3))
    assert "does not account for: extra" in message(loading.load_flow, directory, device)
    edit_config(directory, model_type="llama")
    assert "model_type 'llama' is not a flow's" in message(loading.load_flow, directory, device)


def test_video_models(loading, tmp_path, device):
    assert "makes videos" in message(loading.load_flow, write_video_model(tmp_path), device)


def test_damaged_files(loading, tmp_path, device):
    directory = write_image_model(tmp_path)
    for load, folder in (
        (loading.load_flow, directory),
        (loading.load_text_encoder, directory / "text_encoder"),
        (loading.load_vae, directory / "vae"),
    ):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        assert "model.safetensors" in message(load, folder, device)
        path.unlink()
        assert "no model.safetensors" in message(load, folder, device)
        (folder / "config.json").write_text("{")
        assert "config.json is not valid JSON" in message(load, folder, device)
    assert "unknown model" in message(loading.load_flow, "no-such-model", device)


def test_checkpoints_that_do_not_fit(loading, tmp_path, device):
    checkpoint = golden_case("t2i") / "model.pth"
    assert "give the YAML of its arguments" in message(loading.load_flow, checkpoint, device)
    wrong = DATA / "t2i_shifted/config.yaml"
    assert "account for: blocks.0.final_norm.weight" in message(loading.load_flow, checkpoint, device, config=wrong)
    missing = tmp_path / "missing.yaml"
    assert "missing.yaml" in message(loading.load_flow, checkpoint, device, config=missing)
    cut = tmp_path / "cut.pth"
    cut.write_bytes(checkpoint.read_bytes()[:-1000])
    assert "cut.pth" in message(loading.load_flow, cut, device, config=DATA / "t2i/config.yaml")


class Harmful:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_checkpoint_cannot_run_code(loading, tmp_path, device):
    path, trace = tmp_path / "model.pth", tmp_path / "trace"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps({"weight": Harmful(trace)}, protocol=2))
        archive.writestr("model/version", "3\n")
    assert "system" in message(loading.load_flow, path, device, config=DATA / "t2i/config.yaml")
    assert not trace.exists()


def test_devices_and_dtypes(loading, tmp_path, device):
    directory = save_flow(tmp_path)
    assert "neither cpu nor cuda" in message(loading.load_flow, directory, "tpu")
    assert "neither cpu nor cuda" in message(loading.load_flow, directory, "mps")
    assert "no device cuda:99" in message(loading.load_flow, directory, "cuda:99")
    assert "not in float16" in message(loading.load_flow, directory, device, mx.float16)
    assert "not in int8" in message(loading.load_flow, directory, device, "int8")
