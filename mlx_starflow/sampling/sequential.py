"""Inversion one token after another: exact, and as many evaluations as tokens."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlx_starflow.sampling.decoder import BlockDecoder


def invert(decoder: BlockDecoder, z: mx.array, advance: Callable[[int], None]) -> mx.array:
    """Noise `[B, N, C]` in the block's order -> data in the block's order; calls `advance(1)` after each token."""
    x = mx.array(z)
    if decoder.first:
        mu, log_sigma = decoder.block.unpredicted(z[:, :1])
        x[:, :1] = z[:, :1] * mx.exp(log_sigma) + mu
        advance(1)
    for n in range(decoder.first, z.shape[1]):
        mu, log_sigma = decoder.predict(x, n, n + 1)
        x[:, n : n + 1] = z[:, n : n + 1] * mx.exp(log_sigma) + mu
        # Evaluating each step lets the caches be written in place while Python builds the next one.
        mx.async_eval(x)
        advance(1)
    return x
