"""Training a small autoencoder on a folder of pictures, and the latents it makes of them."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_starflow.media.pixels import scale_pixels
from mlx_starflow.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mlx_starflow.training.data.image_folder import Order, PictureFolder, augmented_crops
from mlx_starflow.training.loop.config import TrainingConfig
from mlx_starflow.training.loop.objective import autoencoder_loss, autoencoder_noise
from mlx_starflow.training.loop.schedules import assign
from mlx_starflow.training.loop.trainer import Trainer

ZOOM, SHIFT = 0.15, 2
"""How far views of pictures vary, see `augmented_crops`."""


class PictureViews:
    """Random views of pictures at `config.sample_size`, with the noise of `autoencoder_loss`."""

    def __init__(self, pictures: np.ndarray, config: AutoencoderKLConfig):
        self.pictures, self.config = pictures, config
        self.order = Order(len(pictures))

    def batch(self, rng: np.random.Generator, config: TrainingConfig, progress: float) -> dict[str, np.ndarray]:
        """`pictures` and the arrays of `autoencoder_noise`."""
        chosen = self.order.take(config.batch_size, rng)
        views = augmented_crops(self.pictures[chosen], self.config.sample_size, rng, zoom=ZOOM, shift=SHIFT)
        side = self.config.sample_size // self.config.downscale
        noise = autoencoder_noise(rng, len(chosen), (side, side, self.config.latent_channels), config.noise_std)
        return {"pictures": scale_pixels(views), **noise}


def train_autoencoder(
    pictures: PictureFolder,
    model_config: AutoencoderKLConfig,
    config: TrainingConfig,
    out_dir: str | Path,
    *,
    kl_weight: float = 1e-4,
    resume: bool = True,
) -> AutoencoderKL:
    """Train an autoencoder on random views of `pictures`; returns it with the averaged weights.

    Raises:
        StarflowError: see `Trainer`.
    """
    mx.random.seed(config.seed)
    model = AutoencoderKL(model_config)
    data = PictureViews(pictures.pictures, model_config)
    trainer = Trainer(
        model,
        data,
        config,
        out_dir,
        loss=lambda model, batch: autoencoder_loss(model, **batch, kl_weight=kl_weight),
        name="autoencoder",
        resume=resume,
    )
    assign(model, trainer.run())
    return model


def encode_views(
    model: AutoencoderKL, pictures: np.ndarray, views: int, rng: np.random.Generator, batch_size: int = 32
) -> np.ndarray:
    """Raw latents (the posterior's mean) of random views of uint8 `[N, S, S, 3]` pictures: `[N, views, h, w, C]`."""
    latents = []
    for _ in range(views):
        # Hardly varied: a token's Gaussian cannot be left and right at once, and blurs what it is shown both ways.
        crops = augmented_crops(pictures, model.config.sample_size, rng, zoom=0.04, shift=1, flip=False)
        parts = [crops[start : start + batch_size] for start in range(0, len(crops), batch_size)]
        means = [np.array(model.encode(mx.array(scale_pixels(part))).mean) for part in parts]
        latents.append(np.concatenate(means))
    return np.stack(latents, axis=1)
