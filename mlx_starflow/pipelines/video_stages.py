"""The stages of making videos, generators that feed one another: noise, noisy latent frames, clean ones, images.

Nothing that grows with the video's length is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial

import mlx.core as mx
from PIL import Image

from mlx_starflow.models.autoencoder_wan import AutoencoderWan
from mlx_starflow.models.starflow import FlowConfig
from mlx_starflow.pipelines.mlx_backend import MLXBackend
from mlx_starflow.pipelines.phases import Phases
from mlx_starflow.pipelines.results import GenerationStats
from mlx_starflow.pipelines.video_frames import FrameDecoder
from mlx_starflow.pipelines.video_requests import VideoRequest
from mlx_starflow.sampling import Certificate, Progress, SamplingPlan, SamplingTrace, denoise_frames, sample_frames
from mlx_starflow.sampling.certificate import FrameCertifier


@dataclass(frozen=True)
class VideoStages:
    """How the videos of a request are made.

    Attributes:
        backend, phases: what computes, and what it is charged to.
        config: of the flow.
        window: latent frames that the model was trained on.
        method: how the flow is inverted.
        frames_at_once: latent frames that go through the flow's shallow blocks together.
        verify: certify the samples.
        live: clean frames as soon as the flow has made what they depend on; else all at the end, when the flow has let
            go of its keys and values.
        progress: is told of each step, and can end it.
        previews: tell it also of each latent frame that is sampled and waits for those after it, in the phase
            "preview".
        later_scale: see `AutoencoderWanConfig`.
        check_certificate: is told each certificate, and the method.
    """

    backend: MLXBackend
    phases: Phases
    config: FlowConfig
    window: int
    method: str | SamplingPlan
    frames_at_once: int
    verify: bool
    live: bool
    progress: Progress
    previews: bool
    later_scale: float
    check_certificate: Callable[[Certificate, str | SamplingPlan], None]

    def latents(self, request: VideoRequest, text: mx.array, null_text: mx.array) -> Iterator[mx.array]:
        """Clean latents of the frames to be shown, `[B, 1, h, w, C]` each."""
        settings, stats, given = request.settings, request.stats, request.given
        hidden = 0 if given is None or given.shown else given.latents.shape[1]
        total = hidden + request.shape[0]
        # A video made from another one sees all of it.
        window = None if total <= self.window or (given and given.kind == "video") else self.window
        trace = SamplingTrace()
        known = 0 if given is None else given.latents.shape[1]
        certifier = None
        if self.verify:
            certify = partial(self._certify_window, request, text, null_text)
            certifier = FrameCertifier(
                total,
                request.scaled_noise(hidden),
                certify,
                given=known,
                window=window,
                context=settings.context,
            )
        stats.spend("flow", 0.0, None)  # comes first, though the denoiser asks for frames before there are any
        frames = sample_frames(
            self.backend.flow,
            request.scaled_noise(hidden),
            text,
            null_text,
            settings.guidance,
            self.method,
            given=request.noisy_given(self.config.noise_std),
            window=window,
            context=settings.context,
            frames_at_once=self.frames_at_once,
            attn_temp=settings.attn_temp,
            kv_bits=settings.cache_bits or 0,
            progress=self.progress,
            trace=trace,
        )
        noisy = self.phases.each(stats, "flow", frames, self.progress)
        if not self.live:
            noisy = iter(list(noisy))
        if certifier is not None:
            noisy = self._seen(noisy, certifier, stats)
        clean = noisy
        if settings.denoise:
            glance = partial(self._preview, request, hidden) if self.previews else None
            denoised = denoise_frames(self.backend.flow, noisy, text, total, window, glance)
            clean = self.phases.each(stats, "denoise", denoised, self.progress)
        done = 0
        for part in clean:
            for index in range(part.shape[1]):
                if done >= hidden:
                    yield part[:, index : index + 1]
                done += 1
        for _ in noisy:  # it counts its evaluations at the very end
            pass
        made = request.shape[0] - (1 if given is not None and given.shown else 0)
        tokens = len(request.prompts) * made * math.prod(request.shape[1:-1]) // self.config.patch_size**2
        stats.count(trace.evaluations, sum(block.num_layers > 0 for block in self.config.blocks) * tokens)
        if certifier is not None:
            with self.phases.run(stats, "verify", self.progress):
                found = certifier.certificates()
            for certificate, metadata in zip(found, request.metadata, strict=True):
                certificate = replace(certificate, noise_floor=trace.noise_floor)
                stats.certificates.append(certificate)
                metadata["certificate"] = certificate.to_dict()
                self.check_certificate(certificate, self.method)

    def _preview(self, request: VideoRequest, hidden: int, number: int, look: Callable[[], mx.array]) -> None:
        """Tell the progress of a latent frame that is not clean yet; `hidden` of those before it are not shown."""
        index, stats = number - hidden, request.stats
        if index < 0:
            look()
            return
        # A preview is decoded as a picture of its own, whose latents have no factor.
        later = index > 0 or (request.given is not None and request.given.past is not None)
        scale = self.later_scale if later else 1.0
        with self.progress.counting("preview", request.shape[0], "frame", done=index, shown=False) as counter:
            counter.state = state = cache(lambda: look() / scale)
            with self.phases.run(stats, "preview", self.progress):
                state()

    def _seen(
        self, frames: Iterator[mx.array], certifier: FrameCertifier, stats: GenerationStats
    ) -> Iterator[mx.array]:
        for part in frames:
            with self.phases.run(stats, "verify", self.progress):
                certifier.push(part)
            yield part

    def _certify_window(
        self, request: VideoRequest, text: mx.array, null_text: mx.array, x: mx.array, z: mx.array, given: int
    ) -> list[Certificate]:
        """Of each video by itself, so that a batch takes no more memory than one."""
        found = []
        for index in range(len(request.prompts)):
            one = slice(index, index + 1)
            found += self.backend.certify(
                x[one], z[one], text[one], null_text, request.settings, self.progress, given=given
            )
        return found

    def images(self, request: VideoRequest, latents: Iterator[mx.array]) -> Iterator[list[list[Image.Image]]]:
        """Clean latents -> for each latent frame the frames of each video."""
        vae = self.backend.vae
        assert isinstance(vae, AutoencoderWan)
        decoder = FrameDecoder(vae)
        if request.given is not None and request.given.past is not None:
            with self.phases.run(request.stats, "decode", self.progress):
                decoder.skip(mx.repeat(request.given.past, len(request.prompts), axis=0))
        for part in latents:
            for index in range(part.shape[1]):
                with self.phases.run(request.stats, "decode", self.progress):
                    frames = decoder.push(part[:, index : index + 1])
                yield frames
