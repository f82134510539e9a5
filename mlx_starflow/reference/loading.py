"""Model directories and official checkpoints into the PyTorch reference.

The MLX code reads, checks and, where weights are quantized, dequantizes them; tensors go over to PyTorch one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np
import torch
from torch import nn

from mlx_starflow.convert.common import as_tensor
from mlx_starflow.convert.flow import open_flow, read_arguments
from mlx_starflow.convert.tensor import Tensor as Stored
from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.media.files import is_regular
from mlx_starflow.model_dir.directory import ModelDirectory, NetworkDirectory, read_tokenizer
from mlx_starflow.model_dir.precision import AUTO
from mlx_starflow.model_dir.quantization import dequantize_module
from mlx_starflow.model_dir.weights import check_shapes, parameters
from mlx_starflow.models.itarflow import ITarFlowConfig
from mlx_starflow.models.starflow import FlowConfig
from mlx_starflow.models.tokenizer import Tokenizer
from mlx_starflow.reference.autoencoder_kl import AutoencoderKL
from mlx_starflow.reference.itarflow import ITarFlow
from mlx_starflow.reference.starflow import STARFlow
from mlx_starflow.reference.t5 import T5Encoder
from mlx_starflow.reference.tarflow import PixelFlow, TarFlow

M = TypeVar("M", bound=nn.Module)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parse_device(device: str | torch.device | None) -> torch.device:
    """None: CUDA if there is one, else the CPU. Raises StarflowError if PyTorch does not find the device."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        parsed = torch.device(device)
    except RuntimeError:
        raise StarflowError(f"device {device!r} is neither cpu nor cuda") from None
    if parsed.type not in ("cpu", "cuda"):
        raise StarflowError(f"device {device!r} is neither cpu nor cuda")
    if parsed.type == "cuda" and (parsed.index or 0) >= torch.cuda.device_count():
        raise StarflowError(f"PyTorch finds no device {device}: use the cpu")
    return parsed


def parse_dtype(dtype: str | torch.dtype | mx.Dtype | None, device: torch.device) -> torch.dtype:
    """None or "auto": float32 on a CPU, bfloat16 with CUDA. Raises StarflowError if it is neither of these."""
    if dtype is None or dtype == AUTO:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    name = str(dtype).rpartition(".")[2]
    if name not in DTYPES:
        raise StarflowError(f"the PyTorch reference runs in {' or '.join(DTYPES)}, not in {name}")
    return DTYPES[name]


def load_flow(
    path: str | Path,
    device: str | torch.device | None = "cpu",
    dtype: str | torch.dtype | mx.Dtype | None = None,
    *,
    config: str | Path | None = None,
) -> STARFlow | PixelFlow:
    """The flow of a model directory or of an official checkpoint, frozen.

    Args:
        path: "demo", a model directory, a Hugging Face repository of one, or an official `.pth`.
        device: "cpu", "cuda", "cuda:1"...; None: CUDA if there is one.
        dtype: "float32" or "bfloat16"; None: float32 on a CPU, bfloat16 with CUDA.
        config: the official YAML that a `.pth` goes with; None for a TarFlow or a released checkpoint (see
            `mlx_starflow.convert.convert_flow`).

    Raises:
        StarflowError: there is no such model, a tensor is missing or unexpected, or a file is damaged.
    """
    device = parse_device(device)
    dtype = parse_dtype(dtype, device)
    if is_regular(Path(path)):
        path = Path(path)
        network, _, tensors = open_flow(path, read_arguments(path, config), config or path)
        expected = {name: value.shape for name, value in parameters(network).items()}
        check_shapes({name: tensor.shape for name, tensor in tensors.items()}, expected, path)
        flow_config = network.config
    else:
        model = ModelDirectory.find(path)
        path = model.path
        flow_config, tensors = _stored(model.flow)
    if isinstance(flow_config, FlowConfig) and flow_config.vid_size:
        raise StarflowError(f"{path} makes videos, which the PyTorch reference does not know: use --backend mlx")
    kind: Callable[[Any], STARFlow | PixelFlow] = STARFlow if isinstance(flow_config, FlowConfig) else TarFlow
    if isinstance(flow_config, ITarFlowConfig):
        kind = ITarFlow
    return _fill(kind, flow_config, tensors, path, device, dtype)


def load_text_encoder(
    directory: str | Path,
    device: str | torch.device | None = "cpu",
    dtype: str | torch.dtype | mx.Dtype | None = None,
) -> tuple[T5Encoder, Tokenizer]:
    """The text encoder in a folder, frozen, and its tokenizer; arguments and errors as `load_flow`'s."""
    directory, device = Path(directory), parse_device(device)
    config, tensors = _stored(NetworkDirectory.text_encoder(directory))
    encoder = _fill(T5Encoder, config, tensors, directory, device, parse_dtype(dtype, device))
    return encoder, read_tokenizer(directory / "spiece.model", config)


def load_vae(
    directory: str | Path,
    device: str | torch.device | None = "cpu",
    dtype: str | torch.dtype | mx.Dtype | None = None,
) -> AutoencoderKL:
    """The image autoencoder in a folder, frozen; arguments and errors as `load_flow`'s."""
    directory, device = Path(directory), parse_device(device)
    config, tensors = _stored(NetworkDirectory.vae(directory))
    return _fill(AutoencoderKL, config, tensors, directory, device, parse_dtype(dtype, device))


def _stored(directory: NetworkDirectory[mlx_nn.Module, Any]) -> tuple[Any, dict[str, Stored]]:
    """A network's config, and its tensors in MLX, dense, none of them read yet."""
    network = directory.lazy()
    # Scales too: MLX's CPU backend multiplies by quantized weights in float32.
    network.apply(lambda weight: weight.astype(mx.float32) if mx.issubdtype(weight.dtype, mx.floating) else weight)
    dequantize_module(network)
    return directory.config, {name: as_tensor(array) for name, array in parameters(network).items()}


def _fill(
    kind: Callable[[Any], M],
    config: Any,
    tensors: dict[str, Stored],
    what: str | Path,
    device: torch.device,
    dtype: torch.dtype,
) -> M:
    """The PyTorch network with its tensors, of which one at a time is held twice; `tensors` is emptied."""
    with torch.device("meta"):
        module = kind(config)
    state = {}
    for name in list(tensors):
        try:
            # float64 exists on the CPU alone.
            with mx.stream(mx.cpu):
                values = np.array(tensors.pop(name).read().astype(mx.float32))
        except RuntimeError as error:
            raise StarflowError(f"cannot read {what}: {one_line(error)}") from error
        tensor = torch.from_numpy(values).to(device, dtype)
        # Convolutions are `[out, height, width, in]` in MLX.
        state[name] = tensor.permute(0, 3, 1, 2) if tensor.ndim == 4 else tensor
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)
