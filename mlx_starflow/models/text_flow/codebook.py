"""The codebook between text and the continuous numbers that a flow models: a Gaussian for each character."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from mlx_starflow.models.text_flow.mixture import HALF_LOG_2PI, LEAST_LOG_STD, MOST_LOG_STD

FIRST_STD = 0.25
"""Of a new codebook's Gaussians, whose means are standard normal: they hardly overlap."""


class Codebook(nn.Module):
    """Character k is the Gaussian N(mu_k, sigma_k^2 I) over `size` numbers.

    The encoder q(z | x) draws from the Gaussian of a character; the decoder p(x = k | z) is Bayes' rule over all of
    them, each as likely as another beforehand.
    """

    def __init__(self, characters: int, size: int):
        super().__init__()
        self.mean = mx.random.normal((characters, size))
        self.log_std = mx.full((characters,), math.log(FIRST_STD))

    @property
    def log_stds(self) -> mx.array:
        """log sigma of each character, `[V]`, within its limits."""
        return mx.clip(self.log_std, LEAST_LOG_STD, MOST_LOG_STD)

    def encode(self, characters: mx.array, noise: mx.array) -> mx.array:
        """Numbers of characters `[B, T]` and standard normal noise `[B, T, size]` -> z `[B, T, size]`."""
        return self.mean[characters] + mx.exp(self.log_stds[characters])[..., None] * noise

    def log_encoder(self, characters: mx.array, noise: mx.array) -> mx.array:
        """log q(z | x), `[B, T]`, of what `encode` gives."""
        size = noise.shape[-1]
        return -0.5 * mx.square(noise).sum(axis=-1) - size * (self.log_stds[characters] + HALF_LOG_2PI)

    def log_decoder(self, z: mx.array) -> mx.array:
        """log p(x = k | z) of z `[B, T, size]`, `[B, T, V]`."""
        log_std = self.log_stds
        scale = mx.exp(-log_std)
        # (z - mu)^2 / sigma^2 as a difference of products would lose digits where sigma is small.
        distance = mx.square((z[..., None, :] - self.mean) * scale[:, None]).sum(axis=-1)
        logits = -0.5 * distance - z.shape[-1] * log_std
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    def decode(self, z: mx.array) -> mx.array:
        """The most likely character at each z `[B, T, size]`, int32 `[B, T]`."""
        return self.log_decoder(z).argmax(axis=-1).astype(mx.int32)
