"""The embedded model: it loads, draws what the prompt says, and inverts exactly."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_starflow import load, sample
from mlx_starflow.sampling import JacobiSettings, RollingSettings


@pytest.fixture(scope="module")
def pipe():
    return load("demo")


def distance(first: Image.Image, second: Image.Image) -> float:
    """Root mean square, in levels of 255."""
    difference = np.asarray(first.convert("RGB"), float) - np.asarray(second.convert("RGB"), float)
    return float(np.sqrt(np.square(difference).mean()))


def test_the_first_example_of_the_readme(pipe):
    """It is the picture that this command made on another machine; half precision moves it by 0.3 levels."""
    expected = Image.open(Path(__file__).with_name("pizza.png"))
    image = pipe.generate("a slice of pizza", seed=7).images[0]
    assert image.size == (64, 64)
    assert distance(image, expected) < 3
    # A white picture is 70 away, the same prompt's picture of another seed 14, that of another prompt 72.
    assert distance(Image.new("RGB", (64, 64), "white"), expected) > 50
    other_seed, other_prompt = pipe.generate(["a slice of pizza", "a rocket"], seed=8).images
    assert 3 < distance(other_seed, expected) < 30 < distance(other_prompt, expected)


def test_inversion_is_exact(pipe):
    latents = mx.array(np.random.default_rng(0).standard_normal((1, 16, 16, 4)).astype(np.float32))
    text = pipe.encode_prompts(["a red apple"])
    z = pipe.flow(latents, text).z
    for method in ("sequential", JacobiSettings(threshold=1e-10), RollingSettings(tolerance=1e-5)):
        back = sample(pipe.flow, z, text, method=method)
        assert np.abs(np.array(back) - np.array(latents)).max() < 1e-3
