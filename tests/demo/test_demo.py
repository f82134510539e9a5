"""The embedded model: it loads, reads prompts, and inverts exactly."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_starflow import load, sample
from mlx_starflow.sampling import JacobiSettings, RollingSettings


@pytest.fixture(scope="module")
def pipe():
    return load("demo")


def test_the_first_example_of_the_readme(pipe):
    result = pipe.generate("a slice of pizza", seed=7)
    assert result.images[0].size == (64, 64)


def test_inversion_is_exact(pipe):
    latents = mx.array(np.random.default_rng(0).standard_normal((1, 16, 16, 4)).astype(np.float32))
    text = pipe.encode_prompts(["a red apple"])
    z = pipe.flow(latents, text).z
    for method in ("sequential", JacobiSettings(threshold=1e-10), RollingSettings(tolerance=1e-5)):
        back = sample(pipe.flow, z, text, method=method)
        assert np.abs(np.array(back) - np.array(latents)).max() < 1e-3
