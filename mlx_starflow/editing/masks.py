"""Masks: which part of an image is free, given as a black-and-white image or as a rectangle."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.given import ImageSource, open_image

_RECTANGLE = re.compile(r"(-?\d+),(-?\d+),(-?\d+),(-?\d+)")


def read_mask(mask: ImageSource, size: tuple[int, int]) -> Image.Image:
    """A mask for an image of `size` (width, height), mode "L": 255 where it is free, 0 where it is kept.

    Args:
        mask: "x,y,w,h", the free rectangle in pixels, from the upper left; or an image, white where it is free: a
            file, a PIL image or an array, see `media.given`.

    Raises:
        StarflowError: the file cannot be read or has another size, or nothing or everything is free.
    """
    name = str(mask) if isinstance(mask, str | Path) else "that is given"
    if isinstance(mask, str) and (match := _RECTANGLE.fullmatch(mask.replace(" ", ""))):
        x, y, width, height = map(int, match.groups())
        image = Image.new("L", size, 0)
        if width > 0 and height > 0:
            ImageDraw.Draw(image).rectangle((x, y, x + width - 1, y + height - 1), fill=255)
    else:
        image = open_image(mask).convert("L")
        if image.size != size:
            raise StarflowError(
                f"the mask {name} is {image.width}x{image.height} and the picture {size[0]}x{size[1]}; "
                "they must have the same size"
            )
        image = image.point(lambda value: 255 if value > 127 else 0)
    check_mask(np.asarray(image) > 0, name)
    return image


def check_mask(free: np.ndarray, what: str) -> None:
    """Raise StarflowError unless some of it is free and some is kept."""
    if not free.any():
        raise StarflowError(f"the mask {what} leaves nothing free: white, or the rectangle x,y,w,h, is what is painted")
    if free.all():
        raise StarflowError(f"the mask {what} keeps nothing of the picture: generate one instead")


def token_mask(free: np.ndarray, grid: Sequence[int]) -> np.ndarray:
    """Free pixels `[height, width]` -> free tokens, bool `[*grid]`: those that any free pixel touches.

    Raises:
        StarflowError: no token is left that is kept.
    """
    rows, columns = grid
    height, width = free.shape
    tokens = np.asarray(free.reshape(rows, height // rows, columns, width // columns).any(axis=(1, 3)))
    if tokens.all():
        raise StarflowError(
            f"the mask touches every token of the picture (each is {width // columns}x{height // rows} pixels), "
            "so nothing of it would be kept; make it smaller"
        )
    return tokens


def fill(image: np.ndarray, free: np.ndarray) -> np.ndarray:
    """An image `[height, width, C]` whose free pixels have the colour of the nearest pixel that is kept.

    What lies there must not reach the autoencoder, whose normalization and attention spread it over the whole image;
    neither may a hole of one colour, which spreads as well. Nearest pixels are found by jump flooding (Rong and Tan,
    2006).
    """
    height, width = free.shape
    rows, columns = (np.asarray(each) for each in np.indices(free.shape))
    far = 4 * (height + width)
    nearest = np.where(free[..., None], -far, np.stack([rows, columns], axis=-1))
    step = 1 << (max(free.shape) - 1).bit_length() >> 1
    while step:
        for down in (-step, 0, step):
            for right in (-step, 0, step):
                shifted = _shift(nearest, down, right, -far)
                closer = _distance(shifted, rows, columns) < _distance(nearest, rows, columns)
                nearest = np.where(closer[..., None], shifted, nearest)
        step //= 2
    return image[nearest[..., 0], nearest[..., 1]]


def _distance(points: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return (points[..., 0] - rows) ** 2 + (points[..., 1] - columns) ** 2


def _shift(values: np.ndarray, down: int, right: int, outside: int) -> np.ndarray:
    """`values[i - down, j - right]` at [i, j], and `outside` where there is nothing."""
    height, width = values.shape[:2]
    shifted = np.full_like(values, outside)
    if abs(down) < height and abs(right) < width:
        shifted[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = values[
            max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)
        ]
    return shifted
