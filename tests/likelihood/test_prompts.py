"""Prompt fit and classification."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.commands import message
from helpers.images import smooth_images
from helpers.model_directories import write_class_model
from helpers.precision import bound, roundings

from mlx_starflow.likelihood import classify, drawn_nats, prompt_fit
from mlx_starflow.likelihood.prompts import log_likelihoods
from mlx_starflow.pipelines import load, open_model


def test_log_likelihoods_are_those_of_every_pair(model):
    data = model.to_data(smooth_images(3))
    prompts = ["0", "2", ""]
    nats = log_likelihoods(model, data, prompts, draws=2, seed=3, batch_size=4)
    assert nats.shape == (2, 3, 3)
    for number, prompt in enumerate(prompts):
        expected = -drawn_nats(model.flow, data, model.conditions([prompt] * 3), draws=2, seed=3).sum(axis=(2, 3))
        np.testing.assert_allclose(nats[:, :, number], expected, rtol=1e-5, atol=1e-3)


def test_prompt_fit_is_what_the_prompt_adds(model):
    fits = prompt_fit(model, smooth_images(2), ["1", ""], draws=3)
    assert fits.shape == (3, 2, 2)
    np.testing.assert_allclose(fits[:, :, 1], 0, atol=bound(1e-4, roundings(2)))
    assert np.abs(fits[:, :, 0]).min() > 1e-4


def test_classify_is_bayes_rule(model):
    images, labels = smooth_images(3), ["0", "1", "2"]
    result = classify(model, images, labels, draws=2)
    nats = log_likelihoods(model, model.to_data(images), labels, draws=2).mean(axis=0)
    np.testing.assert_allclose(result.log_likelihood, nats)
    expected = np.exp(nats - np.logaddexp.reduce(nats, axis=1, keepdims=True))
    np.testing.assert_allclose(result.posterior, expected, rtol=1e-6, atol=1e-12)
    assert result.best == [labels[index] for index in nats.argmax(axis=1)]
    ordered = np.sort(nats, axis=1)
    np.testing.assert_allclose(result.margin, ordered[:, 2] - ordered[:, 1])
    alone = classify(model, images, ["1"])
    assert alone.best == ["1"] * 3 and np.isinf(alone.margin).all() and (alone.posterior == 1).all()


def test_mistakes(latent_flow, pixel_flow, tmp_path):
    assert "drawn 1 to 10,000 times" in message(prompt_fit, latent_flow, smooth_images(1), ["a"], draws=0)
    assert "must differ" in message(classify, latent_flow, smooth_images(1), ["a", "a"])
    assert "nothing to score" in message(classify, latent_flow, smooth_images(1), [])
    unconditional = open_model(write_class_model(tmp_path / "model", num_classes=0))
    assert "reads no prompts" in message(classify, unconditional, smooth_images(1), ["", " "])
    assert "knows no classes" in message(classify, unconditional, smooth_images(1), ["0"])


@pytest.mark.slow
def test_the_embedded_model_knows_its_pictures():
    model = load("demo")
    for names in (
        ["a red apple", "a rocket", "a smiley", "a tulip"],
        ["a cat to the left of a dog on grass", "a dog to the left of a cat on grass", "a cat on grass", "two cats"],
    ):
        images = model.generate(names, seed=1).images
        assert model.classify(images, names, draws=1).best == names
