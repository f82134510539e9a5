"""Folders of torch.distributed.checkpoint: read through PyTorch, refused in one line without it."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.golden_files import golden_case
from helpers.paths import DATA

from mlx_starflow.convert import convert_flow, convert_vae
from mlx_starflow.convert.common import open_tensors
from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir.files import load_weights

CONFIG = DATA / "t2i/config.yaml"


def save(state: dict, folder: Path) -> Path:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=str(folder), no_dist=True)
    assert (folder / ".metadata").is_file()
    assert (folder / "__0_0.distcp").is_file()
    return folder


def official(dtype: str = "float32") -> dict:
    import torch

    state = torch.load(golden_case("t2i") / "model.pth", weights_only=True)
    return {name: tensor.to(getattr(torch, dtype)) for name, tensor in state.items()}


def assert_same(found: Path, expected: Path) -> None:
    a, b = load_weights(found), load_weights(expected)
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype and mx.array_equal(a[name], b[name]).item() for name in b)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_flow(wrapper, dtype, tmp_path, recwarn):
    pytest.importorskip("torch")
    state = official(dtype)
    if wrapper:
        # As trainers do: the optimizer, the step and the like beside the model.
        state = {wrapper: state, "optimizer": {"exp_avg": state["var"]}, "step": 7, "note": "text"}
    folder = save(state, tmp_path / "t2i_model_1_128_3_2_0.30.pth")
    out = convert_flow(folder, CONFIG, tmp_path / "out")
    assert_same(out, convert_flow(golden_case("t2i") / "model.pth", CONFIG, tmp_path / "expected", dtype=dtype))
    assert not [w for w in recwarn if "torch" in str(w.filename)]


@pytest.mark.torch
def test_autoencoder(tmp_path):
    pytest.importorskip("torch")
    from safetensors.torch import load_file

    state = {f"vae.{n}": t for n, t in load_file(golden_case("sd_vae") / "diffusion_pytorch_model.safetensors").items()}
    folder = save(state, tmp_path / "sd-vae-ft-ema_0.30.pth")
    out = convert_vae(folder, tmp_path / "out", config=DATA / "sd_vae/config.json")
    assert_same(out, convert_vae(golden_case("sd_vae"), tmp_path / "expected"))


@pytest.mark.torch
def test_dtypes(tmp_path):
    torch = pytest.importorskip("torch")
    kinds = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    tensors = {kind: torch.tensor([[0, 1, 1], [1, 0, 1]]).to(getattr(torch, kind)) for kind in kinds}
    found = open_tensors(save({**tensors, "scalar": torch.tensor(0.5)}, tmp_path / "dcp"))
    assert found["scalar"].read().item() == 0.5
    for kind, tensor in tensors.items():
        array = found[kind].read()
        assert array.dtype == found[kind].dtype == getattr(mx, kind + "_" * (kind == "bool"))
        assert found[kind].shape == (2, 3)
        with mx.stream(mx.cpu):
            assert array.astype(mx.float32).tolist() == tensor.tolist()
    folder = save({"a": torch.zeros(2, dtype=torch.complex64).conj()}, tmp_path / "complex")
    assert open_tensors(folder)["a"].dtype == mx.complex64


@pytest.mark.torch
@pytest.mark.parametrize("through", [("posix", "mkdir"), ("torch.distributed.checkpoint.filesystem", "os.mkdir")])
def test_metadata_runs_no_code(through, tmp_path):
    pytest.importorskip("torch")
    folder = save({"a": official()["var"]}, tmp_path / "dcp")
    text = str(tmp_path / "ran").encode()
    parts = [b"\x8c" + bytes([len(part)]) + part.encode() for part in through]
    program = b"\x80\x04" + b"".join(parts) + b"\x93X" + len(text).to_bytes(4, "little") + text + b"\x85R."
    (folder / ".metadata").write_bytes(program)
    with pytest.raises(StarflowError, match=r"\.metadata: it calls for .*mkdir', which tensors do not need"):
        open_tensors(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.torch
def test_damage(tmp_path):
    pytest.importorskip("torch")
    folder = save({"a": official()["var"]}, tmp_path / "dcp")
    metadata = (folder / ".metadata").read_bytes()
    tensors = open_tensors(folder)
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(StarflowError, match="cannot read a from"):
        tensors["a"].read()
    for content in (b"", metadata[:100], pickle.dumps({"a": 1})):
        (folder / ".metadata").write_bytes(content)
        with pytest.raises(StarflowError, match=r"cannot read .*\.metadata") as error:
            open_tensors(folder)
        assert "\n" not in str(error.value)
    save({"step": 3}, tmp_path / "empty")
    with pytest.raises(StarflowError, match="holds no tensors"):
        open_tensors(tmp_path / "empty")


def test_without_torch(tmp_path):
    """One line says what is missing; a folder that is no such checkpoint is not called one."""
    folder = tmp_path / "model.pth"
    folder.mkdir()
    with pytest.raises(StarflowError, match="is a directory"):
        convert_flow(folder, CONFIG, tmp_path / "out")
    (folder / ".metadata").write_bytes(b"")
    (folder / "__0_0.distcp").write_bytes(b"")
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    command = [
        sys.executable,
        "-m",
        "mlx_starflow",
        "convert",
        "flow",
        folder,
        "--config",
        CONFIG,
        "-o",
        tmp_path / "o",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path.cwd())])}
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert run.returncode == 2
    assert run.stderr.startswith(
        f"Error: {folder} was written by torch.distributed.checkpoint, which only PyTorch reads"
    )
    assert run.stderr.count("\n") == 1
    assert not (tmp_path / "o").exists()
