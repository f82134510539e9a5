"""Finding the fastest way to invert each block of a flow, on this machine, at a stated certificate.

Or the one with the fewest network evaluations, which is the fastest where these wait for weights and not for
arithmetic: on most GPUs, one picture at a time. Which blocks converge in a few sweeps and which do not is a property of
the weights (arXiv 2505.12849, 2505.24791); what an evaluation of n tokens costs is one of the machine. Both are
measured. What the first of these papers ranks blocks by is no help here: see docs/speed.md.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir.weights import dtype_name
from mlx_starflow.models.flow import Flow, block_products_in, frame_count, products_in
from mlx_starflow.models.student import Student
from mlx_starflow.sampling.cache import KVBits
from mlx_starflow.sampling.certificate import Certificate, certify
from mlx_starflow.sampling.decoder import check_finite
from mlx_starflow.sampling.guidance import SamplingOptions
from mlx_starflow.sampling.guided import GuidedFlow
from mlx_starflow.sampling.methods import (
    DRAFT,
    JacobiSettings,
    Method,
    RollingSettings,
    SamplingPlan,
    SequentialSettings,
    Settings,
)
from mlx_starflow.sampling.noise_floor import FACTOR, HALF, moved
from mlx_starflow.sampling.progress import Callback, Counter, Progress, Watch, watch
from mlx_starflow.sampling.sampler import SamplingTrace, invert_block, sample
from mlx_starflow.sampling.student import drafts

SMALLEST_WINDOW = 8
DEEP_SHARE = 0.9
"""How much of the tolerance the deep block, whose residual is the certificate's own, is given at first."""
OTHERS_SHARE = 0.1
"""And the others, whose residuals the blocks after them enlarge."""

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
    if isinstance(settings, RollingSettings):
        return f"rolling window of {settings.window}, first guess {settings.guess}"
    if isinstance(settings, JacobiSettings):
        return f"blocks of {settings.block_size}"
    return settings.name


def tune(
    flow: Flow,
    z: mx.array,
    text: mx.array | None = None,
    null_text: mx.array | None = None,
    guidance: float = 0.0,
    *,
    tolerance: float = 1e-2,
    least: str = "seconds",
    kv_bits: KVBits = 0,
    student: Student | None = None,
    report: Callable[[str], None] = lambda line: None,
    progress: Watch = False,
    callback: Callback | None = None,
) -> SamplingPlan:
    """Measure methods on a few samples and choose.

    Args:
        z, text, null_text, guidance: noise and conditions of the samples, as for `sample`; each is tried by itself,
            since that is how a picture at a time is made.
        tolerance: largest certificate (|f(x) - z|, standard deviations of the noise) that a sample may have. Where
            sequential sampling itself does not reach it, as with half-precision weights, twice what that reaches; and
            no less than what a window in this precision keeps to (see `noise_floor`).
        least: of what the plan shall take the least: "seconds" on this machine, or network "evaluations".
        kv_bits: of keys and values, see `sample`; the plan is for these.
        student: an inverse student of the flow; its guesses are tried too as the first ones of the windows, and are
            part of the plan where they save more than its evaluation costs.
        report: is told what was measured.
        progress, callback: see `Progress`; its phase is "tuning", and it counts ways that are tried of one block, of
            which there are at most as many as its total says.

    Raises:
        StarflowError: the tolerance is not positive, or an argument is wrong (see `sample`).
    """
    if least not in COSTS:
        raise StarflowError(f"a plan can take the least {' or '.join(COSTS)}, not {least!r}")
    if not 0 < tolerance <= 100:
        raise StarflowError(f"the tolerance must be greater than 0 and at most 100, not {tolerance:g}")
    progress = watch(progress, callback)
    options = SamplingOptions(guidance, kv_bits=kv_bits)
    with progress.running("tuning"):
        samples = list(_samples(flow, z, text, null_text, options))
        for one in samples:
            one.draft(student)
        plan = _tune(flow, samples, guidance, tolerance, least, report, progress)
        return replace(plan, kv_bits=kv_bits)


def _tune(
    flow: Flow,
    samples: list[_Sample],
    guidance: float,
    tolerance: float,
    least: str,
    report: Callable[[str], None],
    progress: Progress,
) -> SamplingPlan:
    exact = max(one.certificate.max for one in samples)
    report(f"sequential: {samples[0].evaluations} evaluations, certificate {exact:.1e}")
    deep = max(samples[0].guided.active())
    floors = {index: max(one.noise_floor(index) for one in samples) for index in samples[0].guided.active()}
    least_tolerance = max(2 * exact, FACTOR * floors[deep] / DEEP_SHARE)
    if least_tolerance > tolerance:
        tolerance = least_tolerance
        report(f"that is all that this precision gives; the tolerance is now {tolerance:.1e}")
    blocks: list[Settings] = [SequentialSettings()] * len(flow.blocks)
    active = list(samples[0].guided.active())
    most = {index: 3 + bool(samples[0].drafts) + len(windows(samples[0].length(index), least)) for index in active}
    drafted: dict[int, tuple[Trial, float]] = {}
    with progress.counting("tuning", sum(most.values()), "way") as counter:
        for index in active:
            share, done = DEEP_SHARE if index == deep else OTHERS_SHARE, counter.done
            allowed = max(share * tolerance, FACTOR * floors[index])
            best = _best(index, samples, allowed, least, report, counter)
            report(f"-> {best}")
            blocks[index] = best.settings
            if samples[0].drafts and (trial := _drafted(index, samples, best, allowed, report)):
                drafted[index] = trial, best.cost(least) - trial.cost(least)
            counter.advance(most[index] - (counter.done - done))
    spent = sum(one.student_cost(least) for one in samples)
    if sum(saved for _, saved in drafted.values() if saved > 0) > spent:
        for index, (trial, saved) in drafted.items():
            if saved > 0:
                report(f"-> {trial}")
                blocks[index] = trial.settings
    plan = _tightened(flow, samples, blocks, deep, guidance, tolerance, report)
    measured = dict(plan.measured)
    measured["tuning_evaluations"] = sum(one.spent for one in samples)
    report(f"tuning took {measured['tuning_evaluations']} evaluations")
    if floor := max(floors.values()):
        measured["noise_floor"] = floor
    return replace(plan, measured=measured, precision=dtype_name(products_in(flow)))


@dataclass
class _Sample:
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
        return self.flow.blocks[index].sequences(1, self.noise[index].shape[1], frame_count(self.z.shape))[1]

    def invert(self, index: int, settings: Settings) -> tuple[mx.array, int, float]:
        """What a block reads -> the tokens that it makes in this way, its evaluations, and the seconds they take."""
        noise = self.noise[index]
        decoder = self.guided.decoder(index, *noise.shape[:2])
        if index in self.drafts:
            decoder.draft = decoder.block.permute(noise + self.drafts[index], decoder.frames)
        steps = [time.perf_counter()]
        x = invert_block(decoder, noise, settings, advance=lambda tokens: steps.append(time.perf_counter()))
        mx.eval(x)
        steps.append(time.perf_counter())
        self.spent += decoder.evaluations
        # The median step, so that a moment in which the machine was busy with something else does not count.
        return x, decoder.evaluations, statistics.median(np.diff(steps)) * (len(steps) - 1)

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


def _samples(
    flow: Flow, z: mx.array, text: mx.array | None, null_text: mx.array | None, options: SamplingOptions
) -> Iterator[_Sample]:
    for index in range(z.shape[0]):
        one = slice(index, index + 1)
        null = null_text if null_text is None or len(null_text) == 1 else null_text[one]
        yield _Sample(flow, z[one], None if text is None else text[one], null, options)


def _try(index: int, samples: list[_Sample], settings: Settings) -> Trial:
    evaluations, seconds, residual = 0, 0.0, 0.0
    for one in samples:
        if isinstance(settings, SequentialSettings):
            # Measured already, when the sample was made.
            x, (count, took) = one.data[index], one.sequential[index]
        else:
            x, count, took = one.invert(index, settings)
        evaluations += count
        seconds += took
        residual = max(residual, float(mx.abs(one.residual(index, x, x)).max()))
    return Trial(index, settings, evaluations, seconds, residual)


def windows(length: int, least: str) -> list[int]:
    """The windows that are tried for a block of so many tokens, in their order, until two in a row are no better.

    Evaluations are the fewer the wider the window is, so the widest comes first. What an evaluation takes grows with
    its tokens, so of seconds the narrowest comes first: a wide one that is slow would be the dearest trial of all.
    """
    found = [SMALLEST_WINDOW]
    while found[-1] < length:
        found.append(2 * found[-1])
    found = [min(window, length) for window in found]
    return found if least == "seconds" else found[::-1]


def _best(
    index: int,
    samples: list[_Sample],
    tolerance: float,
    least: str,
    report: Callable[[str], None],
    counter: Counter,
) -> Trial:
    """The method for a block that costs least among those within the tolerance."""
    trials = [_try(index, samples, SequentialSettings())]
    report(str(trials[0]))
    counter.advance()

    def consider(settings: Settings) -> Trial:
        trial = _try(index, samples, settings)
        report(str(trial) + ("" if trial.residual <= 2 * tolerance else f", but residual {trial.residual:.1e}"))
        if trial.residual <= 2 * tolerance:
            trials.append(trial)
        counter.advance()
        return trial

    consider(JacobiSettings(threshold=tolerance**2))
    worse, best = 0, float("inf")
    for window in windows(samples[0].length(index), least):
        cost = consider(RollingSettings(window, tolerance)).cost(least)
        worse, best = (0, cost) if cost < best else (worse + 1, best)
        if worse == 2:
            break
    chosen = _cheapest(trials, least)
    if isinstance(chosen.settings, RollingSettings):
        consider(replace(chosen.settings, guess="affine"))
    return _cheapest(trials, least)


def _drafted(
    index: int, samples: list[_Sample], best: Trial, tolerance: float, report: Callable[[str], None]
) -> Trial | None:
    """A window that begins with the student's guesses, if it is within the tolerance; as wide as the best one is."""
    width = best.settings.window if isinstance(best.settings, RollingSettings) else samples[0].length(index)
    trial = _try(index, samples, RollingSettings(width, tolerance, guess=DRAFT))
    report(str(trial))
    return trial if trial.residual <= 2 * tolerance else None


def _cheapest(trials: list[Trial], least: str) -> Trial:
    """Among the trials that cost about as little as any, the one that is better by the other measure."""
    bound = ALIKE * min(trial.cost(least) for trial in trials)
    (other,) = (cost for cost in COSTS if cost != least)
    return min((trial for trial in trials if trial.cost(least) <= bound), key=lambda trial: trial.cost(other))


def _tightened(
    flow: Flow,
    samples: list[_Sample],
    blocks: list[Settings],
    deep: int,
    guidance: float,
    tolerance: float,
    report: Callable[[str], None],
) -> SamplingPlan:
    """The plan of these blocks, with stricter tolerances where the whole flow needs them."""
    for _ in range(8):
        measured = {
            "guidance": guidance,
            "samples": len(samples),
            "machine": platform.processor() or platform.machine(),
        }
        plan = SamplingPlan(tuple(blocks), tolerance, measured)
        evaluations, certificates = np.zeros(len(flow.blocks), int), []
        for one in samples:
            trace = SamplingTrace()
            x = one.sample(plan, trace)
            evaluations += np.array(trace.evaluations)
            certificates.append(one.certify(x))
        certificate = Certificate.worst(certificates)
        report(f"together: {evaluations.tolist()} evaluations for {len(samples)} samples, {certificate}")
        if certificate.max <= tolerance:
            measured["certificate"] = certificate.max
            measured["evaluations"] = [round(float(count) / len(samples), 1) for count in evaluations]
            return plan
        blocks = [_stricter(settings, 0.8 if index == deep else 0.3) for index, settings in enumerate(blocks)]
    report("no faster way is within the tolerance; the plan is sequential")
    return SamplingPlan((SequentialSettings(),) * len(flow.blocks), tolerance, measured)


def _stricter(settings: Settings, factor: float) -> Settings:
    if isinstance(settings, RollingSettings):
        return replace(settings, tolerance=settings.tolerance * factor)
    if isinstance(settings, JacobiSettings):
        return replace(settings, threshold=settings.threshold * factor**2)
    return settings
