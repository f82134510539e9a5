"""What would keep a GPU busy for seconds is computed in pieces, with the same result."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.tiny_flows import tiny_case

from mlx_starflow.kernels import pieces
from mlx_starflow.kernels.attention import attention
from mlx_starflow.models.transformer import multiply


@pytest.fixture
def short(monkeypatch):
    """Operations are short ones, as on Metal."""

    def shorten(most: float) -> None:
        monkeypatch.setattr(pieces, "backend", lambda: "Metal")
        monkeypatch.setattr(pieces, "MOST", most)

    return shorten


def test_parts(short):
    assert pieces.pieces(100, 1e15) == [(0, 100)]  # elsewhere than on Metal
    short(1e3)
    assert pieces.pieces(100, 1e3) == [(0, 100)]
    for count, operations in ((100, 1001), (7, 3500), (64, 1e5), (3, 1e9), (1, 1e9)):
        parts = pieces.pieces(count, operations)
        assert [start for start, _ in parts[1:]] == [stop for _, stop in parts[:-1]]
        assert parts[0][0] == 0 and parts[-1][1] == count
        for start, stop in parts:
            assert stop - start == 1 or (stop - start) * operations / count <= 1e3


@pytest.mark.parametrize("mask", [None, "causal"])
@pytest.mark.parametrize("keys", [13, 20])
def test_attention(short, mask, keys):
    # Heads that share keys go to MLX's own function on each backend.
    q = mx.random.normal((2, 4, 13, 32), key=mx.random.key(0))
    k, v = (mx.random.normal((2, 2, keys, 32), key=mx.random.key(seed)) for seed in (1, 2))
    whole = attention(q, k, v, scale=0.2, mask=mask)
    calls = []
    short(4.0 * 2 * 4 * 3 * 32 * keys)
    original = mx.fast.scaled_dot_product_attention

    def counted(q, k, v, **options):
        calls.append(q.shape[2])
        return original(q, k, v, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx.fast, "scaled_dot_product_attention", counted)
        found = attention(q, k, v, scale=0.2, mask=mask)
    assert calls == [3, 3, 3, 3, 1]
    assert mx.abs(found - whole).max().item() < 1e-5


@pytest.mark.parametrize("bits", [None, 8])
def test_products(short, bits):
    linear = nn.Linear(64, 96)
    if bits:
        linear = nn.QuantizedLinear.from_linear(linear, bits=bits)
    x = mx.random.normal((2, 10, 64))
    whole = multiply(linear, x)
    short(2.0 * 2 * 4 * 64 * 96)
    assert len(pieces.pieces(10, 2.0 * x.size * 96)) == 3
    assert mx.abs(multiply(linear, x) - whole).max().item() < 1e-4


def test_likelihood_and_gradient_of_a_flow(short):
    tiny = tiny_case("softplus")

    def value(x: mx.array) -> mx.array:
        return tiny.flow(x, tiny.text).nll().sum()

    nll, gradient = mx.value_and_grad(value)(tiny.x)
    short(2e4)
    pieced, own = mx.value_and_grad(value)(tiny.x)
    assert float(pieced) == pytest.approx(float(nll), rel=1e-5)
    assert np.allclose(np.array(own), np.array(gradient), atol=1e-4)
