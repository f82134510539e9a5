"""Prompts to pictures, whichever framework computes them: requests, batches, phases."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.images import to_images
from mlx_starflow.media.noise import draw_noise
from mlx_starflow.models.autoencoder_kl import WHOLE_PIXELS
from mlx_starflow.pipelines.prompted_model import Array, PromptedModel
from mlx_starflow.pipelines.results import GenerationResult, GenerationSettings, GenerationStats
from mlx_starflow.sampling import Certificate, SamplingTrace
from mlx_starflow.sampling.sampler import progress_off


class TextToPicture(PromptedModel[Array]):
    """A flow with its text encoder and its autoencoder, read from a model directory, that makes pictures."""

    certifies: ClassVar[bool] = False

    # ---- what a framework brings

    @abstractmethod
    def _invert(self, z: Array, text: Array, null_text: Array, settings: GenerationSettings, **how: Any) -> Array:
        """Noise -> data, `[B, h, w, C]`; `how` has `progress` and `trace` of `sampling.sample`."""

    def _certify(self, x: Array, z: Array, text: Array, null_text: Array, settings: GenerationSettings) -> Certificate:
        """How far the guided flow, run forwards over one sample, is from its noise; only where `certifies` says so."""
        raise NotImplementedError

    @abstractmethod
    def _denoise(self, x: Array, text: Array) -> Array:
        """One score step on data `[B, h, w, C]`."""

    @abstractmethod
    def _pictures(self, latents: Array) -> np.ndarray:
        """Normalized latents `[B, h, w, C]` -> pictures, float32 `[B, H, W, 3]`, about -1..1."""

    # ---- generating

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int | Sequence[int] | None = None,
        images: int = 1,
        noise: np.ndarray | None = None,
        keep_steps: bool = False,
        batch_size: int = 8,
        verify: bool = True,
        progress: bool | None = False,
        **settings: Any,
    ) -> GenerationResult:
        """Make pictures.

        Args:
            prompts: one prompt or several; "" is no prompt at all.
            seed: of the first picture of each prompt, the next ones count up; or a list, one a picture of a prompt;
                drawn if None. A seed means one picture, whatever it is generated together with.
            images: pictures a prompt.
            noise: use this standard normal noise `[prompts * images, h, w, C]` instead of seeds.
            keep_steps: also decode the state after each flow block.
            batch_size: pictures sampled at once.
            verify: run the flow forwards over each sample and keep the difference from its noise in the result's
                `stats.certificates` and in the metadata; about as much work as a third of the score step.
            progress: show progress bars; None shows them on a terminal only.
            settings: overrides of `GenerationSettings`.

        Raises:
            StarflowError: a setting is out of range, the noise has the wrong shape, or the result is not finite.
        """
        merged = GenerationSettings.from_dict({**self.settings.to_dict(), **settings})
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise StarflowError("there is no prompt")
        seeds = self._seeds(seed, images, noise)
        requests = [(prompt, each) for prompt in prompts for each in seeds]
        shape = self.latent_shape(merged.size)
        if noise is None:
            noise = draw_noise([each for _, each in requests], shape)
        elif noise.shape != (len(requests), *shape):
            raise StarflowError(f"noise has shape {list(noise.shape)}; needed is {[len(requests), *shape]}")

        stats = GenerationStats()
        with self._while_generating():
            with self._phase(stats, "text"):
                texts = self.encode_prompts([*prompts, ""], merged.size)
            self._done_with("_text")
            text = texts[self._array(np.repeat(np.arange(len(prompts)), len(seeds)))]
            parts = [slice(start, start + batch_size) for start in range(0, len(requests), batch_size)]
            how = {"progress": progress}
            hide_batches = progress_off(progress) if len(parts) > 1 else True
            states = [
                self._sample(noise[part], text[part], texts[-1:], merged, stats, keep_steps, verify, how)
                for part in tqdm(parts, desc="batches", disable=hide_batches)
            ]
            self._done_with("flow")
            with self._phase(stats, "decode"):
                decoded = [[self._decode(state) for state in batch] for batch in states]
            self._done_with("vae")
        pictures = [picture for batch in decoded for picture in batch[-1]]
        steps = [list(images) for batch in decoded for images in zip(*batch, strict=True)] if keep_steps else []
        return GenerationResult(
            images=pictures,
            latents=self._concatenate([batch[-1] for batch in states]),
            noise=noise,
            prompts=[prompt for prompt, _ in requests],
            seeds=[each for _, each in requests],
            steps=steps,
            metadata=[
                self._metadata([p], [s], merged, noise[i : i + 1], certificate)
                for i, ((p, s), certificate) in enumerate(zip_longest(requests, stats.certificates))
            ],
            settings=merged,
            stats=stats,
        )

    def _sample(
        self,
        noise: np.ndarray,
        text: Array,
        null_text: Array,
        settings: GenerationSettings,
        stats: GenerationStats,
        keep_steps: bool,
        verify: bool,
        how: dict[str, Any],
    ) -> list[Array]:
        """Noise -> latents; before them, if asked for, the states on the way: noise, and data after each block."""
        trace = SamplingTrace(keep_states=keep_steps)
        z = settings.temperature * self._array(noise)
        with self._phase(stats, "flow"):
            x = self._invert(z, text, null_text, settings, trace=trace, **how)
        blocks = self.config.blocks
        stats.count(
            trace.evaluations, sum(block.num_layers > 0 for block in blocks) * noise.size // blocks[0].in_channels
        )
        if verify and self.certifies:
            with self._phase(stats, "verify"):
                for one in (slice(index, index + 1) for index in range(len(noise))):
                    stats.certificates.append(self._certify(x[one], z[one], text[one], null_text, settings))
        if settings.denoise:
            with self._phase(stats, "denoise"):
                x = self._denoise(x, text)
        return [z, *trace.states, x] if keep_steps else [x]

    def _decode(self, latents: Array) -> list[Image.Image]:
        # As many pictures at once as make up a large one.
        count = max(1, WHOLE_PIXELS // (latents.shape[1] * latents.shape[2] * self.vae_config.downscale**2))
        parts = [latents[start : start + count] for start in range(0, latents.shape[0], count)]
        return [image for part in parts for image in to_images(self._pictures(part))]

    def grid_metadata(self, result: GenerationResult) -> dict[str, Any]:
        """Metadata of a grid of all pictures of a result."""
        images = len(result.images) // len(dict.fromkeys(result.prompts))
        prompts, seeds = result.prompts[::images], result.seeds[:images]
        return self._metadata(prompts, seeds, result.settings, result.noise, result.stats.certificate)
