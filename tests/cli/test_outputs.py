"""What commands write: refused before the work where it cannot be, and never over what is read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.commands import Command
from helpers.images import smooth_images
from helpers.model_directories import write_image_model

from mlx_starflow import pipelines

MODEL = "demo"
"""Whatever it is: nobody opens it."""


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "x.png"
    smooth_images(1)[0].save(path)
    return path


@pytest.fixture
def idle(monkeypatch):
    """No model is opened."""

    def fail(*_, **__):
        raise AssertionError("the work has begun")

    for name in ("load", "open_model", "load_video"):
        monkeypatch.setattr(pipelines, name, fail)


# Commands with an output each that is in a folder which does not exist.
UNWRITABLE = [
    ["generate", "a", "-o", "none/a.png"],
    ["generate", "a", "--save-noise", "none/n.safetensors"],
    ["generate", "a", "--steps-dir", "x.png/steps"],
    ["video", "a", "-m", MODEL, "-o", "a.gif", "--save-noise", "none/n.safetensors"],
    ["score", "x.png", "--csv", "none/t.csv"],
    ["score", "x.png", "--json", "none/t.json"],
    ["score", "x.png", "--map", "x.png"],
    ["classify", "x.png", "-l", "a", "--csv", "none/t.csv"],
    ["encode", "x.png", "-o", "none/n.safetensors"],
    ["edit", "vary", "x.png", "-o", "none/out.png"],
    ["edit", "reprompt", "x.png", "--to", "a", "-o", "none/out.png"],
    ["edit", "interpolate", "x.png", "x.png", "-o", "none/out.gif"],
    ["edit", "inpaint", "x.png", "--mask", "0,0,1,1", "--json", "none/t.json"],
    ["upscale", "x.png", "-o", "none/a.png"],
    ["upscale", ".", "-o", "x.png/large"],
    ["quantize", "demo", "-o", "x.png", "--quantize", "8", "--report", "."],
    ["fuse", "demo", "--lora", "run", "1", "-o", "x.png"],
    ["export", "demo", "x.png/a.pth"],
    ["convert", "apple/starflow", "-o", "x.png/model"],
    ["cache", ".", "-o", "x.png"],
    ["train", ".", "-o", "x.png"],
    ["finetune", "demo", ".", "-o", "x.png"],
]


@pytest.mark.parametrize("words", UNWRITABLE, ids=" ".join)
def test_before_the_work(words, picture, idle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "cannot be written: " in Command(words[0]).mistake(*words[1:])
    assert list(tmp_path.iterdir()) == [picture]


# The picture x.png, or a file that belongs to it, is given, and would be replaced.
OVER_INPUTS = [
    ["encode", "x.png", "-o", "x.png"],
    ["encode", "x.png", "-o", "./link.png"],
    ["score", "x.png", "--csv", "x.png"],
    ["score", ".", "--json", "x.png"],
    ["score", ".", "--csv", "metadata.csv"],
    ["score", ".", "--csv", "x.txt"],
    ["score", "x.png", "x.surprise.png", "--map", "."],
    ["classify", "x.png", "-l", "a", "--json", "x.png"],
    ["edit", "vary", "x.png", "-o", "x.png"],
    ["edit", "reprompt", "x.png", "--to", "a", "-o", "link.png"],
    ["edit", "interpolate", "x.surprise.png", "x.png", "-o", "x.png"],
    ["edit", "inpaint", "x.png", "--mask", "x.surprise.png", "-o", "x.surprise.png"],
    ["video", "a", "-m", MODEL, "--image", "x.gif", "-o", "x.gif"],
    ["upscale", "x.png", "-o", "link.png"],
    ["upscale", ".", "-o", "."],
    ["quantize", "demo", "-o", ".", "--quantize", "8", "--report", "."],
    ["cache", ".", "-o", "."],
    ["train", ".", "-o", "."],
    ["finetune", "demo", ".", "-o", "."],
]


@pytest.mark.parametrize("words", OVER_INPUTS, ids=" ".join)
def test_over_what_is_read(words, picture, idle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("link.png").symlink_to(picture)
    Path("x.surprise.png").write_bytes(picture.read_bytes())
    smooth_images(1)[0].save("x.gif")
    Path("x.txt").write_text("a cat")
    Path("metadata.csv").write_text("file_name,text\nx.png,a cat\n")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "is read, and would be replaced: give another name" in Command(words[0]).mistake(*words[1:])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "words",
    [
        ["score", "x.png", "--csv", "t", "--json", "t"],
        ["edit", "inpaint", "x.png", "--mask", "0,0,1,1", "-o", "a.png", "--json", "a.png"],
        ["generate", "a", "-o", "a.png", "--save-noise", "a.png"],
    ],
    ids=" ".join,
)
def test_two_outputs_of_one_name(words, picture, idle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "two outputs would be written to" in Command(words[0]).mistake(*words[1:])


def test_home(picture, tmp_path, monkeypatch):
    """Shells leave the ~ of --csv=~/t.csv alone, and so do files for --config."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    model = write_image_model(tmp_path / "model")
    assert Command("score")(picture, "-m", model, "--csv=~/t.csv", "--map=~/maps").exit_code == 0
    assert Command("generate")("a", "-m", model, "-o~/a.png", "--save-noise=~/n.safetensors").exit_code == 0
    assert Command("encode")(picture, "-m", model, "--output=~/e.safetensors").exit_code == 0
    assert Command("quantize")(model, "-o", "~/small", "--quantize", "8", "--group-size", "32").exit_code == 0
    names = {path.name for path in home.iterdir() if not path.name.startswith(".")}
    assert names == {"t.csv", "maps", "a.png", "n.safetensors", "e.safetensors", "small"}
    assert not list(here.iterdir())
    assert "has no home folder" in Command("score").mistake(picture, "--csv", "~nobody-of-this-name/t.csv")


def test_devices_and_links(picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = write_image_model(tmp_path / "model")
    device = os.lstat(os.devnull)
    for words in (["score", picture, "--csv"], ["encode", picture, "-o"], ["generate", "a", "--save-noise"]):
        assert Command(words[0])(*words[1:], os.devnull, "-m", model).exit_code == 0
    after = os.lstat(os.devnull)
    assert (after.st_mode, after.st_ino) == (device.st_mode, device.st_ino)
    Path("latest.png").symlink_to("run.png")
    assert Command("generate")("a", "-m", model, "-o", "latest.png").exit_code == 0
    assert Path("latest.png").is_symlink() and not Path("run.png").is_symlink()
    if os.path.exists("/dev/full"):
        said = Command("score").mistake(picture, "-m", model, "--csv", "/dev/full")
        assert said == "Error: /dev/full cannot be written: No space left on device\n"


def test_a_name_as_long_as_it_may_be(picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, name = write_image_model(tmp_path / "model"), "n" * 246
    assert Command("generate")("a", "-m", model, "-o", f"{name}.png").exit_code == 0
    assert Command("score")(picture, "-m", model, "--csv", f"{name}.csv").exit_code == 0
    assert {path.name for path in tmp_path.glob("n*")} == {f"{name}.png", f"{name}.csv"}
    assert "cannot be written: " in Command("generate").mistake("a", "-n", 2, "--separate", "-o", f"{name}nnnn.png")
