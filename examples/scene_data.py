"""Scenes made by program: pictures of one to three objects on a background, with captions that are true of them.

    python examples/scene_data.py data/scenes --sheet sheet.png
    python examples/scene_data.py data/scenes --pictures data/pictures

Writes `data/scenes/sprites.npz`, cut-out emoji (fetched with npm, see `scene_pictures.py`). Scenes are drawn from it as
they are needed: sample number n of a stream is always the same. `scene_words.py` says what they hold. With --pictures
it also writes an image folder, for commands that read one: `metadata.jsonl` has `file_name`, `text` and `split`, which
is `train`, or `held_out` for scenes that training never shows.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scene_pictures import SIZE, Renderer
from scene_words import HELD_OUT_FILE, KINDS, HeldOut, Scene, caption, choose_held_out, draw_scene, objects

FRESH = 2 * 10**9
"""Samples of the training stream from this number on were neither trained on nor looked at."""


@dataclass(frozen=True)
class Sample:
    """One scene of a stream, with its picture, uint8 `[128, 128, 3]`, or None, and its caption."""

    scene: Scene
    caption: str
    picture: np.ndarray | None


class Stream:
    """Sample number n of a stream is always the same: scene, picture and first caption follow from (seed, kind, n)."""

    def __init__(self, renderer: Renderer | None, seed: int = 0, kind: str = "train", held_out: HeldOut | None = None):
        self.renderer, self.key, self.kind = renderer, (seed, KINDS.index(kind)), kind
        self.held_out = held_out or HeldOut.read()

    def __getitem__(self, number: int) -> Sample:
        rng = np.random.default_rng([*self.key, number])
        scene = draw_scene(rng, self.held_out, self.kind)
        words = caption(scene, rng)
        return Sample(scene, words, None if self.renderer is None else self.renderer.render(scene, rng))

    def other_caption(self, number: int, rng: np.random.Generator) -> str:
        """Another true caption of sample number `number`."""
        return caption(draw_scene(np.random.default_rng([*self.key, number]), self.held_out, self.kind), rng)

    def __iter__(self) -> Iterator[Sample]:
        return (self[number] for number in itertools.count())


def sheet(samples: list[Sample], columns: int = 6) -> Image.Image:
    """A contact sheet with captions."""
    cell = SIZE + 6, SIZE + 34
    picture = Image.new("RGB", (columns * cell[0], -(-len(samples) // columns) * cell[1]), "white")
    draw = ImageDraw.Draw(picture)
    for i, sample in enumerate(samples):
        x, y = i % columns * cell[0] + 3, i // columns * cell[1] + 3
        picture.paste(Image.fromarray(sample.picture), (x, y))
        lines, line = [], ""
        for word in sample.caption.split():
            if len(line) + len(word) > 20:
                lines, line = [*lines, line], ""
            line = f"{line} {word}".strip()
        draw.text((x, y + SIZE), "\n".join([*lines, line]), fill="black", spacing=0, font_size=9)
    return picture


def write_pictures(renderer: Renderer, folder: Path, count: int) -> None:
    """The first `count` scenes of the training stream, and a fifth as many held out, of all kinds alike."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {kind: count if kind == "train" else -(-count // 20) for kind in KINDS}
    lines = []
    for kind, most in kinds.items():
        stream = Stream(renderer, 0, kind)
        for number in range(most):
            sample, name = stream[number], f"{kind}-{number:05d}.png"
            Image.fromarray(sample.picture).save(folder / name)
            lines.append(
                {"file_name": name, "text": sample.caption, "split": "train" if kind == "train" else "held_out"}
            )
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"{len(lines)} pictures with captions in {folder}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder for the sprites")
    parser.add_argument("--sheet", type=Path, help="write a sheet of samples, half of them held out")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="write scenes as an image folder with captions")
    parser.add_argument("--count", type=int, default=1000, help="training scenes in that folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--choose", action="store_true", help="write scene_held_out.json anew")
    args = parser.parse_args(arguments)
    if args.choose:
        HELD_OUT_FILE.write_text(json.dumps(choose_held_out(), separators=(",", ":")).replace('],"', '],\n"') + "\n")
    renderer = Renderer(args.data)
    held_out = HeldOut.read()
    counts = {name: len(getattr(held_out, name)) for name in ("objects", "pairs", "backgrounds", "roles")}
    print(f"{len(objects())} objects, {len(renderer.sprites)} sprites; held out: {counts}")
    if args.sheet:
        samples = [
            Stream(renderer, args.seed, kind)[n]
            for kind, most in zip(KINDS, (24, 6, 6, 6, 6), strict=True)
            for n in range(most)
        ]
        sheet(samples).save(args.sheet)
    if args.pictures:
        write_pictures(renderer, args.pictures, args.count)


if __name__ == "__main__":
    main()
