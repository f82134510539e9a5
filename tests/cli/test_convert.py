"""`mlx-starflow convert`, as a user types it."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner, Result

from mlx_starflow.cli import main
from mlx_starflow.weights import load_flow, load_text_encoder, load_vae, load_weights, read_config

DATA = Path(__file__).parents[1] / "data"
CASES = sorted(path.parent.name for path in DATA.glob("*/model.pth"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["convert", *map(str, arguments)])


def mistake(*arguments: object) -> str:
    """The one line that a user's mistake ends in."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize("case", CASES)
def test_flow(case, tmp_path, golden):
    out = tmp_path / "model"
    result = run("flow", DATA / case / "model.pth", "--config", DATA / case / "config.yaml", "-o", out)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{out}: ")
    assert lines[0].endswith("MB of weights")
    assert "Apple Machine Learning Research Model License Agreement" in lines[1]
    flow = load_flow(out, dtype="float32")
    arrays = golden(case).arrays
    z = flow(mx.array(arrays["x"]), mx.array(arrays["y"]) if "y" in arrays else None).z
    assert golden(case).relative_error(z, "z") < 1e-5


def test_flow_options(tmp_path):
    source = [DATA / "t2i/model.pth", "--config", DATA / "t2i/config.yaml", "--output", tmp_path]
    assert run("flow", *source, "--quantize", "8", "--dtype", "bfloat16").exit_code == 0
    assert read_config(tmp_path)["quantization"] == {"group_size": 64, "bits": 8, "mode": "affine"}
    assert {w.dtype for w in load_weights(tmp_path).values()} == {mx.uint32, mx.bfloat16}


def test_text_encoder(tmp_path):
    result = run("text-encoder", DATA / "t5", "-o", tmp_path / "a")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{tmp_path / 'a'}: 0.")
    load_text_encoder(tmp_path / "a")
    assert run("text-encoder", DATA / "t5", "-o", tmp_path / "b", "--quantize", "mxfp8").exit_code == 0
    assert read_config(tmp_path / "b")["quantization"]["mode"] == "mxfp8"


def test_vae(tmp_path):
    result = run("vae", DATA / "sd_vae", "-o", tmp_path, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert "Apple" not in result.output
    load_vae(tmp_path)
    assert {w.dtype for w in load_weights(tmp_path).values()} == {mx.bfloat16}


def test_mistakes(tmp_path):
    config = ["--config", DATA / "t2i/config.yaml", "-o", tmp_path / "out"]
    assert "nothing.pth: No such file" in mistake("flow", tmp_path / "nothing.pth", *config)
    assert "lacks the tensor blocks.2.proj_txt.weight" in mistake("flow", DATA / "t2i_patch2/model.pth", *config)
    assert "is not a folder" in mistake("text-encoder", tmp_path / "nowhere", "-o", tmp_path / "out")
    assert "is not a folder" in mistake("vae", tmp_path / "nowhere", "-o", tmp_path / "out")
    (tmp_path / "file").write_text("")
    assert "cannot write" in mistake("vae", DATA / "sd_vae", "-o", tmp_path / "file")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["flow"],
        ["flow", "x.pth", "-o", "out"],
        ["flow", "x.pth", "--config", "x.yaml"],
        ["flow", "x.pth", "--config", "x.yaml", "-o", "out", "--quantize", "5"],
        ["vae", "folder", "-o", "out", "--dtype", "int8"],
        ["nonsense"],
    ],
)
def test_usage(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr


@pytest.mark.parametrize("command", [[], ["flow"], ["text-encoder"], ["vae"]])
def test_help(command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: ")
