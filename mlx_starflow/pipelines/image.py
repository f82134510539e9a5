"""Prompts to images: `ImagePipeline`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from mlx_starflow.media.images import to_images
from mlx_starflow.models.autoencoder_kl import WHOLE_PIXELS
from mlx_starflow.pipelines.image_maker import ImageMaker
from mlx_starflow.pipelines.latents import LatentPipeline
from mlx_starflow.pipelines.results import (
    GenerationSettings,
    GenerationStats,
)
from mlx_starflow.pipelines.students import sample_by_student
from mlx_starflow.sampling import Certificate, SamplingTrace
from mlx_starflow.sampling.progress import Progress


class ImagePipeline(ImageMaker, LatentPipeline):
    """A flow with its text encoder and its autoencoder that makes images of prompts; `load` gives one.

    Attributes (the networks are read when they are first used):
        flow, text_encoder, tokenizer, vae: the networks.
        config, vae_config: of the flow and of the autoencoder.
        settings: how this model samples unless told otherwise.
    """

    def checked_images(self, settings: GenerationSettings, size: tuple[int, int], images: int) -> GenerationSettings:
        return self.with_kv_bits(settings, size, images)

    def noise_shape(self, size: tuple[int, int] | None = None) -> tuple[int, ...]:
        return self.latent_shape(size)

    def prompt_conditions(self, prompts: Sequence[str], size: tuple[int, int] | None) -> Any:
        return self.encode_prompts(prompts, size)

    def states(self, settings: GenerationSettings) -> int:
        return 1 + len(self.config.blocks)

    # ---- stages; arrays are those of the backend's framework

    def _sample(
        self,
        noise: np.ndarray,
        text: Any,
        null_text: Any,
        settings: GenerationSettings,
        stats: GenerationStats,
        keep_steps: bool,
        verify: bool,
        progress: Progress,
    ) -> tuple[list[Any], list[Certificate]]:
        backend, trace = self.backend, SamplingTrace(keep_states=keep_steps)
        z = settings.temperature * backend.array(noise)
        if settings.samples_by_student:
            return sample_by_student(self, z, text, len(self.config.blocks), settings, stats, keep_steps, progress), []
        with self.phases.run(stats, "flow", progress):
            x = backend.invert(z, text, null_text, settings, self.method(settings), progress, trace)
        blocks = self.config.blocks
        stats.count(
            trace.evaluations,
            sum(block.num_layers > 0 for block in blocks) * noise.size // blocks[0].in_channels,
            trace.student_evaluations,
        )
        certificates: list[Certificate] = []
        if verify and backend.certifies:
            with self.phases.run(stats, "verify", progress):
                for each in backend.certify(x, z, text, null_text, settings, progress):
                    certificate = replace(each, noise_floor=trace.noise_floor)
                    certificates.append(certificate)
                    self.check_certificate(certificate, self.method(settings))
        stats.certificates += certificates
        if settings.denoise:
            with self.phases.run(stats, "denoise", progress):
                x = backend.denoise(x, text, progress)
        return [z, *trace.states, x] if keep_steps else [x], certificates

    def _decode(self, latents: Any, progress: Progress) -> list[Image.Image]:
        # As many images at once as make up a large one.
        width, height = self.image_size(latents.shape)
        count = max(1, WHOLE_PIXELS // (width * height))
        images: list[Image.Image] = []
        for start in range(0, latents.shape[0], count):
            progress.check()
            images += to_images(self.backend.decode(latents[start : start + count]))
        return images
