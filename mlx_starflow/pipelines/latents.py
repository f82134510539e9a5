"""What pipelines of images and of videos have in common: prompts, and latents of an autoencoder."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.errors.arguments import checked
from mlx_starflow.likelihood.protocol import Prompts, one_or_several
from mlx_starflow.media.buckets import RATIOS, bucket_size, closest_ratio
from mlx_starflow.model_dir.directory import ModelDirectory
from mlx_starflow.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mlx_starflow.models.autoencoder_wan import AutoencoderWan, AutoencoderWanConfig
from mlx_starflow.models.starflow import FlowConfig
from mlx_starflow.models.t5 import T5Encoder
from mlx_starflow.models.tokenizer import Tokenizer
from mlx_starflow.pipelines.backend import Backend
from mlx_starflow.pipelines.base import BATCH, Pipeline
from mlx_starflow.pipelines.mlx_backend import MLXBackend
from mlx_starflow.pipelines.prompts import complete_prompt
from mlx_starflow.pipelines.results import GenerationSettings, Settings
from mlx_starflow.planning.limits import MemoryRequest, automatic_kv_bits, check_memory
from mlx_starflow.sampling import SamplingPlan
from mlx_starflow.sampling.cache import KVBits


class LatentPipeline(Pipeline):
    """A flow over the latents of an autoencoder that reads prompts by a text encoder.

    Attributes:
        config, vae_config: of the flow and of the autoencoder.
        settings: how this model samples unless told otherwise.
    """

    dimension = "latent dimension"
    settings: GenerationSettings
    vae_config: AutoencoderKLConfig | AutoencoderWanConfig

    def __init__(self, name: str, model: ModelDirectory, backend: Backend[Any]):
        super().__init__(name, model, backend)
        config = model.flow.config
        if not model.reads_prompts or not isinstance(config, FlowConfig):
            raise StarflowError(f"{name} does not read prompts: use load_flow and sample in Python")
        _ = model.text_encoder  # which is missed before the autoencoder is
        self.config, self.vae_config = config, model.vae.config
        self.plan = SamplingPlan.find(model.path, backend.flow_precision, model.flow.content)
        self.settings = GenerationSettings.from_dict({"guidance": config.cfg, **model.pipeline})
        self.temperature = self.settings.temperature
        self._fit: set[tuple[object, ...]] = set()
        self._kv_bits: dict[tuple[object, ...], KVBits] = {}
        self._warned: set[tuple[int, int]] = set()

    # ---- networks

    @property
    def text_encoder(self) -> T5Encoder:
        """Read when it is first used; with the PyTorch backend that of PyTorch, as the autoencoder is."""
        return self.backend.text_encoder

    @property
    def tokenizer(self) -> Tokenizer:
        return self.backend.tokenizer

    @property
    def vae(self) -> AutoencoderKL | AutoencoderWan:
        return self.backend.vae

    # ---- prompts

    @checked
    def encode_prompts(
        self, prompts: str | Sequence[str], size: tuple[int, int] | None = None, fps: int = 0
    ) -> mx.array:
        """Prompts -> text embeddings `[B, L, D]`, zero at padding. Warns about a prompt that is cut.

        `size` (width, height), in pixels, is told to models that were trained on several shapes, and `fps`, frames a
        second or 0 for an image, to models that were trained on videos. The array is one of the backend's framework.
        """
        prompts, length = one_or_several(prompts), self.config.txt_size
        ratio = closest_ratio(*size) if size else "1:1"
        completed = [complete_prompt(prompt, self.config, ratio=ratio, fps=fps) for prompt in prompts]
        ids, mask, truncated = self.tokenizer.batch(completed, length)
        for prompt, cut in zip(prompts, truncated, strict=True):
            if cut:
                warnings.warn(
                    f"the prompt is longer than the {length} tokens this model reads; its end is ignored: {prompt!r}",
                    stacklevel=2,
                )
        return self.backend.encode_text(ids, mask)

    def conditions(self, prompts: Prompts, shape: Sequence[int] | None = None) -> mx.array:
        _, prompts = self._mlx, one_or_several(prompts)
        size = self.size if shape is None else self.image_size(shape)
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        unique, parts = list(numbers), []
        for start in range(0, len(unique), BATCH):
            parts.append(self.encode_prompts(unique[start : start + BATCH], size, self._frame_rate(shape)))
        return mx.concatenate(parts)[mx.array([numbers[prompt] for prompt in prompts])]

    def _frame_rate(self, shape: Sequence[int] | None) -> int:
        """What prompts for data of this shape say, see `encode_prompts`."""
        return 0

    # ---- latents

    @property
    def size(self) -> tuple[int, int]:
        side = self.config.img_size * self.vae_config.downscale
        return side, side

    @checked
    def latent_shape(self, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """(height, width, channels) of the latents of an image of `size` (width, height) in pixels.

        Raises:
            StarflowError: the size does not fit.
        """
        config, scale = self.config, self.vae_config.downscale
        if size is None:
            return config.img_size, config.img_size, config.channel_size
        step = scale * config.patch_size
        width, height = size
        if min(size) < step or width % step or height % step:
            raise StarflowError(f"a size of {width}x{height} does not fit: this model wants multiples of {step} pixels")
        return height // scale, width // scale, config.channel_size

    def check_size(
        self,
        size: tuple[int, int],
        images: int = 1,
        *,
        frames: int = 1,
        guidance: float | None = None,
        kv_bits: KVBits = 0,
    ) -> None:
        """As of every model; also raises StarflowError, with the figure, if they take more memory than there is.

        `frames` are those of videos, `guidance` is its weight; None: the model's own; and keys and values have
        `kv_bits`.
        """
        super().check_size(size, images)
        self.latent_shape(size)  # raises StarflowError if the size does not fit
        asked = (tuple(size), images, frames, guidance if guidance is None else guidance > 0, kv_bits)
        if asked in self._fit:
            return
        check_memory(self._memory_request(size, images, frames, guidance), kv_bits)
        self._check_trained((size[0], size[1]))
        self._fit.add(asked)

    def with_kv_bits(
        self: LatentPipeline, settings: Settings, size: tuple[int, int], images: int = 1, frames: int = 1
    ) -> Settings:
        """The settings with `kv_bits` decided for so many images at once, or for videos of `frames`.

        Raises:
            StarflowError: keys and values cannot be kept so, or all takes more memory than there is; see `check_size`.
        """
        self.latent_shape(size)  # raises StarflowError if the size does not fit
        bits = self._decided_kv_bits(
            settings, self.config.blocks, lambda: self._automatic_kv_bits(size, images, frames, settings.guidance)
        )
        self.check_size(size, images, frames=frames, guidance=settings.guidance, kv_bits=bits)
        return settings.updated(kv_bits=bits)

    def _automatic_kv_bits(self, size: tuple[int, int], images: int, frames: int, guidance: float) -> KVBits:
        asked = (tuple(size), images, frames, guidance > 0)
        if asked not in self._kv_bits:
            self._kv_bits[asked] = automatic_kv_bits(self._memory_request(size, images, frames, guidance))
        return self._kv_bits[asked]

    def _memory_request(self, size: tuple[int, int], images: int, frames: int, guidance: float | None) -> MemoryRequest:
        backend = self.backend
        here = backend if isinstance(backend, MLXBackend) else None
        return MemoryRequest(
            self.model,
            size,
            batch=images,
            frames=frames if self.config.video else None,
            guidance=guidance,
            dtype=here.dtype if here else None,
            low_memory=backend.low_memory,
            ranks=here.group.size() if here and here.group else 1,
            quantization=here.quantize if here else None,
        )

    @property
    def trained_sizes(self) -> list[tuple[int, int]]:
        """(width, height) in pixels of the images, or video frames, that the model was trained on."""
        scale = self.vae_config.downscale
        ratios = RATIOS if self.config.mix_aspect else RATIOS[:1]
        return [bucket_size(each, self.config.img_size * scale, scale * self.config.patch_size) for each in ratios]

    def _check_trained(self, size: tuple[int, int]) -> None:
        """Warn, once, about a size that the model has never seen."""
        trained = self.trained_sizes
        if size in (*trained, self.size, *self._warned):
            return
        self._warned.add(size)
        known = ", ".join(f"{width}x{height}" for width, height in trained)
        warnings.warn(
            f"{self.name} was trained at {known}, not at {size[0]}x{size[1]}: it may make nothing of it, and its "
            "likelihoods mean little there",
            stacklevel=3,
        )

    def image_size(self, shape: Sequence[int]) -> tuple[int, int]:
        scale = self.vae_config.downscale
        return shape[-2] * scale, shape[-3] * scale

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        return *shape[:-3], *(side // self.config.patch_size for side in shape[-3:-1])

    def encode_images(self, images: np.ndarray) -> np.ndarray:
        self.latent_shape((images.shape[2], images.shape[1]))  # raises StarflowError if the size does not fit
        return self._mlx.encode(images)

    def decode_images(self, data: np.ndarray) -> np.ndarray:
        return self._mlx.decode(mx.array(data))
