"""Rotary positions (arXiv 2104.09864): axial for tokens on a grid, one-dimensional for language-model blocks.

The rope frequencies of a position are a row of unit complex numbers, one for each rotary pair of dimensions; `rotate`
multiplies by them.
"""

from __future__ import annotations

import math
from functools import lru_cache

import mlx.core as mx
import numpy as np

from mlx_starflow.kernels.plain import rotate

__all__ = ["axial_frequencies", "line_frequencies", "rotate"]

THIRD_AXIS_PAIRS = 8
"""Rotary pairs that text and time positions take from rows and columns."""

BASE = 10000.0


@lru_cache(maxsize=16)
def axial_frequencies(
    head_dim: int, height: int, width: int, side: int, text_length: int = 0, third_axis: bool = True, frames: int = 1
) -> mx.array:
    """Rope frequencies of `text_length` text positions and then of `frames` grids, `height` x `width`, in raster order.

    Rows and columns are scaled by `side` / sqrt(height * width), so that every shape covers the grid that the model
    was trained on; text positions spread over `side` on the third axis, with row and column 0; frames count 0, 1, 2
    there. Returns complex64 `[text_length + frames * height * width, head_dim / 2]`.
    """
    pairs = head_dim // 2
    third = THIRD_AXIS_PAIRS if third_axis else 0
    axis = (pairs - third) // 2
    rates = BASE ** (-2.0 * np.arange(axis) / (pairs - third))
    scale = side / math.sqrt(height * width)
    angles = np.zeros((text_length + frames * height * width, pairs))
    grid = angles[text_length:].reshape(frames, height, width, pairs)
    grid[..., :axis] = (np.arange(height) * scale)[:, None, None] * rates
    grid[..., axis : 2 * axis] = (np.arange(width) * scale)[:, None] * rates
    if third:
        third_rates = BASE ** (-np.arange(third) / third)
        text = np.arange(text_length) / max(text_length, 1) * side
        angles[:text_length, 2 * axis :] = text[:, None] * third_rates
        grid[..., 2 * axis :] = (np.arange(frames)[:, None] * third_rates)[:, None, None]
    return mx.array(np.exp(1j * angles).astype(np.complex64))


@lru_cache(maxsize=16)
def line_frequencies(head_dim: int, length: int) -> mx.array:
    """Rope frequencies of positions 0 to `length` - 1, complex64 `[length, head_dim / 2]`."""
    angles = np.arange(length)[:, None] * BASE ** (-np.arange(0, head_dim, 2) / head_dim)
    return mx.array(np.exp(1j * angles).astype(np.complex64))
