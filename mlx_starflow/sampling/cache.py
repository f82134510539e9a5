"""The KV cache of one transformer layer during inversion, dense or quantized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import mlx.core as mx

from mlx_starflow.errors import StarflowError
from mlx_starflow.kernels.attention import Rows
from mlx_starflow.kernels.quantized_attention import Packed, QuantizedRows, group_size
from mlx_starflow.models.flow import BlockConfig

KVBits = int | tuple[int, int]
"""Bits of a number in a KV cache, 0: as the flow computes it; or those of guidance's branch with the condition and of
the one with the null condition."""

KV_BITS: tuple[KVBits, ...] = (0, 8, (8, 4), 4)
"""Those that there are, what costs least first. Guidance multiplies what the null branch is off by with its weight, and
what the other one is off by with 1 + its weight; and that one is what an unguided likelihood is made of."""

KV_CHOICES: dict[str, KVBits | None] = {"auto": None, "none": 0, "8": 8, "8,4": (8, 4), "4": 4}
"""What users call them; None: whoever knows how much memory there is decides."""

RECENT = 64
"""So many of the last positions, and up to twice as many, are not quantized yet, nor are those that come: a window's.
Guesses that go through rounded keys stand still late, if at all. And a token is predicted from those just before it
above all, so that most of what quantizing costs is spared."""

MOST_DENSE = 512
"""Of more positions that come at once, all but the last are quantized before anything reads them."""


class KVCache:
    """Keys and values of exactly as many positions as the sequence has, so that nothing is ever copied to grow.

    Keys come in with their rotary positions already applied: a step costs the same wherever it is. Evaluate after
    every step, so that the slice assignments happen in place.
    """

    def __init__(self, length: int):
        self.length = length
        self.offset = 0
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    @property
    def arrays(self) -> list[mx.array]:
        """All that it holds."""
        return [array for array in (self.keys, self.values) if array is not None]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append `[B, heads, n, D]` and return all that is cached, `[B, heads, offset, D]`."""
        if self.keys is None or self.values is None:
            shape = (*keys.shape[:2], self.length, keys.shape[3])
            self.keys = mx.zeros(shape, keys.dtype)
            self.values = mx.zeros(shape, values.dtype)
        start, self.offset = self.offset, self.offset + keys.shape[2]
        self.keys[..., start : self.offset, :] = keys
        self.values[..., start : self.offset, :] = values
        return self.keys[..., : self.offset, :], self.values[..., : self.offset, :]

    def trim(self, n: int) -> None:
        """Forget the last `n` positions."""
        self.offset -= min(n, self.offset)


class QuantizedKVCache:
    """A `KVCache` whose numbers have 8 or 4 bits, each group of them along the head a scale and a bias.

    Positions are quantized when `RECENT` others have come after them, so what a token reads depends a little on how
    many are fed at once.
    """

    def __init__(self, length: int, head_dim: int, bits: int):
        """Raises StarflowError if heads of this size cannot be quantized."""
        size = group_size(head_dim)
        if size is None:
            raise StarflowError(_cannot(head_dim))
        self.length, self.group_size, self.bits = length, size, bits
        self._keys, self._values = _Rows(self), _Rows(self)

    @property
    def offset(self) -> int:
        return self._keys.offset

    @property
    def arrays(self) -> list[mx.array]:
        return [*self._keys.arrays, *self._values.arrays]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[QuantizedRows, QuantizedRows]:
        """Append `[B, heads, n, D]` and return all that is cached."""
        return self._keys.append(keys), self._values.append(values)

    def trim(self, n: int) -> None:
        """Forget the last `n` positions."""
        self._keys.trim(n)
        self._values.trim(n)


class _Rows:
    """The keys, or the values, of a `QuantizedKVCache`."""

    def __init__(self, cache: QuantizedKVCache):
        self.length, self.group_size, self.bits = cache.length, cache.group_size, cache.bits
        self.count = 0
        self.packed: Packed | None = None
        self.dense: mx.array | None = None

    @property
    def offset(self) -> int:
        return self.count + (0 if self.dense is None else self.dense.shape[2])

    @property
    def arrays(self) -> list[mx.array]:
        return [*(self.packed or ()), *(() if self.dense is None else (self.dense,))]

    def append(self, rows: mx.array) -> QuantizedRows:
        if self.dense is not None and self.dense.shape[2] >= 2 * RECENT:
            self._pack_old()
        self.dense = rows if self.dense is None else mx.concatenate([self.dense, rows], axis=2)
        if rows.shape[2] > MOST_DENSE:
            self._pack_old()
        held = None
        if self.packed is not None and self.count:
            held = cast(Packed, tuple(part[:, :, : self.count] for part in self.packed))
        return QuantizedRows(held, self.dense, self.group_size, self.bits)

    def trim(self, n: int) -> None:
        dense = 0 if self.dense is None else self.dense.shape[2]
        if self.dense is not None:
            self.dense = self.dense[:, :, : dense - n] if n < dense else None
        self.count -= min(max(n - dense, 0), self.count)

    def _pack_old(self) -> None:
        assert self.dense is not None
        rows, self.dense = self.dense[:, :, :-RECENT], self.dense[:, :, -RECENT:]
        packed = cast(Packed, tuple(mx.quantize(rows, group_size=self.group_size, bits=self.bits)))
        if self.packed is None:
            shapes = [(*part.shape[:2], self.length, part.shape[3]) for part in packed]
            self.packed = cast(Packed, tuple(mx.zeros(s, part.dtype) for s, part in zip(shapes, packed, strict=True)))
        start, self.count = self.count, self.count + rows.shape[2]
        for held, part in zip(self.packed, packed, strict=True):
            held[:, :, start : self.count] = part


class BranchCaches:
    """A cache for each branch of guidance: of the first half of a batch, and of the second."""

    def __init__(self, length: int, head_dim: int, bits: tuple[int, int]):
        """Raises StarflowError if heads of this size cannot be quantized."""
        self._branches = [QuantizedKVCache(length, head_dim, own) for own in bits]

    @property
    def offset(self) -> int:
        return self._branches[0].offset

    @property
    def arrays(self) -> list[mx.array]:
        return [array for branch in self._branches for array in branch.arrays]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Rows, Rows]:
        """Append `[2 * B, heads, n, D]` and return all that is cached, branch by branch."""
        halves = zip(self._branches, mx.split(keys, 2), mx.split(values, 2), strict=True)
        (k, v), (null_k, null_v) = (branch.update_and_fetch(*rows) for branch, *rows in halves)
        return (k, null_k), (v, null_v)

    def trim(self, n: int) -> None:
        """Forget the last `n` positions."""
        for branch in self._branches:
            branch.trim(n)


Cache = KVCache | QuantizedKVCache | BranchCaches


def make_cache(length: int, head_dim: int, bits: KVBits) -> Cache:
    """A cache of up to `length` positions. Raises StarflowError if heads of this size cannot be quantized."""
    if isinstance(bits, tuple):
        return BranchCaches(length, head_dim, bits)
    return QuantizedKVCache(length, head_dim, bits) if bits else KVCache(length)


def kv_name(bits: KVBits) -> str:
    """What users call these bits."""
    return next(name for name, own in KV_CHOICES.items() if own == bits)


def branch_bits(bits: KVBits) -> tuple[int, int]:
    """Those of the branch with the condition and of the null branch."""
    return bits if isinstance(bits, tuple) else (bits, bits)


def cached_numbers(block: BlockConfig) -> int:
    """Numbers that a block caches of a position: keys and values of each layer."""
    return 2 * block.num_layers * block.num_kv_heads * block.head_dim


def block_kv_bits(blocks: Sequence[BlockConfig], bits: KVBits) -> list[KVBits]:
    """The bits of each block's cache where those of the largest one are to be `bits`.

    Blocks are inverted one after another. Dense half-precision caches that are no larger than the largest one is when
    quantized, and those of a video's single frames, take no memory that is not free anyway: they stay as they are.
    """
    most = max((cached_numbers(block) for block in blocks), default=0) * sum(branch_bits(bits)) / 32
    return [bits if cached_numbers(block) > most and not block.local else 0 for block in blocks]


def can_quantize(blocks: Sequence[BlockConfig]) -> bool:
    """Whether keys and values of all of these blocks can be quantized."""
    return all(group_size(block.head_dim) for block in blocks)


def check_quantizable(blocks: Sequence[BlockConfig], bits: KVBits) -> None:
    """Raise StarflowError if keys and values of these blocks cannot be kept in so many bits."""
    for block, own in zip(blocks, block_kv_bits(blocks, bits), strict=True):
        if own and block.num_layers and group_size(block.head_dim) is None:
            raise StarflowError(_cannot(block.head_dim))


def _cannot(head_dim: int) -> str:
    return (
        f"keys and values of heads of {head_dim} numbers cannot be quantized, which takes multiples of 32: leave out "
        "kv_bits (--kv-bits none)"
    )
