"""From the packed projection of an attention layer to rotated queries and keys, and values, head by head."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import cast

import mlx.core as mx

from mlx_starflow.kernels import Arrays, enabled, with_gradient
from mlx_starflow.kernels.plain import EPSILON, rms_norm, rotate

SIMD_WIDTH = 32
"""Threads that run together on Apple's GPUs, and can add up numbers without shared memory."""

HEADS_PER_THREADGROUP = 8


def split_rotate(
    qkv: mx.array,
    rope_frequencies: mx.array | None,
    query_weight: mx.array | None = None,
    key_weight: mx.array | None = None,
    *,
    num_heads: int,
    num_kv_heads: int,
    half_split: bool = False,
) -> tuple[mx.array, mx.array, mx.array]:
    """Split the heads, normalize queries and keys where there are weights for that, and rotate both by their positions.

    Args:
        qkv: the packed projection `[B, N, (num_heads + 2 * num_kv_heads) * D]`: queries, then keys, then values, head
            by head.
        rope_frequencies: of the N positions, complex64 `[N, D / 2]`; None: nothing is rotated.
        query_weight, key_weight: weights `[D]` of RMS norms over each head, as offsets from 1; both or none.
        num_heads, num_kv_heads: how many heads queries have, and keys and values.
        half_split: a rotary pair is dimensions (i, i + D / 2) rather than (2i, 2i + 1).

    Returns:
        Queries `[B, num_heads, N, D]`, keys and values `[B, num_kv_heads, N, D]`, in qkv's dtype. Arithmetic is
        float32, and rounded to that dtype once.

    On Metal this is one kernel, which reads the projection once. A custom kernel's outputs are new arrays: it cannot
    write into the KV cache. It leaves keys and values as the cache has them, so that appending each is one copy
    without a transposition; queries are contiguous, as Metal's attention for up to 8 of them wants.
    """
    if rope_frequencies is not None and enabled():
        norm = () if query_weight is None else (query_weight, key_weight)
        q, k, v = _fused(num_heads, num_kv_heads, half_split, bool(norm))(qkv, rope_frequencies, *norm)
        return q, k, v
    return split_rotate_plain(
        qkv,
        rope_frequencies,
        query_weight,
        key_weight,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        half_split=half_split,
    )


def split_rotate_plain(
    qkv: mx.array,
    rope_frequencies: mx.array | None,
    query_weight: mx.array | None = None,
    key_weight: mx.array | None = None,
    *,
    num_heads: int,
    num_kv_heads: int,
    half_split: bool = False,
) -> tuple[mx.array, mx.array, mx.array]:
    """`split_rotate` in plain MLX."""
    batch, length, width = qkv.shape
    dim = width // (num_heads + 2 * num_kv_heads)
    x = qkv.reshape(batch, length, -1, dim).transpose(0, 2, 1, 3)
    # Queries and keys together: when one token is decoded, time goes by the number of operations.
    qk, v = mx.split(x, [num_heads + num_kv_heads], axis=1)
    if query_weight is not None:
        assert key_weight is not None
        weights = [
            mx.broadcast_to(query_weight, (num_heads, 1, dim)),
            mx.broadcast_to(key_weight, (num_kv_heads, 1, dim)),
        ]
        qk = rms_norm(qk.astype(mx.float32)) * (1 + mx.concatenate(weights).astype(mx.float32))
    if rope_frequencies is not None:
        qk = rotate(qk, rope_frequencies, half_split)
    qk = qk.astype(qkv.dtype)
    q, k = mx.split(qk, [num_heads], axis=1)
    return q, k, v


@cache
def _fused(num_heads: int, num_kv_heads: int, half_split: bool, norm: bool) -> Callable[..., Arrays]:
    kernel = _kernel(norm)

    def fused(qkv: mx.array, rope_frequencies: mx.array, *weights: mx.array) -> Arrays:
        batch, length, width = qkv.shape
        total = num_heads + 2 * num_kv_heads
        dim = width // total
        template = [
            ("T", qkv.dtype),
            ("HEADS", num_heads),
            ("KV_HEADS", num_kv_heads),
            ("DIM", dim),
            ("HALF_SPLIT", half_split),
        ]
        return kernel(
            inputs=[qkv, mx.view(rope_frequencies, mx.float32), *(weight.astype(mx.float32) for weight in weights)],
            template=template,
            grid=(SIMD_WIDTH, total, batch * length),
            threadgroup=(SIMD_WIDTH, min(total, HEADS_PER_THREADGROUP), 1),
            output_shapes=[(batch, count, length, dim) for count in (num_heads, num_kv_heads, num_kv_heads)],
            output_dtypes=[qkv.dtype] * 3,
        )

    def plain(qkv: mx.array, rope_frequencies: mx.array, *weights: mx.array) -> Arrays:
        # Positions are constants. Without this their gradient, which nobody reads, would be computed.
        rope_frequencies = mx.stop_gradient(rope_frequencies)
        return split_rotate_plain(
            qkv, rope_frequencies, *weights, num_heads=num_heads, num_kv_heads=num_kv_heads, half_split=half_split
        )

    return with_gradient(fused, plain)


@cache
def _kernel(norm: bool) -> Callable[..., list[mx.array]]:
    kernel = mx.fast.metal_kernel(
        name="starflow_qkv_norm" if norm else "starflow_qkv",
        input_names=["qkv", "rope_frequencies"] + ["query_weight", "key_weight"] * norm,
        output_names=["q", "k", "v"],
        source=_SOURCE.replace("MEAN_SQUARE;", _MEAN_SQUARE * norm).replace("NORMALIZE;", _NORMALIZE * norm),
    )
    return cast(Callable[..., list[mx.array]], kernel)


# A simdgroup is one head of one token; its lanes share the head's rotary pairs out.
_SOURCE = f"""
    constexpr int WIDTH = {SIMD_WIDTH};
    constexpr int PAIRS = DIM / 2;
    const int lane = thread_position_in_grid.x;
    const int head = thread_position_in_grid.y;
    const int row = thread_position_in_grid.z;
    const int length = qkv_shape[1];
    const int sample = row / length;
    const int position = row % length;

    // Offsets, not pointers: MLX puts small arrays into another address space.
    const size_t from = (size_t(row) * (HEADS + 2 * KV_HEADS) + head) * DIM;
    if (head >= HEADS + KV_HEADS) {{
        device T* to = v + ((size_t(sample) * KV_HEADS + head - HEADS - KV_HEADS) * length + position) * DIM;
        for (int i = lane; i < DIM; i += WIDTH) {{
            to[i] = qkv[from + i];
        }}
        return;
    }}
    const bool query = head < HEADS;
    device T* to = query ? q + ((size_t(sample) * HEADS + head) * length + position) * DIM
                         : k + ((size_t(sample) * KV_HEADS + head - HEADS) * length + position) * DIM;
    MEAN_SQUARE;
    const size_t row_start = size_t(position) * DIM;
    for (int pair = lane; pair < PAIRS; pair += WIDTH) {{
        const int first = HALF_SPLIT ? pair : 2 * pair;
        const int second = HALF_SPLIT ? pair + PAIRS : 2 * pair + 1;
        float a = static_cast<float>(qkv[from + first]);
        float b = static_cast<float>(qkv[from + second]);
        NORMALIZE;
        const float cosine = rope_frequencies[row_start + 2 * pair];
        const float sine = rope_frequencies[row_start + 2 * pair + 1];
        to[first] = static_cast<T>(a * cosine - b * sine);
        to[second] = static_cast<T>(a * sine + b * cosine);
    }}
"""

_MEAN_SQUARE = f"""
    float sum = 0.0f;
    for (int i = lane; i < DIM; i += WIDTH) {{
        const float x = static_cast<float>(qkv[from + i]);
        sum += x * x;
    }}
    const float inverse = metal::precise::rsqrt(simd_sum(sum) / DIM + {EPSILON!r}f);
"""

_NORMALIZE = """
        a = a * inverse * (1.0f + (query ? query_weight[first] : key_weight[first]));
        b = b * inverse * (1.0f + (query ? query_weight[second] : key_weight[second]));
"""
