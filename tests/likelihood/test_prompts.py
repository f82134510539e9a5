"""Prompt fit, classification, and the best of several samples."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.commands import message
from helpers.images import smooth_images
from helpers.model_directories import write_class_model

from mlx_starflow.likelihood import best_of, classify, drawn_nats, prompt_fit
from mlx_starflow.likelihood.prompts import log_likelihoods
from mlx_starflow.pipelines.picture_flow import open_picture_flow


def test_log_likelihoods_are_those_of_every_pair(model):
    data = model.data(smooth_images(3))
    prompts = ["0", "2", ""]
    nats = log_likelihoods(model, data, prompts, draws=2, seed=3, batch_size=4)
    assert nats.shape == (2, 3, 3)
    for number, prompt in enumerate(prompts):
        expected = -drawn_nats(model.flow, data, model.conditions([prompt] * 3), draws=2, seed=3).sum(axis=(2, 3))
        np.testing.assert_allclose(nats[:, :, number], expected, rtol=1e-5, atol=1e-3)


def test_prompt_fit_is_what_the_prompt_adds(model):
    fits = prompt_fit(model, smooth_images(2), ["1", ""], draws=3)
    assert fits.shape == (3, 2, 2)
    np.testing.assert_allclose(fits[:, :, 1], 0, atol=1e-4)
    assert np.abs(fits[:, :, 0]).min() > 1e-4


def test_classify_is_bayes_rule(model):
    images, labels = smooth_images(3), ["0", "1", "2"]
    result = classify(model, images, labels, draws=2)
    nats = log_likelihoods(model, model.data(images), labels, draws=2).mean(axis=0)
    np.testing.assert_allclose(result.log_likelihood, nats)
    expected = np.exp(nats - np.logaddexp.reduce(nats, axis=1, keepdims=True))
    np.testing.assert_allclose(result.posterior, expected, rtol=1e-6, atol=1e-12)
    assert result.best == [labels[index] for index in nats.argmax(axis=1)]
    ordered = np.sort(nats, axis=1)
    np.testing.assert_allclose(result.margin, ordered[:, 2] - ordered[:, 1])
    alone = classify(model, images, ["1"])
    assert alone.best == ["1"] * 3 and np.isinf(alone.margin).all() and (alone.posterior == 1).all()


def test_best_of(latent_flow):
    pipe = latent_flow.pipe
    best = best_of(pipe, ["a cat", "a dog"], 3, images=2, seed=10, draws=2)
    assert best.fits.shape == best.scores.shape == (4, 3)
    assert (best.scores[range(4), best.chosen] == best.scores.max(axis=1)).all()
    assert best.result.prompts == ["a cat", "a cat", "a dog", "a dog"]
    expected = [10 + 3 * (number % 2) + best.chosen[number] for number in range(4)]
    assert best.result.seeds == expected
    assert [each["seeds"] for each in best.result.metadata] == [[seed] for seed in expected]
    # A kept picture is the one that its seed makes.
    alone = pipe.generate("a dog", seed=int(expected[3]))
    np.testing.assert_allclose(np.array(alone.latents[0]), np.array(best.result.latents[3]), atol=1e-5)
    assert np.array_equal(alone.noise[0], best.result.noise[3])


def test_best_of_given_noise_and_all_that_belongs_to_a_picture(latent_flow):
    pipe = latent_flow.pipe
    first = pipe.generate("a cat", seed=1, images=4)
    best = best_of(pipe, "a cat", 2, images=2, noise=first.noise, keep_steps=True, verify=True)
    assert best.result.seeds == [None, None]
    kept = [2 * number + chosen for number, chosen in enumerate(best.chosen)]
    assert np.array_equal(best.result.noise, first.noise[kept])
    assert len(best.result.images) == len(best.result.steps) == len(best.result.stats.certificates) == 2


def test_the_weight_of_the_unprompted_likelihood(latent_flow):
    """At 1 it is the prompt fit that decides, at 0 the likelihood given the prompt; the noise is common to all."""
    pipe = latent_flow.pipe
    fit, likelihood, between = (best_of(pipe, "a cat", 4, seed=1, weight=weight) for weight in (1.0, 0.0, 0.25))
    np.testing.assert_array_equal(fit.scores, fit.fits)
    np.testing.assert_allclose(between.scores, 0.25 * fit.scores + 0.75 * likelihood.scores, rtol=1e-6)
    latents = np.array(pipe.generate("a cat", seed=range(1, 5)).latents)
    nats = log_likelihoods(latent_flow, latents, ["a cat"], numbers=[0] * 4).mean(axis=0)[:, 0]
    np.testing.assert_allclose(likelihood.scores[0], nats, rtol=1e-4)


def test_the_best_of_one_is_that_one(latent_flow):
    best = best_of(latent_flow.pipe, "", 1, seed=3)
    assert best.chosen.tolist() == [0] and best.result.seeds == [3]


def test_mistakes(latent_flow, pixel_flow, tmp_path):
    assert "nothing to score" in message(prompt_fit, latent_flow, smooth_images(1), ["a"], draws=0)
    assert "must differ" in message(classify, latent_flow, smooth_images(1), ["a", "a"])
    assert "nothing to score" in message(classify, latent_flow, smooth_images(1), [])
    assert "not 0" in message(best_of, latent_flow.pipe, "a", 0)
    assert "from 0 to 1, not 2" in message(best_of, latent_flow.pipe, "a", 2, weight=2)
    assert "empty prompt" in message(best_of, latent_flow.pipe, " ", 2)
    unconditional = open_picture_flow(write_class_model(tmp_path / "model", num_classes=0))
    assert "reads no prompts" in message(classify, unconditional, smooth_images(1), ["", " "])
    assert "knows no classes" in message(classify, unconditional, smooth_images(1), ["0"])


@pytest.mark.slow
def test_the_embedded_model_knows_its_pictures():
    model = open_picture_flow("demo")
    names = ["red apple", "rocket", "grinning face", "tulip"]
    images = model.pipe.generate(names, seed=1).images
    assert model.pipe.classify(images, names, draws=1).best == names
