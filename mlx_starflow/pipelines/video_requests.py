"""What videos a model can be asked for: sizes, lengths, and what they begin with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.buckets import RATIOS, bucket_size, closest_ratio
from mlx_starflow.media.image_files import read_image
from mlx_starflow.media.noise import check_seeds
from mlx_starflow.media.videos import read_video
from mlx_starflow.models.autoencoder_wan import AutoencoderWan, AutoencoderWanConfig
from mlx_starflow.pipelines.mlx_model import MLXModel
from mlx_starflow.pipelines.results import GenerationStats
from mlx_starflow.pipelines.video_results import Given, VideoSettings
from mlx_starflow.pipelines.video_sources import encode_frames, last_frames
from mlx_starflow.planning.memory import trained_size
from mlx_starflow.sampling.video import default_context

Picture = Image.Image | str | Path
Video = Iterable[Image.Image] | str | Path


@dataclass
class VideoRequest:
    """Videos that are made together.

    Attributes:
        prompts, seeds: one of each a video; no seed where the noise is given.
        noise: `[B, t, h, w, C]`, before the temperature; None: drawn from the seeds.
        given: what the videos begin with.
        stats, metadata: of the result.
        videos: of each prompt.
    """

    prompts: list[str]
    seeds: list[int | None]
    settings: VideoSettings
    noise: np.ndarray | None
    given: Given | None
    stats: GenerationStats
    videos: int
    metadata: list[dict[str, Any]] = field(default_factory=list)

    @property
    def still(self) -> bool:
        """Whether pictures are asked for."""
        return self.settings.frames == 1 and self.given is None

    def part(self, chosen: slice) -> VideoRequest:
        """Some of the videos; their cost is added to the whole request's."""
        noise = None if self.noise is None else self.noise[chosen]
        return replace(self, prompts=self.prompts[chosen], seeds=self.seeds[chosen], noise=noise)


class VideoModel(MLXModel):
    """A flow that was trained on videos, with its text encoder and its autoencoder, and the requests that it takes."""

    vae: AutoencoderWan
    vae_config: AutoencoderWanConfig
    settings: VideoSettings

    def __init__(self, name: str, directory: Path, **options: Any):
        super().__init__(name, directory, **options)
        if self.config.video is None or not isinstance(self.vae_config, AutoencoderWanConfig):
            raise StarflowError(f"{name} makes pictures, not videos: mlx-starflow generate")
        frames, fps = self.config.video
        size = self.settings.size or trained_size(self.config, self.vae_config)
        self.settings = VideoSettings.from_dict({**self.settings.to_dict(), "frames": frames, "fps": fps, "size": size})

    @property
    def window(self) -> int:
        """Latent frames that the model was trained on."""
        return self.latent_frames(self.config.video[0])

    def size_of(self, ratio: str) -> tuple[int, int]:
        """(width, height) in pixels of videos of a shape such as "16:9", with the area that the model was trained on.

        Raises StarflowError if it is no ratio.
        """
        scale = self.vae_config.downscale
        return bucket_size(ratio, self.config.img_size * scale, scale * self.config.patch_size)

    def request(
        self,
        prompts: list[str],
        seed: int | Sequence[int] | None,
        videos: int,
        noise: np.ndarray | None,
        chosen: dict[str, Any],
        sources: dict[str, Any],
        verify: bool,
        live: bool,
    ) -> VideoRequest:
        """Check what is asked for, and read and encode the picture or the video that is given.

        Arguments are those of `VideoPipeline.stream` and `generate`; `chosen` are settings, `sources` what is given, by
        kind.
        """
        seeds, stats = self._seeds(seed, videos, noise), GenerationStats()
        check_seeds([each for each in seeds if each is not None])
        chosen = {name: value for name, value in chosen.items() if value is not None}
        self._check_context(VideoSettings.from_dict({**self.settings.to_dict(), **chosen}))
        named = {kind: source for kind, source in sources.items() if source is not None}
        if len(named) > 1:
            raise StarflowError(f"give {' or '.join(named)}, not both: a video begins with one of them")
        given = None
        readers = {"image": self._first_picture, "video": self._source_video, "extend": self._past_video}
        for kind, source in named.items():
            with self._while_generating(), self._phase(stats, "encode"):
                given, chosen = readers[kind](source, chosen)
            if not live:
                self._done_with("vae")
        settings = VideoSettings.from_dict({**self.settings.to_dict(), **chosen})
        asked = [prompt for prompt in prompts for _ in seeds]
        request = VideoRequest(asked, seeds * len(prompts), settings, noise, given, stats, len(seeds))
        shape = self.noise_shape(request)
        if noise is not None and noise.shape != shape:
            raise StarflowError(f"the noise has shape {list(noise.shape)}; this video needs {list(shape)}")
        if verify and (given is not None or self.latent_frames(settings.frames) > self.window):
            raise StarflowError(
                f"certificates are for videos of at most {self.config.video[0]} frames that are made from a prompt "
                "alone: leave out the verification"
            )
        for index, (prompt, each) in enumerate(zip(request.prompts, request.seeds, strict=True)):
            own = np.empty(0) if noise is None else noise[index : index + 1]
            metadata = self._metadata([prompt], [each], settings, own, None)
            for kind, source in named.items():
                metadata["source"] = {kind: str(source) if isinstance(source, str | Path) else None}
            request.metadata.append(metadata)
        return request

    def noise_shape(self, request: VideoRequest) -> tuple[int, ...]:
        """Shape of a request's noise: of videos `[B, t, h, w, C]`, of pictures `[B, h, w, C]`."""
        settings, given = request.settings, request.given
        shape = self.latent_shape(settings.size)
        if request.still:
            return (len(request.prompts), *shape)
        new = given is not None and given.kind == "extend"
        return (len(request.prompts), self.latent_frames(settings.frames, new), *shape)

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

    def _check_context(self, settings: VideoSettings) -> None:
        if settings.context is not None and settings.context >= self.window:
            raise StarflowError(
                f"the context must be at most {self.window - 1} latent frames, one less than the model was trained "
                f"on, not {settings.context}"
            )

    def _first_picture(self, source: Picture, chosen: dict[str, Any]) -> tuple[Given, dict[str, Any]]:
        if chosen.get("frames") == 1:
            raise StarflowError("a video that begins with a picture has more than 1 frame")
        image = read_image(Path(source)) if isinstance(source, str | Path) else source
        size = self.size_for(image, chosen.get("size"))
        given = Given("image", encode_frames(self.vae, [image], size), shown=True)
        return given, {**chosen, "size": size}

    def _source_video(self, source: Video, chosen: dict[str, Any]) -> tuple[Given, dict[str, Any]]:
        trained, asked = self.config.video[0], chosen.get("frames")
        # Source and target, of the same length, are one sequence to the flow.
        if asked is not None and asked > trained:
            raise StarflowError(f"from a video at most {trained} frames are made, not {asked}")
        self.latent_frames(asked or trained)
        images, size = self._frames(source, chosen)
        latents = encode_frames(self.vae, images, size, asked or trained)
        frames = self.vae_config.pixel_frames(latents.shape[1])
        if asked is not None and frames < asked:
            raise StarflowError(f"the video to start from is too short for {asked} frames: ask for {frames}")
        return Given("video", latents, shown=False), {**chosen, "size": size, "frames": frames}

    def _past_video(self, source: Video, chosen: dict[str, Any]) -> tuple[Given, dict[str, Any]]:
        step, context = self.vae_config.temporal_downscale, chosen.get("context", default_context(self.window))
        frames = chosen.get("frames", step * (self.window - 1))
        self.latent_frames(frames, new=True)
        images, size = self._frames(source, chosen)
        kept = last_frames(images, step, context)
        if len(kept) <= step:
            raise StarflowError(f"the video to go on from has fewer than {1 + step} frames: give a longer one")
        # In training, a video to go on with has lost its first latent frame, which alone stands for one frame.
        past = encode_frames(self.vae, kept, size)
        return Given("extend", past[:, 1:], shown=False, past=past), {**chosen, "size": size, "frames": frames}

    def _frames(self, source: Video, chosen: dict[str, Any]) -> tuple[Iterator[Image.Image], tuple[int, int]]:
        """A video's frames at the rate of the one that is made, and the size of that."""
        if isinstance(source, str | Path):
            source = read_video(source, fps=chosen.get("fps", self.settings.fps))
        images = iter(source)
        first = next(images, None)
        if first is None:
            raise StarflowError("the video that is given has no frames")
        return chain([first], images), self.size_for(first, chosen.get("size"))

    def size_for(self, image: Image.Image, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """The size asked for; or a picture's own, if the model makes it; or that of the nearest shape.

        Raises StarflowError if the size asked for does not fit.
        """
        ratios = RATIOS if self.config.mix_aspect else ("1:1",)
        made = [self.size_of(ratio) for ratio in ratios]
        own = image.size if image.size in made else self.size_of(closest_ratio(*image.size, ratios))
        size = size or own
        self.latent_shape(size)  # raises StarflowError if it does not fit
        return size
