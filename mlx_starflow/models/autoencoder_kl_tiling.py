"""The layers of the image autoencoder's decoder with bounded memory: each works on tiles of rows, one after the other.

A feature map is a list of tiles `[B, n, W, C]`. A convolution reads one row of the tiles above and below; moments
of a norm are those of the whole picture, gathered tile by tile; queries attend to all of the picture, a few at a
time. So the result is the whole decoder's but for rounding. Each tile is evaluated before the next one, and an input
tile is let go of as soon as nothing needs it any more: what is held is little more than a residual block's input and
the picture between its convolutions. (The video autoencoder's tiles go through all layers as one stream; here a group
norm needs all tiles of a picture before it gives the first.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import mlx.core as mx

from mlx_starflow.models.autoencoder_layers import Attention, Conv3x3, GroupNorm, ResnetBlock, Upsample

Tiles = list[mx.array]

LOGITS = 2**22
"""About how many attention logits are held at once."""


def split(x: mx.array, rows: int) -> Tiles:
    """Tiles of `rows` rows, the last of what is left."""
    return [x[:, start : start + rows] for start in range(0, x.shape[1], rows)]


def _with_neighbours(tiles: Tiles, free: bool) -> Iterator[tuple[mx.array, int, int]]:
    """Each tile with a row of the tile above and one of that below, where there are any; how many rows stand above
    it; and how many are its own. With `free`, the list lets go of its tiles."""
    above: Tiles = []
    for index, tile in enumerate(tiles):
        below = [tiles[index + 1][:, :1]] if index + 1 < len(tiles) else []
        joined = mx.concatenate([*above, tile, *below], axis=1)
        mx.eval(joined)
        count, over = tile.shape[1], len(above)
        above = [_kept(tile[:, -1:])]
        if free:
            tiles[index] = above[0]
        del tile
        yield joined, over, count


def _kept(x: mx.array) -> mx.array:
    """A copy that does not hold on to the array it was sliced from."""
    x = mx.concatenate([x[:, :, :1], x[:, :, 1:]], axis=2)
    mx.eval(x)
    return x


def convolve(conv: Conv3x3, tiles: Tiles, norm: GroupNorm | None = None, free: bool = True) -> Iterator[mx.array]:
    """The convolution, of the normalized tiles if there is a norm, tile by tile."""
    moments = norm.moments(tiles) if norm else None
    for x, over, count in _with_neighbours(tiles, free):
        if norm and moments:
            x = norm.normalize(x, *moments, silu=True)
        # The convolution pads with zeros: right at the picture's edges, and elsewhere in rows that are dropped.
        y = mx.contiguous(conv(x)[:, over : over + count])
        del x
        mx.eval(y)
        yield y


def resnet(layer: ResnetBlock, tiles: Tiles) -> Tiles:
    """What the block gives; the list of its input is used for that."""
    hidden = list(convolve(layer.conv1, tiles, layer.norm1, free=False))
    shortcut = layer.get("conv_shortcut")
    for index, y in enumerate(convolve(layer.conv2, hidden, layer.norm2)):
        x = tiles[index]
        tiles[index] = (shortcut(x) if shortcut else x) + y
        mx.eval(tiles[index])
        del x, y
    return tiles


def attend(layer: Attention, tiles: Tiles) -> Tiles:
    """What the attention gives; the list of its input is used for that."""
    moments = layer.group_norm.moments(tiles)
    keys, values = [], []
    for tile in tiles:
        h = layer.group_norm.normalize(tile, *moments).flatten(1, 2)
        keys.append(layer.to_k(h))
        values.append(layer.to_v(h))
        mx.eval(keys[-1], values[-1])
    k, v = (mx.concatenate(parts, axis=1)[:, None] for parts in (keys, values))
    mx.eval(k, v)
    del keys, values, h
    count = max(1, LOGITS // k.shape[2])
    for index, tile in enumerate(tiles):
        q = layer.to_q(layer.group_norm.normalize(tile, *moments).flatten(1, 2))[:, None]
        scale = 1 / math.sqrt(q.shape[-1])
        parts = []
        for start in range(0, q.shape[2], count):
            part = q[:, :, start : start + count]
            parts.append(mx.fast.scaled_dot_product_attention(part, k, v, scale=scale, mask=None))
            mx.eval(parts[-1])
        tiles[index] = tile + layer.to_out[0](mx.concatenate(parts, axis=2)).reshape(tile.shape)
        mx.eval(tiles[index])
    return tiles


def upsample(layer: Upsample, tiles: Tiles, rows: int) -> Tiles:
    """Twice as many rows and columns, in tiles of `rows` rows again; the list of its input is emptied."""
    doubled = []
    # Half a tile makes a whole one.
    halves = [half for tile in tiles for half in split(tile, max(1, rows // 2))]
    tiles.clear()
    for x, over, count in _with_neighbours(halves, free=True):
        y = mx.contiguous(layer(x)[:, 2 * over : 2 * (over + count)])
        del x
        mx.eval(y)
        doubled.append(y)
    return doubled
