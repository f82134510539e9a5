"""Flow-score matching (STARFlow-V, arXiv 2511.20462): a denoiser learns the score of the flow it is trained beside.

The flow's exact likelihood gives the score of noisy data, and with it the clean data (Tweedie's formula,
E[clean | x] = x - noise_std^2 * d(NLL)/dx). That takes a pass backwards through the whole flow, which a learned network
saves at sampling time. While training, the score costs next to nothing: the pass backwards is done for the weights
anyway.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_starflow.models.flow import Flow, frame_count
from mlx_starflow.sampling.denoise import PREDICTION_STD
from mlx_starflow.training.loop.objective import Batch, noisy_data
from mlx_starflow.training.loop.weights import Weights, trainable

NAME = "learnable_self_denoiser."


def denoiser_weights(model: nn.Module) -> set[str]:
    """Names of the weights of a model's learned denoiser that are trained; none if it has no denoiser."""
    return {name for name in trainable(model) if name.startswith((NAME, f"flow.{NAME}"))}


def new_probe(batch: Batch) -> Batch:
    """What to add to a batch: the `probe` of `objective.noisy_data`."""
    return {"probe": mx.zeros(batch["latents"].shape)}


def score_target(flow: Flow, batch: Batch, gradient: mx.array) -> tuple[mx.array, mx.array]:
    """What the denoiser is to predict, and which samples it can be shown with.

    Args:
        flow: the flow.
        batch: what its loss was computed of.
        gradient: of that loss with respect to the noisy data. Where a flow is trained with a latent-norm penalty, its
            gradient is in there too, as it is in the release.

    Returns:
        noise_std^2 / 0.3 * d(NLL)/dx, shaped as x, where NLL is the sum over a sample's dimensions in nats, so that
        x - 0.3 * target is Tweedie's step; and a weight for each sample, `[B]`: 0 for those whose gradient is none of
        the NLL, because parts of their context were hidden or the loss did not count them, else 1.
    """
    batch_size = gradient.shape[0]
    each = mx.ones(batch_size) if batch.get("weight") is None else batch["weight"].astype(mx.float32)
    counts = each != 0
    if batch.get("context_mask") is not None:
        counts = counts & (batch["context_mask"].min(axis=1) > 0)
    factor = gradient.size * flow.noise_std**2 / PREDICTION_STD / mx.where(each == 0, 1.0, each)
    target = gradient.astype(mx.float32) * factor.reshape(-1, *[1] * (gradient.ndim - 1))
    return mx.stop_gradient(target), counts.astype(mx.float32)


def denoiser_loss(model: Any, batch: Batch, gradient: mx.array, gradient_checkpointing: bool = False) -> mx.array:
    """Mean squared error of the learned denoiser's prediction from `score_target`, over the samples that count.

    Only the denoiser gets a gradient of it.

    Args:
        model: a flow with a learned denoiser, or a `TextFlow` with one.
        batch: what `batch_loss` reads of it.
        gradient: of the flow's loss with respect to the noisy data.
        gradient_checkpointing: compute the denoiser's layers again for its gradient.
    """
    flow = getattr(model, "flow", model)
    batch = model.with_text(batch) if hasattr(model, "with_text") else batch
    x, text = mx.stop_gradient(noisy_data(flow, batch)), batch.get("text")
    text = None if text is None else mx.stop_gradient(text)
    target, counts = score_target(flow, batch, gradient)
    rope_frequencies = flow.rope_frequencies(x.shape, 0 if text is None else text.shape[1])
    prediction = flow.learnable_self_denoiser(
        flow.tokens(x), text, rope_frequencies, frame_count(x.shape), gradient_checkpointing
    )
    error = mx.square(flow.latents(prediction, x.shape) - target).reshape(len(counts), -1).mean(axis=1)
    return (error * counts).sum() / mx.maximum(counts.sum(), 1.0)


def split_weights(weights: Weights, names: set[str]) -> tuple[Weights, Weights]:
    """(The other weights, those with these names)."""
    rest = {name: weight for name, weight in weights.items() if name not in names}
    return rest, {name: weight for name, weight in weights.items() if name in names}
