"""The machine, and what MLX makes of it: versions, backend, precision of products, BLAS."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_starflow import __version__, cpu
from mlx_starflow.bench.doctor.checks import Check, Finding, NotApplicable, at_most, within
from mlx_starflow.kernels import MLX_VERSION, enabled
from mlx_starflow.kernels.devices import backend
from mlx_starflow.kernels.memory import installed
from mlx_starflow.kernels.products import tf32
from mlx_starflow.model_dir.weights import MLX_DTYPES, automatic_dtype, dtype_name

OLDEST_MLX = "0.32.4"
"""As in setup.py: older ones are wrong in places."""

OLDEST_MACOS = 14

CUDA_PACKAGES = ("mlx-cuda-13", "mlx-cuda-12")

SIDE = 256
PRODUCT_BOUNDS = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}
"""Root mean square of the errors of products of matrices of this side, relative to that of the products: a few
roundings of their results."""


def checks() -> list[Check]:
    return [
        Check(
            "computer",
            f"Linux, or macOS {OLDEST_MACOS} or newer on Apple silicon",
            "Update macOS; on a Mac with an Intel processor MLX does not run.",
            computer,
        ),
        Check(
            "Python",
            "3.10 or newer, made for this processor",
            "Install a Python for arm64, from python.org or Homebrew, and install mlx-starflow with it.",
            python,
        ),
        Check("MLX", f"{OLDEST_MLX} or newer", f'Update it: pip install "mlx>={OLDEST_MLX}"', mlx),
        Check(
            "GPU",
            "MLX computes on it",
            "MLX cannot use this machine's GPU; on a Mac see System Report, Graphics, with CUDA see docs/cuda.md.",
            gpu,
        ),
        Check(
            "float32 products",
            at_most({"float32": PRODUCT_BOUNDS["float32"]}) + ", no TF32",
            "Unset MLX_ENABLE_TF32: with it float32 products keep 10 bits, and no certificate holds.",
            float32_products,
        ),
        Check(
            "half-precision products",
            at_most({name: bound for name, bound in PRODUCT_BOUNDS.items() if name != "float32"}),
            "Use --dtype float32, and report this line: MLX multiplies wrongly here.",
            half_products,
        ),
        Check(
            "BLAS",
            "a fast one",
            "Install one: pip install scipy-openblas32, or apt install libopenblas0-pthread",
            blas,
        ),
    ]


def computer() -> Finding:
    system = (
        f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else f"{platform.system()} {platform.release()}"
    )
    memory = int(sysctl("hw.memsize")) if sys.platform == "darwin" else installed()
    good = sys.platform == "linux"
    if sys.platform == "darwin":
        good = int(platform.mac_ver()[0].partition(".")[0]) >= OLDEST_MACOS and processor().startswith("Apple")
    return Finding(
        f"{processor()}, {cores()} CPUs, {memory / 2**30:.1f} GiB, {system}", good, {"memory": float(memory)}
    )


def processor() -> str:
    """The processor's name."""
    if sys.platform == "darwin":
        return sysctl("machdep.cpu.brand_string")
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def sysctl(name: str) -> str:
    """What macOS says of itself."""
    done = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def python() -> Finding:
    translated = sys.platform == "darwin" and platform.machine() != "arm64"
    return Finding(
        f"{platform.python_version()} for {platform.machine()}, mlx-starflow {__version__}",
        sys.version_info >= (3, 10) and not translated,
    )


def mlx() -> Finding:
    described = f"{MLX_VERSION} on {backend()}, networks in {dtype_name(automatic_dtype())}"
    return Finding(described, _numbers(MLX_VERSION) >= _numbers(OLDEST_MLX))


def _numbers(text: str) -> list[int]:
    """Of a version: "0.32.4.dev1" gives [0, 32, 4]."""
    return [int(part) for part in re.findall(r"\d+", text.partition("dev")[0])][:3]


def gpu() -> Finding:
    where = backend()
    if where == "CPU":
        if sys.platform == "darwin":
            return Finding("MLX finds no Metal GPU, or computes on the CPU", False)
        if installed := [name for name in CUDA_PACKAGES if _installed(name)]:
            return Finding(f"{installed[0]} is installed, but MLX computes on the CPU", False)
        raise NotApplicable("MLX computes on the CPU")
    info = mx.device_info()
    memory = int(info.get("max_recommended_working_set_size") or info.get("total_memory") or 0)
    kernels = f", fused kernels {'on' if enabled() else 'off'}" if where == "Metal" else ""
    name, architecture = info.get("device_name", "a GPU"), info.get("architecture", "")
    return Finding(
        f"{where}: {name} {architecture}, {memory / 2**30:.1f} GiB for networks{kernels}",
        values={"memory": float(memory)},
    )


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def float32_products() -> Finding:
    finding = within({"float32": product_error(mx.float32)}, PRODUCT_BOUNDS)
    state = "TF32 is on" if tf32() else "TF32 is off"
    return Finding(f"{finding.measured}, {state}", finding.good and not tf32(), finding.values)


def half_products() -> Finding:
    errors = {name: product_error(dtype) for name, dtype in MLX_DTYPES.items() if name != "float32"}
    return within(errors, PRODUCT_BOUNDS)


def product_error(dtype: mx.Dtype) -> float:
    """Root mean square error of a product in a dtype, relative to the product."""
    a, b = (mx.random.normal((SIDE, SIDE), key=mx.random.key(key)).astype(dtype) for key in (0, 1))
    exact = np.array(a.astype(mx.float32), np.float64) @ np.array(b.astype(mx.float32), np.float64)
    error = np.array((a @ b).astype(mx.float32), np.float64) - exact
    return float(np.sqrt(np.mean(error**2) / np.mean(exact**2)))


def blas() -> Finding:
    if sys.platform != "linux" or backend() != "CPU":
        raise NotApplicable("it matters where MLX computes on a Linux CPU")
    cpu.check()
    speed = cpu.gflops()
    described, values = f"{cpu.describe()}, {speed:.1f} GFLOPS", {"gflops": speed}
    if os.environ.get(cpu.BLAS_VARIABLE) == "off":
        raise NotApplicable(f"{cpu.BLAS_VARIABLE} turns it off", described, values)
    return Finding(described, cpu.is_fast(), values)
