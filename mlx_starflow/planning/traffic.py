"""What network evaluations read from memory: weights and KV caches, in bytes; and how many tokens they are for."""

from __future__ import annotations

import mlx.core as mx

from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.models.flow import BlockConfig, FlowBlock, is_layer_weight
from mlx_starflow.sampling.methods import FramewiseSettings, JacobiSettings, RollingSettings, Settings

READ_ONCE = ("sos_embed", "proj_txt", "pos_embed", "class_embed")
"""Weights of a block that make its condition or its first input, or of which an evaluation reads single rows."""


def evaluation_weights(block: FlowBlock) -> dict[str, mx.array]:
    """The weights that every network evaluation of a flow block reads, by name; those of quantized layers packed."""
    return {name: value for name, value in parameters(block).items() if name.partition(".")[0] not in READ_ONCE}


def evaluation_bytes(block: FlowBlock, dtype: mx.Dtype | None = None) -> int:
    """Their bytes, as they are stored, or with floating ones in `dtype`. Nothing is computed."""
    return sum(cast_bytes(name, value, dtype, True) for name, value in evaluation_weights(block).items())


def cast_bytes(name: str, array: mx.array, dtype: mx.Dtype | None, of_flow: bool) -> int:
    """Bytes of a tensor, in a network that is to compute in `dtype`; None: as it is. See `weights.weight_dtypes`."""
    if dtype is None or not mx.issubdtype(array.dtype, mx.floating):
        return array.nbytes
    return array.size * (mx.float32 if of_flow and not is_layer_weight(name) else dtype).size


def cache_bytes(config: BlockConfig, prefix: int, tokens: int, copies: int, item: int) -> int:
    """Keys and values that sequential sampling of one block reads, over all of its tokens.

    Token n, counted from 1, attends to `prefix` + n positions, in each of `copies` sequences.

    Args:
        config: of the block.
        prefix: positions before the tokens.
        tokens: length of the sequence.
        copies: samples at once, twice as many if the block is guided.
        item: bytes of a number in the cache.
    """
    position = 2 * config.num_layers * config.num_kv_heads * config.head_dim * item
    return copies * position * (tokens * prefix + tokens * (tokens + 1) // 2)


def tokens_at_once(settings: Settings, length: int) -> int:
    """How many tokens an evaluation predicts; the last ones of a sequence may be fewer."""
    if isinstance(settings, FramewiseSettings):
        settings = settings.later
    if isinstance(settings, JacobiSettings):
        return min(settings.block_size, length)
    if isinstance(settings, RollingSettings):
        return min(settings.window, length)
    return 1
