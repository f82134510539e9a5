"""Whether two groups of numbers differ by more than chance makes them: p values that assume nothing of their shape."""

from __future__ import annotations

import math

import numpy as np

ROUNDS = 9999
"""Of a permutation test: its p value is a multiple of 1 / 10,000."""


def permutation_p(lower: np.ndarray, higher: np.ndarray, seed: int = 0) -> float:
    """How often chance alone makes the mean of `lower` `[M]` as much lower than that of `higher` `[N]` as it is.

    If it did not matter which group a number belongs to, every way of dealing the numbers out would be as likely. This
    counts among random ones those with such a difference, and the one that there is: the test is exact.
    """
    together = np.concatenate([lower, higher])
    total, count = together.sum(), len(lower)
    rng = np.random.Generator(np.random.Philox(seed))
    # Sums of the first group say all that the differences say. Rounding must not tell equal ones apart.
    found = lower.sum() + 1e-12 * np.abs(together).sum()
    as_low, at_once = 0, max(1, (1 << 22) // len(together))
    for start in range(0, ROUNDS, at_once):
        rounds = min(at_once, ROUNDS - start)
        dealt = rng.permuted(np.broadcast_to(together, (rounds, len(together))), axis=1)
        as_low += int((dealt[:, :count].sum(axis=1) <= found).sum())
    return 1.0 if total != total else (1 + as_low) / (1 + ROUNDS)


def rank_p(lower: np.ndarray, higher: np.ndarray) -> float:
    """p value of the Mann-Whitney test that `lower` `[M]` tends to be lower than `higher` `[N]`.

    The normal approximation, corrected for ties and for continuity; good from about 20 numbers in each group on.
    """
    first, second = len(lower), len(higher)
    both = np.concatenate([lower, higher])
    _, inverse, counts = np.unique(both, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    statistic = ranks[:first].sum() - first * (first + 1) / 2
    size = first + second
    ties = float((counts.astype(float) ** 3 - counts).sum())
    variance = first * second / 12 * (size + 1 - ties / (size * (size - 1)))
    if variance <= 0:
        return 1.0
    z = (statistic - first * second / 2 + 0.5) / math.sqrt(variance)
    return 0.5 * math.erfc(-z / math.sqrt(2))
