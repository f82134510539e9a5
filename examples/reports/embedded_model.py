"""Every figure that the README states about the embedded model of scenes, and its grid of pictures.

    python examples/train_scenes.py data/scenes runs/scenes
    python examples/reports/embedded_model.py data/scenes runs/scenes --grid grid.png

What a picture shows is judged by a classifier that learned from the same renderer and is no part of the model
(`scene_evaluator.py`); it is trained first if `runs/scenes/evaluator.pt` is not there (an hour on one CPU core). Its
own accuracy on real renders is printed. Prompts are captions of scenes: of trained ones, and of combinations that were
never in the training data. Ranges are standard errors.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scene_data import FRESH, Sample, Stream
from scene_evaluator import NOTHING_HELD_OUT, Judge, Verdict, labels, train_evaluator
from scene_pictures import Renderer
from scene_words import HeldOut, Scene, objects
from torch_loop import Device

from mlx_starflow import load
from mlx_starflow.bench.doctor.embedded import PROMPT, SEED, means
from mlx_starflow.media.images import grid, save_image
from mlx_starflow.media.noise import draw_noise
from mlx_starflow.model_dir.quantization import dequantize_module

GRID = [
    ("a fox", Scene("one", ("fox",), "")),
    ("a red apple on a blue background", Scene("one", ("red apple",), "blue")),
    ("a big owl at night", Scene("one", ("owl",), "night", "big")),
    ("three donuts on a table", Scene("three", ("donut",), "table")),
    ("two fish under water", Scene("two", ("fish",), "water")),
    ("a small house in the snow", Scene("one", ("house",), "snow", "small")),
    ("a rocket above a castle on a purple background", Scene("above", ("rocket", "castle"), "purple")),
    ("a cat to the left of a dog on the beach", Scene("beside", ("cat", "dog"), "beach")),
    ("an octopus and a whale", Scene("beside", ("octopus", "whale"), "")),
    ("a robot to the right of a tree at sunset", Scene("beside", ("tree", "robot"), "sunset")),
    ("a tree below a cloud on a turquoise background", Scene("above", ("cloud", "tree"), "turquoise")),
    ("a big panda on a gradient from pink to orange", Scene("one", ("panda",), "pink>orange", "big")),
    ("a cat on a grey background", Scene("one", ("cat",), "grey")),
    ("a big lion on a white background", Scene("one", ("lion",), "white", "big")),
    ("a banana on a red background", Scene("one", ("banana",), "red")),
    ("a slice of pizza at night", Scene("one", ("slice of pizza",), "night")),
    ("a fox in the rain", Scene("one", ("fox",), "rain")),
    ("a duck under water", Scene("one", ("duck",), "water")),
    ("a carrot on a blue background", Scene("one", ("carrot",), "blue")),
    ("an elephant to the left of a tiger", Scene("beside", ("elephant", "tiger"), "")),
    ("a balloon above a penguin on the beach", Scene("above", ("balloon", "penguin"), "beach")),
    ("a robot and a unicorn on a green background", Scene("beside", ("robot", "unicorn"), "green")),
    ("a crown above a cat", Scene("above", ("crown", "cat"), "")),
    ("a rainbow above a tree", Scene("above", ("rainbow", "tree"), "")),
]
"""Twenty-four prompts; the second half combines what training never combined."""


@dataclass(frozen=True)
class Drawn:
    """What was asked for, and the pictures that a model drew, or the renderer."""

    samples: list[Sample]
    verdicts: list[Verdict]

    def share(self, right: Callable[[Verdict, Scene], bool]) -> str:
        values = [right(verdict, sample.scene) for verdict, sample in zip(self.verdicts, self.samples, strict=True)]
        mean = float(np.mean(values))
        return f"{mean:6.1%} +- {math.sqrt(max(mean * (1 - mean), 1e-9) / len(values)):4.1%}  of {len(values)}"


def found(verdict: Verdict, scene: Scene) -> bool:
    return all(verdict.shows(name) for name in scene.objects)


def counted(verdict: Verdict, scene: Scene) -> bool:
    return replace(scene, layout=verdict.classes["layout"]).count == scene.count


ROWS: list[tuple[str, str, Callable[[Verdict, Scene], bool]]] = [
    ("trained single objects", "object found", found),
    ("trained single objects", "background right", Verdict.has_background),
    ("held-out object and background", "object found", found),
    ("held-out object and background", "background right", Verdict.has_background),
    ("trained pairs", "both found, in their places", Verdict.has_layout),
    ("held-out pairs", "both found, in their places", Verdict.has_layout),
    ("held-out object and place in a pair", "both found, in their places", Verdict.has_layout),
    ("two or three of a kind", "object found", found),
    ("two or three of a kind", "count right", counted),
]


def questions(renderer: Renderer, most: int) -> dict[str, list[Sample]]:
    """Up to `most` scenes a group; the single ones are of different objects as far as these reach."""
    stream = Stream(renderer)
    fresh = (stream[n] for n in itertools.count(FRESH))

    def take(kind: Callable[[Scene], bool], samples: object) -> list[Sample]:
        return list(itertools.islice((s for s in samples if kind(s.scene)), most))

    held_out = HeldOut.read()
    singles: dict[str, Sample] = {}
    while len(singles) < min(most, len(objects()) - len(held_out.objects)):
        sample = next(fresh)
        if sample.scene.layout == "one" and len(sample.scene.backgrounds) == 1:
            singles.setdefault(sample.scene.objects[0], sample)
    return {
        "trained single objects": list(singles.values()),
        "held-out object and background": take(lambda scene: True, Stream(renderer, 0, "background")),
        "trained pairs": take(lambda scene: bool(scene.roles), fresh),
        "held-out pairs": take(lambda scene: True, Stream(renderer, 0, "pair")),
        "held-out object and place in a pair": take(lambda scene: True, Stream(renderer, 0, "role")),
        "two or three of a kind": take(lambda scene: scene.layout in ("two", "three"), fresh),
    }


def to_arrays(images: Sequence) -> list[np.ndarray]:
    return [np.asarray(image.convert("RGB")) for image in images]


def table(pipe: object, judge: Judge, renderer: Renderer, most: int) -> None:
    asked = questions(renderer, most)
    drawn, real = {}, {}
    for index, (group, samples) in enumerate(asked.items()):
        noise = draw_noise(range(1000 * index, 1000 * index + len(samples)), pipe.latent_shape())
        result = pipe.generate([s.caption for s in samples], noise=noise, verify=False, batch_size=16)
        drawn[group] = Drawn(samples, judge(to_arrays(result.images)))
        real[group] = Drawn(samples, judge([s.picture for s in samples]))
    print(f"{'prompts':37}{'what is right':30}{'the model':26}real renders")
    for group, what, right in ROWS:
        print(f"{group:37}{what:30}{drawn[group].share(right):26}{real[group].share(right)}")


def accuracy(judge: Judge, renderer: Renderer, count: int = 1000) -> None:
    samples = [Stream(renderer, 7, held_out=NOTHING_HELD_OUT)[n] for n in range(count)]
    verdicts = judge([s.picture for s in samples])
    for kind in labels(samples[0].scene):
        right = np.mean([v.classes[kind] == labels(s.scene)[kind] for v, s in zip(verdicts, samples, strict=True)])
        print(f"the evaluator on {count} real renders: {kind:8}{right:6.1%}")


def diversity(pipe: object, judge: Judge, renderer: Renderer, seeds: int = 6) -> None:
    """Mean distance of the evaluator's features between pictures of one prompt, the model's and the renderer's."""

    def spread(pictures: list[np.ndarray]) -> float:
        features = [verdict.features for verdict in judge(pictures)]
        return float(np.mean([np.linalg.norm(a - b) for a, b in itertools.combinations(features, 2)]))

    ours, real = [], []
    for prompt, scene in GRID:
        ours.append(spread(to_arrays(pipe.generate(prompt, seed=100, images=seeds, verify=False).images)))
        real.append(spread([renderer.render(scene, np.random.default_rng(seed)) for seed in range(seeds)]))
    print(f"distance between {seeds} seeds of a prompt: {np.mean(ours):.2f}, of real renders {np.mean(real):.2f}, "
          f"ratio {np.mean(ours) / np.mean(real):.2f}")  # fmt: skip


def nll(pipe: object, samples: list[Sample], batch: int = 32) -> np.ndarray:
    """Exact NLL of scenes given their captions, nats per latent dimension, each with its own noise."""
    values = []
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        pictures = mx.array(np.stack([s.picture for s in part]).astype(np.float32) / 127.5 - 1)
        latents = np.array(pipe.vae.scale(pipe.vae.encode(pictures).mean).astype(mx.float32))
        noise = draw_noise(range(start, start + len(part)), latents.shape[1:])
        text = pipe.encode_prompts([s.caption for s in part])
        values.append(np.array(pipe.flow(mx.array(latents + pipe.flow.config.noise_std * noise), text).nll()))
    return np.concatenate(values) + 0.5 * math.log(2 * math.pi)


def likelihood(pipe: object, renderer: Renderer, count: int) -> None:
    """Held-out scenes beside trained ones of the same layouts and kinds of background."""

    def mean(values: np.ndarray) -> tuple[float, float]:
        return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))

    alike: dict[str, Callable[[Scene], bool]] = {
        "pair": lambda scene: bool(scene.roles),
        "background": lambda scene: scene.layout == "one" and len(scene.backgrounds) == 1,
        "role": lambda scene: bool(scene.roles),
        "object": lambda scene: True,
    }
    for kind, same in alike.items():
        fresh = (Stream(renderer)[n] for n in itertools.count(FRESH))
        trained = nll(pipe, list(itertools.islice((s for s in fresh if same(s.scene)), count)))
        unseen = nll(pipe, [Stream(renderer, 0, kind)[n] for n in range(count)])
        (a, da), (b, db) = mean(trained), mean(unseen)
        print(f"NLL, nats/dim: trained scenes {a:.4f} +- {da:.4f}, held out by {kind} {b:.4f} +- {db:.4f}, "
              f"gap {b - a:+.4f} +- {math.hypot(da, db):.4f}  ({count} each)")  # fmt: skip


def time_one(model: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        words = ["generate", GRID[0][0], "--model", model, "--overwrite", "-o", f"{scratch}/a.png"]
        seconds = []
        for _ in range(7):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-m", "mlx_starflow", *words], check=True, capture_output=True)
            seconds.append(time.perf_counter() - began)
    print(f"one picture from the shell, start of Python included: {statistics.median(seconds):.1f} s")


def doctor(model: str) -> None:
    """What `mlx-starflow doctor` compares this machine with: IMAGE_MEANS and NLL of bench/doctor/embedded.py."""
    pipe = load(model, dtype="float32")
    dequantize_module(pipe.flow)
    result = pipe.generate(PROMPT, seed=SEED, method="sequential", verify=False)
    for row in means(result.images[0]).round().astype(int):
        print("    " + " ".join("".join(f"{value:02x}" for value in cell) for cell in row))
    print(f"NLL = {float(pipe.flow(result.latents, pipe.encode_prompts([PROMPT])).nll()[0]):.6f}")


def draw_grid(pipe: object, path: Path) -> None:
    held_out = HeldOut.read()
    result = pipe.generate([prompt for prompt, _ in GRID], seed=1)
    save_image(grid(result.images, columns=6), path, pipe.grid_metadata(result))
    for number, (prompt, scene) in enumerate(GRID):
        reasons = sorted(held_out.kinds(scene))
        print(f"{number // 6 + 1}.{number % 6 + 1} {prompt}{f' (never trained: {reasons[0]})' if reasons else ''}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the sprites")
    parser.add_argument("run", type=Path, help="the folder that train_scenes.py wrote; the evaluator is kept there")
    parser.add_argument("--model", help="another model directory; OUT/model if not given")
    parser.add_argument("--grid", type=Path, help="write the grid of pictures")
    parser.add_argument("--most", type=int, default=196, help="scenes a row of the table")
    parser.add_argument("--evaluator-steps", type=int, default=4000)
    parser.add_argument("--only-doctor", action="store_true", help="print what doctor expects of the model, and stop")
    parser.add_argument("--only-evaluator", action="store_true", help="train and judge the evaluator, and stop")
    args = parser.parse_args(arguments)
    model = args.model or str(args.run / "model")
    if args.only_doctor:
        return doctor(model)
    renderer, device = Renderer(args.data), Device.choose(1)
    checkpoint = args.run / "evaluator.pt"
    train_evaluator(renderer, checkpoint, device, args.evaluator_steps)
    judge = Judge.read(checkpoint, device)
    accuracy(judge, renderer, min(1000, 20 * args.most))
    if args.only_evaluator:
        return
    time_one(model)
    pipe = load(model)
    if args.grid:
        draw_grid(pipe, args.grid)
    table(pipe, judge, renderer, args.most)
    diversity(pipe, judge, renderer, seeds=min(6, args.most))
    likelihood(pipe, renderer, min(500, 5 * args.most))


if __name__ == "__main__":
    main()
