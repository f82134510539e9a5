"""Records of making videos: how they are sampled, what they begin with, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_starflow.errors import StarflowError
from mlx_starflow.errors.arguments import checked_class
from mlx_starflow.media.files import expanded
from mlx_starflow.media.images import numbered
from mlx_starflow.media.videos import VideoWriter, check_video_output
from mlx_starflow.pipelines.results import GenerationSettings, GenerationStats
from mlx_starflow.pipelines.upscaling import Upscaler
from mlx_starflow.sampling.cache import KVBits
from mlx_starflow.sampling.methods import DRAFT
from mlx_starflow.sampling.progress import Progress, Watch

MOST_FRAMES = 1_000_000
"""Of a video: 17 hours at 16 frames a second."""

MOST_RATE = 1000
"""Frames a second."""


@checked_class
@dataclass(frozen=True, kw_only=True)
class VideoSettings(GenerationSettings):
    """How videos are sampled; what is not said here is as for images.

    Attributes:
        size: (width, height) in pixels.
        frames: of the video, 1 + a multiple of 4 (for the released autoencoder); 1 is an image. Of a continuation
            they are the new ones, a multiple of 4.
        fps: frames a second; models that were trained on several rates are told.
        context: latent frames of the past that a window of a long video, or a continuation, begins with; None: 16, as
            in the release, and at most all but one of those that the model was trained on.
    """

    size: tuple[int, int]
    frames: int = 1
    fps: int = 16
    context: int | None = None

    def __post_init__(self) -> None:
        if self.student is not None or self.steps is not None or self.method == DRAFT:
            raise StarflowError("students and drafts are for images, and not for videos: leave them out")
        super().__post_init__()
        if self.frames < 1:
            raise StarflowError(f"the number of frames must be 1 or more, not {self.frames}")
        if self.frames > MOST_FRAMES:
            raise StarflowError(f"a video has at most {MOST_FRAMES:,} frames, not {self.frames}")
        if not 1 <= self.fps <= MOST_RATE:
            raise StarflowError(
                f"the frame rate must be 1 or more and at most {MOST_RATE} frames a second, not {self.fps}"
            )
        if self.context is not None and self.context < 1:
            raise StarflowError(f"the context must be 1 or more latent frames, not {self.context}")

    def of_images(self) -> GenerationSettings:
        """The part of the settings that images have."""
        return GenerationSettings(
            self.guidance, self.temperature, self.method, self.attn_temp, self.denoise, self.size, self.kv_bits
        )


@dataclass(frozen=True)
class VideoOverrides:
    """What a user asks for instead of a model's `VideoSettings`; None where nothing is asked for."""

    guidance: float | None = None
    temperature: float | None = None
    method: str | None = None
    attn_temp: float | None = None
    denoise: bool | None = None
    size: tuple[int, int] | None = None
    frames: int | None = None
    fps: int | None = None
    context: int | None = None
    kv_bits: KVBits | str | None = None

    def apply(self, settings: VideoSettings) -> VideoSettings:
        """The settings with what is asked for. Raises StarflowError if a value is out of range."""
        return replace(settings, **{name: value for name, value in vars(self).items() if value is not None})

    def or_else(self, settings: VideoSettings | None) -> VideoOverrides:
        """The same; what is not asked for is asked for as in the settings, if there are any."""
        if settings is None:
            return self
        applied = self.apply(settings)
        return VideoOverrides(**{item.name: getattr(applied, item.name) for item in fields(VideoOverrides)})


@dataclass(frozen=True)
class Given:
    """What a video begins with.

    Attributes:
        kind: "image", its first frame; "video", the video that it is made from; "extend", the one that it goes on from.
        latents: normalized, without noise, `[1, P, h, w, C]`.
        shown: whether they are part of the video that comes out.
        past: latents that stand before the video, for the decoder, `[1, p, h, w, C]`.
    """

    kind: str
    latents: mx.array
    shown: bool
    past: mx.array | None = None

    @property
    def prefix(self) -> str:
        """What stands before the prompt; the words are the release's."""
        return {"video": "(v2v) ", "extend": "(extend) "}.get(self.kind, "")


class VideoStream(Iterator[Image.Image]):
    """The frames of one video, each as soon as it is finished.

    Attributes:
        prompt, seed, settings: what it is made of; no seed where the noise was given.
        frames: how many will come.
        fps, size: frames a second, and (width, height).
        metadata: all that is needed to make it again, for `media.videos.VideoWriter`.
        stats: what the frames so far have cost.
        progress: how far this is; it can be cancelled.
    """

    def __init__(
        self,
        prompt: str,
        seed: int | None,
        settings: VideoSettings,
        metadata: dict[str, Any],
        stats: GenerationStats,
        noise: Callable[[], np.ndarray],
        images: Generator[Image.Image, None, None],
        progress: Progress,
    ):
        self.progress = progress
        self.prompt, self.seed, self.settings, self.metadata, self.stats = prompt, seed, settings, metadata, stats
        self._noise, self._images = noise, images

    @property
    def frames(self) -> int:
        return self.settings.frames

    @property
    def fps(self) -> int:
        return self.settings.fps

    @property
    def size(self) -> tuple[int, int]:
        return self.settings.size

    def __next__(self) -> Image.Image:
        return next(self._images)

    def noise(self) -> np.ndarray:
        """What the video comes from, before the temperature, `[1, t, h, w, C]`: for `noise.save_noise`."""
        return self._noise()

    def save(self, path: str | Path) -> None:
        """Write the frames that are still to come, each as soon as it is there, with the metadata.

        `media.videos.VideoWriter` says what may be written. Raises StarflowError.
        """
        with VideoWriter(expanded(path), self.fps, metadata=self.metadata) as writer:
            for frame in self:
                writer.add(frame)

    def close(self) -> None:
        """Make no more frames."""
        self._images.close()


@dataclass
class VideoResult:
    """Videos, prompt by prompt and seed by seed, and all there is to know about them.

    Attributes:
        videos: the frames of each.
        latents: what was decoded, `[B, t, h, w, C]`, or of images `[B, h, w, C]`.
        noise: what the videos came from, before the temperature; the same shape.
        prompts: prompt of each video.
        seeds: seed of each video; None where the noise was given.
        metadata: of each video, for `media.videos.VideoWriter`.
    """

    videos: list[list[Image.Image]]
    latents: mx.array
    noise: np.ndarray
    prompts: list[str]
    seeds: list[int | None]
    metadata: list[dict[str, Any]]
    settings: VideoSettings
    stats: GenerationStats

    def upscaled(self, upscaler: Upscaler, *, progress: Watch = False) -> VideoResult:
        """The same with enlarged frames, and with metadata that say so. Raises StarflowError."""
        videos = [list(upscaler.frames(each, progress=progress)) for each in self.videos]
        return replace(self, videos=videos, metadata=[upscaler.upscaled(each) for each in self.metadata])

    def save(self, path: str | Path) -> list[Path]:
        """Write the videos with their metadata, several to files with numbers: x-1.mp4, x-2.mp4, ... for x.mp4.

        `media.videos.VideoWriter` says what may be written.

        Returns:
            The files.

        Raises:
            StarflowError: a video cannot be written.
        """
        paths = numbered(expanded(path), len(self.videos))
        for each in paths:
            check_video_output(each)
        for frames, each, metadata in zip(self.videos, paths, self.metadata, strict=True):
            with VideoWriter(each, self.settings.fps, metadata=metadata) as writer:
                for frame in frames:
                    writer.add(frame)
        return paths
