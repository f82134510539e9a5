"""Sizes and lengths of the embedded model's networks and of their training."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mlx_starflow.models.autoencoder_kl import AutoencoderKLConfig
from mlx_starflow.models.starflow import FlowConfig
from mlx_starflow.models.t5 import T5Config

NOISE = 0.3
TEXT_LENGTH = 24
PIPELINE = {"guidance": 1.0, "temperature": 0.7}


@dataclass(frozen=True)
class Recipe:
    """Sizes and lengths. Latents are made in shards of `shard` scenes, `shards` in all, one more every `grow` steps."""

    autoencoder: dict
    text: dict
    flow: dict
    autoencoder_steps: int
    autoencoder_batch: int
    flow_steps: int
    flow_batch: int
    flow_lr: float
    shards: int = 12
    shard: int = 5000
    grow: int = 1500
    vocabulary: int = 1200

    def autoencoder_config(self) -> AutoencoderKLConfig:
        plain = {"use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 1.0, "sample_size": 128}
        return AutoencoderKLConfig.from_dict({**plain, **self.autoencoder})

    def text_config(self, vocabulary: int) -> T5Config:
        return T5Config(vocab_size=vocabulary, feed_forward_proj="gated-gelu", d_kv=64, **self.text)

    def flow_config(self) -> FlowConfig:
        return FlowConfig(
            img_size=16,
            channel_size=4,
            head_dim=64,
            txt_size=TEXT_LENGTH,
            txt_dim=self.text["d_model"],
            noise_std=NOISE,
            use_softplus=True,
            use_final_norm=True,
            use_qk_norm=True,
            norm_type="rms_norm",
            soft_clip=4.0,
            **self.flow,
        )


SCENES = Recipe(
    autoencoder={"block_out_channels": [24, 48, 96, 192], "layers_per_block": 1, "norm_num_groups": 8},
    text={"d_model": 256, "d_ff": 640, "num_layers": 3, "num_heads": 4},
    flow={"patch_size": 4, "channels": 256, "top_block_channels": 384, "layers_per_block": [2, 2, 6]},
    autoencoder_steps=8_000,
    autoencoder_batch=8,
    flow_steps=21_000,
    flow_batch=32,
    flow_lr=1e-3,
)

TINY = Recipe(
    autoencoder={"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4},
    text={"d_model": 64, "d_ff": 64, "num_layers": 1, "num_heads": 1},
    flow={"patch_size": 4, "channels": 64, "layers_per_block": [1, 2]},
    autoencoder_steps=3,
    autoencoder_batch=2,
    flow_steps=4,
    flow_batch=4,
    flow_lr=1e-3,
    shards=2,
    shard=8,
    grow=2,
    vocabulary=1200,
)


def on_gpu(recipe: Recipe) -> Recipe:
    """The same networks with what a GPU does in minutes: larger batches, every latent made before the flow starts."""
    return replace(
        recipe, autoencoder_steps=6000, autoencoder_batch=64, flow_steps=16_000, flow_batch=256, flow_lr=1.5e-3, grow=0
    )
