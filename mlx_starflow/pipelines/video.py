"""Text, images and videos to videos: `VideoPipeline`, which gives frames while it is still sampling."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import cached_property, partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_starflow.errors import StarflowError
from mlx_starflow.errors.arguments import checked
from mlx_starflow.media.given import ImageSource
from mlx_starflow.media.images import to_images
from mlx_starflow.media.noise import check_seeds
from mlx_starflow.pipelines.image import ImagePipeline
from mlx_starflow.pipelines.results import GenerationStats
from mlx_starflow.pipelines.video_model import VideoModel
from mlx_starflow.pipelines.video_requests import (
    VideoRequest,
    VideoSource,
    read_first_image,
    read_past_video,
    read_source_video,
)
from mlx_starflow.pipelines.video_results import Given, VideoOverrides, VideoResult, VideoSettings, VideoStream
from mlx_starflow.pipelines.video_stages import VideoStages
from mlx_starflow.sampling.cache import KVBits
from mlx_starflow.sampling.progress import Callback, Progress, Watch, watch


class VideoPipeline(VideoModel):
    """A flow that was trained on videos, with its text encoder and its autoencoder; `load_video` gives one.

    It scores and encodes videos, whose frames are given one by one, and images, which are videos of one frame to it.
    Data of videos are `[B, T, h, w, C]`, T latent frames.

    Attributes (the networks are read when they are first used):
        flow, text_encoder, tokenizer, vae: the networks.
        config, vae_config: of the flow and of the autoencoder.
        settings: how this model samples unless told otherwise.
        format: the sizes and lengths of videos that it makes.
    """

    @cached_property
    def image_pipeline(self) -> ImagePipeline:
        """The same model, making images, with the same networks."""
        return ImagePipeline(self.name, self.model, self.backend)

    # ---- making videos

    @checked
    def stream(
        self,
        prompt: str,
        *,
        seed: int | None = None,
        image: ImageSource | None = None,
        video: VideoSource | None = None,
        extend: VideoSource | None = None,
        noise: np.ndarray | None = None,
        settings: VideoSettings | None = None,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        fps: int | None = None,
        context: int | None = None,
        guidance: float | None = None,
        temperature: float | None = None,
        method: str | None = None,
        attn_temp: float | None = None,
        denoise: bool | None = None,
        kv_bits: KVBits | str | None = None,
        frames_at_once: int = 1,
        live: bool = True,
        previews: bool = False,
        verify: bool = False,
        progress: Watch = False,
        callback: Callback | None = None,
    ) -> VideoStream:
        """Make a video and give its frames, in order, each as soon as it is finished.

        A latent frame stands for 4 frames. The learned denoiser reads 8 latent frames ahead, so the first frame comes
        when 9 latent frames are sampled, and the last ones come together. What is given besides the prompt is read
        before this returns.

        Args:
            prompt: "" is no prompt at all.
            seed: drawn if None.
            image: the first frame, an image or its file.
            video: frames to make the video from, one by one, or a video file: see `media.videos.read_video`.
            extend: frames, or a video file, to go on from; the frames that come are those after it.
            noise: standard normal noise of the frames to be made, `[1, t, h, w, C]`, instead of a seed.
            settings: how to sample; None: the model's own settings, but that size and length follow what is given.
            frames: 1 + a multiple of 4; by default as many as the model was trained on. Longer videos are made window
                by window. 1 is an image. With `extend` it counts the new frames, a multiple of 4.
            size: (width, height) in pixels; by default 16:9, or the nearest shape to what is given.
            fps: frames a second; by default as the model was trained.
            context, guidance, temperature, method, attn_temp, denoise, kv_bits: values that differ from the settings,
                see `VideoSettings`; None: as in the settings.
            frames_at_once: latent frames that go through the flow's shallow blocks together.
            live: False samples the whole video before the first frame is decoded: with `low_memory`, one network is in
                memory at a time.
            previews: show each latent frame as soon as it is sampled: the callback is called in the phase "preview",
                where `progress.done` is its number and `progress.preview()` what the denoiser makes of it without the
                frames after it, a single image. The frames of the stream are the same as without. Each preview costs
                what the denoiser's work on a frame does, and if it is asked for a first frame's decoding.
            verify: run the flow forwards over the sample, window by window, and put the difference from its noise into
                the stream's `stats.certificates` and `metadata` at the end; what was given is read, not certified.
            progress: a `Progress`, or whether to show a progress bar of tokens; None shows it on a terminal only.
            callback: is called with the `Progress` before each step: it says how far this is, and can cancel it.

        Raises:
            StarflowError: here, an argument does not fit; while frames are made, a frame is not finite.
        """
        asked = VideoOverrides(guidance, temperature, method, attn_temp, denoise, size, frames, fps, context, kv_bits)
        watched, given = watch(progress, callback), asked.or_else(settings)
        request = self._request([prompt], seed, 1, noise, given, image, video, extend, watched, live=live)
        if previews:
            _check_previews(request, live)
        if len(request.shape) == 3:
            images = self._one_image(request, verify, watched)
        else:
            stages = self._stages(request, frames_at_once, verify, live, watched, previews)
            images = self._frames(request, stages, live)
        return VideoStream(
            prompt,
            request.seeds[0],
            request.settings,
            request.metadata[0],
            request.stats,
            request.whole_noise,
            images,
            watched,
        )

    @checked
    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int | Sequence[int] | None = None,
        videos: int = 1,
        image: ImageSource | None = None,
        video: VideoSource | None = None,
        extend: VideoSource | None = None,
        noise: np.ndarray | None = None,
        settings: VideoSettings | None = None,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        fps: int | None = None,
        context: int | None = None,
        guidance: float | None = None,
        temperature: float | None = None,
        method: str | None = None,
        attn_temp: float | None = None,
        denoise: bool | None = None,
        kv_bits: KVBits | str | None = None,
        frames_at_once: int = 16,
        batch_size: int = 1,
        verify: bool = False,
        progress: Watch = False,
        callback: Callback | None = None,
    ) -> VideoResult:
        """Make videos whole; the frames are those of `stream`, up to rounding.

        Args:
            prompts: one prompt or several.
            seed: of the first video of each prompt, the next ones count up; or a list, one a video of a prompt.
            videos: of each prompt.
            noise: `[prompts * videos, t, h, w, C]`; of images `[prompts * videos, h, w, C]`.
            batch_size: videos sampled at once.

        The other arguments are those of `stream`, and so are the errors.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise StarflowError("there is no prompt")
        asked = VideoOverrides(guidance, temperature, method, attn_temp, denoise, size, frames, fps, context, kv_bits)
        watched, given = watch(progress, callback), asked.or_else(settings)
        request = self._request(
            prompts,
            seed,
            videos,
            noise,
            given,
            image,
            video,
            extend,
            watched,
            live=False,
            batch=batch_size,
        )
        if len(request.shape) == 3:
            return self._images(request, batch_size, verify, watched)
        stages = self._stages(request, frames_at_once, verify, False, watched)
        latents: list[mx.array] = []
        made: list[list[Image.Image]] = []
        parts = [request.part(slice(at, at + batch_size)) for at in range(0, len(request.prompts), batch_size)]
        with self._generating(), watched.previewing(self._preview):
            texts = [self._texts(part, watched) for part in parts]
            self.release("text_encoder")
            for part, text in zip(parts, texts, strict=True):
                latents.append(mx.concatenate(list(stages.latents(part, *text)), axis=1))
                mx.eval(latents[-1])
            self.release("flow")
            for part, clean in zip(parts, latents, strict=True):
                pieces = list(stages.images(part, iter([clean])))
                made += [[frame for piece in pieces for frame in piece[index]] for index in range(len(part.prompts))]
            self.release("vae")
        return VideoResult(
            videos=made,
            latents=mx.concatenate(latents),
            noise=request.whole_noise(),
            prompts=request.prompts,
            seeds=request.seeds,
            metadata=request.metadata,
            settings=request.settings,
            stats=request.stats,
        )

    def _request(
        self,
        prompts: list[str],
        seed: int | Sequence[int] | None,
        videos: int,
        noise: np.ndarray | None,
        asked: VideoOverrides,
        image: ImageSource | None,
        video: VideoSource | None,
        extend: VideoSource | None,
        progress: Progress,
        *,
        live: bool,
        batch: int = 1,
    ) -> VideoRequest:
        """Check what is asked for, and read and encode the image or the video that is given."""
        seeds, stats = self._seeds(seed, videos, noise), GenerationStats()
        check_seeds([each for each in seeds if each is not None])
        self.format.check_context(asked.apply(self.settings).context)
        self.latent_shape(asked.size)  # raises StarflowError if the size does not fit
        sources = {"image": image, "video": video, "extend": extend}
        named = {kind: source for kind, source in sources.items() if source is not None}
        if len(named) > 1:
            raise StarflowError(f"give {' or '.join(named)}, not both: a video begins with one of them")
        given: Given | None = None
        if named:
            fps = asked.fps or self.settings.fps
            with self.phases.run(stats, "encode", progress):
                if image is not None:
                    given, asked = read_first_image(image, asked, self.format, self.vae)
                elif video is not None:
                    given, asked = read_source_video(video, asked, self.format, self.vae, fps, progress)
                elif extend is not None:
                    given, asked = read_past_video(extend, asked, self.format, self.vae, fps, progress)
            if not live:
                self.release("vae")
        settings = asked.apply(self.settings)
        shape: tuple[int, ...] = self.latent_shape(settings.size)
        if settings.frames > 1 or given is not None:
            shape = (self.format.latent_frames(settings.frames, new=extend is not None), *shape)
        # A longer video takes no more memory than one of the trained length: it is made window by window.
        frames = self.format.trained if extend is not None else min(settings.frames, self.format.trained)
        names = [prompt for prompt in prompts for _ in seeds]
        settings = self.with_kv_bits(settings, settings.size, min(batch, len(names)), frames)
        if noise is not None and noise.shape != (len(names), *shape):
            raise StarflowError(f"the noise has shape {list(noise.shape)}; this video needs {[len(names), *shape]}")
        request = VideoRequest(names, seeds * len(prompts), settings, shape, noise, given, stats, len(seeds))
        for index, (prompt, each) in enumerate(zip(request.prompts, request.seeds, strict=True)):
            own = np.empty(0) if noise is None else noise[index : index + 1]
            metadata = self._metadata([prompt], [each], settings, own, None)
            for kind, source in named.items():
                metadata["source"] = {kind: str(source) if isinstance(source, str | Path) else None}
            request.metadata.append(metadata)
        return request

    def _stages(
        self,
        request: VideoRequest,
        frames_at_once: int,
        verify: bool,
        live: bool,
        progress: Progress,
        previews: bool = False,
    ) -> VideoStages:
        method, window = self.method(request.settings), self.format.window
        return VideoStages(
            self.backend,
            self.phases,
            self.config,
            window,
            method,
            frames_at_once,
            verify,
            live,
            progress,
            previews,
            self.vae_config.later_scale,
            self.check_certificate,
        )

    def _texts(self, request: VideoRequest, progress: Progress) -> tuple[mx.array, mx.array]:
        """Embeddings of each video's prompt, and of no prompt."""
        prefix = request.given.prefix if request.given else ""
        settings = request.settings
        # A prompt that is none has no prefix either: neither had those that training dropped.
        prompts = [prefix + prompt if prompt else "" for prompt in request.prompts]
        with self.phases.run(request.stats, "text", progress):
            texts = self.encode_prompts([*prompts, ""], settings.size, settings.fps)
        return texts[:-1], texts[-1:]

    def _frames(self, request: VideoRequest, stages: VideoStages, live: bool) -> Generator[Image.Image, None, None]:
        preview = partial(self._preview, keep=live)
        with self._generating(), stages.progress.previewing(preview):
            text, null_text = self._texts(request, stages.progress)
            self.release("text_encoder")
            latents = stages.latents(request, text, null_text)
            if not live:
                latents = iter(list(latents))
                self.release("flow")
            for piece in stages.images(request, latents):
                yield from piece[0]
            self.release("flow")
            self.release("vae")

    def _preview(self, latents: mx.array, keep: bool = False) -> list[Image.Image]:
        """Of latents `[B, 1, h, w, C]` of one frame of each video; `keep`: the autoencoder is needed all the time."""
        images = to_images(np.array(self.vae.decode(self.vae.unscale(latents[:, 0])).astype(mx.float32)))
        if not keep:
            self.release("vae")
        return images

    def _images(self, request: VideoRequest, batch_size: int, verify: bool, progress: Progress) -> VideoResult:
        """Videos of one frame."""
        result = self.image_pipeline.generate(
            request.prompts[:: request.videos],
            seed=None if request.noise is not None else request.drawn_seeds[: request.videos],
            images=request.videos,
            noise=request.noise,
            settings=request.settings.of_images(),
            batch_size=batch_size,
            verify=verify,
            progress=progress,
        )
        request.stats.add(result.stats)
        for metadata, certificate in zip(request.metadata, result.stats.certificates, strict=False):
            metadata["certificate"] = certificate.to_dict()
        return VideoResult(
            videos=[[image] for image in result.images],
            latents=result.latents,
            noise=result.noise,
            prompts=result.prompts,
            seeds=result.seeds,
            metadata=request.metadata,
            settings=request.settings,
            stats=request.stats,
        )

    def _one_image(self, request: VideoRequest, verify: bool, progress: Progress) -> Generator[Image.Image, None, None]:
        yield self._images(request, 1, verify, progress).videos[0][0]


def _check_previews(request: VideoRequest, live: bool) -> None:
    """Raise StarflowError if there would be no previews."""
    if not live:
        raise StarflowError("previews are of frames that are shown while a video is made: leave out live=False")
    if len(request.shape) == 3:
        raise StarflowError("previews are of videos, and this is a picture: leave them out, or make 5 frames or more")
    if not request.settings.denoise:
        raise StarflowError("without denoising each frame is finished at once: leave out the previews")
