"""Commands that read many pictures: one that cannot be read is left out and said, and the others keep their rows."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from helpers.commands import Command
from helpers.images import smooth_images, write_images
from helpers.model_directories import write_image_model, write_video_model
from safetensors.numpy import load_file

from mlx_starflow.media.videos import VideoWriter

score, classify, calibrate, encode = Command("score"), Command("classify"), Command("calibrate"), Command("encode")

SKIPPED = "skipped 2: {0}/0.png (not a picture, or of a format that cannot be read here), {0}/2.png (the file is empty)"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_image_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(tmp_path):
    """Five pictures with captions; the first and the third cannot be read."""
    folder = tmp_path / "pictures"
    write_images(folder, 5, [{"text": text} for text in ("a", "a cat", "b", "a dog", "a rat")])
    (folder / "0.png").write_bytes(b"nonsense")
    (folder / "2.png").write_bytes(b"")
    return folder


def ran(result):
    assert result.exit_code == 0, result.output
    return result


def test_score(model, folder, tmp_path):
    tables = ["--csv", tmp_path / "t.csv", "--json", tmp_path / "t.json", "--map", tmp_path / "maps", "--overwrite"]
    result = ran(score(folder, "-m", model, "--captions", "--draws", 1, *tables))
    assert result.stderr.strip() == SKIPPED.format(folder)
    alone = {}
    for name, text in {"1": "a cat", "3": "a dog", "4": "a rat"}.items():
        ran(
            score(
                folder / f"{name}.png",
                "-m",
                model,
                "-p",
                text,
                "--draws",
                1,
                "--json",
                tmp_path / "one.json",
                "--overwrite",
            )
        )
        alone[name] = json.loads((tmp_path / "one.json").read_text())["pictures"][0]
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    content = json.loads((tmp_path / "t.json").read_text())
    assert [row["picture"] for row in rows] == [str(folder / f"{name}.png") for name in alone]
    assert [row["prompt"] for row in rows] == ["a cat", "a dog", "a rat"]
    assert [each["picture"] for each in content["skipped"]] == [str(folder / "0.png"), str(folder / "2.png")]
    assert float(rows[0]["nll"]) == pytest.approx(alone["1"]["nll"], abs=1e-5)  # the same draw of the noise
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == [f"{n}.surprise.png" for n in alone]


def test_classify(model, folder, tmp_path):
    options = ["-m", model, "-l", "a cat,a dog", "--draws", 1, "--json", tmp_path / "t.json", "--overwrite"]
    assert ran(classify(folder, *options)).stderr.strip() == SKIPPED.format(folder)
    rows = json.loads((tmp_path / "t.json").read_text())["pictures"]
    assert [row["picture"] for row in rows] == [str(folder / f"{n}.png") for n in (1, 3, 4)]
    ran(classify(*(folder / f"{n}.png" for n in (1, 3, 4)), *options))
    assert json.loads((tmp_path / "t.json").read_text())["pictures"] == rows


def test_calibrate(model, folder):
    result = ran(calibrate(folder, "-m", model, "--draws", 2))
    assert result.stderr.strip() == SKIPPED.format(folder)
    assert result.stdout.count("mean and spread of 3 pictures") == 2
    assert json.loads((model / "likelihood.json").read_text())["pictures"] == 3
    (model / "likelihood.json").unlink()


def test_encode(model, folder, tmp_path):
    out = tmp_path / "z.safetensors"
    result = ran(encode(folder, folder / "1.png", "-m", model, "--captions", "-o", out))
    assert result.stderr.strip() == SKIPPED.format(folder)
    noise = load_file(out)["noise"]
    assert len(noise) == 4
    ran(encode(folder / "4.png", "-m", model, "-p", "a rat", "-o", out, "--overwrite"))
    assert np.allclose(noise[2], load_file(out)["noise"][0], atol=1e-5)


@pytest.mark.parametrize("command", [score, classify, encode], ids=lambda command: command.name)
def test_nothing_is_left(command, model, folder, tmp_path):
    more = {"score": [], "classify": ["-l", "a,b"], "encode": ["-o", tmp_path / "z.safetensors"]}[command.name]
    bad = [folder / "0.png", folder / "2.png"]
    assert f"cannot read the picture {bad[0]}" in command.mistake(bad[0], "-m", model, *more)
    assert "nothing can be read: skipped 2" in command.mistake(*bad, "-m", model, *more)
    assert not (tmp_path / "z.safetensors").exists()


def test_what_the_data_leaves_out_is_said(model, tmp_path):
    folder = tmp_path / "pictures"
    write_images(folder, 2)
    for number in (0, 1):
        (folder / f"{number}.txt").write_bytes(b"a cat" if number else b"\xff")
    result = ran(score(folder, "-m", model, "--draws", 1))
    assert "skipped 1: 0.png (its .txt is not UTF-8)" in result.stderr


def test_many(model, tmp_path):
    write_images(tmp_path / "pictures", 1)
    for number in range(20):
        (tmp_path / f"pictures/bad{number:02}.png").write_bytes(b"")
    lines = ran(score(tmp_path / "pictures", "-m", model, "--draws", 1)).stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("skipped 20: ") and lines[0].count("(the file is empty)") == 10
    assert lines[0].endswith(", ...")


def test_videos(tmp_path):
    model = write_video_model(tmp_path / "video")
    for name in ("a.webp", "b.webp"):
        with VideoWriter(tmp_path / name, 16) as writer:
            for frame in smooth_images(9, (48, 32)):
                writer.add(frame)
    (tmp_path / "cut.mp4").write_bytes(b"no video")
    files = [tmp_path / name for name in ("cut.mp4", "a.webp", "b.webp")]
    result = ran(score(*files, "-m", model, "--draws", 1, "--json", tmp_path / "t.json"))
    assert result.stderr.startswith(f"skipped 1: {files[0]} (cannot be read as a video: ")
    rows = json.loads((tmp_path / "t.json").read_text())["pictures"]
    assert [row["picture"] for row in rows] == [str(files[1]), str(files[2])]
