"""`mlx-starflow quantize`, as a user types it."""

from __future__ import annotations

import json

import pytest
from helpers.commands import Command
from helpers.images import write_gradients
from helpers.model_directories import write_trained_model

from mlx_starflow.model_dir.directory import load_flow, load_text_encoder
from mlx_starflow.model_dir.files import read_config
from mlx_starflow.model_dir.quantization import quantized_layers


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_gradients(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def model(tmp_path_factory, pictures):
    return write_trained_model(tmp_path_factory.mktemp("trained") / "model", pictures, steps=2)


run = Command("quantize")
mistake = run.mistake


def test_quantize(model, tmp_path):
    result = run(model, "-o", tmp_path / "out", "--quantize", "mixed", "--text-encoder", "mxfp8")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{tmp_path / 'out'}: ")
    assert result.stdout.endswith("MiB of weights\n")
    assert {layer.bits for layer in quantized_layers(load_flow(tmp_path / "out")).values()} == {4, 6}
    assert quantized_layers(load_text_encoder(tmp_path / "out/text_encoder")[0])


def test_group_size(model, tmp_path):
    assert run(model, "-o", tmp_path / "out", "--quantize", "4", "--group-size", 32).exit_code == 0
    assert read_config(tmp_path / "out")["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine"}


def test_report(model, pictures, tmp_path):
    words = [model, "-o", tmp_path / "out", "--quantize", "4", "--report", pictures, "--limit", 5, "--draws", 1]
    result = run(*words)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line[:20].strip() for line in lines[1:-1]] == [
        "flow, MiB",
        "text encoder, MiB",
        "NLL, nats/dimension",
        "block 0",
        "block 1",
        "block 2",
        "prior",
    ]
    assert lines[-1] == "5 pictures, the same noise for both"
    report = json.loads(run(*words, "--json").stdout)
    assert report["pictures"] == 5
    assert f"{report['nll']['total']['change']:+.5f}" in lines[3]


def test_mistakes(model, pictures, tmp_path):
    out = ["-o", tmp_path / "out"]
    assert "nothing to quantize" in mistake(model, *out)
    assert "holds no config.json" in mistake(tmp_path, *out, "--quantize", "4")
    assert "groups of 128 do not divide" in mistake(model, *out, "--quantize", "4", "--group-size", 128)
    assert "is the model's own folder" in mistake(model, "-o", model, "--quantize", "4")
    assert "holds no training data" in mistake(model, *out, "--quantize", "4", "--report", tmp_path)
    # A report that cannot be made is noticed before anything is written.
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["model"],
        ["model", "-o", "out", "--quantize", "5"],
        ["model", "-o", "out", "--text-encoder", "mixed"],
        ["model", "-o", "out", "--quantize", "4", "--limit", "1"],
        ["model", "-o", "out", "--quantize", "4", "--json"],
    ],
)
def test_usage(words):
    result = run(*words)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ") and result.stderr.endswith("--help)\n")


def test_help():
    result = run("--help")
    assert result.exit_code == 0
    assert "--text-encoder [8|6|4|mxfp8|mxfp4|nvfp4]" in result.stdout
