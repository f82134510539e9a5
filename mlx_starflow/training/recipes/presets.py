"""Sizes to choose from: of a whole text-to-image model, and of a flow alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.autoencoder_kl import AutoencoderKLConfig
from mlx_starflow.models.starflow import FlowConfig
from mlx_starflow.models.t5 import T5Config
from mlx_starflow.training.config import TrainingConfig, TrainingOptions


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Sizes of the networks and lengths of their trainings.

    Attributes:
        size: side of the images in pixels.
        autoencoder, text_encoder, flow: of their configs, what does not follow from the others.
        fits_text: whether the flow reads as many tokens as the longest caption has; it reads `txt_size` at least.
        vocab_size: most pieces of the tokenizer.
        views: random views of each image that the flow sees.
        autoencoder_training, flow_training: how both are trained.
        pipeline: what the model directory says about sampling.
    """

    size: int
    autoencoder: dict[str, Any]
    text_encoder: dict[str, Any]
    flow: dict[str, Any]
    fits_text: bool = True
    vocab_size: int = 1500
    views: int = 12
    autoencoder_training: TrainingConfig
    flow_training: TrainingConfig
    pipeline: dict[str, Any] = field(default_factory=dict)

    def adjusted(
        self, training: TrainingOptions, *, autoencoder_steps: int | None = None, text_length: int | None = None
    ) -> Preset:
        """The preset with what somebody asks for: of the flow's training, and of the autoencoder's as far as it fits.

        Args:
            autoencoder_steps: steps of the autoencoder's training; None: the preset's.
            text_length: tokens of a caption that the model reads; None: as many as the data's captions
                have, and at least the preset's.

        Raises:
            StarflowError: the settings of a training do not fit together.
        """
        autoencoder = TrainingOptions(
            steps=autoencoder_steps,
            seed=training.seed,
            save_seconds=training.save_seconds,
            save_steps=training.save_steps,
            log_every=training.log_every,
        )
        return replace(
            self,
            flow={**self.flow, "txt_size": text_length} if text_length else self.flow,
            fits_text=self.fits_text and not text_length,
            flow_training=training.over(self.flow_training),
            autoencoder_training=autoencoder.over(self.autoencoder_training),
        )

    def autoencoder_config(self) -> AutoencoderKLConfig:
        settings = {"use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 1.0}
        return AutoencoderKLConfig.from_dict({**settings, **self.autoencoder, "sample_size": self.size})

    def text_config(self, vocab_size: int) -> T5Config:
        return T5Config(vocab_size=vocab_size, feed_forward_proj="gated-gelu", **self.text_encoder)

    def flow_config(self) -> FlowConfig:
        autoencoder = self.autoencoder_config()
        return FlowConfig(
            img_size=self.size // autoencoder.downscale,
            channel_size=autoencoder.latent_channels,
            txt_dim=self.text_encoder["d_model"],
            noise_std=self.flow_training.noise_std,
            **self.flow,
        )


_FLOW = {
    "patch_size": 4,
    "head_dim": 64,
    "txt_size": 12,
    "use_softplus": True,
    "use_final_norm": True,
    "use_qk_norm": True,
    "norm_type": "rms_norm",
    "soft_clip": 4.0,
}

_SAMPLING = {"guidance": 1.0, "temperature": 0.7}

PRESETS = {
    # For trying things out: minutes, not hours.
    "small": Preset(
        size=32,
        autoencoder={
            "block_out_channels": [32, 64],
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "mid_block_add_attention": False,
        },
        text_encoder={"d_model": 128, "d_kv": 64, "d_ff": 256, "num_layers": 1, "num_heads": 2},
        flow={**_FLOW, "channels": 128, "layers_per_block": [1, 1, 4], "top_block_channels": 192},
        views=8,
        autoencoder_training=TrainingConfig(steps=2000, batch_size=16, lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.01),
        flow_training=TrainingConfig(steps=5000, lr=1.2e-3, betas=(0.9, 0.98), weight_decay=0.01),
        pipeline=_SAMPLING,
    ),
    # The sizes of the embedded model.
    "demo": Preset(
        size=128,
        autoencoder={"block_out_channels": [24, 48, 96, 192], "layers_per_block": 1, "norm_num_groups": 8},
        text_encoder={"d_model": 256, "d_kv": 64, "d_ff": 640, "num_layers": 3, "num_heads": 4},
        flow={**_FLOW, "txt_size": 24, "channels": 256, "layers_per_block": [2, 2, 6], "top_block_channels": 384},
        autoencoder_training=TrainingConfig(steps=8000, batch_size=8, lr=1.2e-3, betas=(0.9, 0.98), weight_decay=0.01),
        flow_training=TrainingConfig(steps=40000, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01),
        pipeline=_SAMPLING,
    ),
}


def get_preset(name: str) -> Preset:
    """One of `PRESETS`. Raises StarflowError if there is none of that name."""
    if name not in PRESETS:
        raise StarflowError(f"unknown preset {name!r}; it must be one of {', '.join(PRESETS)}")
    return PRESETS[name]


_PIXELS = {"img_size": 32, "channel_size": 3, "blocks": 4}

PIXEL_FLOWS: dict[str, dict[str, Any]] = {
    "tarflow": {**_PIXELS, "patch_size": 4, "channels": 256, "layers_per_block": 2},
    "itarflow": {**_PIXELS, "patch_sizes": [4], "channels": [256], "layers_per_block": [2]},
}
"""Presets of flows on pixels, by their `model_type`; each is a flow alone."""


def preset_flow(name: str) -> dict[str, Any]:
    """The config of a preset's flow, as `read_flow_config` gives it, for a training of the flow alone."""
    if name in PIXEL_FLOWS:
        return {"model_type": name, **PIXEL_FLOWS[name]}
    preset = get_preset(name)
    flow = {key: value for key, value in preset.flow.items() if key != "txt_size"}
    return {"model_type": "starflow", **flow, "pipeline": preset.pipeline}
