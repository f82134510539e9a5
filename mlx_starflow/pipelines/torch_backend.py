"""The PyTorch backend: the same models from the same noise by the PyTorch reference networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import mlx.core as mx
import numpy as np
import torch
from torch import Tensor

from mlx_starflow.model_dir.directory import ModelDirectory
from mlx_starflow.models.tokenizer import Tokenizer
from mlx_starflow.pipelines.backend import Backend, check_part
from mlx_starflow.pipelines.results import GenerationSettings
from mlx_starflow.reference.autoencoder_kl import AutoencoderKL
from mlx_starflow.reference.itarflow import ITarFlow
from mlx_starflow.reference.loading import load_flow, load_text_encoder, load_vae, parse_device, parse_dtype
from mlx_starflow.reference.sampling import denoise, iterate, sample
from mlx_starflow.reference.starflow import STARFlow
from mlx_starflow.reference.t5 import T5Encoder
from mlx_starflow.reference.tarflow import PixelFlow
from mlx_starflow.sampling import SamplingPlan, SamplingTrace
from mlx_starflow.sampling.progress import Watch


class TorchBackend(Backend[Tensor]):
    """The networks of a model directory in PyTorch, frozen; `mlx_starflow.load(..., backend="torch")` uses it.

    In float32 a seed makes the image that MLX makes of it, but for rounding.

    Attributes:
        device, dtype: where and in what precision the networks run.
    """

    def __init__(
        self,
        model: ModelDirectory,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | mx.Dtype | None = None,
    ):
        self.directory = model.path
        self.device = parse_device(device)
        self.dtype = parse_dtype(dtype, self.device)

    @cached_property
    def flow(self) -> STARFlow | PixelFlow:
        return load_flow(self.directory, self.device, self.dtype)

    @cached_property
    def _text(self) -> tuple[T5Encoder, Tokenizer]:
        return load_text_encoder(self.directory / "text_encoder", self.device, self.dtype)

    @property
    def text_encoder(self) -> T5Encoder:
        return self._text[0]

    @property
    def tokenizer(self) -> Tokenizer:
        return self._text[1]

    @cached_property
    def vae(self) -> AutoencoderKL:
        return load_vae(self.directory / "vae", self.device, self.dtype)

    def array(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)

    def numpy(self, array: Tensor) -> np.ndarray:
        return array.float().cpu().numpy()

    def concatenate(self, arrays: list[Tensor]) -> Tensor:
        return torch.cat(arrays)

    @torch.no_grad()
    def encode_text(self, ids: np.ndarray, mask: np.ndarray) -> Tensor:
        text = self.text_encoder.encode(self.array(ids), self.array(mask))
        check_part(text.float().cpu().numpy(), "the text encoder")
        return text

    def invert(
        self,
        z: Tensor,
        text: Tensor | None,
        null_text: Tensor | None,
        settings: GenerationSettings,
        method: str | SamplingPlan,
        progress: Watch,
        trace: SamplingTrace,
    ) -> Tensor:
        # A sampling plan is about MLX's speed.
        method = "sequential" if isinstance(method, SamplingPlan) else method
        guidance, options = settings.guidance, settings.options()
        return sample(self.flow, z, text, null_text, guidance, method, progress=progress, trace=trace, **options)

    def denoise(self, x: Tensor, text: Tensor | None, progress: Watch = False) -> Tensor:
        return denoise(self.flow, x, text, progress=progress)

    def iterate(
        self,
        x: Tensor,
        labels: Tensor | None,
        levels: Sequence[float],
        clip: bool,
        noise: Tensor | None,
        progress: Watch,
        preview: Callable[[int, Tensor], None],
    ) -> Tensor:
        assert isinstance(self.flow, ITarFlow)  # of a model that knows noise levels
        return iterate(self.flow, x, labels, levels, clip, noise=noise, progress=progress, preview=preview)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> np.ndarray:
        # The flow speaks float32; the decoder its own precision. It takes channels first.
        unscaled = self.vae.unscale(latents.permute(0, 3, 1, 2)).to(self.dtype)
        # By default CUDA's convolutions round float32 to TF32, which keeps ten bits of the mantissa.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            images = self.vae.decode(unscaled)
        return images.permute(0, 2, 3, 1).float().cpu().numpy()

    def start_phase(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)

    def finish_phase(self) -> int | None:
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)
