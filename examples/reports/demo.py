"""Every figure that the README states about the embedded model, and its picture grid.

    python examples/demo_data.py data/emoji
    python examples/reports/demo.py data/emoji grid.png

Prints the exact likelihood of training and held-out pictures, how often a sample's nearest training picture (among
the latents of all of them) has the name that was asked for, and the time of one picture, and draws the grid.
"""

from __future__ import annotations

import argparse
import math
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_starflow import load
from mlx_starflow.media.image_folder import ImageFolder
from mlx_starflow.media.images import grid, save_image
from mlx_starflow.media.noise import draw_noise
from mlx_starflow.pipelines import ImagePipeline

PROMPTS = (
    "red apple, slice of pizza, grinning face, cat face, dog face, red heart, purple heart, rocket, sun, rainbow, "
    "strawberry, banana, hamburger, birthday cake, octopus, fish, tulip, cactus, car, guitar, soccer ball, cloud, "
    "snowman, crown"
).split(", ")


def latents_of(pipe: ImagePipeline, data: ImageFolder) -> np.ndarray:
    """Normalized latents of pictures as they are, `[N, 16, 16, 4]`."""
    parts = []
    for start in range(0, len(data), 32):
        pictures = mx.array(data.images[start : start + 32].astype(np.float32) / 127.5 - 1)
        parts.append(np.array(pipe.vae.scale(pipe.vae.encode(pictures).mean)))
    return np.concatenate(parts)


def nll(pipe: ImagePipeline, latents: np.ndarray, names: list[str]) -> str:
    """Mean exact NLL and its standard error over pictures, in nats per latent dimension."""
    noisy = latents + pipe.flow.config.noise_std * draw_noise(range(len(latents)), latents.shape[1:])
    values = []
    for start in range(0, len(latents), 32):
        part = slice(start, start + 32)
        values.append(np.array(pipe.flow(mx.array(noisy[part]), pipe.encode_prompts(names[part])).nll()))
    each = np.concatenate(values) + 0.5 * math.log(2 * math.pi)
    return (
        f"{each.mean():.4f} +- {each.std(ddof=1) / math.sqrt(len(each)):.4f} nats per dimension ({len(each)} pictures)"
    )


def likelihood(pipe: ImagePipeline, train: ImageFolder, held_out: ImageFolder, known: np.ndarray) -> None:
    names = [captions[0] for captions in train.captions]
    print(f"NLL of training pictures given their names: {nll(pipe, known, names)}")
    print(f"NLL of training pictures, no prompt:        {nll(pipe, known, [''] * len(names))}")
    unseen = [captions[0] for captions in held_out.captions]
    print(f"NLL of held-out pictures given their names: {nll(pipe, latents_of(pipe, held_out), unseen)}")


def names_right(pipe: ImagePipeline, train: ImageFolder, known: np.ndarray, every: int = 8) -> None:
    """How often the training picture nearest to a sample (in the latents) has the name that was asked for."""
    names = [captions[0] for captions in train.captions]
    asked = list(range(0, len(names), every))
    result = pipe.generate([names[i] for i in asked], seed=1, progress=None)
    samples = np.array(result.latents).reshape(len(asked), 1, -1)
    nearest = [np.square(known.reshape(len(names), -1) - sample).sum(1).argmin() for sample in samples]
    right = np.mean([names[n] == names[i] for n, i in zip(nearest, asked, strict=True)])
    print(f"nearest training picture has the name asked for: {right:.1%} of {len(asked)} concepts, seed 1")


def draw_grid(pipe: ImagePipeline, path: Path) -> None:
    shown = pipe.generate(PROMPTS, seed=1, progress=None)
    save_image(grid(shown.images, columns=8), path, pipe.grid_metadata(shown))
    print(f"{path}: {', '.join(PROMPTS)}; seed 1, {pipe.settings}")


def time_one_picture(model: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        words = [sys.executable, "-m", "mlx_starflow", "generate", "a red apple", "--model", model, "-v"]
        began = time.perf_counter()
        done = subprocess.run([*words, "-o", f"{scratch}/a.png"], check=True, capture_output=True, text=True)
        print(f"one picture, start of Python included: {time.perf_counter() - began:.1f} s")
        print(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder examples/demo_data.py wrote")
    parser.add_argument("grid", type=Path, help="where to put the picture grid")
    parser.add_argument("--model", default="demo")
    args = parser.parse_args(arguments)
    print(f"machine: {platform.platform()}, {platform.processor() or platform.machine()}, MLX {mx.__version__}")
    time_one_picture(args.model)
    pipe = load(args.model)
    draw_grid(pipe, args.grid)
    size = pipe.vae.config.sample_size
    train, held_out = (ImageFolder.read(args.data, size=size, splits=(split,)) for split in ("train", "held_out"))
    known = latents_of(pipe, train)
    names_right(pipe, train, known)
    likelihood(pipe, train, held_out, known)


if __name__ == "__main__":
    main()
