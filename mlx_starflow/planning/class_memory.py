"""How much memory making images of classes takes, computed from the config of their one network: see `memory`."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir.directory import ModelDirectory
from mlx_starflow.model_dir.weights import automatic_dtype, parse_dtype
from mlx_starflow.models.configs import PIPELINE
from mlx_starflow.models.tarflow import PixelFlowConfig, TarFlowBlockConfig
from mlx_starflow.planning import footprint
from mlx_starflow.planning.memory import AS_STORED, MemoryPlan, each_precision, unpacked_layers, weight_bytes
from mlx_starflow.planning.traffic import cast_bytes
from mlx_starflow.sampling.cache import KVBits
from mlx_starflow.sampling.denoise import together


def plan_classes(
    model: str | Path | ModelDirectory,
    *,
    batch: int = 1,
    guidance: float | None = None,
    dtype: str | mx.Dtype | None = None,
    quantization: int | str | None = None,
    kv_bits: KVBits = 0,
) -> MemoryPlan:
    """`memory.plan` of a TarFlow or an iTARFlow, which makes images of one size.

    Args:
        model: a model directory.
        batch: images at once.
        guidance: its weight; None: the model's own.
        dtype: of the flow; None or "auto": what `precision.automatic` says.
        quantization: of the flow, as `convert --quantize` takes it; None: as stored.
        kv_bits: of keys and values, see `cache.KVBits`; 0: as the flow computes them.

    Raises:
        StarflowError: the model is none of classes, its config is not usable, or it cannot be quantized so.
    """
    directory = model if isinstance(model, ModelDirectory) else ModelDirectory(model)
    stored = quantization is None and bool(directory.flow.quantization)
    return _plan(directory, batch, guidance, dtype, quantization, stored, kv_bits)


def _plan(
    directory: ModelDirectory,
    batch: int,
    guidance: float | None,
    dtype: str | mx.Dtype | None,
    quantization: int | str | None,
    stored: bool,
    kv_bits: KVBits,
) -> MemoryPlan:
    """`plan_classes`, with quantized weights as they are stored, or else dense or quantized as is said."""
    config = directory.flow.config
    if not isinstance(config, PixelFlowConfig):
        raise StarflowError(f"{directory.path} reads prompts, not class labels: its memory is planned by plan")
    own = parse_dtype(dtype) or automatic_dtype(quantized_flow=stored or quantization is not None)
    if stored:
        weights = sum(cast_bytes(name, each, own, True) for name, each in directory.flow.weights().items())
    else:
        weights = weight_bytes(directory.flow.new(), own if quantization is None else quantization, own)
    if guidance is None:
        by_config = config.cfg if config.num_classes else 0.0
        guidance = PIPELINE.typed("guidance", "float", directory.pipeline.get("guidance", by_config))
    blocks = class_blocks(directory)
    count = min(batch, together((block, block.num_patches) for block in blocks))
    kv_cache, sampling = footprint.class_sampling(blocks, batch, guidance > 0, own.size, kv_bits)
    # Noise, samples and states.
    held = 4 * 4 * batch * config.channel_size * config.img_size**2
    activations = {
        "flow": held + sampling,
        "verify": held + footprint.class_forward(blocks, count, guidance > 0),
        "denoise": held + footprint.class_score(blocks, count),
    }
    if stored and mx.default_device() == mx.cpu:
        for phase in activations:
            activations[phase] += (2 if phase == "denoise" else 1) * unpacked_layers(blocks)
    return MemoryPlan({"flow": weights}, kv_cache, activations)


def class_blocks(model: ModelDirectory) -> list[TarFlowBlockConfig]:
    """The blocks of a flow of classes. Raises StarflowError if it is none."""
    config = model.flow.config
    if not isinstance(config, PixelFlowConfig):
        raise StarflowError(f"{model.path} reads prompts, not class labels")
    return [config.block(index) for index in range(config.blocks)]


def class_plans(model: ModelDirectory, *, batch: int = 1, kv_bits: KVBits = 0) -> dict[str, MemoryPlan]:
    """The plan of each precision that the flow's layers can be stored in, by the names of `memory.plans`."""
    stored = {}
    if model.flow.quantization:
        stored[AS_STORED] = _plan(model, batch, None, "float32", None, True, kv_bits)
    return stored | each_precision(
        lambda precision, bits: _plan(model, batch, None, "float32" if bits else precision, bits, False, kv_bits)
    )
