"""Plain-MLX operations that the models share with the kernels' plain versions."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import mlx.core as mx

EPSILON = 1e-6
"""Added to the mean square by RMS norms."""


def rms_norm(x: mx.array, weight: mx.array | None = None, eps: float = EPSILON) -> mx.array:
    """RMS norm over the last axis; `weight` is stored as an offset from 1."""
    return mx.fast.rms_norm(x, None if weight is None else 1 + weight, eps)


def rotate(x: mx.array, rope_frequencies: mx.array, half_split: bool = False) -> mx.array:
    """Rotate the rotary pairs of queries or keys `[B, heads, N, D]` by rope frequencies, complex64 `[N, D / 2]`.

    Pairs are dimensions (2i, 2i + 1) or, if `half_split`, (i, i + D / 2).
    """
    y = x.astype(mx.float32)
    if half_split:
        a, b = mx.split(y, 2, axis=-1)
        cos, sin = mx.real(rope_frequencies), mx.imag(rope_frequencies)
        return mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return _rotate_pairs(y, rope_frequencies).astype(x.dtype)


@mx.custom_function
def _pair_rotation(x: mx.array, rope_frequencies: mx.array) -> mx.array:
    return mx.view(mx.view(x, mx.complex64) * rope_frequencies, mx.float32)


_rotate_pairs = cast(Callable[[mx.array, mx.array], mx.array], _pair_rotation)


@_pair_rotation.vjp
def _(primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    # Views have no gradient in MLX. That of a rotation is the rotation back; positions are constants.
    return _rotate_pairs(cotangent, mx.conjugate(primals[1])), mx.zeros_like(primals[1])
