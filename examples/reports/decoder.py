"""What training a decoder alone gives: the embedded model's, on pictures that it was not made for.

    python examples/reports/decoder.py

Coloured shapes on textured grounds are drawn, some held out, and `train --only decoder` is run on the others. The table
has the held-out pictures' peak signal-to-noise ratio and their distance in the encoder's features, decoded from latents
without noise and with as much as the flow is trained with, before and after.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mlx_starflow.training.config import TrainingOptions
from mlx_starflow.training.recipes.decoder import train_decoder

SIDE = 128


def draw(rng: np.random.Generator) -> Image.Image:
    """Three shapes on a ground of waves."""
    across, down = np.meshgrid(np.arange(SIDE), np.arange(SIDE))
    waves = np.sin(across * rng.uniform(0.05, 0.4) + down * rng.uniform(0.05, 0.4))[..., None]
    ground = rng.uniform(60, 200, 3) + 40 * waves * rng.uniform(-1, 1, 3)
    image = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(3):
        left, top = rng.integers(0, SIDE - 40, 2)
        width, height = rng.integers(16, 48, 2)
        shape = pen.rectangle if rng.random() < 0.5 else pen.ellipse
        shape((left, top, left + width, top + height), fill=tuple(map(int, rng.integers(0, 256, 3))))
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="whose decoder is trained")
    parser.add_argument("--pictures", type=int, default=120)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "pictures"
        data.mkdir()
        rng = np.random.default_rng(0)
        for number in range(options.pictures):
            draw(rng).save(data / f"{number:04}.png")
        training = TrainingOptions(
            steps=options.steps, batch_size=options.batch_size, lr=options.lr, ema=0.9, log_every=options.steps
        )
        began = time.perf_counter()
        report = train_decoder(data, options.model, Path(folder) / "model", training, progress=None)
        seconds = time.perf_counter() - began
    print("| noise | dB before | after | distance before | after |\n|---|---|---|---|---|")
    for before, after in zip(report.before, report.after, strict=True):
        decibels = f"{before.decibels:.2f} | {after.decibels:.2f}"
        print(f"| {before.noise:g} | {decibels} | {before.distance:.3f} | {after.distance:.3f} |")
    print(f"\n{options.steps} steps of {options.batch_size} pictures, {seconds:.0f} seconds")


if __name__ == "__main__":
    main()
