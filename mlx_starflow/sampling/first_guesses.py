"""What tokens are taken to be when they enter a rolling window, see `methods.RollingSettings.guess`."""

from __future__ import annotations

import mlx.core as mx

from mlx_starflow.errors import StarflowError
from mlx_starflow.sampling.decoder import BlockDecoder
from mlx_starflow.sampling.methods import DRAFT, FRAME_GUESSES, NO_STUDENT, RollingSettings

BOUND = 1e4
"""Guesses are kept within this: an infinite one would reach, as NaN, tokens that attention masks it from."""

BY_FRAME = ("previous-affine", "motion-affine")
"""First guesses that remember mu and log sigma, not data."""

Affine = tuple[mx.array, mx.array]
"""mu and log sigma of some tokens, each `[B, n, C]`."""


class FramePast:
    """The last two frames that a block has made which reads each frame by itself: first guesses of the next.

    Attributes:
        frames: tokens `[B, N, C]` in the block's order, or mu and log sigma of each, of the frame before and of the one
            before that; those that there are.
        mapped: whether they are mu and log sigma.
    """

    def __init__(self) -> None:
        self.frames: list[list[mx.array]] = []
        self.mapped = False

    def remember(self, values: list[mx.array], count: int, mapped: bool) -> None:
        """What a block has made of the next `count` frames at once, each `[B * count, N, C]`."""
        newest = [value.reshape(-1, count, *value.shape[1:]) for value in values]
        made = [[value[:, index] for value in newest] for index in range(max(0, count - 2), count)]
        self.frames = [*made[::-1], *(self.frames if mapped == self.mapped else [])][:2]
        self.mapped = mapped

    def next(self, count: int, moved: bool) -> list[mx.array]:
        """A guess of the same of the next `count` frames at once; of one alone, moved by the last motion if that is
        asked for."""
        guess = self.frames[0]
        if moved and count == 1 and len(self.frames) == 2:
            guess = [2 * latest - before for latest, before in zip(*self.frames, strict=True)]
        return [mx.repeat(value, count, axis=0) for value in guess]


class FirstGuesses:
    """The first guesses of one block's tokens, from what the window has found out about those before them.

    Attributes:
        arrays: what it remembers of evaluations.
    """

    def __init__(self, decoder: BlockDecoder, settings: RollingSettings, past: FramePast | None = None):
        """`past` is remembered from one frame to the next, by blocks that read each by itself.

        Raises StarflowError if the guesses are a student's, and there are none.
        """
        self._decoder, self._guess, self._lag = decoder, settings.guess, settings.lag
        self._draft = decoder.draft if settings.guess == DRAFT else None
        if settings.guess == DRAFT and self._draft is None:
            raise StarflowError(NO_STUDENT)
        self._past = past if settings.guess in FRAME_GUESSES and decoder.block.config.local else None
        self._moved = settings.guess.startswith("motion")
        self._guessed: list[mx.array] | None = None
        if self._past is not None and self._past.frames and self._past.mapped == (settings.guess in BY_FRAME):
            self._guessed = self._past.next(decoder.frames, self._moved)
        self._by_frame = settings.guess in BY_FRAME
        self._last: Affine | None = None
        # mu and log sigma of the tokens of two lags and a window, and the number of the first of them.
        self._known: Affine | None = None
        self._first = 0

    @property
    def arrays(self) -> list[mx.array]:
        return [*(self._last or ()), *(self._known or ())]

    def learn(self, start: int, mu: mx.array, log_sigma: mx.array) -> None:
        """An evaluation has predicted these of the tokens from number `start` on."""
        if self._guess == "affine" or self._by_frame:
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
        if self._draft is not None:
            return bounded(self._draft[:, start:stop], noise)
        if self._guessed is not None:
            guessed = [value[:, start:stop] for value in self._guessed]
            return _mapped(noise, *guessed) if self._by_frame else bounded(guessed[0], noise)
        if self._by_frame and self._known is not None and start - self._lag >= self._first:
            mu, log_sigma = (self._ahead(known, start - self._first, stop - start) for known in self._known)
            return _mapped(noise, mu, log_sigma)
        if self._guess in FRAME_GUESSES and start >= self._lag:
            latest = self._decoder.data(max(0, start - 2 * self._lag), start)
            return bounded(self._ahead(latest, latest.shape[1], stop - start), noise)
        return noise if self._last is None else _mapped(noise, *self._last)

    def finish(self) -> None:
        """The block is made: let the next frame know."""
        if self._past is None:
            return
        length, frames = self._decoder.z.shape[1], self._decoder.frames
        if not self._by_frame:
            self._past.remember([self._decoder.data(0, length)], frames, False)
        elif self._known is not None and self._first == 0 and self._known[0].shape[1] == length:
            self._past.remember(list(self._known), frames, True)

    def _ahead(self, values: mx.array, start: int, count: int) -> mx.array:
        """The `count` values after number `start`, guessed from those one lag before, and two.

        Where there are more of them than a lag, those further on are guessed from the same ones.
        """
        lag = self._lag
        ahead = mx.arange(count)
        latest = values[:, start - lag : start][:, ahead % lag]
        if not self._moved or start < 2 * lag:
            return latest
        before = values[:, start - 2 * lag : start - lag][:, ahead % lag]
        return latest + (1 + ahead // lag)[:, None] * (latest - before)


def _mapped(noise: mx.array, mu: mx.array, log_sigma: mx.array) -> mx.array:
    return bounded(noise * mx.exp(log_sigma) + mu, noise)


def bounded(guess: mx.array, noise: mx.array) -> mx.array:
    """A guess within `BOUND`, and the noise where it is no number."""
    return mx.clip(mx.where(mx.isfinite(guess), guess, noise), -BOUND, BOUND)
