"""One flow block fed a few tokens at a time: what every way of inverting it is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_starflow.errors import StarflowError
from mlx_starflow.kernels.affine import affine_inverse, predict
from mlx_starflow.models.flow import Condition
from mlx_starflow.sampling.cache import KVCache
from mlx_starflow.sampling.guidance import Guidance


def compiled_pieces(block: Any) -> list[Callable[..., Any]]:
    """What a block computes between one attention and the next: everything that the caches have no part in.

    Compiled, a piece costs Python one call. The first takes (h, angles) to queries, keys and values, the last takes
    (h, what attention gave) to raw outputs, those between both to (h, queries, keys, values).
    """
    layers = block.attn_blocks

    def between(before: Any, layer: Any) -> Callable[..., Any]:
        def piece(h: mx.array, attended: mx.array, table: mx.array | None) -> tuple[mx.array, ...]:
            h = before.after(h, attended)
            return h, *layer.before(h, table)

        return mx.compile(piece)

    def end(h: mx.array, attended: mx.array) -> mx.array:
        return block.raw(layers[-1].after(h, attended))

    return [mx.compile(layers[0].before), *map(between, layers, layers[1:]), mx.compile(end)]


def compiled_inverse(block: Any, guidance: Guidance | None) -> Callable[[mx.array, mx.array, Any], mx.array]:
    """(raw outputs, noise, weight of guidance) -> data.

    Not a method: Python's garbage collector cannot see that a compiled method belongs to its object, and would never
    free either.
    """
    clip, softplus = block.config.soft_clip, block.config.use_softplus

    def inverse(raw: mx.array, z: mx.array, weight: float | mx.array) -> mx.array:
        if guidance is None:
            return affine_inverse(raw, z, clip, softplus)
        return guidance.inverse(raw, z, clip, softplus, weight)

    return mx.compile(inverse)


class BlockDecoder:
    """Predicts (mu, log sigma) of tokens from the tokens before them, in the block's order.

    With guidance the network sees the batch twice, once with the null condition, in one evaluation.

    Attributes:
        first: number of the first token that is predicted (1 if the first one passes unchanged).
        evaluations: how often the network was run.
    """

    def __init__(
        self,
        block: Any,
        batch: int,
        length: int,
        table: mx.array | None,
        condition: Condition,
        guidance: Guidance | None,
        temperature: float | mx.array = 1.0,
        frames: int = 1,
    ):
        """A decoder of `length` tokens; give `guidance` if, and only if, the condition is guided.

        Of a video with `frames` a local block decodes all frames at once: `batch` and `length` are those of
        `FlowBlock.arrange`.
        """
        self.block, self.length, self.guidance, self.temperature = block, length, guidance, temperature
        self.frames = frames
        self.copies = 2 if guidance else 1
        self.offset = condition.offset
        start = block.first_input(batch * self.copies)
        self.first = 0 if start is not None else 1
        self.start = start
        prefix = condition.prefix
        self.prefix_length = 0 if prefix is None else prefix.shape[1]
        positions = self.prefix_length + length
        self.table = None if table is None else block.positions(table, positions)
        self.caches = [KVCache(positions) for _ in block.attn_blocks]
        self.pieces = compiled_pieces(block)
        self.to_data = compiled_inverse(block, guidance)
        self.evaluations = 0
        if prefix is not None:
            self._remember(prefix)

    @property
    def known(self) -> int:
        """How many inputs the cache holds, the start token included."""
        return self.caches[0].offset - self.prefix_length

    def _remember(self, h: mx.array) -> None:
        """Fill the caches with embedded inputs that predict nothing."""
        self.block.transform(h, self._positions(h), self.caches, self.temperature)
        mx.eval([(cache.keys, cache.values) for cache in self.caches])

    def _positions(self, h: mx.array) -> mx.array | None:
        start = self.caches[0].offset
        return None if self.table is None else self.table[start : start + h.shape[1]]

    def _inputs(self, x: mx.array, start: int, stop: int) -> mx.array:
        """What the network reads to predict tokens `start` to `stop`, embedded; once more for guidance."""
        inputs = x[:, max(start - 1, 0) : stop - 1]
        if self.copies == 2:
            inputs = mx.concatenate([inputs, inputs])
        if start == 0 and self.start is not None:
            inputs = mx.concatenate([self.start.astype(inputs.dtype), inputs], axis=1)
        return self.block.embed(inputs, self.known, self.offset)

    def feed(self, x: mx.array, stop: int) -> None:
        """Fill the cache with the inputs before those that token `stop` of `[B, N, C]` needs.

        A frame at a time, so that a long past takes no more memory than the cache.
        """
        step = x.shape[1] if self.block.config.local else self.length // self.frames
        for start in range(self.first, stop, step):
            self._remember(self._inputs(x, start, min(start + step, stop)))

    def rewind(self) -> None:
        """Forget all inputs, and keep what stands before them."""
        self.trim(self.known)

    def _raw(self, x: mx.array, start: int, stop: int) -> mx.array:
        self.evaluations += 1
        h = self._inputs(x, start, stop)
        table = self._positions(h)
        begin, *between, end = self.pieces
        q, k, v = begin(h, table)
        for layer, cache, piece in zip(self.block.attn_blocks, self.caches, [*between, None], strict=True):
            attended = layer.attention.attend(q, *cache.update_and_fetch(k, v), self.temperature)
            if piece is not None:
                h, q, k, v = piece(h, attended, table)
        return end(h, attended)

    def _weight(self, start: int, stop: int) -> float | mx.array:
        return self.guidance.at(start - self.first, stop - start, self.length - self.first)

    def predict(self, x: mx.array, start: int, stop: int) -> tuple[mx.array, mx.array]:
        """(mu, log sigma) `[B, stop - start, C]` of tokens `start` to `stop`, given the tokens x `[B, N, C]`.

        The cache must hold exactly the inputs before those that are needed, and holds them too afterwards.
        """
        raw, config = self._raw(x, start, stop), self.block.config
        if self.guidance is None:
            return predict(raw, config.soft_clip, config.use_softplus)
        return self.guidance.affine(raw, config.soft_clip, config.use_softplus, self._weight(start, stop))

    def invert(self, x: mx.array, z: mx.array, start: int, stop: int) -> mx.array:
        """Tokens `start` to `stop` of noise z `[B, N, C]`, mapped to data as `predict` says."""
        weight = self._weight(start, stop) if self.guidance else 0.0
        return self.to_data(self._raw(x, start, stop), z[:, start:stop], weight)

    def trim(self, n: int) -> None:
        """Forget the last `n` inputs."""
        for cache in self.caches:
            cache.trim(n)


def check_finite(x: mx.array, what: str) -> None:
    """Raise StarflowError if an array holds a NaN or an infinity: better than a black picture."""
    if not mx.isfinite(x).all().item():
        raise StarflowError(
            f"{what} is not finite: try a lower guidance or temperature, or weights in float32 (--dtype float32)"
        )
