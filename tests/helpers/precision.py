"""Bounds that hang on what networks compute in where a test does not say: `--dtype`, see conftest.py."""

from __future__ import annotations

import mlx.core as mx

from mlx_starflow.model_dir.weights import automatic_dtype

ROUNDING = 2.0**-11
"""What float16 rounds numbers around 1 by, at most."""


def bound(whole: float, half: float) -> float:
    """The bound in float32, or that in half precision."""
    return whole if automatic_dtype() == mx.float32 else half


def roundings(count: float) -> float:
    """So many of float16's roundings, of numbers around 1.

    Two ways to compute the same add up in another order, so that each product is rounded to one or the other neighbour:
    one rounding apart. Tokens of the tiny flows are made of some ten products in a row, two flow blocks deep, and are
    up to 3 in size: they differ by a few roundings, and by at most 10 where a test does not say more.
    """
    return count * ROUNDING
