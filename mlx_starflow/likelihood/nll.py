"""Exact likelihood of data under a flow, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_starflow.errors import NotFinite, StarflowError
from mlx_starflow.media.noise import check_seeds
from mlx_starflow.models.flow import Flow, frame_count
from mlx_starflow.sampling.progress import Watch, watch

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)

MOST_DRAWS = 10_000
"""Of the noise; the error of the mean is a hundredth of one draw's then."""

LEVELS = 256
"""Values of a pixel's channel."""


@dataclass(frozen=True)
class Nll:
    """Exact negative log-likelihoods of images, in nats per latent dimension, and what they are made of.

    The difference of two `Nll` of the same images with the same noise is their paired difference: its standard error
    is that of the change, which is much smaller than that of either.

    Attributes:
        prior: 0.5 mean(z^2) + 0.5 log(2 pi) of each image, `[B]`.
        blocks: -mean(log det) of each image and flow block, data side first, `[B, blocks]`.
    """

    prior: np.ndarray
    blocks: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """NLL of each image, `[B]`."""
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


# ---- the noise that flows are trained with


def training_noise(
    count: int, shape: tuple[int, ...], draw: int, seed: int = 0, numbers: Sequence[int] | None = None
) -> np.ndarray:
    """Standard normal float32 `[count, *shape]` (NumPy's Philox).

    An image's noise follows from its number, the draw and the seed alone; images are numbered 0, 1, 2 unless
    `numbers` says otherwise.
    """
    generators = _generators(count, draw, seed, numbers)
    return np.stack([generator.standard_normal(shape, np.float32) for generator in generators])


def _generators(count: int, draw: int, seed: int, numbers: Sequence[int] | None) -> list[np.random.Generator]:
    check_seeds([seed])
    numbers = range(count) if numbers is None else numbers
    return [np.random.Generator(np.random.Philox([seed, draw, number])) for number in numbers]


def is_dequantized(flow: Flow) -> bool:
    """Whether a flow's data are pixels made continuous by uniform noise within each of their 256 levels.

    Of such a flow alone the likelihood says something about the pixels themselves: see `bits_per_dimension`.
    """
    return flow.noise_type == "uniform"


def bits_per_dimension(nll: float) -> float:
    """Nats per dimension of a dequantized pixel model, whose data lie in -1..1, -> bits per pixel and channel.

    This bounds from above what a lossless code of the 8-bit image would take (arXiv 1511.01844).
    """
    return (nll + math.log(LEVELS / 2)) / math.log(2)


def with_noise(
    flow: Flow, data: np.ndarray, draw: int, seed: int = 0, numbers: Sequence[int] | None = None
) -> np.ndarray:
    """Data `[B, ...]` with the noise that the flow was trained with: what it knows the density of.

    Gaussian of the flow's `noise_std`; for a dequantized pixel model uniform within each level. `draw`, `seed` and
    `numbers` are those of `training_noise`.
    """
    count, shape = len(data), data.shape[1:]
    if not is_dequantized(flow):
        return data + flow.noise_std * training_noise(count, shape, draw, seed, numbers)
    levels = np.round((data + 1) * (LEVELS - 1) / 2)
    generators = _generators(count, draw, seed, numbers)
    uniform = np.stack([generator.random(shape, np.float32) for generator in generators])
    return ((levels + uniform) * 2 / LEVELS - 1).astype(np.float32)


# ---- likelihood


def at_once(batch_size: int, shape: Sequence[int]) -> int:
    """How many data of `shape` `[B, ...]` to take at once: a video counts as many images as it has latent frames."""
    return max(1, batch_size // frame_count(tuple(shape)))


def unit_of(shape: Sequence[int]) -> str:
    """What data of `shape` `[B, ...]` are, for progress bars."""
    return "video" if len(shape) == 5 else "picture"


def noise_and_nats(flow: Flow, x: mx.array, text: mx.array | None = None) -> tuple[mx.array, np.ndarray]:
    """One pass through the flow: standard normal tokens `[B, N, C]` in data order, and `token_nats`."""
    out = flow(x, text)
    z = flow.output_tokens(out.z) / mx.sqrt(flow.prior_variance)
    constant = HALF_LOG_2PI + 0.5 * mx.log(flow.prior_variance)
    parts = [0.5 * mx.square(z) + constant, *(-flow.tokens(log_det) for log_det in out.block_log_dets)]
    return z, np.array(mx.stack([part.sum(axis=-1) for part in parts], axis=1)).astype(np.float64)


def token_nats(flow: Flow, x: mx.array, text: mx.array | None = None) -> np.ndarray:
    """-log p(x | text) in nats, by part and token: float64 `[B, 1 + blocks, N]`, tokens in data order.

    Part 0 is the prior's, 0.5 z^2 + 0.5 log(2 pi) summed over a token's dimensions; the others are -log|det dz/dx| of
    the flow's blocks, data side first. Their sum over parts and tokens is the whole (arXiv 2506.06276, equation 2).

    Args:
        flow: a STARFlow or a TarFlow.
        x: data, with noise, as the flow reads it.
        text: its condition.
    """
    return noise_and_nats(flow, x, text)[1]


def check_draws(draws: int) -> None:
    """Raise StarflowError unless it is a usable number of draws."""
    if not 1 <= draws <= MOST_DRAWS:
        raise StarflowError(f"the noise is drawn 1 to {MOST_DRAWS:,} times, not {draws}")


def drawn_nats(
    flow: Flow,
    data: np.ndarray | mx.array,
    text: mx.array | None = None,
    *,
    draws: int = 4,
    seed: int = 0,
    batch_size: int = 16,
    numbers: Sequence[int] | None = None,
    progress: Watch = False,
) -> np.ndarray:
    """`token_nats` of data with the flow's training noise, for several draws: `[draws, B, 1 + blocks, N]`.

    Args:
        flow: the flow.
        data: without noise, `[B, ...]`: normalized latents, or a TarFlow's images.
        text: condition of each image: embeddings `[B, L, D]`, or a TarFlow's labels `[B]`.
        draws: of the noise, 1 or more.
        seed: of the noise.
        batch_size: images at once.
        numbers: of the images, from which their noise follows; 0, 1, 2 by default.
        progress: counts draws of all images in the phase "scoring".

    Raises:
        StarflowError: shapes do not fit the flow, there is nothing to score, or the likelihood is not finite.
    """
    data = np.array(data, np.float32)
    if not len(data):
        raise StarflowError("there is nothing to score: give at least one picture")
    check_draws(draws)
    if text is not None and len(text) != len(data):
        raise StarflowError(f"there are {len(text)} texts for {len(data)} pictures; give one a picture")
    results = []
    with watch(progress).counting("scoring", draws * len(data), "draw") as counter:
        for draw in range(draws):
            noisy = with_noise(flow, data, draw, seed, numbers)
            for start in range(0, len(data), batch_size):
                part = slice(start, min(start + batch_size, len(data)))
                results.append(token_nats(flow, mx.array(noisy[part]), None if text is None else text[part]))
                counter.advance(part.stop - part.start)
    nats = np.concatenate(results)
    check_nats(nats)
    return nats.reshape(draws, len(data), *nats.shape[1:])


def check_nats(nats: np.ndarray) -> None:
    """Raise NotFinite, naming the block, if `token_nats` `[B, 1 + blocks, N]` are not finite."""
    broken = ~np.isfinite(nats).all(axis=(0, 2))
    if broken.any():
        # What follows a broken block is broken too; the prior comes last.
        where = f" from block {broken[1:].argmax()} on" if broken[1:].any() else ""
        raise NotFinite(f"the likelihood is not finite{where}: the weights may be damaged; try --dtype float32")


def exact_nll(
    flow: Flow,
    latents: np.ndarray | mx.array,
    text: mx.array | None = None,
    *,
    draws: int = 4,
    seed: int = 0,
    batch_size: int = 16,
    progress: Watch = False,
) -> Nll:
    """Exact NLL of data to which the noise is added that the flow was trained with, averaged over several draws.

    -log p(x) / D = 0.5 mean(z^2) + 0.5 log(2 pi) - mean(log|det dz/dx|), arXiv 2506.06276, equation 2.

    Arguments and errors are those of `drawn_nats`.
    """
    nats = drawn_nats(flow, latents, text, draws=draws, seed=seed, batch_size=batch_size, progress=progress)
    parts = nats.mean(axis=0).sum(axis=-1) / np.prod(latents.shape[1:])
    return Nll(parts[:, 0], parts[:, 1:])
