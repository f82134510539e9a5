"""SiLU without the exponential function, which MLX's CPU backend computes one by one."""

from __future__ import annotations

import mlx.core as mx

from mlx_starflow.kernels import on_cpu

FURTHEST = 7.90531110763549805
"""Beyond it tanh is 1 in float32."""

NUMERATOR = (
    4.89352455891786e-03, 6.37261928875436e-04, 1.48572235717979e-05, 5.12229709037114e-08, -8.60467152213735e-11,
    2.00018790482477e-13, -2.76076847742355e-16,
)  # fmt: skip
DENOMINATOR = (4.89352518554385e-03, 2.26843463243900e-03, 1.18534705686654e-04, 1.19825839466702e-06)
"""tanh(x) = x N(x^2) / D(x^2) within a few units of the last place; the coefficients are those of Eigen's tanh."""


def silu(x: mx.array) -> mx.array:
    """x / (1 + e^-x), of float32; to be called inside a compiled function. On a CPU by sums and products alone, within
    3e-7 |x|."""
    if not on_cpu():
        return x * mx.sigmoid(x)
    half = 0.5 * x
    t = mx.clip(half, -FURTHEST, FURTHEST)
    square = t * t
    return half + half * (t * _polynomial(NUMERATOR, square) / _polynomial(DENOMINATOR, square))


def _polynomial(coefficients: tuple[float, ...], x: mx.array) -> mx.array:
    y: mx.array | float = coefficients[-1]
    for each in coefficients[-2::-1]:
        y = y * x + each
    assert isinstance(y, mx.array)
    return y
