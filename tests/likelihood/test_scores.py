"""Scores of pictures."""

from __future__ import annotations

import json
import math

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import message
from helpers.images import smooth_images
from helpers.model_directories import write_class_model

from mlx_starflow.likelihood import exact_nll, score
from mlx_starflow.likelihood.scores import score_data
from mlx_starflow.pipelines import open_model


def test_a_score_is_the_exact_likelihood(model):
    images = smooth_images(3)
    prompts = ["1", "", "2"]
    scores = score(model, images, prompts, draws=3, seed=5, batch_size=2)
    expected = exact_nll(model.flow, model.to_data(images), model.conditions(prompts), draws=3, seed=5)
    np.testing.assert_allclose([each.nll for each in scores], expected.total, rtol=1e-5)
    np.testing.assert_allclose([each.prior for each in scores], expected.prior, rtol=1e-5)
    assert scores[0].draws.shape == (3,)
    assert scores[0].standard_error == pytest.approx(scores[0].draws.std(ddof=1) / math.sqrt(3))


def test_the_surprise_map_sums_to_the_likelihood(model):
    for each in score(model, smooth_images(2), draws=2):
        assert each.surprise.shape == (4, 4)
        assert each.surprise.sum() / each.dimensions == pytest.approx(each.nll, abs=1e-4)


def test_company_does_not_matter(model):
    data = model.to_data(smooth_images(5))
    together = score_data(model, data, draws=2, batch_size=3)
    again = score_data(model, data[:2], draws=2, batch_size=1)
    for first, second in zip(together, again, strict=False):
        np.testing.assert_allclose(first.surprise, second.surprise, rtol=1e-4, atol=1e-4)


def test_pictures_are_cut_and_resized(latent_flow):
    wide = smooth_images(1, (40, 20))[0]
    square = latent_flow.fit(wide)
    assert square.size == (8, 8)
    (first,), (second,) = score(latent_flow, [wide]), score(latent_flow, [square])
    assert first.nll == pytest.approx(second.nll)
    (tall,) = score(latent_flow, [wide], size=(8, 16))
    assert tall.surprise.shape == (8, 4) and tall.dimensions == 128


def test_bits_only_of_dequantized_pixels(model, tmp_path):
    (plain,) = score(model, smooth_images(1), draws=1)
    assert plain.bits is None and "bits_per_pixel_dimension" not in plain.to_dict()
    assert math.isnan(plain.standard_error) and plain.to_dict()["standard_error"] is None
    pixels = open_model(write_class_model(tmp_path / "model", noise_type="uniform"))
    (each,) = score(pixels, smooth_images(1))
    assert each.bits == pytest.approx((each.nll + math.log(128)) / math.log(2))
    assert json.loads(json.dumps(each.to_dict()))["bits_per_pixel_dimension"] == each.bits


def test_learned_variances_of_the_prior_count(tmp_path):
    flow = open_model(write_class_model(tmp_path / "model", nvp=False, num_classes=0))
    data = flow.to_data(smooth_images(2))
    expected = exact_nll(flow.flow, data)
    before = expected.total
    flow.flow.var = mx.ones_like(flow.flow.var)
    assert np.abs(exact_nll(flow.flow, data).total - before).max() > 0.01


def test_mistakes(model):
    assert "there are 2 prompts for 3 pictures" in message(score, model, smooth_images(3), ["", ""])
    assert "there are no pictures" in message(score, model, [])
    assert "drawn 1 to 10,000 times" in message(score, model, smooth_images(1), draws=0)


def test_classes_are_numbers(pixel_flow):
    assert "takes no prompt 'cat' but a number from 0 to 2" in message(score, pixel_flow, smooth_images(1), "cat")
    assert "from 0 to 2" in message(score, pixel_flow, smooth_images(1), "3")
