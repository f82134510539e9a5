"""Attention without the exponential function is MLX's attention."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_starflow.kernels import attention as kernel
from mlx_starflow.kernels.attention import attention

SCALE = 0.125


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setattr(kernel, "on_cpu", lambda: True)


def arrays(queries: int, keys: int, heads: int = 3, dtype: mx.Dtype = mx.float32) -> list[mx.array]:
    """Queries, keys and values as a cache gives them: views of longer arrays."""
    random = [mx.random.key(number) for number in range(3)]
    q = 2 * mx.random.normal((2, 3, queries, 64), key=random[0])
    k, v = (mx.random.normal((2, heads, keys + 5, 64), key=key)[:, :, :keys] for key in random[1:])
    return [array.astype(dtype) for array in (q, k, v)]


def softmax(q: mx.array, k: mx.array, v: mx.array, mask: str | None) -> np.ndarray:
    """In float64."""
    q, k, v = (np.array(array, dtype=np.float64) for array in (q, k, v))
    scores = SCALE * q @ k.swapaxes(-1, -2)
    if mask:
        scores += np.triu(np.full(scores.shape[-2:], -np.inf), 1 + k.shape[2] - q.shape[2])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


@pytest.mark.parametrize("mask", [None, "causal"])
@pytest.mark.parametrize(("queries", "keys"), [(2, 2), (5, 9), (16, 40), (64, 64), (65, 70), (200, 203)])
def test_values(queries, keys, mask):
    given = arrays(queries, keys)
    for function in (attention, mx.compile(attention)):
        difference = np.array(function(*given, scale=SCALE, mask=mask)) - softmax(*given, mask)
        assert np.abs(difference).max() < 5e-6


def test_far_scores():
    """Weights that are next to nothing are 0 and not a NaN, whatever their keys are masked with."""
    q, k, v = arrays(6, 6)
    k[:, :, 3] *= 1000
    for mask in (None, "causal"):
        out = np.array(attention(q, k, v, scale=SCALE, mask=mask))
        assert np.abs(out - softmax(q, k, v, mask)).max() < 5e-6


@pytest.mark.parametrize("mask", [None, "causal"])
def test_gradient(mask):
    given, cotangent = arrays(70, 70), mx.random.normal((2, 3, 70, 64), key=mx.random.key(9))

    def ours(*inputs: mx.array) -> mx.array:
        return attention(*inputs, scale=SCALE, mask=mask)

    def mlx(*inputs: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(*inputs, scale=SCALE, mask=mask)

    expected = mx.vjp(mlx, given, [cotangent])[1]
    for gradient, wanted in zip(mx.vjp(ours, given, [cotangent])[1], expected, strict=True):
        assert mx.allclose(gradient, wanted, rtol=0, atol=1e-5).item()


@pytest.mark.parametrize(
    ("changes", "mask"), [({"queries": 1}, None), ({"heads": 1}, "causal"), ({"dtype": mx.bfloat16}, "causal")]
)
def test_the_rest_is_left_to_mlx(changes, mask):
    given = arrays(**{"queries": 4, "keys": 7, **changes})
    expected = mx.fast.scaled_dot_product_attention(*given, scale=SCALE, mask=mask)
    assert mx.array_equal(attention(*given, scale=SCALE, mask=mask), expected).item()
