"""Training a small autoencoder on images, and the latents that it makes of them."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_starflow.media.pixels import scale_pixels
from mlx_starflow.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mlx_starflow.sampling.progress import Watch, watch
from mlx_starflow.training.config import TrainingConfig
from mlx_starflow.training.data.batches import Order, TrainingData
from mlx_starflow.training.data.views import augmented_crops
from mlx_starflow.training.loop.identity import Identity
from mlx_starflow.training.loop.objective import Batch, Metrics
from mlx_starflow.training.loop.timing import seconds_per_step
from mlx_starflow.training.loop.trainer import Trainer
from mlx_starflow.training.loop.weights import assign

ZOOM, SHIFT = 0.15, 2
"""How far views of images vary, see `augmented_crops`."""


class ImageViews(TrainingData):
    """Random views of uint8 images `[N, S, S, 3]` at `config.sample_size`, with the noise of `autoencoder_loss`."""

    def __init__(self, images: np.ndarray, config: AutoencoderKLConfig):
        self.images, self.config = images, config
        self.order = Order(len(images))

    def batch(self, rng: np.random.Generator, config: TrainingConfig, progress: float) -> dict[str, np.ndarray]:
        """`images` and the arrays of `autoencoder_noise`."""
        chosen = self.order.take(config.batch_size, rng)
        views = augmented_crops(self.images[chosen], self.config.sample_size, rng, zoom=ZOOM, shift=SHIFT)
        side = self.config.sample_size // self.config.downscale
        noise = autoencoder_noise(rng, len(chosen), (side, side, self.config.latent_channels), config.noise_std)
        return {"images": scale_pixels(views), **noise}


def autoencoder_noise(
    rng: np.random.Generator, batch: int, shape: tuple[int, int, int], noise_std: float
) -> dict[str, np.ndarray]:
    """The random arrays of `autoencoder_loss` for latents of `shape` `[h, w, C]`, float32.

    `posterior` and `latent`, standard normal `[B, h, w, C]`, and `level` `[B]`: `noise_std`, less in a third of the
    batch, so that the decoder reads clean latents as well as noisy ones.
    """
    level = np.full(batch, noise_std, np.float32)
    level[: batch // 3] *= rng.random(batch // 3, dtype=np.float32)
    posterior, latent = rng.standard_normal((2, batch, *shape), dtype=np.float32)
    return {"posterior": posterior, "latent": latent, "level": level}


def autoencoder_loss(
    model: AutoencoderKL,
    images: mx.array,
    *,
    posterior: mx.array,
    latent: mx.array,
    level: mx.array,
    kl_weight: float = 1e-4,
) -> tuple[mx.array, Metrics]:
    """L1 and a little L2 through latents that carry the flow's noise, plus a small KL term.

    The noise is in units of each channel's standard deviation over the batch, so that the decoder learns to read the
    normalized noisy latents that the flow makes.

    Args:
        model: the autoencoder.
        images: `[B, H, W, 3]` in -1..1.
        posterior, latent, level: see `autoencoder_noise`.
        kl_weight: weight of the KL divergence from a standard normal, in nats per latent number.

    Returns:
        The loss and metrics: `L1`, `dB` (peak signal-to-noise ratio) and `kl`.
    """
    encoded = model.encode(images)
    mean, logvar = encoded.mean.astype(mx.float32), encoded.logvar.astype(mx.float32)
    kl = 0.5 * (mx.square(mean) + mx.exp(logvar) - 1 - logvar).mean()
    spread = mx.sqrt(mx.var(mean, axis=(0, 1, 2), ddof=1))
    latents = mean + mx.exp(0.5 * logvar) * posterior + level[:, None, None, None] * spread * latent
    error = model.decode(latents).astype(mx.float32) - images
    absolute, squared = mx.abs(error).mean(), mx.square(error).mean()
    loss = absolute + 0.5 * squared + kl_weight * kl
    return loss, {"L1": absolute, "dB": 10 / math.log(10) * mx.log(4 / squared), "kl": kl}


def train_autoencoder(
    images: np.ndarray,
    model_config: AutoencoderKLConfig,
    config: TrainingConfig,
    out_dir: str | Path,
    *,
    kl_weight: float = 1e-4,
    identity: Identity | None = None,
    resume: bool = True,
    progress: Watch = None,
) -> AutoencoderKL:
    """Train an autoencoder on random views of uint8 images `[N, S, S, 3]`; returns it with the averaged weights.

    `identity` is what a checkpoint must share besides the config; `progress` counts steps in the phase "autoencoder".

    Raises:
        StarflowError: see `Trainer`.
    """
    mx.random.seed(config.seed)
    model = AutoencoderKL(model_config)
    trainer = Trainer(
        model,
        ImageViews(images, model_config),
        config,
        out_dir,
        loss=partial(_batch_loss, kl_weight=kl_weight),
        identity={"autoencoder": model_config.to_dict(), **(identity or {})},
        name="autoencoder",
        resume=resume,
        progress=progress,
    )
    assign(model, trainer.run())
    return model


def _batch_loss(model: AutoencoderKL, batch: Batch, kl_weight: float = 1e-4) -> tuple[mx.array, Metrics]:
    return autoencoder_loss(model, **batch, kl_weight=kl_weight)


def autoencoder_step_time(model_config: AutoencoderKLConfig, config: TrainingConfig) -> float:
    """Seconds of a step of `train_autoencoder` on this machine; some are done, on random data."""
    mx.random.seed(config.seed)
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(config.batch_size, *2 * (2 * model_config.sample_size,), 3), dtype=np.uint8)
    batch = ImageViews(pixels, model_config).batch(rng, config, 0.0)
    return seconds_per_step(AutoencoderKL(model_config), batch, config, _batch_loss)


def encode_views(
    model: AutoencoderKL,
    images: np.ndarray,
    views: int,
    rng: np.random.Generator,
    batch_size: int = 32,
    progress: Watch = False,
) -> np.ndarray:
    """Raw latents (the posterior's mean) of random views of uint8 images `[N, S, S, 3]`: `[N, views, h, w, C]`.

    `progress` counts views of all images in the phase "encoding".
    """
    latents = []
    with watch(progress).counting("encoding", views * len(images), "view") as counter:
        for _ in range(views):
            # Hardly varied: a token's Gaussian cannot be left and right at once, and blurs what it is shown both ways.
            crops = augmented_crops(images, model.config.sample_size, rng, zoom=0.04, shift=1, flip=False)
            means = []
            for start in range(0, len(crops), batch_size):
                part = crops[start : start + batch_size]
                means.append(np.array(model.encode(mx.array(scale_pixels(part))).mean))
                counter.advance(len(part))
            latents.append(np.concatenate(means))
    return np.stack(latents, axis=1)
