"""Models of videos as scoring and editing see them: videos and images to data and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_starflow.errors import StarflowError
from mlx_starflow.kernels.memory import bounded
from mlx_starflow.likelihood.protocol import Prompts
from mlx_starflow.media.files import expanded
from mlx_starflow.media.given import ImageOrVideo, Images, ImageSource, is_image, one_or_many, open_image
from mlx_starflow.media.image_files import is_video_file
from mlx_starflow.media.videos import read_video
from mlx_starflow.model_dir.directory import ModelDirectory
from mlx_starflow.models.autoencoder_wan import AutoencoderWan, AutoencoderWanConfig
from mlx_starflow.pipelines.base import fit_image
from mlx_starflow.pipelines.latents import LatentPipeline
from mlx_starflow.pipelines.mlx_backend import MLXBackend
from mlx_starflow.pipelines.video_frames import decode_frames, encode_frames, one_kind
from mlx_starflow.pipelines.video_requests import VideoFormat
from mlx_starflow.pipelines.video_results import VideoSettings
from mlx_starflow.planning.memory import trained_size


class VideoModel(LatentPipeline):
    """What a `VideoPipeline`, whose attributes it has, does with videos and images that are there already."""

    backend: MLXBackend
    settings: VideoSettings
    vae_config: AutoencoderWanConfig

    def __init__(self, name: str, model: ModelDirectory, backend: MLXBackend):
        super().__init__(name, model, backend)
        if self.config.video is None or not isinstance(self.vae_config, AutoencoderWanConfig):
            raise StarflowError(f"{name} makes pictures, not videos: mlx-starflow generate")
        frames, fps = self.config.video
        size = self.settings.size or trained_size(self.config, self.vae_config)
        self.settings = VideoSettings.from_dict({**self.settings.to_dict(), "frames": frames, "fps": fps, "size": size})
        self.format = VideoFormat(self.config, self.vae_config, frames)

    @property
    def vae(self) -> AutoencoderWan:
        vae = self.backend.vae
        assert isinstance(vae, AutoencoderWan)
        return vae

    def _frame_rate(self, shape: Sequence[int] | None) -> int:
        return self.settings.fps if shape is not None and len(shape) == 5 else 0

    def conditions(self, prompts: Prompts, shape: Sequence[int] | None = None) -> mx.array:
        if shape is not None and len(shape) == 5 and shape[1] > self.format.window:
            raise StarflowError(
                f"{shape[1]} latent frames are more than the {self.format.window} that {self.name} was trained on: "
                "give a shorter video"
            )
        return super().conditions(prompts, shape)

    def fit(self, image: ImageOrVideo, size: tuple[int, int] | None = None) -> Image.Image | list[Image.Image]:
        """An image as of every model; of a video its frames, without those at the end that make no latent frame.

        A video's `size` is by default its own, if the model makes it, or that of the nearest shape.

        Raises:
            StarflowError: it has no frames, or more than the model was trained on, or the size does not fit.
        """
        image = _opened(image)
        return (
            super().fit(image, size) if is_image(image) else self._fit_video(cast(Iterable[ImageSource], image), size)
        )

    def _fit_video(self, video: Iterable[ImageSource], size: tuple[int, int] | None) -> list[Image.Image]:
        waiting = iter(video)
        first = next((open_image(each) for each in waiting), None)
        if first is None:
            raise StarflowError("the video has no frames")
        self.latent_shape(size)  # raises StarflowError if the size does not fit
        size = size or self.format.nearest_size(first)
        step, most = self.vae_config.temporal_downscale, self.format.trained
        frames = [fit_image(each, size) for each in islice(chain([first], waiting), most + step)]
        del frames[len(frames) - (len(frames) - 1) % step :]
        if len(frames) > most:
            raise StarflowError(
                f"{getattr(video, 'path', 'the video')} has more than the {most} frames that {self.name} was trained "
                f"on: give a part of it, such as its beginning with --frames {most}"
            )
        return frames

    def to_data(self, images: Images, size: tuple[int, int] | None = None) -> np.ndarray:
        """Images, or videos of one size and length -> data without noise, float32 `[B, ...]`."""
        each, videos = one_kind(map(_opened, one_or_many(images)))
        if not videos:
            return super().to_data(each, size)
        parts = self.to_data_each(each, size)
        if len({part.shape for part in parts}) > 1:
            raise StarflowError(
                "the videos differ in size or in the number of frames: give --size and --frames, or take one at a time"
            )
        return np.stack(parts)

    @bounded()
    def to_data_each(self, images: Images, size: tuple[int, int] | None = None) -> list[np.ndarray]:
        each, videos = one_kind(map(_opened, one_or_many(images)))
        if not videos:
            return list(super().to_data(each, size))
        fitted = (self._fit_video(cast(Iterable[ImageSource], video), size) for video in each)
        return [np.array(encode_frames(self.vae, frames, frames[0].size))[0] for frames in fitted]

    @bounded()
    def to_images(self, data: np.ndarray | mx.array) -> list[Image.Image] | list[list[Image.Image]]:
        """Data -> images, or the frames of each video."""
        if data.ndim == 4:
            return super().to_images(data)
        return [list(decode_frames(self.vae, mx.array(video)[None])) for video in data]


def _opened(source: ImageOrVideo) -> ImageOrVideo:
    """The frames of a video's file; everything else as it is."""
    if isinstance(source, str | Path) and is_video_file(path := expanded(source)):
        return read_video(path)
    return source
