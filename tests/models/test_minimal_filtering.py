"""Convolutions in fewer products are the convolutions, of every shape."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_starflow.models import minimal_filtering
from mlx_starflow.models.minimal_filtering import correlate_3x3, correlate_doubled


def drawn(*shape: int) -> mx.array:
    return mx.random.normal(shape)


def error(actual: mx.array, expected: mx.array) -> float:
    assert actual.shape == expected.shape
    return (mx.abs(actual.astype(mx.float32) - expected).max() / mx.abs(expected).max()).item()


@pytest.fixture(params=[512, 3], ids=["at once", "in pieces"], autouse=True)
def cells(request, monkeypatch):
    monkeypatch.setattr(minimal_filtering, "_CELLS", request.param)
    mx.random.seed(0)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize(("frames", "height", "width"), [(4, 6, 8), (3, 7, 5), (5, 3, 3), (3, 3, 6), (3, 8, 4)])
def test_correlation(depth, frames, height, width):
    x, weight, bias = drawn(frames, height, width, 6), drawn(5, depth, 3, 3, 6), drawn(5)
    expected = mx.conv3d(x[None], weight)[0] + bias
    assert error(correlate_3x3(x, weight, bias), expected) < 2e-6


@pytest.mark.parametrize(("frames", "height", "width"), [(2, 5, 7), (1, 3, 3), (3, 3, 6), (2, 8, 4)])
def test_correlation_of_doubled_frames(frames, height, width):
    x, weight, bias = drawn(frames, height, width, 6), drawn(5, 1, 3, 3, 6), drawn(5)
    doubled = mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2)[:, 1:-1, 1:-1]
    expected = mx.conv2d(doubled, weight[:, 0]) + bias
    assert error(correlate_doubled(x, weight, bias), expected) < 2e-6


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    arrays = [each.astype(dtype) for each in (drawn(3, 6, 6, 4), drawn(5, 3, 3, 3, 4), drawn(5))]
    x, weight, bias = (each.astype(mx.float32) for each in arrays)
    found = correlate_3x3(*arrays)
    assert found.dtype == dtype
    assert mx.array_equal(found, correlate_3x3(x, weight, bias).astype(dtype))
