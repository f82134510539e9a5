"""Prompts to images: `ImagePipeline`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.images import to_images
from mlx_starflow.media.noise import draw_noise, draw_seed
from mlx_starflow.models.autoencoder_kl import WHOLE_PIXELS
from mlx_starflow.pipelines.best_of import BestOf, choose_best
from mlx_starflow.pipelines.latents import LatentPipeline
from mlx_starflow.pipelines.results import GenerationResult, GenerationSettings, GenerationStats
from mlx_starflow.planning.limits import check_count, check_held
from mlx_starflow.sampling import SamplingTrace
from mlx_starflow.sampling.sampler import progress_off


class ImagePipeline(LatentPipeline):
    """A flow with its text encoder and its autoencoder that makes images of prompts; `load` gives one.

    Attributes (the networks are read when they are first used):
        flow, text_encoder, tokenizer, vae: the networks.
        config, vae_config: of the flow and of the autoencoder.
        settings: how this model samples unless told otherwise.
    """

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int | Sequence[int] | None = None,
        images: int = 1,
        noise: np.ndarray | None = None,
        settings: GenerationSettings | None = None,
        guidance: float | None = None,
        temperature: float | None = None,
        method: str | None = None,
        attn_temp: float | None = None,
        denoise: bool | None = None,
        size: tuple[int, int] | None = None,
        keep_steps: bool = False,
        batch_size: int = 8,
        verify: bool = True,
        progress: bool | None = False,
    ) -> GenerationResult:
        """Make images.

        Args:
            prompts: one prompt or several; "" is no prompt at all.
            seed: of the first image of each prompt, the next ones count up; or a list, one an image of a prompt;
                drawn if None. A seed means one image, whatever it is generated together with.
            images: images a prompt.
            noise: use this standard normal noise `[prompts * images, h, w, C]` instead of seeds.
            settings: how to sample; the model's own settings by default.
            guidance, temperature, method, attn_temp, denoise, size: values that differ from these settings, see
                `GenerationSettings`; None: as in the settings.
            keep_steps: also decode the state after each flow block.
            batch_size: images sampled at once.
            verify: run the flow forwards over each sample and keep the difference from its noise in the result's
                `stats.certificates` and in the metadata; about as much work as a third of the score step.
            progress: show progress bars; None shows them on a terminal only.

        Raises:
            StarflowError: a setting is out of range, the noise has the wrong shape, or the result is not finite.
        """
        chosen = (settings or self.settings).updated(
            guidance=guidance, temperature=temperature, method=method, attn_temp=attn_temp, denoise=denoise, size=size
        )
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise StarflowError("there is no prompt")
        seeds = self._seeds(seed, images, noise)
        check_count(len(prompts) * len(seeds))
        requests = [(prompt, each) for prompt in prompts for each in seeds]
        batch_size, size = min(batch_size, len(requests)), chosen.size or self.size
        self.check_size(size, batch_size, guidance=chosen.guidance)
        shape = self.latent_shape(size)
        # Noise, latents and pixels; with the steps a picture for each of them.
        each_held = 8 * math.prod(shape) + 3 * size[0] * size[1]
        check_held(len(requests), each_held * (1 + keep_steps * (1 + len(self.config.blocks))))
        if noise is None:
            noise = draw_noise([each for _, each in requests if each is not None], shape)
        elif noise.shape != (len(requests), *shape):
            raise StarflowError(f"noise has shape {list(noise.shape)}; needed is {[len(requests), *shape]}")

        stats, backend = GenerationStats(), self.backend
        with backend.limits():
            with self.phases.run(stats, "text"):
                texts = self.encode_prompts([*prompts, ""], chosen.size)
            self.release("text_encoder")
            text = texts[backend.array(np.repeat(np.arange(len(prompts)), len(seeds)))]
            parts = [slice(start, start + batch_size) for start in range(0, len(requests), batch_size)]
            hide_batches = progress_off(progress) if len(parts) > 1 else True
            states = [
                self._sample(noise[part], text[part], texts[-1:], chosen, stats, keep_steps, verify, progress)
                for part in tqdm(parts, desc="batches", disable=hide_batches)
            ]
            self.release("flow")
            with self.phases.run(stats, "decode"):
                decoded = [[self._decode(state) for state in batch] for batch in states]
            self.release("vae")
        steps = [list(each) for batch in decoded for each in zip(*batch, strict=True)] if keep_steps else []
        return GenerationResult(
            images=[image for batch in decoded for image in batch[-1]],
            latents=backend.concatenate([batch[-1] for batch in states]),
            noise=noise,
            prompts=[prompt for prompt, _ in requests],
            seeds=[each for _, each in requests],
            steps=steps,
            metadata=[
                self._metadata([p], [s], chosen, noise[i : i + 1], certificate)
                for i, ((p, s), certificate) in enumerate(zip_longest(requests, stats.certificates))
            ],
            settings=chosen,
            stats=stats,
        )

    def best_of(
        self,
        prompts: str | Sequence[str],
        candidates: int,
        *,
        images: int = 1,
        seed: int | None = None,
        noise: np.ndarray | None = None,
        draws: int = 4,
        weight: float = 0.5,
        settings: GenerationSettings | None = None,
        guidance: float | None = None,
        temperature: float | None = None,
        method: str | None = None,
        attn_temp: float | None = None,
        denoise: bool | None = None,
        size: tuple[int, int] | None = None,
        keep_steps: bool = False,
        batch_size: int = 8,
        verify: bool = True,
        progress: bool | None = False,
    ) -> BestOf:
        """Sample `candidates` images for each one that is asked for and keep the one that its prompt fits best.

        Prompt fit alone, which is `weight` 1, also rises where log p(x) falls because an image is not well made. So the
        unprompted likelihood counts half; docs/likelihood.md measures what that does.

        Args:
            candidates: 1 or more.
            images: images a prompt.
            seed: of the first candidate; the others count up.
            noise: instead of seeds, `[prompts * images * candidates, h, w, C]`.
            draws: of the training noise, for the fit; all candidates see the same.
            weight: of log p(x), 0 (the most likely image given the prompt) to 1 (the best prompt fit).

        The other arguments are those of `generate`.

        Raises:
            StarflowError: as `generate` does, or the prompt is empty: then nothing fits better.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if candidates < 1:
            raise StarflowError(f"the best is chosen from 1 or more pictures, not {candidates}")
        if not 0 <= weight <= 1:
            raise StarflowError(f"the weight of the unprompted likelihood is a number from 0 to 1, not {weight:g}")
        if candidates > 1 and not all(prompt.strip() for prompt in prompts):
            raise StarflowError("an empty prompt fits every picture equally: give a prompt, or leave out the best-of")
        result = self.generate(
            prompts,
            seed=draw_seed() if seed is None else seed,
            images=images * candidates,
            noise=noise,
            settings=settings,
            guidance=guidance,
            temperature=temperature,
            method=method,
            attn_temp=attn_temp,
            denoise=denoise,
            size=size,
            keep_steps=keep_steps,
            batch_size=batch_size,
            verify=verify,
            progress=progress,
        )
        return choose_best(self, result, candidates, draws=draws, weight=weight)

    def grid_metadata(self, result: GenerationResult) -> dict[str, Any]:
        """Metadata of a grid of all images of a result."""
        images = len(result.images) // len(dict.fromkeys(result.prompts))
        prompts, seeds = result.prompts[::images], result.seeds[:images]
        return self._metadata(prompts, seeds, result.settings, result.noise, result.stats.certificate)

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
        progress: bool | None,
    ) -> list[Any]:
        """Noise -> latents; before them, if asked for, the states on the way: noise, and data after each block."""
        backend, trace = self.backend, SamplingTrace(keep_states=keep_steps)
        z = settings.temperature * backend.array(noise)
        with self.phases.run(stats, "flow"):
            x = backend.invert(z, text, null_text, settings, self.method(settings), progress, trace)
        blocks = self.config.blocks
        stats.count(
            trace.evaluations, sum(block.num_layers > 0 for block in blocks) * noise.size // blocks[0].in_channels
        )
        if verify and backend.certifies:
            with self.phases.run(stats, "verify"):
                for one in (slice(index, index + 1) for index in range(len(noise))):
                    certificate = backend.certify(x[one], z[one], text[one], null_text, settings)
                    stats.certificates.append(certificate)
                    self.check_certificate(certificate, self.method(settings))
        if settings.denoise:
            with self.phases.run(stats, "denoise"):
                x = backend.denoise(x, text)
        return [z, *trace.states, x] if keep_steps else [x]

    def _decode(self, latents: Any) -> list[Image.Image]:
        # As many images at once as make up a large one.
        width, height = self.image_size(latents.shape)
        count = max(1, WHOLE_PIXELS // (width * height))
        parts = (latents[start : start + count] for start in range(0, latents.shape[0], count))
        return [image for part in parts for image in to_images(self.backend.decode(part))]
