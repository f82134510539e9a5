"""`mlx-starflow score`, `classify`, `encode` and `decode` with videos, as a user types them."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from helpers.commands import Command
from helpers.images import smooth_images
from helpers.model_directories import write_image_model, write_video_model
from PIL import Image

from mlx_starflow.media.videos import VideoWriter, read_video

score, classify, calibrate = Command("score"), Command("classify"), Command("calibrate")
encode, decode, edit, video = Command("encode"), Command("decode"), Command("edit"), Command("video")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_video_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def clips(tmp_path, monkeypatch):
    """Videos of 13, 9 and 25 frames, and a picture."""
    monkeypatch.chdir(tmp_path)
    for name, count in {"a.mp4": 13, "b.webp": 9, "long.gif": 25}.items():
        with VideoWriter(tmp_path / name, 16) as writer:
            for frame in smooth_images(count, (48, 32)):
                writer.add(frame)
    smooth_images(1, (48, 32))[0].save("still.png")
    return tmp_path


def ran(result):
    assert result.exit_code == 0, result.output
    return result.stdout


def test_score(model, clips):
    tables = ["--csv", "t.csv", "--json", "t.json", "--map", "maps"]
    lines = ran(score("a.mp4", "b.webp", "-m", model, "--prompt", "a cat", "--draws", 2, *tables)).splitlines()
    assert lines[1].startswith("a.mp4") and lines[3].startswith("b.webp")
    assert lines[2].startswith("  by latent frame: ") and len(lines[2].split(": ")[1].split()) == 4
    assert lines[-1] == "NLL in nats per latent dimension, 2 draws of the training noise"
    rows = json.loads((clips / "t.json").read_text())["pictures"]
    assert [np.shape(row["surprise"]) for row in rows] == [(4, 2, 3), (3, 2, 3)]
    for row in rows:
        assert np.sum(row["surprise"]) / row["dimensions"] == pytest.approx(row["nll"], abs=1e-4)
        assert np.mean([frame["nll"] for frame in row["frames"]]) == pytest.approx(row["nll"], abs=1e-4)
    table = list(csv.DictReader((clips / "t.csv").open()))
    assert [row["latent_frame"] for row in table] == ["", "0", "1", "2", "3", "", "0", "1", "2"]
    assert float(table[1]["nll"]) == pytest.approx(rows[0]["frames"][0]["nll"])
    assert int(table[0]["dimensions"]) == 4 * int(table[1]["dimensions"])
    maps = {name: list(read_video(clips / "maps" / name)) for name in ("a.surprise.mp4", "b.surprise.webp")}
    assert [len(frames) for frames in maps.values()] == [13, 9]
    assert maps["b.surprise.webp"][0].size == (2 * 48 * 8 + 4, 32 * 8 + 22)


def test_part_of_a_long_video(model, clips):
    assert "--frames 17" in score.mistake("long.gif", "-m", model)
    rows = json.loads(ran(score("long.gif", "-m", model, "--frames", 17, "--draws", 1, "--json", "-")))["pictures"]
    assert len(rows[0]["frames"]) == 5


def test_stills(model, clips):
    rows = json.loads(ran(score("still.png", "-m", model, "--size", "48x32", "--json", "-")))["pictures"]
    assert np.shape(rows[0]["surprise"]) == (2, 3) and "frames" not in rows[0]


def test_encode_and_decode(model, clips):
    output = ran(encode("a.mp4", "-m", model, "--prompt", "a cat", "-o", "n.safetensors"))
    assert "noise [1, 4, 2, 3, 4]" in output and "flow: largest error" in output and "autoencoder: RMS" in output
    # Both in float32, on a GPU too: a random autoencoder makes much of a rounding.
    assert "again: 1 videos" in ran(decode("n.safetensors", "-o", "again", "--dtype", "float32"))
    frames = [np.stack([np.asarray(each) for each in read_video(clips / "again")])]
    assert frames[0].shape == (13, 32, 48, 3)
    exact = [
        "--temperature",
        1,
        "--guidance",
        0,
        "--no-denoise",
        "--load-noise",
        "n.safetensors",
        "--method",
        "sequential",
        "--dtype",
        "float32",
    ]
    ran(video("a cat", "-m", model, "--frames", 13, "--size", "48x32", *exact, "-o", "sampled"))
    frames.append(np.stack([np.asarray(each) for each in read_video(clips / "sampled")]))
    assert np.abs(frames[0].astype(int) - frames[1]).max() <= 1
    ran(encode("a.mp4", "b.webp", "-m", model, "--frames", 5, "-o", "two.safetensors", "--no-check"))
    ran(decode("two.safetensors"))
    assert [len(list(read_video(clips / f"out-{number}.mp4"))) for number in (1, 2)] == [5, 5]


def test_classify(model, clips):
    assert ran(classify("a.mp4", "-m", model, "--labels", "a cat,a dog", "--draws", 1)).startswith("a.mp4: a ")


def test_mistakes(model, clips):
    Image.new("RGB", (8, 8)).save("one.webp")
    (clips / "bad.mp4").write_bytes(b"nonsense")
    stills = write_image_model(clips / "pictures")
    assert "pictures or videos" in score.mistake("a.mp4", "still.png", "-m", model)
    assert "pictures or videos" in score.mistake("one.webp", "b.webp", "-m", model)
    assert "13 or 17, not 15" in score.mistake("a.mp4", "-m", model, "--frames", 15)
    assert "needed are 17" in score.mistake("a.mp4", "-m", model, "--frames", 17)
    assert "--frames is about videos" in score.mistake("still.png", "-m", model, "--frames", 5)
    assert "bad.mp4 cannot be read as a video" in score.mistake("bad.mp4", "-m", model)
    assert "a video has maps of surprise" in score.mistake(
        "a.mp4", "-m", model, "--map", "maps", "--map-of", "typicality"
    )
    assert "number of frames" in encode.mistake("a.mp4", "b.webp", "-m", model, "-o", "n.safetensors")
    for taken in (
        score.mistake("a.mp4", "-m", stills),
        calibrate.mistake("a.mp4", "-m", model),
        edit.mistake("reprompt", "a.mp4", "-m", model, "--to", "a dog"),
    ):
        assert "a.mp4 is a video, and this takes pictures" in taken
    # Of an animation, a model of pictures sees the first one.
    ran(score("b.webp", "-m", stills, "--draws", 1))
