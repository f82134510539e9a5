"""Networks that enlarge pictures, in tiles and whole; tests/parity compares them with PyTorch."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_starflow.models.upscalers import SPAN, RRDBNet, SRVGGNet
from mlx_starflow.models.upscalers.network import pixel_shuffle, pixel_unshuffle
from mlx_starflow.models.upscalers.tiling import Tiles, tile_count, windows

BOUND = 1e-5
"""Relative to the largest value: products of other sizes round otherwise."""

NETWORKS = {
    "rrdb": lambda: RRDBNet(8, 4, 2),
    "rrdb of squares": lambda: RRDBNet(8, 4, 1, unshuffle=2),
    "rrdb, once": lambda: RRDBNet(8, 4, 1, doublings=1),
    "rrdb, thrice": lambda: RRDBNet(8, 4, 1, doublings=3),
    "rrdb, same size": lambda: RRDBNet(8, 4, 1, doublings=0),
    "srvgg": lambda: SRVGGNet(8, 10, 4),
    "span": lambda: SPAN(6, 3, normalized=False),
}


def in_tiles(network, pictures, side):
    """As `pipelines.upscaling` does it."""
    maps = network.features(network.prepared(pictures), Tiles(side))
    _, rows, columns, _ = maps[0].shape
    k = network.scale * network.unshuffle
    out = np.zeros((len(pictures), k * rows, k * columns, 3), np.float32)
    for each in windows(rows, columns, network.pixel_side(side), network.pixel_radius):
        for window in each:
            part = window.own(network.pixels(*(window.read(x) for x in maps)), k)
            out[:, k * window.rows.start : k * window.rows.stop, k * window.columns.start : k * window.columns.stop] = (
                part
            )
    return out[:, : network.scale * pictures.shape[1], : network.scale * pictures.shape[2]]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("side", [8, 16])
def test_tiles_change_nothing(name, side):
    """Not even at the edges of tiles: they are read as far beyond them as the layers look."""
    mx.random.seed(4)
    network = NETWORKS[name]()
    pictures = mx.array(np.random.default_rng(0).random((2, 37, 21, 3), np.float32))
    whole = np.array(network(pictures))
    assert whole.shape == (2, 37 * network.scale, 21 * network.scale, 3)
    assert np.abs(in_tiles(network, pictures, side) - whole).max() < BOUND * np.abs(whole).max()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_pixel_looks_no_further_than_the_radius(name):
    """The last stage's radius is large enough, and none too large by more than one."""
    mx.random.seed(5)
    network = NETWORKS[name]()
    rng = np.random.default_rng(1)
    maps = network.features(network.prepared(mx.array(rng.random((1, 32, 32, 3), np.float32))), Tiles())
    rows, columns = maps[0].shape[1:3]
    middle = (rows // 2, columns // 2)
    changed = [np.array(x) for x in maps]
    for x in changed:
        x[0, middle[0], middle[1]] += 0.5
    k = network.scale * network.unshuffle
    difference = network.pixels(*map(mx.array, changed)) - network.pixels(*maps)
    touched = np.argwhere(np.abs(np.array(difference[0])).max(axis=-1) > 0)
    reach = max(np.abs(touched // k - middle).max(axis=0))
    assert network.pixel_radius - 1 <= reach <= network.pixel_radius


def test_every_position_has_one_tile():
    seen = np.zeros((23, 40), int)
    count = 0
    for each in windows(23, 40, 9, 3):
        for window in each:
            seen[window.rows, window.columns] += 1
            count += 1
            assert window.rows.stop - window.rows.start <= 9
    assert (seen == 1).all() and count == tile_count(23, 40, 9)


def test_squares_of_pixels_and_back():
    x = mx.random.normal((2, 6, 4, 3))
    assert mx.array_equal(pixel_shuffle(pixel_unshuffle(x, 2), 2), x)
