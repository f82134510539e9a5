"""Which of a kernel and its plain version runs, and that whole models give the same numbers with either."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.tiny_flows import tiny_case
from mlx.utils import tree_flatten

from mlx_starflow import kernels
from mlx_starflow.sampling import denoise, sample


@pytest.fixture
def undecided():
    kernels.by_default.cache_clear()
    yield
    kernels.by_default.cache_clear()


@pytest.mark.parametrize(
    ("metal", "device", "variable", "on"),
    [
        (True, mx.gpu, None, True),
        (True, mx.gpu, "1", True),
        (True, mx.gpu, "0", False),
        (True, mx.cpu, None, False),
        (False, mx.gpu, None, False),  # CUDA
        (False, mx.cpu, "1", False),
    ],
)
def test_decided_once(monkeypatch, undecided, metal, device, variable, on):
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device))
    monkeypatch.delenv("MLX_STARFLOW_KERNELS", raising=False)
    if variable is not None:
        monkeypatch.setenv("MLX_STARFLOW_KERNELS", variable)
    assert kernels.enabled() is on
    monkeypatch.setenv("MLX_STARFLOW_KERNELS", "0" if on else "1")
    monkeypatch.setattr(mx.metal, "is_available", lambda: not metal)
    assert kernels.enabled() is on


def test_switched_for_a_comparison(undecided):
    before = kernels.enabled()
    with kernels.switched(True):
        assert kernels.enabled()
        with pytest.raises(RuntimeError), kernels.switched(False):
            assert not kernels.enabled()
            raise RuntimeError
        assert kernels.enabled()
    assert kernels.enabled() is before


def test_off_means_off(monkeypatch, undecided):
    monkeypatch.setenv("MLX_STARFLOW_KERNELS", "0")
    monkeypatch.setattr(mx.fast, "metal_kernel", lambda **_: pytest.fail("a kernel was made"))
    tiny = tiny_case("modern")
    sample(tiny.flow, tiny.flow(tiny.x, tiny.text).z, tiny.text)


@pytest.mark.parametrize("family", ["softplus", "shifted_softplus", "modern", "language_model", "tarflow"])
def test_models_give_the_same_numbers(kernels_on, in_mlx, family):
    tiny = tiny_case(family)
    flow, text = tiny.flow, tiny.text
    null = None if family == "tarflow" else tiny.null_text

    def everything() -> list[mx.array]:
        out = flow(tiny.x, text)
        z = tiny.noise(out.z)
        gradients = nn.value_and_grad(flow, lambda x: flow(x, text).loss())(tiny.x)[1]
        results = [
            out.z,
            out.log_det,
            mx.concatenate([value.reshape(-1) for _, value in tree_flatten(gradients)]),
            denoise(flow, tiny.x, text),
            sample(flow, z, text),
            sample(flow, z, text, method="jacobi"),
            sample(flow, z, text, null, guidance=1.5),
            sample(flow, z, text, null, guidance=1.5, annealed_guidance=True),
        ]
        mx.eval(results)
        return results

    # The shim computes as soon as it is called, which nothing that is being compiled may do.
    mx.disable_compile()
    try:
        with kernels_on():
            actual = everything()
    finally:
        mx.enable_compile()
    for found, wanted in zip(actual, everything(), strict=True):
        assert np.abs(np.array(found - wanted)).max() < 2e-5 * max(1, float(mx.abs(wanted).max()))
    assert np.abs(np.array(actual[4] - tiny.x)).max() < 2e-4
