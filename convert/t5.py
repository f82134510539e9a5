"""Hugging Face T5 checkpoints to the text encoder's part of a model directory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.t5 import T5Config, T5Encoder, encoder_name, sanitize
from mlx_starflow.tokenizer import Tokenizer

_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
# In order of preference: the first that is there is read.
_WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


def convert_t5(source: str | Path, out_dir: str | Path, *, dtype: str | mx.Dtype | None = None) -> Path:
    """Write the encoder of a T5 checkpoint as `config.json`, `model.safetensors` and `spiece.model`.

    Decoder tensors are not read: shards that hold nothing else need not be there.

    Args:
        source: folder with `config.json`, `spiece.model` and the weights: `model.safetensors` or `pytorch_model.bin`,
            or their shards with an `.index.json`.
        out_dir: folder to write, made if need be.
        dtype: "float32", "bfloat16" or "float16"; None keeps the checkpoint's.

    Returns:
        `out_dir`, where each file was written under another name and renamed, `config.json` last.

    Raises:
        StarflowError: a file is missing or damaged, the checkpoint is not a T5, or its tensors do not fit its config.
    """
    source, out_dir = Path(source), Path(out_dir)
    dtype = _resolve_dtype(dtype)
    if not source.is_dir():
        raise StarflowError(f"{source} is not a folder; give the folder that holds T5's config.json and weights")
    if out_dir.exists() and out_dir.resolve() == source.resolve():
        raise StarflowError(f"{out_dir} is the checkpoint's own folder; give another one to write to")
    config = T5Config.from_dict(_read_json(source / "config.json"))
    spiece = source / "spiece.model"
    tokenizer = Tokenizer(spiece)
    if tokenizer.vocab_size > config.vocab_size:
        raise StarflowError(
            f"{spiece} has {tokenizer.vocab_size} tokens but the model only {config.vocab_size}; "
            "use the spiece.model of this checkpoint"
        )
    tensors = sanitize(_open_weights(source))
    _check_shapes({name: tensor.shape for name, tensor in tensors.items()}, config, source)
    try:
        # One at a time and let go of, so that a cast needs memory for its result alone.
        arrays = {name: _cast(tensors.pop(name).read(), dtype) for name in list(tensors)}
    except RuntimeError as error:
        raise StarflowError(f"cannot read {source}: {_one_line(error)}") from error

    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        temporary = out_dir / "partial.safetensors"
        try:
            mx.save_safetensors(str(temporary), arrays, metadata={"format": "mlx"})
            os.replace(temporary, out_dir / "model.safetensors")
            shutil.copyfile(spiece, temporary)
            os.replace(temporary, out_dir / "spiece.model")
            temporary.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
            os.replace(temporary, out_dir / "config.json")
        finally:
            temporary.unlink(missing_ok=True)
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
        raise StarflowError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise StarflowError(f"{path} is not valid JSON: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise StarflowError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content


class _Tensor(NamedTuple):
    shape: tuple[int, ...]
    read: Callable[[], mx.array]


def _open_weights(source: Path) -> dict[str, _Tensor]:
    """Tensors by name, none of them read yet, from the files that hold some of the encoder's."""
    found = next((name for name in _WEIGHT_FILES if (source / name).is_file()), None)
    if found is None:
        raise StarflowError(f"{source} holds no weights; it needs a model.safetensors or a pytorch_model.bin")
    if not found.endswith(".index.json"):
        return _open_file(source / found)
    index = _read_json(source / found).get("weight_map")
    if not isinstance(index, dict):
        raise StarflowError(f"{source / found} has no weight_map; download it again")
    files = sorted({file for name, file in index.items() if encoder_name(name)})
    return {name: tensor for file in files for name, tensor in _open_file(source / file).items()}


def _open_file(path: Path) -> dict[str, _Tensor]:
    if not path.is_file():
        raise StarflowError(f"{path} is missing; download it into {path.parent}")
    if path.suffix != ".safetensors":
        from mlx_starflow.convert.pth import read_checkpoint

        checkpoint = read_checkpoint(path)
        return {name: _Tensor(checkpoint.shape(name), partial(checkpoint.mx, name)) for name in checkpoint}
    try:
        arrays = mx.load(str(path))
    except RuntimeError as error:
        raise StarflowError(f"cannot read {path}, download it again: {_one_line(error)}") from error
    return {name: _Tensor(array.shape, lambda array=array: array) for name, array in arrays.items()}


def _cast(array: mx.array, dtype: mx.Dtype | None) -> mx.array:
    array = array if dtype is None else array.astype(dtype)
    mx.eval(array)
    return array


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], config: T5Config, source: Path) -> None:
    expected = {name: array.shape for name, array in tree_flatten(T5Encoder(config).parameters())}
    if missing := sorted(expected.keys() - shapes.keys()):
        raise StarflowError(f"{source} lacks the tensor {missing[0]}{_and_more(missing)}; is the download complete?")
    if unexpected := sorted(shapes.keys() - expected.keys()):
        raise StarflowError(
            f"{source} has a tensor that its config does not account for: {unexpected[0]}{_and_more(unexpected)}"
        )
    for name, shape in expected.items():
        if tuple(shapes[name]) != shape:
            raise StarflowError(f"{source}: {name} has shape {tuple(shapes[name])}, but its config says {shape}")


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
