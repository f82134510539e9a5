"""Plain-MLX operations that the models share with the kernels' plain versions."""

from __future__ import annotations

import mlx.core as mx

EPSILON = 1e-6
"""Added to the mean square by RMS norms."""

MANY_NUMBERS = 2**14
"""From so many on MLX's CPU backend turns pairs faster by vectorized real products than by its complex ones."""


def rms_norm(x: mx.array, weight: mx.array | None = None, eps: float = EPSILON) -> mx.array:
    """RMS norm over the last axis; `weight` is stored as an offset from 1."""
    if mx.default_device() == mx.cpu and x.dtype == mx.float32 and x.shape[-1] % 16 == 0:
        # MLX's CPU backend adds a row up number by number. Sixteen at a time loses fewer digits, which guided
        # sampling from a badly conditioned network multiplies.
        square = mx.square(x).reshape(*x.shape[:-1], -1, 16).mean(-1).mean(-1, keepdims=True)
        x = x * mx.rsqrt(square + eps)
        return x if weight is None else x * (1 + weight)
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
    return _turn(y, rope_frequencies).astype(x.dtype)


@mx.custom_function
def _turn(x: mx.array, rope_frequencies: mx.array) -> mx.array:
    if mx.default_device() == mx.cpu and x.size >= MANY_NUMBERS:
        # The same products and sums, so the same numbers.
        cos, sin = mx.repeat(mx.real(rope_frequencies), 2, axis=-1), mx.imag(rope_frequencies)
        sin = mx.stack([-sin, sin], axis=-1).reshape(cos.shape)
        swapped = x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)
        return x * cos + swapped * sin
    # Pairs seen as complex numbers: the fewest operations.
    return mx.view(mx.view(x, mx.complex64) * rope_frequencies, mx.float32)


@_turn.vjp
def _turn_vjp(primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    # Views have no gradient in MLX. That of a rotation is the rotation back; positions are constants.
    rope_frequencies = primals[1]
    return _turn(cotangent, mx.conjugate(rope_frequencies)), mx.zeros_like(rope_frequencies)
