"""The tensors of Wan's video autoencoder: what they are called in `Wan2.2_VAE.pth`, in diffusers and here.

How they lie there is in `autoencoder_tensors`; diffusers' norms have axes of length 1.
"""

from __future__ import annotations

import re

import mlx.core as mx

# The official release's names, which number the layers of sequences; diffusers' names have words for them.
_PARTS = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    "encoder.conv1": "encoder.conv_in",
    "decoder.conv1": "decoder.conv_in",
}
_STEPS = (
    (re.compile(r"\.middle\.0\."), ".mid_block.resnets.0."),
    (re.compile(r"\.middle\.1\."), ".mid_block.attentions.0."),
    (re.compile(r"\.middle\.2\."), ".mid_block.resnets.1."),
    (re.compile(r"\.head\.0\."), ".norm_out."),
    (re.compile(r"\.head\.2\."), ".conv_out."),
    (re.compile(r"\.residual\.0\."), ".norm1."),
    (re.compile(r"\.residual\.2\."), ".conv1."),
    (re.compile(r"\.residual\.3\."), ".norm2."),
    (re.compile(r"\.residual\.6\."), ".conv2."),
    (re.compile(r"\.shortcut\."), ".conv_shortcut."),
    (re.compile(r"\.resample\.1\."), ".resample."),
)
_BLOCK = re.compile(r"\.(down|up)samples\.(\d+)\.\1samples\.(\d+)\.")


def present_name(name: str, layers: int) -> str:
    """The name in `AutoencoderWan` of an official or a diffusers tensor.

    `layers` is the number of residual blocks at each resolution of the encoder, `num_res_blocks`. A name that is
    neither comes back as it is.
    """
    path, _, kind = name.rpartition(".")
    if path in _PARTS:
        return f"{_PARTS[path]}.{kind}"
    if found := _BLOCK.search(name):
        way, block, layer = found[1], found[2], int(found[3])
        count = layers + (way == "up")
        inner = f"resnets.{layer}" if layer < count else f"{way}sampler"
        if layer <= count:
            name = f"{name[: found.start()]}.{way}_blocks.{block}.{inner}.{name[found.end() :]}"
    for official, present in _STEPS:
        name = official.sub(present, name)
    return name


def diffusers_tensor(name: str, weight: mx.array) -> tuple[str, mx.array]:
    """One of our tensors as diffusers calls and keeps it: the way back."""
    *path, kind = name.split(".")
    if path[-1] == "resample":
        path.append("1")
    if kind == "gamma":
        weight = weight.reshape(-1, 1, 1, *([] if "attentions" in path else [1]))
    elif kind == "weight":
        weight = mx.moveaxis(weight, -1, 1)
        if path[-1] in ("conv_shortcut", "quant_conv", "post_quant_conv"):
            weight = weight[..., None]
    return ".".join([*path, kind]), weight
