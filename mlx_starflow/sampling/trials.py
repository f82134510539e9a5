"""Trials of tuning: samples whose blocks are inverted in one way and another, and what each way takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_starflow.models.flow import Flow, block_products_in, frame_count
from mlx_starflow.models.student import Student
from mlx_starflow.sampling.certificate import Certificate, certify
from mlx_starflow.sampling.decoder import BlockDecoder, check_finite
from mlx_starflow.sampling.first_guesses import FramePast
from mlx_starflow.sampling.guidance import SamplingOptions
from mlx_starflow.sampling.guided import GuidedFlow
from mlx_starflow.sampling.methods import (
    FRAME_GUESSES,
    FramewiseSettings,
    JacobiSettings,
    Method,
    RollingSettings,
    SequentialSettings,
    Settings,
    for_videos,
)
from mlx_starflow.sampling.noise_floor import HALF, moved
from mlx_starflow.sampling.sampler import SamplingTrace, invert_steps, sample
from mlx_starflow.sampling.student import drafts

SMALLEST_WINDOW = 8

WHOLE, FIRST, SINGLY = "whole", "first frame alone", "frame by frame"
"""What a trial makes of a video: all of it at once, its first frame, or each frame by itself, as a stream does."""

COSTS = ("seconds", "evaluations")
"""What a plan may keep small."""

ALIKE = 1.2
"""Costs that differ by less than this factor count as equal. Repeated measurements of seconds do not agree better; and
an evaluation is not saved at any price."""


@dataclass(frozen=True)
class Trial:
    """One way of inverting one block: evaluations and seconds for all samples, each sampled by itself."""

    block: int
    settings: Settings
    evaluations: int
    seconds: float
    residual: float

    def __str__(self) -> str:
        return f"block {self.block}: {describe(self.settings)}: {self.evaluations} evaluations, {self.seconds:.2f} s"

    def cost(self, least: str) -> float:
        return self.seconds if least == "seconds" else self.evaluations


def describe(settings: Settings) -> str:
    """A few words for people."""
    if isinstance(settings, FramewiseSettings):
        return f"first frame {describe(settings.first)}; later frames {describe(settings.later)}"
    if isinstance(settings, RollingSettings):
        return f"rolling window of {settings.window}, first guess {settings.guess}"
    if isinstance(settings, JacobiSettings):
        return f"blocks of {settings.block_size}"
    return settings.name


@dataclass
class TunedSample:
    """One sample, made sequentially.

    Attributes:
        noise, data: the exact tokens that each block reads and writes.
        sequential: evaluations and seconds of each block.
        spent: network evaluations so far.
        drafts: what a student guesses that each block adds, if there is one.
        certificate: of the sample.
    """

    flow: Flow
    z: mx.array
    text: mx.array | None
    null_text: mx.array | None
    options: SamplingOptions

    def __post_init__(self) -> None:
        self.guided = GuidedFlow(self.flow, self.z.shape, self.text, self.null_text, self.options)
        self.spent = 0
        self.student: Student | None = None
        self.drafts: dict[int, mx.array] = {}
        self._student_seconds = 0.0
        self.noise: dict[int, mx.array] = {}
        self.data: dict[int, mx.array] = {}
        self.sequential: dict[int, tuple[int, float]] = {}
        tokens = self.flow.noise_tokens(self.z)
        for index in self.guided.active():
            self.noise[index] = tokens
            tokens, evaluations, seconds = self.invert(index, SequentialSettings())
            self.sequential[index] = evaluations, seconds
            check_finite(tokens, f"what block {index} made of the noise")
            self.data[index] = tokens
        self.certificate = self.certify(self.flow.latents(tokens, self.z.shape))

    def draft(self, student: Student | None) -> None:
        """Take a student's guesses; raises StarflowError if it is of another flow."""
        if student is None:
            return
        self.student = student
        for _ in range(2):  # the first one compiles
            began = time.perf_counter()
            self.drafts = drafts(student, self.flow, self.z, self.text)
            mx.eval(self.drafts)
            self._student_seconds = time.perf_counter() - began
        self.spent += 2

    def student_cost(self, least: str) -> float:
        """What the student's evaluation costs."""
        return (self._student_seconds if least == "seconds" else 1.0) if self.drafts else 0.0

    @property
    def evaluations(self) -> list[int]:
        """Of each block, deep block first, when it is sampled sequentially."""
        return [self.sequential.get(index, (0, 0.0))[0] for index in reversed(range(len(self.flow.blocks)))]

    def length(self, index: int) -> int:
        """Tokens of a block."""
        return self.flow.blocks[index].sequences(1, self.noise[index].shape[1], self.frames)[1]

    @property
    def frames(self) -> int:
        """Of a video; 1 of a picture."""
        return frame_count(self.z.shape)

    @property
    def frame(self) -> int:
        """Tokens of a frame, of the flow's noise."""
        return self.flow.noise_tokens(self.z).shape[1] // self.frames

    def sees_frames(self, index: int) -> bool:
        """Whether a block goes on from one frame of a video to the next."""
        return self.frames > 1 and not self.flow.blocks[index].config.local

    def most_trials(self, index: int, least: str) -> int:
        """Ways of inverting a block that are tried at most."""
        found = (
            3
            + bool(self.drafts)
            + len(windows(self.length(index), least, self.frame if self.sees_frames(index) else 0))
        )
        if self.sees_frames(index):
            return found + len(FRAME_GUESSES) + 4 + len(windows(self.frame, least))
        return found + (1 + len(FRAME_GUESSES) if self.frames > 1 else 0)

    def jacobi(self, threshold: float) -> JacobiSettings:
        """The official blocks of pictures, or of videos, with a threshold."""
        settings = for_videos(JacobiSettings.name, self.frame) if self.frames > 1 else JacobiSettings()
        assert isinstance(settings, JacobiSettings)
        return replace(settings, threshold=threshold)

    def invert(self, index: int, settings: Settings, part: str = WHOLE) -> tuple[mx.array, int, float]:
        """What a block reads -> the tokens that it makes in this way, its evaluations, and the seconds they take.

        Of a video it may make `FIRST` alone, the others being there, or `SINGLY` one frame after the other.
        """
        block, noise = self.flow.blocks[index], self.noise[index]
        steps, evaluations = [time.perf_counter()], 0

        def made(decoder: BlockDecoder, z: mx.array, past: FramePast | None = None) -> mx.array:
            nonlocal evaluations
            for _ in invert_steps(decoder, z, settings, past=past):
                steps.append(time.perf_counter())
            evaluations += decoder.evaluations
            return decoder.data(0, decoder.z.shape[1])

        if part == SINGLY:
            past, parts = FramePast(), []
            for start in range(0, noise.shape[1], self.frame):
                z = block.permute(noise[:, start : start + self.frame])
                parts.append(block.unpermute(made(self.guided.decoder(index, 1, self.frame, 1), z, past)))
            x = mx.concatenate(parts, axis=1)
        else:
            z, decoder = block.permute(noise, self.frames), self.guided.decoder(index, *noise.shape[:2])
            if index in self.drafts:
                decoder.draft = block.permute(noise + self.drafts[index], self.frames)
            x = made(decoder, z[:, : self.frame] if part == FIRST else z)
            if part == FIRST:
                x = mx.concatenate([x, block.permute(self.data[index], self.frames)[:, self.frame :]], axis=1)
            x = block.unpermute(x, self.frames)
        mx.eval(x)
        steps.append(time.perf_counter())
        self.spent += evaluations
        # The median step, so that a moment in which the machine was busy with something else does not count.
        return x, evaluations, statistics.median(np.diff(steps)) * (len(steps) - 1)

    def residual(self, index: int, x: mx.array, inputs: mx.array) -> mx.array:
        """Of tokens x of a block, predicted from others in their place."""
        mu, log_sigma = self.guided.predict(index, inputs)
        return (x - mu) * mx.exp(-log_sigma) - self.noise[index]

    def noise_floor(self, index: int) -> float:
        """What this sample's precision resolves in a block; 0 in float32, where it does not matter."""
        products, x = block_products_in(self.flow.blocks[index]), self.data[index]
        if products not in HALF:
            return 0.0
        change = self.residual(index, x, moved(x, products)) - self.residual(index, x, x)
        return float(mx.abs(change).max())

    def sample(self, method: Method, trace: SamplingTrace) -> mx.array:
        guidance, kv_bits = self.options.guidance, self.options.kv_bits
        x = sample(
            self.flow,
            self.z,
            self.text,
            self.null_text,
            guidance,
            method,
            kv_bits=kv_bits,
            student=self.student,
            trace=trace,
        )
        self.spent += sum(trace.evaluations) + trace.student_evaluations
        return x

    def certify(self, x: mx.array) -> Certificate:
        return certify(self.flow, x, self.z, self.text, self.null_text, self.options.guidance)


def tuned_samples(
    flow: Flow, z: mx.array, text: mx.array | None, null_text: mx.array | None, options: SamplingOptions
) -> Iterator[TunedSample]:
    """Each sample by itself; arguments as for `tuning.tune`."""
    for index in range(z.shape[0]):
        one = slice(index, index + 1)
        null = null_text if null_text is None or len(null_text) == 1 else null_text[one]
        yield TunedSample(flow, z[one], None if text is None else text[one], null, options)


def attempt(index: int, samples: list[TunedSample], settings: Settings, part: str = WHOLE) -> Trial:
    """Invert block number `index` of all samples, or a part of a video in it, from what it reads when all others are
    exact."""
    evaluations, seconds, residual = 0, 0.0, 0.0
    for one in samples:
        if isinstance(settings, SequentialSettings):
            # Measured already, when the sample was made.
            x, (count, took) = one.data[index], one.sequential[index]
            if part == FIRST:
                count, took = count // one.frames, took / one.frames
        else:
            x, count, took = one.invert(index, settings, part)
        evaluations += count
        seconds += took
        residual = max(residual, float(mx.abs(one.residual(index, x, x)).max()))
    return Trial(index, settings, evaluations, seconds, residual)


def windows(length: int, least: str, frame: int = 0) -> list[int]:
    """The windows that are tried for a block of so many tokens, in their order, until two in a row are no better.

    In a video with frames of `frame` tokens the larger ones are whole frames.

    Evaluations are the fewer the wider the window is, so the widest comes first. What an evaluation takes grows with
    its tokens, so of seconds the narrowest comes first: a wide one that is slow would be the dearest trial of all.
    """
    found = [-(-SMALLEST_WINDOW // frame) * frame if 0 < frame < SMALLEST_WINDOW else SMALLEST_WINDOW]
    while found[-1] < length:
        # The last one below a frame is followed by a frame.
        found.append(frame if found[-1] < frame <= 2 * found[-1] else 2 * found[-1])
    found = [min(window, length) for window in found]
    return found if least == "seconds" else found[::-1]


def cheapest(trials: list[Trial], least: str) -> Trial:
    """Among the trials that cost about as little as any, the one that is better by the other measure."""
    bound = ALIKE * min(trial.cost(least) for trial in trials)
    (other,) = (cost for cost in COSTS if cost != least)
    return min((trial for trial in trials if trial.cost(least) <= bound), key=lambda trial: trial.cost(other))
