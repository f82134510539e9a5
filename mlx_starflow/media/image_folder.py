"""All images of a source in memory, at one size, with their captions."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.media.pixels import UnreadableImage, crop_image, decode_image, no_remarks
from mlx_starflow.media.sources import Sample, Skip, open_source, repeats_of, skip_report, split_of


@dataclass
class ImageFolder:
    """Images `[N, S, S, 3]` (uint8, S = `size`), their captions, and the line of metadata each came with.

    `skipped` lists what could not be used; `checksums` are those of the images' files.
    """

    images: np.ndarray
    captions: list[list[str]]
    rows: list[dict[str, Any]] = field(repr=False)
    skipped: list[Skip] = field(default_factory=list, repr=False)
    checksums: list[str] = field(default_factory=list, repr=False)

    def __len__(self) -> int:
        return len(self.captions)

    @classmethod
    def read(
        cls, data: str | Path, *, size: int, splits: tuple[str, ...] | None = None, caption: str | None = None
    ) -> ImageFolder:
        """Read all images of a source, see `open_source`: the middle of each, resized to `size` x `size`.

        `splits` keeps only those whose `split`, "train" if there is none, is among them. Images that cannot be read
        or have no caption are left out, with a warning. In the split "autoencoder" the caption may be missing, and is
        "" then. `caption` is that of images that have none.

        Raises:
            StarflowError: there is no such data, its metadata is broken, or no image can be used.
        """
        images: list[np.ndarray] = []
        captions: list[list[str]] = []
        rows: list[dict[str, Any]] = []
        skipped: list[Skip] = []
        checksums: list[str] = []
        for sample in open_source(data, caption=caption):
            if isinstance(sample, Skip):
                skipped.append(sample)
                continue
            if splits is not None and sample.split not in splits:
                continue
            try:
                if sample.split != "autoencoder" and (problem := sample.problem()):
                    raise UnreadableImage(problem)
                content = read_bytes(sample)
                with no_remarks():
                    image = crop_image(decode_image(content), size, size)
            except UnreadableImage as error:
                skipped.append(Skip(sample.key, str(error)))
                continue
            images.append(np.asarray(image))
            captions.append(list(sample.captions) or [""])
            rows.append(dict(sample.row))
            checksums.append(hashlib.sha256(content).hexdigest())
        if not images:
            of = f" of the splits {', '.join(splits)}" if splits else ""
            raise StarflowError(f"{data} has no usable picture{of}" + (f": {skip_report(skipped)}" if skipped else ""))
        if skipped:
            warnings.warn(f"{data}: {skip_report(skipped)}", stacklevel=2)
        return cls(np.stack(images), captions, rows, skipped, checksums)

    @property
    def repeats(self) -> list[int]:
        """How often a pass of a training takes each image."""
        return [repeats_of(row) for row in self.rows]

    def only(self, *splits: str) -> ImageFolder:
        """The part whose `split` is one of these."""
        return self._part([i for i, row in enumerate(self.rows) if split_of(row) in splits])

    def spread(self, most: int) -> ImageFolder:
        """At most so many of them, spread evenly."""
        return self._part(np.unique(np.linspace(0, len(self) - 1, min(most, len(self))).round().astype(int)))

    def _part(self, chosen: Sequence[int] | np.ndarray) -> ImageFolder:
        return ImageFolder(
            self.images[chosen],
            [self.captions[i] for i in chosen],
            [self.rows[i] for i in chosen],
            checksums=[self.checksums[i] for i in chosen] if self.checksums else [],
        )


def read_bytes(sample: Sample) -> bytes:
    """The file of a sample's image. Raises UnreadableImage."""
    try:
        return sample.read()
    except (OSError, ValueError) as error:  # a path that is none is a ValueError
        raise UnreadableImage(one_line(error)) from None
