"""Scores of videos, frame by frame."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import message
from helpers.images import smooth_images
from helpers.model_directories import write_video_model
from helpers.tiny_flows import tiny_flow
from PIL import Image

from mlx_starflow.likelihood import calibrate, classify, exact_nll, score, token_nats
from mlx_starflow.likelihood.heatmap import heat_map_frames
from mlx_starflow.pipelines import VideoPipeline, load_video


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> VideoPipeline:
    """A model of videos of 17 frames."""
    return load_video(write_video_model(tmp_path_factory.mktemp("video")))


def video(count: int, size: tuple[int, int] = (48, 32)) -> list[Image.Image]:
    """Smooth pictures as frames."""
    return smooth_images(count, size)


def test_frames_have_the_jacobian_of_their_own_map():
    """z of a frame depends on it and earlier frames; its log-det is that of dz_t / dx_t, computed numerically."""
    flow = tiny_flow("video", img_size=1, channel_size=3)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 2, 2, 3)).astype(np.float32)
    text = mx.array(rng.standard_normal((1, 72, 32)), mx.float32)
    step, size = 1e-2, x.size
    moved = np.eye(size, dtype=np.float32).reshape(size, *x.shape) * step
    above, below = (
        np.array(flow(mx.array(x + sign * moved), mx.repeat(text, size, axis=0)).z, np.float64) for sign in (1, -1)
    )
    jacobian = ((above - below) / (2 * step)).reshape(size, size).T  # [z, x]
    out = flow(mx.array(x[None]), text)
    log_dets = np.array(out.log_det).reshape(3, -1).sum(axis=1)
    blocks = jacobian.reshape(3, size // 3, 3, size // 3).swapaxes(1, 2)
    for frame in range(3):
        assert np.abs(blocks[frame, frame + 1 :]).max(initial=0) == 0
        np.testing.assert_allclose(np.linalg.slogdet(blocks[frame, frame])[1], log_dets[frame], atol=1e-3)
    assert np.abs(blocks[2, 0]).max() > 1e-4
    np.testing.assert_allclose(np.linalg.slogdet(jacobian)[1], log_dets.sum(), atol=1e-3)


def test_a_frame_is_scored_given_the_past_alone():
    flow = tiny_flow("video")
    rng = np.random.default_rng(1)
    x = mx.array(rng.standard_normal((1, 4, 2, 3, 4)), mx.float32)
    text = mx.array(rng.standard_normal((1, 72, 32)), mx.float32)
    whole = token_nats(flow, x, text).reshape(-1, 4, 6)
    for frames in (1, 2, 3):
        part = token_nats(flow, x[:, :frames], text).reshape(-1, frames, 6)
        np.testing.assert_allclose(part, whole[:, :frames], atol=1e-4)
    changed = mx.concatenate([x[:, :2], x[:, 2:3] + 0.5, x[:, 3:]], axis=1)
    other = token_nats(flow, changed, text).reshape(-1, 4, 6)
    np.testing.assert_allclose(other[:, :2], whole[:, :2], atol=1e-5)
    assert (np.abs(other - whole).sum(axis=(0, 2))[2:] > 1e-3).all()


def test_the_score_of_a_video(model):
    (each,) = score(model, [video(17)], "a cat", draws=3)
    data = model.to_data([video(17)])
    assert data.shape == (1, 5, 2, 3, 4) and each.dimensions == data.size
    expected = exact_nll(model.flow, data, model.conditions(["a cat"], data.shape), draws=3)
    assert each.nll == pytest.approx(expected.mean, rel=1e-5)
    assert each.surprise.shape == (5, 2, 3)
    assert each.surprise.sum() / each.dimensions == pytest.approx(each.nll, abs=1e-4)
    assert np.mean([frame.nll for frame in each.frames]) == pytest.approx(each.nll, abs=1e-6)
    told = json.loads(json.dumps(each.to_dict()))
    assert [frame["nll"] for frame in told["frames"]] == [frame.nll for frame in each.frames]
    assert told["frames"][0].keys() == {"nll", "standard_error", "prior"}


def test_a_video_may_end_anywhere(model):
    """The autoencoder is causal too, and the noise of a frame does not depend on the ones after it."""
    (whole,), (part,) = score(model, [video(17)], draws=2), score(model, [video(12)], draws=2)
    np.testing.assert_allclose([each.nll for each in part.frames], [each.nll for each in whole.frames[:3]], atol=1e-4)


def test_videos_of_several_lengths_in_one_call(model):
    videos = [video(17), video(9), video(17, (32, 48)), video(5)]
    together = score(model, videos, ["a", "b", "c", "d"], draws=2)
    assert [each.surprise.shape for each in together] == [(5, 2, 3), (3, 2, 3), (5, 3, 2), (2, 2, 3)]
    (alone,) = score(model, videos[:1], "a", draws=2)
    assert alone.nll == pytest.approx(together[0].nll, abs=1e-4)


def test_pictures_are_stills(model):
    (still,) = score(model, video(1), "a cat", draws=2)
    assert still.surprise.shape == (2, 2) and not still.frames and "frames" not in still.to_dict()
    # A video's prompt says how many frames a second it has, a picture's does not.
    shapes = ((1, 2, 3, 4), (1, 1, 2, 3, 4))
    picture, moving = (np.array(model.conditions(["a cat"], shape)) for shape in shapes)
    assert np.abs(picture - moving).max() > 1e-3


def test_low_memory(model):
    frugal = load_video(model.directory, low_memory=True)
    scores = score(frugal, [video(9), video(5)], "a", draws=2)
    for ours, theirs in zip(scores, score(model, [video(9), video(5)], "a", draws=2), strict=True):
        assert ours.nll == pytest.approx(theirs.nll, abs=1e-5)
    assert frugal.backend.held == set()


def test_classify(model):
    result = classify(model, [video(9), video(9)[::-1]], ["a cat", "a dog"], draws=1)
    np.testing.assert_allclose(result.posterior.sum(axis=1), 1)


def test_maps_last_as_long_as_the_video():
    frames = [Image.new("RGB", (4, 4))] * 9
    values = np.arange(3.0).reshape(3, 1, 1)
    maps = [np.asarray(each)[0, -1].tolist() for each in heat_map_frames(frames, values, 0, 2, 4, unit="nats")]
    assert len(maps) == 9
    assert [maps.index(each) for each in maps] == [0, 1, 1, 1, 1, 5, 5, 5, 5]


def test_mistakes(model):
    assert "more than the 17 frames" in message(score, model, [video(21)])
    assert len(score(model, [video(20)], draws=1)[0].frames) == 5
    assert "--frames 17" in message(score, model, [video(21)])
    assert "has no frames" in message(score, model, [[]])
    assert "pictures or videos" in message(score, model, [video(5), *video(1)])
    assert "pictures or videos" in message(score, model, [*video(1), video(5)])
    assert "there are no pictures" in message(score, model, [])
    assert "multiples of 16" in message(score, model, [video(5)], size=(50, 32))
    assert "differ in size or in the number" in message(model.to_data, [video(5), video(9)])
    assert "6 latent frames are more than the 5" in message(model.conditions, [""], (1, 6, 2, 3, 4))
    measured = calibrate(model, model.to_data(smooth_images(2)), draws=2)
    assert "a video cannot be compared" in message(measured.typicality, score(model, [video(5)])[0])
