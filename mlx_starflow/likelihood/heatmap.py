"""Maps of numbers, one a token, drawn over the image that they belong to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image, ImageDraw

COLOURS = np.array(
    [(12, 8, 60), (74, 20, 120), (160, 40, 110), (225, 85, 65), (250, 165, 45), (252, 245, 150)], np.float64
)
"""From low to high: lighter all the way, so that it also reads in grey."""

LEAST_SIDE = 256
"""Maps of smaller images are enlarged to at least this many pixels."""

BAR = 22


def colours(values: np.ndarray) -> np.ndarray:
    """Numbers in 0..1, clipped, -> uint8 `[..., 3]`."""
    place = np.clip(np.nan_to_num(values), 0, 1) * (len(COLOURS) - 1)
    low = np.minimum(place.astype(int), len(COLOURS) - 2)
    share = (place - low)[..., None]
    return np.round(COLOURS[low] * (1 - share) + COLOURS[low + 1] * share).astype(np.uint8)


def heat_map(
    image: Image.Image,
    values: np.ndarray,
    low: float,
    high: float,
    *,
    unit: str = "nats per token",
    opacity: float = 0.6,
) -> Image.Image:
    """An image and, beside it, the image under its map, with a scale below.

    Args:
        image: what was scored, already cut to the shape that the model saw.
        values: `[rows, columns]`, in the image's order.
        low, high: values at the ends of the colours.
        unit: what the numbers are.
        opacity: of the map, 0 to 1.
    """
    enlarge = max(1, math.ceil(LEAST_SIDE / min(image.size)))
    width, height = (side * enlarge for side in image.size)
    image = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
    grey = image.convert("L").convert("RGB")
    layer = Image.fromarray(colours((values - low) / ((high - low) or 1.0)))
    layer = layer.resize((width, height), Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (2 * width + 4, height + BAR), "white")
    sheet.paste(image, (0, 0))
    sheet.paste(Image.blend(grey, layer, opacity), (width + 4, 0))
    scale = Image.fromarray(colours(np.linspace(0, 1, width))[None].repeat(6, axis=0))
    sheet.paste(scale, (width + 4, height + 2))
    draw = ImageDraw.Draw(sheet)
    top = height + 9
    draw.text((width + 4, top), f"{low:.3g}", fill="black")
    end = f"{high:.3g} {unit}"
    draw.text((sheet.width - draw.textlength(end) - 1, top), end, fill="black")
    return sheet


def heat_map_frames(
    frames: Iterable[Image.Image], values: np.ndarray, low: float, high: float, step: int, *, unit: str
) -> Iterator[Image.Image]:
    """`heat_map` of every frame of a video.

    Args:
        frames: of the video, 1 + a multiple of `step`.
        values: `[latent frames, rows, columns]`: the first latent frame's are the first frame's, each further one's
            those of `step` frames.
        low, high, unit: as in `heat_map`.
    """
    for number, frame in enumerate(frames):
        yield heat_map(frame, values[(number + step - 1) // step], low, high, unit=unit)
