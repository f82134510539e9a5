"""Images as callers have them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import message
from helpers.images import smooth_images, write_images
from PIL import Image

from mlx_starflow.media.given import is_image, one_or_many, open_image


@pytest.fixture
def image():
    return smooth_images(1, (6, 4))[0]


def test_every_form_is_the_same_image(image, tmp_path, monkeypatch):
    image.save(tmp_path / "x.png")
    pixels = np.asarray(image)
    monkeypatch.setenv("HOME", str(tmp_path))
    forms = [
        tmp_path / "x.png", str(tmp_path / "x.png"), "~/x.png", image, pixels, pixels / 255,
        (pixels / 255).astype(np.float32), pixels.astype(np.int64), mx.array(pixels), mx.array(pixels) / 255,
        np.concatenate([pixels, np.full((4, 6, 1), 255, np.uint8)], axis=2),
    ]  # fmt: skip
    assert all(open_image(form) == image for form in forms)
    assert all(map(is_image, forms))


def test_grey_and_masks(image):
    grey = np.asarray(image.convert("L"))
    expected = image.convert("L").convert("RGB")
    assert open_image(grey) == open_image(grey[..., None]) == open_image(grey / 255.0) == expected
    assert np.array_equal(np.asarray(open_image(grey > 100))[..., 0], 255 * (grey > 100))
    assert open_image(mx.array(grey / 255.0).astype(mx.bfloat16)).size == (6, 4)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (np.zeros((3, 8, 8)), "not [3, 8, 8]: channels come last"),
        (np.zeros(4), "not [4]"),
        (np.zeros((0, 4, 3)), "not [0, 4, 3]"),
        (np.full((2, 2, 3), -1.0), "of floating-point numbers is from 0 to 1; this one has -1 to -1"),
        (np.full((2, 2, 3), 255.0), "this one has 255 to 255"),
        (np.full((2, 2, 3), np.nan), "from 0 to 1"),
        (np.full((2, 2, 3), 256), "of integers is from 0 to 255; this one has 256 to 256"),
        (np.full((2, 2, 3), "x"), "holds numbers"),
        ("none.png", "cannot read the picture none.png"),
        (3, "a picture is a file, a PIL image or an array, not int"),
        (Image.fromarray(np.zeros((2, 2), np.float32)), "floating-point"),
    ],
)
def test_what_is_no_image(source, reason):
    assert reason in message(open_image, source)


def test_one_or_many(image, tmp_path):
    files = write_images(tmp_path / "folder", 3)
    pixels = np.asarray(image)
    assert list(one_or_many(image)) == [image]
    assert list(one_or_many("x.png")) == ["x.png"]
    assert list(one_or_many(iter([image, "x.png"]))) == [image, "x.png"]
    assert len(list(one_or_many(pixels))) == 1 and len(list(one_or_many(np.stack([pixels] * 3)))) == 3
    assert [np.asarray(each).tolist() for each in one_or_many(tmp_path / "folder")] == [
        np.asarray(open_image(file)).tolist() for file in files
    ]
    assert len(list(one_or_many([tmp_path / "folder", image]))) == 4
    assert "one or several, not int" in message(lambda: list(one_or_many(3)))
    assert not is_image([image]) and not is_image(np.stack([pixels] * 3))


def test_models_take_them_all(latent_flow, tmp_path):
    image = smooth_images(1)[0]
    (file,) = write_images(tmp_path, [image])
    expected = latent_flow.score([image])[0].nll
    for form in (image, file, str(file), [file], np.asarray(image), np.asarray(image)[None], tmp_path):
        (score,) = latent_flow.score(form)
        assert score.nll == expected
    encoded, _ = latent_flow.encode(file, check=False)
    assert np.array_equal(encoded.noise, latent_flow.encode([image], check=False)[0].noise)
    mask = np.zeros((8, 8), bool)
    mask[:, 4:] = True
    made = [
        latent_flow.inpaint(form, free, steps=1, rounds=1).images[0]
        for form, free in ((image, Image.fromarray(mask)), (file, mask), (np.asarray(image), "4,0,4,8"))
    ]
    assert made[0] == made[1] == made[2]
    assert latent_flow.interpolate(file, np.asarray(image), shares=0.5).images[0].size == (8, 8)
    assert latent_flow.vary(file, strength=0.0).images == latent_flow.vary(image, strengths=[0.0]).images
    assert "does not exist" in message(latent_flow.vary, "none") or "cannot read" in message(latent_flow.vary, "none")
    assert "cannot read" in message(latent_flow.vary, tmp_path)
