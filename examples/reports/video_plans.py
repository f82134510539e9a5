"""What plans for videos save: first guesses from the frames before, and plans beside the official blocks.

    python examples/reports/moving_shapes.py runs/shapes
    python examples/reports/video_plans.py runs/shapes

The flow is the one that moving_shapes.py trains. The first table is about its deep block: how many evaluations a
window takes for each first guess, given what sequential sampling made of the frames before. The second is about whole
videos, others than those that the plans were tuned on: evaluations of all blocks and seconds for each latent frame,
at the certificate that the official blocks reach, and at stricter ones, which the official blocks reach with a lower
threshold; and the same for streams, in which the blocks that see a single frame make one after the other. The official
blocks of videos have 32 tokens, and 128 after the first frame; those of pictures 16 and 64.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import mlx.core as mx
import numpy as np
from moving_shapes import FRAMES, PATCH, PROMPTS, SIDE, encode

from mlx_starflow import load_flow
from mlx_starflow.bench.trials import Task
from mlx_starflow.cpu import describe as describe_blas
from mlx_starflow.media.noise import draw_noise
from mlx_starflow.sampling import (
    Certificate,
    GuidedFlow,
    JacobiSettings,
    RollingSettings,
    SamplingOptions,
    SamplingTrace,
    sample_frames,
)
from mlx_starflow.sampling.methods import FRAME_GUESSES, Method, SequentialSettings
from mlx_starflow.sampling.sampler import invert_block
from mlx_starflow.sampling.trials import COSTS, describe
from mlx_starflow.sampling.tuning import tune

GUIDANCE = 1.0
AIM = 0.5
"""Of the official blocks' evaluations, at most."""

OFFICIAL = {"official blocks of videos": JacobiSettings(32), "official blocks of pictures": JacobiSettings(16)}


def videos(folder: Path, count: int, seed: int, temperature: float) -> Task:
    """As many videos, each of another prompt."""
    flow = load_flow(folder, dtype="float32")
    prompts = [PROMPTS[(seed + 5 * index) % len(PROMPTS)] for index in range(count)]
    embeddings = mx.array(encode([*prompts, ""]))
    side = SIDE // PATCH
    z = temperature * mx.array(draw_noise(range(seed, seed + count), (FRAMES, side, side, 3 * PATCH**2)))
    return Task(flow, z, embeddings[:-1], embeddings[-1:], GUIDANCE)


# ---- first guesses


def guessed(task: Task, tolerance: float) -> None:
    """Evaluations of the deep block for each first guess and window, a frame."""
    guided = GuidedFlow(task.flow, task.z.shape, task.text, task.null_text, SamplingOptions(task.guidance))
    deep, noise, frame = len(task.flow.blocks) - 1, task.flow.noise_tokens(task.z), task.length // task.frames
    block, own = task.flow.blocks[deep], task.flow.blocks[deep].permute(noise, task.frames)
    exact = block.permute(
        invert_block(guided.decoder(deep, *noise.shape[:2]), noise, SequentialSettings()), task.frames
    )
    # Two frames are given, so that there is a motion to go on with.
    given = exact[:, : 2 * frame]
    print("| first guess | " + " | ".join(f"window of {count} frames" for count in (1, 2, 4)) + " |\n|---|---|---|---|")
    for guess in ("noise", "affine", *FRAME_GUESSES):
        cells = []
        for count in (1, 2, 4):
            settings = RollingSettings(count * frame, tolerance, guess, frame)
            spent = 0
            for index in range(task.images):
                one = slice(index, index + 1)
                single = GuidedFlow(
                    task.flow, task.z[one].shape, task.text[one], task.null_text, SamplingOptions(task.guidance)
                )
                decoder = single.decoder(deep, 1, noise.shape[1])
                invert_block(decoder, block.unpermute(own[one], task.frames), settings, given[one])
                spent += decoder.evaluations
            cells.append(f"{spent / task.images / (task.frames - 2):.2f}")
        print(f"| {guess} | {' | '.join(cells)} |", flush=True)


# ---- whole videos


@dataclass
class Figures:
    """Of one way of sampling, on average over the videos: evaluations of each block, deep block first, and seconds, of
    a latent frame; and the worst certificate."""

    evaluations: np.ndarray
    seconds: float
    certificate: Certificate

    @property
    def total(self) -> float:
        return float(self.evaluations.sum())


def streamed(task: Task, method: Method) -> tuple[mx.array, list[int]]:
    """What `Task.sample` gives, one frame after the other."""
    trace = SamplingTrace()
    frames = sample_frames(task.flow, task.z, task.text, task.null_text, task.guidance, method, trace=trace)
    return mx.concatenate(list(frames), axis=1), trace.evaluations


def measured(task: Task, method: Method, rounds: int, stream: bool) -> Figures:
    """Each video by itself, whole or as a stream; the seconds are the median of the rounds."""
    seconds = np.zeros((rounds, task.images))
    evaluations, certificates = np.zeros(len(task.flow.blocks)), []
    for index in range(task.images):
        one = slice(index, index + 1)
        single = replace(task, z=task.z[one], text=task.text[one])
        for number in range(rounds):
            began = time.perf_counter()
            x, counts = streamed(single, method) if stream else single.sample(method)
            mx.eval(x)
            seconds[number, index] = time.perf_counter() - began
        evaluations += counts
        certificates.append(single.certify(x))
    frames = task.images * task.frames
    return Figures(evaluations / frames, float(np.median(seconds.sum(1))) / frames, Certificate.worst(certificates))


def as_right_as(task: Task, bound: float, settings: JacobiSettings, rounds: int, stream: bool) -> Figures:
    """The official blocks with the largest threshold, halved again and again, whose certificate is within a bound."""
    while measured(task, settings, 1, stream).certificate.max > bound:
        settings = replace(settings, threshold=settings.threshold / 2)
    return measured(task, settings, rounds, stream)


def row(name: str, found: Figures) -> str:
    counts = " + ".join(f"{count:.2f}" for count in found.evaluations)
    certificate = f"{found.certificate.max:.1e}, {found.certificate.rms:.1e}"
    return f"| {name} | {counts} = {found.total:.2f} | {1000 * found.seconds:.1f} | {certificate} |"


def compare(tuned: Task, task: Task, tolerances: Sequence[float], rounds: int) -> None:
    """Plans, tuned on other videos, beside the official blocks, at the certificate of these and at stricter ones."""
    reached = measured(tuned, OFFICIAL["official blocks of videos"], 1, False).certificate.max
    ratios = []
    for tolerance in (reached, *tolerances):
        print(f"\n### Certificate {tolerance:.1e}{', which the official blocks reach' * (tolerance == reached)}\n")
        args = (tuned.flow, tuned.z, tuned.text, tuned.null_text, GUIDANCE)
        plans = {least: tune(*args, tolerance=tolerance, least=least) for least in COSTS}
        for least, plan in plans.items():
            print(f"Plan of fewest {least}: {'; '.join(describe(block) for block in reversed(plan.blocks))}.")
        for stream in (False, True):
            how = "stream" if stream else "whole"
            print(f"\n| {how} | evaluations a latent frame | ms | certificate: max, RMS |\n|---|---|---|---|")
            found = {f"plan of fewest {least}": measured(task, plan, rounds, stream) for least, plan in plans.items()}
            ours = found["plan of fewest evaluations"]
            bound = max(ours.certificate.max, tolerance)
            found |= {name: as_right_as(task, bound, each, rounds, stream) for name, each in OFFICIAL.items()}
            found["sequential"] = measured(task, "sequential", rounds, stream)
            for name, figures in found.items():
                print(row(name, figures), flush=True)
            ratios += [(tolerance, how, name, ours.total / found[name].total) for name in OFFICIAL]
    print(
        f"\n| certificate | videos | beside the | plan's evaluations / theirs | at most {AIM} |\n|---|---|---|---|---|"
    )
    for tolerance, how, name, ratio in ratios:
        print(f"| {tolerance:.1e} | {how} | {name} | {ratio:.2f} | {'met' if ratio <= AIM else 'not met'} |")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", type=Path, help="folder of moving_shapes.py")
    parser.add_argument("--videos", type=int, default=4, help="to tune on, and as many others to measure")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--tolerances", type=float, nargs="*", default=[1e-2, 1e-3], help="certificates besides")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(arguments)
    print(f"{platform.processor() or platform.machine()}, MLX {mx.__version__}, BLAS {describe_blas()}")
    for temperature, part in product(args.temperatures, ("first guesses", "plans")):
        tuned, task = (videos(args.shapes, args.videos, seed, temperature) for seed in (0, 1000))
        print(f"\n## Temperature {temperature:g}, {part}\n")
        if part == "plans":
            compare(tuned, task, args.tolerances, args.rounds)
        else:
            guessed(task, args.tolerances[0] if args.tolerances else 1e-2)


if __name__ == "__main__":
    main()
