"""The base of a fine-tuning: how it is held, what of it is trained, and what of that fits into memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from mlx_starflow.errors import StarflowError
from mlx_starflow.kernels.memory import available
from mlx_starflow.model_dir.directory import ModelDirectory, load_flow
from mlx_starflow.model_dir.quantization import dequantize_module, quantize_module, quantized_layers
from mlx_starflow.model_dir.weights import parameters, parse_dtype, training_dtype
from mlx_starflow.models.starflow import STARFlow
from mlx_starflow.planning.finetune_memory import BATCH_SIZES, PRECISIONS, RANKS, Choice, Planner
from mlx_starflow.training.config import MOMENTS
from mlx_starflow.training.finetuning.adapters import attach
from mlx_starflow.training.finetuning.config import FinetuneConfig
from mlx_starflow.training.loop import distributed

HALF = (mx.bfloat16, mx.float16)


def plan_finetune(model: str | Path, config: FinetuneConfig, memory: float | None = None) -> tuple[Choice, str]:
    """What `finetune` will do in `memory` bytes (None: those of this machine), and what it would do on some Macs.

    Nothing but the headers of the weights is read. Raises StarflowError, also if nothing fits.
    """
    directory = ModelDirectory.find(model)
    planner = finetune_planner(lambda: lazy_flow(directory, held_dtype(config)), config)
    memory = available() if memory is None else memory
    choice = planner.choose(memory)
    if choice is None:
        raise StarflowError(
            f"fine-tuning {model} does not fit into this machine's memory ({memory / 2**30:.1f} GiB): "
            "train fewer --blocks, with a smaller --batch-size" + (" or an adapter" if config.kind == "full" else "")
        )
    # The processes of mlx.launch, and the parts of a batch, each take so many samples at once.
    choice = replace(choice, batch_size=choice.batch_size * batch_parts(config))
    on_mac = finetune_planner(lambda: lazy_flow(directory, held_dtype(config, mx.bfloat16)), config, mx.bfloat16)
    return choice, on_mac.macs()


def batch_parts(config: FinetuneConfig) -> int:
    """How many parts a batch is computed in, by all processes together."""
    return config.accumulate * distributed.world().size()


def computed_dtype(config: FinetuneConfig, default: mx.Dtype | None = None) -> mx.Dtype:
    """What networks compute in; `default` is the machine's dtype, None: this machine's."""
    return parse_dtype(config.dtype) or default or training_dtype()


def held_dtype(config: FinetuneConfig, default: mx.Dtype | None = None) -> mx.Dtype:
    """What the flow's weights are held in: float32 where all of them are trained, since half precision rounds the
    steps of a small learning rate away."""
    return mx.float32 if config.kind == "full" else computed_dtype(config, default)


def finetune_planner(
    make_flow: Callable[[], STARFlow], config: FinetuneConfig, default: mx.Dtype | None = None
) -> Planner:
    """The planner of a fine-tuning.

    Args:
        make_flow: makes the base, whose numbers are not computed.
        config: of the fine-tuning.
        default: the dtype of the machine that is planned for; None: this one's.
    """

    def trained(quantization: str | None, rank: int) -> STARFlow:
        flow = make_flow()
        make_trainable(flow, config, quantization, rank)
        return flow

    adapters = config.kind != "full"
    precisions: tuple[str | None, ...] = (None,)
    if adapters and config.quantize == "auto" and not quantized_layers(make_flow()):
        precisions = PRECISIONS
    elif config.quantize not in ("auto", "none"):
        precisions = (config.quantize,)
    sizes = [size for size in BATCH_SIZES if size > 1 or not config.anchor]
    return Planner(
        trained,
        precisions=precisions,
        ranks=(0,) if not adapters else (config.rank,) if config.rank else RANKS,
        batch_sizes=[max(config.batch_size // batch_parts(config), 1)] if config.batch_size else sizes,
        checkpoint=config.checkpoint_layers,
        copy=bool(config.anchor) and not adapters,
        average=config.ema > 0,
        moments=MOMENTS[config.optimizer],
        half=not adapters and computed_dtype(config, default) in HALF,
    )


def lazy_flow(model: ModelDirectory, dtype: mx.Dtype) -> STARFlow:
    """A model directory's flow; each tensor is read when it is computed with."""
    if not model.reads_prompts:
        raise StarflowError(f"{model.path} does not read captions: fine-tuning is for models of latents and prompts")
    flow = model.flow.lazy()
    assert isinstance(flow, STARFlow)  # no other flow reads prompts
    flow.set_dtype(dtype)
    return flow


def load_base(model: str | Path, quantization: str | None, dtype: mx.Dtype) -> STARFlow:
    """A model's flow, quantized if need be; its dense weights are never in memory all at once."""
    if quantization is None:
        dense = load_flow(model, dtype=dtype)
        assert isinstance(dense, STARFlow)
        return dense
    flow = lazy_flow(ModelDirectory.find(model), dtype)
    quantize_module(flow, quantization)
    for array in parameters(flow).values():
        mx.eval(array)
    return flow


def make_trainable(flow: STARFlow, config: FinetuneConfig, quantization: str | None, rank: int) -> None:
    """Quantize the flow, and put adapters on it or make all of its weights trainable, in place."""
    if quantization is not None:
        quantize_module(flow, quantization)
    if adapter := config.adapter(rank):
        attach(flow, adapter, config.seed)
    else:
        dequantize_module(flow)
        flow.unfreeze()
