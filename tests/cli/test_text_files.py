"""Prompts and labels in files and on standard input."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
from click.testing import CliRunner
from helpers.commands import Command
from helpers.images import write_images
from helpers.model_directories import write_image_model

from mlx_starflow.cli import main

generate, classify, tune = Command("generate"), Command("classify"), Command("tune")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_image_model(tmp_path_factory.mktemp("model"))


def made(model, tmp_path, path="-", given=None):
    """The prompts that pictures were made of."""
    arguments = ["generate", "--prompt-file", str(path), "-m", str(model), "-o", str(tmp_path / "o.png")]
    result = CliRunner().invoke(main, [*arguments, "--seed", "1"], input=given)
    assert result.exit_code == 0, result.output
    return [line.split(": ")[1].rsplit(",", 1)[0] for line in result.stdout.splitlines()]


@pytest.mark.parametrize("given", ["a cat\nbird \n", "\ufeffa cat\r\n\r\n  bird", "a cat\rbird"])
def test_the_mark_and_all_line_ends(model, tmp_path, given):
    (tmp_path / "p.txt").write_bytes(given.encode())
    assert made(model, tmp_path, tmp_path / "p.txt") == ["'a cat'", "'bird'"]
    assert made(model, tmp_path, given=given.encode()) == ["'a cat'", "'bird'"]


def test_a_line_is_what_an_editor_shows(model, tmp_path):
    assert made(model, tmp_path, given="a\u2028b\x0cc".encode()) == [repr("a\u2028b\x0cc")]


def test_a_pipe(model, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"a cat\n",))
    writer.start()
    assert made(model, tmp_path, pipe) == ["'a cat'"]
    writer.join()


def test_mistakes(model, tmp_path):
    write_images(tmp_path, 1)
    latin, empty, zeros = tmp_path / "latin.txt", tmp_path / "empty.txt", tmp_path / "zeros.txt"
    latin.write_bytes(b"a cat\ncaf\xe9\n")
    empty.write_bytes(b"\n \n")
    with open(zeros, "wb") as file:
        file.truncate((1 << 26) + 1)
    calls = {
        "generate": lambda path: generate.mistake("--prompt-file", path, "-m", model, "-o", tmp_path / "o.png"),
        "classify": lambda path: classify.mistake(tmp_path / "0.png", "--label-file", path, "-m", model),
        "tune": lambda path: tune.mistake(model, "--prompt-file", path, "--dry-run"),
    }
    for call in calls.values():
        assert f"cannot read {latin}: line 2 is not UTF-8; save it as UTF-8" in call(latin)
        assert "Is a directory" in call(tmp_path)
        assert "No such file" in call(tmp_path / "none.txt")
        assert f"{empty} holds no text" in call(empty)
        assert f"cannot read {zeros}: it has more than" in call(zeros)


def test_standard_input_that_is_none(model, tmp_path):
    result = CliRunner().invoke(main, ["generate", "--prompt-file", "-", "-m", str(model)], input=b"\xff")
    assert result.exit_code == 2
    assert result.stderr == "Error: cannot read standard input: line 1 is not UTF-8; save it as UTF-8\n"
    closed = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -m mlx_starflow generate --prompt-file - -o "{tmp_path}/o.png" <&-'],
        capture_output=True,
        text=True,
    )
    assert closed.returncode == 2
    assert closed.stderr == "Error: cannot read standard input: it is closed\n"
