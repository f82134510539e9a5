"""Text to pictures in MLX: tokenizer, text encoder, flow, denoiser, decoder; and `load`, which opens a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir import tensor_parallel
from mlx_starflow.model_dir.directory import ModelDirectory
from mlx_starflow.model_dir.weights import parse_dtype
from mlx_starflow.pipelines.mlx_model import MLXModel
from mlx_starflow.pipelines.picture_methods import PictureMethods
from mlx_starflow.pipelines.results import GenerationResult as GenerationResult
from mlx_starflow.pipelines.results import GenerationSettings as GenerationSettings
from mlx_starflow.pipelines.results import GenerationStats as GenerationStats
from mlx_starflow.pipelines.text_to_picture import TextToPicture
from mlx_starflow.planning.memory import available, plan
from mlx_starflow.sampling import Certificate, certify, denoise, sample

if TYPE_CHECKING:
    from mlx_starflow.pipelines.video import VideoPipeline
    from mlx_starflow.reference.pipeline import TorchPipeline

BACKENDS = ("mlx", "torch")


class Pipeline(MLXModel, TextToPicture[mx.array], PictureMethods):
    """A flow with its text encoder and its autoencoder, read from a model directory; see `load`.

    Attributes (the networks are read when they are first used):
        flow, text_encoder, tokenizer, vae: the networks.
        config, vae_config: of the flow and of the autoencoder.
        settings: how this model samples unless told otherwise.
        low_memory: hold one network at a time, and read it again for the next pictures.
    """

    certifies = True

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


def load(
    name: str | Path = "demo",
    *,
    dtype: str | mx.Dtype | None = None,
    low_memory: bool | None = None,
    backend: str = "mlx",
    device: str | None = None,
    adapters: Sequence[tuple[str | Path, float]] = (),
    group: mx.distributed.Group | None = None,
) -> Pipeline | VideoPipeline | TorchPipeline:
    """Load a text-to-picture or text-to-video model: "demo", a model directory, or a Hub repository of one.

    Args:
        dtype: precision of the networks; by default float32 on a CPU and bfloat16 on a GPU.
        low_memory: hold one network at a time, for models that do not fit into memory together; None: if, by
            `memory.plan`, this one does not fit into this machine's.
        backend: "mlx", or "torch" for the PyTorch reference, which makes the same pictures (in float32 or bfloat16).
        device: where PyTorch computes: "cpu" or "cuda"; None: "cuda" if there is one.
        adapters: folders of adapters for the flow with their strengths, such as [("run/adapter", 1.0)]; they add up.
        group: processes that compute the flow together, each with a part of it; all must load, and then call, the same.

    Raises:
        StarflowError: there is no such model, its files are damaged or of another kind, an adapter does not fit it, the
            backend does not know an option, the flow cannot be split over the group, or its processes do not agree.
    """
    if backend not in BACKENDS:
        raise StarflowError(f"unknown backend {backend!r}; it must be {' or '.join(BACKENDS)}")
    if backend == "torch":
        if low_memory:
            raise StarflowError("the torch backend has no low-memory mode: leave it out, or use --backend mlx")
        if adapters:
            raise StarflowError("the torch backend does not know adapters: fuse them first, or use --backend mlx")
        if group is not None:
            raise StarflowError("the torch backend cannot split a flow over processes: use --backend mlx")
        from mlx_starflow.reference.pipeline import TorchPipeline

        pipe = TorchPipeline(str(name), ModelDirectory.find(name), device=device, dtype=dtype)
        _ = pipe.flow, pipe.text_encoder, pipe.vae
        return pipe
    if device is not None:
        raise StarflowError(f"device {device} is a choice of the torch backend: leave it out, or add --backend torch")
    if group is not None:
        tensor_parallel.check_same(name, dtype, group)
    dtype, model = parse_dtype(dtype), ModelDirectory.find(name)
    kind: type[Pipeline] | type[VideoPipeline] = Pipeline
    if model.flow.content.get("vid_size"):
        from mlx_starflow.pipelines.video import VideoPipeline

        kind = VideoPipeline
    pipe = kind(str(name), model, dtype=dtype, low_memory=bool(low_memory), adapters=adapters, group=group)
    if low_memory is None:
        needed = plan(model, size=pipe.settings.size, dtype=dtype)
        pipe.low_memory = (needed if group is None else needed.split(group.size())).peak() > available()
    with tensor_parallel.together(group):
        if not pipe.low_memory:
            _ = pipe.flow, pipe.text_encoder, pipe.vae
    return pipe
