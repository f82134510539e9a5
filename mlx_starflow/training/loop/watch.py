"""Images to watch a training by: the curves of its log, and grids of samples."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from mlx_starflow.media.files import replacing
from mlx_starflow.media.images import grid, save_image
from mlx_starflow.training.loop.run_log import UNIT, read_log

CURVES = {"loss": (31, 119, 180), "nll": (255, 127, 14), "validation_nll": (214, 39, 40)}
"""What is drawn of each line of the log, and in which colour."""

SIZE, MARGIN = (720, 420), 56


CELL, LINE, LINES = 128, 14, 3
"""Pixels that a labelled image has at least from left to right, and of a line of its label; how many lines it has."""


@dataclass(frozen=True)
class SampleSheet:
    """Images in a grid, each with a line of what it is of beneath it, such as its caption and its seed.

    Attributes:
        images: row by row.
        labels: of each.
        columns: images in a row; None: nearly a square.
    """

    images: Sequence[Image.Image]
    labels: Sequence[str]
    columns: int | None = None

    def draw(self) -> Image.Image:
        """The whole sheet."""
        width = max(CELL, *(image.width for image in self.images))
        letters = width // 6
        texts = [textwrap.wrap(label, letters, max_lines=LINES, placeholder=" ...") for label in self.labels]
        height = max(image.height for image in self.images) + LINE * max(map(len, texts)) + 4
        cells = []
        for image, lines in zip(self.images, texts, strict=True):
            cell = Image.new("RGB", (width, height), "white")
            cell.paste(image, ((width - image.width) // 2, 0))
            for number, line in enumerate(lines):
                _write(ImageDraw.Draw(cell), (2, image.height + 2 + LINE * number), line)
            cells.append(cell)
        return grid(cells, self.columns)


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str) -> None:
    try:
        draw.text(place, text, fill="black")
    except UnicodeEncodeError:  # Pillow built without FreeType knows Latin letters alone
        draw.text(place, text.encode("latin-1", "replace").decode("latin-1"), fill="black")


def save_samples(images: Sequence[Image.Image] | SampleSheet, folder: Path, step: int) -> Path:
    """Write a grid of images to `folder/samples/step-<step>.png`."""
    path = folder / "samples" / f"step-{step:08d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(images.draw() if isinstance(images, SampleSheet) else grid(list(images)), path)
    return path


def draw_curves(folder: Path) -> Path | None:
    """Draw the run's log to `folder/loss.png`, each number over steps; None if there is nothing yet."""
    rows = read_log(folder)
    curves = {}
    for key in CURVES:
        points = [(row.get("step", 0), row[key]) for row in rows if isinstance(row.get(key), float | int)]
        points = [point for point in points if abs(point[1]) < math.inf]
        if points:
            curves[key] = points
    if not curves:
        return None
    path = folder / "loss.png"
    with replacing(path) as temporary:
        curve_image(curves, UNIT if any(row.get("unit") == UNIT for row in rows) else "loss").save(temporary)
    return path


def curve_image(curves: dict[str, list[tuple[float, float]]], unit: str = UNIT) -> Image.Image:
    """Curves through (step, value) points, by the names in `CURVES`; `unit` is what they are in."""
    width, height = SIZE
    image = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(image)
    steps = [step for points in curves.values() for step, _ in points]
    values = sorted(value for points in curves.values() for _, value in points)
    low, high = values[0], values[-1]
    if len(values) > 20:
        # A run's first values are far above all others.
        high = min(high, values[int(0.98 * (len(values) - 1))])
    spread = max(high - low, 1e-6)
    low, high = low - 0.05 * spread, high + 0.05 * spread
    last = max(max(steps), 1)

    def place(step: float, value: float) -> tuple[float, float]:
        x = MARGIN + step / last * (width - 1.5 * MARGIN)
        share = (min(value, high) - low) / (high - low)
        return x, height - MARGIN - share * (height - 1.6 * MARGIN)

    tick = 10 ** math.floor(math.log10(high - low))
    tick = next(t for t in (tick / 5, tick / 2, tick, 2 * tick) if (high - low) / t <= 8)
    for number in range(math.ceil(low / tick), math.floor(high / tick) + 1):
        value = number * tick
        (x0, y), (x1, _) = place(0, value), place(last, value)
        draw.line((x0, y, x1, y), fill=(225, 225, 225))
        draw.text((8, y - 6), f"{value:.4g}", fill="black")
    for quarter in range(5):
        x, y = place(last * quarter / 4, low)
        draw.text((x - 12, y + 6), f"{last * quarter / 4:.0f}", fill="black")
    draw.text((width / 2 - 20, height - 18), "steps", fill="black")
    draw.text((8, 6), unit, fill="black")
    for index, (name, points) in enumerate(curves.items()):
        places = [place(step, value) for step, value in sorted(points)]
        colour = CURVES[name]
        if len(places) > 1:
            draw.line(places, fill=colour, width=2)
        for x, y in places if len(places) < 30 else places[-1:]:
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
        draw.text((width - 130, 6 + 14 * index), name.replace("_", " "), fill=colour)
    return image
