"""Samples of a flow to watch its training by: clean, without guidance, and always from the same noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_starflow.kernels.memory import bounded
from mlx_starflow.media.images import to_images
from mlx_starflow.media.noise import draw_noise
from mlx_starflow.model_dir.directory import load_vae
from mlx_starflow.model_dir.hub import find_model
from mlx_starflow.models.autoencoder_kl import AutoencoderKL
from mlx_starflow.models.itarflow import ITarFlow
from mlx_starflow.models.starflow import STARFlow
from mlx_starflow.models.tarflow import PixelFlow
from mlx_starflow.pipelines.results import GenerationSettings
from mlx_starflow.sampling import denoise, iterate, noise_levels, sample
from mlx_starflow.training.data.cache.reading import LatentCache
from mlx_starflow.training.loop.watch import SampleSheet

STEPS = 10
"""Of denoising the samples of an iTARFlow."""

UNGUIDED = GenerationSettings()


SEEDS = (0, 1)
"""Of the images that are made of each caption."""


def draw_latents(
    flow: STARFlow,
    shape: Sequence[int],
    text: mx.array,
    null_text: mx.array | None = None,
    settings: GenerationSettings = UNGUIDED,
) -> mx.array:
    """Latents for some captions, from `SEEDS` each: the images of a caption come one after another.

    Args:
        flow: a STARFlow.
        shape: of one image's latents, `[H, W, C]`.
        text: embeddings of the captions, `[B, L, D]`.
        null_text: of the empty caption, `[1, L, D]`, for guidance.
        settings: how they are sampled; their method and size are not used.

    Returns:
        `[B * len(SEEDS), H, W, C]`.
    """
    text = mx.repeat(text, len(SEEDS), axis=0)
    z = mx.array(draw_noise(SEEDS * (len(text) // len(SEEDS)), shape)) * settings.temperature
    guidance = 0.0 if null_text is None else settings.guidance
    x = sample(flow, z, text, null_text, guidance, attn_temp=settings.attn_temp)
    return denoise(flow, x, text) if settings.denoise else x


def caption_sheet(images: Sequence[Image.Image], captions: Sequence[str]) -> SampleSheet:
    """What `draw_latents` made, decoded: a caption a row, a seed a column."""
    labels = [f"{caption} (seed {seed})" for caption in captions for seed in SEEDS]
    return SampleSheet(images, labels, columns=len(SEEDS))


def first_captions(cache: LatentCache, images: np.ndarray, most: int = 4) -> np.ndarray:
    """Numbers of a few of these images of a cache, of one bucket and with different captions."""
    images = images[cache.buckets[images] == cache.buckets[images[0]]]
    found: dict[str, int] = {}
    for image in images:
        found.setdefault(cache.captions[image][0], int(image))
    return np.array(list(found.values())[:most])


def caption_drawer(
    cache: LatentCache, images: np.ndarray, model: str | Path, settings: GenerationSettings = UNGUIDED
) -> Callable[[STARFlow], SampleSheet]:
    """What draws a sheet for the captions of some images of a cache, of one bucket, with the autoencoder of `model`."""
    bucket = cache.buckets[images[0]]
    captions = [cache.captions[image][0] for image in images]
    text = mx.array(cache.text(captions, cache.ratios[bucket]))
    null_text = mx.array(cache.text([""], cache.ratios[bucket])) if settings.guidance else None
    vae = find_model(model) / "vae"

    @bounded()
    def draw(flow: STARFlow) -> SampleSheet:
        latents = draw_latents(flow, cache.shapes[bucket], text, null_text, settings)
        mx.eval(latents)
        # The autoencoder is needed so rarely that it need not stay in memory.
        autoencoder = load_vae(vae)
        assert isinstance(autoencoder, AutoencoderKL)
        return caption_sheet(decode_latents(autoencoder, latents), captions)

    return draw


@bounded()
def decode_latents(autoencoder: AutoencoderKL, latents: mx.array) -> list[Image.Image]:
    """The images of normalized latents `[B, H, W, C]`."""
    return to_images(np.array(autoencoder.decode(autoencoder.unscale(latents)).astype(mx.float32)))


def class_sheet(flow: PixelFlow, classes: Sequence[str]) -> SampleSheet:
    """What `draw_classes` draws, with the names of the classes."""
    images = draw_classes(flow)
    named = bool(flow.config.num_classes)
    return SampleSheet(images, [classes[index] if named else f"number {index}" for index in range(len(images))])


def draw_classes(flow: PixelFlow, count: int = 8) -> list[Image.Image]:
    """An image of each of the first `count` classes, or `count` images if there are none."""
    classes = flow.config.num_classes
    labels = mx.arange(min(count, classes)) if classes else None
    batch = count if labels is None else labels.size
    z = np.random.default_rng(0).standard_normal((batch, *flow.var.shape), dtype=np.float32)
    x = sample(flow, mx.array(z), labels)
    if isinstance(flow, ITarFlow):
        levels = noise_levels(flow.config.t1, flow.config.t0, STEPS)
        x = iterate(flow, x, labels, levels, clip=True)
    elif flow.noise_type == "gaussian":
        x = denoise(flow, x, labels)
    return to_images(np.array(x))
