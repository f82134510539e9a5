"""Small images, always the same, and folders of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


def smooth_images(count: int = 3, size: tuple[int, int] = (8, 8)) -> list[Image.Image]:
    """Random smooth ones."""
    made = []
    for seed in range(count):
        coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
        made.append(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
    return made


def gradients(count: int) -> list[Image.Image]:
    """Colour gradients of 8x8 pixels."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 1, 8)
    made = []
    for _ in range(count):
        down, right, base = rng.uniform(-80, 80, (3, 3)) + np.array([[0], [0], [128]])
        pixels = base + ramp[:, None, None] * down + ramp[None, :, None] * right
        made.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    return made


def colours(names: Sequence[str], size: tuple[int, int] = (10, 12)) -> list[Image.Image]:
    """Plain ones, one of each colour."""
    return [Image.new("RGB", size, name) for name in names]


def shapes() -> dict[str, Image.Image]:
    """A square and a disc of three colours each, by their descriptions."""
    made = {}
    for shape in ("square", "disc"):
        for colour in ("red", "green", "blue"):
            image = Image.new("RGB", (20, 20), "white")
            draw = ImageDraw.Draw(image)
            (draw.rectangle if shape == "square" else draw.ellipse)((4, 4, 16, 16), fill=colour)
            made[f"{colour} {shape}"] = image
    return made


def write_images(
    folder: Path,
    what: int | Sequence[Image.Image] = 3,
    rows: Sequence[Mapping[str, object]] | None = None,
) -> list[Path]:
    """Write images as `0.png`, `1.png`, ... and, if there are rows, a metadata.jsonl.

    Args:
        what: the images, or how many of `smooth_images`.
        rows: a line of metadata.jsonl for each image; `file_name` is added.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = smooth_images(what) if isinstance(what, int) else what
    paths = [folder / f"{number}.png" for number in range(len(written))]
    for path, image in zip(paths, written, strict=True):
        image.save(path)
    if rows is not None:
        lines = [json.dumps({"file_name": path.name, **row}) for path, row in zip(paths, rows, strict=True)]
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return paths


def write_gradients(folder: Path, count: int = 24) -> Path:
    """A folder of gradients that share four captions; the last one belongs to another split."""
    rows: list[dict[str, str]] = [{"text": f"picture {index % 4}"} for index in range(count)]
    rows[-1] = {"text": "another", "split": "held_out"}
    write_images(folder, gradients(count), rows)
    return folder
