"""Facts about the official releases: their parts, the arguments of their checkpoints, their licences."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_starflow.errors import StarflowError

LICENSE = (
    "STARFlow weights that Apple released are for research purposes only: Apple Machine Learning Research Model is "
    "licensed under the Apple Machine Learning Research Model License Agreement (LICENSE_MODEL of "
    "github.com/apple/ml-starflow)."
)
"""What whoever gets converted official weights has to be told."""

LICENSES = {
    "google/flan-t5-xl": "Apache License 2.0",
    "stabilityai/sd-vae-ft-ema": "MIT License",
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": "Apache License 2.0",
}
"""Of the networks beside the flow."""

ARGUMENTS: dict[str, dict[str, Any]] = {
    "starflow_3B_t2i_256x256": {
        "img_size": 256,
        "txt_size": 128,
        "channel_size": 4,
        "patch_size": 1,
        "channels": 3072,
        "layers_per_block": "2 2 2 2 2 24",
        "noise_std": 0.3,
        "nvp": 1,
        "rope": 1,
        "adaln": 0,
        "sos": 1,
        "seq_order": "L2R",
        "use_softplus": 1,
        "cond_top_only": 1,
        "use_final_norm": 1,
        "soft_clip": 4,
        "latent_norm_regularization": 1e-4,
        "cfg": 2.5,
        "vae": "stabilityai/sd-vae-ft-ema",
        "text": "google/flan-t5-xl",
    },
    "starflow-v_7B_t2v_caus_480p": {
        "img_size": 640,
        "txt_size": 256,
        "vid_size": "81:16",
        "fps_cond": 1,
        "channel_size": 48,
        "patch_size": 1,
        "channels": 3072,
        "top_block_channels": 4096,
        "layers_per_block": "2 2 2 2 2 24",
        "noise_std": 0.5,
        "nvp": 1,
        "rope": 1,
        "adaln": 0,
        "sos": 1,
        "seq_order": "L2R",
        "pt_seq_len": 32,
        "mix_aspect": 1,
        "use_softplus": 1,
        "cond_top_only": 1,
        "use_final_norm": 1,
        "learnable_self_denoiser": 1,
        "conditional_denoiser": 1,
        "denoiser_window": 10,
        "cond_noise_level": 1,
        "temporal_causal": 2,
        "shallow_block_local": 1,
        "soft_clip": 4,
        "cfg": 2.5,
        "vae": "Wan-AI/Wan2.2-TI2V-5B-Diffusers:0.6",
        "text": "google/flan-t5-xl",
    },
}
"""The arguments of the released checkpoints that matter to inference, by the YAML's name without its suffix."""

_VERSION = re.compile(r"_v\d+$")


def released_arguments(checkpoint: Path) -> dict[str, Any] | None:
    """The arguments of a released checkpoint, recognized by its file's name; None if it is not one."""
    return ARGUMENTS.get(_VERSION.sub("", checkpoint.stem))


def later_scale(vae: str) -> float:
    """The factor of all latent frames but a video's first one, behind a colon in the official argument `vae`; else 1.

    Raises:
        StarflowError: it is not a number above 0.
    """
    text = vae.partition(":")[2] or "1"
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 0 < factor < float("inf"):
        raise StarflowError(f"vae {vae!r}: the factor behind the colon must be a number above 0, not {text!r}")
    return factor


@dataclass(frozen=True)
class Release:
    """A released model: where its parts are on the Hugging Face Hub.

    Attributes:
        repository: of the flow.
        checkpoint: the flow's file in it.
        text_encoder, vae: the repositories of the other networks, as official arguments name them; see `later_scale`.
        vae_folder: the autoencoder's in its repository.
        pipeline: settings that its images or videos are best made with.
    """

    repository: str
    checkpoint: str
    text_encoder: str
    vae: str
    vae_folder: str = ""
    pipeline: dict[str, Any] = field(default_factory=dict)

    @property
    def vae_repository(self) -> str:
        return self.vae.partition(":")[0]


RELEASES = {
    "apple/starflow": Release(
        repository="apple/starflow",
        checkpoint="starflow_3B_t2i_256x256.pth",
        text_encoder="google/flan-t5-xl",
        vae="stabilityai/sd-vae-ft-ema",
        # What the release's own sampling script passes.
        pipeline={"guidance": 3.6},
    ),
    "apple/starflow-v": Release(
        repository="apple/starflow",
        checkpoint="starflow-v_7B_t2v_caus_480p_v3.pth",
        text_encoder="google/flan-t5-xl",
        vae="Wan-AI/Wan2.2-TI2V-5B-Diffusers:0.6",
        vae_folder="vae",
        pipeline={"guidance": 3.5},
    ),
}
"""Releases by name, lower case: the repository's or, for the video model in the same one, its own."""
