"""Windows in half precision: they converge as in float32, and know what they can resolve."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.paths import DATA
from helpers.tiny_flows import tiny_case

from mlx_starflow import load, load_flow
from mlx_starflow.media.noise import draw_noise
from mlx_starflow.model_dir.quantization import dequantize_module
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.models.flow import is_layer_weight, products_in
from mlx_starflow.sampling import (
    Certificate,
    GuidedFlow,
    JacobiSettings,
    RollingSettings,
    SamplingOptions,
    SamplingTrace,
    certify,
    sample,
)
from mlx_starflow.sampling.jacobi import LEAST, STRETCH
from mlx_starflow.sampling.noise_floor import HALF, moved
from mlx_starflow.sampling.sampler import invert_block

AS_FLOAT32 = 1.1
"""A window's evaluations in half precision, over those in float32: what measuring the floor may cost."""

PROMPTS = ["a slice of pizza", "a fox", "two fish under water"]


@pytest.fixture(autouse=True)
def computed_by() -> None:
    """MLX computes half precision anywhere; float32 is computed by what is there."""


@pytest.fixture(scope="module")
def embedded():
    """(flow in a precision) and what its samples are made of, one a prompt, at its own guidance and temperature."""
    pipe = load("demo", dtype="float32")
    *texts, null = mx.split(pipe.encode_prompts([*PROMPTS, ""]), len(PROMPTS) + 1)
    z = pipe.settings.temperature * mx.array(draw_noise(range(7, 7 + len(PROMPTS)), pipe.latent_shape()))
    tasks = [(z[i : i + 1], text, null, pipe.settings.guidance) for i, text in enumerate(texts)]
    return lambda dtype: dense("demo", dtype), tasks


@pytest.fixture(scope="module")
def trained():
    """The same of the flow of 256 tokens, at guidance 2.5."""
    texts = mx.load(str(DATA / "latent_flow/text.safetensors"))
    task = mx.array(draw_noise([7], (16, 16, 4))), texts["text"], texts["null"], 2.5
    return lambda dtype: dense(DATA / "latent_flow", dtype), [task]


def dense(model, dtype: str):
    flow = load_flow(model, dtype="float32")
    dequantize_module(flow)
    kind = getattr(mx, dtype)
    layers = [(name, weight.astype(kind)) for name, weight in parameters(flow).items() if is_layer_weight(name)]
    flow.load_weights(layers, strict=False)
    assert products_in(flow) == kind
    return flow


def sampled(of, dtype: str, method) -> tuple[int, Certificate, list[float]]:
    """Evaluations of all samples, the worst certificate, and the floors of all blocks."""
    make, tasks = of
    flow, evaluations, certificates, floors = make(dtype), 0, [], []
    for task in tasks:
        trace = SamplingTrace()
        x = sample(flow, *task, method, trace=trace)
        evaluations += sum(trace.evaluations)
        certificates.append(certify(flow, x, *task))
        floors += trace.noise_floors
    return evaluations, Certificate.worst(certificates), floors


@pytest.mark.parametrize("tolerance", [1e-3, 1e-2])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_embedded_model_takes_as_many_evaluations_as_in_float32(embedded, dtype, tolerance):
    whole, _, none = sampled(embedded, "float32", RollingSettings(tolerance=tolerance))
    half, certificate, floors = sampled(embedded, dtype, RollingSettings(tolerance=tolerance))
    assert half <= AS_FLOAT32 * whole
    assert not any(none)
    if tolerance == 1e-3:
        # A few dozens of roundings, and what comes of letting tokens go at twice that in three blocks.
        assert 2 < max(floors) / HALF[getattr(mx, dtype)] < 60
        assert certificate.max < 8 * max(floors)


@pytest.mark.slow
def test_a_trained_flow(trained):
    """Without a plan, a window takes half the evaluations of the official blocks and is closer, as in float32."""
    whole = sampled(trained, "float32", RollingSettings())[0]
    blocks, off, _ = sampled(trained, "float32", JacobiSettings())
    half, certificate, floors = sampled(trained, "float16", RollingSettings())
    assert half <= AS_FLOAT32 * whole and half <= 0.6 * blocks
    assert certificate.max < 0.3 * off.max
    assert 5e-3 < floors[0] < 5e-2


def test_a_tolerance_above_the_floor_stays(embedded):
    make, (task, *_) = embedded
    flow, trace = make("float16"), SamplingTrace()
    x = sample(flow, *task, RollingSettings(tolerance=0.05), trace=trace)
    assert trace.noise_floor is None or trace.noise_floor < 0.025
    assert certify(flow, x, *task).max < 0.15


def test_what_is_moved():
    x = mx.array(np.random.default_rng(0).normal(size=(2, 3, 50)).astype(np.float32))
    for dtype, rounding in HALF.items():
        relative = mx.abs(moved(x, dtype) / x - 1)
        assert mx.abs(relative - rounding / 4).max().item() < 1e-6
        assert mx.array_equal(moved(x, dtype), moved(x, dtype))


def test_certificates_say_the_floor():
    one, other = Certificate(0.1, 0.01, 0.02), Certificate(0.2, 0.01)
    assert str(one).endswith("RMS 1.0e-02 (this precision resolves 2.0e-02)") and str(other).endswith("RMS 1.0e-02")
    assert Certificate.worst([one, other]).noise_floor == 0.02 and Certificate.worst([other]).noise_floor is None


def test_a_window_in_vain_gives_way_to_single_tokens():
    """A network that says something else of all tokens but the first each time: a window cannot help."""
    tiny = tiny_case("softplus")
    flow = GuidedFlow(tiny.flow, (1, 16, 16, 2), tiny.text[:1], None, SamplingOptions())
    z = mx.random.normal((1, 256, 2), key=mx.random.key(0))
    index = max(flow.active())
    decoder, widths = flow.decoder(index, 1, 256), []
    predict = decoder.predict

    def restless(start, stop):
        mu, log_sigma = predict(start, stop)
        widths.append(stop - start)
        return mu + mx.where(mx.arange(stop - start)[:, None] > 0, len(widths), 0.0), log_sigma

    decoder.predict = restless
    x = invert_block(decoder, z, RollingSettings(window=64))
    assert widths == [64] * STRETCH + [1] * STRETCH + [64] * STRETCH + [1] * 2 * STRETCH + [64] * STRETCH + [1] * 64
    assert LEAST > 1 and len(widths) == 256
    exact = invert_block(flow.decoder(index, 1, 256), z, RollingSettings(window=1))
    assert mx.abs(x - exact).max().item() < 1e-4
