"""A flow together with the way from pictures and prompts to what it reads, and back: what scoring and editing need.

All kinds of models look alike here: latents of an autoencoder with text embeddings, of pictures or of videos, and a
TarFlow's pixels with class numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.image_files import ImageFile
from mlx_starflow.media.images import to_images
from mlx_starflow.media.pixels import crop_image, scale_pixels
from mlx_starflow.media.videos import read_video
from mlx_starflow.model_dir.directory import ModelDirectory, load_flow
from mlx_starflow.model_dir.quantization import dequantize_module, quantized_layers
from mlx_starflow.models.autoencoder_kl import WHOLE_PIXELS
from mlx_starflow.models.tarflow import TarFlow, TarFlowConfig
from mlx_starflow.pipelines.pipeline import Pipeline, load
from mlx_starflow.pipelines.video_requests import VideoModel
from mlx_starflow.pipelines.video_sources import encode_frames
from mlx_starflow.planning.memory import available

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
    def conditions(self, prompts: Sequence[str], shape: Sequence[int] | None = None) -> mx.array | None:
        """The condition of each prompt, "" meaning none, as the flow takes it; None for a flow that reads none.

        `shape` `[B, ...]` is that of the data, or noise, that it is about; that of the model's own pictures by default.
        """

    @abstractmethod
    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """How the tokens of data of `shape` `[...]`, without the batch, lie: (rows, columns), of a video
        (latent frames, rows, columns)."""

    def pixels(self, shape: Sequence[int]) -> tuple[int, int]:
        """(width, height) in pixels of the pictures that data, or noise, of `shape` `[B, ...]` are of."""
        return self.size

    def release(self, part: str) -> None:  # noqa: B027
        """Called when the `flow`, the `vae` or the `text` encoder is not needed for now."""

    def fit(self, image: Image.Image, size: tuple[int, int] | None = None) -> Image.Image:
        """A picture cut to the shape of `size` about its middle and resized; `size` is the model's by default."""
        size = size or self.size
        image = image.convert("RGB")
        return image if image.size == size else crop_image(image, *size)

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

    def each_data(self, images: Iterable[Image.Image], size: tuple[int, int] | None = None) -> list[np.ndarray]:
        """`data` of each picture, `[...]`; videos may differ in shape."""
        return list(self.data(images, size))

    def images(self, data: np.ndarray | mx.array) -> list[Image.Image]:
        """Data -> pictures."""
        data = np.array(data, np.float32)
        width, height = self.pixels(data.shape)
        count = _at_once(width * height)
        parts = (data[start : start + count] for start in range(0, len(data), count))
        return [image for part in parts for image in to_images(self.decode_pictures(part))]


class LatentFlow(PictureFlow):
    """A text-to-picture pipeline's flow.

    Attributes:
        fps: frames a second of its videos; 0 for a model of pictures.
        frame_step: frames of a video that a latent frame stands for, but the first, which stands for one.
    """

    dimension = "latent dimension"
    fps, frame_step = 0, 1

    def __init__(self, pipe: Pipeline | VideoModel):
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

    def conditions(self, prompts: Sequence[str], shape: Sequence[int] | None = None) -> mx.array:
        size = self.size if shape is None else self.pixels(shape)
        fps = self.fps if shape is not None and len(shape) == 5 else 0
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        unique, parts = list(numbers), []
        for start in range(0, len(unique), BATCH):
            parts.append(self.pipe.encode_prompts(unique[start : start + BATCH], size, fps))
            mx.eval(parts[-1])
        return mx.concatenate(parts)[mx.array([numbers[prompt] for prompt in prompts])]

    def pixels(self, shape: Sequence[int]) -> tuple[int, int]:
        scale = self.pipe.vae_config.downscale
        return shape[-2] * scale, shape[-3] * scale

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        return *shape[:-3], *(side // self.pipe.config.patch_size for side in shape[-3:-1])

    def release(self, part: str) -> None:
        if self.pipe.low_memory:
            self.pipe.__dict__.pop({"text": "_text"}.get(part, part), None)
            mx.clear_cache()


class VideoFlow(LatentFlow):
    """A text-to-video pipeline's flow: of videos, whose frames are given one by one, and of pictures, which are stills.

    Data of videos are `[B, T, h, w, C]`, T latent frames.
    """

    pipe: VideoModel

    def __init__(self, pipe: VideoModel):
        super().__init__(pipe)
        self.fps, self.frame_step = pipe.settings.fps, pipe.vae_config.temporal_downscale

    def conditions(self, prompts: Sequence[str], shape: Sequence[int] | None = None) -> mx.array:
        if shape is not None and len(shape) == 5 and shape[1] > self.pipe.window:
            raise StarflowError(
                f"{shape[1]} latent frames are more than the {self.pipe.window} that {self.name} was trained on: "
                "give a shorter video"
            )
        return super().conditions(prompts, shape)

    def fit(self, image: Any, size: tuple[int, int] | None = None) -> Any:
        """As of every flow; of a video a list of its frames, without those at the end that make no whole latent frame.

        A video's `size` is by default its own, if the model makes it, or that of the nearest shape.

        Raises:
            StarflowError: it has no frames, or more than the model was trained on, or the size does not fit.
        """
        if isinstance(image, Image.Image):
            return super().fit(image, size)
        waiting = iter(image)
        first = next(waiting, None)
        if first is None:
            raise StarflowError("the video has no frames")
        size = self.pipe.size_for(first, size)
        step, most = self.frame_step, self.pipe.config.video[0]
        frames = [super(VideoFlow, self).fit(each, size) for each in islice(chain([first], waiting), most + step)]
        del frames[len(frames) - (len(frames) - 1) % step :]
        if len(frames) > most:
            raise StarflowError(
                f"{getattr(image, 'path', 'the video')} has more than the {most} frames that {self.name} was trained "
                f"on: give a part of it, such as its beginning with --frames {most}"
            )
        return frames

    def data(self, images: Iterable[Any], size: tuple[int, int] | None = None) -> np.ndarray:
        """As of every flow; videos taken together must have as many frames and one size."""
        images, videos = _one_kind(images)
        if not videos:
            return super().data(images, size)
        parts = self.each_data(images, size)
        if len({part.shape for part in parts}) > 1:
            raise StarflowError(
                "the videos differ in size or in the number of frames: give --size and --frames, or take one at a time"
            )
        return np.stack(parts)

    def each_data(self, images: Iterable[Any], size: tuple[int, int] | None = None) -> list[np.ndarray]:
        images, videos = _one_kind(images)
        if not videos:
            return list(super().data(images, size))
        fitted = (self.fit(video, size) for video in images)
        return [np.array(encode_frames(self.pipe.vae, frames, frames[0].size))[0] for frames in fitted]

    def images(self, data: np.ndarray | mx.array) -> list[Any]:
        """Data -> pictures, or lists of a video's frames."""
        if data.ndim == 4:
            return super().images(data)
        return [list(self._frames(mx.array(video)[None])) for video in data]

    def _frames(self, latents: mx.array) -> Iterator[Image.Image]:
        vae = self.pipe.vae
        decoder = vae.decoder_stream()
        for index in range(latents.shape[1]):
            pixels = decoder.push(vae.unscale(latents[:, index : index + 1], index))
            yield from to_images(np.array(pixels.astype(mx.float32))[0])


def _one_kind(images: Iterable[Any]) -> tuple[Iterator[Any], bool]:
    """The same pictures or videos, and whether they are videos."""
    waiting = iter(images)
    first = next(waiting, None)
    videos = first is not None and not isinstance(first, Image.Image)

    def alike() -> Iterator[Any]:
        for each in () if first is None else chain([first], waiting):
            if isinstance(each, Image.Image) == videos:
                raise StarflowError("give pictures or videos, not both together")
            yield each

    return alike(), videos


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

    def conditions(self, prompts: Sequence[str], shape: Sequence[int] | None = None) -> mx.array | None:
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
    """A model to score and edit pictures, or videos, with: "demo", a model directory, or a Hub repository of one.

    Arguments and errors are those of `pipeline.load`; a TarFlow's directory is taken too.
    """
    directory = ModelDirectory.find(name)
    if isinstance(directory.flow.config, TarFlowConfig):
        return PixelFlow(str(name), directory.path, dtype)
    return picture_flow(load(name, dtype=dtype, low_memory=low_memory))


def open_files(model: PictureFlow, files: Sequence[ImageFile], frames: int | None = None) -> Iterator[Any]:
    """The pictures, or, for a model of videos, the videos in files, each opened when it is asked for.

    Args:
        frames: of videos, so many from their start; all by default.

    Raises:
        StarflowError: there are pictures and videos, a file cannot be read, a video has not so many frames, or the
            model makes no videos of so many.
    """
    videos = [each.is_video for each in files] if isinstance(model, VideoFlow) else [False]
    if len(set(videos)) > 1:
        raise StarflowError("give pictures or videos, not both together: stills and videos are scored differently")
    if not videos[0]:
        if frames is not None:
            raise StarflowError("--frames is about videos, and there are none: leave it out")
        return (each.open() for each in files)
    if frames is not None:
        model.pipe.latent_frames(frames)
    return (read_video(each.name, fps=model.fps, frames=frames) for each in files)


def picture_flow(model: PictureFlow | Pipeline | VideoModel) -> PictureFlow:
    """What `open_picture_flow` gives, of a pipeline that is there already. Raises StarflowError."""
    if isinstance(model, PictureFlow):
        return model
    if isinstance(model, VideoModel):
        return VideoFlow(model)
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
