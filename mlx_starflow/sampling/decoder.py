"""One flow block fed a few tokens at a time: what every way of inverting it is made of."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_starflow.errors import StarflowError
from mlx_starflow.kernels.affine import affine_inverse, predict
from mlx_starflow.models.flow import Condition
from mlx_starflow.sampling.cache import KVCache
from mlx_starflow.sampling.guidance import Guidance


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
    ):
        """A decoder of `length` tokens; give `guidance` if, and only if, the condition is guided."""
        self.block, self.length, self.guidance, self.temperature = block, length, guidance, temperature
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
        self.evaluations = 0
        if prefix is not None:
            self._transform(prefix)
            mx.eval([(cache.keys, cache.values) for cache in self.caches])

    @property
    def known(self) -> int:
        """How many inputs the cache holds, the start token included."""
        return self.caches[0].offset - self.prefix_length

    def _transform(self, h: mx.array) -> mx.array:
        start = self.caches[0].offset
        table = None if self.table is None else self.table[start : start + h.shape[1]]
        return self.block.transform(h, table, self.caches, self.temperature)

    def _inputs(self, x: mx.array, start: int, stop: int) -> mx.array:
        """What the network reads to predict tokens `start` to `stop`, embedded; once more for guidance."""
        inputs = x[:, max(start - 1, 0) : stop - 1]
        if self.copies == 2:
            inputs = mx.concatenate([inputs, inputs])
        if start == 0 and self.start is not None:
            inputs = mx.concatenate([self.start.astype(inputs.dtype), inputs], axis=1)
        return self.block.embed(inputs, self.known, self.offset)

    def feed(self, x: mx.array, stop: int) -> None:
        """Fill the cache with the inputs before those that token `stop` of `[B, N, C]` needs."""
        if stop > self.first:
            self._transform(self._inputs(x, self.first, stop))
            mx.eval([(cache.keys, cache.values) for cache in self.caches])

    def _raw(self, x: mx.array, start: int, stop: int) -> mx.array:
        self.evaluations += 1
        return self.block.raw(self._transform(self._inputs(x, start, stop)))

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
        raw, config, z = self._raw(x, start, stop), self.block.config, z[:, start:stop]
        if self.guidance is None:
            return affine_inverse(raw, z, config.soft_clip, config.use_softplus)
        return self.guidance.inverse(raw, z, config.soft_clip, config.use_softplus, self._weight(start, stop))

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
