"""What makes images, whatever its prompts are and its data: `ImageMaker`."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mlx_starflow.errors import StarflowError
from mlx_starflow.errors.arguments import checked
from mlx_starflow.media.noise import draw_noise, draw_seed
from mlx_starflow.pipelines.base import Pipeline
from mlx_starflow.pipelines.best_of import BestOf, best_of_each, check_candidates, choose_best
from mlx_starflow.pipelines.results import (
    GeneratedImage,
    GenerationResult,
    GenerationSettings,
    GenerationStats,
    ImageStream,
)
from mlx_starflow.pipelines.students import with_student
from mlx_starflow.planning.limits import check_count, check_held
from mlx_starflow.sampling import Certificate
from mlx_starflow.sampling.cache import KVBits
from mlx_starflow.sampling.progress import Callback, Progress, Watch, watch


class _Batch(NamedTuple):
    """Images that were sampled together: prompts and seeds, noise, states (the latents last), certificates if any."""

    requests: list[tuple[str, int | None]]
    noise: np.ndarray
    states: list[Any]
    certificates: list[Certificate]


class ImageMaker(Pipeline):
    """What makes images, whatever its prompts are and its data.

    Attributes:
        settings: how this model samples unless told otherwise.
    """

    settings: GenerationSettings

    with_student = with_student

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise StarflowError if the model cannot read one of these prompts."""
        return

    @abstractmethod
    def checked_images(self, settings: GenerationSettings, size: tuple[int, int], images: int) -> GenerationSettings:
        """The settings for so many images at once, of a size (width, height) in pixels, with `kv_bits` decided.

        Raises StarflowError if they are too large, or keys and values cannot be kept so.
        """

    @abstractmethod
    def noise_shape(self, size: tuple[int, int] | None = None) -> tuple[int, ...]:
        """Shape of the noise of an image of `size` (width, height). Raises StarflowError if the size does not fit."""

    @abstractmethod
    def prompt_conditions(self, prompts: Sequence[str], size: tuple[int, int] | None) -> Any:
        """What the flow reads of prompts, an array of the backend's framework, one row a prompt."""

    @abstractmethod
    def states(self, settings: GenerationSettings) -> int:
        """How many images of the way there are from noise to an image."""

    @abstractmethod
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
        """Noise -> data; before them, if asked for, the states on the way: noise, and data after each block.

        And the certificates, if they are asked for.
        """

    @abstractmethod
    def _decode(self, data: Any, progress: Progress) -> list[Image.Image]:
        """Data -> images."""

    def _preview(self, data: Any) -> list[Image.Image]:
        images = self._decode(data, Progress())
        self.release("vae")
        return images

    @checked
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
        kv_bits: KVBits | str | None = None,
        student: str | Path | None = None,
        steps: int | None = None,
        keep_steps: bool = False,
        batch_size: int = 8,
        verify: bool = True,
        progress: Watch = False,
        callback: Callback | None = None,
    ) -> GenerationResult:
        """Make images.

        Args:
            prompts: one prompt or several; "" is no prompt at all.
            seed: of the first image of each prompt, the next ones count up; or a list, one an image of a prompt;
                drawn if None. A seed means one image, whatever it is generated together with.
            images: images a prompt.
            noise: use this standard normal noise `[prompts * images, h, w, C]` instead of seeds.
            settings: how to sample; the model's own settings by default.
            guidance, temperature, method, attn_temp, denoise, size, kv_bits, student, steps: values that differ from
                these settings, see `GenerationSettings`; None: as in the settings. A student brings the guidance and
                the temperature that it has learned.
            keep_steps: also decode the state after each flow block.
            batch_size: images sampled at once.
            verify: run the flow forwards over each sample and keep the difference from its noise in the result's
                `stats.certificates` and in the metadata; about as much work as half of the score step.
            progress: a `Progress`, or whether to show progress bars; None shows them on a terminal only.
            callback: is called with the `Progress` before each step: it says how far this is, gives previews, and can
                cancel it.

        Raises:
            StarflowError: a setting is out of range, the noise has the wrong shape, or the result is not finite.
            Cancelled: the callback, or somebody else who has the progress, has cancelled it.
        """
        stream = self.stream(
            prompts,
            seed=seed,
            images=images,
            noise=noise,
            settings=settings,
            guidance=guidance,
            temperature=temperature,
            method=method,
            attn_temp=attn_temp,
            denoise=denoise,
            size=size,
            kv_bits=kv_bits,
            student=student,
            steps=steps,
            keep_steps=keep_steps,
            batch_size=batch_size,
            live=False,
            verify=verify,
            progress=progress,
            callback=callback,
        )
        return stream.collect(list(stream))

    @checked
    def stream(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int | Sequence[int] | None = None,
        images: int = 1,
        best_of: int = 1,
        noise: np.ndarray | None = None,
        settings: GenerationSettings | None = None,
        guidance: float | None = None,
        temperature: float | None = None,
        method: str | None = None,
        attn_temp: float | None = None,
        denoise: bool | None = None,
        size: tuple[int, int] | None = None,
        kv_bits: KVBits | str | None = None,
        student: str | Path | None = None,
        steps: int | None = None,
        keep_steps: bool = False,
        batch_size: int = 8,
        live: bool = True,
        verify: bool = True,
        progress: Watch = False,
        callback: Callback | None = None,
    ) -> ImageStream:
        """Make images and give each as soon as it is finished, batch by batch.

        for image in pipe.stream(["a cat", "a dog"], images=100):
            image.save(f"{image.prompt} {image.seed}.png")

        Args:
            best_of: sample so many for each image and give the one that `best_of` would keep. Noise is then
                `[prompts * images * best_of, h, w, C]`, and so many seeds a prompt are used.
            live: False samples all images before the first is decoded: with `low_memory`, each network is then read
                once. (By default it is read again for each batch.)

        The other arguments, the images and the errors are those of `generate`; what is wrong with an argument is said
        before this returns.
        """
        chosen = self.with_student(settings or self.settings, student, guidance, temperature, steps, method).updated(
            attn_temp=attn_temp, denoise=denoise, size=size, kv_bits=kv_bits
        )
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise StarflowError("there is no prompt")
        self.check_prompts(prompts)
        check_candidates(prompts, best_of)
        seeds = self._seeds(seed, images * best_of, noise)
        if len(seeds) % best_of:
            raise StarflowError(f"{len(seeds)} seeds a prompt cannot be shared out to pictures of {best_of} each")
        check_count(len(prompts) * len(seeds))
        requests = [(prompt, each) for prompt in prompts for each in seeds]
        batch_size, size = min(batch_size, len(requests)), chosen.size or self.size
        chosen = self.checked_images(chosen, size, batch_size)
        shape, states = self.noise_shape(size), self.states(chosen)
        if not live:
            # Noise, latents and pixels; with the steps a picture for each of them.
            each_held = 8 * math.prod(shape) + 3 * size[0] * size[1]
            check_held(len(requests), each_held * (1 + keep_steps * states))
        if noise is not None and noise.shape != (len(requests), *shape):
            raise StarflowError(f"noise has shape {list(noise.shape)}; needed is {[len(requests), *shape]}")
        stats = GenerationStats()
        watched = watch(progress, callback)
        made = self._finished(requests, noise, chosen, stats, keep_steps, batch_size, live, verify, watched)
        if best_of > 1:
            made = best_of_each(self, made, best_of, progress=watched)
        return ImageStream(len(requests) // best_of, chosen, stats, made, self.backend.concatenate, watched)

    def _finished(
        self,
        requests: list[tuple[str, int | None]],
        noise: np.ndarray | None,
        settings: GenerationSettings,
        stats: GenerationStats,
        keep_steps: bool,
        batch_size: int,
        live: bool,
        verify: bool,
        progress: Progress,
    ) -> Generator[GeneratedImage, None, None]:
        """Images of prompts with their seeds, or with given noise."""
        backend, shape = self.backend, self.noise_shape(settings.size)
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompt for prompt, _ in requests))}
        parts = [slice(start, start + batch_size) for start in range(0, len(requests), batch_size)]

        def batches(texts: Any) -> Iterator[_Batch]:
            with progress.counting("batches", len(parts), "batch", shown=len(parts) > 1) as counter:
                for part in parts:
                    mine = requests[part]
                    own = draw_noise([seed or 0 for _, seed in mine], shape) if noise is None else noise[part]
                    text = texts[backend.array(np.array([numbers[prompt] for prompt, _ in mine]))]
                    sampled = self._sample(own, text, texts[-1:], settings, stats, keep_steps, verify, progress)
                    yield _Batch(mine, own, *sampled)
                    counter.advance()

        with self._generating(), progress.previewing(self._preview):
            with self.phases.run(stats, "text", progress):
                texts = self.prompt_conditions([*numbers, ""], settings.size)
            self.release("text_encoder")
            waiting = batches(texts)
            if not live:
                waiting = iter(list(waiting))
                self.release("flow")
            for number, batch in enumerate(waiting, 1):
                if live:
                    self.release("flow")
                with self.phases.run(stats, "decode", progress):
                    decoded = [self._decode(state, progress) for state in batch.states]
                if live or number == len(parts):
                    self.release("vae")
                for index, (prompt, seed) in enumerate(batch.requests):
                    own, certificate = batch.noise[index], batch.certificates[index] if batch.certificates else None
                    yield GeneratedImage(
                        decoded[-1][index],
                        prompt,
                        seed,
                        batch.states[-1][index],
                        own,
                        self._metadata([prompt], [seed], settings, own[None], certificate),
                        certificate,
                        [state[index] for state in decoded] if keep_steps else [],
                    )

    @checked
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
        kv_bits: KVBits | str | None = None,
        student: str | Path | None = None,
        steps: int | None = None,
        keep_steps: bool = False,
        batch_size: int = 8,
        verify: bool = True,
        progress: Watch = False,
        callback: Callback | None = None,
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
        if not 0 <= weight <= 1:
            raise StarflowError(f"the weight of the unprompted likelihood is a number from 0 to 1, not {weight:g}")
        check_candidates(prompts, candidates)
        progress = watch(progress, callback)
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
            kv_bits=kv_bits,
            student=student,
            steps=steps,
            keep_steps=keep_steps,
            batch_size=batch_size,
            verify=verify,
            progress=progress,
        )
        return choose_best(self, result, candidates, draws=draws, weight=weight, progress=progress)

    def grid_metadata(self, result: GenerationResult) -> dict[str, Any]:
        """Metadata of a grid of all images of a result."""
        images = len(result.images) // len(dict.fromkeys(result.prompts))
        prompts, seeds = result.prompts[::images], result.seeds[:images]
        return self._metadata(prompts, seeds, result.settings, result.noise, result.stats.certificate)
