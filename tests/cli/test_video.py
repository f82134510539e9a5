import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import Command
from helpers.model_directories import write_image_model, write_video_model
from PIL import Image

from mlx_starflow.media.metadata import read_metadata
from mlx_starflow.media.videos import VideoWriter, read_video

video = Command("video")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_video_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def run(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*words):
        result = video(*words) if "--like" in words else video(*words, "-m", model)
        assert result.exit_code == 0, result.output
        return result.output

    return call


@pytest.fixture
def source(tmp_path):
    """A video of 13 frames."""
    with VideoWriter(tmp_path / "source.webp", 16) as writer:
        for number in range(13):
            writer.add(Image.new("RGB", (48, 32), (10 * number, 90, 200)))
    return writer.path


def pixels(path, **options):
    return np.stack([np.asarray(frame) for frame in read_video(path, **options)]).astype(int)


def test_text_to_frames_to_mp4_and_back(run):
    output = run("a cat", "--seed", 7, "-v", "--verify", "-o", "cat.mp4", "--crf", 1)
    assert "cat.mp4: 'a cat', 17 frames of 48x32 at 16 a second, seed 7" in output
    assert "tokens/s" in output and "|f(x) - z|" in output
    run("a cat", "--seed", 7, "-o", "cat")
    assert pixels("cat.mp4").shape == (17, 32, 48, 3)
    # The frames are all but noise: colours, which MP4 has a quarter of, are blurred.
    grey = [pixels(path) @ [0.2126, 0.7152, 0.0722] for path in ("cat.mp4", "cat")]
    assert np.abs(grey[0] - grey[1]).mean() < 4
    assert read_metadata("cat.mp4")["settings"]["fps"] == 16


def test_certificates_of_long_videos(run):
    output = run("a cat", "--seed", 7, "--verify", "--frames", 25, "-o", "long.webp", "--json", "long.json")
    found = json.loads(Path("long.json").read_text())["certificate"]
    assert f"|f(x) - z| at most {found['max']:.1e}" in output
    assert read_metadata("long.webp")["certificate"] == found


def test_streamed_is_the_same_video(run):
    run("a cat", "--seed", 7, "-o", "whole", "--frames", 25, "--context", 2)
    run("a cat", "--seed", 7, "-o", "streamed", "--frames", 25, "--context", 2, "--stream")
    assert np.abs(pixels("whole") - pixels("streamed")).max() <= 1
    run("a cat", "--seed", 7, "-o", "streamed.mp4", "--frames", 9, "--stream", "--guidance", 0)
    assert len(pixels("streamed.mp4")) == 9


def test_previews_lie_beside_the_same_video(run):
    run("a cat", "--seed", 7, "-o", "plain.mp4", "--stream")
    output = run("a cat", "--seed", 7, "-o", "cat.mp4", "--stream", "--preview", "--json", "cat.json")
    assert "cat-preview.mp4: previews" in output
    assert np.array_equal(pixels("cat.mp4"), pixels("plain.mp4"))
    assert pixels("cat-preview.mp4").shape == (5, 32, 48, 3)
    assert read_metadata("cat-preview.mp4") == read_metadata("cat.mp4") | {"preview": True}
    assert json.loads(Path("cat.json").read_text())["preview"] == "cat-preview.mp4"
    # Neither is replaced.
    assert "cat-preview-2.mp4" in run("a cat", "--seed", 7, "-o", "cat.mp4", "--stream", "--preview")
    run("a cat", "--seed", 7, "-o", "frames", "--stream", "--preview")
    assert len(pixels("frames-preview")) == 5


def test_a_killed_stream_can_be_watched(model, tmp_path):
    path = tmp_path / "long.mp4"
    words = ["video", "a cat", "-m", model, "--frames", "4001", "--context", "1", "--stream", "-o", str(path)]
    process = subprocess.Popen([sys.executable, "-m", "mlx_starflow", *words], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while time.monotonic() < until and not (path.exists() and path.stat().st_size > 20_000):
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert len(pixels(path)) > 3
    assert read_metadata(path)["prompts"] == ["a cat"]


def test_from_makes_the_video_again(run, model):
    run("a cat", "--ratio", "9:16", "--fps", 12, "--frames", 9, "-o", "a.webp")
    run("--like", "a.webp", "-o", "b.webp")
    assert pixels("a.webp").shape == (9, 48, 32, 3)
    assert (pixels("a.webp") == pixels("b.webp")).all()
    assert read_metadata("a.webp") == read_metadata("b.webp")
    run("a cat", "--no-metadata", "-o", "c.webp", "--frames", 5)
    assert "does not say how it was made" in video.mistake("--like", "c.webp")
    Command("generate")("a cat", "-m", model, "-o", "still.png")
    assert "mlx-starflow generate --like still.png" in video.mistake("--like", "still.png")
    assert "mlx-starflow video --like a.webp" in Command("generate").mistake("--like", "a.webp")


def test_noise_files(run, model):
    run("a cat", "--frames", 9, "--save-noise", "n.safetensors", "-o", "a")
    assert "noise from n.safetensors" in run("a cat", "--frames", 9, "--load-noise", "n.safetensors", "-o", "b")
    assert (pixels("a") == pixels("b")).all()
    assert "--load-noise" in video.mistake("--like", "b", "-o", "c")
    run("--like", "b", "-o", "c", "--load-noise", "n.safetensors")
    assert (pixels("a") == pixels("c")).all()
    assert "this video needs" in video.mistake("a cat", "-m", model, "--load-noise", "n.safetensors")
    run("a cat", "--frames", 9, "--save-noise", "other.safetensors", "-o", "d")
    assert "is not the noise" in video.mistake("--like", "b", "-o", "e", "--load-noise", "other.safetensors")


def test_image_to_video(run, source):
    Image.new("RGB", (90, 160), "red").save("first.png")
    run("a cat", "--image", "first.png", "--frames", 5, "--seed", 1, "-o", "a")
    assert pixels("a").shape == (5, 48, 32, 3)
    assert "give it with --image first.png" in video.mistake("--like", "a", "-o", "b")
    run("--like", "a", "-o", "b", "--image", "first.png")
    assert (pixels("a") == pixels("b")).all()


def test_video_to_video(run, source):
    run("a cat", "--video", source, "-o", "a")
    assert pixels("a").shape == (13, 32, 48, 3)


def test_continuation(run, source):
    run("a cat", "--extend", source, "--frames", 8, "--seed", 1, "-o", "a")
    assert (pixels("a")[:13] == pixels(source)).all() and len(pixels("a")) == 21
    run("a cat", "--extend", source, "--frames", 8, "--seed", 1, "-o", "b", "--no-keep-source", "--stream")
    assert np.abs(pixels("a")[13:] - pixels("b")).max() <= 1


def test_from_brings_back_how_it_was_written(run, source):
    run("a cat", "--extend", source, "--frames", 8, "--seed", 1, "-o", "a", "--no-keep-source")
    run("--like", "a", "--extend", source, "-o", "b")
    assert len(pixels("a")) == len(pixels("b")) == 8
    assert read_metadata("a") == read_metadata("b")


def test_contradictions(run, model, source):
    for words, first, second in [
        (["a cat", "--load-noise", "n", "--seed", 0], "--load-noise", "--seed"),
        (["a cat", "--no-keep-source"], "--no-keep-source", "--extend"),
        (["a cat", "--keep-source"], "--keep-source", "--extend"),
        (["a cat", "--preview"], "--preview", "--stream"),
        (["a cat", "--crf", 20, "-o", "a.webp"], "--crf", "a.webp"),
        (["a cat", "--context", 2], "--context", "--extend"),
        (["a cat", "--image", "a.png", "--video", source], "--image", "--video"),
    ]:
        line = video.mistake(*words, "-m", model)
        assert first in line and second in line, line
    run("a cat", "--context", 2, "--frames", 21, "--seed", 1, "-o", "long")


def test_a_still_of_a_video_model(run, model):
    result = Command("generate")("a cat", "a dog", "-m", model, "-n", 2, "--size", "48x32", "--seed", 3)
    assert result.exit_code == 0, result.output
    assert Image.open("out.png").size == (98, 66)
    run("a dog", "--frames", 1, "--seed", 3, "-o", "still")
    corner = np.asarray(Image.open("out.png"))[34:, :48].astype(int)
    assert np.abs(corner - pixels("still")[0]).max() <= 1


def test_mistakes_leave_nothing(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures = write_image_model(tmp_path / "pictures")
    before = sorted(tmp_path.iterdir())
    for words, message in [
        ([], "there is no prompt"),
        (["a cat", "--like", "a.mp4"], "--like brings its own prompt"),
        (["a cat", "--frames", "16"], "13 or 17, not 16"),
        (["a cat", "--frames", "0"], "--frames"),
        (["a cat", "--size", "48x33"], "multiples of 16 pixels"),
        (["a cat", "--size", "48x32", "--ratio", "1:1"], "--size and --ratio"),
        (["a cat", "--ratio", "wide"], "not an aspect ratio"),
        (["a cat", "--context", "9"], "context must be at most 4"),
        (["a cat", "--crf", "99"], "--crf"),
        (["a cat", "-o", "a.avi"], "written as .mp4"),
        (["a cat", "-o", "no/a.mp4"], "does not exist"),
        (["a cat", "-o", "a.gif", "--stream"], "watched while it grows"),
        (["a cat", "--stream", "--preview", "--no-denoise"], "leave out the previews"),
        (["a cat", "--stream", "--preview", "--frames", "1"], "this is a picture"),
        (["a cat", "--image", "no.png"], "cannot read the picture no.png"),
        (["a cat", "--extend", "no.mp4"], "no.mp4 does not exist"),
        (["a cat", "--video", "."], "holds no frames"),
        (["a cat", "--load-noise", "no.safetensors"], "cannot be read as a noise file"),
        (["a cat", "--guidance", "-1"], "guidance must be 0 or more"),
    ]:
        line = video.mistake(*words) if "--like" in words else video.mistake(*words, "-m", model)
        assert message in line, line
    assert "--model" in video.mistake("a cat")
    assert "makes pictures, not videos" in video.mistake("a cat", "-m", pictures)
    assert sorted(tmp_path.iterdir()) == before


def test_without_pyav(run, model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert "pip install av" in video.mistake("a cat", "-m", model)
    run("a cat", "--frames", 5, "-o", "a.gif")


def test_info(model):
    result = Command("info")(model)
    assert result.exit_code == 0, result.output
    assert "17 frames, 16 a second" in result.output
    assert "one video of 17 frames of 48x32" in result.output
