"""Numbers that no machine has room or time for: refused before any work, with the figure."""

from __future__ import annotations

import time

import mlx.core as mx
import pytest
from helpers.commands import Command, message
from helpers.images import write_images
from helpers.model_directories import write_class_model, write_image_model, write_video_model

from mlx_starflow import load
from mlx_starflow.likelihood.nll import MOST_DRAWS
from mlx_starflow.pipelines import image as image_pipeline
from mlx_starflow.planning import limits
from mlx_starflow.planning.memory import plan
from mlx_starflow.training.data.cache.build import CacheSettings

HUGE = 10**9


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_image_model(folder / "image")
    write_video_model(folder / "video")
    write_class_model(folder / "class")
    write_images(folder / "pictures", 2, [{"text": "a"}] * 2)
    return folder


SIZE, COUNT, STEPS = "GB of memory, and this machine has", "pictures are too many", "steps are too many"
CALLS = {
    "generate a -m {image} -o z.png --size 20000x20000": SIZE,
    "generate a -m {image} -o z.png --size 16384x16384 --low-memory": SIZE,
    "generate a -m {image} -o z.png -n 1000000000": COUNT,
    "generate a -m {image} -o z.png --best-of 1000000000": COUNT,
    "generate a b c -m {image} -o z.png -n 999999": COUNT,
    "generate a -m {image} -o z.png --size 1000000000x8": "is not a size such as 64x64",
    "generate a -m {image} -o z.png --size 0x0": "is not a size such as 64x64",
    "generate a -m {image} -o z.png --size -8x8": "is not a size such as 64x64",
    "video a -m {video} -o z.webp --size 19200x19200": SIZE,
    "video a -m {video} -o z.webp --frames 1000000001": "a video has at most 1,000,000 frames",
    "video a -m {video} -o z.webp --fps 1000000001": "the frame rate must be 1 or more and at most 1000",
    "bench {image} --size 20000x20000": SIZE,
    "bench {image} --repeats 1000000000": "is not in the range",
    "tune {image} --tolerance 1e308": "is not in the range",
    "score {pictures} -m {image} --size 20000x20000": SIZE,
    "score {pictures} -m {image} --draws 1000000000": "is not in the range",
    "score {pictures} -m {class} --size 20000x20000": "knows pictures of 8x8 pixels alone",
    "classify {pictures} -l a,b -m {image} --size 20000x20000": SIZE,
    "encode {pictures} -m {image} -o z.safetensors --size 20000x20000": SIZE,
    "edit vary {pictures}/0.png -m {image} -o z.png --size 20000x20000": SIZE,
    "edit vary {pictures}/0.png -m {image} -o z.png -n 1000000000": COUNT,
    "edit reprompt {pictures}/0.png --to a -m {image} -o z.png --frames 1000000000": "is not in the range",
    "edit interpolate {pictures}/0.png {pictures}/1.png -m {image} -o z.gif --seconds 1e9": "is not in the range",
    "edit interpolate {pictures}/0.png {pictures}/1.png -m {image} -o z.gif --seconds nan": "is not in the range",
    "train {pictures} -o run --preset tarflow --seed 1000000000000000000000": "less than 2^63",
    "edit inpaint {pictures}/0.png --mask 0,0,4,8 -m {image} -o z.png -n 1000000000": "images are too many",
    "edit inpaint {pictures}/0.png --mask 0,0,4,8 -m {image} -o z.png --steps 1000000000": STEPS,
    "edit inpaint {pictures}/0.png --mask 0,0,4,8 -m {image} -o z.png --steps 2000 --rounds 2000": STEPS,
    "cache {pictures} -m {image} -o cache --size 60000": SIZE,
    "cache {pictures} -m {image} -o cache --size 1000000000": "a size has sides of 1 to 65536 pixels",
    "cache {pictures} -m {image} -o cache --views 1000000000": "views must be 1 or more, at most 1,000,000",
    "finetune {image} {pictures} -o run --lora 1000000000": "rank must be at most 65536",
    "finetune {image} {pictures} -o run --seed 1000000000000000000000": "seed must be less than 2^63",
}


@pytest.mark.parametrize("call", CALLS)
def test_refused_before_any_work(call, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, *words = call.split()
    places = {each: models / each for each in ("image", "video", "class", "pictures")}
    start = time.monotonic()
    assert CALLS[call] in Command(name).mistake(*(word.format(**places) for word in words))
    assert time.monotonic() - start < 10
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_batches_larger_than_what_there_is(models, tmp_path):
    for batch in (HUGE, 10**30):
        done = Command("generate")("a", "-m", models / "image", "-o", tmp_path / "o.png", "--batch-size", batch)
        assert done.exit_code == 0, done.output
        done = Command("score")(models / "pictures", "-m", models / "image", "--draws", 1, "--batch-size", batch)
        assert done.exit_code == 0, done.output


def test_draws(models):
    pipe = load(models / "image")
    assert MOST_DRAWS == 10_000  # as --draws says
    pictures = pipe.generate("", images=1, seed=0).images
    for draws in (0, -1, HUGE):
        assert "the noise is drawn 1 to 10,000 times" in message(pipe.score, pictures, draws=draws)
        assert "the noise is drawn 1 to 10,000 times" in message(pipe.classify, pictures, ["a", "b"], draws=draws)


@pytest.mark.usefixtures("chosen_here")
def test_the_figure_is_the_plans(models, monkeypatch):
    pipe = load(models / "image")
    needed = plan(pipe.model, size=(64, 64), batch=8, dtype=mx.float32).peak()
    monkeypatch.setattr(limits, "installed", lambda: needed)
    pipe.check_size((64, 64), 8)
    monkeypatch.setattr(limits, "installed", lambda: needed - 1)
    pipe.check_size((64, 64), 8)  # it has been looked at
    pipe.check_size((64, 64), 7)
    said = message(load(models / "image").check_size, (64, 64), 8)
    assert said.startswith(f"pictures of 64x64 would take {needed / 1e9:,.1f} GB of memory")


def test_what_is_kept_counts(models, monkeypatch):
    """Of many pictures, that is, which are sampled a few at a time."""
    pipe = load(models / "image")
    each = 8 * 4 * 4 * 4 + 3 * 8 * 8
    monkeypatch.setattr(image_pipeline.ImagePipeline, "check_size", lambda *_, **__: None)
    monkeypatch.setattr(limits, "installed", lambda: 3 * each)
    assert len(pipe.generate("", images=3, seed=0).images) == 3
    assert "4 pictures would take 0.0 GB of memory" in message(pipe.generate, "", images=4, seed=0)
    assert "1 pictures" in message(pipe.generate, "", images=1, seed=0, keep_steps=True)


def test_settings_of_the_wrong_type(models):
    pipe = load(models / "image")
    for wrong in ({"guidance": "x"}, {"guidance": [1]}, {"size": 3}, {"size": [1]}, {"size": [1, "x"]}, {"denoise": 5},
                  {"temperature": float("nan")}, {"method": {}}, {"attn_temp": True}):  # fmt: skip
        said = message(type(pipe.settings).from_dict, wrong)
        assert next(iter(wrong)) in said or "width and a height" in said
    assert "views must be" in message(CacheSettings, views=HUGE)
