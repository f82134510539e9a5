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


def soft_mask(free: np.ndarray, feather: int) -> np.ndarray:
    """Free pixels `[height, width]` -> how much of each is painted, float32: all of the free ones, and of those beside
    them less and less, down to nothing from `feather` pixels away on."""
    rows, columns = (np.asarray(each) for each in np.indices(free.shape))
    away = np.sqrt(_distance(_nearest(free), rows, columns))
    share = np.clip(1 - away / (feather + 1), 0, 1)
    return (share * share * (3 - 2 * share)).astype(np.float32)


def kept_share(free: np.ndarray, painted: np.ndarray, grid: Sequence[int]) -> np.ndarray:
    """How far each cell of the data, latents or pixels, is held, float32 `[*grid]`: 0 is free, 1 stays as it is.

    Args:
        free: pixels `[height, width]`; a cell is free that any free pixel touches.
        painted: of `soft_mask`, what the others leave.
        grid: rows and columns of the data.

    Raises:
        StarflowError: no cell is left that is not free.
    """
    rows, columns = grid
    height, width = free.shape
    cells = (rows, height // rows, columns, width // columns)
    touched = free.reshape(cells).any(axis=(1, 3))
    if touched.all():
        raise StarflowError(
            f"the mask touches every latent of the picture (each is {width // columns}x{height // rows} pixels), "
            "so nothing of it would be kept; make it smaller"
        )
    return np.where(touched, 0, 1 - painted.reshape(cells).mean(axis=(1, 3))).astype(np.float32)


def fill(image: np.ndarray, free: np.ndarray) -> np.ndarray:
    """An image `[height, width, C]` whose free pixels have the colour of the nearest pixel that is kept.

    What lies there must not reach the autoencoder, whose normalization and attention spread it over the whole image;
    neither may a hole of one colour, which spreads as well.
    """
    nearest = _nearest(~free)
    return image[nearest[..., 0], nearest[..., 1]]


def _nearest(marked: np.ndarray) -> np.ndarray:
    """The nearest marked pixel of each pixel, `[height, width, 2]`, by jump flooding (Rong and Tan, 2006)."""
    height, width = marked.shape
    rows, columns = (np.asarray(each) for each in np.indices(marked.shape))
    far = 4 * (height + width)
    nearest = np.where(marked[..., None], np.stack([rows, columns], axis=-1), -far)
    step = 1 << (max(marked.shape) - 1).bit_length() >> 1
    while step:
        for down in (-step, 0, step):
            for right in (-step, 0, step):
                shifted = _shift(nearest, down, right, -far)
                closer = _distance(shifted, rows, columns) < _distance(nearest, rows, columns)
                nearest = np.where(closer[..., None], shifted, nearest)
        step //= 2
    return nearest


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
