"""Opening a model: a pipeline of the kind that its directory holds."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import mlx.core as mx

from mlx_starflow.errors import StarflowError
from mlx_starflow.errors.arguments import checked
from mlx_starflow.kernels.memory import available
from mlx_starflow.model_dir import tensor_parallel
from mlx_starflow.model_dir.adapters import Strengths
from mlx_starflow.model_dir.directory import ModelDirectory
from mlx_starflow.model_dir.weights import parse_dtype
from mlx_starflow.models.tarflow import PixelFlowConfig
from mlx_starflow.pipelines.class_labels import ClassPipeline
from mlx_starflow.pipelines.image import ImagePipeline
from mlx_starflow.pipelines.mlx_backend import MLXBackend
from mlx_starflow.pipelines.video import VideoPipeline
from mlx_starflow.planning.memory import plan

BACKENDS = ("mlx", "torch")


@checked
def load(
    name: str | Path = "demo",
    *,
    dtype: str | mx.Dtype | None = None,
    low_memory: bool | None = None,
    backend: str = "mlx",
    device: str | None = None,
    adapters: Strengths = (),
    group: mx.distributed.Group | None = None,
    download: bool = True,
    quantize: int | str | None = None,
    student_adapters: Strengths = (),
) -> ImagePipeline:
    """Load a model: "demo", a model directory, or a Hub repository of one.

    It is typed for models that make images. A model of videos gives a `VideoPipeline` and a TarFlow a `ClassPipeline`
    all the same: `load_video` and `load_class_labels` say so to type checkers, and `open_model` that it may be any.

    Args:
        dtype: precision of the networks; by default float32 on a CPU and bfloat16 on a GPU.
        low_memory: hold one network at a time, for models that do not fit into memory together; None: if, by
            `memory.plan`, this one does not fit into this machine's. A TarFlow is one network.
        backend: "mlx", or "torch" for PyTorch, which makes the same images (in float32 or bfloat16).
        device: where PyTorch computes: "cpu" or "cuda"; None: "cuda" if there is one.
        adapters: folders of adapters for the flow with their strengths, such as [("run/adapter", 1.0)]; they add up.
        group: processes that compute the flow together, each with a part of it; all must load, and then call, the same.
        download: False: a repository must be on this machine already; for names that come from somebody else.
        quantize: the flow's weights as they are read, to 8, 6 or 4 bits or a format of `convert --quantize`; None: as
            they are stored.
        student_adapters: adapters for the students that `generate` is given, with their strengths.

    Raises:
        StarflowError: there is no such model, its files are damaged or of another kind, an adapter does not fit it, the
            backend does not know an option, the flow cannot be split over the group, or its processes do not agree.
    """
    if backend not in BACKENDS:
        raise StarflowError(f"unknown backend {backend!r}; it must be {' or '.join(BACKENDS)}")
    if backend == "torch":
        if low_memory:
            raise StarflowError("the torch backend has no low-memory mode: leave it out, or use --backend mlx")
        if adapters or student_adapters:
            raise StarflowError("the torch backend does not know adapters: fuse them first, or use --backend mlx")
        if group is not None:
            raise StarflowError("the torch backend cannot split a flow over processes: use --backend mlx")
        if quantize is not None:
            raise StarflowError("the torch backend has no quantized weights: leave that out, or use --backend mlx")
        from mlx_starflow.reference.loading import parse_device

        # Before the next import: the reference says what to install where there is no PyTorch.
        torch_device = parse_device(device)
        from mlx_starflow.pipelines.torch_backend import TorchBackend

        model = ModelDirectory.find(name, download=download)
        in_torch = TorchBackend(model, device=torch_device, dtype=dtype)
        if isinstance(model.flow.config, PixelFlowConfig):
            of_classes = ClassPipeline(str(name), model, in_torch)
            _ = of_classes.flow
            return cast(ImagePipeline, of_classes)
        of_prompts = ImagePipeline(str(name), model, in_torch)
        _ = of_prompts.flow, of_prompts.text_encoder, of_prompts.vae
        return of_prompts
    if device is not None:
        raise StarflowError(f"device {device} is a choice of the torch backend: leave it out, or add --backend torch")
    if group is not None:
        tensor_parallel.check_same(name, dtype, group, download=download)
    dtype, model = parse_dtype(dtype), ModelDirectory.find(name, download=download)
    networks = MLXBackend(
        model, dtype=dtype, adapters=adapters, group=group, quantize=quantize, student_adapters=student_adapters
    )
    config = model.flow.config
    if isinstance(config, PixelFlowConfig):
        labelled = ClassPipeline(str(name), model, networks)
        with tensor_parallel.together(group):
            _ = labelled.flow
        return cast(ImagePipeline, labelled)
    pipe = (VideoPipeline if config.vid_size else ImagePipeline)(str(name), model, networks)
    if low_memory is None:
        needed = plan(model, size=pipe.settings.size, dtype=dtype, quantization=quantize)
        low_memory = (needed if group is None else needed.split(group.size())).peak() > available()
    networks.low_memory = low_memory
    with tensor_parallel.together(group):
        if not low_memory:
            _ = pipe.flow, pipe.text_encoder, pipe.vae
    return cast(ImagePipeline, pipe)


@checked
def open_model(
    name: str | Path = "demo",
    *,
    dtype: str | mx.Dtype | None = None,
    low_memory: bool | None = None,
    adapters: Strengths = (),
    download: bool = True,
) -> ImagePipeline | VideoPipeline | ClassPipeline:
    """`load` of a model of any kind."""
    return load(name, dtype=dtype, low_memory=low_memory, adapters=adapters, download=download)


@checked
def load_video(
    name: str | Path,
    *,
    dtype: str | mx.Dtype | None = None,
    low_memory: bool | None = None,
    adapters: Strengths = (),
    group: mx.distributed.Group | None = None,
    download: bool = True,
    quantize: int | str | None = None,
) -> VideoPipeline:
    """`load` of a model that makes videos. Raises StarflowError, also if it makes none."""
    pipe: object = load(
        name,
        dtype=dtype,
        low_memory=low_memory,
        adapters=adapters,
        group=group,
        download=download,
        quantize=quantize,
    )
    if not isinstance(pipe, VideoPipeline):
        raise StarflowError(f"{name} makes pictures, not videos: mlx-starflow generate --model {name}")
    return pipe


@checked
def load_class_labels(name: str | Path, *, dtype: str | mx.Dtype | None = None) -> ClassPipeline:
    """`load` of a TarFlow, whose prompts are class labels. Raises StarflowError, also if it is none."""
    pipe = open_model(name, dtype=dtype)
    if not isinstance(pipe, ClassPipeline):
        raise StarflowError(f"{name} reads prompts, not class labels: use load")
    return pipe
