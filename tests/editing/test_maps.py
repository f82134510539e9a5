"""Data to noise and back under prompts, guidance and mixtures."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny_flows import tiny_case

from mlx_starflow.editing.maps import BlendedFlow, cleaned, from_noise, to_noise
from mlx_starflow.models.tarflow import TarFlow
from mlx_starflow.sampling import GuidedFlow, SamplingOptions, denoise, sample


def close(first: mx.array, second: mx.array, tolerance: float = 2e-4) -> bool:
    return np.abs(np.array(first) - np.array(second)).max() < tolerance


def test_there_and_back(tiny):
    guided = GuidedFlow(tiny.flow, tiny.x.shape, tiny.text)
    z = to_noise(guided, tiny.x)
    assert close(z, tiny.noise(tiny.flow(tiny.x, tiny.text).z))
    assert close(from_noise(guided, z), tiny.x)
    assert close(from_noise(guided, z), sample(tiny.flow, z, tiny.text))


def conditions(tiny) -> tuple[mx.array, mx.array]:
    """Two conditions for a tiny flow that reads one."""
    if isinstance(tiny.flow, TarFlow):
        return mx.array([0, 1]), mx.array([2, -1])
    return tiny.text, tiny.text[::-1]


@pytest.fixture(params=["softplus", "exp_all_text", "shifted", "reversed", "language_model", "tarflow"])
def reading(request):
    """A tiny flow that reads a condition."""
    return tiny_case(request.param)


def test_strength_leads_from_one_condition_to_the_other(reading):
    flow, shape = reading.flow, reading.x.shape
    source, target = conditions(reading)
    z = to_noise(GuidedFlow(flow, shape, source), reading.x)
    assert close(from_noise(BlendedFlow(flow, shape, source, target, 0.0), z), reading.x)
    assert close(from_noise(BlendedFlow(flow, shape, source, target, 1.0), z), sample(flow, z, target))
    half = from_noise(BlendedFlow(flow, shape, source, target, 0.5), z)
    assert not close(half, reading.x, 1e-3) and not close(half, sample(flow, z, target), 1e-3)
    beyond = from_noise(BlendedFlow(flow, shape, source, target, 1.5), z)
    assert close(beyond, sample(flow, z, target, source, guidance=0.5))


def test_every_strength_is_invertible(reading):
    flow, shape = reading.flow, reading.x.shape
    for strength in (0.3, 1.4):
        blended = BlendedFlow(flow, shape, *conditions(reading), strength)
        assert close(from_noise(blended, to_noise(blended, reading.x)), reading.x)


def test_each_sample_can_have_its_own_strength(reading):
    flow, shape = reading.flow, reading.x.shape
    source, target = conditions(reading)
    z = to_noise(GuidedFlow(flow, shape, source), reading.x)
    together = from_noise(BlendedFlow(flow, shape, source, target, [0.25, 1.25]), z)
    for number, strength in enumerate((0.25, 1.25)):
        alone = from_noise(BlendedFlow(flow, shape, source, target, strength), z)
        assert close(together[number], alone[number])


def test_guided_maps_are_invertible(reading):
    null = mx.array([-1]) if isinstance(reading.flow, TarFlow) else reading.null_text
    guided = GuidedFlow(reading.flow, reading.x.shape, conditions(reading)[0], null, SamplingOptions(1.0))
    z = to_noise(guided, reading.x)
    assert not close(z, reading.noise(reading.flow(reading.x, conditions(reading)[0]).z), 1e-3)
    assert close(from_noise(guided, z), reading.x)


def test_uniform_noise_is_not_cleaned():
    tiny = tiny_case("tarflow")
    assert close(cleaned(tiny.flow, tiny.x, tiny.text), denoise(tiny.flow, tiny.x, tiny.text))
    tiny.flow.config.noise_type = "uniform"
    assert cleaned(tiny.flow, tiny.x, tiny.text) is tiny.x
