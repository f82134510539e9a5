"""One flow block fed a few tokens at a time: what every way of inverting it is made of."""

from __future__ import annotations

import mlx.core as mx

from mlx_starflow.errors import NotFinite
from mlx_starflow.models.flow import Condition, FlowBlock, block_products_in
from mlx_starflow.sampling.cache import KVBits
from mlx_starflow.sampling.guidance import Guidance
from mlx_starflow.sampling.inverter import CouplingInverter, Inverter, MLXInverter, make_inverter
from mlx_starflow.sampling.network import cached_network


class BlockDecoder:
    """Inverts the tokens of a block, a few at a time, in the block's order.

    With guidance the network sees the batch twice, once with the null condition, in one evaluation.

    Attributes:
        z: the noise that `begin` was given.
        first: number of the first token that is predicted (1 if the first one passes unchanged).
        evaluations: how often the network was run.
        products: what the block's layers multiply in.
        draft: what a student guesses of the data, `[B, N, C]` in the block's order, if there is one.
        noise_floor: residuals that this precision cannot tell from 0, if a window had to measure it; else 0.
    """

    z: mx.array
    _inverter: Inverter

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
        kv_bits: KVBits = 0,
    ):
        """A decoder of `length` tokens; give `guidance` if, and only if, the condition is guided.

        Of a video with `frames` a local block decodes all frames at once: `batch` and `length` are those of
        `FlowBlock.permute`. `kv_bits`: of keys and values in the cache, see `cache.KVBits`; 0: dense.
        """
        self.block, self.length, self.guidance, self.frames = block, length, guidance, frames
        batch *= 2 if guidance else 1
        self.network = cached_network(block, batch, length, rope_frequencies, condition, temperature, kv_bits)
        start = block.first_input(batch)
        self.first = 0 if start is not None else 1
        self.start = None if start is None else start.astype(mx.float32)
        self.evaluations = 0
        self.products = block_products_in(block)
        self.draft: mx.array | None = None
        self.noise_floor = 0.0

    @property
    def known(self) -> int:
        """How many inputs the cache holds, the start token included."""
        return self.network.known

    def begin(self, z: mx.array) -> None:
        """Take noise `[B, N, C]`, N at most `length`; the data begin as a copy of it. The cache keeps what it holds."""
        self.z, guidance, first = z, self.guidance, self.first
        if not self.block.is_affine:
            self._inverter = CouplingInverter(self.network, z, self.start, self.block)
            return
        weight = 0.0 if guidance is None else guidance.at(-first, z.shape[1], self.length - first)
        arguments = (self.network, z, self.start, self.block.config.affine, guidance, weight)
        in_order = self.block.reads_in_order
        self._inverter = make_inverter(*arguments) if in_order else MLXInverter(*arguments, self.block.inputs)

    def data(self, start: int, stop: int) -> mx.array:
        """Tokens `start` to `stop` of the data, as far as they are made."""
        return self._inverter.data(start, stop)

    def write(self, start: int, tokens: mx.array) -> None:
        """Replace the tokens of the data from number `start` on."""
        self._inverter.write(start, tokens)

    def feed(self, stop: int) -> None:
        """Fill the cache with the inputs before those that token `stop` needs.

        A frame at a time, so that a long past takes no more memory than the cache.
        """
        step = self.z.shape[1] if self.block.config.local else self.length // self.frames
        for start in range(self.first, stop, step):
            self._inverter.remember(start, min(start + step, stop))

    def rewind(self) -> None:
        """Forget all inputs, and keep what stands before them."""
        self.trim(self.known)

    def predict(self, start: int, stop: int) -> tuple[mx.array, mx.array]:
        """(mu, log sigma) `[B, stop - start, C]` of tokens `start` to `stop`, given the data before them.

        The cache must hold exactly the inputs before those that are needed, and holds them too afterwards.
        """
        self.evaluations += 1
        return self._inverter.predict(start, stop)

    def correct(self, start: int, stop: int) -> tuple[mx.array, mx.array]:
        """What `invert` would make of tokens `start` to `stop`, and |f(x) - z| of those that are there, each
        `[B, stop - start, C]`: for a block that is not affine, where `predict` cannot say it."""
        assert isinstance(self._inverter, CouplingInverter)
        self.evaluations += 1
        return self._inverter.correct(start, stop)

    def invert(self, start: int, stop: int) -> None:
        """Make tokens `start` to `stop` of the data from their noise as `predict` says."""
        self.evaluations += 1
        self._inverter.invert(start, stop)

    def sweep(self, start: int, stop: int, lag: int = 0) -> float:
        """`invert`, but reading the data `lag` tokens further back; the mean square of the change over that of the
        values."""
        self.evaluations += 1
        return self._inverter.sweep(start, stop, lag)

    def trim(self, n: int) -> None:
        """Forget the last `n` inputs."""
        self.network.trim(n)


def check_finite(x: mx.array, what: str) -> None:
    """Raise NotFinite if an array holds a NaN or an infinity."""
    if not mx.isfinite(x).all().item():
        raise NotFinite(
            f"{what} is not finite: try a lower guidance or temperature, or weights in float32 (--dtype float32)"
        )
