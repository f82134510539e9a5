"""Which precision is used unless one is asked for, on devices that need not be there."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_starflow.model_dir import weights
from mlx_starflow.model_dir.precision import DTYPES, Precision, automatic


@pytest.mark.parametrize(
    ("device", "chip", "quantized_flow", "dtype", "fallback"),
    [
        ("cpu", None, False, "float32", None),
        ("cpu", None, True, "float32", None),
        ("metal", 1, False, "float16", "bfloat16"),
        ("metal", 2, True, "float32", None),
        ("metal", 3, False, "float16", "bfloat16"),
        ("metal", 5, False, "float16", "bfloat16"),
        ("metal", None, False, "float16", "bfloat16"),
        ("cuda", None, False, "float16", "bfloat16"),
        ("cuda", None, True, "float32", None),
    ],
)
def test_policy(device, chip, quantized_flow, dtype, fallback):
    found = automatic(device, chip, quantized_flow=quantized_flow)
    assert (found.dtype, found.fallback) == (dtype, fallback)
    assert found.dtype in DTYPES and found.why
    assert ("bfloat16 units" in found.why) == (device == "metal" and chip in (1, 2) and not quantized_flow)


@pytest.mark.parametrize(
    ("cpu", "metal", "name", "device", "chip"),
    [
        (True, False, "AMD EPYC", "cpu", None),
        (True, True, "Apple M2 Pro", "cpu", None),  # the CPU of a Mac
        (False, True, "Apple M1", "metal", 1),
        (False, True, "Apple M3 Ultra", "metal", 3),
        (False, True, "Apple M10 Max", "metal", 10),
        (False, True, "Apple Paravirtual device", "metal", None),
        (False, True, None, "metal", None),
        (False, False, "NVIDIA H200", "cuda", None),
    ],
)
def test_what_there_is(chosen_here, monkeypatch, cpu, metal, name, device, chip):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu if cpu else mx.gpu))
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    monkeypatch.setattr(mx, "device_info", lambda: {} if name is None else {"device_name": name})
    assert weights.device() == device and weights.chip_generation() == chip
    assert isinstance(weights.automatic_precision(), Precision)
