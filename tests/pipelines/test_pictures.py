"""One way to make a model's picture of an image, and prompts that are given as one text."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import Command, message
from helpers.images import smooth_images
from PIL import Image

from mlx_starflow.media.pixels import decode_image, model_picture


@pytest.fixture
def odd_files(tmp_path):
    """A picture with transparency, and one that lies on its side."""
    picture = smooth_images(1, (12, 10))[0]
    clear = picture.convert("RGBA")
    clear.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 12).astype(np.uint8), (10, 1))))
    clear.save(tmp_path / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    return [tmp_path / "clear.png", tmp_path / "turned.png"]


def test_the_file_and_its_image_are_one_picture(odd_files):
    for path in odd_files:
        once = model_picture(Image.open(path))
        assert once == decode_image(path.read_bytes())
        assert model_picture(once) == once
        assert once != Image.open(path).convert("RGB")


def test_score_of_images_is_that_of_the_command(latent_flow, odd_files):
    printed = Command("score")(*odd_files, "-m", latent_flow.directory, "--json", "-").stdout
    scores = latent_flow.score([Image.open(path) for path in odd_files])
    for row, score in zip(json.loads(printed)["pictures"], scores, strict=True):
        assert row["nll"] == pytest.approx(score.nll, abs=1e-6)


def test_edits_of_images(latent_flow, odd_files):
    turned, file = Image.open(odd_files[1]), decode_image(odd_files[1].read_bytes())
    made = [latent_flow.vary(each, strengths=[0.0]).images[0] for each in (turned, file)]
    assert made[0] == made[1]
    mask = Image.new("L", file.size, 0)
    mask.paste(255, (0, 0, 5, 12))
    made = [latent_flow.inpaint(each, mask, steps=1, rounds=1).images[0] for each in (turned, file)]
    assert made[0] == made[1]


def test_floating_point_images_are_refused(latent_flow):
    image = Image.fromarray(np.zeros((8, 8), np.float32))
    assert "floating-point" in message(latent_flow.score, [image])


def test_one_prompt_is_not_its_letters(latent_flow, pixel_flow):
    one, several = latent_flow.encode_prompts("cat"), latent_flow.encode_prompts(["cat"])
    assert one.shape[0] == 1 and mx.array_equal(one, several)
    assert len(latent_flow.conditions("cat")) == len(pixel_flow.conditions("1")) == 1
    images = smooth_images(1)
    assert latent_flow.classify(images, "cat", draws=1).labels == ["cat"]
    assert latent_flow.prompt_fit(images, "cat", draws=1).shape == (1, 1, 1)
    assert pixel_flow.classify(images, [0, 2], draws=1).labels == ["0", "2"]
