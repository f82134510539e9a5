"""Frames in tiles of rows, and what a network remembers from one piece of a video to the next.

A tile is a pair: frames `[B, T, n, W, C]` of some rows, and whether they are the frame's last ones. Tiles go through
the layers of `autoencoder_wan.layers` one after the other, from the top, as an iterator; each layer is a generator that
pulls them from the one before it. A convolution keeps the last rows of a tile until the next one comes: it is a row
late, and its tiles are shifted by one. So nothing is computed twice, and at no time is there a whole feature map. The
last frames of its input are in a `StreamState`, where the next frames of the video find them. All of this gives what a
single tile of all frames would, but for rounding.

A generator that waits at its `yield` must not hold the tile that it has given away, hence the lists of one tile that
are emptied there. (The image autoencoder has lists of tiles instead: its group norms need all of a picture's tiles
before they give the first, and it has no frames to remember.)
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn

Tile = tuple[mx.array, bool]
Tiles = Iterator[Tile]


class StreamState:
    """What a network knows of the frames before: the last ones of each temporal convolution's input, tile by tile.

    Attributes:
        first: whether the frames under way are a video's first ones; they are a single latent frame.
        rows: of a tile, at every resolution.
        forgets: nothing is kept, since nothing comes after what is under way.
    """

    def __init__(self, rows: int, forgets: bool = False):
        self.first = True
        self.rows, self.forgets = rows, forgets
        self._tails: dict[tuple[int, int], mx.array] = {}

    def continued(self, layer: nn.Module, index: int, x: mx.array, frames: int) -> mx.array:
        """`x` with the `frames` frames that came before it in the tile `index` of this layer.

        Before the first frame that the layer gets there are zeros. If it is a video's first one, it comes back alone.
        """
        tail = self._tails.pop((id(layer), index), None)
        alone = tail is None and self.first
        if tail is None:
            B, _, *rest = x.shape
            tail = mx.zeros((B, frames, *rest), x.dtype)
        joint = mx.concatenate([tail, x], axis=1)
        self.remember(layer, index, joint[:, -frames:])
        return x if alone else joint

    def remember(self, layer: nn.Module, index: int, tail: mx.array) -> None:
        if self.forgets:
            return
        tail = kept(tail)
        mx.eval(tail)
        self._tails[id(layer), index] = tail

    @property
    def nbytes(self) -> int:
        return sum(tail.nbytes for tail in self._tails.values())


def kept(x: mx.array) -> mx.array:
    """A copy that does not hold on to the array it was sliced from."""
    return mx.concatenate([x[:, :, :, :1], x[:, :, :, 1:]], axis=3)


def whole(x: mx.array) -> Tiles:
    """Whole frames as a single tile."""
    yield x, True


def resplit(tiles: Tiles, rows: int) -> Tiles:
    """The same rows in tiles of at most `rows`."""
    for x, last in tiles:
        count = x.shape[2]
        pieces = [(x[:, :, a : a + rows], last and a + rows >= count) for a in range(0, count, rows)]
        del x
        while pieces:
            yield pieces.pop(0)


def joined(tiles: Tiles) -> mx.array:
    """All rows in one array."""
    parts = [x for x, _ in tiles]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)


class RowQueue:
    """Rows on their way past layers that are a few rows late."""

    def __init__(self) -> None:
        self._rows: mx.array | None = None

    def watch(self, tiles: Tiles) -> Tiles:
        """The tiles as they are; their rows are queued."""
        for x, last in tiles:
            self._rows = x if self._rows is None else mx.concatenate([self._rows, x], axis=2)
            tile = [(x, last)]
            del x
            yield tile.pop()

    def take(self, count: int) -> mx.array:
        """The next `count` rows."""
        assert self._rows is not None, "more rows are taken than came"
        rows, self._rows = self._rows[:, :, :count], self._rows[:, :, count:]
        if not self._rows.shape[2]:
            self._rows = None
        else:
            self._rows = kept(self._rows)
            mx.eval(self._rows)
        return rows
