"""Tiny models for scoring and editing: a text-to-picture model, and TarFlows of both kinds of noise."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.models.tarflow import TarFlow, TarFlowConfig


def write_tiny_tarflow(directory: Path, **changes: object) -> Path:
    """A random TarFlow over 8x8 pictures in 16 tokens, with 3 classes."""
    values = {
        "img_size": 8,
        "channel_size": 3,
        "patch_size": 2,
        "channels": 32,
        "blocks": 2,
        "layers_per_block": 1,
        "head_dim": 16,
        "num_classes": 3,
    }
    mx.random.seed(0)
    flow = TarFlow(TarFlowConfig(**{**values, **changes}))
    for block in flow.blocks:
        block.proj_out.weight = 0.03 * mx.random.normal(block.proj_out.weight.shape)
        block.pos_embed = 0.5 * mx.random.normal(block.pos_embed.shape)
        if flow.config.num_classes:
            block.class_embed = 0.2 * mx.random.normal(block.class_embed.shape)
    if not flow.config.nvp:
        flow.var = mx.exp(0.5 * mx.random.normal(flow.var.shape))
    return save_model(directory, parameters(flow), {"model_type": "tarflow", **flow.config.to_dict()})


def pictures(count: int = 3, size: tuple[int, int] = (8, 8)) -> list[Image.Image]:
    """Random smooth pictures, each always the same."""
    made = []
    for seed in range(count):
        coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
        made.append(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
    return made


def write_pictures(folder: Path, count: int = 3, size: tuple[int, int] = (8, 8)) -> list[Path]:
    """`pictures` as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.png" for number in range(count)]
    for path, image in zip(paths, pictures(count, size), strict=True):
        image.save(path)
    return paths
