"""Pictures with captions: an image folder with a `metadata.jsonl` (`file_name`, `text`), in memory."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from mlx_starflow.errors import StarflowError


@dataclass
class PictureFolder:
    """Pictures `[N, S, S, 3]` (uint8, S = `size`), their captions, and the line of metadata each came with."""

    pictures: np.ndarray
    captions: list[list[str]]
    rows: list[dict] = field(repr=False)

    def __len__(self) -> int:
        return len(self.captions)

    @classmethod
    def read(cls, folder: str | Path, *, size: int, splits: tuple[str, ...] | None = None) -> PictureFolder:
        """Read `folder/metadata.jsonl` and the pictures it names, resized to `size`.

        `splits` keeps only the lines whose `split`, "train" if there is none, is among them. A line's captions are its
        `text` and, if given, its list `captions`. Raises StarflowError for a missing folder, a broken line or an
        unreadable picture.
        """
        folder = Path(folder)
        index = folder / "metadata.jsonl"
        if not index.is_file():
            raise StarflowError(f"{index} does not exist: training data is a folder of pictures with a metadata.jsonl")
        rows, captions = [], []
        for number, line in enumerate(index.read_bytes().splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                texts = [row.get("text", ""), *row.get("captions", [])]
                if not all(isinstance(text, str) for text in [row["file_name"], *texts]):
                    raise TypeError
            except (ValueError, KeyError, TypeError, AttributeError):
                raise StarflowError(f'{index}, line {number}: expected an object with "file_name" and "text"') from None
            if splits is None or row.get("split", "train") in splits:
                rows.append(row)
                captions.append(texts)
        if not rows:
            raise StarflowError(
                f"{index} names no pictures" + (f" in the splits {', '.join(splits)}" if splits else "")
            )
        pictures = np.stack([read_picture(folder / row["file_name"], size) for row in rows])
        return cls(pictures, captions, rows)

    def only(self, split: str) -> PictureFolder:
        """The part whose `split` is this one."""
        chosen = [i for i, row in enumerate(self.rows) if row.get("split", "train") == split]
        return PictureFolder(self.pictures[chosen], [self.captions[i] for i in chosen], [self.rows[i] for i in chosen])


class Order:
    """Endless passes over `count` samples, each pass in a new random order.

    Attributes:
        left: indices of this pass that are still to come; what a checkpoint keeps.
    """

    def __init__(self, count: int):
        self.count = count
        self.left = np.zeros(0, np.int64)

    def take(self, number: int, rng: np.random.Generator) -> np.ndarray:
        """The next `number` indices."""
        while len(self.left) < number:
            self.left = np.concatenate([self.left, rng.permutation(self.count)])
        taken, self.left = np.split(self.left, [number])
        return taken


def read_picture(path: Path, size: int) -> np.ndarray:
    """One picture as uint8 `[size, size, 3]`, transparency on white."""
    try:
        picture = Image.open(path).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise StarflowError(f"cannot read the picture {path}: {error}") from None
    flat = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return np.asarray(flat.resize((size, size), Image.Resampling.LANCZOS))


def augmented_crops(
    pictures: np.ndarray, size: int, rng: np.random.Generator, *, zoom: float, shift: int, flip: bool = True
) -> np.ndarray:
    """Random views of `[N, S, S, 3]` pictures at `[N, size, size, 3]`: flipped (half of them), shrunk by up to
    `zoom`, moved.

    The border that appears is white. `shift` is in pixels of the result.
    """
    views = np.full((len(pictures), size, size, 3), 255, np.uint8)
    for view, picture in zip(views, pictures, strict=True):
        side = round(size * (1 - zoom * rng.random()))
        small = np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS))
        if flip and rng.random() < 0.5:
            small = small[:, ::-1]
        spare = size - side
        top, left = (int(rng.integers(-shift, spare + shift + 1)) for _ in range(2))
        y0, x0 = max(top, 0), max(left, 0)
        y1, x1 = min(top + side, size), min(left + side, size)
        view[y0:y1, x0:x1] = small[y0 - top : y1 - top, x0 - left : x1 - left]
    return views
