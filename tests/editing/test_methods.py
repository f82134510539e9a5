"""Edits by a method, by the model's sampling plan, with adapters, and with little memory."""

from __future__ import annotations

import warnings

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import message
from helpers.images import smooth_images

from mlx_starflow import load, load_flow
from mlx_starflow.pipelines import open_model
from mlx_starflow.sampling import JacobiSettings, RollingSettings, SamplingPlan, SequentialSettings
from mlx_starflow.training.finetuning.adapters import AdapterConfig, adapter_layers, attach, save_adapter

WAYS = {
    "encode": lambda model, image, **options: model.encode(image, **options)[1].flow_max,
    "decode": lambda model, image, **options: model.decode(model.encode(image, check=False)[0], **options)[1],
    "reprompt": lambda model, image, **options: model.reprompt(image, "a", "b", strength=0.5, **options).data,
    "vary": lambda model, image, **options: model.vary(image, strength=0.4, **options).data,
    "interpolate": lambda model, image, **options: model.interpolate(image, image, shares=0.3, **options).data,
    "inpaint": lambda model, image, **options: model.inpaint(image, "4,0,4,8", steps=1, rounds=1, **options).data,
}


def plan(model, settings, tolerance=1e-2):
    return SamplingPlan((settings,) * len(model.flow.blocks), tolerance, {})


@pytest.mark.parametrize("way", WAYS)
def test_every_edit_takes_a_method(latent_flow, evaluations, way):
    image = smooth_images(1)[0]
    exact = WAYS[way](latent_flow, image, method="sequential")
    assert set(evaluations) == {"invert"}
    evaluations.clear()
    for method in (RollingSettings(window=4, tolerance=1e-5), "rolling"):
        close = WAYS[way](latent_flow, image, method=method)
        np.testing.assert_allclose(close, exact, atol=2e-2)
    assert set(evaluations) == {"predict"}
    evaluations.clear()
    WAYS[way](latent_flow, image, method=JacobiSettings(block_size=4))
    assert set(evaluations) == {"sweep"}
    assert "unknown sampling method 'fast'" in message(WAYS[way], latent_flow, image, method="fast")
    assert "method must be" in message(WAYS[way], latent_flow, image, method=3)


def test_the_plan_of_the_model_is_the_default_of_edits(latent_flow, evaluations, monkeypatch):
    image = smooth_images(1)[0]
    monkeypatch.setattr(latent_flow, "plan", plan(latent_flow, RollingSettings(window=4, tolerance=1e-5)))
    for name, way in WAYS.items():
        way(latent_flow, image, method="auto")
        if name not in ("encode", "decode"):
            way(latent_flow, image)
    assert set(evaluations) == {"predict"}
    # The way to noise and back is exact unless it is asked for otherwise.
    evaluations.clear()
    for name in ("encode", "decode"):
        WAYS[name](latent_flow, image)
    assert set(evaluations) == {"invert"}
    assert latent_flow.inversion() is latent_flow.inversion("auto") is latent_flow.plan
    assert latent_flow.inversion("jacobi") == "jacobi"


def test_what_a_plan_does_not_keep_is_said(latent_flow, monkeypatch):
    image = smooth_images(1)[0]
    coarse = JacobiSettings(block_size=16, max_iterations=1)
    monkeypatch.setattr(latent_flow, "plan", plan(latent_flow, coarse, 1e-4))
    with pytest.warns(UserWarning, match="the sampling plan allows 1.0e-04; give the method sequential"):
        latent_flow.vary(image, strength=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        latent_flow.vary(image, strength=0.5, method="sequential")
    monkeypatch.setattr(latent_flow, "plan", plan(latent_flow, SequentialSettings(), 1e-12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what no other method would better
        latent_flow.vary(image, strength=0.5)
    monkeypatch.setattr(latent_flow, "plan", SamplingPlan((SequentialSettings(),), 1e-2, {}))
    assert "the sampling plan is for 1 blocks" in message(latent_flow.vary, image)


def test_strength_and_strengths(latent_flow):
    image = smooth_images(1)[0]
    for edit in (latent_flow.vary, lambda image, **options: latent_flow.reprompt(image, "a", "b", **options)):
        (one,) = edit(image, strength=0.5).images
        assert edit(image, strengths=[0.5]).images == edit(image, strengths=0.5).images == [one]
        assert edit(image, strength=0.5).places == [0.5]
        assert "give strength, or strengths" in message(edit, image, strength=0.5, strengths=[0.5])
        assert "strengths must be a number or a list of numbers" in message(edit, image, strengths="0.5")
    assert latent_flow.vary(image).places == [0.7] and latent_flow.reprompt(image, "a", "b").places == [1.0]


def test_little_memory_and_the_same_edits(latent_flow):
    image, frugal = smooth_images(1)[0], load(latent_flow.directory, low_memory=True)
    for name, way in WAYS.items():
        np.testing.assert_allclose(way(frugal, image), way(latent_flow, image), atol=1e-5, err_msg=name)
        assert frugal.backend.held <= {"vae"}, name


def test_edits_and_scores_with_adapters(latent_flow, tmp_path):
    image, flow = smooth_images(1)[0], load_flow(latent_flow.directory)
    config = AdapterConfig(rank=2)
    attach(flow, config)
    for layer in adapter_layers(flow).values():
        layer.lora_b = 0.05 * mx.ones(layer.lora_b.shape)
    adapter = save_adapter(tmp_path / "adapter", flow, config)
    tuned = open_model(latent_flow.directory, adapters=[(adapter, 1.0)])
    assert tuned.score(image)[0].nll != latent_flow.score(image)[0].nll
    edit = tuned.vary(image, strength=0.5)
    assert not np.allclose(edit.data, latent_flow.vary(image, strength=0.5).data, atol=1e-3)
    assert edit.metadata[0]["adapters"] == [(str(adapter), 1.0)]
    np.testing.assert_allclose(tuned.vary(image, strength=0.0).data, tuned.to_data(image), atol=1e-3)
