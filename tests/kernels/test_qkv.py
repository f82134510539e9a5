"""Splitting heads, norms and rotary positions: plain MLX against the formula, the kernel against plain MLX."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_starflow.kernels.qkv import split_rotate, split_rotate_plain
from mlx_starflow.models.rope import line_frequencies

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
SPACING = {mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}
"""Of the numbers from 1 to 2."""


def normal(key: int, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(key)).astype(dtype)


def arguments(
    batch: int,
    length: int,
    num_heads: int,
    num_kv_heads: int,
    dim: int,
    norm: bool = False,
    dtype: mx.Dtype = mx.float32,
) -> list[mx.array]:
    qkv = normal(0, batch, length, (num_heads + 2 * num_kv_heads) * dim, dtype=dtype)
    weights = [0.3 * normal(key, dim, dtype=dtype) for key in (1, 2)]
    return [qkv, line_frequencies(dim, length + 3)[3:], *(weights if norm else [])]


def pairs(x: np.ndarray, half_split: bool) -> np.ndarray:
    """`[..., D]` -> rotary pairs `[2, ..., D / 2]`."""
    return np.stack(np.split(x, 2, axis=-1) if half_split else [x[..., ::2], x[..., 1::2]])


def array(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def check(actual: mx.array, expected: mx.array, half_split: bool) -> None:
    """To 1e-6 of a pair's length, or to the spacing of a half type's numbers there: rotations mix the two."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    a, b = pairs(array(actual), half_split), pairs(array(expected), half_split)
    length = np.maximum(np.sqrt(np.square(b).sum(0)), 1e-30)
    bound = 1e-6 * length
    if expected.dtype in SPACING:
        bound = SPACING[expected.dtype] * 2.0 ** np.floor(np.log2(length))
    assert (np.abs(a - b) <= bound).all()


@pytest.mark.parametrize("half_split", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "dim"), [(3, 1, 16), (2, 2, 6)])
def test_plain_version_is_the_formula(num_heads, num_kv_heads, dim, norm, half_split):
    inputs = arguments(2, 5, num_heads, num_kv_heads, dim, norm)
    parts = split_rotate(*inputs, num_heads=num_heads, num_kv_heads=num_kv_heads, half_split=half_split)
    assert [part.shape for part in parts] == [(2, count, 5, dim) for count in (num_heads, num_kv_heads, num_kv_heads)]
    x = array(inputs[0]).reshape(2, 5, num_heads + 2 * num_kv_heads, dim).transpose(0, 2, 1, 3)
    expected = np.split(x, [num_heads, num_heads + num_kv_heads], axis=1)
    for index, weight in enumerate(inputs[2:]):
        square = np.square(expected[index]).mean(-1, keepdims=True)
        expected[index] = expected[index] / np.sqrt(square + 1e-6) * (1 + array(weight))
    for index in range(2):
        a, b = pairs(expected[index], half_split)
        turned = (a + 1j * b) * np.array(inputs[1])
        halves = [turned.real, turned.imag]
        expected[index] = (
            np.concatenate(halves, -1) if half_split else np.stack(halves, -1).reshape((*a.shape[:3], dim))
        )
    for part, wanted in zip(parts, expected, strict=True):
        assert np.abs(array(part) - wanted).max() < 2e-6


def test_without_positions_heads_are_only_split():
    qkv = normal(0, 2, 5, 4 * 7)
    q, k, v = split_rotate(qkv, None, num_heads=2, num_kv_heads=1)
    x = np.array(qkv).reshape(2, 5, 4, 7).transpose(0, 2, 1, 3)
    for part, wanted in zip((q, k, v), np.split(x, [2, 3], axis=1), strict=True):
        assert np.array_equal(np.array(part), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "dim", "norm", "half_split"),
    [
        (4, 4, 64, False, False),  # the released image model's kind of head
        (4, 4, 64, True, False),
        (5, 1, 64, False, True),
        (6, 2, 64, True, True),
        (9, 9, 8, True, False),
        (3, 3, 24, False, False),
        (2, 1, 66, True, True),
        (1, 1, 128, True, False),
        (1, 1, 2, False, False),
    ],
)
def test_kernel_is_the_plain_version(kernels_on, num_heads, num_kv_heads, dim, norm, half_split, dtype):
    options = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "half_split": half_split}
    for batch, length in ((1, 1), (2, 1), (3, 7), (2, 33)):
        inputs = arguments(batch, length, num_heads, num_kv_heads, dim, norm, dtype)
        with kernels_on():
            parts = split_rotate(*inputs, **options)
        for part, wanted in zip(parts, split_rotate_plain(*inputs, **options), strict=True):
            check(part, wanted, half_split)
        assert np.array_equal(array(parts[2]), array(split_rotate_plain(*inputs, **options)[2]))


def test_kernel_takes_slices(kernels_on):
    """Of rope frequencies, as samplers make them, and of projections."""
    rope_frequencies = line_frequencies(8, 40)
    wide = normal(0, 2, 5, 50)
    with kernels_on():
        parts = split_rotate(wide[:, 1:4, 1:41], rope_frequencies[17:20], num_heads=3, num_kv_heads=1)
    expected = split_rotate_plain(
        mx.array(np.array(wide)[:, 1:4, 1:41]), rope_frequencies[17:20], num_heads=3, num_kv_heads=1
    )
    for part, wanted in zip(parts, expected, strict=True):
        check(part, wanted, False)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("half_split", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_gradient_is_those_of_the_plain_version(kernels_on, norm, half_split, dtype):
    inputs = arguments(2, 3, 3, 1, 16, norm, dtype)
    rope_frequencies = inputs.pop(1)
    options = {"num_heads": 3, "num_kv_heads": 1, "half_split": half_split}
    cotangents = [normal(key, 2, count, 3, 16, dtype=dtype) for key, count in ((5, 3), (6, 1), (7, 1))]

    def gradients(function) -> list[mx.array]:
        return mx.vjp(lambda qkv, *norm: list(function(qkv, rope_frequencies, *norm, **options)), inputs, cotangents)[1]

    with kernels_on():
        actual = gradients(split_rotate)
    for gradient, wanted in zip(actual, gradients(split_rotate_plain), strict=True):
        assert gradient.dtype == wanted.dtype == dtype
        assert np.array_equal(array(gradient), array(wanted))


def test_gradient_of_one_part_alone(kernels_on):
    """What a loss does not read has no cotangent."""
    qkv, rope_frequencies = arguments(2, 3, 3, 1, 16)

    def loss(function, x: mx.array) -> mx.array:
        return mx.square(function(x, rope_frequencies, num_heads=3, num_kv_heads=1)[1]).sum()

    with kernels_on():
        actual = mx.grad(lambda x: loss(split_rotate, x))(qkv)
        second = mx.grad(lambda x: mx.square(mx.grad(lambda y: loss(split_rotate, y))(x)).sum())(qkv)
    assert np.abs(array(actual - mx.grad(lambda x: loss(split_rotate_plain, x))(qkv))).max() < 1e-5
    assert mx.isfinite(second).all().item()
