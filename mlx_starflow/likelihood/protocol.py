"""What scoring and editing need of a model: its flow, and the way from images and prompts to its data, and back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_starflow.errors.arguments import call_type
from mlx_starflow.media.given import ImageOrVideo, Images
from mlx_starflow.models.flow import Flow
from mlx_starflow.sampling.methods import Method

Prompt = str | int
"""A text; or, for a model of class labels, the number of a class."""

Prompts = Prompt | Sequence[Prompt]
"""One for all images, or one for each; or several to choose from."""

call_type(Prompt, "a text", "texts")
call_type(Prompts, "a text or a list of texts", "lists of texts")

Part = Literal["text_encoder", "flow", "vae"]
"""A network of a model."""


def one_or_several(prompts: Prompts) -> list[str]:
    """Prompts, or labels, as a list: a text alone is one prompt, never its letters; numbers of classes become texts."""
    return [str(prompt) for prompt in ([prompts] if isinstance(prompts, str | int) else prompts)]


class ImageModel(Protocol):
    """A flow over images, or videos, and what connects it to them; the pipelines are such models.

    All kinds of models look alike here: latents of an autoencoder with text embeddings, of images or of videos, and a
    TarFlow's pixels with numbers of classes. `data` are what the flow models, `[B, ...]`, without training noise.

    Attributes:
        name: as the user gave it.
        directory: of the model.
        temperature: of the noise that the model's samples are made of, unless told otherwise.
        dimension: what the data's dimensions are, for messages: "latent dimension".
    """

    name: str
    directory: Path
    temperature: float
    dimension: str

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels of the images that the model was trained on."""

    @property
    @abstractmethod
    def flow(self) -> Flow:
        """The flow as it is stored, read when it is first used."""

    @abstractmethod
    def dense_flow(self) -> Flow:
        """The flow for repeated evaluation: on a CPU, if memory allows, a copy whose quantized layers are dense."""

    @abstractmethod
    def inversion(self, method: Method | None = None) -> Method:
        """How the flow is inverted: None or "auto" is the model's sampling plan, or sequentially if there is none."""

    @abstractmethod
    def exact_flow(self) -> Flow:
        """The flow for exact inversion, there and back: in float32, unless another precision was asked for."""

    @abstractmethod
    def fit(self, image: ImageOrVideo, size: tuple[int, int] | None = None) -> Image.Image | list[Image.Image]:
        """An image, or each frame of a video, cut about its middle to the shape of `size` and resized to it."""

    @abstractmethod
    def to_data(self, images: Images, size: tuple[int, int] | None = None) -> np.ndarray:
        """Images, or videos of one shape -> data, float32 `[B, ...]`: fitted to `size`, then encoded."""

    @abstractmethod
    def to_data_each(self, images: Images, size: tuple[int, int] | None = None) -> list[np.ndarray]:
        """The data of each image or video, `[...]`; videos may differ in shape."""

    @abstractmethod
    def to_images(self, data: np.ndarray | mx.array) -> list[Image.Image] | list[list[Image.Image]]:
        """Data -> images, or the frames of each video."""

    @abstractmethod
    def encode_images(self, images: np.ndarray) -> np.ndarray:
        """Images `[B, H, W, 3]` in -1..1 -> data, float32 `[B, ...]`."""

    @abstractmethod
    def decode_images(self, data: np.ndarray) -> np.ndarray:
        """The inverse of `encode_images`, up to what the autoencoder loses; about -1..1."""

    @abstractmethod
    def conditions(self, prompts: Prompts, shape: Sequence[int] | None = None) -> mx.array | None:
        """The condition of each prompt, "" meaning none, as the flow takes it; None for a flow that reads none.

        `shape` `[B, ...]` is that of the data, or noise, that it is about; that of the model's own images by default.
        """

    @abstractmethod
    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """How the tokens of data of `shape` `[...]`, without the batch, lie: (rows, columns), of a video
        (latent frames, rows, columns)."""

    @abstractmethod
    def origin(self) -> dict[str, Any]:
        """What the metadata of all that the model makes begin with: version, name, and adapters if it has any."""

    @abstractmethod
    def release(self, part: Part) -> None:
        """Called when a network is not needed for now: a model that is short of memory lets go of it."""
