"""What generate has written when it is stopped, or fails, on the way."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import Command
from helpers.model_directories import write_image_model
from PIL import Image

from mlx_starflow.cli.options import pictures
from mlx_starflow.errors import StarflowError
from mlx_starflow.media.metadata import read_metadata
from mlx_starflow.media.noise import draw_noise, read_noise
from mlx_starflow.pipelines.mlx_backend import MLXBackend

generate = Command("generate")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_image_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield tmp_path
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def stop(monkeypatch):
    """Do something when so many batches have been sampled."""

    invert = MLXBackend.invert

    def at(batches, act):
        count = []

        def interrupted(*arguments):
            count.append(None)
            if len(count) > batches:
                act()
            return invert(*arguments)

        monkeypatch.setattr(MLXBackend, "invert", interrupted)

    return at


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def names(pattern):
    return sorted(path.name for path in Path().glob(pattern))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_pictures_of_their_own(model, stop, number):
    words = ["a cat", "a dog", "-m", model, "-n", 3, "--seed", 4, "--separate", "--batch-size", 2]
    assert generate(*words, "-o", "whole.png").exit_code == 0
    stop(2, lambda: os.kill(os.getpid(), number))
    result = generate(*words, "--save-noise", "n.safetensors", "--steps-dir", "steps")
    assert result.exit_code == 130
    assert result.stderr == "stopped: 4 of 6 pictures are finished: out-1.png to out-4.png\n"
    assert result.stdout.splitlines() == [
        f"out-{k}.png: {prompt!r}, seed {seed}"
        for k, (prompt, seed) in enumerate([("a cat", 4), ("a cat", 5), ("a cat", 6), ("a dog", 4)], 1)
    ]
    assert names("out*") == [f"out-{k}.png" for k in (1, 2, 3, 4)] and len(names("steps/steps-*")) == 4
    for k in (1, 2, 3, 4):
        assert read_metadata(f"out-{k}.png") == read_metadata(f"whole-{k}.png")
        assert (pixels(f"out-{k}.png") == pixels(f"whole-{k}.png")).all()
    assert (read_noise(Path("n.safetensors")) == draw_noise([4, 5, 6, 4], (4, 4, 4))).all()


def test_a_grid(model, stop):
    stop(2, lambda: os.kill(os.getpid(), signal.SIGINT))
    words = ["a cat", "-m", model, "-n", 6, "--seed", 4, "--batch-size", 2, "--columns", 3]
    result = generate(*words, "--save-noise", "n.safetensors")
    assert result.exit_code == 130
    assert result.stderr == "stopped: 4 of 6 pictures are finished in out.png\n"
    assert pixels("out.png").shape == (18, 28, 3)
    assert read_metadata("out.png")["seeds"] == [4, 5, 6, 7]
    assert (read_noise(Path("n.safetensors")) == draw_noise([4, 5, 6, 7], (4, 4, 4))).all()
    stop(9, lambda: None)
    assert generate("--from", "out.png", "-o", "again.png", "--batch-size", 2).exit_code == 0
    assert (pixels("again.png") == pixels("out.png")).all()


def test_a_grid_whose_last_prompt_lacks_some_cannot_be_made_again(model, stop):
    stop(2, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert generate("a cat", "a dog", "-m", model, "-n", 3, "--seed", 4, "--batch-size", 2).exit_code == 130
    found = read_metadata("out.png")
    assert (found["prompts"], found["seeds"]) == (["a cat"] * 3 + ["a dog"], [4, 5, 6, 4])
    assert "out.png" in generate.mistake("--from", "out.png")


def test_nothing_yet(model, stop):
    stop(0, lambda: os.kill(os.getpid(), signal.SIGINT))
    Path("out.png").write_text("old")
    result = generate("a cat", "-m", model, "-n", 3, "--save-noise", "n.safetensors")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "stopped: 0 of 3 pictures are finished"
    assert Path("out.png").read_text() == "old" and names("*") == ["out.png"]


def test_an_error_on_the_way(model, stop):
    def fail():
        raise StarflowError("the samples are not finite")

    stop(1, fail)
    said = generate("a cat", "-m", model, "-n", 3, "--batch-size", 1)
    assert said.exit_code == 2
    assert said.stderr == "Error: the samples are not finite (1 of 3 pictures are finished in out.png)\n"
    assert pixels("out.png").shape == (8, 8, 3)


def test_the_best_of_several_come_one_by_one(model, stop):
    words = ["a cat", "-m", model, "-n", 3, "--best-of", 2, "--seed", 1, "--separate", "--batch-size", 2]
    assert generate(*words, "-o", "whole.png").exit_code == 0
    stop(2, lambda: os.kill(os.getpid(), signal.SIGINT))
    result = generate(*words, "--save-noise", "n.safetensors")
    assert result.stderr == "stopped: 2 of 3 pictures are finished: out-1.png to out-2.png\n"
    assert result.stdout.count("the best of 2") == 2
    seeds = [read_metadata(f"whole-{k}.png")["seeds"][0] for k in (1, 2)]
    assert [read_metadata(name)["seeds"][0] for name in names("out*")] == seeds
    assert (read_noise(Path("n.safetensors")) == draw_noise(seeds, (4, 4, 4))).all()


def test_a_grid_is_written_now_and_then(model, stop, monkeypatch):
    """So that a process that is killed leaves something too."""
    monkeypatch.setattr(pictures, "SECONDS", 0.0)
    monkeypatch.setattr(pictures, "SHARE", 1e9)
    seen = []
    stop(2, lambda: seen.append(read_metadata("out.png")["seeds"]))
    assert generate("a cat", "-m", model, "-n", 3, "--seed", 1, "--batch-size", 1).exit_code == 0
    assert seen == [[1, 2]] and read_metadata("out.png")["seeds"] == [1, 2, 3]
