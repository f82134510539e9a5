"""TarFlow and iTARFlow on the same pictures for the same steps: likelihood, samples, and what steps of denoising do.

    python examples/reports/tarflow.py runs/compared --steps 2500

The pictures are drawn: discs, squares, triangles and crosses of four bright colours, anywhere and of any size, on dark
grounds, 16x16.
Both flows have the same blocks and see the same pictures with the same labels. OUT gets sheets.png, the samples, and
figures.json; docs/tarflow.md shows them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image, ImageDraw

from mlx_starflow.likelihood import exact_nll
from mlx_starflow.media.images import grid, save_image, to_images
from mlx_starflow.media.pixels import scale_pixels
from mlx_starflow.models.itarflow import ITarFlow, ITarFlowConfig
from mlx_starflow.models.tarflow import PixelFlow, TarFlow, TarFlowConfig
from mlx_starflow.sampling import denoise, iterate, noise_levels, sample
from mlx_starflow.training.config import TrainingConfig
from mlx_starflow.training.data.labelled_images import LabelledImages
from mlx_starflow.training.loop.trainer import Trainer
from mlx_starflow.training.loop.weights import assign

SIDE, SHAPES = 16, ("disc", "square", "triangle", "cross")
TARFLOW_NOISE = 0.05
LOWEST, HIGHEST = 0.05, 0.3
STEPS = (1, 4, 16)
GROUNDS = ((20, 20, 60), (60, 20, 20), (20, 50, 20))
COLOURS = ((250, 220, 60), (240, 240, 240), (120, 220, 250), (250, 130, 180))


def draw_shape(shape: str, rng: np.random.Generator) -> np.ndarray:
    """A picture `[16, 16, 3]`, drawn four times as large."""
    side = 4 * SIDE
    ground, colour = (kinds[rng.integers(len(kinds))] for kinds in (GROUNDS, COLOURS))
    image = Image.new("RGB", (side, side), ground)
    pen, radius = ImageDraw.Draw(image), rng.uniform(0.25, 0.42) * side
    x, y = rng.uniform(radius, side - radius, 2)
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "disc":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    elif shape == "triangle":
        pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)
    else:
        pen.rectangle((x - radius, y - radius / 3, x + radius, y + radius / 3), fill=colour)
        pen.rectangle((x - radius / 3, y - radius, x + radius / 3, y + radius), fill=colour)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


def pictures(count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    names = [SHAPES[index % len(SHAPES)] for index in range(count)]
    return np.stack([draw_shape(name, rng) for name in names]), names


def new_flows(channels: int, patch: int) -> dict[str, PixelFlow]:
    shape = {"img_size": SIDE, "channel_size": 3, "blocks": 4, "num_classes": len(SHAPES), "head_dim": 32}
    levels = {"t0": LOWEST, "t1": HIGHEST}
    tarflow = {"patch_size": patch, "channels": channels, "layers_per_block": 2, "noise_std": TARFLOW_NOISE}
    itarflow = {"patch_sizes": [patch], "channels": [channels], "layers_per_block": [2], **levels}
    return {
        "TarFlow": TarFlow(TarFlowConfig.from_dict({**shape, **tarflow})),
        "iTARFlow": ITarFlow(ITarFlowConfig.from_dict({**shape, **itarflow})),
    }


def left_over(images: np.ndarray) -> float:
    """RMS distance of pixels from the nearer of their picture's two colours, in levels: what a picture of one colour on
    another has along its outline alone, and noise and smears everywhere."""
    result = []
    for picture in images.astype(np.float64).reshape(len(images), -1, 3):
        colours = np.stack([picture[0], picture[((picture - picture[0]) ** 2).sum(-1).argmax()]])
        for _ in range(10):
            nearer = ((picture[:, None] - colours) ** 2).sum(-1).argmin(1)
            colours = np.stack([picture[nearer == k].mean(0) if (nearer == k).any() else colours[k] for k in (0, 1)])
        result.append(((picture - colours[nearer]) ** 2).mean())
    return float(np.sqrt(np.mean(result)))


def samples(flow: PixelFlow, count: int) -> dict[str, np.ndarray]:
    """Pictures by how they were cleaned: as they come, in one step, and an iTARFlow's in more."""
    labels = mx.arange(count) % len(SHAPES)
    z = np.random.default_rng(7).standard_normal((count, *flow.var.shape), dtype=np.float32)
    x = sample(flow, mx.array(z), labels)
    found = {"sampled": x, "1 step": denoise(flow, x, labels)}
    if isinstance(flow, ITarFlow):
        for steps in STEPS[1:]:
            levels = noise_levels(HIGHEST, LOWEST, steps)
            found[f"{steps} steps"] = iterate(flow, x, labels, levels)
    return {name: np.stack([np.asarray(image) for image in to_images(np.array(each))]) for name, each in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--channels", type=int, default=96)
    parser.add_argument("--patch", type=int, default=4)
    parser.add_argument("--count", type=int, default=256, help="samples that figures are made of")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    images, names = pictures(2000, 0)
    held_out, held_names = pictures(256, 1)
    labels = mx.array([SHAPES.index(name) for name in held_names])
    figures: dict[str, dict[str, float]] = {"pictures": {"left over": left_over(images)}}
    sheets = [[Image.fromarray(image) for image in images[:16]]]
    config = TrainingConfig(steps=args.steps, batch_size=32, lr=1e-3, ema=0.995, clip=1.0)
    for name, flow in new_flows(args.channels, args.patch).items():
        levels = (LOWEST, HIGHEST) if isinstance(flow, ITarFlow) else None
        data = LabelledImages(images, names, levels=levels)
        started = time.perf_counter()
        assign(flow, Trainer(flow, data, config, args.out / name).run())
        found = {"minutes": (time.perf_counter() - started) / 60}
        for level in (LOWEST, HIGHEST) if isinstance(flow, ITarFlow) else (TARFLOW_NOISE,):
            at = flow.at(level) if isinstance(flow, ITarFlow) else flow
            found[f"nll at {level:g}"] = exact_nll(at, scale_pixels(held_out), labels, draws=1, batch_size=64).mean
        for how, made in samples(flow, args.count).items():
            found[f"left over, {how}"] = left_over(made)
            sheets.append([Image.fromarray(image) for image in made[:16]])
        figures[name] = found
        print(name, json.dumps(found, indent=2), flush=True)
    large = [image.resize((3 * SIDE, 3 * SIDE), Image.Resampling.NEAREST) for row in sheets for image in row]
    save_image(grid(large, columns=16), args.out / "sheets.png")
    (args.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
