"""What Linux CPUs get on top of MLX: a fast BLAS, and the network of a flow block in C++ for sampling.

This module is the door: the rest of the package calls what is here. Arrays go in and out as MLX's. Importing it imports
neither MLX nor NumPy. MLX_STARFLOW_BLAS chooses the BLAS (see `blas`), and MLX_STARFLOW_KERNELS=0 turns the network
off, as it does the Metal kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_starflow.cpu.blas import VARIABLE as BLAS_VARIABLE
from mlx_starflow.cpu.blas import check, describe, gflops, hint_if_slow, install, is_fast

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_starflow.cpu.network import NativeNetwork
    from mlx_starflow.models.flow import Condition, FlowBlock

__all__ = [
    "BLAS_VARIABLE",
    "check",
    "describe",
    "fast_network",
    "gflops",
    "has_fast_networks",
    "hint_if_slow",
    "install",
    "is_fast",
    "network_threads",
]


def has_fast_networks() -> bool:
    """Whether `fast_network` can give networks here: MLX computes on a Linux CPU, and g++ is installed."""
    from mlx_starflow.cpu import library

    return library.available()


def network_threads() -> int:
    """How many threads compute such a network."""
    from mlx_starflow.cpu import library

    return library.threads()


def fast_network(
    block: FlowBlock,
    batch: int,
    length: int,
    rope_frequencies: mx.array | None,
    condition: Condition,
    temperature: float | mx.array,
) -> NativeNetwork | None:
    """The network of a flow block in C++, with its KV cache; None where there is none for this machine or this block.

    Args:
        block: the flow block.
        batch: sequences at once.
        length: tokens that each has at most.
        rope_frequencies: of all positions of the block, complex64 `[positions, head_dim / 2]`, if it has any.
        condition: what the block reads in addition to its tokens.
        temperature: attention logits are divided by this, a number or one a sequence, `[batch, 1, 1, 1]`.
    """
    if not has_fast_networks():
        return None
    from mlx_starflow.cpu.network import NativeNetwork, Unsuitable

    try:
        return NativeNetwork(block, batch, length, rope_frequencies, condition, temperature)
    except Unsuitable:
        return None
