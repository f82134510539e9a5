"""The guided forward pass, and what a certificate says of right and of wrong samples."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny_flows import tiny_case

from mlx_starflow.errors import StarflowError
from mlx_starflow.sampling import Certificate, GuidedFlow, certify, sample


def test_without_guidance_it_is_the_flow(tiny):
    z = tiny.noise(tiny.flow(tiny.x, tiny.text).z)
    guided = GuidedFlow(tiny.flow, z.shape, tiny.text)
    difference = guided.forward(tiny.flow.tokens(tiny.x)) - tiny.flow.noise_tokens(z)
    assert mx.abs(difference).max().item() < 1e-4
    assert certify(tiny.flow, tiny.x, z, tiny.text).max < 1e-4


@pytest.mark.parametrize(
    ("case", "kind", "options"),
    [
        ("t2i", "reverse", {}),
        ("t2i", "reverse_cfg", {"guidance": 2.5}),
        ("t2i", "reverse_attn_temp_0.8", {"attn_temp": 0.8}),
        ("t2i_all_text", "reverse_cfg", {"guidance": 2.5}),
        ("t2i_shifted", "reverse_cfg", {"guidance": 2.5}),
        ("tarflow", "reverse_cfg", {"guidance": 1.5}),
        ("tarflow", "reverse_cfg_annealed", {"guidance": 1.5, "annealed_guidance": True}),
        ("tarflow", "reverse_cfg_b", {"guidance": 1.5, "guidance_target": "b"}),
        ("tarflow", "reverse_cfg_attn_temp_0.7", {"guidance": 0.8, "attn_temp": 0.7}),
    ],
)
def test_the_official_samples_are_right(golden, case, kind, options):
    golden = golden(case)
    null = golden.get("y_null") if "guidance" in options else None
    certificate = certify(golden.flow, golden[kind], golden["noise"], golden["y"], null, **options)
    assert certificate.max < 1e-3
    assert certificate.rms < certificate.max
    # And it is this guidance that they are samples of.
    wrong = {**options, "guidance": options.get("guidance", 0.0) + 0.5, "guidance_target": "ab"}
    null = golden.get("y_null")
    assert certify(golden.flow, golden[kind], golden["noise"], golden["y"], null, **wrong).max > 1e-2


def test_a_wrong_sample_is_found_out(tiny):
    z = tiny.noise(tiny.flow(tiny.x, tiny.text).z)
    wrong = np.array(tiny.x)
    wrong[1, ..., 1, 1, 0] += 0.1
    assert certify(tiny.flow, mx.array(wrong), z, tiny.text).max > 1e-2


def test_each_sample_has_its_own_condition():
    tiny = tiny_case("softplus")
    z = mx.random.normal(tiny.x.shape, key=mx.random.key(1))
    null = mx.concatenate([tiny.null_text, 2 * tiny.null_text])
    x = sample(tiny.flow, z, tiny.text, null, 1.3)
    assert certify(tiny.flow, x, z, tiny.text, null, 1.3).max < 1e-4


def test_figures():
    assert Certificate.of(np.array([[0.0, -0.4], [0.3, 0.0]])) == Certificate(pytest.approx(0.4), pytest.approx(0.25))
    assert Certificate.of(np.array([0.0, math.nan])) == Certificate(math.inf, math.inf)
    worst = Certificate.worst([Certificate(0.5, 0.3), Certificate(0.6, 0.1)])
    assert worst == Certificate(0.6, pytest.approx(math.sqrt(0.05)))
    assert str(Certificate(1.2e-4, 1e-5)) == "|f(x) - z| at most 1.2e-04, RMS 1.0e-05"


def test_arguments_are_checked():
    tiny = tiny_case("softplus")
    with pytest.raises(StarflowError, match="guidance must be 0 or more"):
        certify(tiny.flow, tiny.x, tiny.x, tiny.text, tiny.null_text, -1.0)
    with pytest.raises(StarflowError, match="latents have shape"):
        certify(tiny.flow, tiny.x[..., :1], tiny.x, tiny.text)
