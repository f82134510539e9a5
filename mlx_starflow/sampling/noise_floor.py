"""What a precision can resolve: how far residuals move if the numbers that they are computed of move by a rounding.

In half precision a residual smaller than that says nothing about the token. A window that waited for it would give one
token an evaluation: the tokens before it move by less than matters, and its residual by more than the tolerance.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_starflow.sampling.decoder import BlockDecoder

HALF = {mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}
"""Precisions that need a floor, and half the distance of numbers around 1. In float32 it is far below any tolerance."""

STEP = 0.25
"""Inputs are moved by this share of a rounding: enough for all that follows to be rounded anew, and too little to
matter by itself."""

FACTOR = 2.0
"""A tolerance is at least so many times the floor, which is the largest difference that was seen, not that there is."""

NEAR = 256
"""A residual of at most so many roundings may be one that cannot get smaller. With guidance, trained flows have floors
of 40 to 50 roundings."""

PATIENCE = 3
"""Evaluations in a row that make a window suspect the floor. A window that still converges gets past them."""


def moved(x: mx.array, products: mx.Dtype) -> mx.array:
    """Numbers, each moved up or down by a part of a rounding; the same ones always in the same way."""
    up = mx.random.bernoulli(0.5, x.shape, key=mx.random.key(0))
    step = STEP * HALF[products]
    return x * mx.where(up, 1 + step, 1 - step)


class NoiseFloor:
    """The tolerance of one block's window: what was asked for, or what the precision can resolve if that is more.

    The floor is measured when the window seems to be kept up by it, at the price of an evaluation: those of its tokens
    that may be done but for rounding are predicted again from inputs that are moved by part of a rounding. What their
    residuals change by is noise. Where that does not explain the wait, the window is measured again only after twice
    the wait.

    Attributes:
        tolerance: largest residual of a token that is done.
    """

    def __init__(self, decoder: BlockDecoder, tolerance: float):
        self._decoder, self.tolerance = decoder, tolerance
        self._near = NEAR * HALF.get(decoder.products, 0.0)
        self._waited, self._patience = 0, PATIENCE

    def suspected(self, residuals: mx.array, done: int) -> bool:
        """Whether to measure, after an evaluation that found `done` leading tokens within the tolerance.

        `residuals` `[n]` are the largest ones of each token in the window.
        """
        if not self.tolerance < self._near:
            return False
        held_up = done < min(2, len(residuals) - 1) and np.array(residuals)[done] <= self._near
        self._waited = self._waited + 1 if held_up else 0
        return self._waited >= self._patience

    def measure(
        self,
        start: int,
        stop: int,
        done: int,
        old: mx.array,
        residuals: mx.array,
        mu: mx.array,
        log_sigma: mx.array,
    ) -> None:
        """Raise the tolerance to what the window `start` to `stop` resolves.

        `old` are the tokens that it was evaluated with; the other arguments are as that evaluation gave them. The
        window's data change; the cache keeps what predicted its first `done` + 1 tokens.
        """
        decoder = self._decoder
        decoder.trim(stop - start)
        # The tokens that are done, and with them what the cache keeps of them, stay as they are.
        decoder.write(start + done, moved(old[:, done:], decoder.products))
        again_mu, again_log_sigma = decoder.predict(start, stop)
        change = (old - again_mu) * mx.exp(-again_log_sigma) - (old - mu) * mx.exp(-log_sigma)
        changes, levels = np.array(mx.abs(change).max(axis=(0, 2))), np.array(residuals)
        resolved = changes[done + 1 :][levels[done + 1 :] <= self._near]
        floor = float(resolved.max(initial=0.0))
        self._waited, self._patience = 0, 2 * self._patience
        if np.isfinite(floor):
            decoder.noise_floor = max(decoder.noise_floor, floor)
            self.tolerance = max(self.tolerance, FACTOR * floor)
