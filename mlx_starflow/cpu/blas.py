"""A fast BLAS for MLX's CPU backend on Linux.

MLX's Linux wheels bring the reference BLAS, which multiplies matrices 10 to 30 times slower than OpenBLAS or MKL.
MLX's library, libmlx.so, calls three functions of it, each through a pointer in its linkage table, which the dynamic
linker has filled in. `install` writes the addresses of a faster library's functions there. This needs no compiler,
works whether or not `mlx.core` was imported before, and concerns MLX alone: no symbol becomes visible to PyTorch, NumPy
or anything else in the process.

The environment variable MLX_STARFLOW_BLAS chooses: `off`, or the path of a library. Without it, an OpenBLAS or MKL of
the system is used, else the OpenBLAS in the package scipy-openblas32. It gets a thread for each CPU that the process
may use but one, which is for MLX itself; OPENBLAS_NUM_THREADS, MKL_NUM_THREADS and OMP_NUM_THREADS say otherwise.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from time import perf_counter
from typing import NamedTuple

from mlx_starflow.cpu import linkage, private
from mlx_starflow.errors import StarflowError

VARIABLE = "MLX_STARFLOW_BLAS"

PRODUCTS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
"""What a matrix product of float32, float64 and complex64 arrays comes down to in MLX."""

SYSTEM = ("libopenblasp.so.0", "libopenblas.so.0", "libmkl_rt.so.3", "libmkl_rt.so.2", "libmkl_rt.so")
"""Libraries to ask the dynamic linker for. Where the first exists, on Fedora, the second has one thread only."""

PREFIX = "scipy_"
"""Before every name in the library of scipy-openblas32."""

MKL_VERSION = "MKL_Get_Version_String"

THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")

CPU_QUOTA = "/sys/fs/cgroup/cpu.max"
"""Microseconds of CPU time that a container gets in every so many: "150000 100000" is one CPU and a half."""


class Blas(NamedTuple):
    """The BLAS in use: where it is from (a file, a package, MLX itself), its library if it is not MLX's own, the
    mistake in MLX_STARFLOW_BLAS if there is one, and what to tell a user who lacks a fast one."""

    origin: str
    library: ctypes.CDLL | None = None
    error: str = ""
    hint: str = ""


_in_use = Blas("MLX's own")


def install() -> None:
    """Make MLX use a fast BLAS, where there is one. Never raises: a user's mistake is for `check` to report."""
    global _in_use
    if sys.platform != "linux":
        _in_use = Blas("Accelerate" if sys.platform == "darwin" else "MLX's own")
        return
    private.install()
    try:
        _in_use = _choose(os.environ.get(VARIABLE, ""))
    except Exception as error:
        _in_use = Blas(f"MLX's own ({error})")


def check() -> None:
    """Raise StarflowError if MLX_STARFLOW_BLAS names something that cannot be used."""
    if _in_use.error:
        raise StarflowError(_in_use.error)


def is_fast() -> bool:
    """Whether a BLAS other than MLX's own slow one is in use."""
    return _in_use.library is not None


def describe() -> str:
    """Name, version and origin of the BLAS in use, in a few words."""
    if _in_use.library is None:
        return _in_use.origin
    return f"{_name(_in_use.library) or 'BLAS'} ({_in_use.origin})"


def gflops(size: int = 1024, seconds: float = 0.15) -> float:
    """Speed of float32 products of `size` x `size` matrices on the CPU, in 10^9 operations a second: the best of as
    many as fit in `seconds`, at least one."""
    import mlx.core as mx

    matrix = mx.ones((size, size))
    mx.eval(mx.matmul(matrix[: size // 16], matrix, stream=mx.cpu))
    best, start = float("inf"), perf_counter()
    while (begin := perf_counter()) - start < seconds:
        mx.eval(mx.matmul(matrix, matrix, stream=mx.cpu))
        best = min(best, perf_counter() - begin)
    return 2e-9 * size**3 / best


@cache
def hint_if_slow() -> None:
    """Say on standard error, once, that what follows takes long for want of a fast BLAS."""
    if _in_use.hint:
        import mlx.core as mx

        if mx.default_device() == mx.cpu:
            print(_in_use.hint, file=sys.stderr)


def _choose(setting: str) -> Blas:
    if setting == "off":
        return Blas(f"MLX's own ({VARIABLE} is off)")
    pointers = _pointers()
    if len(pointers) < len(PRODUCTS):
        return Blas("MLX's own")
    present = linkage.file_of(linkage.read(pointers[PRODUCTS[0]]))
    if not setting and _name(library := ctypes.CDLL(present)):
        return Blas(os.path.basename(present), library)
    for path, origin in [(setting, setting)] if setting else _candidates():
        try:
            library = ctypes.CDLL(path)
            addresses = _functions(library)
        except (OSError, AttributeError, ValueError) as error:
            if setting:
                return Blas("MLX's own", error=f"{VARIABLE}: {error}; give the path of a BLAS, or off, or unset it")
            continue
        for name, pointer in pointers.items():
            linkage.write(pointer, addresses[name])
        _set_threads(library)
        return Blas(origin, library)
    return Blas(
        "MLX's own (no faster one was found)",
        hint="Hint: no fast BLAS was found, so MLX uses its own slow one: pip install scipy-openblas32"
        " (or apt install libopenblas0-pthread)",
    )


def _candidates() -> Iterator[tuple[str, str]]:
    """Path and origin of libraries that may be there."""
    for name in SYSTEM:
        yield name, name
    for name in SYSTEM:  # pip and conda install an MKL where the dynamic linker does not look
        yield f"{sys.prefix}/lib/{name}", name
    if package := find_spec("scipy_openblas32"):
        for folder in package.submodule_search_locations or []:
            yield f"{folder}/lib/libscipy_openblas.so", "scipy-openblas32"


def _functions(library: ctypes.CDLL) -> dict[str, int]:
    """Product -> address of the library's function for it.

    Raises AttributeError if the library lacks one, ValueError if calling them would go wrong.
    """
    prefix = PREFIX if hasattr(library, PREFIX + PRODUCTS[0]) else ""
    addresses = {name: linkage.address_of(library, prefix + name) for name in PRODUCTS}
    path = linkage.file_of(addresses[PRODUCTS[0]])
    wide = "USE64BITINT" in _openblas_config(library)
    if hasattr(library, MKL_VERSION):
        wide = "ILP64" in os.environ.get("MKL_INTERFACE_LAYER", "")
        if "MKL_THREADING_LAYER" not in os.environ and not _loads("libiomp5.so", path):
            raise ValueError(f"{path} would end the program for want of libiomp5.so")
    if wide:
        raise ValueError(f"{path} counts in 64-bit integers, and MLX in 32-bit ones")
    return addresses


def _loads(name: str, neighbour: str) -> bool:
    for path in (name, os.path.join(os.path.dirname(neighbour), name)):
        try:
            ctypes.CDLL(path)
        except OSError:
            continue
        return True
    return False


def _set_threads(library: ctypes.CDLL) -> None:
    """Leave a CPU to MLX. BLAS threads wait for each other in a loop: on a CPU that has other work to do, such as
    MLX's own thread, one holds up all, and a product can take longer than with a single thread."""
    if any(map(os.environ.get, THREADS)):
        return
    for name in ("openblas_set_num_threads", f"{PREFIX}openblas_set_num_threads", "MKL_Set_Num_Threads"):
        if function := getattr(library, name, None):
            function(max(1, cpus() - 1))


def chosen_threads() -> int | None:
    """How many threads the environment asks for; of a list, one number a level of nesting, the first counts."""
    values = (os.environ.get(name, "").partition(",")[0] for name in THREADS)
    return next((int(value) for value in values if value.isdecimal()), None)


def cpus() -> int:
    """How many CPUs the process may keep busy."""
    count = len(os.sched_getaffinity(0))
    try:
        with open(CPU_QUOTA) as file:
            quota, period = map(int, file.read().split())
    except (OSError, ValueError):  # no container, or one without a quota: "max 100000"
        return count
    return max(1, min(count, quota // period))


def _name(library: ctypes.CDLL) -> str:
    """ "OpenBLAS 0.3.21" or "MKL 2026.2"; "" of any other library."""
    if config := _openblas_config(library):
        return " ".join(config.split()[:2])
    if hasattr(library, MKL_VERSION):
        text = ctypes.create_string_buffer(200)
        getattr(library, MKL_VERSION)(text, len(text))
        version = text.value.decode().partition("Version ")[2]
        return f"MKL {version.partition('-')[0]}".strip()
    return ""


def _openblas_config(library: ctypes.CDLL) -> str:
    for name in ("openblas_get_config", f"{PREFIX}openblas_get_config"):
        if function := getattr(library, name, None):
            function.restype = ctypes.c_char_p
            return function().decode()
    return ""


def _pointers() -> dict[str, int]:
    """Product -> where libmlx.so has the address of the function it calls for it; {} if it is not there."""
    package = find_spec("mlx")
    for folder in (package.submodule_search_locations or []) if package else []:
        if os.path.exists(path := f"{folder}/lib/libmlx.so"):
            return linkage.pointers(ctypes.CDLL(path), PRODUCTS)
    return {}
