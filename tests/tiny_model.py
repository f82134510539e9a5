"""A complete text-to-picture model with random weights, small enough to make in a test."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_starflow.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mlx_starflow.models.starflow import FlowConfig, STARFlow
from mlx_starflow.models.t5 import T5Config, T5Encoder
from mlx_starflow.saving import save_model

SPIECE = Path(__file__).parent / "data/t5/spiece.model"


def tiny_flow(**changes: object) -> STARFlow:
    """A random flow over 4x4 latents whose blocks are not the identity."""
    values = {
        "img_size": 4,
        "channel_size": 4,
        "patch_size": 1,
        "channels": 64,
        "layers_per_block": [1, 1],
        "txt_size": 6,
        "txt_dim": 32,
        "use_softplus": True,
        "soft_clip": 4.0,
    }
    mx.random.seed(0)
    flow = STARFlow(FlowConfig(**{**values, **changes}))
    for block in flow.blocks:
        block.proj_out.weight = 0.05 * mx.random.normal(block.proj_out.weight.shape)
    return flow


def write_tiny_model(directory: Path) -> Path:
    """Write a model directory that `mlx_starflow.load` reads; pictures are 8x8."""
    flow = tiny_flow()
    config = {"model_type": "starflow", **flow.config.to_dict(), "pipeline": {"guidance": 1.0, "temperature": 0.8}}
    save_model(directory, dict(tree_flatten(flow.parameters())), config)
    encoder = T5Encoder(T5Config(vocab_size=1000, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4))
    save_model(directory / "text_encoder", dict(tree_flatten(encoder.parameters())), encoder.config.to_dict())
    shutil.copy(SPIECE, directory / "text_encoder/spiece.model")
    vae = AutoencoderKL(AutoencoderKLConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4))
    save_model(directory / "vae", dict(tree_flatten(vae.parameters())), vae.config.to_dict())
    return directory
