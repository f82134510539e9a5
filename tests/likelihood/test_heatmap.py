"""Heat-maps."""

from __future__ import annotations

import numpy as np
from PIL import Image

from mlx_starflow.likelihood import heat_map
from mlx_starflow.likelihood.heatmap import BAR, COLOURS, colours


def test_colours_go_from_dark_to_light():
    assert colours(np.array([0.0, 1.0])).tolist() == [COLOURS[0].tolist(), COLOURS[-1].tolist()]
    assert colours(np.array([-3.0, 9.0])).tolist() == colours(np.array([0.0, 1.0])).tolist()
    light = colours(np.linspace(0, 1, 50)).astype(float) @ [0.299, 0.587, 0.114]
    assert (np.diff(light) > 0).all()


def test_the_map_lies_on_the_picture():
    picture = Image.new("RGB", (8, 4), "white")
    sheet = heat_map(picture, np.array([[0.0, 10.0]]), 0, 10, opacity=1)
    assert sheet.size == (2 * 512 + 4, 256 + BAR)
    pixels = np.asarray(sheet)
    assert (pixels[:256, :512] == 255).all()
    assert pixels[100, 516 + 100].tolist() == COLOURS[0].tolist()
    assert pixels[100, 516 + 400].tolist() == COLOURS[-1].tolist()


def test_equal_values_and_large_pictures():
    sheet = heat_map(Image.new("RGB", (300, 300)), np.ones((2, 2)), 1, 1)
    assert sheet.size == (604, 300 + BAR)
