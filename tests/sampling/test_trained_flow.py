"""How sampling converges on a flow that has learnt something: 256 tokens of an autoencoder's latents."""

from __future__ import annotations

import mlx.core as mx
import pytest
from helpers.paths import DATA

from mlx_starflow import load_flow
from mlx_starflow.media.noise import draw_noise
from mlx_starflow.model_dir.quantization import dequantize_module
from mlx_starflow.sampling import RollingSettings, SamplingTrace, certify, sample
from mlx_starflow.sampling.tuning import tune


@pytest.fixture(autouse=True)
def computed_by() -> None:
    """C++ where there is a compiler, else MLX: that both converge alike the other tests of sampling say."""


@pytest.fixture(scope="module")
def trained():
    """The flow, and what one picture of it is made of: noise, texts and guidance."""
    flow = load_flow(DATA / "latent_flow")
    dequantize_module(flow)
    texts = mx.load(str(DATA / "latent_flow/text.safetensors"))
    return flow, mx.array(draw_noise([7], (16, 16, 4))), texts["text"], texts["null"], 2.5


def evaluations(trained, method) -> tuple[int, float]:
    """How many network evaluations sampling takes, and its certificate."""
    trace = SamplingTrace()
    x = sample(*trained, method, trace=trace)
    return sum(trace.evaluations), certify(trained[0], x, *trained[1:]).max


def test_a_rolling_window_needs_half_of_the_evaluations_and_is_right(trained):
    blocks, off = evaluations(trained, "jacobi")
    rolling, residual = evaluations(trained, RollingSettings())
    assert rolling <= 0.55 * blocks and residual <= 0.1 * off
    assert evaluations(trained, "sequential")[1] < 1e-3


def test_a_plan_as_right_as_the_official_blocks_takes_a_quarter_of_their_evaluations(trained):
    blocks, off = evaluations(trained, "jacobi")
    plan = tune(*trained, tolerance=off, least="evaluations")
    few, residual = evaluations(trained, plan)
    assert few <= blocks / 4 and residual <= off
