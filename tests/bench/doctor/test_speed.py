"""Lines about speed: figures for the chips whose bandwidth is known."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_starflow.bench.doctor import speed
from mlx_starflow.planning.memory import ModelConfigs


def line(name):
    return next(check for check in speed.checks() if check.name == name).run()


@pytest.mark.parametrize(("gigabytes", "verdict"), [(290, "ok"), (160, "ok"), (140, "failed")])
def test_bandwidth_of_a_known_chip(monkeypatch, gigabytes, verdict):
    """There are two chips called M3 Max, of 300 and of 400 GB/s."""
    monkeypatch.setattr(speed, "processor", lambda: "Apple M3 Max")
    monkeypatch.setattr(speed, "bandwidth", lambda: gigabytes * 1e9)
    found = line("memory bandwidth")
    assert found.verdict == verdict and "of 300" in found.measured


def test_bandwidth_of_another_processor(monkeypatch):
    monkeypatch.setattr(speed, "processor", lambda: "Apple Paravirtual device")
    found = line("memory bandwidth")
    assert found.verdict == "not applicable" and "GB/s" in found.measured and found.values["bandwidth"] > 0


def test_evaluations_of_the_embedded_model(monkeypatch):
    monkeypatch.setattr(speed, "backend", lambda: "CPU")
    found = line("evaluation by width")
    assert found.values.keys() == {f"width_{count}" for count in (1, 2, 4, 8, 16)}
    assert "embedded model" in found.measured


def test_windows_that_gain_nothing(monkeypatch):
    seconds = iter([1.0, 2.0, 4.0, 8.5, 16.0, 1.0])
    monkeypatch.setattr(speed, "best", lambda function: next(seconds))
    assert line("evaluation by width").failed


def test_a_block_of_the_released_model_on_a_gpu(monkeypatch):
    """Small here, and with the default precision of this machine."""
    released = ModelConfigs.of_release("apple/starflow")
    released.flow.channels, released.flow.num_heads, released.flow.top_block = 128, 2, None
    monkeypatch.setattr(ModelConfigs, "of_release", lambda name: released)
    monkeypatch.setattr(speed, "backend", lambda: "Metal")
    monkeypatch.setattr(speed, "available", lambda: speed.ENOUGH)
    monkeypatch.setattr(speed, "bandwidth", lambda: 1e9)
    found = line("evaluation by width")
    assert found.values.keys() == {f"width_{count}" for count in speed.WIDTHS} | {"weights"}
    assert "3 B" in found.measured and "reading its weights takes" in found.measured


def test_what_it_reads(monkeypatch):
    calls = []
    monkeypatch.setattr(speed, "best", lambda function: calls.append(function()) or 0.5)
    side = 4096 if mx.default_device() == mx.cpu else 8192
    assert speed.bandwidth() == side**2 * speed.automatic_dtype().size / 0.5
