"""Hugging Face T5 checkpoints to the text encoder's part of a model directory."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from mlx_starflow.convert.common import check_target, open_tensors, write_module
from mlx_starflow.convert.tensor import Tensor
from mlx_starflow.errors import StarflowError
from mlx_starflow.errors.arguments import checked
from mlx_starflow.media.files import inside, is_folder, is_regular, read_bytes, read_json
from mlx_starflow.model_dir.directory import read_tokenizer
from mlx_starflow.model_dir.files import read_index
from mlx_starflow.model_dir.weights import parse_dtype
from mlx_starflow.models.t5 import T5Config, T5Encoder, encoder_name, sanitize

# In order of preference: the first that is there is read.
_WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


@checked
def convert_t5(
    source: str | Path,
    out_dir: str | Path,
    *,
    quantize: int | str | None = None,
    dtype: str | mx.Dtype | None = None,
) -> Path:
    """Write the encoder of a T5 checkpoint as `config.json`, `model*.safetensors` and `spiece.model`.

    Decoder tensors are not read: shards that hold nothing else need not be there.

    Args:
        source: folder with `config.json`, `spiece.model` and the weights: `model.safetensors` or `pytorch_model.bin`,
            or their shards with an `.index.json`.
        out_dir: folder to write, made if need be. A text encoder that it holds is replaced.
        quantize: 8, 6 or 4 bits, "mxfp8", "mxfp4" or "nvfp4"; None leaves the weights as they are.
        dtype: "float32", "bfloat16" or "float16"; None keeps the checkpoint's.

    Returns:
        `out_dir`, where each file was written under another name and renamed, `config.json` last.

    Raises:
        StarflowError: a file is missing or damaged, the checkpoint is not a T5, its tensors do not fit its config, or
            `out_dir` cannot be written or holds another kind of model.
    """
    source, out_dir = Path(source), Path(out_dir)
    dtype = parse_dtype(dtype)
    if not is_folder(source):
        raise StarflowError(f"{source} is not a folder; give the folder that holds T5's config.json and weights")
    check_target(source, out_dir)
    config = T5Config.from_dict(read_json(inside(source, "config.json")))
    spiece = source / "spiece.model"
    read_tokenizer(spiece, config)
    return write_module(
        out_dir,
        T5Encoder(config),
        sanitize(_open_weights(source)),
        config.to_dict(),
        source=source,
        dtype=dtype,
        quantize=quantize,
        files={"spiece.model": read_bytes(spiece)},
    )


def _open_weights(source: Path) -> dict[str, Tensor]:
    """Tensors by name, none of them read yet, from the files that hold some of the encoder's."""
    found = next((name for name in _WEIGHT_FILES if is_regular(source / name)), None)
    if found is None:
        raise StarflowError(f"{source} holds no weights; it needs a model.safetensors or a pytorch_model.bin")
    files = [found]
    if found.endswith(".index.json"):
        files = sorted({file for name, file in read_index(source / found).items() if encoder_name(name)})
    if absent := [file for file in files if not is_regular(source / file)]:
        raise StarflowError(f"{source / absent[0]} is missing; download it into {source}")
    return {name: tensor for file in files for name, tensor in open_tensors(inside(source, file)).items()}
