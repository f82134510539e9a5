"""Aspect-ratio buckets: the nine shapes of images that the official release trains on and names in prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mlx_starflow.errors import StarflowError

RATIOS = ("1:1", "2:3", "3:2", "16:9", "9:16", "4:5", "5:4", "21:9", "9:21")
"""Width to height, as the release writes them."""

VIDEO_RATIO = "16:9"
"""Of videos, for models that make several shapes, unless told otherwise; the release's default too."""


def ratio_value(ratio: str) -> float:
    """Width over height of a ratio such as "16:9". Raises StarflowError if it is not one."""
    width, _, height = ratio.partition(":")
    try:
        value = int(width) / int(height)
    except (ValueError, ZeroDivisionError):
        value = 0.0
    if value <= 0:
        raise StarflowError(f"{ratio!r} is not an aspect ratio: write it as width:height, such as 16:9")
    return value


def bucket_size(ratio: str, side: int, step: int = 8) -> tuple[int, int]:
    """(width, height) in pixels of a bucket with about the area of a square of `side`.

    As in the release: sqrt(side^2 * ratio) and sqrt(side^2 / ratio), each rounded to the nearest multiple of `step`
    (half to even); at least one step.
    """
    value = ratio_value(ratio)
    width, height = (max(1, round(math.sqrt(side**2 * v) / step)) * step for v in (value, 1 / value))
    return width, height


def closest_ratio(width: int, height: int, ratios: Sequence[str] = RATIOS) -> str:
    """The ratio closest to an image's, by its logarithm: as much too wide counts as much as too high."""
    return min(ratios, key=lambda ratio: abs(math.log(width / height / ratio_value(ratio))))
