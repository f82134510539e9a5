"""The embedded model: it loads, draws what the prompt says, and inverts exactly."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_starflow import load, sample
from mlx_starflow.sampling import JacobiSettings, RollingSettings

PROMPT = "a fox to the left of a cactus at night"


@pytest.fixture(scope="module")
def pipe():
    return load("demo")


def distance(first: Image.Image, second: Image.Image) -> float:
    """Root mean square, in levels of 255."""
    difference = np.asarray(first.convert("RGB"), float) - np.asarray(second.convert("RGB"), float)
    return float(np.sqrt(np.square(difference).mean()))


def test_the_first_example_of_the_readme(pipe):
    """It is the picture that this command made on another machine; half precision moves it by 0.3 levels."""
    expected = Image.open(Path(__file__).with_name("fox.png"))
    image = pipe.generate(PROMPT, seed=7).images[0]
    assert image.size == (128, 128)
    assert distance(image, expected) < 3
    assert distance(Image.new("RGB", image.size, "white"), expected) > 50
    other_seed, other_prompt = pipe.generate([PROMPT, "a banana on a yellow background"], seed=8).images
    assert 3 < distance(other_seed, expected) < distance(other_prompt, expected)


def test_the_background_is_the_one_asked_for(pipe):
    """Colours at the edges, where no object is."""
    colours = {"white": (250, 250, 250), "red": (216, 58, 58), "blue": (58, 108, 214), "black": (28, 28, 32)}
    images = pipe.generate([f"a small fox on a {colour} background" for colour in colours], seed=1).images
    edges = [np.asarray(image, float)[[2, -3]].mean(axis=(0, 1)) for image in images]
    nearest = [min(colours, key=lambda name: np.square(edge - colours[name]).sum()) for edge in edges]
    assert nearest == list(colours)


def test_inversion_is_exact(pipe):
    latents = mx.array(np.random.default_rng(0).standard_normal((1, 16, 16, 4)).astype(np.float32))
    text = pipe.encode_prompts([PROMPT])
    z = pipe.flow(latents, text).z
    for method in ("sequential", JacobiSettings(threshold=1e-10), RollingSettings(tolerance=1e-5)):
        back = sample(pipe.flow, z, text, method=method)
        assert np.abs(np.array(back) - np.array(latents)).max() < 1e-3


def test_its_student_makes_nearly_the_same_in_one_evaluation(pipe):
    prompts = [PROMPT, "two fish under water", "a cat on a grey background", "a crown above a cat"]
    made = pipe.generate(prompts, seed=1, student="demo")
    assert made.stats.student_evaluations == 1 and not any(made.stats.evaluations)
    own, its, other = (
        np.array(result.latents) for result in (pipe.generate(prompts, seed=1), made, pipe.generate(prompts, seed=11))
    )
    distances, others = (np.sqrt(np.square(its - exact).mean((1, 2, 3))) for exact in (own, other))
    assert (distances < 0.4 * own.std()).all() and (distances < others).all()
