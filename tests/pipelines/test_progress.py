"""Pipelines that are watched, previewed and stopped; results that are saved."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.commands import Command, message
from helpers.images import smooth_images
from helpers.model_directories import write_image_model

from mlx_starflow import Cancelled, Progress, load
from mlx_starflow.media.metadata import read_metadata


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_image_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pipe(directory):
    return load(directory)


def stop_at(phase: str, done: int = 0):
    def stop(progress: Progress) -> None:
        if progress.phase == phase and progress.done >= done:
            progress.cancel()

    return stop


def test_phases_of_generating(pipe):
    seen = []
    result = pipe.generate("a cat", images=3, seed=1, batch_size=2, callback=lambda p: seen.append(p.phase))
    order = [phase for phase, before in zip(seen, ["", *seen], strict=False) if phase != before]
    once = ["flow", "verify", "denoise", "batches"]
    assert order == ["text", *once, *once, "decode"]
    assert list(result.stats.seconds) == ["text", "flow", "verify", "denoise", "decode"]


@pytest.mark.parametrize("phase", ["text", "flow", "verify", "denoise", "decode"])
@pytest.mark.parametrize("low_memory", [False, True])
def test_what_was_stopped_can_be_begun_again(directory, pipe, phase, low_memory):
    ours = load(directory, low_memory=low_memory)
    with pytest.raises(Cancelled):
        ours.generate("a cat", seed=1, callback=stop_at(phase))
    assert ours.backend.held == (set() if low_memory else {"text_encoder", "flow", "vae"})
    assert ours.generate("a cat", seed=1).images == pipe.generate("a cat", seed=1).images


def test_an_error_in_the_callback_comes_through(pipe):
    def interrupt(progress: Progress) -> None:
        if progress.phase == "flow" and progress.done > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe.generate("a cat", seed=1, callback=interrupt)
    assert len(pipe.generate("a cat", seed=1).images) == 1


def test_streams_are_stopped_from_outside(pipe):
    stream = pipe.stream("a cat", images=3, seed=1, batch_size=1)
    first = next(stream)
    stream.progress.cancel()
    with pytest.raises(Cancelled):
        next(stream)
    assert first.image == pipe.generate("a cat", seed=1).images[0]


def test_choosing_the_best_is_watched_too(pipe):
    for call in (
        lambda **options: pipe.best_of("a cat", 2, seed=1, **options),
        lambda **options: list(pipe.stream("a cat", best_of=2, seed=1, **options)),
    ):
        seen = set()
        call(callback=lambda progress, seen=seen: seen.add(progress.phase))
        assert {"text", "flow", "scoring"} <= seen
        with pytest.raises(Cancelled):
            call(callback=stop_at("scoring"))


def test_previews(pipe):
    """They are the states that `keep_steps` shows, as far as these are made."""
    previews, plain = {}, pipe.generate(["a cat", "a dog"], seed=1, keep_steps=True)

    def look(progress: Progress) -> None:
        if progress.phase == "flow" and progress.total is not None:
            previews[progress.block, progress.done] = progress.preview()
        else:
            assert progress.preview() == []

    watched = pipe.generate(["a cat", "a dog"], seed=1, callback=look)
    assert watched.images == plain.images and watched.stats.evaluations == plain.stats.evaluations
    last = previews[max(previews, key=lambda key: key[1])]
    assert last == [steps[-2] for steps in plain.steps]  # data before they are cleaned
    first = previews[min(previews, key=lambda key: key[1])]
    assert first != last and len(first) == 2


def test_a_finished_progress_bar_is_not_in_the_way(pipe, capsys):
    pipe.generate("a cat", images=2, batch_size=1, progress=True)
    assert "batches" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "phases"),
    [
        (lambda pipe, image, options: pipe.score([image] * 3, batch_size=1, **options), {"reading", "scoring"}),
        (lambda pipe, image, options: pipe.classify(image, ["a", "b"], **options), {"reading", "scoring"}),
        (lambda pipe, image, options: pipe.encode(image, **options), {"reading", "encoding", "flow"}),
        (lambda pipe, image, options: pipe.vary(image, strength=0.5, **options), {"flow", "denoise", "editing"}),
        (lambda pipe, image, options: pipe.reprompt(image, "a", "b", strength=0.5, **options), {"flow", "editing"}),
        (lambda pipe, image, options: pipe.interpolate(image, image, **options), {"flow", "editing"}),
        (
            lambda pipe, image, options: pipe.inpaint(image, "0,0,4,8", steps=1, rounds=1, **options),
            {"flow", "denoise", "inpainting"},
        ),
    ],
    ids=["score", "classify", "encode", "vary", "reprompt", "interpolate", "inpaint"],
)
def test_scoring_and_editing(pipe, call, phases):
    image, seen = smooth_images(1)[0], set()
    call(pipe, image, {"callback": lambda progress: seen.add(progress.phase)})
    assert seen == phases
    for phase in phases:
        with pytest.raises(Cancelled):
            call(pipe, image, {"callback": stop_at(phase)})
    call(pipe, image, {})


def test_results_are_saved_with_their_metadata(pipe, tmp_path):
    one = pipe.generate("a cat", seed=3)
    assert one.save(tmp_path / "one.png") == [tmp_path / "one.png"]
    assert read_metadata(tmp_path / "one.png") == json.loads(json.dumps(one.metadata[0]))
    two = pipe.generate("a cat", seed=3, images=2)
    files = two.save(str(tmp_path / "two.png"))
    assert files == [tmp_path / "two-1.png", tmp_path / "two-2.png"]
    assert [read_metadata(file)["seeds"] for file in files] == [[3], [4]]
    again = Command("generate")("--from", files[1], "-m", pipe.directory, "-o", tmp_path / "again.png")
    assert again.exit_code == 0 and (tmp_path / "again.png").read_bytes()
    assert "pictures are written as" in message(two.save, tmp_path / "two.txt")
    assert "cannot be written" in message(two.save, tmp_path / "none" / "x.png")
    edit = pipe.vary(one.images[0], strengths=[0.2, 0.4])
    assert [read_metadata(file)["strength"] for file in edit.save(tmp_path / "varied.png")] == [0.2, 0.4]
    painted = pipe.inpaint(one.images[0], "0,0,4,8", steps=1, rounds=1)
    assert read_metadata(painted.save(tmp_path / "painted.webp")[0])["made_by"] == "edit inpaint"


def test_noise_is_that_of_the_plain_call(pipe):
    ours, plain = (pipe.generate("a", seed=1, progress=each) for each in (Progress(), False))
    assert np.array_equal(ours.noise, plain.noise) and ours.images == plain.images


@pytest.mark.parametrize("phase", ["flow", "verify", "decode"])
def test_class_labels(pixel_flow, phase):
    seen = []
    plain = pixel_flow.generate("1", seed=1)
    assert pixel_flow.generate("1", seed=1, callback=lambda p: seen.append(p.phase)).images == plain.images
    assert phase in seen
    with pytest.raises(Cancelled):
        pixel_flow.generate("1", seed=1, callback=stop_at(phase))
    assert "did you mean 'guidance'?" in message(pixel_flow.generate, "1", guidence=1.0)
    assert pixel_flow.generate("1", seed=1).images == plain.images
