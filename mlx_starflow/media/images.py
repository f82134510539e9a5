"""Images on disk: grids, files that say how they were made, and writing that never leaves half a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.media.description import describing, description_of
from mlx_starflow.media.files import exists, expanded, is_regular, replacing
from mlx_starflow.media.formats import ANIMATIONS, FORMATS, UNDESCRIBED
from mlx_starflow.media.outputs import check_outputs
from mlx_starflow.media.pixels import no_remarks

LONGEST = 100
"""Seconds that a picture of an animation is shown; two of them six times so long, and GIF knows up to 655."""

LOSSY = (".jpg", ".jpeg", ".webp")
"""Suffixes of images that have a quality."""

QUALITY = 95
"""Of these, if nobody chooses."""

PICTURES = ("PNG", "JPEG", "WEBP", "GIF")
"""Formats, as Pillow calls them, that `save_image` and `save_animation` write."""


def to_images(pixels: np.ndarray, maker: str = "the autoencoder") -> list[Image.Image]:
    """`[B, H, W, 3]` in -1..1 -> PIL images; values outside are clipped.

    Raises:
        StarflowError: a value is not finite, which names `maker`.
    """
    if not np.isfinite(pixels).all():
        raise StarflowError(
            f"the picture that {maker} made is not finite: its weights may be damaged, or too coarse (--dtype float32)"
        )
    return [Image.fromarray(image) for image in np.round((np.clip(pixels, -1, 1) + 1) * 127.5).astype(np.uint8)]


def grid(images: Sequence[Image.Image], columns: int | None = None, gap: int = 2) -> Image.Image:
    """Images side by side, left to right and top to bottom, on white; nearly square unless `columns` is given."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = (max(image.size[axis] for image in images) + gap for axis in (0, 1))
    sheet = Image.new("RGB", (columns * width - gap, rows * height - gap), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    return sheet


def numbered(path: Path, count: int) -> list[Path]:
    """Files for so many images: out-1.png, out-2.png and so on; `path` itself for a single one."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, count + 1)]


def check_output(path: Path, formats: Sequence[str] = FORMATS, *, quality: int | None = None) -> None:
    """Raise StarflowError if an image could not be written to `path`: better before the work than after it.

    Or if it is of a format that has no `quality`, and one is given.
    """
    if path.suffix.lower() not in formats:
        raise StarflowError(f"{path}: pictures are written as {', '.join(formats)}; name the file for instance out.png")
    if quality is not None and path.suffix.lower() not in LOSSY:
        raise StarflowError(
            f"{path}: a quality is for {', '.join(LOSSY)}, and other formats lose nothing: leave it out"
        )
    check_outputs([path])


def save_image(
    image: Image.Image, path: Path, metadata: dict[str, Any] | None = None, *, quality: int | None = None
) -> None:
    """Write an image with its colour profile, if it has one, and, for `metadata.read_metadata`, how it was made.

    Args:
        quality: of JPEG and WebP, from 1 to 100, the best; None: `QUALITY`.

    Raises:
        StarflowError: it cannot be written.
    """
    check_output(path, quality=quality)
    options = describing(metadata, path)
    if path.suffix.lower() in LOSSY:
        options["quality"] = QUALITY if quality is None else quality
    if profile := image.info.get("icc_profile"):
        options["icc_profile"] = profile
    with replacing(path) as temporary:
        image.save(temporary, **options)


def save_images(images: Sequence[Image.Image], path: str | Path, metadata: Sequence[dict[str, Any]] = ()) -> list[Path]:
    """Write one image to a file, or several to files with numbers (x-1.png, x-2.png, ... for x.png); `metadata` is each
    one's, as in `save_image`.

    Returns:
        The files.

    Raises:
        StarflowError: a file cannot be written; then none is.
    """
    paths = numbered(expanded(path), len(images))
    for each in paths:
        check_output(each)
    for image, each, about in zip(images, paths, metadata or [{}] * len(images), strict=True):
        save_image(image, each, about or None)
    return paths


def save_animation(
    images: Sequence[Image.Image], path: Path, seconds: float = 0.1, metadata: dict[str, Any] | None = None
) -> None:
    """Write images of one size as an endless animation, `.gif` or `.webp`, each shown for so many seconds.

    The first and the last one are shown longer. `metadata` as in `save_image`. Raises StarflowError.
    """
    check_output(path, ANIMATIONS)
    if not 0.001 <= seconds <= LONGEST:
        raise StarflowError(
            f"{path}: pictures of an animation are shown for 0.001 to {LONGEST} seconds, not {seconds:g}"
        )
    durations = [round(1000 * seconds)] * len(images)
    durations[0] = durations[-1] = round(6000 * seconds)
    options: dict[str, Any] = {"lossless": True} if path.suffix.lower() == ".webp" else {"disposal": 2}
    options |= describing(metadata, path)
    with replacing(path) as temporary:
        images[0].save(temporary, save_all=True, append_images=list(images[1:]), duration=durations, loop=0, **options)


def read_image_metadata(path: Path) -> dict[str, Any]:
    """How an image, or an animation, of this package was made. Raises StarflowError if it does not say."""
    if exists(path) and not is_regular(path):
        raise StarflowError(f"{path} cannot be read as a picture: it is not a regular file")
    try:
        with no_remarks(), Image.open(path, formats=PICTURES) as image:
            try:
                metadata = description_of(image)
            except ValueError:
                raise StarflowError(f"{path}: its description is damaged") from None
    except StarflowError:
        raise
    except Exception as error:  # decoders of damaged files raise whatever they like
        raise StarflowError(f"{path} cannot be read as a picture: {one_line(error)}") from None
    if metadata is None:
        raise StarflowError(UNDESCRIBED.format(path))
    return metadata
