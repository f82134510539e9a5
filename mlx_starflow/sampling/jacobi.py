"""Inversion by Jacobi iteration: many tokens are guessed and all of them corrected at once until they stand still.

The fixed point is the sequential sample. Token n of a block is exact after n + 1 sweeps at the latest, since it then
depends on exact tokens alone; flows are usually there much sooner (arXiv 2412.06329, 2505.12849).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import mlx.core as mx

from mlx_starflow.sampling.decoder import BlockDecoder
from mlx_starflow.sampling.first_guesses import FirstGuesses, FramePast, bounded
from mlx_starflow.sampling.methods import JacobiSettings, RollingSettings
from mlx_starflow.sampling.noise_floor import NoiseFloor


def invert(decoder: BlockDecoder, start: int, length: int, settings: JacobiSettings) -> Iterator[int]:
    """Block after block, each iterated until it stands still, starting from its noise or from the frame before it.

    In a video, blocks after the first frame are four times as long, as in the release.

    Args:
        decoder: has the noise, and data whose first `start` tokens are known; the others are still the noise.
        start: how many are known.
        length: how many are to be.
        settings: of the iteration.

    Yields:
        How many tokens are done, after each sweep.
    """
    frame = decoder.z.shape[1] if decoder.block.config.local else decoder.length // decoder.frames
    while start < length:
        stop = min(start + settings.block_size * (1 if start <= frame else 4), length)
        for sweep in range(settings.max_iterations):
            if sweep:
                decoder.trim(stop - start)
            # The first sweep reads the frame before, the known token at the front included, as in the release.
            change = decoder.sweep(start, stop, lag=frame if start > frame and not sweep else 0)
            if not change >= settings.threshold or sweep + 1 == settings.max_iterations:
                break
            yield start
        start = stop
        yield start


def roll(
    decoder: BlockDecoder, start: int, length: int, settings: RollingSettings, past: FramePast | None = None
) -> Iterator[int]:
    """A window that slides past every token whose residual has been measured; arguments as for `invert`; `past` see
    `FirstGuesses`.

    An evaluation measures the residual |(x_n - mu_n) / sigma_n - z_n| of every token in the window with the values its
    inputs have now. The leading tokens within the tolerance are final as they are: nothing that their residual depends
    on changes any more. The first one that is not gets its new value, which is exact. So at least one token is done
    each time, and the block's residual is within the tolerance everywhere; a batch advances as its slowest sample does.

    In half precision the tolerance is at least what the precision resolves (see `noise_floor`). Where the window hardly
    advances all the same, tokens are done one by one for a while, which takes less time.
    """
    entered = start  # tokens before this one have been given their first guess
    guesses = FirstGuesses(decoder, settings, past)
    floor, pace = NoiseFloor(decoder, settings.tolerance), _Pace(settings.window)
    while start < length:
        stop = min(start + pace.width, length)
        if entered < stop:
            decoder.write(entered, guesses.of(entered, stop))
            entered = stop
        old, noise, place = decoder.data(start, stop), decoder.z[:, start:stop], mx.arange(stop - start)[:, None]
        if not decoder.block.is_affine:
            new, done, _ = _merged(old, noise, *decoder.correct(start, stop), mx.array(settings.tolerance), place)
            mx.async_eval(new, done)
            decoder.write(start, new)
        else:
            mu, log_sigma = decoder.predict(start, stop)
            new, done, residuals = _advance(old, noise, mu, log_sigma, mx.array(floor.tolerance), place)
            guesses.learn(start, mu, log_sigma)
            # Until it is known how many tokens are done a GPU waits for nothing but this loop: what does not depend on
            # it is built before.
            mx.async_eval(new, done, residuals, *guesses.arrays)
            decoder.write(start, new)
            if floor.suspected(residuals, int(done)):
                floor.measure(start, stop, int(done), old, residuals, mu, log_sigma)
                new, done, _ = _advance(old, noise, mu, log_sigma, mx.array(floor.tolerance), place)
                mx.eval(new, done)
                decoder.write(start, new)
        count = min(int(done) + 1, stop - start)
        # The cache keeps the inputs that predicted these tokens; those behind were guesses.
        decoder.trim(stop - start - count)
        start += count
        pace.count(count)
        yield start
    guesses.finish()


STRETCH = 32
"""Evaluations after which it is looked at how far a window has got."""
LEAST = 1.25
"""Tokens an evaluation that are worth a window."""


class _Pace:
    """How many tokens are evaluated at once: a window, or one where a window is in vain.

    Attributes:
        width: tokens of the next evaluation.
    """

    def __init__(self, window: int):
        self.width = self._window = window
        self._evaluations = self._tokens = 0
        self._pause = STRETCH

    def count(self, tokens: int) -> None:
        """An evaluation has finished so many tokens."""
        self._evaluations, self._tokens = self._evaluations + 1, self._tokens + tokens
        if self._evaluations < (STRETCH if self.width == self._window else self._pause):
            return
        if self.width < self._window:
            self.width, self._pause = self._window, 2 * self._pause
        elif self._tokens < LEAST * STRETCH:
            self.width = 1
        self._evaluations = self._tokens = 0


def _advance(
    old: mx.array, noise: mx.array, mu: mx.array, log_sigma: mx.array, tolerance: mx.array, place: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """The values of a window's tokens after an evaluation, how many of the first are final as they were, and the
    largest residual of each; `place` `[n, 1]` counts them."""
    return _merged(old, noise, *_corrected(old, noise, mu, log_sigma), tolerance, place)


def _merged(
    old: mx.array, noise: mx.array, new: mx.array, residual: mx.array, tolerance: mx.array, place: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """`_advance`, from what the tokens' noise gives now and the residuals of the values that they have."""
    good = (residual <= tolerance).all(axis=(0, 2))
    done = mx.cumprod(good.astype(mx.int32)).sum()
    return _chosen(old, noise, new, place, done), done, residual.max(axis=(0, 2))


# For all widths and batches at once: MLX keeps what it traced as long as the process lives. Nothing here is a sum or a
# maximum: traced for one shape, these write past the end of other shapes' arrays (MLX 0.32).
@partial(mx.compile, shapeless=True)
def _corrected(old: mx.array, noise: mx.array, mu: mx.array, log_sigma: mx.array) -> tuple[mx.array, mx.array]:
    """What the noise of tokens gives, and the residuals of the values that they have."""
    return noise * mx.exp(log_sigma) + mu, mx.abs((old - mu) * mx.exp(-log_sigma) - noise)


@partial(mx.compile, shapeless=True)
def _chosen(old: mx.array, noise: mx.array, new: mx.array, place: mx.array, done: mx.array) -> mx.array:
    """The old values of the tokens that are done, the new ones of all others; those after the next are guesses."""
    return mx.where(place < done, old, mx.where(place == done, new, bounded(new, noise)))
