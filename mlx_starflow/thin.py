"""Products of a few rows with a large matrix on Linux: what sampling one token, or a few, consists of.

OpenBLAS packs the whole matrix before it multiplies, and so goes through weights at half the speed of memory. The few
lines of C++ in thin.cpp do not. MLX compiles fused operations with g++ wherever that is installed; these are compiled
with it too, once, into the user's cache, and `install` puts them before OpenBLAS's `sgemm`, which goes on to get all
other products. Where there is no g++, or a BLAS that does better, nothing changes.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path

from mlx_starflow import blas, linkage
from mlx_starflow.files import replacing

SOURCE = Path(__file__).with_name("thin.cpp")
COMPILE = ("g++", "-std=c++20", "-O3", "-march=native", "-fPIC", "-shared", "-pthread")

MOST_ROWS = 16
"""With more rows than this, packing pays."""

MOST_THREADS = 8
"""More do not read memory faster."""

NAME = "starflow_thin_sgemm"

_library: ctypes.CDLL | None = None


def install() -> None:
    """Let MLX multiply a few rows so, if its BLAS is an OpenBLAS. Never raises."""
    global _library
    if sys.platform != "linux" or not blas.describe().startswith("OpenBLAS"):
        return
    try:
        library = ctypes.CDLL(str(_built()))
        pointer = blas._pointers()[blas.PRODUCTS[0]]
        setup = library.starflow_thin_setup
        setup.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
        setup(linkage.read(pointer), MOST_ROWS, min(blas.threads(), MOST_THREADS))
        linkage.write(pointer, linkage.address_of(library, NAME))
        _library = library
    except Exception:  # no compiler, one that is too old, no place for what it makes: OpenBLAS does it all
        return


def installed() -> bool:
    return _library is not None


def _built() -> Path:
    """The compiled library, from the cache if it was made for such a processor before."""
    source = SOURCE.read_bytes()
    made_of = hashlib.sha256(b"\0".join([source, " ".join(COMPILE).encode(), _processor()])).hexdigest()[:16]
    path = _cache() / f"thin-{made_of}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            command = [*COMPILE, str(SOURCE), "-o", str(temporary)]
            subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=60)
    return path


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx-starflow"


def _processor() -> bytes:
    """What machine code may take for granted: a home directory may be shared by machines that differ in it."""
    lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    flags = next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
    return platform.machine().encode() + flags
