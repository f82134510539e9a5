"""diffusers' AutoencoderKL folders (SD-VAE) to the autoencoder's part of a model directory."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from mlx_starflow.convert.common import as_tensor, check_target, open_tensors, write_module
from mlx_starflow.errors import StarflowError
from mlx_starflow.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mlx_starflow.weights import parse_dtype, read_json

# In order of preference: the first that is there is read.
_WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def convert_vae(source: str | Path, out_dir: str | Path, *, dtype: str | mx.Dtype | None = None) -> Path:
    """Write a diffusers AutoencoderKL as `config.json` and `model.safetensors`, in MLX's layout.

    Args:
        source: folder with `config.json` and `diffusion_pytorch_model.safetensors` or `.bin`, with the present or the
            old names of the attention's projections.
        out_dir: folder to write, made if need be. An autoencoder that it holds is replaced.
        dtype: "float32", "bfloat16" or "float16"; None keeps the checkpoint's.

    Returns:
        `out_dir`. Its `config.json` is written last: a folder that has one is whole.

    Raises:
        StarflowError: a file is missing or damaged, the model is no AutoencoderKL this package knows, or its tensors
            do not fit its config; or `out_dir` cannot be written or holds another kind of model.
    """
    source, out_dir = Path(source), Path(out_dir)
    dtype = parse_dtype(dtype)
    if not source.is_dir():
        raise StarflowError(f"{source} is not a folder; give the one with the autoencoder's config.json and weights")
    check_target(source, out_dir)
    config_path = source / "config.json"
    content = read_json(config_path)
    try:
        config = AutoencoderKLConfig.from_dict(content)
    except StarflowError as error:
        raise StarflowError(f"{config_path}: {error}") from None
    weights_path = next((source / name for name in _WEIGHT_FILES if (source / name).is_file()), None)
    if weights_path is None:
        raise StarflowError(f"{source} holds neither {' nor '.join(_WEIGHT_FILES)}; download one of them into it")
    vae = AutoencoderKL(config)
    try:
        # Small enough to be read whole, which its change of layout needs.
        weights = vae.sanitize({name: tensor.read() for name, tensor in open_tensors(weights_path).items()})
    except StarflowError as error:
        raise StarflowError(f"{weights_path}: {error}") from None
    tensors = {name: as_tensor(weight) for name, weight in weights.items()}
    return write_module(out_dir, vae, tensors, config.to_dict(), source=weights_path, dtype=dtype)
