"""A Mac's memory, where there is none: what the package sets of MLX's limits, and whether they hold."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from mlx_starflow.kernels import memory

OWN = {"cache": 7, "wired": 0}
"""The limits that a user has set."""


class Metal:
    """Stands for MLX in `kernels.memory`, with 64 GiB for the GPU; whatever is computed still is as before.

    Attributes:
        limits: of the cache of freed buffers, and of wired memory.
        given_back: how often freed buffers were given back.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.limits, self.given_back = dict(OWN), 0
        self.metal = SimpleNamespace(is_available=lambda: True)
        monkeypatch.setattr(memory, "mx", self)

    def __getattr__(self, name: str) -> Any:
        return getattr(mx, name)

    @property
    def bounds(self) -> bool:
        """Whether the limits hold."""
        return self.limits["cache"] == 8 * 2**30

    def device_info(self) -> dict[str, int]:
        return {"max_recommended_working_set_size": 64 * 2**30, "memory_size": 96 * 2**30}

    def set_cache_limit(self, limit: int) -> int:
        return self._set("cache", limit)

    def set_wired_limit(self, limit: int) -> int:
        return self._set("wired", limit)

    def clear_cache(self) -> None:
        self.given_back += 1

    def _set(self, name: str, limit: int) -> int:
        self.limits[name], before = limit, self.limits[name]
        return before
