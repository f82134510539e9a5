"""TarFlow and iTARFlow on the same pictures for the same steps: likelihood, samples, and what steps of denoising do.

    python examples/reports/tarflow.py runs/compared --steps 1500

The pictures are drawn: discs, squares, triangles and crosses of any colour, place and size on plain grounds, 16x16.
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


def draw_shape(shape: str, rng: np.random.Generator) -> np.ndarray:
    """A picture `[16, 16, 3]`, drawn four times as large."""
    side = 4 * SIDE
    ground, colour = (tuple(int(v) for v in rng.integers(0, 256, 3)) for _ in range(2))
    while sum(abs(a - b) for a, b in zip(ground, colour, strict=True)) < 200:
        colour = tuple(int(v) for v in rng.integers(0, 256, 3))
    image = Image.new("RGB", (side, side), ground)
    pen, radius = ImageDraw.Draw(image), rng.uniform(0.22, 0.4) * side
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


def features(images: np.ndarray) -> np.ndarray:
    """What a picture of a shape on a plain ground has, `[B, 5]`: log of its colours' distinctness, of what is left when
    each pixel becomes the nearer of its two colours, of its steps from pixel to pixel, the shape's share, and how
    many pixels differ from the corner's side of a neighbour."""
    x = images.astype(np.float64).reshape(len(images), -1, 3)
    result = []
    for picture in x:
        means = np.stack([picture[0], picture[((picture - picture[0]) ** 2).sum(-1).argmax()]])
        for _ in range(10):
            nearer = ((picture[:, None] - means) ** 2).sum(-1).argmin(1)
            means = np.stack([picture[nearer == k].mean(0) if (nearer == k).any() else means[k] for k in (0, 1)])
        left = np.sqrt(((picture - means[nearer]) ** 2).mean())
        square, sides = picture.reshape(SIDE, SIDE, 3), nearer.reshape(SIDE, SIDE)
        steps = np.sqrt((np.diff(square, axis=0) ** 2).mean())
        edges = (np.diff(sides, axis=0) != 0).mean() + (np.diff(sides, axis=1) != 0).mean()
        result.append([np.sqrt(((means[0] - means[1]) ** 2).mean()), left, steps, 2 * abs(nearer.mean() - 0.5), edges])
    return np.array(result)


def distance(images: np.ndarray, real: np.ndarray) -> float:
    """Frechet distance of the features, each divided by its standard deviation in real pictures."""
    scale = features(real).std(0)
    means, roots = [], []
    for part in (images, real):
        values = features(part) / scale
        means.append(values.mean(0))
        roots.append(np.cov(values.T))
    values, vectors = np.linalg.eigh(roots[1])
    half = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(half @ roots[0] @ half).clip(0)).sum()
    return float(((means[0] - means[1]) ** 2).sum() + np.trace(roots[0]) + np.trace(roots[1]) - 2 * trace)


def samples(flow: PixelFlow, count: int) -> dict[str, np.ndarray]:
    """Pictures by how they were cleaned: as they come, in one step, and an iTARFlow's in more."""
    labels = mx.arange(count) % len(SHAPES)
    z = np.random.default_rng(7).standard_normal((count, *flow.var.shape), dtype=np.float32)
    x = sample(flow, mx.array(z), labels)
    found = {"sampled": x, "1 step": denoise(flow, x, labels, batch_size=64)}
    if isinstance(flow, ITarFlow):
        for steps in STEPS[1:]:
            levels = noise_levels(HIGHEST, LOWEST, steps)
            found[f"{steps} steps"] = iterate(flow, x, labels, levels, batch_size=64)
    return {name: np.stack([np.asarray(image) for image in to_images(np.array(each))]) for name, each in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--channels", type=int, default=96)
    parser.add_argument("--patch", type=int, default=4)
    parser.add_argument("--count", type=int, default=256, help="samples that figures are made of")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    images, names = pictures(2000, 0)
    held_out, held_names = pictures(256, 1)
    labels = mx.array([SHAPES.index(name) for name in held_names])
    # What two draws of real pictures differ by is the least that can be asked for.
    figures: dict[str, dict[str, float]] = {"pictures": {"distance": distance(pictures(args.count, 2)[0], images)}}
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
            found[f"distance, {how}"] = distance(made, images)
            sheets.append([Image.fromarray(image) for image in made[:16]])
        figures[name] = found
        print(name, json.dumps(found, indent=2), flush=True)
    large = [image.resize((3 * SIDE, 3 * SIDE), Image.Resampling.NEAREST) for row in sheets for image in row]
    save_image(grid(large, columns=16), args.out / "sheets.png")
    (args.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
