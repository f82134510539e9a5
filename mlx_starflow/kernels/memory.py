"""The memory that this machine's device has, and what Metal is told about it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from mlx_starflow.kernels.devices import backend

OWN_SHARE = 0.9
"""Of a GPU's own memory, or of a CPU's: the rest is left to others."""


def usable(memory: float) -> int:
    """Bytes of a Mac's `memory` that its GPU may use.

    That is what macOS gives as Metal's recommendedMaxWorkingSetSize. Users report two thirds to three quarters of
    memory on Macs of up to 32 GB and three quarters or more above, depending on the version of macOS; taken here are
    70% and 75%. `sysctl iogpu.wired_limit_mb` changes it.
    """
    return int(memory * (0.70 if memory <= 32 * 2**30 else 0.75))


def available() -> int:
    """Bytes that networks on this machine may use: Metal's working set, or most of the memory of a CUDA GPU or of a
    CPU's machine."""
    if mx.metal.is_available():
        info = mx.device_info()
        return int(info.get("max_recommended_working_set_size") or usable(int(info["memory_size"])))
    if backend() == "CUDA":
        return int(OWN_SHARE * int(mx.device_info()["total_memory"]))
    return int(OWN_SHARE * installed())


def installed() -> int:
    """Bytes of memory of this machine."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 2**63 - 1  # unknown: whatever is asked for


# ---- Metal


@contextmanager
def metal_limits() -> Iterator[None]:
    """While generating on Metal: wire memory and bound the cache of freed buffers; elsewhere nothing happens.

    Memory that is wired is not paged out between the tokens of a long sample; as much as macOS recommends at most is.
    A cache of an eighth of that is enough for the arrays of one token or layer; it is unbounded otherwise. The limits
    that were there before come back afterwards. This has not run on Metal hardware yet.
    """
    if not mx.metal.is_available():
        yield
        return
    most = available()
    cache = mx.set_cache_limit(most // 8)
    wired = mx.set_wired_limit(most)
    try:
        yield
    finally:
        # Work that is under way must not lose its wired memory.
        mx.synchronize()
        mx.set_wired_limit(wired)
        mx.set_cache_limit(cache)
