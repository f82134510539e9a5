"""What Linux CPUs get on top of MLX: a fast BLAS, and for sampling a flow block's network in C++, its tokens in NumPy.

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

    from mlx_starflow.cpu.inverter import NativeInverter
    from mlx_starflow.cpu.network import NativeNetwork
    from mlx_starflow.kernels.affine import AffineMap, GuidanceMode, GuidanceTarget
    from mlx_starflow.models.flow import Condition, FlowBlock

__all__ = [
    "BLAS_VARIABLE",
    "check",
    "describe",
    "fast_inverter",
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


def fast_inverter(
    network: object,
    z: mx.array,
    first_input: mx.array | None,
    affine: AffineMap,
    mode: GuidanceMode | None = None,
    weight: float | mx.array = 0.0,
    target: GuidanceTarget = "ab",
) -> NativeInverter | None:
    """A block's noise and data beside its `fast_network`, and the steps between them; None for any other network.

    Args:
        network: the block's network; with guidance its batch is twice the noise's.
        z: noise `[B, N, C]` in the block's order.
        first_input: what predicts the first token, `[B, 1, C]` for the network's batch, if anything does.
        affine, mode, target: those of `kernels.affine.predict`.
        weight: of guidance, a number or an array that broadcasts to `[B, N, 1]`.
    """
    from mlx_starflow.cpu.network import NativeNetwork

    if not isinstance(network, NativeNetwork):
        return None
    from mlx_starflow.cpu.inverter import NativeInverter

    return NativeInverter(network, z, first_input, affine, mode, weight, target)
