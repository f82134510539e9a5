"""What a command does with what nobody foresaw, with signals, and with an output that takes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
from helpers.commands import Command, message
from helpers.images import smooth_images
from helpers.model_directories import write_image_model
from PIL import Image

from mlx_starflow.media import image_files
from mlx_starflow.training.config import TrainingConfig

score = Command("score")


def fail(error):
    def raises(*_, **__):
        raise error

    return raises


def test_an_unexpected_exception_is_one_line_with_a_file(monkeypatch):
    monkeypatch.setattr(image_files, "find_images", fail(RecursionError("too\ndeep")))
    said = score.mistake("a.png")
    assert "RecursionError: too deep" in said
    file = said.split("the file ")[1].strip()
    with open(file) as report:
        text = report.read()
    os.unlink(file)
    assert text.startswith("mlx-starflow ") and "find_images" in text and "Traceback" in text


def test_ctrl_c_and_sigterm(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    for stop in (fail(KeyboardInterrupt()), lambda *_: os.kill(os.getpid(), signal.SIGTERM)):
        monkeypatch.setattr(image_files, "find_images", stop)
        result = score("a.png")
        assert result.exit_code == 130 and result.stderr == "stopped\n"
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")
def test_a_full_standard_output():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mlx_starflow", "info", "demo"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1 and "No space left" in done.stderr


def shell(words, end, **options):
    """A command of a shell, whose last words say what becomes of its streams."""
    line = f"{sys.executable} -m mlx_starflow {words} {end}"
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, **options)


@pytest.mark.skipif(not os.path.exists("/bin/bash"), reason="there is no bash")
def test_closed_streams(tmp_path):
    model = write_image_model(tmp_path / "model")
    words = f"generate a -m {model} -n 2 --batch-size 1"
    done = shell(words, ">&-", cwd=tmp_path)
    assert done.returncode == 2 and not (tmp_path / "out.png").exists()
    assert done.stderr == "Error: standard output is closed: send it to a file, or to /dev/null\n"
    for end in ("<&-", "2>&-", "<&- 2>&-"):
        done = shell(words, end, cwd=tmp_path)
        assert done.returncode == 0 and done.stdout.count("seed") == 2, done
        assert Image.open(tmp_path / "out.png").size == (18, 8)
        (tmp_path / "out.png").unlink()
    done = shell(f"generate -m {model} --prompt-file -", "<&-", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("Error: ")


@pytest.mark.skipif(not os.path.exists("/bin/bash"), reason="there is no bash")
def test_whoever_has_seen_enough(tmp_path):
    done = shell("info demo", "| true", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.skipif(not os.path.exists("/bin/bash"), reason="there is no bash")
def test_a_disk_that_is_full_keeps_the_old_file(tmp_path):
    """A file may have a kilobyte; pictures take more."""
    model = write_image_model(tmp_path / "model")
    (tmp_path / "out.png").write_text("old")
    (tmp_path / "n.safetensors").write_text("old")
    words = f"generate a -m {model} --size 64x64 --overwrite --save-noise n.safetensors"
    line = f"ulimit -f 1; trap '' XFSZ; exec {sys.executable} -B -m mlx_starflow {words}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=tmp_path)
    said = [line for line in done.stderr.splitlines() if not line.startswith("Warning: ")]
    assert done.returncode == 2 and len(said) == 1 and " cannot be written: File too large" in said[0], done
    assert (tmp_path / "n.safetensors").read_text() == (tmp_path / "out.png").read_text() == "old"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_seeds(latent_flow):
    plain = latent_flow.generate("a", seed=3)
    drawn = latent_flow.generate("a", seed=np.int64(3))
    assert drawn.images == plain.images and drawn.metadata == plain.metadata
    assert type(drawn.seeds[0]) is int
    assert latent_flow.generate("a", seed=np.arange(2)).seeds == [0, 1]
    for wrong in (-1, 1.5, "7", [-1]):
        assert "whole number" in message(latent_flow.generate, "a", seed=wrong)
    assert "a seed is a whole number" in message(latent_flow.score, smooth_images(1), seed=-1)


def test_numpy_numbers_everywhere(latent_flow, tmp_path):
    """They are what loops over arrays give; metadata, noise files and checkpoints hold Python's own."""
    three, half = np.int64(3), np.float32(0.5)
    image, mask = smooth_images(1, latent_flow.size)[0], Image.new("L", latent_flow.size, 255)
    mask.paste(0, (0, 0, 4, 8))
    options = {"guidance": half, "temperature": half, "attn_temp": np.float64(1.0), "images": np.int64(1)}
    json.dumps(latent_flow.generate("a", seed=three, size=tuple(map(np.int64, latent_flow.size)), **options).metadata)
    json.dumps(latent_flow.best_of("a", np.int64(2), seed=three).result.metadata)
    json.dumps(latent_flow.score([image], seed=three, draws=np.int64(1))[0].to_dict())
    latent_flow.encode([image], noise_seed=three, guidance=half)[0].save(tmp_path / "z.safetensors")
    plain = latent_flow.vary(image, "a", [0.5], seed=3)
    assert np.array_equal(latent_flow.vary(image, "a", [half], seed=three).data, plain.data)
    latent_flow.inpaint(image, mask, "a", seed=three, steps=np.int64(1), rounds=np.int64(1))
    json.dumps(asdict(TrainingConfig(steps=three, seed=three, lr=half)))
    for wrong in (-1, 1.5, "7", None, np.float64(2)):
        assert "whole number" in message(latent_flow.vary, image, "a", [0.5], seed=wrong)
        assert "whole number" in message(latent_flow.inpaint, image, mask, "a", seed=wrong)
