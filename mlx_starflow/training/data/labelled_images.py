"""Images with class labels, for training a TarFlow on pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.image_folder import ImageFolder
from mlx_starflow.media.pixels import scale_pixels
from mlx_starflow.training.config import TrainingConfig
from mlx_starflow.training.data.batches import IndexedData, Order


class LabelledImages(IndexedData):
    """Batches of images for `Trainer` and a TarFlow or an iTARFlow, with the share `caption_dropout` of labels dropped.

    Args:
        images: `[N, S, S, 3]`, uint8.
        names: of each image's class; images of the same name are of one class.
        classes: all names, in the order of their labels; by default those that occur, sorted. With a single one there
            are no labels.
        flip: half of the images, at random, are mirrored.
        levels: lowest and highest noise level, for an iTARFlow.

    Attributes:
        classes: names of the classes.
        labels: of the images, `[N]`.
    """

    def __init__(
        self,
        images: np.ndarray,
        names: Sequence[str],
        *,
        classes: Sequence[str] | None = None,
        flip: bool = False,
        levels: tuple[float, float] | None = None,
    ):
        self.images, self.flip, self.levels = images, flip, levels
        self.classes = list(classes) if classes is not None else sorted(set(names))
        number = {name: label for label, name in enumerate(self.classes)}
        self.labels = np.array([number[name] for name in names], np.int32)
        self.order = Order(len(images))

    @classmethod
    def read(cls, data: str | Path, *, size: int, flip: bool = False) -> LabelledImages:
        """Images of a source, see `open_source`, at `size` x `size`; what stands as their caption is their class.

        Raises:
            StarflowError: the data cannot be used.
        """
        return cls.of(ImageFolder.read(data, size=size, splits=("train",)), flip=flip)

    @classmethod
    def of(
        cls, folder: ImageFolder, *, flip: bool = False, levels: tuple[float, float] | None = None
    ) -> LabelledImages:
        """Images that have been read; the first caption of each is the name of its class."""
        return cls(folder.images, [captions[0] for captions in folder.captions], flip=flip, levels=levels)

    def split(self, every: int) -> tuple[LabelledImages, LabelledImages]:
        """(The others, each `every`-th image but at least 2): to train on, and to validate with.

        Raises StarflowError if nothing would be left to train on.
        """
        count = len(self.images)
        held = np.arange(count) % every == every - 1
        if held.sum() < 2:
            if count < 3:
                raise StarflowError(f"{count} pictures are too few to hold some out: give more, or --validation 0")
            held[:] = False
            held[[count // 2, count - 1]] = True

        def part(chosen: np.ndarray, flip: bool) -> LabelledImages:
            names = [self.classes[label] for label in self.labels[chosen]]
            return LabelledImages(self.images[chosen], names, classes=self.classes, flip=flip, levels=self.levels)

        return part(~held, self.flip), part(held, False)

    def arrays(
        self, chosen: np.ndarray, rng: np.random.Generator, config: TrainingConfig, progress: float
    ) -> dict[str, np.ndarray]:
        """`latents`, which are pixels in -1..1, `noise`, `text`, their labels, if there are classes, and, if there are
        levels, `noise_level` and `weight`."""
        images = self.images[chosen]
        if self.flip:
            images = np.where(rng.random(len(chosen))[:, None, None, None] < 0.5, images[:, :, ::-1], images)
        arrays = {
            "latents": scale_pixels(images),
            "noise": rng.standard_normal(images.shape, dtype=np.float32),
        }
        if len(self.classes) > 1:
            dropped = rng.random(len(chosen)) < config.caption_dropout
            arrays["text"] = np.where(dropped, -1, self.labels[chosen]).astype(np.int32)
        if self.levels is not None:
            levels = draw_levels(rng, len(chosen), *self.levels, config.level_sampling)
            arrays["noise_level"] = levels
            arrays["weight"] = level_weights(levels, *self.levels, config.level_weight)
        return arrays


def draw_levels(rng: np.random.Generator, count: int, lowest: float, highest: float, sampling: str) -> np.ndarray:
    """Noise levels t of `count` samples, float32: uniform between two, or with a uniform "square"."""
    uniform = rng.random(count)
    if sampling == "uniform":
        levels = lowest + (highest - lowest) * uniform
    else:
        levels = np.sqrt(lowest**2 + (highest**2 - lowest**2) * uniform)
    return levels.astype(np.float32)


def level_weights(levels: np.ndarray, lowest: float, highest: float, weight: str) -> np.ndarray:
    """Weights of samples at noise levels t in the loss: "1", "t", "t/(t0+t1)" or "t^2"."""
    factors = {"1": np.ones_like(levels), "t": levels, "t/(t0+t1)": levels / (lowest + highest), "t^2": levels**2}
    return factors[weight].astype(np.float32)
