"""The exact GELU, x * Phi(x), without the error function where that is slow."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_starflow.kernels import on_cpu

ERF = (1.0, 0.0705230784, 0.0422820123, 0.0092705272, 0.0001520143, 0.0002765672, 0.0000430638)
"""erf(t) = 1 - 1 / (sum of ERF[i] t^i)^16 for t >= 0, within 3e-7 (Abramowitz and Stegun, 7.1.28)."""

LARGEST = 2**18
"""Numbers up to which memory does not matter."""


def gelu(x: mx.array) -> mx.array:
    """x * Phi(x), within 1e-6 in float32.

    MLX's CPU backend computes erf one number at a time, in 30 ns. There it is a polynomial, made of what compilers turn
    into vector instructions, which takes a tenth of that. That needs three arrays where erf needs
    one, and so is for sampling, a few tokens at a time, and not for whole sequences of a large model. The gradient is
    that of the exact function.
    """
    if x.size <= LARGEST and x.dtype == mx.float32 and on_cpu():
        return _without_erf(x)
    return nn.gelu(x)


class GELU(nn.Module):
    """`gelu` as a layer."""

    def __call__(self, x: mx.array) -> mx.array:
        return gelu(x)


def _polynomial(x: mx.array) -> mx.array:
    c = [coefficient * 0.5 ** (i / 2) for i, coefficient in enumerate(ERF)]
    size, square = mx.abs(x), x * x
    # In pairs rather than one after another: what is nested deeply, MLX compiles to several kernels.
    low = c[0] + c[1] * size + (c[2] + c[3] * size) * square
    power = low + (c[4] + c[5] * size + c[6] * square) * (square * square)
    for _ in range(4):
        power = power * power
    # x * Phi(x) = (x + |x| erf(|x| / sqrt(2))) / 2. Far from 0 the power is infinite, and its reciprocal 0.
    half = 0.5 * size
    return 0.5 * x + half - half / power


_compiled = mx.compile(_polynomial, shapeless=True)


@mx.custom_function
def _without_erf(x: mx.array) -> mx.array:
    return _compiled(x)


@_without_erf.vjp
def _(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return mx.vjp(nn.gelu, [x], [cotangent])[1][0]
