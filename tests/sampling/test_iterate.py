"""Iterative denoising: against the official code (tests/data), its two variants, and wrong arguments."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny_flows import tiny_case

from mlx_starflow.errors import StarflowError
from mlx_starflow.sampling import denoise, iterate, noise_levels

CASES = ["itarflow", "itarflow_patches", "itarflow_shared"]


@pytest.mark.parametrize("case", CASES)
def test_score_step_is_the_official_one(golden, case):
    golden = golden(case)
    cleaned = denoise(golden.flow.at(0.3), golden["x"], golden.get("y"))
    assert golden.relative_error(cleaned, "denoised_t0.3") < 1e-4


@pytest.mark.parametrize("name", ["iterated_0.3_to_0.01_in_5", "iterated_0.3_to_0.01_in_5_clipped"])
@pytest.mark.parametrize("case", CASES)
def test_iteration_is_the_official_one(golden, case, name):
    golden = golden(case)
    x, labels, levels = 0.3 * golden["x"], golden.get("y"), noise_levels(0.3, 0.01, 5)
    assert golden.relative_error(iterate(golden.flow, x, labels, levels, "clipped" in name), name) < 1e-4


def test_levels():
    assert noise_levels(0.4, 0.1, 4) == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert noise_levels(0.4, 0.1, 1) == [0.4]
    with pytest.raises(StarflowError, match="1 or more, not 0"):
        noise_levels(0.4, 0.1, 0)


def test_one_step_is_a_score_step():
    tiny = tiny_case("itarflow")
    one = np.array(iterate(tiny.flow, tiny.x, tiny.text, [0.3]))
    assert np.array_equal(one, np.array(denoise(tiny.flow.at(0.3), tiny.x, tiny.text)))
    clipped = np.array(iterate(tiny.flow, tiny.x, tiny.text, [0.3], clip=True))
    assert np.array_equal(clipped, one.clip(-1, 1)) and not np.array_equal(clipped, one)


def test_previews_are_the_clean_data():
    tiny = tiny_case("itarflow")
    seen = []
    result = iterate(tiny.flow, tiny.x, tiny.text, [0.3, 0.2], preview=lambda step, clean: seen.append((step, clean)))
    assert [step for step, _ in seen] == [1, 2]
    assert np.array_equal(np.array(seen[0][1]), np.array(denoise(tiny.flow.at(0.3), tiny.x, tiny.text)))
    assert np.array_equal(np.array(seen[1][1]), np.array(result))


def test_stochastic_variant():
    tiny = tiny_case("itarflow")
    noise = mx.random.normal((1, *tiny.x.shape), key=mx.random.key(0))
    first = denoise(tiny.flow.at(0.4), tiny.x, tiny.text)
    # a = (0.2 / 0.4)^2 = 1/4 of the noise's variance stays.
    v = (tiny.x - first) / 0.4
    middle = first + 0.2 * (0.5 * v + 0.75**0.5 * noise[0])
    expected = denoise(tiny.flow.at(0.2), middle, tiny.text)
    result = iterate(tiny.flow, tiny.x, tiny.text, [0.4, 0.2], noise=noise)
    assert np.abs(np.array(result - expected)).max() < 1e-5
    # With the noise that was there already it would be the deterministic one but for its length.
    other = iterate(tiny.flow, tiny.x, tiny.text, [0.4, 0.2])
    assert np.abs(np.array(result - other)).max() > 0.01


def test_wrong_arguments_are_named():
    tiny = tiny_case("itarflow")
    for levels in ([], [0.1, 0.2], [0.2, 0.2], [0.2, 0.0], [float("nan")], [float("inf"), 0.1]):
        with pytest.raises(StarflowError, match="noise levels must fall"):
            iterate(tiny.flow, tiny.x, tiny.text, levels)
    with pytest.raises(StarflowError, match=r"noise has shape \[2, 4, 4, 1\]; these steps need \[1, 2, 4, 4, 1\]"):
        iterate(tiny.flow, tiny.x, tiny.text, [0.2, 0.1], noise=mx.zeros((2, 4, 4, 1)))
    other = tiny_case("tarflow")
    with pytest.raises(StarflowError, match="knows no noise levels, so it denoises in one step"):
        iterate(other.flow, other.x, other.text, [0.2])
    with pytest.raises(StarflowError, match="not finite"):
        iterate(tiny.flow, tiny.x * float("nan"), tiny.text, [0.2])
