"""Every figure that docs/editing.md states about inpainting and variations, and its pictures.

    python examples/reports/inpainting.py data/scenes docs

Ten scenes of the kind that the model was trained on and ten that training never shows, for each of four reasons, drawn
by program (`scene_data.py`); each with its right half free and with a square in its middle free, painted with the
caption as prompt and the defaults.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scene_pictures import Renderer
from scene_words import Scene

from mlx_starflow.editing import inpaint, read_mask, vary
from mlx_starflow.editing.masks import soft_mask
from mlx_starflow.likelihood import score
from mlx_starflow.media.images import grid, save_image
from mlx_starflow.pipelines import load

TRAINED = {
    "a red apple on a blue background": Scene("one", ("red apple",), "blue"),
    "a dog on grass": Scene("one", ("dog",), "grass"),
    "a car at sunset": Scene("one", ("car",), "sunset"),
    "a big tulip": Scene("one", ("tulip",), "", "big"),
    "a hamburger on a table": Scene("one", ("hamburger",), "table"),
    "an octopus under water": Scene("one", ("octopus",), "water"),
    "a rocket above a castle": Scene("above", ("rocket", "castle"), ""),
    "a cat to the left of a dog on the beach": Scene("beside", ("cat", "dog"), "beach"),
    "two foxes in the snow": Scene("two", ("fox",), "snow"),
    "three donuts on a table": Scene("three", ("donut",), "table"),
}
HELD_OUT = {
    "a slice of pizza at night": Scene("one", ("slice of pizza",), "night"),
    "a banana on a red background": Scene("one", ("banana",), "red"),
    "a fox in the rain": Scene("one", ("fox",), "rain"),
    "an elephant to the left of a tiger": Scene("beside", ("elephant", "tiger"), ""),
    "a robot and a unicorn on a green background": Scene("beside", ("robot", "unicorn"), "green"),
    "a crown above a cat": Scene("above", ("crown", "cat"), ""),
    "a bell on a white background": Scene("one", ("bell",), "white"),
    "a television on a table": Scene("one", ("television",), "table"),
    "a giraffe on grass": Scene("one", ("giraffe",), "grass"),
    "a shark under water": Scene("one", ("shark",), "water"),
}
"""Combinations that training never shows, and, the last four, objects that it never shows."""

VARIED = ("a big tulip", "a dog on grass", "a rocket above a castle", "two foxes in the snow")
SEEDS = 2
BAND = range(-4, 7)
"""Pixels from the mask's edge, outwards, between which steps are looked for."""


class Report:
    """The parts, each a method that prints its figures and draws its picture."""

    def __init__(self, folder: Path, pictures: Path, model: str):
        self.model, self.pictures, renderer = load(model), pictures, Renderer(folder)
        self.size = self.model.size
        self.images = {
            name: Image.fromarray(renderer.render(scene, np.random.default_rng(0)))
            for name, scene in {**TRAINED, **HELD_OUT}.items()
        }

    def inpainting(self) -> None:
        width, height = self.size
        masks = {"right half": f"{width // 2},0,{width // 2},{height}", "square": "40,40,48,48"}
        shown: list[Image.Image] = []
        figures: dict[tuple[str, str], list[np.ndarray]] = {}
        seconds = []
        for kind, names in (("trained", TRAINED), ("held out", HELD_OUT)):
            for name in names:
                image = self.images[name]
                shown.append(image)
                for what, place in masks.items():
                    began = time.perf_counter()
                    result = inpaint(self.model, image, place, name, images=SEEDS, seed=1)
                    seconds.append(time.perf_counter() - began)
                    mask = read_mask(place, self.size)
                    hole = image.copy()
                    hole.paste("lightgrey", mask=mask)
                    shown += [hole, *result.images[: SEEDS if what == "right half" else 1]]
                    before, *after = [each.nll for each in score(self.model, [image, *result.images], name)]
                    free = np.asarray(mask) > 0
                    row = np.array([
                        before,
                        np.mean(after),
                        np.mean([rms(image, each, free) for each in result.images]),
                        step(image, free),
                        np.mean([step(each, free) for each in result.images]),
                    ])  # fmt: skip
                    figures.setdefault((what, kind), []).append(row)
                    told = "NLL {:.3f}, painted {:.3f}; RMS {:5.1f}; step {:5.1f}, painted {:5.1f}".format(*row)
                    print(f"{kind:9}{name:46}{what:11} {told}", flush=True)
        for (what, kind), rows in figures.items():
            mean = np.mean(rows, axis=0)
            print("{:11}{:9} NLL {:.3f}, painted {:.3f}; RMS to the original {:.1f}; largest step {:.1f}, painted "
                  "{:.1f}".format(what, kind, *mean))  # fmt: skip
        print(f"{SEEDS} seeds of a picture take {np.median(seconds):.1f} s")
        save_image(grid(shown, columns=12), self.pictures / "inpaint.png")

    def variations(self) -> None:
        """How far variations of a picture are from one another and from it, in levels of 255."""
        shown = []
        for name in VARIED:
            image = self.images[name]
            made = vary(self.model, image, name, images=6, seed=1).images
            between = [rms(a, b) for k, a in enumerate(made) for b in made[:k]]
            away = [rms(image, each) for each in made]
            print(f"{name:26}variations are {np.mean(between):.1f} of 255 levels apart (RMS), "
                  f"{np.mean(away):.1f} from the picture")  # fmt: skip
            shown += [image, *made]
        save_image(grid(shown, columns=7), self.pictures / "vary.png")


def rms(first: Image.Image, second: Image.Image, part: np.ndarray | None = None) -> float:
    """RMS difference of two images, or of a part, in levels."""
    difference = np.asarray(first, float) - np.asarray(second, float)
    return float(np.sqrt(np.square(difference if part is None else difference[part]).mean()))


def step(image: Image.Image, free: np.ndarray) -> float:
    """The largest mean difference, in levels, of pixels on either side of a line along the mask's edge."""
    pixels, largest = np.asarray(image, float), 0.0
    for away in BAND:
        inside = soft_mask(free, away) > 0 if away >= 0 else ~(soft_mask(~free, -away) > 0)
        differences = []
        for axis in (0, 1):
            crossed = np.diff(inside.astype(int), axis=axis) != 0
            differences.append(np.abs(np.diff(pixels, axis=axis))[crossed])
        largest = max(largest, float(np.concatenate(differences).mean()))
    return largest


def main(arguments: list[str] | None = None) -> None:
    parts = ("inpainting", "variations")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the sprites, as scene_data.py writes it; fetched if missing")
    parser.add_argument("pictures", type=Path, help="folder for the pictures")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, metavar="PART")
    args = parser.parse_args(arguments)
    report = Report(args.data, args.pictures, args.model)
    for part in args.only:
        getattr(report, part)()


if __name__ == "__main__":
    main()
