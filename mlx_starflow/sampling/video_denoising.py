"""Videos cleaned frame by frame: each frame as soon as those are there that the learned denoiser looks ahead to.

A glance at a frame does not wait for them. It is the same computation with what is there: in each layer the frame sees
itself and those before it, of which it knows what they are, or what glances at them gave. That costs as much as the
frame itself does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import mlx.core as mx

from mlx_starflow.models.denoiser import Denoiser
from mlx_starflow.models.flow import Flow
from mlx_starflow.models.transformer import TransformerLayer
from mlx_starflow.sampling.decoder import check_finite
from mlx_starflow.sampling.denoise import clean, denoise
from mlx_starflow.sampling.video import windows

Glance = Callable[[int, Callable[[], mx.array]], None]
"""Is told of a frame that waits for the frames after it: its number, and what computes, when called, the frame
`[B, 1, H, W, C]` as the learned denoiser cleans it without those, or without a learned denoiser the noisy one. It must
be called once."""


def denoise_frames(
    flow: Flow,
    frames: Iterator[mx.array],
    text: mx.array | None,
    total: int,
    window: int | None = None,
    glance: Glance | None = None,
) -> Iterator[mx.array]:
    """Clean noisy frames as they come.

    With a learned denoiser a frame is clean as soon as the frames are there that its prediction depends on: the next
    `num_layers * look_ahead`, or the rest of its window. Without one, the score step cleans a window as a whole. All
    frames together are what `denoise` makes of the video, as long as one window holds them; in a longer one each
    window begins with frames that are clean already, as in the release.

    Args:
        flow: a STARFlow for videos.
        frames: `[B, k, H, W, C]`, in order, as `sample_frames` yields them.
        text: embeddings `[B, L, D]`.
        total: frames there will be.
        window: frames that the denoiser reads at most; None: all.
        glance: is called as soon as a noisy frame is there, before the next one is asked for, with its number and with
            a function that computes what it is about: see `Glance`. What is yielded does not depend on it.

    Yields:
        Clean frames `[B, 1, H, W, C]` in order.
    """
    learned = flow.denoiser
    overlap = None if learned is None or window is None else learned.config.window
    if overlap is not None and window is not None:
        overlap = min(overlap, window - 1)
    single = (part[:, index : index + 1] for part in frames for index in range(part.shape[1]))
    recent: list[mx.array] = []
    for first, new, stop in windows(total, window, overlap):
        begin = recent[len(recent) - (new - first) :]
        recent = []
        fresh = (next(single) for _ in range(stop - new))
        if learned is None:
            seen = fresh if glance is None else _glanced(fresh, new, glance)
            cleaned = _score_steps(flow, begin, seen, text, stop - first)
        else:
            cleaned = _denoise_window(flow, learned, begin, fresh, text, stop - first, first, glance)
        for index, frame in enumerate(cleaned):
            check_finite(frame, "a denoised frame")
            recent.append(frame if index >= new - first else begin[index])
            if index >= new - first:
                yield frame


def _glanced(noisy: Iterator[mx.array], number: int, glance: Glance) -> Iterator[mx.array]:
    for frame in noisy:
        glance(number, partial(lambda x: x, frame))
        number += 1
        yield frame


def _score_steps(
    flow: Flow, clean_frames: list[mx.array], noisy: Iterator[mx.array], text: mx.array | None, frames: int
) -> Iterator[mx.array]:
    x = denoise(flow, mx.concatenate([*clean_frames, *noisy], axis=1), text)
    return (x[:, index : index + 1] for index in range(frames))


def _denoise_window(
    flow: Flow,
    denoiser: Denoiser,
    clean_frames: list[mx.array],
    noisy: Iterator[mx.array],
    text: mx.array | None,
    frames: int,
    number: int,
    glance: Glance | None,
) -> Iterator[mx.array]:
    """All frames of a window, each when the denoiser has seen enough of what follows; the first has this number."""
    prefix = denoiser.embed_text(text)
    start = 0 if prefix is None else prefix.shape[1]
    waiting: list[mx.array] = []
    layers: list[_StreamedLayer] = []
    for x in (frame for source in (clean_frames, noisy) for frame in source):
        if not layers:
            shape = (x.shape[0], frames, *x.shape[2:])
            frequencies = flow.rope_frequencies(shape, start)
            assert frequencies is not None  # of a flow with a denoiser
            layers = [_StreamedLayer(layer, denoiser, start, frames, frequencies) for layer in denoiser.attn_blocks]
        h = denoiser.embed(flow.tokens(x))
        frame = layers[0].pushed
        if prefix is not None and not frame:
            h = mx.concatenate([prefix, h], axis=1)
        if glance is not None:
            look = partial(_glance_at, flow, denoiser, layers, x, h)
            # Also at frames that are clean already: later glances go by them.
            look() if frame < len(clean_frames) else glance(number + frame, look)
        waiting.append(x)
        done = [h]
        for layer in layers:
            done = [out for h in done for out in layer.push(h)]
        for h in done:
            x = waiting.pop(0)
            tokens = denoiser.predict(h[:, -flow.tokens(x).shape[1] :])
            yield clean(x, flow.latents(tokens, x.shape))


def _glance_at(flow: Flow, denoiser: Denoiser, layers: list[_StreamedLayer], x: mx.array, h: mx.array) -> mx.array:
    """The next frame, cleaned with what is known now."""
    frame = layers[0].pushed
    for layer in layers:
        h = layer.glance(h, frame)
    tokens = denoiser.predict(h[:, -flow.tokens(x).shape[1] :])
    return clean(x, flow.latents(tokens, x.shape))


class _StreamedLayer:
    """A layer of the denoiser, fed frame by frame; it keeps the keys and values of the frames that are still seen.

    What it knows of a frame before its input is there, from a glance at it, is kept until then.
    """

    def __init__(
        self, layer: TransformerLayer, denoiser: Denoiser, start: int, frames: int, rope_frequencies: mx.array
    ):
        self.layer, self.config, self.start, self.frames = layer, denoiser.config, start, frames
        self.rope_frequencies = rope_frequencies
        self.size = (rope_frequencies.shape[0] - start) // frames
        self.pushed = self.done = 0
        self.text: tuple[mx.array, ...] = ()
        self.seen: dict[int, tuple[mx.array, mx.array]] = {}
        self.waiting: list[tuple[mx.array, mx.array]] = []
        self.glanced: dict[int, tuple[mx.array, mx.array]] = {}

    def glance(self, h: mx.array, frame: int) -> mx.array:
        """The input of a frame (of the text and the first frame) -> its output if no frame came after it.

        Of the frames before it, it sees what glances at them gave where there is nothing better yet.
        """
        begin = self.start + frame * self.size if frame else 0
        q, k, v = self.layer.before(h, self.rope_frequencies[begin : begin + h.shape[1]])
        if not frame:
            self.text = (k[:, :, : self.start], v[:, :, : self.start])
            k, v = k[:, :, self.start :], v[:, :, self.start :]
        self.glanced[frame] = k, v
        known = self.glanced | self.seen
        first, _ = self.config.seen(frame, self.frames)
        keys, values = (
            mx.concatenate([self.text[part], *(known[each][part] for each in range(first, frame + 1))], axis=2)
            for part in (0, 1)
        )
        h = self.layer.after(h, self.layer.attention.attend(q, keys, values, causal=False))
        mx.eval(h, self.glanced[frame], self.text)
        return h

    def push(self, h: mx.array) -> list[mx.array]:
        """The input of the next frame (of the text and the first frame) -> outputs of the frames that it completes."""
        begin = self.start + self.pushed * self.size if self.pushed else 0
        q, k, v = self.layer.before(h, self.rope_frequencies[begin : begin + h.shape[1]])
        if not self.pushed:
            self.text = (k[:, :, : self.start], v[:, :, : self.start])
            k, v = k[:, :, self.start :], v[:, :, self.start :]
        self.seen[self.pushed] = k, v
        self.glanced.pop(self.pushed, None)
        self.waiting.append((h, q))
        self.pushed += 1
        outputs = []
        while self.waiting:
            first, stop = self.config.seen(self.done, self.frames)
            if stop > self.pushed:
                break
            for old in [frame for frame in self.seen if frame < first]:
                del self.seen[old]
            h, q = self.waiting.pop(0)
            k, v = (
                mx.concatenate([self.text[part], *(self.seen[frame][part] for frame in range(first, stop))], axis=2)
                for part in (0, 1)
            )
            outputs.append(self.layer.after(h, self.layer.attention.attend(q, k, v, causal=False)))
            self.done += 1
        mx.eval(outputs, list(self.seen.values()), self.waiting)
        return outputs
