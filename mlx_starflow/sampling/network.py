"""A flow block's network with what it remembers of the tokens it was fed: the part of decoding that takes time."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import mlx.core as mx

from mlx_starflow.cpu import native
from mlx_starflow.kernels.plain import Array
from mlx_starflow.models.flow import Condition
from mlx_starflow.sampling.cache import KVCache


class CachedNetwork(Protocol):
    """A network that keeps the keys and values of what it was fed.

    Attributes:
        arrays: the module of the arrays that it takes and gives, mlx.core or numpy.
        prefix_length: how many positions stand before the tokens.
        known: how many tokens it remembers.
        cache_bytes: of keys and values, room for later ones included.
    """

    arrays: ModuleType
    prefix_length: int
    known: int
    cache_bytes: int

    def __call__(self, tokens: Array) -> Array:
        """The next input tokens, `[B, n, C]` -> the network's raw outputs for them, `[B, n, 2 * C]`."""

    def remember(self, tokens: Array) -> None:
        """Be fed input tokens, maybe many, whose outputs nobody reads."""

    def trim(self, n: int) -> None:
        """Forget the last `n` tokens."""

    def own(self, array: Array) -> Array:
        """The same as one of `arrays`."""

    def launch(self, *arrays: Array) -> None:
        """Begin to compute arrays."""

    def evaluate(self, *arrays: Array) -> None:
        """Compute arrays."""


def cached_network(
    block: Any,
    batch: int,
    length: int,
    rope_frequencies: mx.array | None,
    condition: Condition,
    temperature: float | mx.array,
) -> CachedNetwork:
    """That of a block for up to `length` tokens of `batch` sequences, by the fastest code that knows it.

    The other arguments are those of `FlowBlock.outputs`.
    """
    positions = length if condition.prefix is None else condition.prefix.shape[1] + length
    rope_frequencies = None if rope_frequencies is None else block.rope_frequencies(rope_frequencies, positions)
    arguments = (block, batch, length, rope_frequencies, condition, temperature)
    return native.network(*arguments) or CompiledNetwork(*arguments)


class CompiledNetwork:
    """In MLX, compiled but for attention and its cache."""

    arrays = mx

    def __init__(
        self,
        block: Any,
        batch: int,
        length: int,
        rope_frequencies: mx.array | None,
        condition: Condition,
        temperature: float | mx.array,
    ):
        """Arguments as for `cached_network`; `rope_frequencies` are those of the block's own positions."""
        self.block, self.offset, self.temperature = block, condition.offset, temperature
        self.rope_frequencies = rope_frequencies
        self.prefix_length = 0 if condition.prefix is None else condition.prefix.shape[1]
        self.caches = [KVCache(self.prefix_length + length) for _ in block.attn_blocks]
        self.pieces = compiled_pieces(block)
        if condition.prefix is not None:
            self._remember(condition.prefix)

    @property
    def known(self) -> int:
        return self.caches[0].offset - self.prefix_length

    @property
    def cache_bytes(self) -> int:
        return sum(cache.keys.nbytes + cache.values.nbytes for cache in self.caches if cache.keys is not None)

    def __call__(self, tokens: mx.array) -> mx.array:
        h = self.block.embed(tokens, self.known, self.offset)
        rope_frequencies = self._rope_frequencies(h)
        begin, *between, end = self.pieces
        q, k, v = begin(h, rope_frequencies)
        for layer, cache, piece in zip(self.block.attn_blocks, self.caches, [*between, None], strict=True):
            attended = layer.attention.attend(q, *cache.update_and_fetch(k, v), self.temperature)
            if piece is not None:
                h, q, k, v = piece(h, attended, rope_frequencies)
        return end(h, attended)

    def remember(self, tokens: mx.array) -> None:
        self._remember(self.block.embed(tokens, self.known, self.offset))

    def trim(self, n: int) -> None:
        for cache in self.caches:
            cache.trim(n)

    def own(self, array: Array) -> mx.array:
        return array if isinstance(array, mx.array) else mx.array(array)

    def launch(self, *arrays: mx.array) -> None:
        mx.async_eval(*arrays)

    def evaluate(self, *arrays: mx.array) -> None:
        mx.eval(*arrays)

    def _remember(self, h: mx.array) -> None:
        self.block.transform(h, self._rope_frequencies(h), self.caches, self.temperature)
        mx.eval([(cache.keys, cache.values) for cache in self.caches])

    def _rope_frequencies(self, h: mx.array) -> mx.array | None:
        start = self.caches[0].offset
        return None if self.rope_frequencies is None else self.rope_frequencies[start : start + h.shape[1]]


def compiled_pieces(block: Any) -> list[Callable[..., Any]]:
    """What a block computes before its first attention, between one and the next, and after the last, each compiled.

    Compiled, a piece costs Python one call. The first takes (h, rope frequencies) to queries, keys and values; the
    last takes (h, what attention gave) to raw outputs; those between both to (h, queries, keys, values).
    """
    layers = block.attn_blocks

    def between(before: Any, layer: Any) -> Callable[..., Any]:
        def piece(h: mx.array, attended: mx.array, rope_frequencies: mx.array | None) -> tuple[mx.array, ...]:
            h = before.after(h, attended)
            return h, *layer.before(h, rope_frequencies)

        return mx.compile(piece)

    def end(h: mx.array, attended: mx.array) -> mx.array:
        return block.raw(layers[-1].after(h, attended))

    return [mx.compile(layers[0].before), *map(between, layers, layers[1:]), mx.compile(end)]
