"""GELU without the error function: as exact as the one it stands for, and with its gradient."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_starflow.kernels import gelu as kernel
from mlx_starflow.kernels.gelu import GELU, gelu

X = np.linspace(-14, 14, 40001, dtype=np.float32)


@pytest.mark.parametrize("compiled", [False, True])
def test_exact(monkeypatch, compiled):
    monkeypatch.setattr(kernel, "on_cpu", lambda: True)
    wide = X.astype(np.float64)
    expected = wide * 0.5 * np.vectorize(math.erfc)(-wide * math.sqrt(0.5))
    y = (mx.compile(gelu) if compiled else gelu)(mx.array(X))
    assert np.abs(np.array(y) - expected).max() <= 1e-6
    np.testing.assert_array_equal(np.array(gelu(mx.array([0.0, 1e30, -1e30]))), np.array([0, 1e30, 0], np.float32))
    assert mx.isnan(gelu(mx.array(math.nan))).item()
    assert mx.array_equal(GELU()(mx.array(X)), gelu(mx.array(X)))
    many = mx.broadcast_to(mx.array(X), (kernel.LARGEST // len(X) + 1, len(X)))
    assert mx.array_equal(gelu(many), nn.gelu(many))


def test_gradient():
    x, cotangent = mx.array(X), mx.random.normal(X.shape, key=mx.random.key(0))
    for function in (gelu, mx.checkpoint(gelu), mx.compile(gelu)):
        given = mx.vjp(function, [x], [cotangent])[1][0]
        assert mx.allclose(given, mx.vjp(nn.gelu, [x], [cotangent])[1][0], rtol=0, atol=1e-6).item()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_mlx_s(dtype):
    x = mx.array(X).astype(dtype)
    y = gelu(x)
    assert y.dtype == dtype and mx.array_equal(y, nn.gelu(x)).item()
