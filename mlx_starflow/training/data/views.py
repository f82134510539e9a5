"""Random views of images."""

from __future__ import annotations

import numpy as np
from PIL import Image


def augmented_crops(
    images: np.ndarray, size: int, rng: np.random.Generator, *, zoom: float, shift: int, flip: bool = True
) -> np.ndarray:
    """Random views, uint8 `[N, size, size, 3]`, of images `[N, S, S, 3]`: flipped, shrunk and moved, on white.

    Args:
        zoom: the largest share by which a view is shrunk.
        shift: how far a view may be moved beyond its border, in pixels of the result.
        flip: half of the views, at random, are mirrored.
    """
    views = np.full((len(images), size, size, 3), 255, np.uint8)
    for view, image in zip(views, images, strict=True):
        side = round(size * (1 - zoom * rng.random()))
        small = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS))
        if flip and rng.random() < 0.5:
            small = small[:, ::-1]
        spare = size - side
        top, left = (int(rng.integers(-shift, spare + shift + 1)) for _ in range(2))
        y0, x0 = max(top, 0), max(left, 0)
        y1, x1 = min(top + side, size), min(left + side, size)
        view[y0:y1, x0:x1] = small[y0 - top : y1 - top, x0 - left : x1 - left]
    return views
