"""Inversion one token after another: exact, and as many evaluations as tokens."""

from __future__ import annotations

from collections.abc import Iterator

from mlx_starflow.sampling.decoder import BlockDecoder


def invert(decoder: BlockDecoder, start: int, length: int) -> Iterator[int]:
    """Make the first `length` tokens of the decoder's noise data, of which the first `start` are known.

    Yields, after each token, how many are done.
    """
    for n in range(start, length):
        decoder.invert(n, n + 1)
        yield n + 1
