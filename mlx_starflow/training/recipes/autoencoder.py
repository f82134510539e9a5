"""Training a small autoencoder on images, and the latents that it makes of them."""

from __future__ import annotations

import math
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_starflow.media.pixels import scale_pixels
from mlx_starflow.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mlx_starflow.training.config import TrainingConfig
from mlx_starflow.training.data.batches import Order, TrainingData
from mlx_starflow.training.data.views import augmented_crops
from mlx_starflow.training.loop.identity import Identity
from mlx_starflow.training.loop.objective import Metrics
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
) -> AutoencoderKL:
    """Train an autoencoder on random views of uint8 images `[N, S, S, 3]`; returns it with the averaged weights.

    `identity` is what a checkpoint must share besides the config.

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
        loss=lambda model, batch: autoencoder_loss(model, **batch, kl_weight=kl_weight),
        identity={"autoencoder": model_config.to_dict(), **(identity or {})},
        name="autoencoder",
        resume=resume,
    )
    assign(model, trainer.run())
    return model


def encode_views(
    model: AutoencoderKL, images: np.ndarray, views: int, rng: np.random.Generator, batch_size: int = 32
) -> np.ndarray:
    """Raw latents (the posterior's mean) of random views of uint8 images `[N, S, S, 3]`: `[N, views, h, w, C]`."""
    latents = []
    for _ in range(views):
        # Hardly varied: a token's Gaussian cannot be left and right at once, and blurs what it is shown both ways.
        crops = augmented_crops(images, model.config.sample_size, rng, zoom=0.04, shift=1, flip=False)
        parts = [crops[start : start + batch_size] for start in range(0, len(crops), batch_size)]
        means = [np.array(model.encode(mx.array(scale_pixels(part))).mean) for part in parts]
        latents.append(np.concatenate(means))
    return np.stack(latents, axis=1)
