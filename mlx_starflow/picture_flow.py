"""A flow together with the way from pictures and prompts to what it reads, and back: what scoring and editing need.

Both kinds of picture models look alike here: latents of an autoencoder with text embeddings, and a TarFlow's pixels
with class numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_starflow.errors import StarflowError
from mlx_starflow.hub import find_model
from mlx_starflow.media import to_images
from mlx_starflow.memory import available
from mlx_starflow.models.autoencoder_kl import WHOLE_PIXELS
from mlx_starflow.models.tarflow import TarFlow
from mlx_starflow.pictures import crop_picture, scale_pixels
from mlx_starflow.pipeline import Pipeline, load
from mlx_starflow.quantization import dequantize_module, quantized_layers
from mlx_starflow.weights import load_flow, read_config

BATCH = 16
"""Most pictures that go through the autoencoder at once, and prompts through the text encoder."""


class PictureFlow(ABC):
    """A flow over pictures and what connects it to them.

    Attributes:
        name: as the user gave it.
        directory: of the model.
        size: (width, height) in pixels of the pictures that the model was trained on.
        temperature: of the noise that the model's samples are made of, unless told otherwise.
        dimension: what the data's dimensions are.
    """

    name: str
    directory: Path
    size: tuple[int, int]
    temperature: float = 1.0
    dimension: ClassVar[str]

    @property
    @abstractmethod
    def flow(self) -> Any:
        """The flow."""

    @abstractmethod
    def encode_pictures(self, pictures: np.ndarray) -> np.ndarray:
        """Pictures `[B, H, W, 3]` in -1..1 -> data without noise, float32 `[B, ...]`."""

    @abstractmethod
    def decode_pictures(self, data: np.ndarray) -> np.ndarray:
        """The inverse: pictures `[B, H, W, 3]`, about -1..1."""

    @abstractmethod
    def conditions(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> mx.array | None:
        """The condition of each prompt, "" meaning none, as the flow takes it; None for a flow that reads none.

        `size` is that of the pictures in pixels, the model's own by default.
        """

    @abstractmethod
    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """How the tokens of data of `shape` `[...]`, without the batch, lie: (rows, columns)."""

    def pixels(self, shape: Sequence[int]) -> tuple[int, int]:
        """(width, height) in pixels of the pictures that data, or noise, of `shape` `[B, ...]` are of."""
        return self.size

    def release(self, part: str) -> None:  # noqa: B027
        """Called when the `flow`, the `vae` or the `text` encoder is not needed for now."""

    def fit(self, image: Image.Image, size: tuple[int, int] | None = None) -> Image.Image:
        """A picture cut to the shape of `size` about its middle and resized; `size` is the model's by default."""
        size = size or self.size
        image = image.convert("RGB")
        return image if image.size == size else crop_picture(image, *size)

    def data(self, images: Iterable[Image.Image], size: tuple[int, int] | None = None) -> np.ndarray:
        """Pictures of any size -> data without noise, float32 `[B, ...]`: fitted to `size`, then encoded."""
        waiting = iter(images)
        width, height = size or self.size
        count = _at_once(width * height)
        parts = []
        while batch := list(islice(waiting, count)):
            fitted = np.stack([np.asarray(self.fit(image, size)) for image in batch])
            parts.append(self.encode_pictures(scale_pixels(fitted)))
        if not parts:
            raise StarflowError("there are no pictures")
        return np.concatenate(parts)

    def images(self, data: np.ndarray | mx.array) -> list[Image.Image]:
        """Data -> pictures."""
        data = np.array(data, np.float32)
        width, height = self.pixels(data.shape)
        count = _at_once(width * height)
        parts = (data[start : start + count] for start in range(0, len(data), count))
        return [image for part in parts for image in to_images(self.decode_pictures(part))]


class LatentFlow(PictureFlow):
    """A text-to-picture pipeline's flow."""

    dimension = "latent dimension"

    def __init__(self, pipe: Pipeline):
        self.pipe, self.name, self.directory = pipe, pipe.name, pipe.directory
        side = pipe.config.img_size * pipe.vae_config.downscale
        self.size = (side, side)
        self.temperature = pipe.settings.temperature

    @property
    def flow(self) -> Any:
        return dense_on_cpu(self.pipe.flow)

    def encode_pictures(self, pictures: np.ndarray) -> np.ndarray:
        self.pipe.latent_shape(pictures.shape[2:0:-1])  # raises StarflowError if the size does not fit
        vae = self.pipe.vae
        return np.array(vae.scale(vae.encode(mx.array(pictures)).mean))

    def decode_pictures(self, data: np.ndarray) -> np.ndarray:
        vae = self.pipe.vae
        return np.array(vae.decode(vae.unscale(mx.array(data))).astype(mx.float32))

    def conditions(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> mx.array:
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        unique, parts = list(numbers), []
        for start in range(0, len(unique), BATCH):
            parts.append(self.pipe.encode_prompts(unique[start : start + BATCH], size or self.size))
            mx.eval(parts[-1])
        return mx.concatenate(parts)[mx.array([numbers[prompt] for prompt in prompts])]

    def pixels(self, shape: Sequence[int]) -> tuple[int, int]:
        scale = self.pipe.vae_config.downscale
        return shape[2] * scale, shape[1] * scale

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(side // self.pipe.config.patch_size for side in shape[:-1])

    def release(self, part: str) -> None:
        if self.pipe.low_memory:
            self.pipe.__dict__.pop({"text": "_text"}.get(part, part), None)
            mx.clear_cache()


class PixelFlow(PictureFlow):
    """A TarFlow. Its prompts are numbers of classes."""

    dimension = "pixel dimension"

    def __init__(self, name: str, directory: Path, dtype: str | mx.Dtype | None = None):
        self.name, self.directory, self.dtype = name, directory, dtype
        side = self.flow.config.img_size
        self.size = (side, side)

    @cached_property
    def flow(self) -> TarFlow:
        return dense_on_cpu(load_flow(self.directory, dtype=self.dtype))

    def encode_pictures(self, pictures: np.ndarray) -> np.ndarray:
        if self.flow.config.channel_size == 1:
            # Rec. 601 luma, as Pillow's own conversion to grey.
            return (pictures @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
        return pictures

    def decode_pictures(self, data: np.ndarray) -> np.ndarray:
        return np.broadcast_to(data, (*data.shape[:-1], 3))

    def conditions(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> mx.array | None:
        classes = self.flow.config.num_classes
        numbers = []
        for prompt in prompts:
            text = prompt.strip()
            if text and not (text.isdecimal() and int(text) < classes):
                known = f"a number from 0 to {classes - 1}" if classes else "nothing: the model knows no classes"
                raise StarflowError(f"{self.name} takes no prompt {prompt!r} but {known}")
            numbers.append(int(text) if text else -1)
        return mx.array(numbers) if classes else None

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(side // self.flow.config.patch_size for side in shape[:-1])


def open_picture_flow(
    name: str | Path = "demo", *, dtype: str | mx.Dtype | None = None, low_memory: bool | None = None
) -> PictureFlow:
    """A model to score and edit pictures with: "demo", a model directory, or a Hub repository of one.

    Arguments and errors are those of `pipeline.load`; a TarFlow's directory is taken too.
    """
    directory = find_model(name)
    if read_config(directory).get("model_type") == "tarflow":
        return PixelFlow(str(name), directory, dtype)
    return picture_flow(load(name, dtype=dtype, low_memory=low_memory))


def picture_flow(model: PictureFlow | Pipeline) -> PictureFlow:
    """What `open_picture_flow` gives, of a pipeline that is there already. Raises StarflowError."""
    model = getattr(model, "pictures", model)  # of a model that makes videos too
    if isinstance(model, PictureFlow):
        return model
    if isinstance(model, Pipeline):
        return LatentFlow(model)
    raise StarflowError("scoring and editing need the mlx backend: load(name, backend='mlx')")


def _at_once(pixels: int) -> int:
    """How many pictures of so many pixels the autoencoder takes at once: as many as make up a large one."""
    return max(1, min(BATCH, WHOLE_PIXELS // pixels))


def dense_on_cpu(flow: Any) -> Any:
    """On a CPU, make a flow's quantized layers dense, in place, if there is memory for it.

    MLX's CPU backend multiplies a few rows by a quantized matrix more slowly than by a dense one: chains and paths,
    which invert the flow again and again, run two to four times as fast. The numbers differ by rounding.
    """
    layers = quantized_layers(flow) if mx.default_device().type == mx.cpu else {}
    if layers:
        needed = sum(layer.weight.nbytes * 32 // layer.bits for layer in layers.values())
        if needed < available() // 2:
            dequantize_module(flow)
            mx.eval(flow.parameters())
    return flow
