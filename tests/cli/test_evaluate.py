"""`mlx-starflow evaluate`."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers.commands import Command
from helpers.images import smooth_images, write_images

from mlx_starflow.evaluation.features import INCEPTION_FILE, INCEPTION_URL
from mlx_starflow.evaluation.statistics import read_statistics

evaluate = Command("evaluate")

SHORT = ["--count", 24, "--likelihood", 4, "--draws", 2, "--features", "own"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Captioned pictures, a third of them held out."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    rows = [{"text": str(n % 3), "split": "validation" if n % 3 == 2 else "train"} for n in range(66)]
    write_images(folder, smooth_images(66), rows)
    return folder


@pytest.fixture(autouse=True)
def nothing_at_hand(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no-torch"))


@pytest.fixture
def directory(model):
    return model.directory


def test_text_and_json(directory, data, tmp_path) -> None:
    result = evaluate(directory, "--data", data, *SHORT, "--json", tmp_path / "e.json")
    assert result.exit_code == 0, result.stderr
    assert f"{directory}: 24 samples, 44 data, 22 held-out" in result.stdout
    assert "p = " in result.stdout and "note: a Fréchet distance of 24 pictures" in result.stdout
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["pictures"] == {"samples": 24, "data": 44, "held-out": 22}
    assert set(found["samples"]["kernel"]) == {"mean", "standard_error"}
    printed = evaluate(directory, "--data", data, *SHORT, "--json", "-")
    assert json.loads(printed.stdout) == found


def test_statistics_are_written_and_read(directory, data, tmp_path) -> None:
    options = [directory, *SHORT]
    whole = evaluate(*options, "--data", data, "--json", "-", "--save-statistics", tmp_path / "s.npz")
    assert read_statistics(tmp_path / "s.npz").count == 44
    assert whole.exit_code == 0, whole.stderr


def test_official_statistics_need_inception(directory, tmp_path) -> None:
    np.savez(tmp_path / "s.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    said = evaluate.mistake(directory, "--statistics", tmp_path / "s.npz", "--count", 24)
    assert INCEPTION_FILE in said and INCEPTION_URL in said
    said = evaluate.mistake(directory, "--statistics", tmp_path / "s.npz", *SHORT)
    assert "the statistics are of 2048 features" in said


def test_killed_and_resumed(directory, data, tmp_path) -> None:
    """kill -9 at any time loses nothing that was finished, and the result is the same."""
    # The other process would choose its precision by the machine, whatever this one is told.
    options = [directory, "--data", data, *SHORT, "--count", 200, "--dtype", "float32", "--json"]
    assert evaluate(*options, tmp_path / "whole.json").exit_code == 0
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mlx_starflow", "evaluate", *map(str, options), "-", "-o", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out / "samples-00001.safetensors").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (out / "samples-00000.safetensors").touch()
    kept = (out / "samples-00000.safetensors").stat().st_mtime_ns
    # In this process, so that nothing but the folder is shared.
    result = evaluate(*options, tmp_path / "resumed.json", "-o", out)
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "resumed.json").read_text() == (tmp_path / "whole.json").read_text()
    assert (out / "samples-00000.safetensors").stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give --data, or --statistics"),
        (["--data", "none"], "does not exist"),
        (["--data", "few"], "need 20 of each kind or more"),
        (["--data", "few", "--statistics", "s.npz"], "do not go together"),
        (["--data", "few", "--features", "inception"], INCEPTION_URL),
        (["--data", "few", "--inception", "nothing.pth"], "nothing.pth"),
        (["--data", "few", "--features", "own", "--resize", "pytorch"], "do not go together"),
        (["--data", "few", "--clip", "none"], "hf download openai/clip-vit-large-patch14"),
        (["--data", "few", "--prompt-file", "none.jsonl"], "none.jsonl"),
        (["--data", "few", "--save-statistics", "s.txt"], ".npz (mu, sigma) or .pth"),
        (["--statistics", "s.npz", "--save-statistics", "t.npz"], "give --data too"),
        (["--statistics", "s.npz"], "s.npz is damaged"),
        (["--data", "few", "--count", "3"], "3 is not in the range"),
    ],
)
def test_mistakes(latent_flow, tmp_path, monkeypatch, options, said) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "few", 5)
    (tmp_path / "s.npz").write_bytes(b"PK")
    assert said in evaluate.mistake(latent_flow.directory, *options)


def test_models_of_videos(tmp_path, data) -> None:
    from helpers.model_directories import write_video_model

    said = evaluate.mistake(write_video_model(tmp_path / "video"), "--data", data, *SHORT)
    assert "makes videos" in said


def test_another_evaluation_is_refused(latent_flow, data, tmp_path) -> None:
    options = [latent_flow.directory, "--data", data, *SHORT, "-o", tmp_path / "out"]
    assert evaluate(*options).exit_code == 0
    assert "another seed: 0 there, 3 here" in evaluate.mistake(*options, "--seed", 3)
    shutil.rmtree(tmp_path / "out")
    assert evaluate(*options, "--seed", 3).exit_code == 0
