"""What students of a model cost and how near they come to it: one run, one table.

    mlx-starflow distill demo --prompt-file prompts.txt -o runs/inverse
    mlx-starflow distill demo --prompt-file prompts.txt -o runs/matching --kind matching
    mlx-starflow distill demo --prompt-file prompts.txt -o runs/independent --kind matching --independent
    python examples/reports/students.py demo --inverse runs/inverse --matching runs/matching \\
        --independent runs/independent --scenes data/scenes --evaluator runs/scenes/evaluator.pt

Every way makes the same images of the same noise, one at a time: seconds and evaluations are those of an image, without
text encoder and decoder. The distance is RMS, of an image's clean latents to those of the sequential sample, in
standard deviations of these; a standard error stands behind. What is exact has its certificate. With --scenes the
prompts are captions of scenes such as the embedded model was trained on, and an image is right if a classifier that is
no part of the model (`scene_evaluator.py`) sees all in it that its caption says; a standard error stands behind. The
kernel distance is that of KID, of clean latents and those of other scenes, times 1000. A second table says what first
guesses with an error would save, whoever makes them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scene_data import FRESH, Sample, Stream
from scene_pictures import Renderer

from mlx_starflow.bench.trials import PROMPTS
from mlx_starflow.evaluation.measures import LEAST, kernel_distance
from mlx_starflow.likelihood import standard_error
from mlx_starflow.media.noise import draw_noise
from mlx_starflow.models.student import Student
from mlx_starflow.pipelines import load
from mlx_starflow.pipelines.mlx_backend import MLXBackend
from mlx_starflow.sampling import (
    Certificate,
    GuidedFlow,
    RollingSettings,
    SamplingOptions,
    SamplingTrace,
    certify,
    denoise,
    sample,
)
from mlx_starflow.sampling.methods import Method
from mlx_starflow.sampling.sampler import invert_block
from mlx_starflow.sampling.student import sample_student

ERRORS = (1.0, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01)
"""Of first guesses."""

GUESSED = 8
"""Images that first guesses with errors are tried on."""


@dataclass
class Made:
    """What a way made: clean latents `[B, ...]`, and of an image its seconds and evaluations."""

    latents: np.ndarray
    seconds: float
    evaluations: float
    certificate: Certificate | None = None


class Report:
    """The ways, all with the same prompts and the same noise."""

    def __init__(self, model: str, samples: int, scenes: Path | None, evaluator: Path | None):
        self.pipe = load(model)
        self.settings = self.pipe.settings
        self.evaluator = evaluator
        self.scenes: list[Sample] = []
        self.known: np.ndarray | None = None
        prompts = list(PROMPTS)
        if scenes is not None:
            stream = Stream(Renderer(scenes))
            self.scenes = [stream[FRESH + number] for number in range(samples)]
            prompts = [scene.caption for scene in self.scenes]
            # Of other captions than the images': pairs of one scene would make the two sets look nearer than they are.
            others = [stream[FRESH + samples + number].picture for number in range(samples)]
            self.known = self.pipe.to_data(others).reshape(samples, -1)
        self.prompts = [prompts[index % len(prompts)] for index in range(samples)]
        self.z = self.settings.temperature * draw_noise(range(samples), self.pipe.noise_shape())
        self.null = self.pipe.conditions([""]) if self.settings.guidance else None
        self.texts = [self.pipe.conditions([prompt]) for prompt in self.prompts]
        self.exact: np.ndarray | None = None

    def images(self, make: Callable[[mx.array, mx.array | None], tuple[mx.array, int]]) -> Made:
        """All images of a way; one before them, which compiles what there is to compile, does not count."""
        make(mx.array(self.z[:1]), self.texts[0])
        latents, seconds, evaluations = [], [], 0
        for index, text in enumerate(self.texts):
            z = mx.array(self.z[index : index + 1])
            began = time.perf_counter()
            x, count = make(z, text)
            mx.eval(x)
            seconds.append(time.perf_counter() - began)
            latents.append(np.array(x))
            evaluations += count
        return Made(np.concatenate(latents), float(np.median(seconds)), evaluations / len(self.texts))

    def teacher(self, method: Method, student: Student | None = None) -> Made:
        """The flow, by a method; certificates are computed apart, and take none of the seconds."""
        flow, guidance, null = self.pipe.flow, self.settings.guidance, self.null
        samples: list[mx.array] = []

        def make(z: mx.array, text: mx.array | None) -> tuple[mx.array, int]:
            trace = SamplingTrace()
            x = sample(flow, z, text, null, guidance, method, student=student, trace=trace)
            samples.append(x)
            return denoise(flow, x, text), sum(trace.evaluations) + trace.student_evaluations

        made = self.images(make)
        certificates = [
            certify(flow, x, mx.array(self.z[index : index + 1]), text, null, guidance)
            for index, (x, text) in enumerate(zip(samples[1:], self.texts, strict=True))
        ]
        made.certificate = Certificate.worst(certificates)
        return made

    def other_noise(self) -> Made:
        """The flow again, each prompt with the noise of another image: how far apart two samples of a prompt are."""
        z, self.z = self.z, np.roll(self.z, 1, axis=0)
        made = self.teacher("sequential")
        self.z = z
        return made

    def guessed(self, error: float, samples: int) -> float:
        """Evaluations of the flow for an image, if first guesses are the exact states with noise: what a student would
        save whose RMS error is `error`, in standard deviations of each state."""
        flow, settings, rng, count = self.pipe.flow, self.settings, np.random.default_rng(1), 0
        options = SamplingOptions(settings.guidance)
        for index, text in enumerate(self.texts[:samples]):
            z, trace = mx.array(self.z[index : index + 1]), SamplingTrace(keep_states=True)
            sample(flow, z, text, self.null, settings.guidance, trace=trace)
            guided, tokens = GuidedFlow(flow, z.shape, text, self.null, options), flow.noise_tokens(z)
            for number in guided.active():
                exact = np.array(flow.tokens(trace.states[len(flow.blocks) - 1 - number]))
                noise = error * exact.std() * rng.standard_normal(exact.shape, np.float32)
                decoder = guided.decoder(number, *tokens.shape[:2])
                decoder.draft = decoder.block.permute(mx.array(exact + noise))
                tokens = invert_block(decoder, tokens, RollingSettings(guess="draft"))
                count += decoder.evaluations
        return count / len(self.texts[:samples])

    def learned(self, folder: Path) -> Student:
        """The student in a folder, as the pipeline uses it."""
        backend = self.pipe.backend
        assert isinstance(backend, MLXBackend)
        return backend.student(str(folder))

    def student(self, student: Student, steps: int) -> Made:
        def make(z: mx.array, text: mx.array | None) -> tuple[mx.array, int]:
            made = sample_student(student, z, text, steps)
            return made.data, made.evaluations

        return self.images(make)

    def right(self, latents: np.ndarray) -> str:
        """The share of images that show all that their captions say."""
        if not self.scenes or self.evaluator is None:
            return ""
        from scene_evaluator import Judge
        from torch_loop import Device

        verdicts = Judge.read(self.evaluator, Device("cpu"))([np.asarray(i) for i in self.pipe.to_images(latents)])
        hits = [v.has_layout(s.scene) and v.has_background(s.scene) for v, s in zip(verdicts, self.scenes, strict=True)]
        share = float(np.mean(hits))
        return f"{100 * share:.0f} +- {100 * np.sqrt(share * (1 - share) / len(hits)):.0f} %"

    def kernel(self, latents: np.ndarray) -> str:
        """The kernel distance of the images' latents to those of other scenes, times 1000."""
        if self.known is None or len(latents) < LEAST:
            return ""
        found = kernel_distance(self.known, latents.reshape(len(latents), -1))
        return f"{1000 * found.mean:.0f} +- {1000 * found.error:.0f}"

    def line(self, name: str, made: Made) -> np.ndarray:
        """Print a row, and give the distance of each image; the first row is what the others are compared with."""
        if self.exact is None:
            self.exact = made.latents
        each = np.sqrt(np.square(made.latents - self.exact).reshape(len(self.exact), -1).mean(1)) / self.exact.std()
        certificate = "" if made.certificate is None else f"{made.certificate.max:.1e}"
        cells = [
            name,
            f"{made.seconds:.3f}",
            f"{made.evaluations:.1f}",
            f"{each.mean():.3f} +- {standard_error(each):.3f}",
            certificate,
        ]
        print("| " + " | ".join([*cells, self.right(made.latents), self.kernel(made.latents)]) + " |", flush=True)
        return each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--inverse", type=Path, help="a student's folder")
    parser.add_argument("--matching", type=Path, help="a student's folder")
    parser.add_argument("--independent", type=Path, help="that of one that has learned from independent noise")
    parser.add_argument("--scenes", type=Path, help="folder of the sprites, as scene_data.py writes it")
    parser.add_argument("--evaluator", type=Path, help="what judges images: evaluator.pt of embedded_model.py")
    parser.add_argument("--samples", type=int, default=64)
    arguments = parser.parse_args()
    report = Report(arguments.model, arguments.samples, arguments.scenes, arguments.evaluator)
    print(
        "| | seconds | evaluations | distance | certificate | right | kernel distance |\n|---|---|---|---|---|---|---|"
    )
    report.line("teacher, sequential", report.teacher("sequential"))
    report.line("teacher, other noise", report.other_noise())
    auto = report.pipe.method(report.settings)
    report.line("teacher, auto", report.teacher(auto))
    if arguments.inverse is not None:
        inverse = report.learned(arguments.inverse)
        report.line("teacher, draft", report.teacher("draft", inverse))
        for steps in (1, 2, 4):
            report.line(f"inverse student, {steps}", report.student(inverse, steps))
    distances: dict[int, list[np.ndarray]] = {1: [], 4: [], 16: []}
    for name, folder in (("matching", arguments.matching), ("independent", arguments.independent)):
        if folder is not None:
            matching = report.learned(folder)
            for steps, found in distances.items():
                found.append(report.line(f"{name} student, {steps}", report.student(matching, steps)))
    for steps, found in distances.items():
        if len(found) == 2:
            nearer = found[1] - found[0]
            print(f"\n{steps}: pairs are nearer by {nearer.mean():.4f} +- {standard_error(nearer):.4f}, image by image")
    print("\n| error of first guesses | evaluations of the flow |\n|---|---|")
    for error in ERRORS:
        print(f"| {error:g} | {report.guessed(error, GUESSED):.1f} |", flush=True)


if __name__ == "__main__":
    main()
