"""What MLX's float32 products are: whole float32, or TF32, which keeps 10 bits of the mantissa of each factor.

The package turns TF32 off when it is imported (`MLX_ENABLE_TF32`): certificates and round trips would not hold with it.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx

SIDE = 256
"""Of the measured product: GPUs may compute smaller ones without the units that know TF32."""

LOST_BITS = 2.0**-12
"""TF32 rounds 1 + this to 1."""


@cache
def tf32() -> bool:
    """Whether float32 products are TF32 in this process, as a product shows: MLX has no question for it."""
    ones, factor = mx.ones((SIDE, SIDE)), mx.full((SIDE, SIDE), 1 + LOST_BITS)
    error = mx.abs((ones @ factor) / SIDE - 1 - LOST_BITS).max()
    return float(error) > LOST_BITS / 2
