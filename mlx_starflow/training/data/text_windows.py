"""Windows of a text, for training a flow over text."""

from __future__ import annotations

import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.training.config import TrainingConfig
from mlx_starflow.training.data.batches import IndexedData, Order

GAPS = 0.75
"""Share of the steps in which the blocks read gaps after everything else."""

MOST_GAPS = 12
"""In a window, which has one in each of so many equal parts."""

LONGEST_GAP = 0.2
"""Share of a window that a gap has at most; its length's logarithm is uniform, so that many ends of gaps are seen."""


class TextWindows(IndexedData):
    """Batches of windows of a text for `Trainer`: a pass takes each window once, moved by a random part of its length.

    Args:
        characters: numbers of the text's characters, `[T]`.
        length: of a window.
        size: numbers that stand for a character.
        patch: characters of a token.
        gaps: share of the steps with gaps, which a whole batch has in the same places; 0 for validation, whose windows
            also stay where they are.

    Raises:
        StarflowError: the text is shorter than two windows.
    """

    def __init__(self, characters: np.ndarray, length: int, size: int, patch: int = 1, gaps: float = GAPS):
        if len(characters) < 2 * length:
            raise StarflowError(
                f"a text of {len(characters)} characters is too short: two windows have {2 * length}; give more text"
            )
        self.characters, self.length, self.size, self.patch, self.gaps = characters, length, size, patch, gaps
        self.order = Order((len(characters) - 1) // length if gaps else len(characters) // length)

    def arrays(
        self, chosen: np.ndarray, rng: np.random.Generator, config: TrainingConfig, progress: float
    ) -> dict[str, np.ndarray]:
        """`characters` int32 `[B, T]`, standard normal `noise` `[B, T, size]` and `order` int32 `[B, 2, N]`: places of
        the tokens as blocks read them that read forwards, and backwards; the same for all samples."""
        count, starts = len(chosen), chosen * self.length
        if self.gaps:
            starts = np.minimum(starts + rng.integers(self.length, size=count), len(self.characters) - self.length)
        windows = self.characters[starts[:, None] + np.arange(self.length)]
        noise = rng.standard_normal((count, self.length, self.size), dtype=np.float32)
        places = self._places(rng)
        return {"characters": windows, "noise": noise, "order": np.broadcast_to(places, (count, *places.shape)).copy()}

    def _places(self, rng: np.random.Generator) -> np.ndarray:
        tokens = self.length // self.patch
        forward, hidden = np.arange(tokens, dtype=np.int32), np.zeros(tokens, bool)
        if self.gaps and rng.random() < self.gaps and tokens > 1:
            longest = max(int(LONGEST_GAP * tokens), 1)
            for part in np.array_split(forward, min(int(rng.integers(1, MOST_GAPS + 1)), tokens)):
                length = int(min(longest, len(part)) ** rng.random() + 0.5)
                start = part[0] + int(rng.integers(len(part) - length + 1))
                hidden[start : start + length] = True
        given, gaps = forward[~hidden], forward[hidden]
        return np.stack([np.concatenate([given, gaps]), np.concatenate([given[::-1], gaps[::-1]])])


SEGMENTS = 8
"""Parts of a text that each give some of what is held out."""


def split_text(characters: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """(What to train on, what to measure with): of each of `SEGMENTS` equal parts of a text the last `share` is held
    out."""
    trained, held = [], []
    for part in np.array_split(characters, SEGMENTS):
        kept = len(part) - round(share * len(part))
        trained.append(part[:kept])
        held.append(part[kept:])
    return np.concatenate(trained), np.concatenate(held)
