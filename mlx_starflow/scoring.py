"""Exact likelihood of latents under a flow."""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.starflow import STARFlow

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Nll:
    """Exact negative log-likelihoods of pictures, in nats per latent dimension, and what they are made of.

    The difference of two `Nll` of the same pictures with the same noise is their paired difference: its standard error
    is that of the change, which is much smaller than that of either.

    Attributes:
        prior: 0.5 mean(z^2) + 0.5 log(2 pi) of each picture, `[B]`.
        blocks: -mean(log det) of each picture and flow block, data side first, `[B, blocks]`.
    """

    prior: np.ndarray
    blocks: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """NLL of each picture, `[B]`."""
        return self.prior + self.blocks.sum(axis=1)

    @property
    def mean(self) -> float:
        return float(self.total.mean())

    @property
    def standard_error(self) -> float:
        return standard_error(self.total)

    def __sub__(self, other: Nll) -> Nll:
        return Nll(self.prior - other.prior, self.blocks - other.blocks)

    def __str__(self) -> str:
        return f"{self.mean:.4f} +- {self.standard_error:.4f} nats per dimension ({len(self.prior)} pictures)"


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean of `[B]` values; NaN for a single one."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def training_noise(count: int, shape: tuple[int, ...], draw: int, seed: int = 0) -> np.ndarray:
    """Standard normal float32 `[count, *shape]` (NumPy's Philox).

    A picture's noise follows from its index, the draw and the seed alone.
    """
    generators = (np.random.Generator(np.random.Philox([seed, draw, index])) for index in range(count))
    return np.stack([generator.standard_normal(shape, np.float32) for generator in generators])


def exact_nll(
    flow: STARFlow,
    latents: np.ndarray | mx.array,
    text: mx.array | None = None,
    *,
    draws: int = 4,
    seed: int = 0,
    batch_size: int = 16,
) -> Nll:
    """Exact NLL of latents to which the noise is added that the flow was trained with, averaged over several draws.

    -log p(x) / D = 0.5 mean(z^2) + 0.5 log(2 pi) - mean(log|det dz/dx|), arXiv 2506.06276, equation 2.

    Args:
        flow: the flow.
        latents: normalized latents without noise, `[B, H, W, C]`.
        text: embeddings of each picture's caption, `[B, L, D]`; None for a flow that reads none.
        draws: of the noise, 1 or more.
        seed: of the noise.
        batch_size: pictures at once.

    Raises:
        StarflowError: shapes do not fit the flow, there is nothing to score, or the likelihood is not finite.
    """
    latents = np.array(latents, np.float32)
    if not len(latents) or draws < 1:
        raise StarflowError("there is nothing to score: give at least one picture and one draw of the noise")
    if text is not None and len(text) != len(latents):
        raise StarflowError(f"there are {len(text)} texts for {len(latents)} pictures; give one a picture")
    priors, blocks = [], []
    for draw in range(draws):
        noisy = latents + flow.config.noise_std * training_noise(len(latents), latents.shape[1:], draw, seed)
        for start in range(0, len(latents), batch_size):
            part = slice(start, start + batch_size)
            out = flow(mx.array(noisy[part]), None if text is None else text[part])
            prior = 0.5 * _mean(mx.square(out.z)) + HALF_LOG_2PI
            log_dets = mx.stack([-_mean(log_det) for log_det in out.block_log_dets], axis=1)
            mx.eval(prior, log_dets)
            priors.append(np.array(prior))
            blocks.append(np.array(log_dets))
    # Draws come one after the other, each with all pictures.
    prior = np.concatenate(priors).reshape(draws, len(latents)).astype(np.float64).mean(axis=0)
    block = np.concatenate(blocks).reshape(draws, len(latents), -1).astype(np.float64).mean(axis=0)
    nll = Nll(prior, block)
    if not np.isfinite(nll.total).all():
        raise StarflowError("the likelihood is not finite: the weights may be damaged; try float32")
    return nll


def _mean(values: mx.array) -> mx.array:
    return values.astype(mx.float32).reshape(values.shape[0], -1).mean(axis=1)
