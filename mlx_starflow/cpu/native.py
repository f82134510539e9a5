"""The network of a flow block on a Linux CPU, in C++: sampling takes it a token, or a few, at a time.

A token goes through all layers in one call: the weights are read once and where they lie, norms, rotation, attention
and activations in between cost next to nothing, no graph is built and no other thread is woken. MLX compiles fused
operations with g++ wherever that is installed; network.cpp is compiled with it too, once, into the user's cache.
Without g++, on other systems and for weights that are neither float32 nor MLX's affine quantization of it,
`sampling.network.CompiledNetwork` does the same in MLX. MLX_STARFLOW_KERNELS=0 turns this off, as it does the Metal
kernels.
"""

from __future__ import annotations

from typing import Any

from mlx_starflow.cpu.library import available, threads
from mlx_starflow.cpu.network import NativeNetwork, Unsuitable

__all__ = ["NativeNetwork", "available", "network", "threads"]


def network(*arguments: Any) -> NativeNetwork | None:
    """A network of `NativeNetwork`'s arguments; None if there can be none."""
    try:
        return NativeNetwork(*arguments) if available() else None
    except Unsuitable:
        return None
