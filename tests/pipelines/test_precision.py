"""A model in the precision that a GPU gets by default, computed on whatever is here."""

from __future__ import annotations

import warnings

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import message
from helpers.images import smooth_images
from helpers.model_directories import edit_weights, write_image_model

from mlx_starflow import load
from mlx_starflow.model_dir import weights
from mlx_starflow.model_dir.files import load_weights
from mlx_starflow.models.flow import products_in
from mlx_starflow.pipelines import mlx_backend

ROUND_TRIP = 1e-3
"""What editing promises of a picture's latents."""


@pytest.fixture
def on_metal(monkeypatch):
    """What is chosen automatically is what an M1 gets."""
    monkeypatch.setattr(weights, "device", lambda: "metal")
    monkeypatch.setattr(weights, "chip_generation", lambda: 1)


@pytest.fixture
def directory(tmp_path):
    return write_image_model(tmp_path / "model")


def beyond_float16(directory):
    """The first MLP of block 1 makes numbers that bfloat16 knows and float16 does not."""
    layer = "blocks.1.attn_blocks.0.mlp.main"
    held = load_weights(directory)
    changed = {f"{layer}.0": 1e6, f"{layer}.2": 1e-6}
    changes = {f"{name}.weight": factor * held[f"{name}.weight"] for name, factor in changed.items()}
    changes |= {f"{layer}.0.bias": 1e6 * held[f"{layer}.0.bias"]}
    edit_weights(directory, **{name.replace(".", "__"): value for name, value in changes.items()})


def test_editing_keeps_its_promise(on_metal, directory):
    pipe = load(directory)
    assert products_in(pipe.flow) == mx.float16
    _, error = pipe.encode(smooth_images(1), "a cat")
    assert error.flow_max < ROUND_TRIP
    assert products_in(pipe.flow) == mx.float16 and products_in(pipe.exact_flow()) == mx.float32


def test_a_precision_that_is_asked_for_is_what_editing_gets(on_metal, directory):
    pipe = load(directory, dtype="bfloat16")
    assert products_in(pipe.exact_flow()) == mx.bfloat16 and pipe.exact_flow() is pipe.flow


def test_editing_without_memory_for_float32_says_so(on_metal, directory, monkeypatch):
    pipe = load(directory)
    monkeypatch.setattr(mlx_backend, "available", lambda: 1)
    with pytest.warns(UserWarning, match="no memory for the flow in float32: editing is computed in float16"):
        assert pipe.exact_flow() is pipe.flow


def test_scores_are_float32s(on_metal, directory):
    """To 2e-4 nats a dimension."""
    images = smooth_images(3)
    half, whole = (
        np.array([each.nll for each in load(directory, dtype=dtype).score(images, "a cat", draws=2)])
        for dtype in (None, "float32")
    )
    assert np.abs(half - whole).max() < 2e-4


def test_numbers_beyond_float16(on_metal, directory):
    beyond_float16(directory)
    pipe = load(directory)
    with pytest.warns(UserWarning) as seen:
        made = pipe.generate("a cat", seed=1)
    (line,) = [str(each.message) for each in seen]
    assert line == (
        "what block 1 made of the noise is not finite: numbers left float16's range; from here on it is computed in "
        "bfloat16 (--dtype bfloat16 from the start)"
    )
    assert products_in(pipe.flow) == mx.bfloat16 and len(made.stats.evaluations) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = pipe.generate("a cat", seed=1)
    assert mx.array_equal(made.latents, again.latents)


def test_numbers_beyond_a_precision_that_was_asked_for(directory):
    beyond_float16(directory)
    error = message(load(directory, dtype="float16").generate, "a cat", seed=1)
    assert error.startswith("what block 1 made of the noise is not finite: try ")
    assert "not finite from block 1 on" in message(load(directory, dtype="float16").score, smooth_images(1))
