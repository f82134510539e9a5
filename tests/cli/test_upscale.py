"""`mlx-starflow upscale`, and `--upscale` of the commands that make pictures and videos."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.commands import Command
from helpers.images import smooth_images
from helpers.model_directories import write_image_model, write_video_model
from helpers.upscalers import rrdb_tensors, srvgg_tensors, write_upscaler
from PIL import Image

from mlx_starflow.media.metadata import read_metadata
from mlx_starflow.media.videos import VideoWriter, read_video
from mlx_starflow.pipelines import Upscaler

upscale, generate, edit, info, video = map(Command, ("upscale", "generate", "edit", "info", "video"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_upscaler(folder / "x2.pth", rrdb_tensors(unshuffle=2, blocks=1))
    return write_upscaler(folder / "x4.pth", srvgg_tensors())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_image_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_STARFLOW_CACHE", str(tmp_path / "cache"))


def size(path):
    return Image.open(path).size


# ---- files that are there


def test_one_picture(weights):
    smooth_images(1)[0].save("a.png")
    width, height = size("a.png")
    result = upscale("a.png", "-o", "b.png", "--upscale-model", weights)
    assert result.exit_code == 0 and "enlarged by x4.pth (4 times)" in result.output
    assert size("b.png") == (4 * width, 4 * height)
    found = read_metadata("b.png")
    assert found["made_by"] == "upscale" and found["source"] == {"picture": "a.png"}
    assert found["upscaled"] == [Upscaler.load(weights).metadata]
    assert upscale("a.png", "-o", "c.png", "--upscale-model", weights, "--upscale", 2, "--no-metadata").exit_code == 0
    assert size("c.png") == (2 * width, 2 * height)
    assert "does not say how it was made" in info.mistake("c.png")
    assert "was made by mlx-starflow upscale, which --like does not repeat" in generate.mistake("--like", "b.png")


def test_a_folder_goes_on_where_it_was_stopped(weights):
    Path("in/deep").mkdir(parents=True)
    first, second = smooth_images(2)
    first.save("in/a.png")
    first.save("in/c.bmp")
    second.save("in/deep/b.jpg")
    Path("in/bad.png").write_bytes(b"no picture")
    result = upscale("in", "-o", "out", "--upscale-model", weights, "--json", "t.json")
    assert result.exit_code == 0
    assert "3 of 4 pictures are finished in out" in result.output and "left out: cannot read" in result.stderr
    assert sorted(str(path) for path in Path("out").rglob("*.*")) == ["out/a.png", "out/c.png", "out/deep/b.jpg"]
    table = json.loads(Path("t.json").read_text())
    assert [row["picture"] for row in table["made"]] == ["in/a.png", "in/c.bmp", "in/deep/b.jpg"]
    assert [row["picture"] for row in table["skipped"]] == ["in/bad.png"]
    Path("in/bad.png").unlink()
    Path("out/a.png").unlink()
    before = Path("out/c.png").stat().st_mtime_ns
    result = upscale("in", "-o", "out", "--upscale-model", weights)
    assert "1 of 1 pictures are finished" in result.output and "2 pictures are in out already" in result.stderr
    assert Path("out/c.png").stat().st_mtime_ns == before
    assert upscale("in", "-o", "out", "--upscale-model", weights).exit_code == 0, "nothing is left to do"
    assert upscale("in", "-o", "out", "--upscale-model", weights, "--overwrite").output.count("3 of 3") == 1


def test_transparency(weights):
    image = smooth_images(1)[0]
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save("a.png")
    for name, mode in (("b.png", "RGBA"), ("b.webp", "RGBA"), ("b.jpg", "RGB")):
        assert upscale("a.png", "-o", name, "--upscale-model", weights).exit_code == 0
        assert Image.open(name).mode == mode


def test_a_video_and_a_folder_of_frames(weights):
    pytest.importorskip("av")
    frames = smooth_images(5)
    with VideoWriter(Path("a.mp4"), 12, metadata={"settings": {"fps": 12}, "note": "x"}) as writer:
        for frame in frames:
            writer.add(frame)
    assert upscale("a.mp4", "-o", "b.mp4", "--upscale-model", weights, "--crf", 12).exit_code == 0
    made = read_video("b.mp4")
    assert made.fps == 12 and [frame.size for frame in made] == [(4 * frames[0].width, 4 * frames[0].height)] * 5
    found = read_metadata("b.mp4")
    assert found["note"] == "x" and found["upscaled"][0]["file"] == "x4.pth"
    assert upscale("a.mp4", "-o", "frames", "--upscale-model", weights).exit_code == 0
    assert len(list(Path("frames").glob("*.png"))) == 5
    result = upscale("frames", "-o", "c.gif", "--upscale", "2", "--upscale-model", weights)
    assert result.exit_code == 0 and "5 frames of" in result.output
    assert size("c.gif") == (8 * frames[0].width, 8 * frames[0].height)


class StopsAt:
    """Ctrl-C while the nth thing is enlarged."""

    def __init__(self, monkeypatch, number):
        self.left, enlarged = number, Upscaler._enlarged

        def stop(*arguments):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            return enlarged(*arguments)

        monkeypatch.setattr(Upscaler, "_enlarged", stop)


def test_stopping_keeps_what_is_finished(weights, monkeypatch):
    Path("in").mkdir()
    frames = [image.resize((600, 500)) for image in smooth_images(3)]  # one frame at a time
    for number, image in enumerate(frames):
        image.resize((20, 20)).save(f"in/{number}.png")
    StopsAt(monkeypatch, 3)
    result = upscale("in", "-o", "out", "--upscale-model", weights)
    assert result.exit_code == 130 and "stopped: 2 of 3 pictures are finished in out" in result.stderr
    assert sorted(path.name for path in Path("out").iterdir()) == ["0.png", "1.png"]
    with VideoWriter(Path("a.gif"), 10) as writer:
        for frame in frames:
            writer.add(frame)
    StopsAt(monkeypatch, 3)
    result = upscale("a.gif", "-o", "b.gif", "--upscale-model", weights)
    assert result.exit_code == 130 and "stopped: 2 frames are finished, in b.gif" in result.stderr
    assert Image.open("b.gif").n_frames == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a.png", "b.png"], "several pictures go into a folder"),
        (["a.png", "b.png", "-o", "c.png"], "several pictures go into a folder"),
        (["nothing.png", "-o", "b.png"], "nothing.png does not exist"),
        (["a.png", "-o", "a.png"], "is read, and would be replaced"),
        (["a.png", "-o", "b.tiff"], "pictures are written as"),
        (["a.png", "-o", "b.png", "--quality", 50], "a quality is for"),
        (["a.png", "--crf", 20], "--crf is about H.264"),
        (["a.png", "-o", "b.png"], "download https://github.com/xinntao/Real-ESRGAN/releases/download/v0.1.0/"),
        (["a.png", "-o", "b.png", "--upscale", 2], "v0.2.1/RealESRGAN_x2plus.pth (BSD-3-Clause) into"),
        (["a.png", "-o", "b.png", "--upscale-model", "a.png"], "is not a checkpoint of torch.save"),
        (["a.png", "-o", "b.png", "--upscale-model", "."], "is a folder"),
    ],
)
def test_mistakes(words, said):
    smooth_images(1)[0].save("a.png")
    if words[1] == "b.png":
        smooth_images(1)[0].save("b.png")
    assert said in upscale.mistake(*words)


# ---- what is made


def test_generate(weights, model):
    assert generate("a cat", "-m", model, "--seed", 1, "-o", "small.png").exit_code == 0
    words = ["a cat", "-m", model, "--seed", 1, "--upscale", 4, "--upscale-model", weights]
    result = generate(*words, "-o", "a.png", "--json", "t.json")
    assert result.exit_code == 0 and "seed 1, enlarged by x4.pth (4 times)" in result.output
    assert size("a.png") == (32, 32)
    assert json.loads(Path("t.json").read_text())["upscaled"] == read_metadata("a.png")["upscaled"]
    assert "x4.pth" in info("a.png").output
    again = generate("--like", "a.png", "-o", "again.png")
    assert "a.png was enlarged 4 times by x4.pth: give --upscale to do that again" in again.stderr
    assert Path("again.png").read_bytes() == Path("small.png").read_bytes()
    assert generate("--like", "a.png", "-o", "c.png", "--upscale", 4, "--upscale-model", weights).exit_code == 0
    assert Path("c.png").read_bytes() == Path("a.png").read_bytes()


def test_a_grid(weights, model):
    words = ["a cat", "a dog", "-m", model, "--upscale", 2, "--upscale-model", weights, "-o", "a.png"]
    assert generate(*words).exit_code == 0
    assert size("a.png") == (2 * 16 + 2, 16)
    assert len(read_metadata("a.png")["upscaled"]) == 1


def test_stopping_keeps_the_picture_as_it_was_made(weights, model, monkeypatch):
    StopsAt(monkeypatch, 2)
    words = ["a cat", "a dog", "-m", model, "--upscale", 4, "--upscale-model", weights, "--separate", "-o", "a.png"]
    result = generate(*words)
    assert result.exit_code == 130 and "2 of 2 pictures are finished" in result.output + result.stderr
    assert size("a-1.png") == (32, 32) and "upscaled" in read_metadata("a-1.png")
    assert size("a-2.png") == (8, 8) and "upscaled" not in read_metadata("a-2.png")


def test_edits(weights, model):
    smooth_images(1)[0].save("x.png")
    more = ["-m", model, "--upscale", 2, "--upscale-model", weights]
    assert edit("vary", "x.png", *more, "-o", "v.png").exit_code == 0
    assert size("v.png") == (16, 16) and read_metadata("v.png")["upscaled"][0]["scale"] == 2
    assert edit("interpolate", "x.png", "x.png", *more, "--frames", 2, "-o", "w.webp").exit_code == 0
    assert size("w.webp") == (16, 16)


def test_video(weights, tmp_path):
    pytest.importorskip("av")
    model = write_video_model(tmp_path / "model")
    words = ["waves", "-m", model, "--upscale", 4, "--upscale-model", weights, "-o", "a.mp4"]
    result = video(*words)
    assert result.exit_code == 0, result.output
    assert "enlarged by x4.pth (4 times)" in result.output
    small = read_metadata("a.mp4")["settings"]["size"]
    assert next(read_video("a.mp4")).size == (4 * small[0], 4 * small[1])
    assert read_metadata("a.mp4")["upscaled"][0]["file"] == "x4.pth"


def test_options_that_do_not_go_together(weights, model):
    assert "--upscale-model does nothing alone: give --upscale too" in generate.mistake(
        "a cat", "-m", model, "--upscale-model", weights
    )
    line = generate.mistake("a cat", "-m", model, "--upscale", 4)
    assert "--upscale 4 needs a file of weights" in line and not Path("out.png").exists()
    two = Path(weights).with_name("x2.pth")
    assert "enlarges by 2, not by 4" in generate.mistake("a", "-m", model, "--upscale", 4, "--upscale-model", two)


def test_info(weights):
    result = info(weights)
    assert result.exit_code == 0 and "SRVGGNet" in result.output and "enlarges 4 times" in result.output
    assert Upscaler.load(weights).digest in result.output and "1920x1080" in result.output
    assert "--size is about models" in info.mistake(weights, "--size", "8x8")
