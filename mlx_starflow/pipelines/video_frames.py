"""Frames of videos to latents and back, a few frames at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.given import ImageOrVideo, is_image
from mlx_starflow.media.images import to_images
from mlx_starflow.media.pixels import scale_pixels
from mlx_starflow.models.autoencoder_wan import AutoencoderWan
from mlx_starflow.pipelines.backend import check_part
from mlx_starflow.pipelines.base import fit_image


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
        fitted = np.stack([np.asarray(fit_image(image, size)) for image in chunk])
        mean = stream.push(mx.array(scale_pixels(fitted))[None]).mean
        latents.append(vae.scale(mean, start=len(latents)))
        check_part(np.array(latents[-1].astype(mx.float32)), "the autoencoder")
    return mx.concatenate(latents, axis=1)


class FrameDecoder:
    """Normalized latents of videos, pushed in order -> their frames."""

    def __init__(self, vae: AutoencoderWan):
        self._vae, self._stream, self._number = vae, vae.decoder_stream(), 0

    def push(self, latents: mx.array) -> list[list[Image.Image]]:
        """One latent frame `[B, 1, h, w, C]` -> the frames of each video that it stands for."""
        pixels = self._push(latents).astype(mx.float32)
        return [to_images(video) for video in np.array(pixels)]

    def skip(self, latents: mx.array) -> None:
        """Latent frames `[B, t, h, w, C]` that come before the ones to be seen."""
        for index in range(latents.shape[1]):
            self._push(latents[:, index : index + 1])

    def _push(self, latents: mx.array) -> mx.array:
        self._number += 1
        return self._stream.push(self._vae.unscale(latents, self._number - 1))


def decode_frames(vae: AutoencoderWan, latents: mx.array) -> Iterator[Image.Image]:
    """Normalized latents `[1, t, h, w, C]` -> the frames of the video."""
    decoder = FrameDecoder(vae)
    for index in range(latents.shape[1]):
        yield from decoder.push(latents[:, index : index + 1])[0]


def last_frames(images: Iterable[Image.Image], step: int, most: int) -> list[Image.Image]:
    """The last 1 + k * step frames of a video, with the largest k up to `most`; no others are kept."""
    kept: list[Image.Image] = []
    for image in images:
        kept.append(image)
        del kept[: -1 - most * step]
    return kept[(len(kept) - 1) % step :] if kept else []


def one_kind(images: Iterable[ImageOrVideo]) -> tuple[Iterator[ImageOrVideo], bool]:
    """The same images or videos, and whether they are videos.

    Raises:
        StarflowError: while they are read, if there are both.
    """
    waiting = iter(images)
    first = next(waiting, None)
    videos = first is not None and not is_image(first)

    def alike() -> Iterator[ImageOrVideo]:
        for each in () if first is None else chain([first], waiting):
            if is_image(each) == videos:
                raise StarflowError("give pictures or videos, not both together")
            yield each

    return alike(), videos
