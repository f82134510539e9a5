"""A complete text-to-picture model with random weights, small enough to make in a test."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from helpers.paths import DATA
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mlx_starflow.models.autoencoder_wan.network import AutoencoderWan, AutoencoderWanConfig
from mlx_starflow.models.starflow import FlowConfig, STARFlow
from mlx_starflow.models.t5 import T5Config, T5Encoder

SPIECE = DATA / "t5/spiece.model"


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
    mx.random.seed(4)
    vae = AutoencoderKL(AutoencoderKLConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4))
    return _write(directory, tiny_flow(), vae)


def tiny_video_flow(**changes: object) -> STARFlow:
    """A random flow over videos of 5 latent frames of 2x2, with a learned denoiser, in the released model's shape."""
    values = {
        "img_size": 2,
        "channel_size": 4,
        "top_block_channels": 96,
        "layers_per_block": [1, 1, 1],
        "head_dim": 32,
        "vid_size": "17:16",
        "mix_aspect": True,
        "fps_cond": True,
        "cond_noise_level": True,
        "noise_std": 0.5,
        "txt_size": 72,
        "cfg": 1.5,
        "use_final_norm": True,
        "temporal_causal": 2,
        "shallow_block_local": True,
        "learnable_self_denoiser": True,
        "conditional_denoiser": True,
        "denoiser_window": 3,
    }
    flow = tiny_flow(**{**values, **changes})
    out = flow.learnable_self_denoiser.proj_out
    out.weight = 0.05 * mx.random.normal(out.weight.shape)
    return flow


def write_tiny_video_model(directory: Path, **changes: object) -> Path:
    """Write a model directory that makes videos of 17 frames of 32x32; `changes` are the flow config's."""
    flow = tiny_video_flow(**changes)
    channels = flow.config.channel_size
    mx.random.seed(1)
    config = AutoencoderWanConfig(
        latents_mean=(0.1,) * channels, latents_std=(1.5,) * channels, base_dim=4, decoder_base_dim=4, z_dim=channels,
        num_res_blocks=1,
    )  # fmt: skip
    return _write(directory, flow, AutoencoderWan(config))


def _write(directory: Path, flow: STARFlow, vae: AutoencoderKL | AutoencoderWan) -> Path:
    config = {"model_type": "starflow", **flow.config.to_dict()}
    if not flow.config.vid_size:
        config["pipeline"] = {"guidance": 1.0, "temperature": 0.8}
    save_model(directory, dict(tree_flatten(flow.parameters())), config)
    encoder = T5Encoder(T5Config(vocab_size=1000, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4))
    save_model(directory / "text_encoder", dict(tree_flatten(encoder.parameters())), encoder.config.to_dict())
    shutil.copy(SPIECE, directory / "text_encoder/spiece.model")
    save_model(directory / "vae", dict(tree_flatten(vae.parameters())), vae.config.to_dict())
    return directory
