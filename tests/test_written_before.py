"""Files that an earlier version wrote still load, and mean what they meant; see data/written_before/README.md."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import Command
from helpers.paths import DATA
from PIL import Image, ImageSequence

from mlx_starflow import load
from mlx_starflow.likelihood.nll import HALF_LOG_2PI
from mlx_starflow.model_dir.quantization import quantized_layers
from mlx_starflow.training.data.cache.reading import LatentCache

LEVELS = 2
"""Of 255, by which pixels may differ on another processor."""

FLOAT32 = ("--dtype", "float32")
"""What all files were computed in; said where half precision would show."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the files as the current directory: their paths are relative to it."""
    shutil.copytree(DATA / "written_before", tmp_path / "before")
    monkeypatch.chdir(tmp_path / "before")


def run(name: str, *words: object) -> str:
    done = Command(name)(*words)
    assert done.exit_code == 0, done.output
    return done.stdout


def frames(path: str) -> np.ndarray:
    """Of an image or an animation, `[T, H, W, 3]`."""
    with Image.open(path) as image:
        return np.stack([np.asarray(frame.convert("RGB"), int) for frame in ImageSequence.Iterator(image)])


def assert_same(first: str, second: str, levels: float = LEVELS) -> None:
    assert frames(first).shape == frames(second).shape
    assert np.abs(frames(first) - frames(second)).max() <= levels


def log(path: str) -> dict[int, dict[str, float]]:
    """Each step's numbers."""
    rows: dict[int, dict[str, float]] = {}
    for line in Path(path).read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["step"], {}).update(row)
    return rows


@pytest.mark.parametrize("name", ["picture.png", "grid.png", "adapted.png"])
def test_images_are_made_again(name):
    run("generate", "--from", name, "-o", "again.png")
    assert_same("again.png", name)
    before, after = (json.loads(Image.open(path).info["mlx-starflow"]) for path in (name, "again.png"))
    assert after.pop("certificate") == pytest.approx(before.pop("certificate"), rel=1e-2)
    assert after == before


@pytest.mark.parametrize("name", ["video.gif", "video.webp", "video.mp4"])
def test_videos_are_made_again(name):
    if name.endswith("mp4"):
        pytest.importorskip("av")
    run("video", "--from", name, *FLOAT32, "-o", "again.webp")
    assert_same("again.webp", "video.webp", 6)


def test_the_model_and_its_plan():
    pipe = load("model")
    bits = {path: layer.bits for path, layer in quantized_layers(pipe.flow).items()}
    assert {bits[path] for path in bits if path.startswith("blocks.1.")} == {4}
    assert {bits[path] for path in bits if path.startswith("blocks.0.")} == {6}
    assert {layer.bits for layer in quantized_layers(pipe.text_encoder).values()} == {8}
    assert (pipe.settings.guidance, pipe.settings.temperature) == (1.0, 0.8)
    plan = json.loads(Path("model/sampling_plan.json").read_text())
    result = pipe.generate("a red square", seed=3)
    assert result.stats.certificate.max < plan["tolerance"]
    assert result.stats.evaluations != pipe.generate("a red square", seed=3, method="sequential").stats.evaluations


def test_noise():
    run("generate", "a red square", "-m", "model", "--load-noise", "noise.safetensors", "-o", "again.png")
    assert_same("again.png", "picture.png")


def test_an_encoded_image():
    run("decode", "encoded.safetensors", "-m", "model", "-o", "again.png")
    assert_same("again.png", "decoded.png")


def test_an_adapter():
    run("generate", "a red square", "-m", "model", "--seed", 3, "--lora", "adapter", 1, "-o", "again.png")
    assert_same("again.png", "adapted.png")
    assert np.abs(frames("adapted.png") - frames("picture.png")).max() > LEVELS


def test_calibration_statistics():
    run("score", "pictures", "-m", "model", "--captions", "--draws", 2, "--json", "scores.json")
    before = json.loads(Path("model/likelihood.json").read_text())
    deviations = [row["deviation"] for row in json.loads(Path("scores.json").read_text())["pictures"]]
    # The pictures are those that the statistics are of.
    assert len(deviations) == 6 and abs(np.mean(deviations)) < 1e-2 < np.std(deviations)
    run("calibrate", "pictures", "-m", "model", "--draws", 2)
    after = json.loads(Path("model/likelihood.json").read_text())
    assert after.keys() == before.keys() and after["fingerprint"] == before["fingerprint"]
    for kind, statistics in before["nll"].items():
        assert after["nll"][kind] == pytest.approx(statistics, abs=1e-4)


def test_a_latent_cache():
    run("cache", "cache", "--check")
    run("cache", "pictures", "-o", "again", "--model", "model", "--views", 2, "--flip")
    old, new = (LatentCache(name, "model") for name in ("cache", "again"))
    assert len(old) == len(new) == 6 and old.views == new.views == 2
    for name in ("latents-1x1.bin", "text.bin"):
        numbers = [np.fromfile(Path(folder, name), np.float16).astype(float) for folder in ("cache", "again")]
        assert np.abs(numbers[0] - numbers[1]).max() < 1e-2


def test_a_training_goes_on():
    expected = log("train.jsonl")
    run("train", "--config", "train/training/config.yaml", *FLOAT32)
    found = log("train/training/flow/log.jsonl")
    assert found.keys() == expected.keys() == {1, 2, 3, 4}
    for step in (3, 4):
        assert found[step]["loss"] == pytest.approx(expected[step]["loss"] + HALF_LOG_2PI, abs=1e-4)
        for name in ("grad", "lr", "validation_nll"):
            assert found[step][name] == pytest.approx(expected[step][name], abs=1e-4)
    # Lines that were there are in the same unit.
    assert found[1]["loss"] == pytest.approx(expected[1]["loss"] + HALF_LOG_2PI, abs=1e-4)
    assert load("train").generate("a red square", seed=1).images[0].size == (8, 8)


def test_a_finetuning_goes_on():
    expected = log("finetune.jsonl")
    run("finetune", "--config", "finetune/config.yaml", *FLOAT32)
    found = log("finetune/checkpoints/log.jsonl")
    assert found.keys() == expected.keys() == {1, 2, 3, 4}
    assert found[4]["loss"] == pytest.approx(expected[4]["loss"] + HALF_LOG_2PI, abs=1e-4)
    for name in ("grad", "lr"):
        assert found[4][name] == pytest.approx(expected[4][name], abs=1e-4)
    run("generate", "a red square", "-m", "model", "--seed", 3, "--lora", "finetune/adapter", 1, "-o", "again.png")
    assert_same("again.png", "adapted.png")
