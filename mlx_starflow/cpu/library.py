"""network.cpp as a library: compiled once for each kind of processor, and loaded."""

from __future__ import annotations

import ctypes
import hashlib
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path

from mlx_starflow.cpu import blas
from mlx_starflow.cpu.private import cache_folder, is_private
from mlx_starflow.errors import StarflowError
from mlx_starflow.kernels import on_cpu, switched_off
from mlx_starflow.media.files import replacing

SOURCES = tuple(
    Path(__file__).with_name(name) for name in ("network.cpp", "products.h", "thread_pool.h", "vectors.h", "weights.h")
)
COMPILE = ("g++", "-std=c++20", "-O3", "-march=native", "-Wno-psabi", "-fPIC", "-shared", "-pthread")

MOST_THREADS = 8
"""More do not read memory faster."""


def available() -> bool:
    """Whether MLX computes on a Linux CPU, and network.cpp could be compiled there."""
    return sys.platform == "linux" and on_cpu() and not switched_off() and load() is not None


@cache
def load() -> ctypes.CDLL | None:
    """The library; None where there is no compiler, one that is too old, or no place for what it makes."""
    try:
        library = ctypes.CDLL(str(_built()))
    except (OSError, StarflowError, subprocess.SubprocessError):
        return None
    for name in ("starflow_network", "starflow_products"):
        function = getattr(library, name)
        function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_void_p), None
    library.starflow_threads(threads())
    return library


def threads() -> int:
    """How many compute: all that there are, since MLX has nothing to do in the meantime."""
    return min(blas.chosen_threads() or blas.cpus(), MOST_THREADS)


def _built() -> Path:
    """The compiled library, from the cache if it was made for such a processor before."""
    parts = [*(source.read_bytes() for source in SOURCES), " ".join(COMPILE).encode(), _processor()]
    made_of = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    folder = cache_folder("mlx-starflow")
    if folder is None:
        raise StarflowError("there is no place for the library")
    path = folder / f"network-{made_of}.so"
    if not _whole(path):
        with replacing(path) as temporary:
            command = [*COMPILE, str(SOURCES[0]), "-o", str(temporary)]
            subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=120)
            library = temporary.read_bytes()
            temporary.write_bytes(library + hashlib.sha256(library).digest())  # a loader does not read beyond its end
            temporary.chmod(0o700)
    return path


def _whole(path: Path) -> bool:
    """Whether a library is there, nobody else could write it, and it has its checksum behind it: a damaged one would
    end the program."""
    library = path.read_bytes() if path.is_file() and not path.is_symlink() and is_private(path) else b""
    size = hashlib.sha256().digest_size
    return hashlib.sha256(library[:-size]).digest() == library[-size:]


def _processor() -> bytes:
    """What machine code may take for granted: a home directory may be shared by machines that differ in it."""
    lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    flags = next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
    return platform.machine().encode() + flags
