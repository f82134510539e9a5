"""The KV cache of one transformer layer during inversion."""

from __future__ import annotations

import mlx.core as mx


class KVCache:
    """Keys and values of exactly as many positions as the sequence has, so that nothing is ever copied to grow.

    Keys come in with their rotary positions already applied: a step costs the same wherever it is. Evaluate after
    every step, so that the slice assignments happen in place.
    """

    def __init__(self, length: int):
        self.length = length
        self.offset = 0
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append `[B, heads, n, D]` and return all that is cached, `[B, heads, offset, D]`."""
        if self.keys is None or self.values is None:
            shape = (*keys.shape[:2], self.length, keys.shape[3])
            self.keys = mx.zeros(shape, keys.dtype)
            self.values = mx.zeros(shape, values.dtype)
        start, self.offset = self.offset, self.offset + keys.shape[2]
        self.keys[..., start : self.offset, :] = keys
        self.values[..., start : self.offset, :] = values
        return self.keys[..., : self.offset, :], self.values[..., : self.offset, :]

    def trim(self, n: int) -> None:
        """Forget the last `n` positions."""
        self.offset -= min(n, self.offset)
