"""Fine-tuning without forgetting: the tuned flow's per-token Gaussians are held close to the frozen base's.

A flow block gives each token a Gaussian with independent dimensions, from the tokens before it. For base p = N(mu, s^2)
and tuned q = N(mu', s'^2) the divergence is known in closed form (per dimension, in nats):

    KL(p || q) = log(s' / s) + (s^2 + (mu - mu')^2) / (2 s'^2) - 1/2

Both blocks read the same tokens x, and give z = (x - mu) / s and z' = (x - mu') / s'. With r = s / s' that is

    KL(p || q) = -log r + (r^2 + (z' - r z)^2) / 2 - 1/2

so a forward pass has all that is needed. Every block reads what the base's block before it made of the data: the sum
over blocks is 0 exactly where all blocks agree with the base's on the data.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_starflow.models.flow import frame_count
from mlx_starflow.models.starflow import STARFlow
from mlx_starflow.training.finetuning.adapters import adapter_layers, without_adapters


def gaussian_kl(z: mx.array, log_det: mx.array, tuned_z: mx.array, tuned_log_det: mx.array) -> mx.array:
    """KL(base || tuned) of each dimension in nats, shaped as the arguments, from what both make of the same tokens.

    Args:
        z, tuned_z: noise.
        log_det, tuned_log_det: per-dimension log-determinants, -log of the Gaussian's standard deviation.
    """
    log_ratio = tuned_log_det - log_det
    ratio = mx.exp(log_ratio)
    return 0.5 * (mx.square(ratio) + mx.square(tuned_z - ratio * z) - 1) - log_ratio


def anchor_kl(flow: STARFlow, x: mx.array, text: mx.array | None = None, base: STARFlow | None = None) -> mx.array:
    """Mean KL divergence of the base's per-token Gaussians from the tuned flow's, summed over blocks.

    Args:
        flow: a STARFlow that is being tuned.
        x: data with noise, `[B, H, W, C]`.
        text: its condition, `[B, L, D]`.
        base: the frozen flow; None: `flow` itself with its adapters off, so that there is no second copy in memory.

    Returns:
        A scalar, nats per dimension. Its gradient goes to `flow` alone.
    """
    if base is None:
        with without_adapters(flow):
            frozen = flow(x, text)
        changed = {int(path.split(".")[1]) for path in adapter_layers(flow)}
    else:
        frozen, changed = base(x, text), set(range(len(flow.blocks)))
    rope_frequencies = flow.block_rope_frequencies(x.shape, 0 if text is None else text.shape[1])
    total = mx.array(0.0)
    for index in sorted(changed):
        read, z, log_det = (
            mx.stop_gradient(flow.tokens(a))
            for a in (frozen.hidden[index], frozen.hidden[index + 1], frozen.block_log_dets[index])
        )
        block = flow.blocks[index]
        tuned_z, tuned_log_det = block(
            read,
            block.condition(text, x.shape[0]),
            rope_frequencies[index],
            gradient_checkpointing=True,
            frames=frame_count(x.shape),
        )
        total = total + gaussian_kl(z, log_det, tuned_z, tuned_log_det).mean()
    return total
