"""Rotary positions: their frequencies, the rotation and its gradient."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_starflow.models.rope import axial_frequencies, line_frequencies, rotate


def test_axial_frequencies():
    height, width, side, text = 3, 5, 4, 6
    rope_frequencies = np.array(axial_frequencies(64, height, width, side, text))
    assert rope_frequencies.shape == (text + height * width, 32)
    assert np.abs(np.abs(rope_frequencies) - 1).max() < 1e-6
    scale = side / math.sqrt(height * width)
    for row, column in ((0, 0), (2, 1), (1, 4)):
        angles = [row * scale * 10000 ** (-2 * i / 24) for i in range(12)]
        angles += [column * scale * 10000 ** (-2 * i / 24) for i in range(12)]
        angles += [0.0] * 8
        assert np.abs(rope_frequencies[text + row * width + column] - np.exp(1j * np.array(angles))).max() < 1e-6
    for place in range(text):
        angles = [0.0] * 24 + [place / text * side * 10000 ** (-i / 8) for i in range(8)]
        assert np.abs(rope_frequencies[place] - np.exp(1j * np.array(angles))).max() < 1e-6


def test_frames_count_on_the_third_axis():
    rope_frequencies = np.array(axial_frequencies(64, 2, 3, 4, 5, frames=3))
    assert rope_frequencies.shape == (5 + 18, 32)
    assert np.array_equal(rope_frequencies[: 5 + 6], np.array(axial_frequencies(64, 2, 3, 4, 5)))
    turn = np.exp(1j * 2 * 10000.0 ** (-np.arange(8) / 8))
    assert np.abs(rope_frequencies[5 + 12 :, :24] - rope_frequencies[5:11, :24]).max() == 0
    assert np.abs(rope_frequencies[5 + 12 :, 24:] - turn).max() < 1e-6


def test_axial_frequencies_without_text():
    rope_frequencies = np.array(axial_frequencies(16, 2, 3, 2, third_axis=False))
    scale = 2 / math.sqrt(6)
    rates = np.array([10000 ** (-2 * i / 8) for i in range(4)])
    expected = np.exp(1j * scale * np.concatenate([1 * rates, 2 * rates]))
    assert np.abs(rope_frequencies[5] - expected).max() < 1e-6


def test_every_shape_covers_the_same_area():
    wide, square = (np.array(axial_frequencies(16, *shape, 8, third_axis=False)) for shape in ((4, 16), (8, 8)))
    # One step is one unit for every shape of as many tokens as the trained one.
    assert np.allclose(np.angle(wide[1, 4]), 1.0) and np.allclose(np.angle(square[1, 4]), 1.0)


@pytest.mark.parametrize("half_split", [False, True])
def test_rotation_turns_pairs(half_split):
    x = mx.random.normal((2, 3, 5, 8), key=mx.random.key(0))
    rope_frequencies = line_frequencies(8, 5)
    turned, x = np.array(rotate(x, rope_frequencies, half_split)), np.array(x)
    first = slice(0, 4) if half_split else slice(0, None, 2)
    second = slice(4, None) if half_split else slice(1, None, 2)
    expected = (x[..., first] + 1j * x[..., second]) * np.array(rope_frequencies)
    assert np.abs(turned[..., first] - expected.real).max() < 1e-6
    assert np.abs(turned[..., second] - expected.imag).max() < 1e-6


def test_logits_depend_on_the_distance_alone():
    q, k = (mx.random.normal((1, 1, 1, 16), key=mx.random.key(i)) for i in (1, 2))
    rope_frequencies = line_frequencies(16, 9)
    at = [
        float((rotate(q, rope_frequencies[n + 3 : n + 4]) * rotate(k, rope_frequencies[n : n + 1])).sum())
        for n in range(6)
    ]
    assert np.ptp(at) < 1e-5


@pytest.mark.parametrize("half_split", [False, True])
def test_gradient_is_the_rotation_back(half_split):
    x = mx.random.normal((1, 2, 4, 8), key=mx.random.key(0))
    cotangent = mx.random.normal(x.shape, key=mx.random.key(1))
    rope_frequencies = axial_frequencies(8, 2, 2, 2, third_axis=False)

    def turn(v: mx.array) -> mx.array:
        return rotate(v, rope_frequencies, half_split)

    (gradient,) = mx.vjp(turn, [x], [cotangent])[1]
    assert np.abs(np.array(rotate(cotangent, mx.conjugate(rope_frequencies), half_split) - gradient)).max() < 1e-6
    # A rotation is linear: its gradient is exact along any shift.
    shift = mx.random.normal(x.shape, key=mx.random.key(2))
    expected = float(((turn(x + shift) - turn(x)) * cotangent).sum())
    assert float((gradient * shift).sum()) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    # And gradients of gradients work.
    second = mx.grad(lambda v: mx.square(mx.grad(lambda u: (turn(u) ** 3).sum())(v)).sum())(x)
    assert mx.isfinite(second).all().item()


def test_half_precision_keeps_its_dtype():
    x = mx.random.normal((1, 2, 4, 8), key=mx.random.key(0)).astype(mx.bfloat16)
    rope_frequencies = line_frequencies(8, 4)
    assert rotate(x, rope_frequencies).dtype == rotate(x, rope_frequencies, True).dtype == mx.bfloat16
    exact = rotate(x.astype(mx.float32), rope_frequencies)
    assert np.abs(np.array(rotate(x, rope_frequencies).astype(mx.float32) - exact)).max() < 0.02
