"""What training minimizes. Networks and losses are MLX; everything random is drawn in NumPy and passed in."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_starflow.models.flow import Flow

Batch = dict[str, Any]
Metrics = dict[str, mx.array]


LEVELS = 256
"""Values of a pixel's channel."""


def noisy(flow: Flow, x: mx.array, noise: mx.array) -> mx.array:
    """Data with the noise that makes its density exist, from standard normal `noise` shaped as x.

    Gaussian of the flow's `noise_std`; where its `noise_type` is "uniform", uniform within each of the 256 levels of
    pixels in -1..1 (dequantization, arXiv 1511.01844): the normal distribution function makes uniform numbers.
    """
    if flow.noise_type != "uniform":
        return x + flow.config.noise_std * noise
    levels = mx.round((x + 1) * ((LEVELS - 1) / 2))
    uniform = 0.5 * (1 + mx.erf(noise * math.sqrt(0.5)))
    return (levels + uniform) * (2 / LEVELS) - 1


def noisy_data(flow: Flow, batch: Batch) -> mx.array:
    """What a flow reads of a batch: its data with noise, and, where there is one, with its `probe`.

    That is zero everywhere; the loss's gradient with respect to it is the one with respect to the noisy data.
    """
    x = noisy(flow, batch["latents"], batch["noise"])
    return x + batch["probe"] if "probe" in batch else x


def flow_loss(
    flow: Flow,
    x: mx.array,
    text: mx.array | None = None,
    *,
    noise_std: float,
    noise: mx.array | None = None,
    keep: mx.array | None = None,
    weight: mx.array | None = None,
    checkpoint: bool = False,
) -> tuple[mx.array, Metrics]:
    """Exact negative log-likelihood of noisy data under a flow (STARFlow, arXiv 2506.06276, section 3).

    Args:
        flow: a flow; `flow(x, text)` gives its output.
        x: clean data, `[B, H, W, C]`, or of videos `[B, T, H, W, C]`.
        text: what the flow is conditioned on: embeddings `[B, L, D]`, or a TarFlow's labels `[B]`.
        noise_std: standard deviation of the noise that the data is trained with; 0 for none.
        noise: standard normal, shaped as x; None draws it from MLX's own generator.
        keep: `[B, N]`, see `context_keep`; None lets the deep block read every token.
        weight: of each sample in the loss, `[B]`, about 1; metrics do not know of it.
        checkpoint: let the gradient compute layers again instead of keeping what they computed.

    Returns:
        The loss, a scalar in nats per dimension without the constant log(2 pi) / 2, and metrics: `nll`, over the
        samples that read all of their context, and, if `keep` is given, `nll-text-only`, over those that read none.
        A metric without a sample is NaN.
    """
    if noise_std:
        x = x + noise_std * (mx.random.normal(x.shape) if noise is None else noise)
    out = flow(x, text, keep, checkpoint)
    nll = out.nll()
    # Computed once: `mx.compile` (0.32) fails with "_Map_base::at" where loss and metrics compute the same twice.
    mean = nll.mean()
    loss = out.loss(mean)
    if weight is not None:
        loss = loss + ((weight - 1) * nll).mean()
    if keep is None:
        return loss, {"nll": mean}
    kept = keep.sum(axis=1)
    metrics = {"nll": _mean_where(nll, kept == keep.shape[1]), "nll-text-only": _mean_where(nll, kept == 1)}
    return loss, metrics


def batch_loss(flow: Flow, batch: Batch, checkpoint: bool = False) -> tuple[mx.array, Metrics]:
    """`flow_loss` of a batch with the flow's own noise: what `Trainer` trains a flow with.

    The batch holds `latents` (or a TarFlow's pictures) `[B, H, W, C]`, or those of videos `[B, T, H, W, C]`, and
    standard normal `noise` of their shape, and may hold `text` (embeddings or labels), `keep`, `weight` and `probe`,
    see `noisy_data`.
    """
    x = noisy_data(flow, batch)
    options = {name: batch.get(name) for name in ("text", "keep", "weight")}
    return flow_loss(flow, x, noise_std=0.0, checkpoint=checkpoint, **options)


def batch_nll(flow: Flow, batch: Batch) -> mx.array:
    """Exact NLL of each sample of a batch of `batch_loss`, `[B]`, nats per dimension, without log(2 pi) / 2."""
    return flow(noisy_data(flow, batch), batch.get("text")).nll()


def _mean_where(values: mx.array, chosen: mx.array) -> mx.array:
    return mx.where(chosen, values, 0).sum() / chosen.sum()


def context_keep(rng: np.random.Generator, batch: int, tokens: int, full: float, partial: float) -> np.ndarray:
    """Which inputs the deep block may read, float32 `[B, N]` of 1 and 0: a training aid for small data sets.

    With teacher forcing the tokens before give a picture away and the text is ignored. So a share `full` of the
    samples reads the text alone, and a share `partial` of the others loses a random part of its tokens, a different
    part in each sample. The first input, the start token, always stays.
    """
    draw = rng.random((batch, 1))
    some = rng.random((batch, tokens)) > rng.random((batch, 1))
    keep = np.where(draw < full + partial * (1 - full), some, True) & (draw >= full)
    keep[:, 0] = True
    return keep.astype(np.float32)


def context_share(full: float, progress: float) -> float:
    """The share `full` of `context_keep` at `progress` 0..1: constant, then from 0.7 to 0.85 down to a fifth.

    Late in training the flow is to model whole pictures again.
    """
    return full * (1 - 0.8 * min(max((progress - 0.7) / 0.15, 0.0), 1.0))


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
    model: Any,
    pictures: mx.array,
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
        model: an AutoencoderKL.
        pictures: `[B, H, W, 3]` in -1..1.
        posterior, latent, level: see `autoencoder_noise`.
        kl_weight: weight of the KL divergence from a standard normal, in nats per latent number.

    Returns:
        The loss and metrics: `L1`, `dB` (peak signal-to-noise ratio) and `kl`.
    """
    encoded = model.encode(pictures)
    mean, logvar = encoded.mean.astype(mx.float32), encoded.logvar.astype(mx.float32)
    kl = 0.5 * (mx.square(mean) + mx.exp(logvar) - 1 - logvar).mean()
    spread = mx.sqrt(mx.var(mean, axis=(0, 1, 2), ddof=1))
    latents = mean + mx.exp(0.5 * logvar) * posterior + level[:, None, None, None] * spread * latent
    error = model.decode(latents).astype(mx.float32) - pictures
    absolute, squared = mx.abs(error).mean(), mx.square(error).mean()
    loss = absolute + 0.5 * squared + kl_weight * kl
    return loss, {"L1": absolute, "dB": 10 / math.log(10) * mx.log(4 / squared), "kl": kl}
