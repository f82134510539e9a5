"""What videos a model can be asked for: sizes, lengths, and what they begin with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.buckets import RATIOS, bucket_size, closest_ratio
from mlx_starflow.media.files import expanded
from mlx_starflow.media.given import ImageSource, open_image
from mlx_starflow.media.noise import VideoNoise, draw_noise, draw_side_noise
from mlx_starflow.media.videos import read_video
from mlx_starflow.models.autoencoder_wan import AutoencoderWan, AutoencoderWanConfig
from mlx_starflow.models.starflow import FlowConfig
from mlx_starflow.pipelines.results import GenerationStats
from mlx_starflow.pipelines.video_frames import encode_frames, last_frames
from mlx_starflow.pipelines.video_results import Given, VideoOverrides, VideoSettings
from mlx_starflow.sampling.progress import Progress
from mlx_starflow.sampling.video import default_context

VideoSource = Iterable[ImageSource] | str | Path
"""The frames of a video, or its file."""


@dataclass(frozen=True)
class VideoFormat:
    """The sizes and lengths of videos that a model makes.

    Attributes:
        config, vae_config: of the flow and of the autoencoder.
        trained: frames of the videos that the model was trained on.
    """

    config: FlowConfig
    vae_config: AutoencoderWanConfig
    trained: int

    @property
    def window(self) -> int:
        """Latent frames that the model was trained on."""
        return self.latent_frames(self.trained)

    def latent_frames(self, frames: int, new: bool = False) -> int:
        """Latent frames of a video, or of so many `new` frames after one.

        Raises:
            StarflowError: no video has so many frames.
        """
        step, first = self.vae_config.temporal_downscale, 0 if new else 1
        if (frames - first) % step:
            below = (frames - first) // step * step + first
            what = f"a continuation has a multiple of {step}" if new else f"a video has 1 + a multiple of {step}"
            nearest = f"{below} or {below + step}" if below > 0 else str(below + step)
            raise StarflowError(f"{what} frames: {nearest}, not {frames}")
        return first + (frames - first) // step

    def size_of(self, ratio: str) -> tuple[int, int]:
        """(width, height) in pixels of videos of a shape such as "16:9", with the area that the model was trained on.

        Raises StarflowError if it is no ratio.
        """
        scale = self.vae_config.downscale
        return bucket_size(ratio, self.config.img_size * scale, scale * self.config.patch_size)

    def nearest_size(self, image: Image.Image) -> tuple[int, int]:
        """An image's own size, if the model makes it, or that of the nearest shape."""
        ratios = RATIOS if self.config.mix_aspect else ("1:1",)
        if image.size in [self.size_of(ratio) for ratio in ratios]:
            return image.size
        return self.size_of(closest_ratio(*image.size, ratios))

    def check_context(self, context: int | None) -> None:
        """Raise StarflowError if a window has no room for so many latent frames of the past."""
        if context is not None and context >= self.window:
            raise StarflowError(
                f"the context must be at most {self.window - 1} latent frames, one less than the model was trained "
                f"on, not {context}"
            )


@dataclass
class VideoRequest:
    """Videos that are made together.

    Attributes:
        prompts, seeds: one of each a video; no seed where the noise is given.
        shape: of a video's noise, `[t, h, w, C]`; `[h, w, C]` where images are asked for.
        noise: `[B, *shape]`, before the temperature; None: drawn from the seeds.
        given: what the videos begin with.
        stats, metadata: of the result.
        videos: of each prompt.
    """

    prompts: list[str]
    seeds: list[int | None]
    settings: VideoSettings
    shape: tuple[int, ...]
    noise: np.ndarray | None
    given: Given | None
    stats: GenerationStats
    videos: int
    metadata: list[dict[str, Any]] = field(default_factory=list)

    def part(self, chosen: slice) -> VideoRequest:
        """Some of the videos; their cost is added to the whole request's."""
        noise = None if self.noise is None else self.noise[chosen]
        return replace(
            self,
            prompts=self.prompts[chosen],
            seeds=self.seeds[chosen],
            noise=noise,
            metadata=self.metadata[chosen],
        )

    @property
    def drawn_seeds(self) -> list[int]:
        """The seeds; 0 where the noise is given."""
        return [each or 0 for each in self.seeds]

    def whole_noise(self) -> np.ndarray:
        """`[B, *shape]`."""
        return draw_noise(self.drawn_seeds, self.shape) if self.noise is None else self.noise

    def scaled_noise(self, before: int) -> VideoNoise | np.ndarray:
        """What `sample_frames` takes: the noise times the temperature, after so many frames that have none."""
        scale = self.settings.temperature
        if self.noise is None:
            return VideoNoise(self.drawn_seeds, self.shape, before=before, scale=scale)
        return np.pad(scale * self.noise, [(0, 0), (before, 0), (0, 0), (0, 0), (0, 0)])

    def noisy_given(self, noise_std: float) -> mx.array | None:
        """The given latents with each seed's training noise, `[B, P, h, w, C]`."""
        if self.given is None:
            return None
        latents = self.given.latents
        return latents + noise_std * mx.array(draw_side_noise(self.drawn_seeds, latents.shape[1:]))


# ---- what videos begin with: each gives it, and what is asked for with the size and the length that follow from it


def read_first_image(
    source: ImageSource, asked: VideoOverrides, video_format: VideoFormat, vae: AutoencoderWan
) -> tuple[Given, VideoOverrides]:
    """An image that is the video's first frame."""
    if asked.frames == 1:
        raise StarflowError("a video that begins with a picture has more than 1 frame")
    image = open_image(source)
    size = asked.size or video_format.nearest_size(image)
    return Given("image", encode_frames(vae, [image], size), shown=True), replace(asked, size=size)


def read_source_video(
    source: VideoSource,
    asked: VideoOverrides,
    video_format: VideoFormat,
    vae: AutoencoderWan,
    fps: int,
    progress: Progress,
) -> tuple[Given, VideoOverrides]:
    """A video that the video is made from, read at `fps` frames a second."""
    # Source and target, of the same length, are one sequence to the flow.
    if asked.frames is not None and asked.frames > video_format.trained:
        raise StarflowError(f"from a video at most {video_format.trained} frames are made, not {asked.frames}")
    most = asked.frames or video_format.trained
    video_format.latent_frames(most)
    images, size = _open_video(source, asked.size, video_format, fps, progress)
    latents = encode_frames(vae, images, size, most)
    frames = video_format.vae_config.pixel_frames(latents.shape[1])
    if asked.frames is not None and frames < asked.frames:
        raise StarflowError(f"the video to start from is too short for {asked.frames} frames: ask for {frames}")
    return Given("video", latents, shown=False), replace(asked, size=size, frames=frames)


def read_past_video(
    source: VideoSource,
    asked: VideoOverrides,
    video_format: VideoFormat,
    vae: AutoencoderWan,
    fps: int,
    progress: Progress,
) -> tuple[Given, VideoOverrides]:
    """A video that the video goes on from, read at `fps` frames a second."""
    step, context = video_format.vae_config.temporal_downscale, asked.context or default_context(video_format.window)
    frames = step * (video_format.window - 1) if asked.frames is None else asked.frames
    video_format.latent_frames(frames, new=True)
    images, size = _open_video(source, asked.size, video_format, fps, progress)
    kept = last_frames(images, step, context)
    if len(kept) <= step:
        raise StarflowError(f"the video to go on from has fewer than {1 + step} frames: give a longer one")
    # In training, a video to go on with has lost its first latent frame, which alone stands for one frame.
    past = encode_frames(vae, kept, size)
    return Given("extend", past[:, 1:], shown=False, past=past), replace(asked, size=size, frames=frames)


def _open_video(
    source: VideoSource, size: tuple[int, int] | None, video_format: VideoFormat, fps: int, progress: Progress
) -> tuple[Iterator[Image.Image], tuple[int, int]]:
    """A video's frames at the rate of the one that is made, and the size of that."""
    images = iter(read_video(expanded(source), fps=fps) if isinstance(source, str | Path) else map(open_image, source))
    first = next(images, None)
    if first is None:
        raise StarflowError("the video that is given has no frames")
    return progress.each("encode", chain([first], images), "frame"), size or video_format.nearest_size(first)
