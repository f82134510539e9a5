"""Fused Metal kernels, each with a plain MLX version that gives the same numbers and is used everywhere else.

Which of the two runs is decided once, when the first is needed: kernels where MLX has a Metal GPU and computes on it by
default, unless the environment variable MLX_STARFLOW_KERNELS is 0.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import cast

import mlx.core as mx

Arrays = Sequence[mx.array]

MLX_VERSION: str = mx.__version__  # type: ignore[attr-defined]  # MLX's stubs leave it out


_switched: bool | None = None


def enabled() -> bool:
    """Whether the Metal kernels run."""
    return by_default() if _switched is None else _switched


@cache
def by_default() -> bool:
    """Whether the Metal kernels run in this process, unless `switched` says otherwise."""
    return mx.metal.is_available() and mx.default_device() == mx.gpu and not switched_off()


@contextmanager
def switched(on: bool) -> Iterator[None]:
    """Inside, the Metal kernels run, or else their plain versions: to compare them. Compiled functions stay as they
    were traced."""
    global _switched
    before, _switched = _switched, on
    try:
        yield
    finally:
        _switched = before


def switched_off() -> bool:
    """Whether the user wants everything computed by MLX's own operations."""
    return os.environ.get("MLX_STARFLOW_KERNELS") == "0"


@cache
def on_cpu() -> bool:
    """Whether MLX computes on its CPU backend by default: there exp is slow, and convolutions copy what they read."""
    return mx.default_device() == mx.cpu


def with_gradient(fused: Callable[..., Arrays], plain: Callable[..., Arrays]) -> Callable[..., Arrays]:
    """`fused`, a function of two or more arrays, with the gradients of `plain`, which must compute the same."""
    function = mx.custom_function(fused)

    @function.vjp
    def _(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
        return tuple(mx.vjp(lambda *inputs: list(plain(*inputs)), list(primals), list(cotangents))[1])

    return cast(Callable[..., Arrays], function)
