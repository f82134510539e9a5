"""Text, pictures and videos to videos: `VideoPipeline`, which gives frames while it is still sampling.

The stages are generators, each fed by the one before: noise, noisy latent frames, clean latent frames, pixels. Nothing
that grows with the video's length is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.images import to_images
from mlx_starflow.media.noise import VideoNoise, draw_noise, draw_side_noise
from mlx_starflow.pipelines.pipeline import Pipeline
from mlx_starflow.pipelines.results import GenerationSettings
from mlx_starflow.pipelines.video_requests import Picture, Video, VideoModel, VideoRequest
from mlx_starflow.pipelines.video_results import VideoResult, VideoStream
from mlx_starflow.sampling import SamplingTrace, certify, denoise_frames, sample_frames


class VideoPipeline(VideoModel):
    """A flow that was trained on videos, with its text encoder and its autoencoder; `load` makes one.

    Attributes (the networks are read when they are first used):
        flow, text_encoder, tokenizer, vae: the networks.
        config, vae_config: of the flow and of the autoencoder.
        settings: how this model samples unless told otherwise.
        low_memory: hold one network at a time where that is possible, and read it again for the next videos.
    """

    @cached_property
    def pictures(self) -> Pipeline:
        """The same model, making pictures; it shares the networks that have been read."""
        pipe = Pipeline(
            self.name,
            self.model,
            dtype=self.dtype,
            low_memory=self.low_memory,
            adapters=self.adapters,
            group=self.group,
        )
        for part in ("flow", "_text", "vae"):
            if part in self.__dict__:
                pipe.__dict__[part] = self.__dict__[part]
        return pipe

    # ---- what a user calls

    def stream(
        self,
        prompt: str,
        *,
        seed: int | None = None,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        fps: int | None = None,
        image: Picture | None = None,
        video: Video | None = None,
        extend: Video | None = None,
        noise: np.ndarray | None = None,
        frames_at_once: int = 1,
        live: bool = True,
        verify: bool = False,
        progress: bool | None = False,
        **settings: Any,
    ) -> VideoStream:
        """Make a video and give its frames, in order, each as soon as it is finished.

        A latent frame stands for 4 frames. The learned denoiser reads 8 latent frames ahead, so the first frame comes
        when 9 latent frames are sampled, and the last ones come together. What is given besides the prompt is read
        before this returns.

        Args:
            prompt: "" is no prompt at all.
            seed: drawn if None.
            frames: 1 + a multiple of 4; by default as many as the model was trained on. Longer videos are made window
                by window. 1 is a picture. With `extend` it counts the new frames, a multiple of 4.
            size: (width, height) in pixels; by default 16:9, or the nearest shape to what is given.
            fps: frames a second; by default as the model was trained.
            image: the first frame, a picture or its file.
            video: frames to make the video from, one by one, or a video file: see `video.media.read_video`.
            extend: frames, or a video file, to go on from; the frames that come are those after it.
            noise: standard normal noise of the frames to be made, `[1, t, h, w, C]`, instead of a seed.
            frames_at_once: latent frames that go through the flow's shallow blocks together.
            live: False samples the whole video before the first frame is decoded: with `low_memory`, one network is in
                memory at a time.
            verify: run the flow forwards over the sample and put the difference from its noise into the stream's
                `stats.certificates` at the end.
            progress: show a progress bar of tokens; None shows it on a terminal only.
            settings: overrides of `VideoSettings`.

        Raises:
            StarflowError: here, an argument does not fit; while frames are made, a frame is not finite.
        """
        chosen = {"frames": frames, "size": size, "fps": fps, **settings}
        sources = {"image": image, "video": video, "extend": extend}
        request = self.request([prompt], seed, 1, noise, chosen, sources, verify, live)
        if request.still:
            images = self._picture(request, verify, progress)
        else:
            images = self._images(request, frames_at_once, live, verify, progress)
        noise_of = partial(self._whole_noise, request)
        origin, how = request.seeds[0], request.metadata[0]
        return VideoStream(prompt, origin, request.settings, how, request.stats, noise_of, images)

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int | Sequence[int] | None = None,
        videos: int = 1,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        fps: int | None = None,
        image: Picture | None = None,
        video: Video | None = None,
        extend: Video | None = None,
        noise: np.ndarray | None = None,
        frames_at_once: int = 16,
        batch_size: int = 1,
        verify: bool = False,
        progress: bool | None = False,
        **settings: Any,
    ) -> VideoResult:
        """Make videos whole; the frames are those of `stream`, up to rounding.

        Args:
            prompts: one prompt or several.
            seed: of the first video of each prompt, the next ones count up; or a list, one a video of a prompt.
            videos: of each prompt.
            noise: `[prompts * videos, t, h, w, C]`; of pictures `[prompts * videos, h, w, C]`.
            batch_size: videos sampled at once.

        The other arguments are those of `stream`, and so are the errors.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise StarflowError("there is no prompt")
        chosen = {"frames": frames, "size": size, "fps": fps, **settings}
        sources = {"image": image, "video": video, "extend": extend}
        request = self.request(prompts, seed, videos, noise, chosen, sources, verify, False)
        if request.still:
            return self._pictures(request, batch_size, verify, progress)
        latents, made = [], []
        parts = [request.part(slice(at, at + batch_size)) for at in range(0, len(request.prompts), batch_size)]
        with self._while_generating():
            texts = [self._texts(part) for part in parts]
            self._done_with("_text")
            for part, text in zip(parts, texts, strict=True):
                latents.append(
                    mx.concatenate(list(self._latents(part, *text, frames_at_once, verify, progress)), axis=1)
                )
                mx.eval(latents[-1])
            self._done_with("flow")
            for part, clean in zip(parts, latents, strict=True):
                pieces = list(self._pixels(part, iter([clean])))
                made += [[image for piece in pieces for image in piece[index]] for index in range(len(part.prompts))]
            self._done_with("vae")
        return VideoResult(
            videos=made,
            latents=mx.concatenate(latents),
            noise=self._whole_noise(request),
            prompts=request.prompts,
            seeds=request.seeds,
            metadata=request.metadata,
            settings=request.settings,
            stats=request.stats,
        )

    # ---- stages

    def _images(
        self, request: VideoRequest, frames_at_once: int, live: bool, verify: bool, progress: bool | None
    ) -> Iterator[Image.Image]:
        with self._while_generating():
            text = self._texts(request)
            self._done_with("_text")
            latents = self._latents(request, *text, frames_at_once, verify, progress)
            if not live:
                latents = iter(list(latents))
                self._done_with("flow")
            for piece in self._pixels(request, latents):
                yield from piece[0]
            self._done_with("flow")
            self._done_with("vae")

    def _texts(self, request: VideoRequest) -> tuple[mx.array, mx.array]:
        """Embeddings of each video's prompt, and of no prompt."""
        prefix = request.given.prefix if request.given else ""
        settings = request.settings
        # A prompt that is none has no prefix either: neither had those that training dropped.
        prompts = [prefix + prompt if prompt else "" for prompt in request.prompts]
        with self._phase(request.stats, "text"):
            texts = self.encode_prompts([*prompts, ""], settings.size, settings.fps)
        return texts[:-1], texts[-1:]

    def _latents(
        self,
        request: VideoRequest,
        text: mx.array,
        null_text: mx.array,
        frames_at_once: int,
        verify: bool,
        progress: bool | None,
    ) -> Iterator[mx.array]:
        """Clean latents of the frames to be shown, `[B, 1, h, w, C]` each."""
        settings, stats, given = request.settings, request.stats, request.given
        shape = self.noise_shape(request)
        known = None if given is None else self._with_noise(request)
        hidden = 0 if given is None or given.shown else given.latents.shape[1]
        total = hidden + shape[1]
        # A video made from another one sees all of it.
        window = None if total <= self.window or (given and given.kind == "video") else self.window
        trace, sampled = SamplingTrace(), []
        stats.spend("flow", 0.0, None)  # comes first, though the denoiser asks for frames before there are any
        frames = sample_frames(
            self.flow,
            self._noise(request, hidden),
            text,
            null_text,
            settings.guidance,
            (self.plan or "sequential") if settings.method == "auto" else settings.method,
            given=known,
            window=window,
            context=settings.context,
            frames_at_once=frames_at_once,
            attn_temp=settings.attn_temp,
            progress=progress,
            trace=trace,
        )
        noisy = _kept(self._each(stats, "flow", frames), sampled if verify else None)
        clean = noisy
        if settings.denoise:
            clean = self._each(stats, "denoise", denoise_frames(self.flow, noisy, text, total, window))
        done = 0
        for part in clean:
            for index in range(part.shape[1]):
                if done >= hidden:
                    yield part[:, index : index + 1]
                done += 1
        for _ in noisy:  # it counts its evaluations at the very end
            pass
        tokens = math.prod(shape[:-1]) // self.config.patch_size**2
        if given is not None and given.shown:
            tokens = tokens * (shape[1] - 1) // shape[1]
        stats.count(trace.evaluations, sum(block.num_layers > 0 for block in self.config.blocks) * tokens)
        if verify:
            self._verify(request, mx.concatenate(sampled, axis=1), text, null_text)

    def _noise(self, request: VideoRequest, before: int) -> VideoNoise | np.ndarray:
        """What `sample_frames` takes: the noise times the temperature, after so many frames that have none."""
        scale = request.settings.temperature
        if request.noise is None:
            return VideoNoise(request.seeds, self.noise_shape(request)[1:], before=before, scale=scale)
        return np.pad(scale * request.noise, [(0, 0), (before, 0), (0, 0), (0, 0), (0, 0)])

    def _whole_noise(self, request: VideoRequest) -> np.ndarray:
        return draw_noise(request.seeds, self.noise_shape(request)[1:]) if request.noise is None else request.noise

    def _with_noise(self, request: VideoRequest) -> mx.array:
        """The given latents with each seed's training noise, `[B, P, h, w, C]`."""
        latents = request.given.latents
        noise = draw_side_noise([each or 0 for each in request.seeds], latents.shape[1:])
        return latents + self.config.noise_std * mx.array(noise)

    def _verify(self, request: VideoRequest, x: mx.array, text: mx.array, null_text: mx.array) -> None:
        settings = request.settings
        noise = self._noise(request, 0)
        z = mx.array(noise[:, 0 : noise.shape[1]])
        with self._phase(request.stats, "verify"):
            for index in range(len(request.prompts)):
                one = slice(index, index + 1)
                certificate = certify(
                    self.flow, x[one], z[one], text[one], null_text, settings.guidance, attn_temp=settings.attn_temp
                )
                request.stats.certificates.append(certificate)

    def _pixels(self, request: VideoRequest, latents: Iterator[mx.array]) -> Iterator[list[list[Image.Image]]]:
        """Clean latents -> for each latent frame the pictures of each video."""
        decoder, number = self.vae.decoder_stream(), 0
        if request.given is not None and request.given.past is not None:
            past = mx.repeat(request.given.past, len(request.prompts), axis=0)
            with self._phase(request.stats, "decode"):
                for number in range(past.shape[1]):
                    decoder.push(self.vae.unscale(past[:, number : number + 1], number))
            number += 1
        for part in latents:
            for index in range(part.shape[1]):
                with self._phase(request.stats, "decode"):
                    pixels = decoder.push(self.vae.unscale(part[:, index : index + 1], number))
                    pictures = [to_images(video) for video in np.array(pixels.astype(mx.float32))]
                number += 1
                yield pictures

    # ---- pictures

    def _pictures(self, request: VideoRequest, batch_size: int, verify: bool, progress: bool | None) -> VideoResult:
        known = GenerationSettings().to_dict()
        settings = {name: value for name, value in request.settings.to_dict().items() if name in known}
        result = self.pictures.generate(
            request.prompts[:: request.videos],
            seed=None if request.noise is not None else request.seeds[: request.videos],
            images=request.videos,
            noise=request.noise,
            batch_size=batch_size,
            verify=verify,
            progress=progress,
            **settings,
        )
        return VideoResult(
            [[image] for image in result.images],
            result.latents,
            result.noise,
            result.prompts,
            result.seeds,
            request.metadata,
            request.settings,
            result.stats,
        )

    def _picture(self, request: VideoRequest, verify: bool, progress: bool | None) -> Iterator[Image.Image]:
        result = self._pictures(request, 1, verify, progress)
        request.stats.__dict__.update(result.stats.__dict__)
        yield result.videos[0][0]


def _kept(frames: Iterator[mx.array], into: list[mx.array] | None) -> Iterator[mx.array]:
    for part in frames:
        if into is not None:
            into.append(part)
        yield part
