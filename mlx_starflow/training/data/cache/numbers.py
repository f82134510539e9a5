"""float32 arrays as the bytes of a file in float16, bfloat16 or float32, and back."""

from __future__ import annotations

import numpy as np

DTYPES: dict[str, np.dtype] = {"float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2"), "float32": np.dtype("<f4")}
"""What NumPy is to take the bytes for: it has no bfloat16, which is the upper half of a float32."""


def encode_numbers(values: np.ndarray, dtype: str) -> bytes:
    """float32 numbers, rounded to the nearest (half to even) of `dtype`.

    Raises:
        OverflowError: one is not finite, or beyond the range of `dtype`.
    """
    values = np.ascontiguousarray(values, "<f4")
    if dtype == "bfloat16":
        bits = values.view("<u4").astype(np.uint64)
        stored = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
    else:
        with np.errstate(over="ignore"):
            stored = values.astype(DTYPES[dtype])
    if not (np.isfinite(values).all() and np.isfinite(decode_numbers(stored, dtype)).all()):
        raise OverflowError(f"a number is not finite, or too large for {dtype}")
    return stored.tobytes()


def decode_numbers(stored: np.ndarray, dtype: str) -> np.ndarray:
    """What `encode_numbers` wrote, read as `DTYPES[dtype]` -> float32."""
    if dtype == "bfloat16":
        return (stored.astype("<u4") << 16).view("<f4").astype(np.float32, copy=False)
    return stored.astype(np.float32)
