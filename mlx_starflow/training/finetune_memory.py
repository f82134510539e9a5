"""How much memory fine-tuning a flow takes, computed from its config before anything is loaded.

Every term counts bytes of arrays that exist at once. The constants were fitted to what MLX's CPU backend holds in small
runs; a test keeps the sum within 25% of measured peaks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_starflow.memory import usable
from mlx_starflow.models.starflow import FlowConfig
from mlx_starflow.quantization import quantized_layers
from mlx_starflow.training.adapters import adapter_layers

MACS = (16, 32, 64)
"""Memory, in GiB, of the Macs that a plan names."""

BATCH_SIZES = (32, 16, 8, 4, 2, 1)


@dataclass(frozen=True)
class TrainingPlan:
    """What one step takes, in bytes.

    Attributes:
        weights: of the flow, and of the frozen copy of it that anchoring a full fine-tuning needs.
        gradients, optimizer: of what is trained; the latter is AdamW's two moments and the averaged weights.
        activations: with layers computed again for the gradient, and what else a step holds for a while.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def peak(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = ("weights", "gradients", "optimizer", "activations", "peak")
        return "\n".join(f"{part:<12}{getattr(self, part) / 2**20:12,.1f} MiB" for part in parts)


def training_plan(flow: nn.Module, batch_size: int, *, tokens: int | None = None, copy: bool = False) -> TrainingPlan:
    """Memory of training steps of `batch_size` samples.

    Args:
        flow: with adapters or without, frozen as it will be trained; its numbers are not computed.
        batch_size: samples a step, those of the anchor among them.
        tokens: of a sample; None: as the flow was trained.
        copy: a frozen copy of the flow is held besides.
    """
    config: FlowConfig = flow.config
    stored = sum(array.nbytes for _, array in tree_flatten(flow.parameters()))
    trained = sum(array.nbytes for _, array in tree_flatten(flow.trainable_parameters()))
    tokens = tokens or (config.img_size // config.patch_size) ** 2
    adapted = adapter_layers(flow).values()
    dense = sum(math.prod(layer.lora_a.shape[:1] + layer.lora_b.shape[1:]) for layer in adapted if "m" in layer)
    # Quantized layers are unpacked for each product, and DoRA computes whole weights.
    unpacked = [layer.weight.size * 32 // layer.bits for layer in quantized_layers(flow).values()]
    work = _activations(config, tokens, batch_size) + 4 * (8.5 * max(unpacked, default=0) + 0.9 * dense)
    return TrainingPlan(
        weights=stored * (2 if copy else 1),
        gradients=trained,
        optimizer=3 * trained,
        # The optimizer's new numbers come when activations have gone.
        activations=int(max(work - trained, 2.4 * trained)),
    )


def _activations(config: FlowConfig, tokens: int, batch: int) -> float:
    """7.5 times what each layer reads; and in one layer, forwards and backwards, 4 x heads x positions^2 (attention's
    weights are not fused under a gradient) and 15.5 hidden layers of the MLP."""
    kept = work = 0.0
    for block in config.blocks:
        positions = tokens + (config.txt_size if block.txt_dim else 0)
        kept += 7.5 * block.num_layers * positions * block.channels
        if block.num_layers:
            logits = block.num_heads * positions**2
            work = max(work, 4 * logits + 15.5 * positions * block.channels * block.expansion)
    return 4 * batch * (kept + work)


def fitting_batch(flow: nn.Module, memory: float, *, most: int = 16, **settings: object) -> int:
    """The largest of `BATCH_SIZES`, up to `most`, whose plan fits into `memory` bytes; 0 if none does."""
    for size in BATCH_SIZES:
        if size <= most and training_plan(flow, size, **settings).peak <= memory:
            return size
    return 0


def macs(flow: nn.Module, **settings: object) -> str:
    """A line for each Mac in `MACS`: the batch size that is chosen there."""
    lines = []
    for gigabytes in MACS:
        size = fitting_batch(flow, usable(gigabytes * 2**30), **settings)
        lines.append(f"{gigabytes} GB Mac: " + (f"batch size {size}" if size else "does not fit"))
    return "\n".join(lines)
