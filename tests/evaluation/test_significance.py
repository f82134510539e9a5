"""p values: exact ones by counting, scipy's, and what they are without a difference."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from mlx_starflow.evaluation.significance import permutation_p, rank_p


def test_permutations_by_counting() -> None:
    lower, higher = np.array([0.1, 0.9, 0.3]), np.array([0.8, 1.4, 0.7, 2.0])
    together = np.concatenate([lower, higher])
    ways = [sum(together[list(each)]) for each in combinations(range(7), 3)]
    exact = np.mean([way <= lower.sum() + 1e-9 for way in ways])
    assert permutation_p(lower, higher) == pytest.approx(exact, abs=0.01)
    assert permutation_p(higher, lower) > 0.9


def test_permutations_without_a_difference() -> None:
    """p values are uniform then."""
    rng = np.random.default_rng(0)
    values = [permutation_p(*rng.standard_normal((2, 12)), seed=seed) for seed in range(60)]
    assert 0.35 < np.mean(values) < 0.65
    assert permutation_p(np.ones(5), np.ones(5)) == 1.0


def test_permutations_of_a_clear_difference() -> None:
    values = np.random.default_rng(1).standard_normal((2, 50))
    assert permutation_p(values[0] - 3, values[1]) == 1e-4


@pytest.mark.parametrize("ties", [False, True])
def test_ranks(ties: bool) -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(2)
    for shift in (-0.5, 0.0, 0.5):
        first, second = rng.standard_normal(25) + shift, rng.standard_normal(40)
        if ties:
            first, second = first.round(), second.round()
        expected = stats.mannwhitneyu(first, second, alternative="less", method="asymptotic").pvalue
        assert rank_p(first, second) == pytest.approx(expected, rel=1e-9)


def test_ranks_of_equal_numbers() -> None:
    assert rank_p(np.ones(9), np.ones(9)) == 1.0


def test_ranks_worked_out() -> None:
    """U = 0 of 3 and 3: z = (0 - 4.5 + 0.5) / sqrt(5.25)."""
    assert rank_p(np.array([1.0, 2, 3]), np.array([4.0, 5, 6])) == pytest.approx(0.0404278, abs=1e-6)
