"""What memory there is on a machine, and what Metal is told of it."""

from __future__ import annotations

import mlx.core as mx
import pytest
from helpers.metal import OWN, Metal

from mlx_starflow.kernels import memory


def test_usable():
    assert memory.usable(16 * 2**30) == int(0.7 * 16 * 2**30)
    assert memory.usable(64 * 2**30) == 48 * 2**30
    assert memory.available() > 0


def test_a_cuda_gpu_has_its_own_memory(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "NVIDIA H200", "total_memory": 1000})
    assert memory.available() == 900


def test_elsewhere_nothing_is_bounded(monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    for name in ("set_cache_limit", "set_wired_limit", "clear_cache"):
        monkeypatch.setattr(mx, name, pytest.fail)
    with memory.bounded():
        memory.give_back()


def test_limits_come_back(monkeypatch):
    metal = Metal(monkeypatch)
    with pytest.raises(KeyError), memory.bounded():
        assert metal.limits == {"cache": 8 * 2**30, "wired": 64 * 2**30}
        with memory.bounded():
            pass
        assert metal.bounds
        raise KeyError
    assert metal.limits == OWN


def test_limits_come_back_after_a_gpu_that_failed(monkeypatch):
    metal = Metal(monkeypatch)

    def fail():
        raise RuntimeError("the command buffer failed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError), memory.bounded():
        patch.setattr(metal, "synchronize", fail, raising=False)
    assert metal.limits == OWN
    with memory.bounded():
        assert metal.bounds


def test_streams_that_take_turns(monkeypatch):
    """The one that began first ends first, as when a user follows two streams."""
    metal = Metal(monkeypatch)
    first, second = memory.bounded(), memory.bounded()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert metal.bounds
    second.__exit__(None, None, None)
    assert metal.limits == OWN
