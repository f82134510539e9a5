"""Samples of a flow to watch its training by: clean, without guidance, and always from the same noise."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_starflow.media.images import to_images
from mlx_starflow.models.autoencoder_kl import AutoencoderKL
from mlx_starflow.models.itarflow import ITarFlow
from mlx_starflow.models.starflow import STARFlow
from mlx_starflow.models.tarflow import PixelFlow
from mlx_starflow.sampling import denoise, iterate, noise_levels, sample

STEPS = 10
"""Of denoising the samples of an iTARFlow."""


def draw_latents(flow: STARFlow, shape: Sequence[int], text: mx.array) -> mx.array:
    """Latents of `shape` `[B, H, W, C]` for text embeddings `[B, L, D]`."""
    z = mx.array(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
    return denoise(flow, sample(flow, z, text), text)


def decode_latents(autoencoder: AutoencoderKL, latents: mx.array) -> list[Image.Image]:
    """The images of normalized latents `[B, H, W, C]`."""
    return to_images(np.array(autoencoder.decode(autoencoder.unscale(latents)).astype(mx.float32)))


def draw_classes(flow: PixelFlow, count: int = 8) -> list[Image.Image]:
    """An image of each of the first `count` classes, or `count` images if there are none."""
    classes = flow.config.num_classes
    labels = mx.arange(min(count, classes)) if classes else None
    batch = count if labels is None else labels.size
    z = np.random.default_rng(0).standard_normal((batch, *flow.var.shape), dtype=np.float32)
    x = sample(flow, mx.array(z), labels)
    if isinstance(flow, ITarFlow):
        levels = noise_levels(flow.config.t1, flow.config.t0, STEPS)
        x = iterate(flow, x, labels, levels, clip=True, batch_size=batch)
    elif flow.noise_type == "gaussian":
        x = denoise(flow, x, labels)
    return to_images(np.array(x))
