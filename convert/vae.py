"""Autoencoders (SD-VAE, Wan 2.2's of videos) to the autoencoder's part of a model directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_starflow.convert.common import check_target, open_tensors, write_module
from mlx_starflow.convert.distributed import is_distributed
from mlx_starflow.convert.tensor import Tensor
from mlx_starflow.convert.wan import WAN_FILE, WAN_VAE, is_official_wan
from mlx_starflow.errors import StarflowError
from mlx_starflow.errors.arguments import checked
from mlx_starflow.media.files import inside, is_folder, is_regular, read_json
from mlx_starflow.model_dir.weights import parse_dtype
from mlx_starflow.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mlx_starflow.models.autoencoder_tensors import rearranged
from mlx_starflow.models.autoencoder_wan import AutoencoderWan, AutoencoderWanConfig

# In order of preference: the first that is there is read.
_WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "pytorch_model.bin")

SD_VAE: dict[str, Any] = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "sample_size": 256}
"""The architecture of stabilityai/sd-vae-ft-ema, which official image models are trained with."""

# Each half of a fine-tuned SD-VAE as a sequence of two: encoder and quant_conv, post_quant_conv and decoder.
_HALVES = {"encoder.0": "encoder", "encoder.1": "quant_conv", "decoder.0": "post_quant_conv", "decoder.1": "decoder"}


@checked
def convert_vae(
    source: str | Path,
    out_dir: str | Path,
    *,
    dtype: str | mx.Dtype | None = None,
    config: str | Path | None = None,
    later_scale: float | None = None,
) -> Path:
    """Write an AutoencoderKL or a Wan 2.2 AutoencoderKLWan as `config.json` and `model.safetensors`, in MLX's layout.

    The tensors of an AutoencoderKL may have diffusers' names, with the present or the old ones of the attention's
    projections; or the names under which the official release keeps autoencoders with a fine-tuned decoder: diffusers'
    below `vae.`, or `encoder.0`, `encoder.1`, `decoder.0` and `decoder.1` for diffusers' `encoder`, `quant_conv`,
    `post_quant_conv` and `decoder`. Those of an AutoencoderKLWan may have diffusers' names or the ones in the official
    `Wan2.2_VAE.pth`.

    Args:
        source: a diffusers folder with `config.json` and its weights, a checkpoint file of weights alone, or a folder
            with the file `Wan2.2_VAE.pth`.
        out_dir: folder to write, made if need be. An autoencoder that it holds is replaced.
        dtype: "float32", "bfloat16" or "float16"; None keeps the checkpoint's.
        config: diffusers' `config.json`; None: the one beside the weights; if there is none, that of Wan 2.2 for a file
            with the official names of its tensors, else that of SD-VAE.
        later_scale: of a video autoencoder, the factor of all latent frames but a video's first one; None: the
            config's, or else 0.6, with which STARFlow-V was trained.

    Returns:
        `out_dir`. Its `config.json` is written last: a folder that has one is whole.

    Raises:
        StarflowError: a file is missing or damaged, the model is no autoencoder this package knows, or its tensors
            do not fit its config; it has no `later_scale`; or `out_dir` cannot be written or holds another kind of
            model.
    """
    source, out_dir = Path(source), Path(out_dir)
    dtype = parse_dtype(dtype)
    if is_regular(source / WAN_FILE):
        source = source / WAN_FILE
    alone = is_regular(source) or is_distributed(source)
    if not alone and not is_folder(source):
        raise StarflowError(f"{source} is not a folder; give the one with the autoencoder's config.json and weights")
    folder = source.parent if alone else source
    check_target(folder, out_dir)
    config_path = Path(config) if config else folder / "config.json"
    if alone and not config and is_official_wan(open_tensors(source)):
        # A config.json beside it is that of the video model which the file comes with.
        content = WAN_VAE
    elif alone and not config and not is_regular(config_path):
        content = SD_VAE
    else:
        content = read_json(config_path)
    is_video = content.get("_class_name") == WAN_VAE["_class_name"]
    if later_scale is not None:
        if not is_video:
            raise StarflowError("later_scale is a video autoencoder's; this one is an AutoencoderKL, of pictures")
        content = {**content, "later_scale": later_scale}
    try:
        vae = _network(content, is_video)
    except StarflowError as error:
        raise StarflowError(f"{config_path}: {error}") from None
    weights_path = source if alone else _weights_path(folder)
    tensors = open_tensors(weights_path)
    try:
        tensors = tensors if is_video else _diffusers_names(tensors)
        sources = vae.sources({name: tensor.shape for name, tensor in tensors.items()})
    except StarflowError as error:
        raise StarflowError(f"{weights_path}: {error}") from None
    arranged = {name: _rearranged(tensors.pop(source), shape) for name, (source, shape) in sources.items()}
    return write_module(out_dir, vae, arranged, vae.config.to_dict(), source=weights_path, dtype=dtype)


def _network(content: Mapping[str, Any], is_video: bool) -> AutoencoderKL | AutoencoderWan:
    if is_video:
        return AutoencoderWan(AutoencoderWanConfig.from_dict(content))
    return AutoencoderKL(AutoencoderKLConfig.from_dict(content))


def _rearranged(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return Tensor(shape, tensor.dtype, lambda: rearranged(tensor.read(), shape))


def _weights_path(folder: Path) -> Path:
    found = next((folder / name for name in _WEIGHT_FILES if is_regular(folder / name)), None)
    if found is None:
        raise StarflowError(f"{folder} holds neither {' nor '.join(_WEIGHT_FILES)}; download one of them into it")
    return inside(folder, found.name)


def _diffusers_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if all(name.startswith("vae.") for name in tensors):
        tensors = {name.removeprefix("vae."): tensor for name, tensor in tensors.items()}
    out = {}
    for name, tensor in tensors.items():
        half = ".".join(name.split(".")[:2])
        new = _HALVES[half] + name.removeprefix(half) if half in _HALVES else name
        if new in out:
            raise StarflowError(f"the autoencoder's tensor {new} is there twice, the second time as {name}")
        out[new] = tensor
    return out
