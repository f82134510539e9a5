"""Pictures with class labels, for training a TarFlow on pixels."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_starflow.media.images import to_images
from mlx_starflow.media.pixels import scale_pixels
from mlx_starflow.models.tarflow import TarFlow
from mlx_starflow.sampling import denoise, sample
from mlx_starflow.training.data.image_folder import Order, PictureFolder
from mlx_starflow.training.loop.config import TrainingConfig


class LabelledPictures:
    """Batches of pictures for `Trainer` and a TarFlow, with the share `caption_dropout` of labels dropped.

    Args:
        pictures: `[N, S, S, 3]`, uint8.
        names: of each picture's class; pictures of the same name are of one class.
        classes: all names, in the order of their labels; by default those that occur, sorted. With a single one there
            are no labels.
        flip: half of the pictures, at random, are mirrored.

    Attributes:
        classes: names of the classes.
        labels: of the pictures, `[N]`.
    """

    def __init__(
        self, pictures: np.ndarray, names: Sequence[str], *, classes: Sequence[str] | None = None, flip: bool = False
    ):
        self.pictures, self.flip = pictures, flip
        self.classes = list(classes) if classes is not None else sorted(set(names))
        number = {name: label for label, name in enumerate(self.classes)}
        self.labels = np.array([number[name] for name in names], np.int32)
        self.order = Order(len(pictures))

    @classmethod
    def read(cls, data: str, *, size: int, flip: bool = False) -> LabelledPictures:
        """Pictures of a source, see `open_source`, at `size` x `size`; what stands as their caption is their class.

        Raises:
            StarflowError: the data cannot be used.
        """
        folder = PictureFolder.read(data, size=size, splits=("train",))
        return cls(folder.pictures, [captions[0] for captions in folder.captions], flip=flip)

    def split(self, every: int) -> tuple[LabelledPictures, LabelledPictures]:
        """(The others, each `every`-th picture): to train on, and to validate with."""
        held = np.arange(len(self.pictures)) % every == every - 1

        def part(chosen: np.ndarray, flip: bool) -> LabelledPictures:
            names = [self.classes[label] for label in self.labels[chosen]]
            return LabelledPictures(self.pictures[chosen], names, classes=self.classes, flip=flip)

        return part(~held, self.flip), part(held, False)

    def batch(self, rng: np.random.Generator, config: TrainingConfig, progress: float) -> dict[str, np.ndarray]:
        """`latents`, which are pixels in -1..1, `noise`, and `text`, their labels, if there are classes."""
        return self.arrays(self.order.take(config.batch_size, rng), rng, config, progress)

    def arrays(
        self, chosen: np.ndarray, rng: np.random.Generator, config: TrainingConfig, progress: float
    ) -> dict[str, np.ndarray]:
        """What `batch` gives, of the pictures with the numbers `chosen`."""
        pictures = self.pictures[chosen]
        if self.flip:
            pictures = np.where(rng.random(len(chosen))[:, None, None, None] < 0.5, pictures[:, :, ::-1], pictures)
        arrays = {
            "latents": scale_pixels(pictures),
            "noise": rng.standard_normal(pictures.shape, dtype=np.float32),
        }
        if len(self.classes) > 1:
            dropped = rng.random(len(chosen)) < config.caption_dropout
            arrays["text"] = np.where(dropped, -1, self.labels[chosen]).astype(np.int32)
        return arrays


def draw_classes(flow: TarFlow, count: int = 8) -> list[Image.Image]:
    """A picture of each of the first `count` classes, or `count` pictures if there are none; always the same noise."""
    classes = flow.config.num_classes
    labels = mx.arange(min(count, classes)) if classes else None
    batch = count if labels is None else labels.size
    z = np.random.default_rng(0).standard_normal((batch, *flow.var.shape), dtype=np.float32)
    x = sample(flow, mx.array(z), labels)
    if flow.noise_type == "gaussian":
        x = denoise(flow, x, labels)
    return to_images(np.array(x))
