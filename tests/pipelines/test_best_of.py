"""The best of several samples."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.commands import message
from helpers.model_directories import write_image_model
from helpers.precision import bound, roundings

from mlx_starflow import load
from mlx_starflow.likelihood.prompts import log_likelihoods


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return load(write_image_model(tmp_path_factory.mktemp("model")))


def test_best_of(pipe):
    best = pipe.best_of(["a cat", "a dog"], 3, images=2, seed=10, draws=2, method="sequential")
    assert best.fits.shape == best.scores.shape == (4, 3)
    assert (best.scores[range(4), best.chosen] == best.scores.max(axis=1)).all()
    assert best.result.prompts == ["a cat", "a cat", "a dog", "a dog"]
    expected = [10 + 3 * (number % 2) + best.chosen[number] for number in range(4)]
    assert best.result.seeds == expected
    assert [each["seeds"] for each in best.result.metadata] == [[seed] for seed in expected]
    # A kept picture is the one that its seed makes.
    alone = pipe.generate("a dog", seed=int(expected[3]), method="sequential")
    np.testing.assert_allclose(
        np.array(alone.latents[0]), np.array(best.result.latents[3]), atol=bound(1e-5, roundings(10))
    )
    assert np.array_equal(alone.noise[0], best.result.noise[3])


def test_best_of_given_noise_and_all_that_belongs_to_a_picture(pipe):
    first = pipe.generate("a cat", seed=1, images=4)
    best = pipe.best_of("a cat", 2, images=2, noise=first.noise, keep_steps=True, verify=True)
    assert best.result.seeds == [None, None]
    kept = [2 * number + chosen for number, chosen in enumerate(best.chosen)]
    assert np.array_equal(best.result.noise, first.noise[kept])
    assert len(best.result.images) == len(best.result.steps) == len(best.result.stats.certificates) == 2


def test_the_weight_of_the_unprompted_likelihood(pipe):
    """At 1 it is the prompt fit that decides, at 0 the likelihood given the prompt; the noise is common to all."""
    fit, likelihood, between = (pipe.best_of("a cat", 4, seed=1, weight=weight) for weight in (1.0, 0.0, 0.25))
    np.testing.assert_array_equal(fit.scores, fit.fits)
    np.testing.assert_allclose(between.scores, 0.25 * fit.scores + 0.75 * likelihood.scores, rtol=1e-6)
    latents = np.array(pipe.generate("a cat", seed=range(1, 5)).latents)
    nats = log_likelihoods(pipe, latents, ["a cat"], numbers=[0] * 4).mean(axis=0)[:, 0]
    np.testing.assert_allclose(likelihood.scores[0], nats, rtol=1e-4)


def test_the_best_of_one_is_that_one(pipe):
    best = pipe.best_of("", 1, seed=3)
    assert best.chosen.tolist() == [0] and best.result.seeds == [3]


def test_mistakes(pipe):
    assert "not 0" in message(pipe.best_of, "a", 0)
    assert "from 0 to 1, not 2" in message(pipe.best_of, "a", 2, weight=2)
    assert "empty prompt" in message(pipe.best_of, " ", 2)
