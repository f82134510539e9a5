"""Attention to keys and values that are quantized in groups along the head; to the last of them as they were."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_starflow.kernels import on_cpu
from mlx_starflow.kernels.softmax import exponential, masked

QUERIES = 64
"""How many are computed at once: their scores are what takes memory beside keys and values."""

PIECE = 1024
"""Positions that are unpacked at once where there is no product with quantized numbers."""

GROUPS = (64, 32)
"""Numbers of a head that share a scale: the first of these that a head's size is a multiple of."""

Packed = tuple[mx.array, mx.array, mx.array]
"""Words, scales and biases `[B, heads, N, ...]`, as `mx.quantize` gives them."""


def group_size(head_dim: int) -> int | None:
    """Numbers of a head that share a scale; None: a head of this size cannot be quantized."""
    return next((size for size in GROUPS if head_dim % size == 0), None)


@dataclass(frozen=True)
class QuantizedRows:
    """Keys or values `[B, heads, N, D]` of N positions: the first ones quantized, the last ones as they were.

    Attributes:
        packed: of the first positions; None: there are none.
        dense: of the last positions, `[B, heads, n, D]`; None: there are none.
        group_size, bits: as `mx.quantize` takes them.
    """

    packed: Packed | None
    dense: mx.array | None
    group_size: int
    bits: int

    @property
    def packed_positions(self) -> int:
        return 0 if self.packed is None else self.packed[0].shape[2]

    @property
    def positions(self) -> int:
        """How many there are, N."""
        return self.packed_positions + (0 if self.dense is None else self.dense.shape[2])

    def scores(self, q: mx.array) -> mx.array:
        """Queries `[B, heads, n, D]` times the rows' transpose, `[B, heads, n, N]`."""
        parts = []
        if self.packed is not None and _has_product(q):
            size, bits = self.group_size, self.bits
            parts.append(mx.quantized_matmul(q, *self.packed, transpose=True, group_size=size, bits=bits))
        else:
            parts += [q @ rows.swapaxes(-1, -2) for _, rows in self._unpacked()]
        if self.dense is not None:
            parts.append(q @ self.dense.swapaxes(-1, -2))
        return mx.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]

    def weighted(self, weights: mx.array) -> mx.array:
        """Weights `[B, heads, n, N]` times the rows, `[B, heads, n, D]`."""
        count, parts = self.packed_positions, []
        if self.packed is not None and _has_product(weights):
            size, bits = self.group_size, self.bits
            some = weights[..., :count]
            parts.append(mx.quantized_matmul(some, *self.packed, transpose=False, group_size=size, bits=bits))
        else:
            parts += [weights[..., start : start + rows.shape[2]] @ rows for start, rows in self._unpacked()]
        if self.dense is not None:
            parts.append(weights[..., count:] @ self.dense)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def _unpacked(self) -> list[tuple[int, mx.array]]:
        """The quantized positions in pieces, each made dense when it is used: the first one's number, and the rows."""
        if self.packed is None:
            return []
        pieces = []
        for start in range(0, self.packed_positions, PIECE):
            words, scales, biases = (part[:, :, start : start + PIECE] for part in self.packed)
            rows = mx.dequantize(words, scales, biases, group_size=self.group_size, bits=self.bits)
            pieces.append((start, rows))
        return pieces


def quantized_attention(q: mx.array, k: QuantizedRows, v: QuantizedRows, *, scale: float, mask: str | None) -> mx.array:
    """`mx.fast.scaled_dot_product_attention` of `[B, heads, n, D]`, for the masks None and "causal"."""
    batch, heads, queries, dim = q.shape
    held = k.dense if k.packed is None else k.packed[0]
    assert held is not None
    parts = []
    for start in range(0, queries, QUERIES):
        some = q[:, :, start : start + QUERIES]
        count, first = some.shape[2], k.positions - queries + start
        # Queries of several heads that share one head of keys are more rows of the same product.
        some = some.reshape(batch, held.shape[1], -1, dim)
        causal = mask == "causal" and queries > 1
        attended = _attend(some, k, v, scale, first + mx.arange(some.shape[2]) % count if causal else None)
        parts.append(attended.reshape(batch, heads, count, dim))
    return mx.concatenate(parts, axis=2) if len(parts) > 1 else parts[0]


def _attend(q: mx.array, k: QuantizedRows, v: QuantizedRows, scale: float, places: mx.array | None) -> mx.array:
    """`places` `[n]` are the queries' positions, if they do not see those after them."""
    dtype = q.dtype
    # In bfloat16 a score would be off by more than eight bits of its keys are.
    q = (q * scale).astype(mx.float32 if dtype == mx.bfloat16 else dtype)
    scores = k.scores(q)
    if places is not None:
        scores = masked(scores, places[:, None], mx.arange(scores.shape[-1]))
    if not (on_cpu() and scores.dtype == mx.float32):
        return v.weighted(mx.softmax(scores, axis=-1, precise=True)).astype(dtype)
    weights = exponential(scores, scores.max(axis=-1, keepdims=True))
    return (v.weighted(weights) / weights.sum(axis=-1, keepdims=True)).astype(dtype)


def _has_product(x: mx.array) -> bool:
    """Whether MLX multiplies x `[..., n, m]` by quantized rows faster than by the same rows unpacked: on Metal, and on
    a CPU one row in float32. MLX's CUDA backend lacks some of these products."""
    if on_cpu():
        return x.shape[-2] == 1 and x.dtype == mx.float32
    return mx.metal.is_available()
