"""What computes: the networks of a model directory, and the few things that pipelines do with them.

A pipeline has a backend. `MLXBackend` is the usual one; `torch_backend.TorchBackend` runs the same models in PyTorch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Generic, TypeVar

import mlx.core as mx
import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.likelihood.protocol import Part
from mlx_starflow.model_dir.directory import ModelDirectory, read_text_encoder
from mlx_starflow.model_dir.quantization import dense_on_cpu
from mlx_starflow.models.autoencoder_kl import AutoencoderKL
from mlx_starflow.models.autoencoder_wan import AutoencoderWan
from mlx_starflow.models.starflow import STARFlow
from mlx_starflow.models.t5 import T5Encoder
from mlx_starflow.models.tarflow import TarFlow
from mlx_starflow.models.tokenizer import Tokenizer
from mlx_starflow.pipelines.results import GenerationSettings
from mlx_starflow.planning.memory import available, metal_limits
from mlx_starflow.sampling import Certificate, SamplingPlan, SamplingTrace, certify, denoise, sample
from mlx_starflow.sampling.progress import Watch

Array = TypeVar("Array")


class Backend(ABC, Generic[Array]):
    """The networks of one model, and what is computed with them; arrays are those of its framework.

    Attributes:
        certifies: whether it has `certify`.
        low_memory: hold one network at a time, and read it again when it is needed next.
        adapters: folders of the flow's adapters and their strengths.
    """

    certifies: bool = False
    low_memory: bool = False
    adapters: Sequence[tuple[str, float]] = ()

    @property
    @abstractmethod
    def flow(self) -> Any:
        """The flow, read when it is first used, as the other networks are."""

    @property
    @abstractmethod
    def text_encoder(self) -> Any: ...

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer: ...

    @property
    @abstractmethod
    def vae(self) -> Any: ...

    @abstractmethod
    def array(self, values: np.ndarray) -> Array:
        """Values as an array of the framework, where it computes."""

    @abstractmethod
    def concatenate(self, arrays: list[Array]) -> Array:
        """Along the first axis."""

    @abstractmethod
    def encode_text(self, ids: np.ndarray, mask: np.ndarray) -> Array:
        """Token ids and mask `[B, L]` -> text embeddings `[B, L, D]`, zero at padding."""

    @abstractmethod
    def invert(
        self,
        z: Array,
        text: Array,
        null_text: Array,
        settings: GenerationSettings,
        method: str | SamplingPlan,
        progress: Watch,
        trace: SamplingTrace,
    ) -> Array:
        """Noise -> data, `[B, h, w, C]`, by a method with the settings' guidance; see `sampling.sample`."""

    def certify(
        self,
        x: Array,
        z: Array,
        text: Array,
        null_text: Array,
        settings: GenerationSettings,
        progress: Watch = False,
    ) -> Certificate:
        """How far the guided flow, run forwards over samples, is from their noise; see `sampling.certify`."""
        raise NotImplementedError

    @abstractmethod
    def denoise(self, x: Array, text: Array, progress: Watch = False) -> Array:
        """One score step on data `[B, h, w, C]`."""

    @abstractmethod
    def decode(self, latents: Array) -> np.ndarray:
        """Normalized latents `[B, h, w, C]` -> images, float32 `[B, H, W, 3]`, about -1..1."""

    def release(self, part: Part) -> None:
        """With `low_memory`, let go of a network that the next phases do not need."""
        return

    def limits(self) -> AbstractContextManager[None]:
        """Limits of memory while generating."""
        return nullcontext()

    def start_phase(self) -> None:
        """Begin to measure memory."""
        return

    def finish_phase(self) -> int | None:
        """Wait for what is being computed; the most bytes that were held since `start_phase`, if known."""
        return None


def check_part(values: np.ndarray, part: str) -> None:
    """Raise StarflowError, naming the network, if what it made has a NaN or an infinity."""
    if not np.isfinite(values).all():
        raise StarflowError(
            f"what {part} made is not finite: its weights may be damaged, or too coarse (--dtype float32)"
        )


class MLXBackend(Backend[mx.array]):
    """The networks of a model directory in MLX, read when they are first used.

    Attributes:
        model: the directory.
        dtype: precision of the networks; None: float32 on a CPU, bfloat16 on a GPU.
        group: processes that compute the flow together, or None.
    """

    certifies = True

    def __init__(
        self,
        model: ModelDirectory,
        *,
        dtype: mx.Dtype | None = None,
        low_memory: bool = False,
        adapters: Sequence[tuple[str | Path, float]] = (),
        group: mx.distributed.Group | None = None,
    ):
        self.model, self.dtype, self.low_memory, self.group = model, dtype, low_memory, group
        self.adapters = [(str(path), float(strength)) for path, strength in adapters]
        self._flow: STARFlow | TarFlow | None = None
        self._dense: tuple[STARFlow | TarFlow, STARFlow | TarFlow] | None = None
        self._text: tuple[T5Encoder, Tokenizer] | None = None
        self._vae: AutoencoderKL | AutoencoderWan | None = None

    # ---- networks

    @property
    def flow(self) -> STARFlow | TarFlow:
        if self._flow is None:
            self._flow = self.model.load_flow(self.dtype, self.adapters, self.group)
        return self._flow

    def _read_text_encoder(self) -> tuple[T5Encoder, Tokenizer]:
        if self._text is None:
            self._text = read_text_encoder(self.model.text_encoder, self.dtype)
        return self._text

    @property
    def text_encoder(self) -> T5Encoder:
        return self._read_text_encoder()[0]

    @property
    def tokenizer(self) -> Tokenizer:
        return self._read_text_encoder()[1]

    @property
    def vae(self) -> AutoencoderKL | AutoencoderWan:
        if self._vae is None:
            self._vae = self.model.vae.load(self.dtype)
        return self._vae

    @property
    def held(self) -> set[Part]:
        """The networks that are in memory."""
        networks: dict[Part, object] = {"text_encoder": self._text, "flow": self._flow, "vae": self._vae}
        return {part for part, network in networks.items() if network is not None}

    def release(self, part: Part) -> None:
        if not self.low_memory:
            return
        if part == "flow":
            self._flow = self._dense = None
        elif part == "vae":
            self._vae = None
        else:
            self._text = None
        mx.clear_cache()

    def dense_flow(self) -> STARFlow | TarFlow:
        """The flow for repeated evaluation: on a CPU, if memory allows, a copy whose quantized layers are dense.

        The copy is kept as long as the flow is.
        """
        if self._dense is None or self._dense[0] is not self.flow:
            self._dense = self.flow, self.flow if self.group else dense_on_cpu(self.flow, available() // 2)
        return self._dense[1]

    # ---- what is computed with them

    def array(self, values: np.ndarray) -> mx.array:
        return mx.array(values)

    def concatenate(self, arrays: list[mx.array]) -> mx.array:
        return mx.concatenate(arrays)

    def encode_text(self, ids: np.ndarray, mask: np.ndarray) -> mx.array:
        text = self.text_encoder.encode(mx.array(ids), mx.array(mask))
        check_part(np.array(text.astype(mx.float32)), "the text encoder")
        return text

    def invert(
        self,
        z: mx.array,
        text: mx.array,
        null_text: mx.array,
        settings: GenerationSettings,
        method: str | SamplingPlan,
        progress: Watch,
        trace: SamplingTrace,
    ) -> mx.array:
        guidance, attn_temp = settings.guidance, settings.attn_temp
        x = sample(self.flow, z, text, null_text, guidance, method, attn_temp=attn_temp, progress=progress, trace=trace)
        mx.eval(x)
        return x

    def certify(
        self,
        x: mx.array,
        z: mx.array,
        text: mx.array,
        null_text: mx.array,
        settings: GenerationSettings,
        progress: Watch = False,
    ) -> Certificate:
        guidance, attn_temp = settings.guidance, settings.attn_temp
        return certify(self.flow, x, z, text, null_text, guidance, attn_temp=attn_temp, progress=progress)

    def denoise(self, x: mx.array, text: mx.array, progress: Watch = False) -> mx.array:
        return denoise(self.flow, x, text, progress=progress)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Images `[B, H, W, 3]` in -1..1 -> normalized latents without noise, float32 `[B, h, w, C]`."""
        latents = np.array(self.vae.scale(self.vae.encode(mx.array(images)).mean).astype(mx.float32))
        check_part(latents, "the autoencoder")
        return latents

    def decode(self, latents: mx.array) -> np.ndarray:
        # The flow speaks float32; the decoder its own precision.
        unscaled = self.vae.unscale(latents).astype(self.vae.decoder.conv_in.weight.dtype)
        return np.array(self.vae.decode(unscaled).astype(mx.float32))

    # ---- memory

    def limits(self) -> AbstractContextManager[None]:
        return metal_limits()

    def start_phase(self) -> None:
        mx.reset_peak_memory()

    def finish_phase(self) -> int:
        return mx.get_peak_memory()
