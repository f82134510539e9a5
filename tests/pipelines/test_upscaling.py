"""`Upscaler`: pictures and frames in, larger ones out."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import message
from helpers.images import smooth_images
from helpers.model_directories import write_image_model
from helpers.upscalers import rrdb_tensors, span_tensors, srvgg_tensors, write_upscaler
from PIL import Image

from mlx_starflow import Cancelled, Progress, Upscaler, load
from mlx_starflow.media.metadata import read_metadata


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_upscaler(tmp_path_factory.mktemp("upscaler") / "a.pth", srvgg_tensors())


@pytest.fixture(scope="module")
def upscaler(path):
    return Upscaler.load(path, dtype="float32")


def pixels(image):
    return np.asarray(image).astype(int)


def test_pixels_are_the_networks(upscaler):
    image = smooth_images(1)[0]
    (large,) = upscaler(image)
    expected = upscaler._network(mx.array(np.asarray(image)[None]).astype(mx.float32) / 255)
    assert np.abs(pixels(large) - np.clip(255 * np.array(expected[0]), 0, 255)).max() <= 0.51


@pytest.mark.parametrize("tensors", [rrdb_tensors(), rrdb_tensors(unshuffle=2), srvgg_tensors(), span_tensors()])
def test_tiles_are_not_seen(tmp_path, tensors):
    upscaler = Upscaler.load(write_upscaler(tmp_path / "a.pth", tensors), dtype="float32")
    picture = np.random.default_rng(0).integers(0, 256, (45, 31, 3), np.uint8)
    whole, tiled = (upscaler(picture, tile=tile)[0] for tile in (None, 8))
    assert whole.size == (31 * upscaler.scale, 45 * upscaler.scale)
    assert np.abs(pixels(whole) - pixels(tiled)).max() <= 1, "rounding to whole levels"


def test_many_pictures_files_and_folders(upscaler, tmp_path):
    images = smooth_images(2)
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    one = upscaler(images[0])[0]
    for given in (tmp_path, [tmp_path / "0.png", np.asarray(images[1])], images):
        made = upscaler(given)
        assert len(made) == 2 and np.array_equal(pixels(made[0]), pixels(one))


def test_transparency_is_enlarged_too(upscaler):
    image = smooth_images(1)[0]
    alpha = Image.linear_gradient("L").resize(image.size)
    colours = upscaler(image)[0]
    image.putalpha(alpha)
    (large,) = upscaler(image)
    assert large.mode == "RGBA" and large.size == colours.size
    assert np.array_equal(pixels(large)[..., :3], pixels(colours))
    grey = pixels(upscaler(alpha.convert("RGB"))[0].convert("L"))
    assert np.array_equal(pixels(large)[..., 3], grey)


def test_a_colour_profile_stays(upscaler, tmp_path):
    image = smooth_images(1)[0]
    image.save(tmp_path / "a.png", icc_profile=b"a profile")
    assert upscaler(tmp_path / "a.png")[0].info["icc_profile"] == b"a profile"


def test_half_as_large(path):
    """A network that enlarges four times, asked for twice: its result made smaller."""
    image = smooth_images(1)[0]
    whole, half = (Upscaler.load(path, scale=scale, dtype="float32")(image)[0] for scale in (4, 2))
    assert half.size == (2 * image.width, 2 * image.height)
    assert np.array_equal(pixels(half), pixels(whole.resize(half.size, Image.Resampling.LANCZOS)))


def test_half_precision_is_close(path, upscaler):
    image = smooth_images(1)[0]
    half = Upscaler.load(path, dtype="float16")
    assert half.dtype == mx.float16
    assert np.abs(pixels(half(image)[0]) - pixels(upscaler(image)[0])).max() <= 2
    assert half.dtype == mx.float16


def overflowing():
    """Weights whose maps leave float16's range, and come back into the range of pixels."""
    tensors = srvgg_tensors()
    for name in ("body.0.weight", "body.0.bias"):
        tensors[name] = tensors[name] * 1e6
    tensors["body.8.weight"] = tensors["body.8.weight"] * np.float32(1e-6)
    return tensors


def test_what_leaves_half_precisions_range_is_computed_in_float32(tmp_path):
    path = write_upscaler(tmp_path / "a.pth", overflowing())
    image = smooth_images(1)[0]
    half = Upscaler.load(path, dtype="float16")
    with pytest.warns(UserWarning, match="a.pth leaves the range of half precision"):
        (made,) = half(image)
    assert half.dtype == mx.float32
    assert np.array_equal(pixels(made), pixels(Upscaler.load(path, dtype="float32")(image)[0]))


def test_what_leaves_float32s_range_is_an_error(tmp_path):
    tensors = srvgg_tensors()
    for number in (0, 2, 4):
        tensors[f"body.{number}.weight"] = tensors[f"body.{number}.weight"] * np.float32(1e30)
    upscaler = Upscaler.load(write_upscaler(tmp_path / "a.pth", tensors), dtype="float32")
    assert "is not finite: its weights may be damaged" in message(upscaler, smooth_images(1)[0])


# ---- videos


def test_frames(upscaler):
    images = smooth_images(5)
    one_by_one = [upscaler(image)[0] for image in images]
    for at_once in (None, 1, 2):
        made = list(upscaler.frames(iter(images), at_once=at_once))
        assert len(made) == 5
        assert all(np.abs(pixels(a) - pixels(b)).max() <= 1 for a, b in zip(made, one_by_one, strict=True))
    assert list(upscaler.frames([])) == []


def test_frames_of_two_sizes(upscaler):
    images = [Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))]
    assert "must have one size" in message(lambda: list(upscaler.frames(images)))


# ---- progress


def test_progress_counts_tiles_and_cancels(upscaler):
    told = []
    picture = np.zeros((20, 20, 3), np.uint8)
    upscaler(picture, tile=10, callback=lambda progress: told.append((progress.phase, progress.done, progress.total)))
    tiles = [each for each in told if each[2] and each[0] == "upscaling"]
    assert tiles[-1] == ("upscaling", 8, 8), "four tiles through the convolutions, and four made pixels"

    def stop(progress: Progress) -> None:
        if progress.done == 2:
            progress.cancel()

    with pytest.raises(Cancelled):
        upscaler(picture, tile=10, callback=stop)
    assert len(upscaler(picture, tile=10)) == 1


@pytest.mark.parametrize("tile", [0, -3, 7])
def test_tiles_have_a_size(upscaler, tile):
    assert "tiles have sides of 8 pixels or more" in message(upscaler, np.zeros((8, 8, 3), np.uint8), tile=tile)


# ---- results


def test_results_say_that_they_were_enlarged(upscaler, tmp_path):
    pipe = load(write_image_model(tmp_path / "model"))
    result = pipe.generate("a cat", images=2, seed=3)
    large = result.upscaled(upscaler)
    assert [each.size for each in large.images] == [(4 * each.width, 4 * each.height) for each in result.images]
    large.save(tmp_path / "a.png")
    found = read_metadata(tmp_path / "a-2.png")
    assert found["seeds"] == [4] and found["upscaled"] == [upscaler.metadata]
    assert upscaler.metadata["file"] == "a.pth" and len(upscaler.metadata["sha256"]) == 64
    twice = upscaler.upscaled(found)
    assert twice["upscaled"] == [upscaler.metadata] * 2
    (one,) = pipe.stream("a cat", seed=3)
    assert np.array_equal(pixels(one.upscaled(upscaler).image), pixels(upscaler(one.image)[0]))
