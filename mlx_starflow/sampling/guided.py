"""A flow together with its condition and its guidance: one invertible map, run forwards or backwards block by block."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from mlx_starflow.errors import StarflowError
from mlx_starflow.kernels.affine import predict
from mlx_starflow.models.flow import Condition, Flow, active_blocks, frame_count
from mlx_starflow.sampling.cache import block_kv_bits, branch_bits
from mlx_starflow.sampling.decoder import BlockDecoder, check_finite
from mlx_starflow.sampling.guidance import Guidance, SamplingOptions
from mlx_starflow.sampling.progress import Watch, watch

DEFAULT_OPTIONS = SamplingOptions()


class GuidedFlow:
    """What sampling inverts: with guidance it is a flow too, whose affine maps are the guided ones."""

    def __init__(
        self,
        flow: Flow,
        shape: tuple[int, ...],
        text: mx.array | None = None,
        null_text: mx.array | None = None,
        options: SamplingOptions = DEFAULT_OPTIONS,
    ):
        """`shape` is the noise's; the other arguments are those of `sample`, and so are the errors raised."""
        self.flow, self.attn_temp, self.frames = flow, options.attn_temp, frame_count(shape)
        self.shape = tuple(shape)
        self.conditions = flow.conditions(shape, text, null_text, options.guidance)
        if options.guidance > 0 and options.guided_blocks is not None and options.guided_blocks < len(flow.blocks):
            rest = len(flow.blocks) - options.guided_blocks
            plain = flow.conditions(shape, text).blocks[:rest]
            self.conditions.blocks = [*plain, *self.conditions.blocks[rest:]]
        self.kv_bits = block_kv_bits([block.config for block in flow.blocks], options.kv_bits)
        mode = options.guidance_mode or self.conditions.guidance_mode
        self.guidance = Guidance(mode, options.guidance, options.annealed_guidance, options.guidance_target)

    def decoder(self, index: int, batch: int, length: int, frames: int | None = None) -> BlockDecoder:
        """A fresh decoder of block number `index` for `batch` samples of `length` tokens.

        `frames` of a video are decoded, by default all.
        """
        block, condition, frames = self.flow.blocks[index], self.conditions.blocks[index], frames or self.frames
        guidance = self.guidance if condition.guided else None
        temperature = self.temperature(condition, batch)
        batch, length = block.sequences(batch, length, frames)
        rope_frequencies, kv_bits = self.conditions.rope_frequencies[index], self.kv_bits[index]
        if not condition.guided:
            kv_bits, _ = branch_bits(kv_bits)
        return BlockDecoder(block, batch, length, rope_frequencies, condition, guidance, temperature, frames, kv_bits)

    def temperature(self, condition: Condition, batch: int) -> float | mx.array:
        """What attention logits of a block are divided by: a number, or one a sample of a guided batch."""
        if not self.conditions.temper_null_only:
            return self.attn_temp
        if not condition.guided:
            return 1.0
        return mx.array([1.0] * batch + [self.attn_temp] * batch).reshape(-1, 1, 1, 1)

    def predict(self, index: int, x: mx.array) -> tuple[mx.array, mx.array]:
        """(mu, log sigma) of all tokens x `[B, N, C]` of block number `index`, in data order, in one evaluation.

        Raises StarflowError if the block is not affine.
        """
        block, condition = self.flow.blocks[index], self.conditions.blocks[index]
        if not block.is_affine:
            raise StarflowError(f"block {index} is not affine: it has no mu and sigma")
        x = block.permute(x, self.frames)
        batch, length, _ = x.shape
        inputs = mx.concatenate([x, x]) if condition.guided else x
        rope_frequencies, temperature = self.conditions.rope_frequencies[index], self.temperature(condition, batch)
        parameters = block.all_affine_parameters(inputs, condition, rope_frequencies, temperature=temperature)
        if condition.guided:
            first = 0 if block.config.sos else 1
            weight = self.guidance.at(-first, length, length - first)
            mu, log_sigma = self.guidance.predict(parameters, block.config.affine, weight)
        else:
            mu, log_sigma = predict(parameters, block.config.affine)
        return block.unpermute(mu, self.frames), block.unpermute(log_sigma, self.frames)

    def forward(self, x: mx.array, progress: Watch = False) -> mx.array:
        """Data tokens `[B, N, C]` -> noise tokens: the guided flow's forward direction."""
        progress = watch(progress)
        for index, block in enumerate(self.flow.blocks):
            if not block.is_identity:
                progress.check()
                x = self._map(index, x)
                check_finite(x, f"what block {index} made of the sample")
        return x

    def _map(self, index: int, x: mx.array) -> mx.array:
        """Tokens x in data order -> what block number `index` makes of them."""
        block, condition = self.flow.blocks[index], self.conditions.blocks[index]
        if block.is_affine:
            mu, log_sigma = self.predict(index, x)
            return (x - mu) * mx.exp(-log_sigma)
        x = block.permute(x, self.frames)
        temperature = self.temperature(condition, x.shape[0])
        parameters = block.all_affine_parameters(
            x, condition, self.conditions.rope_frequencies[index], temperature=temperature
        )
        return block.unpermute(block.to_noise(parameters, x)[0], self.frames)

    def active(self) -> Iterator[int]:
        """Numbers of the blocks that do something, in the order of sampling."""
        return iter(active_blocks(self.flow))
