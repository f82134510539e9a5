"""How frames of a video are shown: the shape of their pixels, which side is up, and in which order files come."""

from __future__ import annotations

import re
import struct
from fractions import Fraction
from pathlib import Path

from PIL import Image
from PIL.Image import Transpose

MOST_STRETCHED = 16
"""How much wider than high, or higher than wide, pixels of a video are taken to be at most."""

_UPRIGHT = {
    (False, False): None,
    (True, False): Transpose.FLIP_LEFT_RIGHT,
    (False, True): Transpose.FLIP_TOP_BOTTOM,
    (True, True): Transpose.ROTATE_180,
}
_LYING = {
    (False, False): Transpose.TRANSPOSE,
    (True, False): Transpose.ROTATE_90,
    (False, True): Transpose.ROTATE_270,
    (True, True): Transpose.TRANSVERSE,
}


def as_shown(image: Image.Image, aspect: Fraction | None, matrix: bytes | None) -> Image.Image:
    """A frame as players show it: with square pixels, turned and mirrored.

    Args:
        image: the frame as it is coded.
        aspect: width of a pixel by its height, if the file says it.
        matrix: the display matrix, if there is one, see `_turn`.
    """
    image = square_pixels(image, aspect)
    turn = None if matrix is None else _turn(matrix)
    return image if turn is None else image.transpose(turn)


def square_pixels(image: Image.Image, aspect: Fraction | None) -> Image.Image:
    """A frame whose pixels are `aspect` times as wide as high, resized to be seen as it is meant, at its height."""
    # Files may hold nonsense here, which players do not heed.
    if not aspect or not 1 / MOST_STRETCHED <= aspect <= MOST_STRETCHED or aspect == 1:
        return image
    return image.resize((max(round(image.width * aspect), 1), image.height), Image.Resampling.LANCZOS)


def _turn(matrix: bytes) -> Transpose | None:
    """How a frame is to be turned or mirrored: the nearest of the eight ways there are to a display matrix.

    The matrix, 9 numbers of 32 bits, leads from a point of the frame, to the right and down, to where it is shown:
    x' = a x + c y and y' = b x + d y.
    """
    a, b, _, c, d = struct.unpack("=5i", matrix[:20])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return _UPRIGHT[a < 0, d < 0]
    return _LYING[b < 0, c < 0]


def natural_order(path: Path) -> tuple[list[str | int], str]:
    """For sorting by name, with numbers in names by their value: 1, 2, 10."""
    parts = re.split(r"(\d+)", path.name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], path.name
