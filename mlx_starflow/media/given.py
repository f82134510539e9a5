"""Images as callers have them, files, PIL images or arrays, one or many; and the one way to make models see them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_starflow.errors import StarflowError
from mlx_starflow.errors.arguments import call_type
from mlx_starflow.media.files import expanded, is_folder
from mlx_starflow.media.image_files import find_images, read_image
from mlx_starflow.media.pixels import UnreadableImage, model_picture, visible_picture

ImageSource = str | Path | Image.Image | np.ndarray | mx.array
"""An image: a file, a PIL image, or an array `[H, W]` or `[H, W, C]`, C 1 (grey), 3 or 4 (with transparency), of
integers 0 to 255, numbers 0 to 1 or truth values."""

ImageOrVideo = ImageSource | Iterable[ImageSource]
"""An image, or a video: its frames, as an array `[T, H, W, C]` for instance, or a file of one."""

Images = ImageSource | Iterable[ImageOrVideo]
"""One image or many: also a folder of them, or an array `[B, H, W, C]`."""

call_type(ImageSource, "a file, a PIL image or an array", "files, PIL images or arrays")
call_type(Images, "a file, a PIL image, an array, or a list of them", "lists of files, PIL images or arrays")


def open_image(source: ImageSource, *, transparency: bool = False) -> Image.Image:
    """An image as models see it, of whatever it is given as: RGB, upright, transparency on white or, if asked for, as
    `pixels.visible_picture` has it.

    Raises:
        StarflowError: it cannot be read, or is no image.
    """
    if isinstance(source, str | Path):
        return read_image(expanded(source), transparency=transparency)
    seen = visible_picture if transparency else model_picture
    try:
        if isinstance(source, Image.Image):
            return seen(source)
        if isinstance(source, np.ndarray | mx.array):
            return seen(_from_array(source))
    except UnreadableImage as error:
        raise StarflowError(str(error)) from None
    raise StarflowError(f"a picture is a file, a PIL image or an array, not {type(source).__name__}")


def one_or_many(images: Images, *, transparency: bool = False) -> Iterator[ImageOrVideo]:
    """Each of the images, or videos, that are given; those in folders are read (with their transparency, if asked for),
    all others are as they were."""
    if is_image(images):
        images = [cast(ImageSource, images)]
    if not isinstance(images, Iterable):
        raise StarflowError(
            f"pictures are given as files, PIL images or arrays, one or several, not {type(images).__name__}"
        )
    for each in images:
        if isinstance(each, str | Path) and is_folder(expanded(each)):
            yield from (file.open(transparency=transparency) for file in find_images([expanded(each)]))
        else:
            yield each


def is_image(source: object) -> bool:
    """Whether this is one image, or a file, and not several."""
    if isinstance(source, np.ndarray | mx.array):
        return source.ndim < 4
    return isinstance(source, str | Path | Image.Image)


def _from_array(array: np.ndarray | mx.array) -> Image.Image:
    if isinstance(array, mx.array):
        array = array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array
    pixels = np.asarray(array)
    shape = list(pixels.shape)
    if pixels.ndim == 3 and shape[2] == 1:
        pixels = pixels[:, :, 0]
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and shape[2] in (3, 4))) or 0 in shape:
        first = ": channels come last" if pixels.ndim == 3 and shape[0] in (1, 3, 4) else ""
        raise StarflowError(f"an array of a picture has shape [height, width, 1, 3 or 4], not {shape}{first}")
    kind, most = pixels.dtype.kind, 1.0 if pixels.dtype.kind in "fb" else 255.0
    if kind not in "fbiu":
        raise StarflowError(f"an array of a picture holds numbers, not {pixels.dtype}")
    if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= most):
        wanted = "of floating-point numbers is from 0 to 1" if kind == "f" else "of integers is from 0 to 255"
        raise StarflowError(f"an array {wanted}; this one has {pixels.min():g} to {pixels.max():g}")
    return Image.fromarray(np.round(pixels * (255.0 / most)).astype(np.uint8))
