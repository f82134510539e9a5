"""A flow block's network with what it remembers of the tokens it was fed: the part of decoding that takes time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import mlx.core as mx

from mlx_starflow import cpu
from mlx_starflow.models.flow import Condition, FlowBlock
from mlx_starflow.models.transformer import TransformerLayer
from mlx_starflow.sampling.cache import Cache, KVBits, make_cache

LAYERS_AHEAD = 4
"""A GPU is given the first layer of an evaluation as soon as it is built, and from then on so many at a time: it
computes while Python builds the rest."""


class CachedNetwork(Protocol):
    """A network that keeps the keys and values of what it was fed.

    Attributes:
        prefix_length: how many positions stand before the tokens.
        known: how many tokens it remembers.
        cache_bytes: of keys and values, room for later ones included.
    """

    prefix_length: int

    @property
    def known(self) -> int: ...

    @property
    def cache_bytes(self) -> int: ...

    def __call__(self, tokens: mx.array) -> mx.array:
        """The next input tokens, float32 `[B, n, C]` -> the affine parameters they predict, `[B, n, 2 * C]`."""

    def remember(self, tokens: mx.array) -> None:
        """Be fed input tokens, maybe many, whose outputs nobody reads."""

    def trim(self, n: int) -> None:
        """Forget the last `n` tokens."""


def cached_network(
    block: FlowBlock,
    batch: int,
    length: int,
    rope_frequencies: mx.array | None,
    condition: Condition,
    temperature: float | mx.array,
    kv_bits: KVBits = 0,
) -> CachedNetwork:
    """That of a block for up to `length` tokens of `batch` sequences, by the fastest code that knows it.

    The C++ network knows no quantized keys and values: with `kv_bits` it is MLX that computes, on CPUs too. The other
    arguments are those of `FlowBlock.all_affine_parameters`.
    """
    positions = length if condition.prefix is None else condition.prefix.shape[1] + length
    rope_frequencies = None if rope_frequencies is None else block.rope_frequencies(rope_frequencies, positions)
    arguments = (block, batch, length, rope_frequencies, condition, temperature)
    fast = None if kv_bits else cpu.fast_network(*arguments)
    return fast or CompiledNetwork(*arguments, kv_bits)


class CompiledNetwork:
    """In MLX, compiled but for attention and its cache."""

    def __init__(
        self,
        block: FlowBlock,
        batch: int,
        length: int,
        rope_frequencies: mx.array | None,
        condition: Condition,
        temperature: float | mx.array,
        kv_bits: KVBits = 0,
    ):
        """Arguments as for `cached_network`; `rope_frequencies` are those of the block's own positions."""
        self.block, self.offset, self.temperature = block, condition.offset, temperature
        self.rope_frequencies = rope_frequencies
        self.prefix_length = 0 if condition.prefix is None else condition.prefix.shape[1]
        positions, head_dim = self.prefix_length + length, block.config.head_dim
        self.caches: list[Cache] = [make_cache(positions, head_dim, kv_bits) for _ in block.layers]
        self.pieces = compiled_pieces(block)
        if condition.prefix is not None:
            self._remember(condition.prefix)

    @property
    def known(self) -> int:
        return self.caches[0].offset - self.prefix_length

    @property
    def cache_bytes(self) -> int:
        return sum(array.nbytes for cache in self.caches for array in cache.arrays)

    def __call__(self, tokens: mx.array) -> mx.array:
        # The step that gave these tokens runs, and writes the caches in place, while Python builds the next one.
        mx.async_eval(tokens)
        h = self.block.embed(tokens, self.known, self.offset)
        rope_frequencies = self._rope_frequencies(h)
        begin, *between, end = self.pieces
        q, k, v = begin(h, rope_frequencies)
        for number, (layer, cache) in enumerate(zip(self.block.layers, self.caches, strict=True)):
            keys, values = cache.update_and_fetch(k, v)
            attended = layer.attention.attend(q, keys, values, self.temperature)
            if number == len(between):
                break
            h, q, k, v = between[number](h, attended, rope_frequencies)
            if number % LAYERS_AHEAD == 0:
                mx.async_eval(h, q, k, v)
        return end(h, attended)

    def remember(self, tokens: mx.array) -> None:
        self._remember(self.block.embed(tokens, self.known, self.offset))

    def trim(self, n: int) -> None:
        for cache in self.caches:
            cache.trim(n)

    def _remember(self, h: mx.array) -> None:
        self.block.transform(h, self._rope_frequencies(h), self.caches, self.temperature)
        mx.eval([cache.arrays for cache in self.caches])

    def _rope_frequencies(self, h: mx.array) -> mx.array | None:
        start = self.caches[0].offset
        return None if self.rope_frequencies is None else self.rope_frequencies[start : start + h.shape[1]]


def compiled_pieces(block: FlowBlock) -> list[Callable[..., Any]]:
    """What a block computes before its first attention, between one and the next, and after the last, each compiled.

    Compiled, a piece costs Python one call. The first takes (h, rope frequencies) to queries, keys and values; the
    last takes (h, what attention gave) to affine parameters; those between both to (h, queries, keys, values).
    """
    layers = block.layers

    def between(before: TransformerLayer, layer: TransformerLayer) -> Callable[..., Any]:
        def piece(h: mx.array, attended: mx.array, rope_frequencies: mx.array | None) -> tuple[mx.array, ...]:
            h = before.after(h, attended)
            return h, *layer.before(h, rope_frequencies)

        return mx.compile(piece)

    def end(h: mx.array, attended: mx.array) -> mx.array:
        return block.affine_parameters(layers[-1].after(h, attended))

    return [mx.compile(layers[0].before), *map(between, layers, layers[1:]), mx.compile(end)]
