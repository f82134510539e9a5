"""Attention to quantized keys and values beside MLX's own of the same numbers unpacked."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_starflow.kernels import quantized_attention as module
from mlx_starflow.kernels.attention import attention
from mlx_starflow.kernels.quantized_attention import QuantizedRows, group_size


def rows(a: mx.array, packed: int, bits: int) -> tuple[QuantizedRows, mx.array]:
    """Rows whose first ones are quantized, and all of them as they are read."""
    size, dense = group_size(a.shape[-1]), a[:, :, packed:]
    if not packed:
        return QuantizedRows(None, dense, size, bits), dense
    words = tuple(mx.quantize(a[:, :, :packed], group_size=size, bits=bits))
    read = mx.dequantize(*words, group_size=size, bits=bits)
    held = QuantizedRows(words, dense if dense.shape[2] else None, size, bits)
    return held, mx.concatenate([read, dense], axis=2)


@pytest.fixture(params=[True, False], ids=["products", "unpacked"])
def products(request, monkeypatch):
    """With MLX's products of quantized rows, as on Metal, and without them."""
    monkeypatch.setattr(module, "_has_product", lambda x: request.param)


@pytest.mark.parametrize("packed", [0, 40, 57])
@pytest.mark.parametrize(("queries", "kv_heads", "bits"), [(1, 4, 8), (1, 2, 4), (7, 4, 8), (7, 2, 8), (57, 4, 4)])
def test_it_is_attention_to_what_the_numbers_stand_for(products, monkeypatch, queries, kv_heads, bits, packed):
    monkeypatch.setattr(module, "QUERIES", 5)
    monkeypatch.setattr(module, "PIECE", 16)
    q, k, v = (
        mx.random.normal((2, heads, length, 64), key=mx.random.key(seed))
        for seed, (heads, length) in enumerate([(4, queries), (kv_heads, 57), (kv_heads, 57)])
    )
    (keys, all_keys), (values, all_values) = rows(k, packed, bits), rows(v, packed, bits)
    for mask in ("causal", None):
        expected = mx.fast.scaled_dot_product_attention(q, all_keys, all_values, scale=0.125, mask=mask)
        found = attention(q, keys, values, scale=0.125, mask=mask)
        assert found.shape == expected.shape
        assert np.abs(np.array(found - expected)).max() < 2e-5


@pytest.mark.parametrize(("dtype", "bound"), [(mx.float16, 4e-3), (mx.bfloat16, 1.5e-2)])
def test_half_precision(products, dtype, bound):
    q, k, v = (mx.random.normal((1, 2, n, 64), key=mx.random.key(n)).astype(dtype) for n in (3, 50, 51))
    (keys, all_keys), (values, all_values) = rows(k, 30, 8), rows(v[:, :, :50], 30, 8)
    q, all_keys, all_values = (a.astype(mx.float32) for a in (q, all_keys, all_values))
    expected = mx.fast.scaled_dot_product_attention(q, all_keys, all_values, scale=0.125, mask="causal")
    found = attention(q.astype(dtype), keys, values, scale=0.125, mask="causal")
    assert found.dtype == dtype
    assert np.abs(np.array(found.astype(mx.float32) - expected)).max() < bound


def test_groups():
    assert [group_size(dim) for dim in (128, 64, 96, 32, 24, 16)] == [64, 64, 32, 32, None, None]
