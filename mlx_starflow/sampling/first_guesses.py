"""What tokens are taken to be when they enter a rolling window, see `methods.RollingSettings.guess`."""

from __future__ import annotations

import mlx.core as mx

from mlx_starflow.sampling.decoder import BlockDecoder
from mlx_starflow.sampling.methods import RollingSettings

BOUND = 1e4
"""Guesses are kept within this: an infinite one would reach, as NaN, tokens that attention masks it from."""

Affine = tuple[mx.array, mx.array]
"""mu and log sigma of some tokens, each `[B, n, C]`."""


class FirstGuesses:
    """The first guesses of one block's tokens, from what the window has found out about those before them.

    Attributes:
        arrays: what it remembers of evaluations.
    """

    def __init__(self, decoder: BlockDecoder, settings: RollingSettings):
        self._decoder, self._guess, self._lag = decoder, settings.guess, settings.lag
        self._by_frame = settings.guess in ("previous-affine", "motion-affine")
        self._last: Affine | None = None
        # mu and log sigma of the tokens of two lags and a window, and the number of the first of them.
        self._known: Affine | None = None
        self._first = 0

    @property
    def arrays(self) -> list[mx.array]:
        return [*(self._last or ()), *(self._known or ())]

    def learn(self, start: int, mu: mx.array, log_sigma: mx.array) -> None:
        """An evaluation has predicted these of the tokens from number `start` on."""
        if self._guess == "affine":
            self._last = mu[:, -1:], log_sigma[:, -1:]
        if not self._by_frame:
            return
        if self._known is None:
            self._known, self._first = (mu, log_sigma), start
            return
        first, stop = max(self._first, start - 2 * self._lag), start + mu.shape[1]
        # A window that has become narrower leaves what a wider one has seen.
        before, after = slice(first - self._first, start - self._first), slice(stop - self._first, None)
        old_mu, old_log_sigma = self._known
        self._known = (
            mx.concatenate([old_mu[:, before], mu, old_mu[:, after]], axis=1),
            mx.concatenate([old_log_sigma[:, before], log_sigma, old_log_sigma[:, after]], axis=1),
        )
        self._first = first

    def of(self, start: int, stop: int) -> mx.array:
        """The first guesses of tokens `start` to `stop`, `[B, stop - start, C]`."""
        noise = self._decoder.z[:, start:stop]
        if self._last is not None:
            return _mapped(noise, *self._last)
        if self._guess in ("noise", "affine"):
            return noise
        moved = self._guess.startswith("motion")
        if self._by_frame and self._known is not None and start - self._lag >= self._first:
            mu, log_sigma = (self._ahead(known, start - self._first, stop - start, moved) for known in self._known)
            return _mapped(noise, mu, log_sigma)
        if start >= self._lag:
            latest = self._decoder.data(max(0, start - 2 * self._lag), start)
            return bounded(self._ahead(latest, latest.shape[1], stop - start, moved), noise)
        return noise

    def _ahead(self, values: mx.array, start: int, count: int, moved: bool) -> mx.array:
        """The `count` values after number `start`, guessed from those one lag before, and two.

        Where there are more of them than a lag, those further on are guessed from the same ones.
        """
        lag = self._lag
        ahead = mx.arange(count)
        latest = values[:, start - lag : start][:, ahead % lag]
        if not moved or start < 2 * lag:
            return latest
        before = values[:, start - 2 * lag : start - lag][:, ahead % lag]
        return latest + (1 + ahead // lag)[:, None] * (latest - before)


def _mapped(noise: mx.array, mu: mx.array, log_sigma: mx.array) -> mx.array:
    return bounded(noise * mx.exp(log_sigma) + mu, noise)


def bounded(guess: mx.array, noise: mx.array) -> mx.array:
    """A guess within `BOUND`, and the noise where it is no number."""
    return mx.clip(mx.where(mx.isfinite(guess), guess, noise), -BOUND, BOUND)
