"""Model directories back to PyTorch: official names and layouts, no PyTorch needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_starflow.convert.archive import check_archive_name, write_archive
from mlx_starflow.convert.common import as_tensor
from mlx_starflow.convert.tensor import Tensor
from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.errors.arguments import checked
from mlx_starflow.media.outputs import check_outputs
from mlx_starflow.model_dir.directory import NetworkDirectory
from mlx_starflow.model_dir.files import Spec, read_config
from mlx_starflow.model_dir.quantization import dequantize_module
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.models.autoencoder_kl import AutoencoderKLConfig
from mlx_starflow.models.autoencoder_wan import AutoencoderWanConfig
from mlx_starflow.models.autoencoder_wan.names import diffusers_tensor
from mlx_starflow.models.itarflow import ITarFlowConfig
from mlx_starflow.models.tarflow import TarFlowConfig


@checked
def export_model(directory: str | Path, path: str | Path) -> Path:
    """Write a flow, or a model directory's `text_encoder/` or `vae/`, as the checkpoint it could have come from.

    Unquantized weights come back bit for bit; quantized ones are dequantized, so they are close to what they were made
    of, not equal. Tensors are read and written one at a time.

    * STARFlow: the weights. Its official programs load with `strict=False` and make the buffers they need themselves.
    * TarFlow: the weights and the blocks' `attn_mask`, without which a strict load fails.
    * iTARFlow: the same, and the shared layers under each block's name too.
    * Text encoder: what Hugging Face's `T5EncoderModel` calls its tensors.
    * Autoencoder: diffusers' `AutoencoderKL` or, of videos, `AutoencoderKLWan`, convolutions as `[out, in, kh, kw]` or
      `[out, in, kt, kh, kw]`.

    Args:
        directory: a model directory.
        path: file to write, `.pth` for `torch.load` or `.safetensors`; replaced if it exists.

    Returns:
        `path`.

    Raises:
        StarflowError: the directory is not a whole model's, or the file cannot be written or would replace the model's
            own.
    """
    directory, path = Path(directory), Path(path)
    check_archive_name(path)
    model_type = read_config(directory).get("model_type")
    if path.parent.resolve() == directory.resolve():
        raise StarflowError(f"{path} is in the model's own folder; write the checkpoint to another one")
    check_outputs([path] if path.parent.is_dir() else [], folders=[path.parent])
    if model_type not in _LAYOUTS:
        raise StarflowError(
            f"{directory / 'config.json'}: model_type {model_type!r} is not known; it must be one of "
            + ", ".join(map(repr, _LAYOUTS))
        )
    open_network, change = _LAYOUTS[model_type]
    stored = open_network(directory)
    tensors = _dense(stored.lazy())
    if change is not None:
        change(tensors, stored.config)
    layout = {name: Spec(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    return write_archive(path, layout, _arrays(tensors, directory))


def _dense(network: nn.Module) -> dict[str, Tensor]:
    """A network's tensors, those of quantized layers dequantized when they are read."""
    dequantize_module(network)
    return {name: as_tensor(array) for name, array in parameters(network).items()}


def _arrays(tensors: dict[str, Tensor], directory: Path) -> Iterator[tuple[str, mx.array]]:
    for name in list(tensors):
        try:
            array = tensors.pop(name).read()
            mx.eval(array)
        except RuntimeError as error:
            raise StarflowError(f"cannot read {directory}: {one_line(error)}") from error
        yield name, array


# ---- official layouts


def _tarflow(tensors: dict[str, Tensor], config: TarFlowConfig) -> None:
    length = config.num_patches
    for index in range(config.blocks):
        tensors[f"blocks.{index}.attn_mask"] = Tensor((length, length), mx.float32, partial(mx.tri, length))


def _itarflow(tensors: dict[str, Tensor], config: ITarFlowConfig) -> None:
    for name in list(tensors):
        tensors[name.replace(".attn_blocks.", ".head_blocks.")] = tensors.pop(name)
    shared = {name: tensor for name, tensor in tensors.items() if name.startswith("shared_backbone.")}
    for index in range(config.blocks):
        length = config.block(index).num_patches
        tensors[f"blocks.{index}.attn_mask"] = Tensor((length, length), mx.float32, partial(mx.tri, length))
        tensors.update({f"blocks.{index}.{name}": tensor for name, tensor in shared.items()})


def _autoencoder(tensors: dict[str, Tensor], _: AutoencoderKLConfig) -> None:
    for name, tensor in tensors.items():
        if len(tensor.shape) == 4:
            tensors[name] = as_tensor(tensor.read().transpose(0, 3, 1, 2))


def _video_autoencoder(tensors: dict[str, Tensor], _: AutoencoderWanConfig) -> None:
    for name in list(tensors):
        present, weight = diffusers_tensor(name, tensors.pop(name).read())
        tensors[present] = as_tensor(weight)


_Open = Callable[[Path], NetworkDirectory[nn.Module, Any]]

_LAYOUTS: dict[str, tuple[_Open, Callable[[dict[str, Tensor], Any], None] | None]] = {
    "starflow": (NetworkDirectory.flow, None),
    "tarflow": (NetworkDirectory.flow, _tarflow),
    "itarflow": (NetworkDirectory.flow, _itarflow),
    "t5": (NetworkDirectory.text_encoder, None),
    "autoencoder_kl": (NetworkDirectory.vae, _autoencoder),
    "autoencoder_wan": (NetworkDirectory.vae, _video_autoencoder),
}
"""By `model_type`: what opens the folder, and what makes the official tensors of the network's, in place, if they are
other ones."""
