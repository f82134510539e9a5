"""Videos that are watched, stopped, saved, and given as files."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.commands import message
from helpers.images import smooth_images
from helpers.model_directories import write_video_model

from mlx_starflow import Cancelled, Progress, load_video
from mlx_starflow.media.metadata import read_metadata
from mlx_starflow.media.videos import read_video


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
@pytest.mark.parametrize("phase", ["text", "flow", "denoise", "decode"])
def test_a_stopped_video_can_be_begun_again(directory, phase, low_memory):
    pipe, asked = load_video(directory, low_memory=low_memory), {"seed": 1, "frames": 9, "method": "sequential"}

    def stop(progress: Progress) -> None:
        if progress.phase == phase:
            progress.cancel()

    with pytest.raises(Cancelled):
        list(pipe.stream("a dog", callback=stop, **asked))
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
