"""Model directories back to PyTorch: official names and layouts, no PyTorch needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_starflow.convert.archive import check_archive_name, write_archive
from mlx_starflow.convert.common import Tensor, as_tensor
from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.media.outputs import check_outputs
from mlx_starflow.model_dir.files import Spec, load_weights, read_config
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mlx_starflow.models.autoencoder_wan.names import diffusers_tensor
from mlx_starflow.models.tarflow import TarFlowConfig


def export_model(directory: str | Path, path: str | Path) -> Path:
    """Write a flow, or a model directory's `text_encoder/` or `vae/`, as the checkpoint it could have come from.

    Unquantized weights come back bit for bit; quantized ones are dequantized, so they are close to what they were made
    of, not equal. Tensors are read and written one at a time.

    * STARFlow: the weights. Its official programs load with `strict=False` and make the buffers they need themselves.
    * TarFlow: the weights and the blocks' `attn_mask`, without which a strict load fails.
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
    config = read_config(directory)
    if path.parent.resolve() == directory.resolve():
        raise StarflowError(f"{path} is in the model's own folder; write the checkpoint to another one")
    check_outputs([path] if path.parent.is_dir() else [], folders=[path.parent])
    model_type = config.get("model_type")
    if model_type not in _LAYOUTS:
        raise StarflowError(
            f"{directory / 'config.json'}: model_type {model_type!r} is not known; it must be one of "
            + ", ".join(map(repr, _LAYOUTS))
        )
    tensors = _dense(directory, load_weights(directory), config.get("quantization"))
    try:
        if (change := _LAYOUTS[model_type]) is not None:
            change(tensors, config)
    except StarflowError as error:
        raise StarflowError(f"{directory / 'config.json'}: {error}") from None
    layout = {name: Spec(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    return write_archive(path, layout, _arrays(tensors, directory))


def _arrays(tensors: dict[str, Tensor], directory: Path) -> Iterator[tuple[str, mx.array]]:
    for name in list(tensors):
        try:
            array = tensors.pop(name).read()
            mx.eval(array)
        except RuntimeError as error:
            raise StarflowError(f"cannot read {directory}: {one_line(error)}") from error
        yield name, array


# ---- quantized weights


def _dense(
    directory: Path, weights: Mapping[str, mx.array], quantization: Mapping[str, Any] | None
) -> dict[str, Tensor]:
    """A model directory's tensors, those of quantized layers dequantized when they are read."""
    layers = {name.removesuffix(".scales") for name in weights if name.endswith(".scales")}
    if not isinstance(quantization, Mapping):
        if layers:
            raise StarflowError(f"{directory}: the weights are quantized, but config.json has no quantization")
        quantization = {}
    dense = (array.dtype for array in weights.values() if array.dtype in (mx.float32, mx.bfloat16, mx.float16))
    dtype = next(dense, mx.float32)
    tensors = {}
    for name, array in weights.items():
        path, _, kind = name.rpartition(".")
        if path in layers and kind in ("scales", "biases"):
            continue
        if path in layers and kind == "weight":
            own = quantization.get(path)
            settings = own if isinstance(own, Mapping) else quantization
            how: dict[str, Any] = {key: settings.get(key) for key in ("group_size", "bits")}
            how["mode"] = settings.get("mode", "affine")
            try:
                # Computed when it is written: here it only says its shape.
                array = mx.dequantize(array, weights[f"{path}.scales"], weights.get(f"{path}.biases"), **how)
            except (TypeError, ValueError) as error:
                raise StarflowError(f"{directory}: {path} is not quantized as its config says: {error}") from error
            array = array.astype(dtype)
        tensors[name] = as_tensor(array)
    return tensors


# ---- official layouts


def _tarflow(tensors: dict[str, Tensor], config: Mapping[str, Any]) -> None:
    flow = TarFlowConfig.from_dict(config)
    shape = (flow.num_patches, flow.num_patches)
    for index in range(flow.blocks):
        tensors[f"blocks.{index}.attn_mask"] = Tensor(shape, mx.float32, partial(mx.tri, flow.num_patches))


def _autoencoder(tensors: dict[str, Tensor], config: Mapping[str, Any]) -> None:
    for name, parameter in parameters(AutoencoderKL(AutoencoderKLConfig.from_dict(config))).items():
        if parameter.ndim == 4 and name in tensors and len(tensors[name].shape) == 4:
            tensors[name] = as_tensor(tensors[name].read().transpose(0, 3, 1, 2))


def _video_autoencoder(tensors: dict[str, Tensor], _: Mapping[str, Any]) -> None:
    for name in list(tensors):
        present, weight = diffusers_tensor(name, tensors.pop(name).read())
        tensors[present] = as_tensor(weight)


_LAYOUTS: dict[str, Callable[[dict[str, Tensor], Mapping[str, Any]], None] | None] = {
    "starflow": None,
    "tarflow": _tarflow,
    "t5": None,
    "autoencoder_kl": _autoencoder,
    "autoencoder_wan": _video_autoencoder,
}
"""By `model_type`, what makes the official tensors of a model directory's, in place; None: they are the same."""
