"""Text to pictures in MLX: tokenizer, text encoder, flow, denoiser, decoder; and `load`, which opens a model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.generation import GenerationResult as GenerationResult
from mlx_starflow.generation import GenerationSettings as GenerationSettings
from mlx_starflow.generation import GenerationStats as GenerationStats
from mlx_starflow.hub import find_model
from mlx_starflow.memory import available, metal_limits, plan
from mlx_starflow.models.autoencoder_kl import AutoencoderKL
from mlx_starflow.models.starflow import STARFlow
from mlx_starflow.models.t5 import T5Encoder
from mlx_starflow.picture_methods import PictureMethods
from mlx_starflow.sampling import Certificate, certify, denoise, sample
from mlx_starflow.text_to_picture import TextToPicture
from mlx_starflow.tokenizer import Tokenizer
from mlx_starflow.weights import load_flow, load_text_encoder, load_vae, parse_dtype

if TYPE_CHECKING:
    from mlx_starflow.reference.pipeline import TorchPipeline

BACKENDS = ("mlx", "torch")


class Pipeline(TextToPicture[mx.array], PictureMethods):
    """A flow with its text encoder and its autoencoder, read from a model directory; see `load`.

    Attributes (the networks are read when they are first used):
        flow, text_encoder, tokenizer, vae: the networks.
        config, vae_config: of the flow and of the autoencoder.
        settings: how this model samples unless told otherwise.
        low_memory: hold one network at a time, and read it again for the next pictures.
    """

    certifies = True

    def __init__(
        self,
        name: str,
        directory: Path,
        *,
        dtype: mx.Dtype | None = None,
        low_memory: bool = False,
        adapters: Sequence[tuple[str | Path, float]] = (),
    ):
        super().__init__(name, directory)
        self.dtype, self.low_memory = dtype, low_memory
        self.adapters = [(str(path), float(strength)) for path, strength in adapters]

    @cached_property
    def flow(self) -> STARFlow:
        return load_flow(self.directory, dtype=self.dtype, adapters=self.adapters)

    @cached_property
    def _text(self) -> tuple[T5Encoder, Tokenizer]:
        return load_text_encoder(self.directory / "text_encoder", dtype=self.dtype)

    @property
    def text_encoder(self) -> T5Encoder:
        return self._text[0]

    @property
    def tokenizer(self) -> Tokenizer:
        return self._text[1]

    @cached_property
    def vae(self) -> AutoencoderKL:
        return load_vae(self.directory / "vae", dtype=self.dtype)

    def _array(self, values: np.ndarray) -> mx.array:
        return mx.array(values)

    def _concatenate(self, arrays: list[mx.array]) -> mx.array:
        return mx.concatenate(arrays)

    def _encode(self, ids: np.ndarray, mask: np.ndarray) -> mx.array:
        text = self.text_encoder.encode(mx.array(ids), mx.array(mask))
        mx.eval(text)
        return text

    def _invert(
        self, z: mx.array, text: mx.array, null_text: mx.array, settings: GenerationSettings, **how: Any
    ) -> mx.array:
        method = (self.plan or "sequential") if settings.method == "auto" else settings.method
        x = sample(self.flow, z, text, null_text, settings.guidance, method, attn_temp=settings.attn_temp, **how)
        mx.eval(x)
        return x

    def _certify(
        self, x: mx.array, z: mx.array, text: mx.array, null_text: mx.array, settings: GenerationSettings
    ) -> Certificate:
        return certify(self.flow, x, z, text, null_text, settings.guidance, attn_temp=settings.attn_temp)

    def _denoise(self, x: mx.array, text: mx.array) -> mx.array:
        return denoise(self.flow, x, text)

    def _pictures(self, latents: mx.array) -> np.ndarray:
        # The flow speaks float32; the decoder its own precision. It takes large pictures row by row.
        unscaled = self.vae.unscale(latents).astype(self.vae.decoder.conv_in.weight.dtype)
        return np.array(self.vae.decode(unscaled).astype(mx.float32))

    def _while_generating(self) -> AbstractContextManager[None]:
        return metal_limits()

    def _done_with(self, part: str) -> None:
        """Let go of a network that the next phases do not need, if memory is short."""
        if self.low_memory:
            self.__dict__.pop(part, None)
            mx.clear_cache()

    def _start_phase(self) -> None:
        mx.reset_peak_memory()

    def _finish_phase(self) -> int:
        return mx.get_peak_memory()


def load(
    name: str | Path = "demo",
    *,
    dtype: str | mx.Dtype | None = None,
    low_memory: bool | None = None,
    backend: str = "mlx",
    device: str | None = None,
    adapters: Sequence[tuple[str | Path, float]] = (),
) -> Pipeline | TorchPipeline:
    """Load a text-to-picture model: "demo", a model directory, or a Hub repository of one.

    Args:
        dtype: precision of the networks; by default float32 on a CPU and bfloat16 on a GPU.
        low_memory: hold one network at a time, for models that do not fit into memory together; None: if, by
            `memory.plan`, this one does not fit into this machine's.
        backend: "mlx", or "torch" for the PyTorch twin, which makes the same pictures (in float32 or bfloat16).
        device: where PyTorch computes: "cpu" or "cuda"; None: "cuda" if there is one.
        adapters: folders of adapters for the flow with their strengths, such as [("run/adapter", 1.0)]; they add up.

    Raises:
        StarflowError: there is no such model, its files are damaged or of another kind, an adapter does not fit it, or
            the backend does not know an option.
    """
    if backend not in BACKENDS:
        raise StarflowError(f"unknown backend {backend!r}; it must be {' or '.join(BACKENDS)}")
    if backend == "torch":
        if low_memory:
            raise StarflowError("the torch backend has no low-memory mode: leave it out, or use --backend mlx")
        if adapters:
            raise StarflowError("the torch backend does not know adapters: fuse them first, or use --backend mlx")
        from mlx_starflow.reference.pipeline import TorchPipeline

        pipe = TorchPipeline(str(name), find_model(name), device=device, dtype=dtype)
        _ = pipe.flow, pipe.text_encoder, pipe.vae
        return pipe
    if device is not None:
        raise StarflowError(f"device {device} is a choice of the torch backend: leave it out, or add --backend torch")
    dtype = parse_dtype(dtype)
    pipe = Pipeline(str(name), find_model(name), dtype=dtype, low_memory=bool(low_memory), adapters=adapters)
    if low_memory is None:
        pipe.low_memory = plan(pipe.directory, size=pipe.settings.size, dtype=dtype).peak() > available()
    if not pipe.low_memory:
        _ = pipe.flow, pipe.text_encoder, pipe.vae
    return pipe
