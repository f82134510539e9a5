from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_starflow.training.data.cache.numbers import DTYPES, decode_numbers, encode_numbers


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_they_round_as_mlx_does(dtype):
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [
            rng.standard_normal(2000) * 10.0 ** rng.uniform(-9, 4, 2000),
            [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 65504, -3e-8, 1e-40],
        ]
    ).astype(np.float32)
    stored = encode_numbers(values, dtype)
    assert len(stored) == len(values) * DTYPES[dtype].itemsize
    read = decode_numbers(np.frombuffer(stored, DTYPES[dtype]), dtype)
    expected = np.array(mx.array(values).astype(getattr(mx, dtype)).astype(mx.float32))
    assert read.dtype == np.float32 and np.array_equal(read, expected)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_what_does_not_fit(dtype):
    for bad in (np.nan, np.inf, -np.inf, {"float16": 65520.0, "bfloat16": 3.4e38}.get(dtype, np.inf)):
        with pytest.raises(OverflowError, match=f"a number is not finite, or too large for {dtype}"):
            encode_numbers(np.array([1.0, bad], np.float32), dtype)
