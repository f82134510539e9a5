"""Models that copy are told from those that do not."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_starflow.evaluation.likelihoods import LikelihoodGap, Scores, Typicality
from mlx_starflow.evaluation.memorization import find_memorized

RNG = np.random.default_rng(0)
TRAINING, HELD_OUT = RNG.standard_normal((2, 60, 5)).astype(np.float32)
NAMES = [f"{number}.png" for number in range(60)]


def found(samples: np.ndarray, held_out: np.ndarray | None = HELD_OUT):
    return find_memorized(TRAINING, NAMES, samples, ["p"] * len(samples), 100, held_out)


def test_copies() -> None:
    samples = TRAINING[5:45] + 0.01
    memorized = found(samples)
    assert memorized.p is not None and memorized.p < 1e-6
    assert memorized.close is not None and memorized.close > 0.9
    assert memorized.held_out is not None and memorized.samples < 0.1 * memorized.held_out
    for pair in memorized.pairs:
        assert pair.picture == f"{pair.seed - 100 + 5}.png"
        assert pair.distance == pytest.approx(0.01 * 5**0.5, rel=1e-3)


def test_pictures_of_the_same_kind() -> None:
    memorized = found(RNG.standard_normal((40, 5)).astype(np.float32))
    assert memorized.p is not None and memorized.p > 0.01
    assert memorized.close is not None and memorized.close < 0.15
    assert [pair.distance for pair in memorized.pairs] == sorted(pair.distance for pair in memorized.pairs)


def test_without_held_out_pictures() -> None:
    memorized = found(TRAINING[:20], None)
    assert memorized.samples == 0 and (memorized.held_out, memorized.close, memorized.p) == (None, None, None)


def scores(mean: float, seed: int, count: int = 80) -> Scores:
    rng = np.random.default_rng(seed)
    own = mean + 0.1 * rng.standard_normal((count, 1))
    return Scores(own + 0.01 * rng.standard_normal((count, 3)), None, 10)


def test_the_gap_of_likelihoods() -> None:
    gap = LikelihoodGap.of(scores(1.0, 1), scores(1.2, 2))
    assert gap.difference.mean == pytest.approx(0.2, abs=0.05)
    assert gap.difference.error == pytest.approx(0.1 * (2 / 80) ** 0.5, rel=0.2)
    assert gap.p == 1e-4
    assert LikelihoodGap.of(scores(1.0, 1), scores(1.0, 3)).p > 0.01


def test_typicality_is_in_standard_deviations() -> None:
    usual = Typicality.of(scores(1.0, 5), scores(1.0, 1))
    odd = Typicality.of(scores(1.3, 4), scores(1.0, 1))
    assert usual is not None and odd is not None
    assert abs(usual.deviation.mean) < 0.5 and usual.unusual < 0.15
    assert odd.deviation.mean == pytest.approx(3, abs=0.7) and odd.unusual > 0.7
    assert Typicality.of(scores(1.0, 1), Scores(np.ones((5, 1)), None, 3)) is None


def test_prompt_fit_is_in_nats_a_picture() -> None:
    plain = scores(1.0, 1)
    fit = Scores(plain.plain, plain.plain - 0.5, 10).prompt_fit
    assert fit is not None and fit.mean == pytest.approx(5.0) and fit.error == pytest.approx(0, abs=1e-9)
    assert plain.prompt_fit is None
