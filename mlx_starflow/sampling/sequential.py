"""Inversion one token after another: exact, and as many evaluations as tokens."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from mlx_starflow.sampling.decoder import BlockDecoder


def invert(decoder: BlockDecoder, z: mx.array, x: mx.array, start: int) -> Iterator[int]:
    """Noise `[B, N, C]` in the block's order -> data x in the block's order, whose first `start` tokens are known.

    Works in x and yields, after each token, how many are done.
    """
    for n in range(start, z.shape[1]):
        x[:, n : n + 1] = decoder.invert(x, z, n, n + 1)
        yield n + 1
