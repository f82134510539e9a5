"""Inversion by Jacobi iteration: a block of tokens is guessed and all of it corrected at once until it stands still.

The fixed point is the sequential sample. Token n of a block is exact after n + 1 sweeps at the latest, since it then
depends on exact tokens alone; flows are usually there much sooner (arXiv 2412.06329, 2505.12849).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from mlx_starflow.sampling.decoder import BlockDecoder


@dataclass(frozen=True)
class JacobiSettings:
    """A block of `block_size` tokens is done when the mean square of the change falls below `threshold` times that
    of the values, or after `max_iterations` sweeps."""

    block_size: int = 16
    threshold: float = 1e-3
    max_iterations: int = 32


def invert(decoder: BlockDecoder, z: mx.array, settings: JacobiSettings, advance: Callable[[int], None]) -> mx.array:
    """Noise `[B, N, C]` in the block's order -> data in the block's order, starting every block from its noise.

    Calls `advance(n)` after each block of n tokens.
    """
    x = mx.array(z)
    length = z.shape[1]
    start = decoder.first
    if start:
        mu, log_sigma = decoder.block.unpredicted(z[:, :1])
        x[:, :1] = z[:, :1] * mx.exp(log_sigma) + mu
        advance(1)
    while start < length:
        stop = min(start + settings.block_size, length)
        for sweep in range(settings.max_iterations):
            if sweep:
                decoder.trim(stop - start)
            mu, log_sigma = decoder.predict(x, start, stop)
            new = z[:, start:stop] * mx.exp(log_sigma) + mu
            change = mx.square(new - x[:, start:stop]).mean() / mx.square(new).mean()
            x[:, start:stop] = new
            mx.eval(x, change)
            if not change.item() >= settings.threshold:
                break
        advance(stop - start)
        start = stop
    return x
