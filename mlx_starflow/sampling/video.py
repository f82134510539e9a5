"""Videos frame by frame: a flow that is causal in time can finish one frame while the next ones are still noise.

The deep block decodes frame after frame; the shallow blocks read one frame each, so that a frame can be brought to
data as soon as the deep block has passed it; and the learned denoiser needs some of the frames that follow. A video
that is longer than the model was trained for is made window by window: where a window is full, the deep block reads its
last frames again, from position 0 on, and goes on from there (STARFlow-V, arXiv 2511.20462).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.flow import Flow
from mlx_starflow.sampling.cache import KVBits
from mlx_starflow.sampling.decoder import BlockDecoder, check_finite
from mlx_starflow.sampling.guidance import SamplingOptions
from mlx_starflow.sampling.guided import GuidedFlow
from mlx_starflow.sampling.methods import Method, Settings, block_settings, for_videos
from mlx_starflow.sampling.progress import Counter, Watch, watch
from mlx_starflow.sampling.sampler import SamplingTrace, invert_block, invert_steps

CONTEXT = 16
"""Latent frames that are read again when a window is full, by default as in the release."""


class NoiseSource(Protocol):
    """Noise of a video: an array, or what makes it range by range."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`[B, T, H, W, C]`."""

    def __getitem__(self, key: tuple[slice, slice], /) -> mx.array | np.ndarray:
        """`noise[:, start:stop]`, frames of the whole batch."""


def default_context(window: int) -> int:
    """Latent frames that are read again when a window of so many is full, unless told otherwise."""
    return min(CONTEXT, window - 1)


def windows(frames: int, window: int | None, context: int | None = None) -> list[tuple[int, int, int]]:
    """The windows in which a video is made: (first frame, first new frame, stop) of each.

    Args:
        frames: of the whole video.
        window: frames that the model reads at most; None: all.
        context: frames of the window before that each window begins with; None: `CONTEXT`, or all but one.

    Raises:
        StarflowError: the context does not fit into the window.
    """
    if window is None or frames <= window:
        return [(0, 0, frames)]
    context = default_context(window) if context is None else context
    if not 1 <= context < window:
        raise StarflowError(f"the context must be 1 to {window - 1} latent frames, less than the window, not {context}")
    found = [(0, 0, window)]
    while found[-1][2] < frames:
        stop = found[-1][2]
        found.append((stop - context, stop, min(stop + window - context, frames)))
    return found


def sample_frames(
    flow: Flow,
    noise: NoiseSource,
    text: mx.array | None = None,
    null_text: mx.array | None = None,
    guidance: float = 0.0,
    method: Method = "sequential",
    *,
    given: mx.array | None = None,
    window: int | None = None,
    context: int | None = None,
    frames_at_once: int = 1,
    attn_temp: float = 1.0,
    kv_bits: KVBits = 0,
    progress: Watch = False,
    trace: SamplingTrace | None = None,
) -> Iterator[mx.array]:
    """Invert a video flow: noise -> data, frames as soon as they are there.

    All frames together are what `sample` makes of the same noise, as long as one window holds them.

    Args:
        flow: a STARFlow for videos.
        noise: `[B, T, H, W, C]`: an array, or anything that has this `shape` and gives `noise[:, start:stop]` for one
            range of frames after the other.
        text, null_text, guidance, attn_temp, kv_bits, progress: as for `sample`.
        method: as for `sample`; the names mean what `methods.for_videos` says.
        given: the first frames `[B, P, H, W, C]`, P <= T, with the flow's training noise; they come out as they are,
            and the noise in their place is not used.
        window: latent frames that the deep block reads at most; None: all.
        context: how many of them are read again when the window is full; None: `CONTEXT`, or all but one.
        frames_at_once: frames that go through the shallow blocks together: more are faster and come later.
        trace: its evaluations and noise floors are filled in when the last frame is done; it keeps no states.

    Yields:
        Frames `[B, k, H, W, C]`, k <= `frames_at_once` (the given frames in one piece), float32, still with the flow's
        training noise: see `denoise_frames`.

    Raises:
        StarflowError: a wrong argument, or a frame that is not finite.
    """
    batch, total, *frame_shape = noise.shape
    size = flow.tokens(mx.zeros((1, 1, *frame_shape))).shape[1]  # raises StarflowError if the shape does not fit
    settings = block_settings(for_videos(method, size), len(flow.blocks))
    parts = windows(total, window, context)
    known, read = 0, None
    if given is not None:
        known = given.shape[1]
        if given.shape != (batch, known, *frame_shape) or known > parts[0][2]:
            most = f"{batch} times at most {parts[0][2]} frames of {tuple(frame_shape)}"
            raise StarflowError(f"the given frames have shape {tuple(given.shape)}; this video takes {most}")
        read = _shallow_forward(flow, given)
    deep = len(flow.blocks) - 1
    evaluations, noise_floors = [0] * (deep + 1), [0.0] * (deep + 1)
    unknown = (total - known) * size * sum(not block.is_identity for block in flow.blocks)
    shape = (batch, parts[0][2], *frame_shape)
    guided = GuidedFlow(flow, shape, text, null_text, SamplingOptions(guidance, attn_temp, kv_bits=kv_bits))
    decoder = None
    with watch(progress).counting("flow", unknown, "tok", label="sampling", leave=False) as counter:
        if given is not None:
            yield given.astype(mx.float32)
        for first, new, stop in parts:
            kept = 0 if read is None else read.shape[1] // size
            if read is not None and new:
                kept = new - first
                read = read[:, -kept * size :]
            frames = stop - first
            if kept < frames:
                fresh = mx.array(noise[:, first + kept : stop])
                z = flow.noise_tokens(mx.concatenate([mx.zeros((batch, kept, *frame_shape)), fresh], axis=1))
                # One decoder for all windows: what it read of the text stays.
                if decoder is None:
                    decoder = guided.decoder(deep, batch, frames * size)
                decoder.rewind()
                done = [] if read is None else [read]
                counter.block = deep
                state = partial(_deep_state, flow, decoder, (batch, 1, *frame_shape))
                for tokens in _deep_frames(decoder, z, settings[deep], read, frames_at_once, counter, state):
                    mx.eval(tokens)
                    done.append(tokens)
                    count = tokens.shape[1] // size
                    for index in guided.active():
                        if index < deep:
                            shallow = guided.decoder(index, batch, count * size, count)
                            counter.block = index
                            counter.state = partial(_shallow_state, flow, shallow, (batch, 1, *frame_shape))
                            tokens = invert_block(shallow, tokens, settings[index], advance=counter.advance)
                            evaluations[index] += shallow.evaluations
                            noise_floors[index] = max(noise_floors[index], shallow.noise_floor)
                    check_finite(tokens, "a frame")
                    yield flow.latents(tokens, (batch, count, *frame_shape))
                read = mx.concatenate(done, axis=1)
    if trace is not None:
        if decoder is not None:
            evaluations[deep], noise_floors[deep] = decoder.evaluations, decoder.noise_floor
        trace.evaluations, trace.noise_floors = evaluations[::-1], noise_floors[::-1]


def _shallow_forward(flow: Flow, x: mx.array) -> mx.array:
    """What the deep block reads of data `[B, T, H, W, C]`: tokens `[B, T * N, C]`."""
    tokens, frames = flow.tokens(x), x.shape[1]
    for block, frequencies in list(zip(flow.blocks, flow.block_rope_frequencies(x.shape, 0), strict=True))[:-1]:
        tokens, _ = block(tokens, block.condition(None, x.shape[0]), frequencies, frames=frames)
    mx.eval(tokens)
    return tokens


def _deep_frames(
    decoder: BlockDecoder,
    z: mx.array,
    settings: Settings,
    read: mx.array | None,
    frames_at_once: int,
    counter: Counter,
    state: Callable[[int], mx.array],
) -> Iterator[mx.array]:
    """Noise tokens `[B, T * N, C]` -> what the deep block reads of the frames after those of `read`, which it read
    before: tokens of at most `frames_at_once` frames at a time; all in data order."""
    block, size = decoder.block, decoder.length // decoder.frames
    frames = z.shape[1] // size
    out = 0 if read is None else read.shape[1] // size
    given = None if read is None else block.permute(read, out)
    before = out * size
    deep = counter.block
    for done in invert_steps(decoder, block.permute(z, frames), settings, given):
        counter.block, counter.state = deep, partial(state, done // size)
        counter.advance(done - before)
        before = done
        while out < frames and done >= (stop := min(out + frames_at_once, frames)) * size:
            yield block.unpermute(decoder.data(out * size, stop * size), stop - out)
            out = stop


def _deep_state(flow: Flow, decoder: BlockDecoder, shape: tuple[int, ...], frame: int) -> mx.array:
    """Data `[B, 1, H, W, C]` of the latent frame that the deep block makes tokens of."""
    size = decoder.length // decoder.frames
    start = min(frame, decoder.z.shape[1] // size - 1) * size
    return flow.latents(decoder.block.unpermute(decoder.data(start, start + size), 1), shape)


def _shallow_state(flow: Flow, decoder: BlockDecoder, shape: tuple[int, ...]) -> mx.array:
    """The same of a block that makes several frames at once: of the last of them."""
    tokens = decoder.block.unpermute(decoder.data(0, decoder.z.shape[1]), decoder.frames)
    return flow.latents(tokens[:, -(tokens.shape[1] // decoder.frames) :], shape)
