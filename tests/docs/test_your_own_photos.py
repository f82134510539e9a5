"""The page from a folder of photos to an adapter is followed literally, on made pictures and with a small model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import processes
from helpers.model_directories import write_image_model
from helpers.pages import Words, arguments, commands
from helpers.paths import ROOT
from PIL import Image

from mlx_starflow import load
from mlx_starflow.cli import main
from mlx_starflow.model_dir.adapters import Adapter
from mlx_starflow.model_dir.hub import CACHE_VARIABLE

PAGE = ROOT / "docs/your-own-photos.md"
LINES = [words for words in commands(PAGE.read_text(), PAGE.name) if words.whole]

ELSEWHERE = {("pip", "install", "mlx-starflow[finetune,heic]"), ("mlx-starflow", "convert", "apple/starflow")}
"""What needs the internet: the test has done it."""


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `photos`, where apple/starflow is a small model."""
    write_image_model(tmp_path / "converted/apple--starflow")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "converted"))
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(24):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 3, 3), np.uint8))
        coarse.resize((48, 64), Image.Resampling.BICUBIC).save(tmp_path / f"photos/IMG_{2000 + number}.JPG")
    (tmp_path / "photos/IMG_2000.txt").write_text("a photo of rex the dog asleep on a red sofa")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(words: Words, folder: Path) -> str:
    told = arguments(words.words)
    assert told is not None, words
    if words.words[0] == "mlx.launch":
        line = ["-m", "mlx_starflow", *told]
        ended = processes.finish(processes.start(folder / "hosts", [line] * 2))
        assert [code for code, _, _ in ended] == [0, 0], ended
        return ended[0][1]
    result = CliRunner().invoke(main, told)
    assert result.exit_code == 0, f"{words}\n{result.output}"
    return result.output


@pytest.mark.slow
def test_every_command_in_order(reader: Path) -> None:
    said = {words.words: run(words, reader) for words in LINES if words.words not in ELSEWHERE}
    assert {words.words for words in LINES} == ELSEWHERE | said.keys()
    cached, planned, trained = list(said.values())[:3]
    assert "24 pictures, 3 texts" in cached and "16 GB Mac: batch size" in planned
    assert "(best)" in trained or "held-out NLL" in trained
    # What the page says there is.
    for name in ("checkpoints/loss.png", "checkpoints/samples/step-00000050.png", "grid.png", "report.json"):
        assert (reader / "rex" / name).exists(), name
    assert json.loads((reader / "rex/report.json").read_text())["change"] < 0
    assert sorted(path.name for path in (reader / "rex/adapter").iterdir() if path.is_file()) == [
        "adapter_config.json",
        "adapters.safetensors",
    ]
    assert Adapter.read(reader / "rex-2/adapter").config["rank"] == 4
    assert Image.open(reader / "rex.png").width > Image.open(reader / "moon.png").width
    assert load(reader / "rex-model").generate("a photo of rex the dog", seed=1).images


@pytest.mark.slow
def test_what_the_page_says_in_a_sentence(reader: Path) -> None:
    """The folder instead of a cache: the run makes one."""
    (words,) = (w for w in commands(PAGE.read_text(), PAGE.name) if not w.whole and "photos" in w.words)
    told = arguments(words.words)
    assert told is not None
    result = CliRunner().invoke(main, [*told, "--steps", "2"])
    assert result.exit_code == 0, result.output
    assert (reader / "rex/cache/index.jsonl").read_text().count("a photo of rex the dog") == 24
