"""What a training hides from the flow: captions, for guidance, and parts of the context, so that text is heeded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def choose_caption(captions: Sequence[str], rng: np.random.Generator, dropout: float) -> str:
    """The empty caption with probability `dropout`, for guidance; else mostly the first one, at times another."""
    draw, other = rng.random(2)
    if draw < dropout:
        return ""
    if len(captions) > 1 and other < 0.4:
        return captions[int(rng.integers(1, len(captions)))]
    return captions[0]


def context_mask(rng: np.random.Generator, batch: int, tokens: int, full: float, partial: float) -> np.ndarray:
    """Which inputs the deep block may read, float32 `[B, N]` of 1 and 0: a training aid for small data sets.

    With teacher forcing the tokens before give a picture away and the text is ignored. So a share `full` of the
    samples reads the text alone, and a share `partial` of the others loses a random part of its tokens, a different
    part in each sample. The first input, the start token, always stays.
    """
    draw = rng.random((batch, 1))
    some = rng.random((batch, tokens)) > rng.random((batch, 1))
    mask = np.where(draw < full + partial * (1 - full), some, True) & (draw >= full)
    mask[:, 0] = True
    return mask.astype(np.float32)


def context_share(full: float, progress: float) -> float:
    """The share `full` of `context_mask` at `progress` 0..1: constant, then from 0.7 to 0.85 down to a fifth.

    Late in training the flow is to model whole pictures again.
    """
    return full * (1 - 0.8 * min(max((progress - 0.7) / 0.15, 0.0), 1.0))
