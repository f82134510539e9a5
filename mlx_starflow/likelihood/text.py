"""How likely a text is under a flow over text: bounds of its likelihood, in bits per character."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.likelihood.nll import standard_error, training_noise
from mlx_starflow.models.text_flow import TextFlow
from mlx_starflow.sampling.progress import Watch, watch

DRAWS = 64
"""Of the codebook's noise, for each text."""

MOST_TEXT = 2**28
"""Bytes of a text file."""

BATCH = 16
"""Windows at once."""


@dataclass(frozen=True)
class TextScore:
    """Upper bounds of -log2 p(text) per character.

    Attributes:
        bits_per_character: minus the ELBO, averaged over the draws.
        standard_error: of that mean, from the draws; None for a single one.
        importance_weighted: minus the importance-weighted bound of all draws, which is nearer to the likelihood.
        characters: how many were scored.
        draws: of the codebook's noise.
    """

    bits_per_character: float
    standard_error: float | None
    importance_weighted: float
    characters: int
    draws: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def text_windows(flow: TextFlow, characters: np.ndarray) -> list[np.ndarray]:
    """A text in windows as long as the flow reads, the last one shorter, whole tokens each.

    Raises StarflowError if there is not a single token.
    """
    length, patch = flow.config.length, flow.config.patch_size
    whole = characters[: len(characters) // patch * patch]
    if not len(whole):
        raise StarflowError(f"the text is too short to score: it must have {patch} characters at least")
    return [whole[start : start + length] for start in range(0, len(whole), length)]


def score_characters(
    flow: TextFlow, characters: np.ndarray, *, draws: int = DRAWS, seed: int = 0, progress: Watch = False
) -> TextScore:
    """Score a text window by window, each without what stands before it.

    Args:
        flow: a text flow.
        characters: numbers of the text's characters, `[T]`; what is left of them after whole tokens is left out.
        draws: of the codebook's noise for each window.
        seed: of the noise.

    Raises:
        StarflowError: there is no text, or no draw.
    """
    if draws < 1:
        raise StarflowError(f"the number of draws must be 1 or more, not {draws}")
    windows = text_windows(flow, np.asarray(characters))
    found = np.zeros((draws, len(windows)))
    with watch(progress).counting("scoring", draws * len(windows), "window") as counter:
        for draw in range(draws):
            for numbers in _batches(windows):
                texts = np.stack([windows[number] for number in numbers])
                shape = (texts.shape[1], flow.config.size)
                noise = training_noise(len(numbers), shape, draw, seed, numbers)
                found[draw, numbers] = np.array(flow.log_weight(mx.array(texts), mx.array(noise)), np.float64)
                counter.advance(len(numbers))
    count = sum(map(len, windows))
    unit = count * math.log(2)
    totals = -found.sum(axis=1) / unit
    highest = found.max(axis=0)
    weighted = (highest + np.log(np.exp(found - highest).mean(axis=0))).sum()
    error = standard_error(totals)
    return TextScore(
        float(totals.mean()), error if math.isfinite(error) else None, float(-weighted / unit), count, draws
    )


def _batches(windows: Sequence[np.ndarray]) -> list[list[int]]:
    """Numbers of windows of one length, at most `BATCH` at once."""
    full = [number for number, window in enumerate(windows) if len(window) == len(windows[0])]
    batches = [full[start : start + BATCH] for start in range(0, len(full), BATCH)]
    return batches + ([[len(windows) - 1]] if len(full) < len(windows) else [])
