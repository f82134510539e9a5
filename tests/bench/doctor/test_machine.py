"""Each line about the machine fails when what it checks is broken."""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_starflow import cpu
from mlx_starflow.bench.doctor import machine
from mlx_starflow.bench.doctor.checks import NotApplicable

ROOT = Path(__file__).parents[3]


def line(name):
    return next(check for check in machine.checks() if check.name == name).run()


@pytest.fixture
def mac(monkeypatch):
    """A Mac with an M3 Max, 64 GiB and macOS 26.1, whose GPU computes."""
    said = {"hw.memsize": str(64 * 2**30), "machdep.cpu.brand_string": "Apple M3 Max"}
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("26.1", ("", "", ""), "arm64"))
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(machine, "sysctl", said.__getitem__)
    monkeypatch.setattr(machine, "backend", lambda: "Metal")
    info = {"device_name": "Apple M3 Max", "architecture": "applegpu_g15s", "max_recommended_working_set_size": 2**35}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    return said


def test_a_mac(mac):
    assert "Apple M3 Max" in line("computer").measured and "64.0 GiB, macOS 26.1" in line("computer").measured
    assert "Metal: Apple M3 Max applegpu_g15s, 32.0 GiB" in line("GPU").measured
    assert [line(name).verdict for name in ("computer", "Python", "MLX", "GPU")] == ["ok"] * 4
    assert line("BLAS").verdict == "not applicable"


def test_an_old_macos(mac, monkeypatch):
    monkeypatch.setattr(platform, "mac_ver", lambda: ("13.6", ("", "", ""), "arm64"))
    assert line("computer").failed


def test_an_intel_mac(mac):
    mac["machdep.cpu.brand_string"] = "Intel(R) Core(TM) i9"
    assert line("computer").failed


def test_a_python_that_is_translated(mac, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert line("Python").failed


def test_an_old_python(monkeypatch):
    assert line("Python").verdict == "ok"
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    assert line("Python").failed


@pytest.mark.parametrize(
    ("version", "good"),
    [("0.32.4", True), ("0.32.3", False), ("0.9.9", False), ("0.33.0.dev2026", True), ("1.0", True)],
)
def test_versions_of_mlx(monkeypatch, version, good):
    monkeypatch.setattr(machine, "MLX_VERSION", version)
    assert line("MLX").failed is not good


def test_the_oldest_mlx_is_that_of_the_package():
    wanted = set(re.findall(r'"mlx(?:\[\w+\])?>=([\d.]+)', (ROOT / "setup.py").read_text()))
    assert wanted == {machine.OLDEST_MLX}


def test_a_mac_that_computes_on_the_cpu(mac, monkeypatch):
    monkeypatch.setattr(machine, "backend", lambda: "CPU")
    assert line("GPU").failed


def test_cuda_that_is_installed_and_not_used(monkeypatch):
    monkeypatch.setattr(machine, "backend", lambda: "CPU")
    assert line("GPU").verdict == "not applicable"
    monkeypatch.setattr(machine, "_installed", lambda package: package == "mlx-cuda-12")
    assert line("GPU").failed and "mlx-cuda-12" in line("GPU").measured


def test_cuda(monkeypatch):
    monkeypatch.setattr(machine, "backend", lambda: "CUDA")
    monkeypatch.setattr(
        mx, "device_info", lambda: {"device_name": "NVIDIA H200", "architecture": "sm_90", "total_memory": 2**37}
    )
    assert line("GPU").verdict == "ok" and "CUDA: NVIDIA H200 sm_90, 128.0 GiB" in line("GPU").measured


def test_products_that_keep_too_few_bits(monkeypatch):
    assert line("float32 products").verdict == "ok"
    product = mx.array.__matmul__

    def rounded(a, b):
        cut = [mx.view(mx.view(x, mx.int32) & ~0x1FFF, mx.float32) if x.dtype == mx.float32 else x for x in (a, b)]
        return product(*cut)

    monkeypatch.setattr(mx.array, "__matmul__", rounded)
    assert line("float32 products").failed
    assert line("half-precision products").verdict == "ok"


def test_tf32(monkeypatch):
    monkeypatch.setattr(machine, "tf32", lambda: True)
    assert line("float32 products").failed and "TF32 is on" in line("float32 products").measured


def test_half_precision_that_is_wrong(monkeypatch):
    assert line("half-precision products").verdict == "ok"
    product = mx.array.__matmul__
    monkeypatch.setattr(mx.array, "__matmul__", lambda a, b: product(a, b) * (1.02 if a.dtype == mx.bfloat16 else 1))
    assert line("half-precision products").failed


@pytest.mark.skipif(sys.platform != "linux" or mx.default_device() != mx.cpu, reason="this is about Linux CPUs")
def test_a_slow_blas(monkeypatch):
    monkeypatch.delenv(cpu.BLAS_VARIABLE, raising=False)
    monkeypatch.setattr(cpu, "is_fast", lambda: False)
    assert line("BLAS").failed
    monkeypatch.setenv(cpu.BLAS_VARIABLE, "off")
    assert line("BLAS").verdict == "not applicable" and "GFLOPS" in line("BLAS").measured
    with pytest.raises(NotApplicable):
        machine.blas()
