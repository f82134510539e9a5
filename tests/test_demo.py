"""The embedded model: it loads, it reads prompts, and its pictures are what they were when it was trained."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_starflow import load, sample


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
    for method in ("sequential", "jacobi"):
        error = np.abs(np.array(sample(pipe.flow, z, text, method=method)) - np.array(latents)).max()
        assert error < (1e-3 if method == "sequential" else 0.05)
