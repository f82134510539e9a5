"""Model directories written again with their flow, their text encoder or both quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.outputs import check_outputs
from mlx_starflow.model_dir.directory import ModelDirectory, NetworkDirectory, read_tokenizer
from mlx_starflow.model_dir.files import ORIGIN_FILE
from mlx_starflow.model_dir.fingerprint import made_of
from mlx_starflow.model_dir.quantization import quantize_module
from mlx_starflow.model_dir.saving import copy_network, read_files, read_notes, save_model
from mlx_starflow.model_dir.transaction import transaction
from mlx_starflow.model_dir.weights import parameters


def quantize_model(
    model: str | Path,
    out: str | Path,
    quantize: int | str | None = None,
    *,
    text_encoder: int | str | None = None,
    group_size: int | None = None,
) -> Path:
    """Write a model directory again with its flow, its text encoder or both quantized.

    Weights that are quantized already are dequantized first, but for layers whose settings stay the same. Autoencoder,
    tokenizer and licences are copied. A tensor is read when it is written, so memory need not hold the dense network.

    Args:
        model: "demo", a model directory or a Hub repository of one.
        out: folder to write, made if need be.
        quantize: how to quantize the flow, a key of `QUANTIZATIONS`; None: it stays as it is.
        text_encoder: the same for the text encoder; "mixed" is for flows alone.
        group_size: weights that share a scale, in both; None: as is usual for each.

    Returns:
        `out`.

    Raises:
        StarflowError: there is no such model, nothing to quantize, it cannot be quantized so, or `out` cannot be
            written or is the model's own folder.
    """
    if quantize is None and text_encoder is None:
        raise StarflowError("nothing to quantize: say how to quantize the flow (--quantize) or --text-encoder")
    source, out = ModelDirectory.find(model), Path(out)
    if out.exists() and out.resolve() == source.path.resolve():
        raise StarflowError(f"{out} is the model's own folder; give another one to write to")
    check_outputs(folders=[out])
    flow_weights, config = _quantized(source.flow, quantize, group_size)
    if text_encoder is not None and not source.has("text_encoder"):
        raise StarflowError(f"{source.path} has no text encoder to quantize; leave out --text-encoder")
    with transaction(out):
        if source.has("text_encoder"):
            folder = source.text_encoder.folder
            read_tokenizer(folder / "spiece.model", source.text_encoder.config)
            weights, text_config = _quantized(source.text_encoder, text_encoder, group_size)
            save_model(out / "text_encoder", weights, text_config, files=read_files(folder, "spiece.model"))
        if source.has("vae"):
            copy_network(source.vae, out / "vae")
        files = {**read_notes(source), ORIGIN_FILE: made_of(source.path, model)}
        return save_model(out, flow_weights, config, files=files)


def _quantized(
    network: NetworkDirectory[nn.Module, Any], how: int | str | None, group_size: int | None
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """A network's tensors, none of them read yet, and its `config.json`, quantized."""
    module = network.lazy()
    if how is None:
        return parameters(module), network.content
    quantization = quantize_module(module, how, group_size)
    return parameters(module), {**network.content, "quantization": quantization}
