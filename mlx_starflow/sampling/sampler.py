"""Noise -> data through all blocks of a flow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_starflow.errors import StarflowError
from mlx_starflow.errors.arguments import checked
from mlx_starflow.kernels.affine import GuidanceMode, GuidanceTarget
from mlx_starflow.models.flow import Flow, frame_count
from mlx_starflow.models.itarflow import at_noise_level
from mlx_starflow.models.student import Student
from mlx_starflow.sampling import jacobi, sequential
from mlx_starflow.sampling.cache import KVBits
from mlx_starflow.sampling.decoder import BlockDecoder, check_finite
from mlx_starflow.sampling.first_guesses import FramePast
from mlx_starflow.sampling.guidance import SamplingOptions
from mlx_starflow.sampling.guided import GuidedFlow
from mlx_starflow.sampling.methods import (
    DRAFT,
    NO_STUDENT,
    FramewiseSettings,
    JacobiSettings,
    Method,
    RollingSettings,
    SequentialSettings,
    Settings,
    Uniform,
    block_settings,
    for_videos,
)
from mlx_starflow.sampling.progress import Watch, watch
from mlx_starflow.sampling.student import drafts


@dataclass
class SamplingTrace:
    """What sampling did, filled in if a trace is given to `sample`.

    Attributes:
        evaluations: network evaluations of each block, deep block first.
        noise_floors: of each block, deep block first, the residuals that its precision cannot tell from 0, as far as a
            window had to measure them; else 0.
        student_evaluations: of a student that gave first guesses.
        states: data after each block, deep block first, shaped as the result (only if `keep_states`): MLX arrays, or
            tensors where PyTorch samples.
    """

    keep_states: bool = False
    evaluations: list[int] = field(default_factory=list)
    noise_floors: list[float] = field(default_factory=list)
    student_evaluations: int = 0
    states: list[Any] = field(default_factory=list)

    @property
    def noise_floor(self) -> float | None:
        """The largest of them; None if none was measured."""
        return max(self.noise_floors, default=0.0) or None

    def clear(self) -> None:
        """Be as new: sampling begins again."""
        self.evaluations.clear()
        self.noise_floors.clear()
        self.student_evaluations = 0
        self.states.clear()


@checked
def sample(
    flow: Flow,
    z: mx.array,
    text: mx.array | None = None,
    null_text: mx.array | None = None,
    guidance: float = 0.0,
    method: Method = "sequential",
    *,
    attn_temp: float = 1.0,
    annealed_guidance: bool = False,
    guidance_target: GuidanceTarget = "ab",
    guidance_mode: GuidanceMode | None = None,
    guided_blocks: int | None = None,
    noise_level: float | None = None,
    kv_bits: KVBits = 0,
    student: Student | None = None,
    progress: Watch = False,
    trace: SamplingTrace | None = None,
) -> mx.array:
    """Invert the flow: noise -> data, the exact inverse of `flow(x, text).z` at guidance 0.

    Args:
        flow: a STARFlow, a TarFlow or an iTARFlow.
        z: noise, standard normal where the flow's likelihood is meant: `[B, H, W, C]`, of a video `[B, T, H, W, C]`
            (see `sample_frames`, which gives frames one by one), or a TarFlow's tokens
            `[B, N, C * p * p]` (a TarFlow with a learned prior scales them first: see `TarFlow.standardize`).
        text: embeddings `[B, L, D]`, or a TarFlow's integer labels `[B]`; None for a flow without either.
        null_text: embeddings of the empty prompt, `[B or 1, L, D]`; needed for guidance. A TarFlow's is a label, by
            default -1.
        guidance: weight w >= 0 of classifier-free guidance in the blocks that read the condition (see
            `kernels.affine.starflow_guidance` and `tarflow_guidance`).
        method: "sequential", "jacobi" (block by block, as in the official release), "rolling" (a window with certified
            tokens) or "draft" (such a window that begins with a student's guesses); or settings of one of them, such as
            `RollingSettings(window=32)`; or a `SamplingPlan`.
            For videos the names mean what `methods.for_videos` says.
        attn_temp: attention logits are divided by this; in a TarFlow those of guidance's null predictions only.
        annealed_guidance: let the weight grow linearly over the sequence.
        guidance_target: what a TarFlow's or an iTARFlow's guidance changes: "b" the mean, "a" the scale, "ab" both.
        guidance_mode: "starflow", "tarflow" or "itarflow", see `kernels.affine`; None: the flow's own.
        guided_blocks: so many blocks are guided, those that are sampled first; None: all that read the condition.
        noise_level: what an iTARFlow makes data of; None: the level that the flow is at, see `ITarFlow.at`.
        kv_bits: keep keys and values in 8 or 4 bits, or with (8, 4) in 8 and those of the null branch in 4, where they
            take most memory (see `cache.block_kv_bits`); 0: as they are.
        student: an inverse student of this flow, for the first guess "draft".
        progress: a `Progress`, or whether to show a progress bar; None shows it on a terminal only.
        trace: is filled with what was done.

    Returns:
        Data `[B, H, W, C]`, float32, still with the flow's training noise: see `denoise` and `iterate`.

    Raises:
        StarflowError: a wrong argument, or a sample that is not finite.
    """
    flow = at_noise_level(flow, noise_level)
    tokens = flow.noise_tokens(z)
    batch, length, _ = tokens.shape
    if (frames := frame_count(z.shape)) > 1:
        method = for_videos(method, length // frames)
    settings = block_settings(method, len(flow.blocks))
    guesses: dict[int, mx.array] = {}
    if any(isinstance(each, RollingSettings) and each.guess == DRAFT for each in settings):
        if student is None:
            raise StarflowError(NO_STUDENT)
        guesses = drafts(student, flow, z, text)
        if trace is not None:
            trace.student_evaluations += 1
    options = SamplingOptions(
        guidance, attn_temp, annealed_guidance, guidance_target, guidance_mode, guided_blocks, kv_bits
    )
    guided = GuidedFlow(flow, z.shape, text, null_text, options)
    total = sum(math.prod(block.sequences(1, length, frames)) for block in flow.blocks if not block.is_identity)
    with watch(progress).counting("flow", total, "tok", label="sampling", leave=False) as counter:
        for index in reversed(range(len(flow.blocks))):
            evaluations, noise_floor = 0, 0.0
            if not flow.blocks[index].is_identity:
                decoder = guided.decoder(index, batch, length)
                if index in guesses:
                    decoder.draft = decoder.block.permute(tokens + guesses[index], decoder.frames)
                counter.block, counter.state = index, partial(state_of, flow, decoder, z.shape)
                tokens = invert_block(decoder, tokens, settings[index], advance=counter.advance)
                evaluations, noise_floor = decoder.evaluations, decoder.noise_floor
                check_finite(tokens, f"what block {index} made of the noise")
            if trace is not None:
                trace.evaluations.append(evaluations)
                trace.noise_floors.append(noise_floor)
                if trace.keep_states:
                    trace.states.append(flow.latents(tokens, z.shape))
    return flow.latents(tokens, z.shape)


def invert_block(
    decoder: BlockDecoder,
    z: mx.array,
    settings: Settings,
    given: mx.array | None = None,
    advance: Callable[[int], None] = lambda tokens: None,
    past: FramePast | None = None,
) -> mx.array:
    """Invert one block: noise `[B, N, C]` -> data, both in data order.

    Args:
        given: data of the tokens that the block reads first, `[B, P, C]` in the block's order, one or more: they stay
            as they are, and the noise in their place is not used.
        advance: is called before each evaluation, and after the last one, with the number of tokens that are done
            since the last time; those of a local block's frames count together.
        past: of a local block, what it has made of the frames before; this is added to it.
    """
    block, frames = decoder.block, decoder.frames
    parallel = frames if block.config.local else 1
    before = 0
    for done in invert_steps(decoder, block.permute(z, frames), settings, given, past):
        advance(parallel * (done - before))
        before = done
    return block.unpermute(decoder.data(0, decoder.z.shape[1]), frames)


def invert_steps(
    decoder: BlockDecoder,
    z: mx.array,
    settings: Settings,
    given: mx.array | None = None,
    past: FramePast | None = None,
) -> Iterator[int]:
    """Invert one block; before each evaluation, and after the last, yield how many tokens of `decoder.data` are done.

    `z` is `[B, N, C]` in the block's order (see `FlowBlock.permute`); `given` and `past` as for
    `invert_block`.
    """
    decoder.begin(z)
    start = decoder.first
    if given is not None:
        start = given.shape[1]
        decoder.write(0, given)
        decoder.feed(start)
    elif start:
        mu, log_sigma = decoder.block.unpredicted(z[:, :1])
        decoder.write(0, z[:, :1] * mx.exp(log_sigma) + mu)
    yield start
    length = z.shape[1]
    if not isinstance(settings, FramewiseSettings):
        yield from _steps(decoder, start, length, settings, past)
        return
    frame = length if decoder.block.config.local else min(decoder.length // decoder.frames, length)
    if start < frame:
        yield from _steps(decoder, start, frame, settings.first, past)
    if frame < length:
        yield from _steps(decoder, max(start, frame), length, settings.later, past)


def _steps(decoder: BlockDecoder, start: int, length: int, settings: Uniform, past: FramePast | None) -> Iterator[int]:
    """Tokens `start` to `length`."""
    if isinstance(settings, RollingSettings):
        yield from jacobi.roll(decoder, start, length, settings, past)
    elif isinstance(settings, JacobiSettings):
        yield from jacobi.invert(decoder, start, length, settings)
    else:
        assert isinstance(settings, SequentialSettings)
        yield from sequential.invert(decoder, start, length)


def state_of(flow: Flow, decoder: BlockDecoder, shape: tuple[int, ...]) -> mx.array:
    """Data of a sample of which a block is being inverted: what is not done is still the block's noise."""
    tokens = decoder.block.unpermute(decoder.data(0, decoder.z.shape[1]), decoder.frames)
    return flow.latents(tokens, shape)
