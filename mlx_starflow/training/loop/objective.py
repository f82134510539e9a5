"""What training minimizes. Networks and losses are MLX; everything random is drawn in NumPy and passed in."""

from __future__ import annotations

import math

import mlx.core as mx

from mlx_starflow.models.flow import Flow
from mlx_starflow.models.itarflow import at_noise_level

Batch = dict[str, mx.array]
Metrics = dict[str, mx.array]

LEVELS = 256
"""Values of a pixel's channel."""


def noisy(flow: Flow, x: mx.array, noise: mx.array) -> mx.array:
    """Data with the noise that makes its density exist, from standard normal `noise` shaped as x.

    Gaussian of the flow's `noise_std`; where its `noise_type` is "uniform", uniform within each of the 256 levels of
    pixels in -1..1 (dequantization, arXiv 1511.01844): the normal distribution function makes uniform numbers.
    """
    if flow.noise_type != "uniform":
        std = flow.noise_std
        return x + (std.reshape(-1, *[1] * (x.ndim - 1)) if isinstance(std, mx.array) else std) * noise
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
    context_mask: mx.array | None = None,
    weight: mx.array | None = None,
    gradient_checkpointing: bool = False,
) -> tuple[mx.array, Metrics]:
    """Exact negative log-likelihood of noisy data under a flow (STARFlow, arXiv 2506.06276, section 3).

    Args:
        flow: a flow; `flow(x, text)` gives its output.
        x: clean data, `[B, H, W, C]`, or of videos `[B, T, H, W, C]`.
        text: what the flow is conditioned on: embeddings `[B, L, D]`, or a TarFlow's labels `[B]`.
        noise_std: standard deviation of the noise that the data is trained with; 0 for none.
        noise: standard normal, shaped as x; None draws it from MLX's own generator.
        context_mask: `[B, N]`, see `dropout.context_mask`; None lets the deep block read every token.
        weight: of each sample in the loss, `[B]`, about 1; metrics do not know of it.
        gradient_checkpointing: let the gradient compute layers again instead of keeping what they computed.

    Returns:
        The loss, a scalar in nats per dimension without the constant log(2 pi) / 2, and metrics: `nll`, over the
        samples that read all of their context, and, if `context_mask` is given, `nll-text-only`, over those that
        read none. A metric without a sample is NaN.
    """
    if noise_std:
        x = x + noise_std * (mx.random.normal(x.shape) if noise is None else noise)
    out = flow(x, text, context_mask, gradient_checkpointing)
    nll = out.nll()
    # Computed once: `mx.compile` (0.32) fails with "_Map_base::at" where loss and metrics compute the same twice.
    mean = nll.mean()
    loss = out.loss(mean)
    if weight is not None:
        loss = loss + ((weight - 1) * nll).mean()
    if context_mask is None:
        return loss, {"nll": mean}
    read, tokens = context_mask.sum(axis=1), context_mask.shape[1]
    return loss, {"nll": _mean_where(nll, mx.equal(read, tokens)), "nll-text-only": _mean_where(nll, mx.equal(read, 1))}


def batch_loss(flow: Flow, batch: Batch, gradient_checkpointing: bool = False) -> tuple[mx.array, Metrics]:
    """`flow_loss` of a batch with the flow's own noise: what `Trainer` trains a flow with.

    The batch holds `latents` (or a TarFlow's images) `[B, H, W, C]`, or those of videos `[B, T, H, W, C]`, and
    standard normal `noise` of their shape, and may hold `text` (embeddings or labels), `context_mask`, `weight`,
    `probe`, see `noisy_data`, and for an iTARFlow `noise_level`, that of each sample, `[B]`.
    """
    flow = at_noise_level(flow, batch.get("noise_level"))
    return flow_loss(
        flow,
        noisy_data(flow, batch),
        batch.get("text"),
        noise_std=0.0,
        context_mask=batch.get("context_mask"),
        weight=batch.get("weight"),
        gradient_checkpointing=gradient_checkpointing,
    )


def batch_nll(flow: Flow, batch: Batch) -> mx.array:
    """Exact NLL of each sample of a batch of `batch_loss`, `[B]`, nats per dimension, without log(2 pi) / 2."""
    flow = at_noise_level(flow, batch.get("noise_level"))
    return flow(noisy_data(flow, batch), batch.get("text")).nll()


def _mean_where(values: mx.array, chosen: mx.array) -> mx.array:
    return mx.where(chosen, values, 0).sum() / chosen.sum()
