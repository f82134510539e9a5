"""Feature maps in tiles, so that layers need memory for a tile and give what they would for the whole.

Some layers in a row read, for each position, what is at most `radius` positions away. So a tile is read with as many
positions more on each side, as far as the maps go, and of the result the tile alone is kept: at the maps' edges the
layers pad with zeros, as they do without tiles, and elsewhere what their padding spoils is cut off. A network that
goes so from map to map, a few layers at a time, overlaps by those layers' radius and not by its own, which for an
RRDBNet of 23 blocks is 350 positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx


class Window(NamedTuple):
    """A tile: its rows and columns, and those that are read for it."""

    rows: slice
    columns: slice
    read_rows: slice
    read_columns: slice

    def read(self, x: mx.array) -> mx.array:
        """The part of a map `[B, H, W, C]` that is read."""
        return x[:, self.read_rows, self.read_columns]

    def own(self, y: mx.array, scale: int = 1) -> mx.array:
        """The tile's own part of what was made of it, `scale` times as large."""
        top = scale * (self.rows.start - self.read_rows.start)
        left = scale * (self.columns.start - self.read_columns.start)
        height = scale * (self.rows.stop - self.rows.start)
        width = scale * (self.columns.stop - self.columns.start)
        return y[:, top : top + height, left : left + width]


def windows(height: int, width: int, side: int, radius: int) -> Iterator[list[Window]]:
    """The tiles of a map, row by row, of nearly equal sides of at most `side`."""
    for rows, read_rows in _parts(height, side, radius):
        yield [Window(rows, columns, read_rows, read) for columns, read in _parts(width, side, radius)]


def tile_count(height: int, width: int, side: int) -> int:
    """How many tiles a map of this size has."""
    return math.ceil(height / side) * math.ceil(width / side)


def _parts(length: int, side: int, radius: int) -> Iterator[tuple[slice, slice]]:
    count = math.ceil(length / side)
    ends = [length * number // count for number in range(count + 1)]
    for start, stop in pairwise(ends):
        yield slice(start, stop), slice(max(0, start - radius), min(length, stop + radius))


class Tiles:
    """Runs layers over feature maps tile by tile.

    Args:
        side: of the tiles, at most; None: the maps are read whole, and nothing is evaluated.
        step: is called when a tile has been evaluated.
    """

    def __init__(self, side: int | None = None, step: Callable[[], object] = lambda: None):
        self.side, self._step = side, step

    def __call__(self, layers: Callable[..., mx.array], *maps: mx.array, radius: int) -> mx.array:
        """What `layers` makes of maps of one size, `[B, H, W, C]`: a map of that size.

        Each position of it depends on those of the maps that are at most `radius` away.
        """
        if self.side is None:
            return layers(*maps)
        _, height, width, _ = maps[0].shape
        rows = []
        for each in windows(height, width, self.side, radius):
            parts = []
            for window in each:
                part = mx.contiguous(window.own(layers(*(window.read(x) for x in maps))))
                mx.eval(part)
                parts.append(part)
                self._step()
            rows.append(parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2))
            mx.eval(rows[-1])
        whole = rows[0] if len(rows) == 1 else mx.concatenate(rows, axis=1)
        mx.eval(whole)
        return whole


WHOLE = Tiles()
"""No tiles."""
