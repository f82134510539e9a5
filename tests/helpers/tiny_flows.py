"""Tiny flows of every kind, with random weights that are always the same."""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_starflow.models.itarflow import ITarFlow, ITarFlowConfig
from mlx_starflow.models.starflow import FlowConfig, STARFlow
from mlx_starflow.models.tarflow import PixelFlow, TarFlow, TarFlowConfig

_STARFLOW = {
    "img_size": 4, "channel_size": 2, "patch_size": 1, "channels": 32, "layers_per_block": [1, 1, 1], "head_dim": 32,
    "txt_size": 3, "txt_dim": 6,
}  # fmt: skip
_TARFLOW = {"img_size": 4, "channel_size": 1, "patch_size": 2, "channels": 32, "blocks": 3, "layers_per_block": 1}
_ITARFLOW = {
    "img_size": 4, "channel_size": 1, "patch_sizes": [2], "channels": [32], "blocks": 3, "layers_per_block": [1, 1, 2],
    "head_dim": 16, "t0": 0.05, "t1": 0.4,
}  # fmt: skip
_LANGUAGE_MODEL = {
    "hf_style_rope": True, "use_swiglu": True, "use_qk_norm": True, "use_post_norm": True, "use_final_norm": True,
    "use_bias": False, "norm_type": "rms_norm", "num_heads": 3, "num_kv_heads": 1, "head_dim": 8, "channels": 16,
    "expansion": 2, "num_layers": 2, "use_proj_txt": False, "use_rope": True,
}  # fmt: skip
_RELEASED = {"use_softplus": True, "use_final_norm": True, "soft_clip": 4.0}

# One of every kind of flow: the scale's shape, the start token, order, patches, text, layers.
FAMILIES: dict[str, dict[str, object]] = {
    "softplus": {**_STARFLOW, **_RELEASED},
    "exp_all_text": {**_STARFLOW, "cond_top_only": False},
    "shifted": {**_STARFLOW, "sos": False, "seq_order": "R2L"},
    "shifted_softplus": {**_STARFLOW, **_RELEASED, "sos": False, "layers_per_block": [1, 2]},
    "reversed": {**_STARFLOW, **_RELEASED, "seq_order": "R2L"},
    "patches": {**_STARFLOW, **_RELEASED, "patch_size": 2, "img_size": 8, "channel_size": 1},
    "no_text": {**_STARFLOW, **_RELEASED, "txt_size": 0, "txt_dim": 0},
    "identity_block": {**_STARFLOW, **_RELEASED, "layers_per_block": [1, 0, 1]},
    "modern": {
        **_STARFLOW, **_RELEASED, "use_swiglu": True, "use_qk_norm": True, "use_post_norm": True, "use_bias": False,
        "norm_type": "rms_norm", "head_dim": 24, "num_heads": 2, "num_kv_heads": 1,
    },
    "language_model": {**_STARFLOW, **_RELEASED, "txt_dim": 16, "top_block": _LANGUAGE_MODEL},
    "frames": {
        **_STARFLOW, **_RELEASED, "top_block_channels": 64, "vid_size": "9:16", "temporal_causal": 2,
        "shallow_block_local": True, "learnable_self_denoiser": True, "conditional_denoiser": True,
        "denoiser_window": 2,
    },
    "tarflow": {**_TARFLOW, "head_dim": 16, "num_classes": 3},
    "tarflow_vp": {**_TARFLOW, "head_dim": 16, "nvp": False},
    "itarflow": {**_ITARFLOW, "num_classes": 3, "shared_backbone_layers": 1},
    "itarflow_patches": {**_ITARFLOW, "patch_sizes": [1, 2, 2], "channels": [32, 32, 48]},
}  # fmt: skip

_IMAGE = {
    "img_size": 4, "channel_size": 4, "patch_size": 1, "channels": 64, "layers_per_block": [1, 1],
    "txt_size": 6, "txt_dim": 32, "use_softplus": True, "soft_clip": 4.0,
}  # fmt: skip
# The flows of complete models, whose widths fit the encoders in model_directories.py.
MODELS: dict[str, dict[str, object]] = {
    # Pictures of 8x8 from 16 tokens.
    "image": _IMAGE,
    # Wide enough to be quantized.
    "wide": {**_IMAGE, "head_dim": 16, "txt_dim": 64, "txt_size": 4},
    # Videos of 5 latent frames of 2x2, with a learned denoiser, in the released model's shape.
    "video": {
        **_IMAGE, "img_size": 2, "top_block_channels": 96, "layers_per_block": [1, 1, 1], "head_dim": 32,
        "vid_size": "17:16", "mix_aspect": True, "fps_cond": True, "cond_noise_level": True, "noise_std": 0.5,
        "txt_size": 72, "cfg": 1.5, "use_final_norm": True, "temporal_causal": 2, "shallow_block_local": True,
        "learnable_self_denoiser": True, "conditional_denoiser": True, "denoiser_window": 3,
    },
    # An iTARFlow over the same pictures as the next.
    "levels": {
        "img_size": 8, "channel_size": 3, "patch_sizes": [2], "channels": [32], "blocks": 2, "layers_per_block": [1],
        "head_dim": 16, "num_classes": 3, "t0": 0.05, "t1": 0.4,
    },
    # A TarFlow over pictures of 8x8 in 16 tokens.
    "classes": {
        "img_size": 8, "channel_size": 3, "patch_size": 2, "channels": 32, "blocks": 2, "layers_per_block": 1,
        "head_dim": 16, "num_classes": 3,
    },
}  # fmt: skip


@dataclass
class TinyCase:
    """A tiny flow, data for it, and its condition and null condition (None if it has none)."""

    flow: STARFlow | PixelFlow
    x: mx.array
    text: mx.array | None
    null_text: mx.array | None

    def noise(self, z: mx.array) -> mx.array:
        """`flow(x).z` as `sample` takes it."""
        return self.flow.standardize(z)


def tiny_flow(family: str = "image", **changes: object) -> STARFlow | PixelFlow:
    """A flow of `FAMILIES` or `MODELS` with random weights; `changes` are its config's."""
    flow = _new_flow(family, changes)
    _draw_weights(flow, np.random.default_rng(crc32(family.encode())), 0.3 if family in MODELS else 0.5)
    return flow


def tiny_case(family: str, batch: int = 2) -> TinyCase:
    """A flow of `FAMILIES` with a batch of data and conditions."""
    rng = np.random.default_rng(crc32(family.encode()))
    flow = _new_flow(family, {})
    text = null_text = None
    if isinstance(flow, PixelFlow):
        x = _normal(rng, batch, 4, 4, 1)
        if flow.config.num_classes:
            text = mx.array([2, *[-1] * (batch - 1)])
    else:
        patch = flow.config.patch_size
        x = _normal(rng, batch, *([2] if flow.config.vid_size else []), 2 * patch, 3 * patch, flow.config.channel_size)
        if flow.config.txt_size:
            text, null_text = _normal(rng, batch, 3, flow.config.txt_dim), _normal(rng, 1, 3, flow.config.txt_dim)
    _draw_weights(flow, rng, 0.5)
    return TinyCase(flow, x, text, null_text)


def _new_flow(family: str, changes: dict[str, object]) -> STARFlow | PixelFlow:
    config = {**(FAMILIES | MODELS)[family], **changes}
    if "patch_sizes" in config:
        return ITarFlow(ITarFlowConfig.from_dict(config))
    if "blocks" in config:
        return TarFlow(TarFlowConfig.from_dict(config))
    return STARFlow(FlowConfig.from_dict(config))


def _normal(rng: np.random.Generator, *shape: int) -> mx.array:
    return mx.array(rng.standard_normal(shape).astype(np.float32))


def _draw_weights(flow: STARFlow | PixelFlow, rng: np.random.Generator, outputs: float) -> None:
    """Random weights with which no block is the identity and none is wild; `outputs` scales a block's outputs."""
    config = flow.config
    weights = []
    for name, value in tree_flatten(flow.parameters()):
        noise = _normal(rng, *value.shape) * (value.shape[-1] ** -0.5 if value.ndim == 2 else 0.2)
        # Norm weights and the prior's variances lie about 1; outputs are kept small, so that flows stay well-behaved.
        if "proj_out" in name:
            noise = noise * (outputs if getattr(config, "soft_clip", 0) else 0.15)
        if name == "var":
            noise = mx.exp(0.5 * _normal(rng, *value.shape))
        elif name.endswith("norm.weight") and getattr(config, "norm_type", "") != "rms_norm":
            noise = value + noise
        weights.append((name, noise))
    flow.load_weights(weights, strict=True)
    mx.eval(flow.parameters())
