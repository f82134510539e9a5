"""Captioned pictures in memory, the order in which training takes samples, and random views."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.media.pixels import UnreadableImage, crop_image, decode_image, no_remarks
from mlx_starflow.media.sources import Sample, Skip, open_source, skip_report, split_of


@dataclass
class PictureFolder:
    """Pictures `[N, S, S, 3]` (uint8, S = `size`), their captions, and the line of metadata each came with.

    `skipped` lists what could not be used.
    """

    pictures: np.ndarray
    captions: list[list[str]]
    rows: list[dict[str, Any]] = field(repr=False)
    skipped: list[Skip] = field(default_factory=list, repr=False)

    def __len__(self) -> int:
        return len(self.captions)

    @classmethod
    def read(cls, data: str | Path, *, size: int, splits: tuple[str, ...] | None = None) -> PictureFolder:
        """Read all pictures of a source, see `open_source`: the middle of each, resized to `size` x `size`.

        `splits` keeps only those whose `split`, "train" if there is none, is among them. Pictures that cannot be read
        or have no caption are left out, with a warning. In the split "autoencoder" the caption may be missing, and is
        "" then.

        Raises:
            StarflowError: there is no such data, its metadata is broken, or no picture can be used.
        """
        pictures, captions, rows, skipped = [], [], [], []
        for sample in open_source(data):
            if isinstance(sample, Skip):
                skipped.append(sample)
                continue
            if splits is not None and sample.split not in splits:
                continue
            try:
                if sample.split != "autoencoder" and (problem := sample.problem()):
                    raise UnreadableImage(problem)
                with no_remarks():
                    picture = crop_image(decode_image(read_bytes(sample)), size, size)
            except UnreadableImage as error:
                skipped.append(Skip(sample.key, str(error)))
                continue
            pictures.append(np.asarray(picture))
            captions.append(list(sample.captions) or [""])
            rows.append(dict(sample.row))
        if not pictures:
            of = f" of the splits {', '.join(splits)}" if splits else ""
            raise StarflowError(f"{data} has no usable picture{of}" + (f": {skip_report(skipped)}" if skipped else ""))
        if skipped:
            warnings.warn(f"{data}: {skip_report(skipped)}", stacklevel=2)
        return cls(np.stack(pictures), captions, rows, skipped)

    def only(self, *splits: str) -> PictureFolder:
        """The part whose `split` is one of these."""
        chosen = [i for i, row in enumerate(self.rows) if split_of(row) in splits]
        return PictureFolder(self.pictures[chosen], [self.captions[i] for i in chosen], [self.rows[i] for i in chosen])

    def spread(self, most: int) -> PictureFolder:
        """At most so many of them, spread evenly."""
        chosen = np.unique(np.linspace(0, len(self) - 1, min(most, len(self))).round().astype(int))
        return PictureFolder(self.pictures[chosen], [self.captions[i] for i in chosen], [self.rows[i] for i in chosen])

    def images(self) -> list[Image.Image]:
        """The pictures, one by one."""
        return [Image.fromarray(picture) for picture in self.pictures]


def read_bytes(sample: Sample) -> bytes:
    """The file of a sample's picture. Raises UnreadableImage."""
    try:
        return sample.read()
    except (OSError, ValueError) as error:  # a path that is none is a ValueError
        raise UnreadableImage(one_line(error)) from None


class Order:
    """Endless passes over `count` samples, each pass in a new random order.

    With `buckets`, the bucket of each sample, what is taken at once is of one bucket: of each as often as it has
    samples, chosen at random. Every bucket has passes of its own.

    Attributes:
        left: indices that this pass has still to use, bucket by bucket; what a checkpoint keeps.
    """

    def __init__(self, count: int, buckets: Sequence[int] | np.ndarray | None = None):
        self.count = count
        self._buckets = np.zeros(count, np.int64) if buckets is None else np.unique(buckets, return_inverse=True)[1]
        self._members = [np.flatnonzero(self._buckets == bucket) for bucket in range(self._buckets.max(initial=0) + 1)]
        self.left = np.zeros(0, np.int64)

    @property
    def left(self) -> np.ndarray:
        return np.concatenate(self._left)

    @left.setter
    def left(self, indices: np.ndarray) -> None:
        if len(indices) and (indices.min() < 0 or indices.max() >= self.count):
            raise StarflowError(
                f"the checkpoint is of a training on other data: it goes on with picture {indices.max() + 1} of "
                f"{self.count}; give the same data, or start again"
            )
        self._left = [indices[self._buckets[indices] == bucket] for bucket in range(len(self._members))]

    def take(self, number: int, rng: np.random.Generator) -> np.ndarray:
        """The next `number` indices."""
        bucket = int(self._buckets[rng.integers(self.count)]) if len(self._members) > 1 else 0
        members, left = self._members[bucket], self._left[bucket]
        while len(left) < number:
            left = np.concatenate([left, members[rng.permutation(len(members))]])
        taken, self._left[bucket] = np.split(left, [number])
        return taken

    def once(self, number: int) -> Iterator[np.ndarray]:
        """All indices, each once, `number` or fewer of one bucket at a time; the passes do not notice."""
        for members in self._members:
            for start in range(0, len(members), number):
                yield members[start : start + number]


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
