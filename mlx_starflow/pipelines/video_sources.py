"""From the frames of a video to latents, a few frames at a time."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_starflow.media.pixels import crop_image, scale_pixels
from mlx_starflow.models.autoencoder_wan import AutoencoderWan


def encode_frames(
    vae: AutoencoderWan, images: Iterable[Image.Image], size: tuple[int, int], frames: int | None = None
) -> mx.array:
    """Frames -> normalized latents without noise, `[1, t, h, w, C]`.

    Args:
        images: at least one; those at the end that make no whole latent frame are left out.
        size: (width, height) in pixels that they are cropped and resized to.
        frames: read so many at most.
    """
    stream, step = vae.encoder_stream(), vae.config.temporal_downscale
    waiting = islice(images, frames)
    latents: list[mx.array] = []
    while len(chunk := list(islice(waiting, step if latents else 1))) == (step if latents else 1):
        fitted = np.stack([np.asarray(_fit(image, size)) for image in chunk])
        mean = stream.push(mx.array(scale_pixels(fitted))[None]).mean
        latents.append(vae.scale(mean, start=len(latents)))
        mx.eval(latents[-1])
    return mx.concatenate(latents, axis=1)


def last_frames(images: Iterable[Image.Image], step: int, most: int) -> list[Image.Image]:
    """The last 1 + k * step frames of a video, with the largest k up to `most`; no others are kept."""
    kept: list[Image.Image] = []
    for image in images:
        kept.append(image)
        del kept[: -1 - most * step]
    return kept[(len(kept) - 1) % step :] if kept else []


def _fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    image = image.convert("RGB")
    return image if image.size == size else crop_image(image, *size)
