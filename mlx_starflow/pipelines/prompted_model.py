"""A flow that reads prompts, with its text encoder and its autoencoder, whichever framework computes them."""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any, Generic, TypeVar

import numpy as np

from mlx_starflow import __version__
from mlx_starflow.errors import StarflowError
from mlx_starflow.media.buckets import closest_ratio
from mlx_starflow.media.noise import digest, draw_seed
from mlx_starflow.model_dir.directory import ModelDirectory
from mlx_starflow.models.starflow import FlowConfig
from mlx_starflow.models.tokenizer import Tokenizer
from mlx_starflow.pipelines.prompts import complete_prompt
from mlx_starflow.pipelines.results import GenerationSettings, GenerationStats
from mlx_starflow.sampling import Certificate, SamplingPlan

Array = TypeVar("Array")
Item = TypeVar("Item")


class PromptedModel(ABC, Generic[Array]):
    """What making pictures and making videos have in common: the model directory, prompts, seeds, phases, metadata.

    A subclass brings the networks and, as the abstract methods below, what they are used for; arrays are those of its
    framework.

    Attributes:
        tokenizer: of the text encoder.
        config, vae_config: of the flow and of the autoencoder.
        settings: how this model samples unless told otherwise.
        plan: how method "auto" samples; None is sequentially.
        adapters: folders of the flow's adapters and their strengths.
    """

    tokenizer: Tokenizer
    adapters: Sequence[tuple[str, float]] = ()

    def __init__(self, name: str, model: ModelDirectory):
        self.name, self.model, self.directory = name, model, model.path
        if not model.reads_prompts:
            raise StarflowError(f"{name} does not read prompts: use load_flow and sample in Python")
        self.config: FlowConfig = model.flow.config
        _ = model.text_encoder  # which is missed before the autoencoder is
        self.vae_config = model.vae.config
        self.plan = SamplingPlan.find(model.path)
        self.settings = GenerationSettings.from_dict({"guidance": self.config.cfg, **model.pipeline})
        self._running: tuple[GenerationStats, str] | None = None
        self._began = 0.0

    # ---- what a framework brings

    @abstractmethod
    def _array(self, values: np.ndarray) -> Array: ...

    @abstractmethod
    def _concatenate(self, arrays: list[Array]) -> Array: ...

    @abstractmethod
    def _encode(self, ids: np.ndarray, mask: np.ndarray) -> Array:
        """Token ids and mask `[B, L]` -> text embeddings `[B, L, D]`, zero at padding."""

    def _while_generating(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def _done_with(self, part: str) -> None:
        """Called with the attribute of a network that the next phases do not need."""

    def _start_phase(self) -> None:
        """Called before each stretch of a phase; `_finish_phase` after it."""

    def _finish_phase(self) -> int | None:
        """Wait for what is being computed; the most bytes that were held since `_start_phase`, if known."""
        return None

    # ---- prompts, sizes, seeds

    def encode_prompts(self, prompts: Sequence[str], size: tuple[int, int] | None = None, fps: int = 0) -> Array:
        """Prompts -> text embeddings `[B, L, D]`, zero at padding. Warns about a prompt that is cut.

        `size` (width, height), in pixels, is told to models that were trained on several shapes, and `fps`, frames a
        second or 0 for a picture, to models that were trained on videos.
        """
        length = self.config.txt_size
        ratio = closest_ratio(*size) if size else "1:1"
        completed = [complete_prompt(prompt, self.config, ratio=ratio, fps=fps) for prompt in prompts]
        ids, mask, truncated = self.tokenizer.batch(completed, length)
        for prompt, cut in zip(prompts, truncated, strict=True):
            if cut:
                warnings.warn(
                    f"the prompt is longer than the {length} tokens this model reads; its end is ignored: {prompt!r}",
                    stacklevel=2,
                )
        return self._encode(ids, mask)

    def latent_shape(self, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """(height, width, channels) of the latents of a picture of `size` (width, height) in pixels."""
        config, scale = self.config, self.vae_config.downscale
        if size is None:
            return config.img_size, config.img_size, config.channel_size
        step = scale * config.patch_size
        width, height = size
        if min(size) < step or width % step or height % step:
            raise StarflowError(f"a size of {width}x{height} does not fit: this model wants multiples of {step} pixels")
        return height // scale, width // scale, config.channel_size

    @contextmanager
    def _phase(self, stats: GenerationStats, name: str) -> Iterator[None]:
        """What happens inside is charged to this phase, and not to one that it interrupts."""
        around, here = self._running, (stats, name)
        self._charge(around)
        self._running = here
        try:
            yield
        finally:
            self._charge(here)
            self._running = around

    def _charge(self, phase: tuple[GenerationStats, str] | None) -> None:
        memory = self._finish_phase()
        if phase is not None:
            stats, name = phase
            stats.spend(name, time.perf_counter() - self._began, memory)
        self._start_phase()
        self._began = time.perf_counter()

    def _each(self, stats: GenerationStats, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """The same items; making each of them is charged to a phase."""
        waiting = iter(items)
        while True:
            with self._phase(stats, name):
                item = next(waiting, None)
            if item is None:
                return
            yield item

    def _seeds(self, seed: int | Sequence[int] | None, images: int, noise: np.ndarray | None) -> list[int | None]:
        if images < 1:
            raise StarflowError(f"the number of images must be 1 or more, not {images}")
        if noise is not None:
            return [None] * images
        if seed is None:
            seed = draw_seed()
        return [seed + k for k in range(images)] if isinstance(seed, int) else list(seed)

    def _metadata(
        self,
        prompts: list[str],
        seeds: list[int | None],
        settings: GenerationSettings,
        noise: np.ndarray,
        certificate: Certificate | None,
    ) -> dict[str, Any]:
        """All that is needed to make pictures again: prompts times seeds, as `generate` takes them."""
        metadata = {"version": __version__, "model": self.name, "prompts": prompts, "seeds": seeds}
        if self.adapters:
            metadata["adapters"] = self.adapters
        if None in seeds:
            metadata["noise_sha256"] = digest(noise)
        if certificate is not None:
            metadata["certificate"] = asdict(certificate)
        return {**metadata, "settings": settings.to_dict()}
