"""Finding the fastest way to invert each block of a flow, on this machine, at a stated certificate.

Or the one with the fewest network evaluations, which is the fastest where these wait for weights and not for
arithmetic: on most GPUs, one picture at a time. Which blocks converge in a few sweeps and which do not is a property of
the weights (arXiv 2505.12849, 2505.24791); what an evaluation of n tokens costs is one of the machine. Both are
measured. What the first of these papers ranks blocks by is no help here: see docs/speed.md.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir.weights import dtype_name
from mlx_starflow.models.flow import Flow, products_in
from mlx_starflow.models.student import Student
from mlx_starflow.sampling.cache import KVBits
from mlx_starflow.sampling.certificate import Certificate
from mlx_starflow.sampling.guidance import SamplingOptions
from mlx_starflow.sampling.methods import (
    DRAFT,
    FRAME_GUESSES,
    FramewiseSettings,
    JacobiSettings,
    RollingSettings,
    SamplingPlan,
    SequentialSettings,
    Settings,
)
from mlx_starflow.sampling.noise_floor import FACTOR
from mlx_starflow.sampling.progress import Callback, Counter, Progress, Watch, watch
from mlx_starflow.sampling.sampler import SamplingTrace
from mlx_starflow.sampling.trials import (
    COSTS,
    FIRST,
    SINGLY,
    WHOLE,
    Trial,
    TunedSample,
    attempt,
    cheapest,
    tuned_samples,
    windows,
)

DEEP_SHARE = 0.9
"""How much of the tolerance the deep block, whose residual is the certificate's own, is given at first."""
OTHERS_SHARE = 0.1
"""And the others, whose residuals the blocks after them enlarge."""


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
            since that is how a picture at a time is made. Videos are `[B, T, H, W, C]`; of them the blocks that see
            all frames may make the first one in a way of its own, try windows of whole frames, and take their first
            guesses from the frames before.
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
        samples = list(tuned_samples(flow, z, text, null_text, options))
        for one in samples:
            one.draft(student)
        plan = _tune(flow, samples, guidance, tolerance, least, report, progress)
        return replace(plan, kv_bits=kv_bits, frame=samples[0].frame if samples[0].frames > 1 else 0)


def _tune(
    flow: Flow,
    samples: list[TunedSample],
    guidance: float,
    tolerance: float,
    least: str,
    report: Callable[[str], None],
    progress: Progress,
) -> SamplingPlan:
    exact = max(one.certificate.max for one in samples)
    report(f"sequential: {samples[0].evaluations} evaluations, certificate {exact:.1e}")
    if samples[0].frames > 1:
        report(f"{samples[0].frames} latent frames of {samples[0].frame} tokens")
    deep = max(samples[0].guided.active())
    floors = {index: max(one.noise_floor(index) for one in samples) for index in samples[0].guided.active()}
    least_tolerance = max(2 * exact, FACTOR * floors[deep] / DEEP_SHARE)
    if least_tolerance > tolerance:
        tolerance = least_tolerance
        report(f"that is all that this precision gives; the tolerance is now {tolerance:.1e}")
    blocks: list[Settings] = [SequentialSettings()] * len(flow.blocks)
    active = list(samples[0].guided.active())
    most = {index: samples[0].most_trials(index, least) for index in active}
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


def _best(
    index: int,
    samples: list[TunedSample],
    tolerance: float,
    least: str,
    report: Callable[[str], None],
    counter: Counter,
) -> Trial:
    """The method for a block that costs least among those within the tolerance."""
    frame = samples[0].frame if samples[0].sees_frames(index) else 0
    search = _Search(index, samples, tolerance, least, report, counter)
    best = search.best(windows(samples[0].length(index), least, frame), frame)
    if not frame:
        return search.with_guess_of_streams(best) if samples[0].frames > 1 else best
    if isinstance(best.settings, SequentialSettings):
        return best
    report(f"block {index}: {FIRST}")
    first = replace(search, part=FIRST, trials=[]).best(windows(frame, least), 0).settings
    later = best.settings
    assert not isinstance(first, FramewiseSettings) and not isinstance(later, FramewiseSettings)
    if first != later:
        search.consider(FramewiseSettings(first, later))
    return search.cheapest()


@dataclass
class _Search:
    """Ways of inverting one block, or a part of a video in it, that were tried.

    Attributes:
        trials: those within the tolerance.
    """

    index: int
    samples: list[TunedSample]
    tolerance: float
    least: str
    report: Callable[[str], None]
    counter: Counter
    part: str = WHOLE
    trials: list[Trial] = field(default_factory=list)

    def best(self, widths: list[int], frame: int) -> Trial:
        """The cheapest of sequential sampling, the official blocks, and windows with all first guesses; those of the
        frames before, of so many tokens, if there are any."""
        tolerance = self.tolerance
        self.consider(SequentialSettings())
        self.consider(self.samples[0].jacobi(tolerance**2))
        worse, lowest = 0, float("inf")
        for window in widths:
            cost = self.consider(RollingSettings(window, tolerance)).cost(self.least)
            worse, lowest = (0, cost) if cost < lowest else (worse + 1, lowest)
            if worse == 2:
                break
        chosen = self.cheapest().settings
        if isinstance(chosen, RollingSettings):
            self.consider(replace(chosen, guess="affine"))
            # A window of the whole block guesses all of its tokens before it knows one.
            if frame and chosen.window < self.samples[0].length(self.index):
                for guess in FRAME_GUESSES:
                    self.consider(replace(chosen, guess=guess, lag=frame))
        return self.cheapest()

    def with_guess_of_streams(self, best: Trial) -> Trial:
        """A window of a block that reads each frame by itself, with the first guess that is best frame by frame.

        All frames at once have none before them, and there these guesses are the plain ones.
        """
        if not isinstance(best.settings, RollingSettings):
            return best
        self.report(f"block {self.index}: {SINGLY}")
        search, lag = replace(self, part=SINGLY, trials=[]), self.samples[0].frame
        for guess in (best.settings.guess, *FRAME_GUESSES):
            search.consider(replace(best.settings, guess=guess, lag=lag if guess in FRAME_GUESSES else 0))
        return replace(best, settings=search.cheapest().settings) if search.trials else best

    def consider(self, settings: Settings) -> Trial:
        trial = attempt(self.index, self.samples, settings, self.part)
        good = isinstance(settings, SequentialSettings) or trial.residual <= 2 * self.tolerance
        self.report(str(trial) + ("" if good else f", but residual {trial.residual:.1e}"))
        if good:
            self.trials.append(trial)
        self.counter.advance()
        return trial

    def cheapest(self) -> Trial:
        return cheapest(self.trials, self.least)


def _drafted(
    index: int, samples: list[TunedSample], best: Trial, tolerance: float, report: Callable[[str], None]
) -> Trial | None:
    """A window that begins with the student's guesses, if it is within the tolerance; as wide as the best one is."""
    width = best.settings.window if isinstance(best.settings, RollingSettings) else samples[0].length(index)
    trial = attempt(index, samples, RollingSettings(width, tolerance, guess=DRAFT))
    report(str(trial))
    return trial if trial.residual <= 2 * tolerance else None


def _tightened(
    flow: Flow,
    samples: list[TunedSample],
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
        evaluations, certificates, seconds = np.zeros(len(flow.blocks), int), [], 0.0
        for one in samples:
            trace, began = SamplingTrace(), time.perf_counter()
            x = one.sample(plan, trace)
            mx.eval(x)
            seconds += time.perf_counter() - began
            evaluations += np.array(trace.evaluations)
            certificates.append(one.certify(x))
        certificate = Certificate.worst(certificates)
        report(f"together: {evaluations.tolist()} evaluations for {len(samples)} samples, {certificate}")
        frames = len(samples) * samples[0].frames
        each, took = float(evaluations.sum()) / frames, seconds / frames
        if samples[0].frames > 1:
            report(f"{each:.2f} evaluations and {took:.3f} s a latent frame")
        if certificate.max <= tolerance:
            if samples[0].frames > 1:
                measured |= {
                    "frames": samples[0].frames,
                    "evaluations_per_frame": round(each, 2),
                    "seconds_per_frame": round(took, 4),
                }
            measured["certificate"] = certificate.max
            measured["evaluations"] = [round(float(count) / len(samples), 1) for count in evaluations]
            return plan
        blocks = [_stricter(settings, 0.8 if index == deep else 0.3) for index, settings in enumerate(blocks)]
    report("no faster way is within the tolerance; the plan is sequential")
    return SamplingPlan((SequentialSettings(),) * len(flow.blocks), tolerance, measured)


def _stricter(settings: Settings, factor: float) -> Settings:
    if isinstance(settings, FramewiseSettings):
        first, later = (_stricter(each, factor) for each in (settings.first, settings.later))
        assert not isinstance(first, FramewiseSettings) and not isinstance(later, FramewiseSettings)
        return FramewiseSettings(first, later)
    if isinstance(settings, RollingSettings):
        return replace(settings, tolerance=settings.tolerance * factor)
    if isinstance(settings, JacobiSettings):
        return replace(settings, threshold=settings.threshold * factor**2)
    return settings
