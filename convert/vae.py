"""diffusers' AutoencoderKL folders (SD-VAE) to the autoencoder's part of a model directory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig

_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
# In order of preference: the first that is there is read.
_WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def convert_vae(source: str | Path, out_dir: str | Path, *, dtype: str | mx.Dtype | None = None) -> Path:
    """Write a diffusers AutoencoderKL as `config.json` and `model.safetensors`, in MLX's layout.

    Args:
        source: folder with `config.json` and `diffusion_pytorch_model.safetensors` or `.bin`, with the present or the
            old names of the attention's projections.
        out_dir: folder to write, made if need be.
        dtype: "float32", "bfloat16" or "float16"; None keeps the checkpoint's.

    Returns:
        `out_dir`. Its `config.json` is written last: a folder that has one is whole.

    Raises:
        StarflowError: a file is missing or damaged, the model is no AutoencoderKL this package knows, or its tensors
            do not fit its config.
    """
    source, out_dir = Path(source), Path(out_dir)
    dtype = _resolve_dtype(dtype)
    if not source.is_dir():
        raise StarflowError(f"{source} is not a folder; give the one with the autoencoder's config.json and weights")
    if out_dir.exists() and out_dir.samefile(source):
        raise StarflowError(f"{out_dir} is the checkpoint's own folder; give another one to write to")
    config_path = source / "config.json"
    try:
        config = AutoencoderKLConfig.from_dict(_read_json(config_path))
    except StarflowError as error:
        raise StarflowError(f"{config_path}: {error}") from None
    weights_path = next((source / name for name in _WEIGHT_FILES if (source / name).is_file()), None)
    if weights_path is None:
        raise StarflowError(f"{source} holds neither {' nor '.join(_WEIGHT_FILES)}; download one of them into it")
    weights = _read_weights(weights_path)
    try:
        weights = AutoencoderKL(config).sanitize(weights)
    except StarflowError as error:
        raise StarflowError(f"{weights_path}: {error}") from None
    for name, weight in weights.items():
        if dtype is not None or weight.dtype not in _DTYPES.values():
            weights[name] = weight.astype(dtype or mx.float32)

    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        partial = out_dir / "partial.safetensors"
        try:
            mx.save_safetensors(str(partial), weights, metadata={"format": "mlx"})
            os.replace(partial, out_dir / "model.safetensors")
            partial.write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
            os.replace(partial, out_dir / "config.json")
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        raise StarflowError(f"cannot write {out_dir}: {_one_line(error)}") from error
    return out_dir


def _resolve_dtype(dtype: str | mx.Dtype | None) -> mx.Dtype | None:
    if dtype is None or dtype in _DTYPES.values():
        return dtype
    if dtype not in _DTYPES:
        raise StarflowError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StarflowError(error.strerror or str(error)) from error
    except ValueError as error:
        raise StarflowError(f"not valid JSON: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise StarflowError(f"it holds a JSON {type(content).__name__}, not an object")
    return content


def _read_weights(path: Path) -> dict[str, mx.array]:
    if path.suffix == ".safetensors":
        try:
            return mx.load(str(path))
        except RuntimeError as error:
            raise StarflowError(f"cannot read {path}, download it again: {_one_line(error)}") from error
    from mlx_starflow.convert.pth import read_checkpoint

    checkpoint = read_checkpoint(path)
    return {name: checkpoint.mx(name) for name in checkpoint}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
