"""The memory that this machine's device has, and what MLX keeps of it while it works for long."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from mlx_starflow.kernels.devices import backend

OWN_SHARE = 0.9
"""Of a GPU's own memory, or of a CPU's: the rest is left to others."""

FREED_PART = 8
"""Freed buffers that MLX keeps are at most one part in so many of what networks may use, which is enough for the arrays
of a token or a layer."""


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

_lock = threading.RLock()  # a generator's end may come while its thread is here
_works = 0
_before: tuple[int, int] | None = None


@contextmanager
def bounded() -> Iterator[None]:
    """While something works on Metal: wire memory and bound the cache of freed buffers; elsewhere nothing happens.

    Memory that is wired is not paged out between the tokens of a long sample; as much as macOS recommends at most is.
    The cache, unbounded otherwise, may hold a `FREED_PART`th of that. What works may lie in something else that does,
    or, as streams do, begin before another one and end before it: the limits that were there before the first come back
    after the last, and what is freed then is given back. This has not run on Metal hardware yet.
    """
    _begin()
    try:
        yield
    finally:
        _end()


def give_back() -> None:
    """Give freed buffers back on Metal, where they are memory that other programs lack."""
    if mx.metal.is_available():
        mx.clear_cache()


def _begin() -> None:
    global _works, _before
    with _lock:
        if not _works and mx.metal.is_available():
            most = available()
            _before = mx.set_cache_limit(most // FREED_PART), mx.set_wired_limit(most)
        _works += 1


def _end() -> None:
    global _works, _before
    with _lock:
        _works -= 1
        if _works or _before is None:
            return
        (cache, wired), _before = _before, None
        try:
            mx.synchronize()  # work that is under way must not lose its wired memory
            mx.clear_cache()
        finally:
            mx.set_wired_limit(wired)
            mx.set_cache_limit(cache)
