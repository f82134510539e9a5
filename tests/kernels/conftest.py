"""Kernels on: on Metal where there is a Metal GPU, else in the shim."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import mlx.core as mx
import pytest
from helpers import metal_shim

from mlx_starflow.kernels import affine, qkv

needs_shim = pytest.mark.skipif(metal_shim.COMPILER is None, reason="g++ is not installed")


@pytest.fixture
def kernels_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """`with kernels_on(): ...` runs kernels; outside of it the plain versions run."""
    if not mx.metal.is_available():
        if metal_shim.COMPILER is None:
            pytest.skip("there is neither a Metal GPU nor g++")
        monkeypatch.setattr(mx.fast, "metal_kernel", metal_shim.metal_kernel)
    on = False
    for module in (qkv, affine):
        monkeypatch.setattr(module, "enabled", lambda: on)

    def forget() -> None:
        for function in (qkv._kernel, qkv._fused, affine._kernel, affine._fused):
            function.cache_clear()

    @contextmanager
    def context() -> Iterator[None]:
        nonlocal on
        on = True
        yield
        on = False

    forget()
    yield context
    forget()
