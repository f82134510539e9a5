"""Whether samples lie closer to the training pictures than pictures do that the model has never seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlx_starflow.evaluation.measures import nearest
from mlx_starflow.evaluation.significance import rank_p

CLOSE = 0.01
"""Share of the held-out pictures that are closer to a training picture than what is called close."""

LISTED = 10


@dataclass(frozen=True)
class ClosePair:
    """A sample, by its seed, and the training picture nearest to it, by its name."""

    seed: int
    prompt: str
    picture: str
    distance: float


@dataclass(frozen=True)
class Memorization:
    """Distances in feature space to the nearest training picture (data copying: Meehan et al., arXiv 2004.05675).

    Attributes:
        samples: median over samples.
        held_out: median over held-out pictures; None if there are none.
        close: share of samples that are closer to a training picture than all but 1 % of the held-out ones; 0.01 of
            a model that copies nothing. None without them.
        p: of the Mann-Whitney test that nothing but chance makes samples lie closer; None without them.
        pairs: the closest ones.
    """

    samples: float
    held_out: float | None
    close: float | None
    p: float | None
    pairs: tuple[ClosePair, ...]


def find_memorized(
    training: np.ndarray,
    names: list[str],
    samples: np.ndarray,
    prompts: list[str],
    first_seed: int,
    held_out: np.ndarray | None,
) -> Memorization:
    """Of features `[N, D]`: of training pictures with their names, samples with prompts, and held-out pictures."""
    distances, which = nearest(samples, training)
    order = np.argsort(distances, kind="stable")[:LISTED]
    pairs = tuple(
        ClosePair(first_seed + int(index), prompts[index], names[which[index]], float(distances[index]))
        for index in order
    )
    median = float(np.median(distances))
    if held_out is None:
        return Memorization(median, None, None, None, pairs)
    usual, _ = nearest(held_out, training)
    close = float((distances < np.quantile(usual, CLOSE)).mean())
    return Memorization(median, float(np.median(usual)), close, rank_p(distances, usual), pairs)
