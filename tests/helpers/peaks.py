"""Peaks of memory that do not depend on timing."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """MLX waits for each operation before it begins the next, as it does where memory is short.

    Otherwise it is several operations ahead of what has been computed, and how many is a matter of timing.
    """
    gc.collect()
    before = mx.set_memory_limit(0)
    try:
        yield
    finally:
        mx.set_memory_limit(before)
