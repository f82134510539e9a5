"""Masks, and what stands under them meanwhile."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.commands import message
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mlx_starflow.editing import read_mask
from mlx_starflow.editing.masks import fill, kept_share, soft_mask


def free(mask: Image.Image) -> np.ndarray:
    return np.asarray(mask) > 0


def test_rectangles():
    mask = free(read_mask("2,1,3,2", (8, 6)))
    expected = np.zeros((6, 8), bool)
    expected[1:3, 2:5] = True
    assert np.array_equal(mask, expected)
    assert free(read_mask(" 6, 4, 100, 100 ", (8, 6))).sum() == 4
    assert free(read_mask("-2,0,4,6", (8, 6))).sum() == 12


def test_pictures(tmp_path):
    path = tmp_path / "mask.png"
    picture = np.zeros((6, 8, 3), np.uint8)
    picture[2:4, :3] = 200
    picture[0, 0] = 100
    Image.fromarray(picture).save(path)
    mask = read_mask(path, (8, 6))
    assert mask.mode == "L" and set(np.unique(mask)) == {0, 255}
    assert np.array_equal(free(mask), picture[..., 0] == 200)


def test_mistakes(tmp_path):
    path = tmp_path / "mask.png"
    Image.new("L", (4, 4), 255).save(path)
    assert "is 4x4 and the picture 8x6" in message(read_mask, path, (8, 6))
    assert "keeps nothing" in message(read_mask, path, (4, 4))
    assert "leaves nothing free" in message(read_mask, "0,0,0,5", (8, 6))
    assert "leaves nothing free" in message(read_mask, "9,9,2,2", (8, 6))
    assert "cannot read the picture" in message(read_mask, tmp_path / "none.png", (8, 6))
    assert "cannot read the picture" in message(read_mask, "1,2,3", (8, 6))


def test_a_cell_is_free_if_any_pixel_of_it_is():
    pixels = np.zeros((8, 8), bool)
    pixels[3, 4] = True
    kept = kept_share(pixels, pixels.astype(float), (4, 2))
    assert (kept == 0).sum() == 1 and kept[1, 1] == 0 and kept.max() == 1
    pixels[:, ::3] = True
    assert "touches every latent" in message(kept_share, pixels, pixels.astype(float), (4, 2))


def test_a_soft_mask_falls_off_beside_what_is_free():
    pixels = np.zeros((8, 12), bool)
    pixels[:, 6:] = True
    soft = soft_mask(pixels, 3)
    # 3 t^2 - 2 t^3 of t = 3/4, 2/4 and 1/4.
    expected = [0, 0, 0, 0.15625, 0.5, 0.84375, 1, 1, 1, 1, 1, 1]
    np.testing.assert_allclose(soft, np.tile(expected, (8, 1)), atol=1e-6)
    assert np.array_equal(soft_mask(pixels, 0), pixels)
    np.testing.assert_allclose(kept_share(pixels, soft, (4, 6))[0], [1, 0.921875, 0.328125, 0, 0, 0], atol=1e-6)
    corner = np.zeros((8, 8), bool)
    corner[7, 7] = True
    away = np.hypot(7.0 - np.arange(8)[:, None], 7.0 - np.arange(8))
    assert (soft_mask(corner, 3) > 0).sum() == (away < 4).sum()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 999), st.floats(0, 0.98))
def test_free_pixels_take_the_nearest_colour(height, width, seed, share):
    rng = np.random.default_rng(seed)
    picture, hidden = rng.random((height, width, 3)), rng.random((height, width)) < share
    hidden[rng.integers(height), rng.integers(width)] = False
    filled = fill(picture, hidden)
    assert np.array_equal(filled[~hidden], picture[~hidden])
    known = np.argwhere(~hidden)
    for row, column in np.argwhere(hidden):
        (source,) = np.argwhere((picture == filled[row, column]).all(axis=-1) & ~hidden)
        best = np.hypot(*(known - [row, column]).T).min()
        # Jump flooding is a pixel off now and then.
        assert np.hypot(*(source - [row, column])) <= best + 1


@pytest.mark.parametrize("half", [np.s_[:, 4:], np.s_[:3], np.s_[2:6, 2:6]])
def test_edges_are_continued(half):
    picture = np.arange(64.0).reshape(8, 8, 1)
    hidden = np.zeros((8, 8), bool)
    hidden[half] = True
    filled = fill(picture, hidden)
    assert np.isfinite(filled).all() and filled.shape == picture.shape
    if half == np.s_[:, 4:]:
        assert np.array_equal(filled[:, 4:, 0], np.repeat(picture[:, 3:4, 0], 4, axis=1))
