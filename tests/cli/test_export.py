"""`mlx-starflow export`, as a user types it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from helpers.commands import Command
from helpers.golden_files import golden_case
from helpers.paths import DATA

from mlx_starflow.convert import convert_flow, convert_vae, read_checkpoint

run = Command("export")


def convert(out: Path, **options: object) -> Path:
    return convert_flow(golden_case("t2i") / "model.pth", DATA / "t2i/config.yaml", out, **options)


def test_flow(tmp_path):
    model, out = convert(tmp_path / "model"), tmp_path / "out.pth"
    result = run(model, out)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        f"{out}: {out.stat().st_size / 1e6:.1f} MB",
        f"Pass {model / 'NOTICE'} on with it.",
    ]
    official, found = read_checkpoint(golden_case("t2i") / "model.pth"), read_checkpoint(out)
    assert all(np.array_equal(found[name], official[name]) for name in found)


def test_quantized(tmp_path):
    result = run(convert(tmp_path / "model", quantize="mxfp8"), tmp_path / "out.safetensors")
    assert result.exit_code == 0, result.output
    line = "The weights were quantized (mxfp8, 8 bits): dequantized, they are close to the original's."
    assert line in result.stdout.splitlines()


def test_autoencoder(tmp_path):
    result = run(convert_vae(golden_case("sd_vae"), tmp_path / "vae"), tmp_path / "out.safetensors")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1


def test_the_demo_without_a_copy(tmp_path):
    """What find_model knows by name is not a folder to export."""
    result = run("nowhere", tmp_path / "out.pth")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: unknown model 'nowhere'")
    assert result.stderr.count("\n") == 1


def test_usage(tmp_path):
    assert run("--help").stdout.startswith("Usage: ")
    for arguments in ([], [tmp_path]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith("Error: ") and result.stderr.endswith("--help)\n")
    result = run(convert(tmp_path / "model"), tmp_path / "out.onnx")
    assert result.exit_code == 2
    assert "must end in .pth" in result.stderr
