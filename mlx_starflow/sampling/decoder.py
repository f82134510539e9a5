"""One flow block fed a few tokens at a time: what every way of inverting it is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.kernels.affine import affine_inverse, predict
from mlx_starflow.kernels.plain import Array
from mlx_starflow.models.flow import Condition
from mlx_starflow.sampling.guidance import Guidance
from mlx_starflow.sampling.network import cached_network

quietly = np.errstate(over="ignore", divide="ignore", invalid="ignore")
"""Guesses may be far off: a result that is not finite is for `check_finite`, not for NumPy, to report."""


def inverse_of(block: Any, guidance: Guidance | None) -> Callable[[Array, Array, Any], Array]:
    """(raw outputs, noise, weight of guidance) -> data.

    Not a method: Python's garbage collector cannot see that a compiled method belongs to its object, and would never
    free either.
    """
    clip, softplus = block.config.soft_clip, block.config.use_softplus

    def inverse(raw: Array, z: Array, weight: float | Array) -> Array:
        if guidance is None:
            return affine_inverse(raw, z, clip, softplus)
        return guidance.inverse(raw, z, clip, softplus, weight)

    return inverse


class BlockDecoder:
    """Predicts (mu, log sigma) of tokens from the tokens before them, in the block's order.

    With guidance the network sees the batch twice, once with the null condition, in one evaluation. Tokens are `own`
    arrays: MLX's, or NumPy's where the network is computed outside of MLX.

    Attributes:
        first: number of the first token that is predicted (1 if the first one passes unchanged).
        evaluations: how often the network was run.
        arrays, own, launch, evaluate: those of its `CachedNetwork`.
    """

    def __init__(
        self,
        block: Any,
        batch: int,
        length: int,
        rope_frequencies: mx.array | None,
        condition: Condition,
        guidance: Guidance | None,
        temperature: float | mx.array = 1.0,
        frames: int = 1,
    ):
        """A decoder of `length` tokens; give `guidance` if, and only if, the condition is guided.

        Of a video with `frames` a local block decodes all frames at once: `batch` and `length` are those of
        `FlowBlock.permute`.
        """
        self.block, self.length, self.guidance, self.frames = block, length, guidance, frames
        self.copies = 2 if guidance else 1
        self.network = cached_network(block, batch * self.copies, length, rope_frequencies, condition, temperature)
        self.arrays, self.own = self.network.arrays, self.network.own
        self.launch, self.evaluate = self.network.launch, self.network.evaluate
        start = block.first_input(batch * self.copies)
        self.first = 0 if start is not None else 1
        self.start = None if start is None else self.own(start.astype(mx.float32))
        inverse = inverse_of(block, guidance)
        self.to_data = mx.compile(inverse) if self.arrays is mx else inverse
        self.evaluations = 0

    @property
    def known(self) -> int:
        """How many inputs the cache holds, the start token included."""
        return self.network.known

    def _inputs(self, x: Array, start: int, stop: int) -> Array:
        """What the network reads to predict tokens `start` to `stop`; once more for guidance."""
        inputs = x[:, max(start - 1, 0) : stop - 1]
        if self.copies == 2:
            inputs = self.arrays.concatenate([inputs, inputs])
        if start == 0 and self.start is not None:
            inputs = self.arrays.concatenate([self.start, inputs], axis=1)
        return inputs

    def feed(self, x: Array, stop: int) -> None:
        """Fill the cache with the inputs before those that token `stop` of `[B, N, C]` needs.

        A frame at a time, so that a long past takes no more memory than the cache.
        """
        step = x.shape[1] if self.block.config.local else self.length // self.frames
        for start in range(self.first, stop, step):
            self.network.remember(self._inputs(x, start, min(start + step, stop)))

    def rewind(self) -> None:
        """Forget all inputs, and keep what stands before them."""
        self.trim(self.known)

    def _raw(self, x: Array, start: int, stop: int) -> Array:
        self.evaluations += 1
        return self.network(self._inputs(x, start, stop))

    def _weight(self, start: int, stop: int) -> float | Array:
        weight = self.guidance.at(start - self.first, stop - start, self.length - self.first)
        return self.own(weight) if isinstance(weight, mx.array) else weight

    @quietly
    def predict(self, x: Array, start: int, stop: int) -> tuple[Array, Array]:
        """(mu, log sigma) `[B, stop - start, C]` of tokens `start` to `stop`, given the tokens x `[B, N, C]`.

        The cache must hold exactly the inputs before those that are needed, and holds them too afterwards.
        """
        raw, config = self._raw(x, start, stop), self.block.config
        if self.guidance is None:
            return predict(raw, config.soft_clip, config.use_softplus)
        return self.guidance.affine(raw, config.soft_clip, config.use_softplus, self._weight(start, stop))

    @quietly
    def invert(self, x: Array, z: Array, start: int, stop: int) -> Array:
        """Tokens `start` to `stop` of noise z `[B, N, C]`, mapped to data as `predict` says."""
        weight = self._weight(start, stop) if self.guidance else 0.0
        return self.to_data(self._raw(x, start, stop), z[:, start:stop], weight)

    def trim(self, n: int) -> None:
        """Forget the last `n` inputs."""
        self.network.trim(n)


def check_finite(x: mx.array, what: str) -> None:
    """Raise StarflowError if an array holds a NaN or an infinity: better than a black picture."""
    if not mx.isfinite(x).all().item():
        raise StarflowError(
            f"{what} is not finite: try a lower guidance or temperature, or weights in float32 (--dtype float32)"
        )
