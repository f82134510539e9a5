"""The measures of examples/reports/moving_shapes.py, and the script, small."""

from __future__ import annotations

import re

import mlx.core as mx
import numpy as np
import pytest
from helpers.examples import example_module
from PIL import Image


@pytest.fixture(scope="module")
def shapes():
    return example_module("reports/moving_shapes.py")


def test_what_is_drawn_is_what_is_measured(shapes):
    videos = shapes.draw_videos(shapes.PROMPTS, np.random.default_rng(0))
    assert videos.shape == (48, 8, 16, 16, 3)
    words = [prompt.split() for prompt in shapes.PROMPTS]
    assert shapes.moves(videos) == [each[-1] for each in words]
    assert shapes.colours(videos) == [each[1] for each in words]
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    assert shapes.moves(videos[:, ::-1]) == [opposite[each[-1]] for each in words]
    assert set(shapes.moves(np.repeat(videos[:, :1], 8, axis=1))) == {""}
    assert set(shapes.moves(np.full_like(videos, shapes.BACKGROUND))) == {""}


def test_latents_are_the_pixels(shapes):
    videos = shapes.draw_videos(shapes.PROMPTS[:2], np.random.default_rng(0))
    latents = shapes.to_latents(videos)
    assert latents.shape == (2, 8, 8, 8, 12)
    assert np.array_equal(latents[1, 2, 3, 1].reshape(2, 2, 3), videos[1, 2, 6:8, 2:4])
    assert np.array_equal(shapes.to_videos(latents), videos)


def test_the_script(shapes, tmp_path, capsys, monkeypatch):
    mx.disable_compile()
    monkeypatch.setattr(shapes, "PROMPTS", shapes.PROMPTS[:8])
    try:
        run(shapes, tmp_path, capsys)
    finally:
        mx.enable_compile()


def run(shapes, tmp_path, capsys):
    shapes.main([str(tmp_path), "--steps", "2", "--batch-size", "2", "--channels", "32"])
    assert re.search(r"moves as asked: \d of 8; has the colour asked for: \d of 8", capsys.readouterr().out)
    assert Image.open(tmp_path / "videos.png").size == (8 * 50 - 2, 2 * 50 - 2)
    video = tmp_path / "video.webp"
    shapes.main([str(tmp_path), "--prompt", "a red circle moves up", "--video", str(video)])
    assert Image.open(video).n_frames <= 8 and Image.open(video).size == (128, 128)
