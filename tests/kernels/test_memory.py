"""What memory there is on a machine, and what Metal is told of it."""

from __future__ import annotations

import mlx.core as mx
import pytest

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


def test_metal_limits_do_nothing_elsewhere(monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx, "set_cache_limit", pytest.fail)
    monkeypatch.setattr(mx, "set_wired_limit", pytest.fail)
    with memory.metal_limits():
        pass


def test_metal_limits_come_back(monkeypatch):
    limits = {"cache": 7, "wired": 0}

    def setter(name):
        def put(value):
            limits[name], old = value, limits[name]
            return old

        return put

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 800, "memory_size": 1000})
    monkeypatch.setattr(mx, "set_cache_limit", setter("cache"))
    monkeypatch.setattr(mx, "set_wired_limit", setter("wired"))
    with pytest.raises(KeyError), memory.metal_limits():
        assert limits == {"cache": 100, "wired": 800}
        raise KeyError
    assert limits == {"cache": 7, "wired": 0}
