"""Videos that are watched, stopped, saved, and given as files."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import message
from helpers.images import smooth_images
from helpers.model_directories import write_video_model

from mlx_starflow import Cancelled, Progress, load_video
from mlx_starflow.media.metadata import read_metadata
from mlx_starflow.media.videos import read_video
from mlx_starflow.pipelines.video_frames import FrameDecoder


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_video_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pipe(directory):
    return load_video(directory)


def test_phases_of_a_video(pipe):
    seen = []

    def look(progress: Progress) -> None:
        seen.append((progress.phase, progress.done, progress.total))

    asked = {"seed": 1, "frames": 9, "method": "sequential"}
    plain = pipe.generate("a dog", **asked)
    assert pipe.generate("a dog", frames_at_once=1, callback=look, **asked).videos == plain.videos
    assert {phase for phase, _, _ in seen} == {"text", "flow", "denoise", "decode"}
    flow = [(done, total) for phase, done, total in seen if phase == "flow" and total is not None]
    done, total = max(flow)
    assert done == total
    assert all(total is None for phase, _, total in seen if phase == "decode")


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("at_once", [1, 3])
def test_previews_of_a_video(directory, low_memory, at_once):
    pipe, seen = load_video(directory, low_memory=low_memory), []
    asked = {"seed": 1, "frames": 9, "method": "sequential", "videos": 2, "batch_size": 2, "frames_at_once": at_once}

    def look(progress: Progress) -> None:
        if progress.phase == "flow" and progress.total:
            seen.append((progress.block, progress.preview()))
        else:
            assert progress.preview() == []

    plain = load_video(directory).generate("a dog", **asked)
    assert pipe.generate("a dog", callback=look, **asked).videos == plain.videos
    assert {block for block, _ in seen} == {0, 1, 2}
    for _, images in seen:
        assert [image.size for image in images] == [plain.videos[0][0].size] * 2
    assert len({images[0].tobytes() for _, images in seen}) > 5


@pytest.mark.parametrize("low_memory", [False, True])
def test_previews_before_frames_are_finished(directory, low_memory):
    """The first one comes before the second latent frame is sampled; what comes out is the same."""
    pipe, seen = load_video(directory, low_memory=low_memory), []
    asked = {"seed": 1, "frames": 17, "method": "sequential"}

    def look(progress: Progress) -> None:
        seen.append((progress.phase, progress.done, progress.total))
        if progress.phase == "preview":
            images.extend(progress.preview())

    images: list = []
    plain = list(load_video(directory).stream("a dog", **asked))
    stream = pipe.stream("a dog", previews=True, callback=look, **asked)
    assert list(stream) == plain
    assert [done for phase, done, _ in seen if phase == "preview"] == [0, 1, 2, 3, 4]
    assert {total for phase, _, total in seen if phase == "preview"} == {5}
    assert [image.size for image in images] == [plain[0].size] * 5
    sampled = max(total for phase, _, total in seen if phase == "flow" and total)
    before = seen[: next(at for at, (phase, _, _) in enumerate(seen) if phase == "preview")]
    assert max(done for phase, done, total in before if phase == "flow" and total) == sampled // 5
    assert "decode" not in {phase for phase, _, _ in before}
    assert stream.stats.seconds["preview"] > 0
    # Those that nobody asks for cost no decoding, and nothing else changes.
    assert list(pipe.stream("a dog", previews=True, **asked)) == plain


def test_previews_of_what_is_given_and_of_long_videos(pipe):
    def numbers(**asked):
        found = []

        def look(progress: Progress) -> None:
            if progress.phase == "preview":
                found.append((progress.done, len(progress.preview())))

        plain = list(pipe.stream("a dog", seed=1, method="sequential", **asked))
        assert list(pipe.stream("a dog", seed=1, method="sequential", previews=True, callback=look, **asked)) == plain
        return [number for number, count in found if count == 1]

    first = smooth_images(1)[0]
    assert numbers(frames=9, image=first) == [0, 1, 2]
    assert numbers(frames=29, context=2) == list(range(8))
    past = pipe.generate("a dog", seed=1, frames=9).videos[0]
    assert numbers(frames=8, extend=past) == [0, 1]
    assert numbers(frames=9, video=past) == [0, 1, 2]


def test_a_preview_of_the_only_layer_that_looks_ahead_is_in_the_frames_colours(pipe, monkeypatch):
    """Later latent frames have a factor, which a picture's have not."""
    denoiser = pipe.flow.denoiser
    monkeypatch.setattr(denoiser, "config", replace(denoiser.config, look_ahead=0))
    decoded, shown, decode = [], [], pipe.vae.decode

    def record(latents, *rest):
        shown.append(latents)
        return decode(latents, *rest)

    monkeypatch.setattr(type(pipe.vae), "decode", lambda vae, latents, *rest: record(latents, *rest))
    push = FrameDecoder._push

    def keep(decoder, latents):
        decoded.append(decoder._vae.unscale(latents, decoder._number))
        return push(decoder, latents)

    monkeypatch.setattr(FrameDecoder, "_push", keep)
    list(
        pipe.stream(
            "a dog",
            seed=1,
            frames=9,
            previews=True,
            callback=lambda progress: progress.phase == "preview" and progress.preview(),
        )
    )
    assert len(shown) == len(decoded) == 3
    for picture, frame in zip(shown, decoded, strict=True):
        assert mx.allclose(picture, frame[:, 0], atol=1e-4)


def test_previews_that_there_cannot_be(pipe):
    asked = {"seed": 1, "previews": True}
    assert "live=False" in message(pipe.stream, "a dog", live=False, **asked)
    assert "without denoising" in message(pipe.stream, "a dog", denoise=False, **asked)
    assert "this is a picture" in message(pipe.stream, "a dog", frames=1, **asked)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("phase", ["text", "flow", "preview", "denoise", "decode"])
def test_a_stopped_video_can_be_begun_again(directory, phase, low_memory):
    pipe, asked = load_video(directory, low_memory=low_memory), {"seed": 1, "frames": 9, "method": "sequential"}

    def stop(progress: Progress) -> None:
        if progress.phase == phase:
            progress.cancel()

    with pytest.raises(Cancelled):
        list(pipe.stream("a dog", callback=stop, previews=phase == "preview", **asked))
    if phase != "preview":
        with pytest.raises(Cancelled):
            pipe.generate("a dog", callback=stop, **asked)
    if low_memory:
        assert pipe.backend.held == set()
    stream = pipe.stream("a dog", **asked)
    first = next(stream)
    stream.progress.cancel()
    with pytest.raises(Cancelled):
        list(stream)
    assert first == pipe.generate("a dog", **asked).videos[0][0]


@pytest.mark.parametrize("kind", ["video", "extend"])
def test_reading_a_video_is_stopped(pipe, kind):
    read, frames = [], pipe.generate("a dog", seed=1, frames=9).videos[0]

    def stop(progress: Progress) -> None:
        if progress.phase == "encode" and progress.done == 3:
            progress.cancel()

    with pytest.raises(Cancelled):
        pipe.stream("a dog", callback=stop, **{kind: (read.append(None) or each for each in frames)})
    assert len(read) <= 4


def test_videos_are_saved_with_their_metadata(pipe, tmp_path):
    result = pipe.generate("a dog", seed=1, frames=5, videos=2, method="sequential")
    files = result.save(tmp_path / "dog.webp")
    assert [read_metadata(file)["seeds"] for file in files] == [[1], [2]]
    pipe.stream("a dog", seed=1, frames=5, method="sequential").save(str(tmp_path / "stream.webp"))
    frames = list(read_video(tmp_path / "stream.webp"))
    assert [np.asarray(a).tolist() for a in frames] == [np.asarray(b).tolist() for b in result.videos[0]]
    assert read_metadata(tmp_path / "stream.webp") == read_metadata(files[0])
    assert "videos are written as" in message(result.save, tmp_path / "dog.txt")


def test_videos_are_given_as_files_frames_or_arrays(pipe, tmp_path):
    result = pipe.generate("a dog", seed=1, frames=5)
    (file,) = result.save(tmp_path / "dog.webp")
    frames = result.videos[0]
    (expected,) = pipe.score([frames], draws=1)
    assert expected.frames
    for given in (file, str(file), [file], [np.stack([np.asarray(each) for each in frames])]):
        (score,) = pipe.score(given, draws=1)
        assert score.nll == pytest.approx(expected.nll, abs=1e-6)
    assert len(pipe.score(smooth_images(2), draws=1)) == 2
    (picture,) = pipe.score(smooth_images(1)[0], draws=1)
    assert not picture.frames
    assert "not both together" in message(pipe.score, [frames, smooth_images(1)[0]])
    array = np.asarray(frames[0])
    made = [pipe.generate("a dog", seed=1, frames=5, image=each).videos for each in (frames[0], array)]
    assert made[0] == made[1]
