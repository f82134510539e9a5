"""Inversion one token after another: exact, and as many evaluations as tokens."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlx_starflow.sampling.decoder import BlockDecoder


def invert(decoder: BlockDecoder, z: mx.array, x: mx.array, start: int, advance: Callable[[int], None]) -> mx.array:
    """Noise `[B, N, C]` in the block's order -> data in the block's order, whose first `start` tokens x holds already.

    Calls `advance(1)` after each token.
    """
    for n in range(start, z.shape[1]):
        x[:, n : n + 1] = decoder.invert(x, z, n, n + 1)
        # Evaluating each step lets the caches be written in place while Python builds the next one.
        mx.async_eval(x)
        advance(1)
    return x
