"""One flow block fed a few tokens at a time: what every way of inverting it is made of."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlx_starflow.errors import NotFinite
from mlx_starflow.kernels.affine import affine_inverse, predict
from mlx_starflow.models.flow import Condition, FlowBlock
from mlx_starflow.sampling.guidance import Guidance
from mlx_starflow.sampling.network import cached_network

Predict = Callable[[mx.array, "float | mx.array"], "tuple[mx.array, mx.array]"]
Invert = Callable[[mx.array, mx.array, "float | mx.array"], mx.array]


def affine_functions(block: FlowBlock, guidance: Guidance | None) -> tuple[Predict, Invert]:
    """Compiled: (affine parameters, weight of guidance) -> (mu, log sigma), and (these, noise, weight) -> data.

    Not methods: Python's garbage collector cannot see that a compiled method belongs to its object, and would never
    free either.
    """
    affine = block.config.affine

    def affine_of(parameters: mx.array, weight: float | mx.array) -> tuple[mx.array, mx.array]:
        if guidance is None:
            return predict(parameters, affine)
        return guidance.predict(parameters, affine, weight)

    def inverse(parameters: mx.array, z: mx.array, weight: float | mx.array) -> mx.array:
        if guidance is None:
            return affine_inverse(parameters, z, affine)
        return guidance.inverse(parameters, z, affine, weight)

    return mx.compile(affine_of), mx.compile(inverse)


class BlockDecoder:
    """Predicts (mu, log sigma) of tokens from the tokens before them, in the block's order.

    With guidance the network sees the batch twice, once with the null condition, in one evaluation.

    Attributes:
        first: number of the first token that is predicted (1 if the first one passes unchanged).
        evaluations: how often the network was run.
    """

    def __init__(
        self,
        block: FlowBlock,
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
        start = block.first_input(batch * self.copies)
        self.first = 0 if start is not None else 1
        self.start = None if start is None else start.astype(mx.float32)
        self.to_affine, self.to_data = affine_functions(block, guidance)
        self.evaluations = 0

    @property
    def known(self) -> int:
        """How many inputs the cache holds, the start token included."""
        return self.network.known

    def _inputs(self, x: mx.array, start: int, stop: int) -> mx.array:
        """What the network reads to predict tokens `start` to `stop`; once more for guidance."""
        inputs = x[:, max(start - 1, 0) : stop - 1]
        if self.copies == 2:
            inputs = mx.concatenate([inputs, inputs])
        if start == 0 and self.start is not None:
            inputs = mx.concatenate([self.start, inputs], axis=1)
        return inputs

    def feed(self, x: mx.array, stop: int) -> None:
        """Fill the cache with the inputs before those that token `stop` of `[B, N, C]` needs.

        A frame at a time, so that a long past takes no more memory than the cache.
        """
        step = x.shape[1] if self.block.config.local else self.length // self.frames
        for start in range(self.first, stop, step):
            self.network.remember(self._inputs(x, start, min(start + step, stop)))

    def rewind(self) -> None:
        """Forget all inputs, and keep what stands before them."""
        self.trim(self.known)

    def _parameters(self, x: mx.array, start: int, stop: int) -> mx.array:
        self.evaluations += 1
        return self.network(self._inputs(x, start, stop))

    def _weight(self, start: int, stop: int) -> float | mx.array:
        if self.guidance is None:
            return 0.0
        return self.guidance.at(start - self.first, stop - start, self.length - self.first)

    def predict(self, x: mx.array, start: int, stop: int) -> tuple[mx.array, mx.array]:
        """(mu, log sigma) `[B, stop - start, C]` of tokens `start` to `stop`, given the tokens x `[B, N, C]`.

        The cache must hold exactly the inputs before those that are needed, and holds them too afterwards.
        """
        return self.to_affine(self._parameters(x, start, stop), self._weight(start, stop))

    def invert(self, x: mx.array, z: mx.array, start: int, stop: int) -> mx.array:
        """Tokens `start` to `stop` of noise z `[B, N, C]`, mapped to data as `predict` says."""
        return self.to_data(self._parameters(x, start, stop), z[:, start:stop], self._weight(start, stop))

    def trim(self, n: int) -> None:
        """Forget the last `n` inputs."""
        self.network.trim(n)


def check_finite(x: mx.array, what: str) -> None:
    """Raise NotFinite if an array holds a NaN or an infinity."""
    if not mx.isfinite(x).all().item():
        raise NotFinite(
            f"{what} is not finite: try a lower guidance or temperature, or weights in float32 (--dtype float32)"
        )
