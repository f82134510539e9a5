"""Cleaning a sample of the Gaussian noise that the flow was trained with."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx

from mlx_starflow.errors.arguments import checked
from mlx_starflow.models.flow import BlockConfig, Flow, frame_count
from mlx_starflow.sampling.decoder import check_finite
from mlx_starflow.sampling.progress import Watch, watch

PREDICTION_STD = 0.3
"""A learned denoiser predicts noise_std^2 / 0.3 times d(-log p)/dx: the release trains it at noise 0.3 and scales its
target where the noise is another."""

ROOM = 32 * 2**20
"""Bytes of activations that samples which are computed together may take."""

LAYER = 24
"""What a layer holds for its gradient, as a multiple of what it reads: queries, keys, values, the MLP and norms."""


@checked
def denoise(
    flow: Flow,
    x: mx.array,
    text: mx.array | None = None,
    noise_std: float | None = None,
    *,
    progress: Watch = False,
) -> mx.array:
    """One score step (Tweedie's formula): x + noise_std^2 * d log p(x | text) / dx, which is E[clean | noisy].

    Args:
        flow: a flow; its weights get no gradient.
        x: noisy data `[B, H, W, C]`, or videos `[B, T, H, W, C]`.
        text: its condition, as for `flow(x, text)`.
        noise_std: standard deviation of the training noise; the flow's own by default, which an iTARFlow's level is
            (see `ITarFlow.at`). A learned denoiser knows it.
        progress: a `Progress`, which is told of each sample, or whether to show a progress bar.

    A flow with a learned denoiser predicts the score; in a video, attention is computed frame by frame. Otherwise it is
    a vector-Jacobian product through the whole flow. To save memory every layer is run twice, and large samples go
    through it one at a time.
    """
    progress = watch(progress)
    progress.check()
    if (denoiser := flow.denoiser) is not None:
        rope_frequencies = flow.rope_frequencies(x.shape, 0 if text is None else text.shape[1])
        assert rope_frequencies is not None  # of a flow with a denoiser
        result = clean(x, flow.latents(denoiser(flow.tokens(x), text, rope_frequencies, frame_count(x.shape)), x.shape))
        check_finite(result, "the denoised sample")
        return result
    variance = (flow.noise_std if noise_std is None else noise_std) ** 2

    def negative_log_likelihood(sample: mx.array, condition: mx.array | None) -> mx.array:
        return flow(sample, condition, gradient_checkpointing=True).nll().sum() * sample[0].size

    score = mx.grad(negative_log_likelihood)
    cleaned, count = [], at_once(flow, x, text)
    with progress.counting("denoise", x.shape[0], "sample", leave=False) as counter:
        for start in range(0, x.shape[0], count):
            sample = x[start : start + count].astype(mx.float32)
            condition = None if text is None else text[start : start + count]
            cleaned.append(sample - variance * score(sample, condition))
            mx.eval(cleaned[-1])
            counter.advance(len(sample))
    result = mx.concatenate(cleaned)
    check_finite(result, "the denoised sample")
    return result


def at_once(flow: Flow, x: mx.array, text: mx.array | None) -> int:
    """How many samples go through the flow together: few tokens of a narrow flow do not keep a machine busy.

    So many that what they hold, about, stays within `ROOM`, and at least one: what each layer reads, and all of one.
    """
    tokens = flow.tokens(x[:1]).shape[1]
    prefix = text.shape[1] if text is not None and text.ndim == 3 else 0
    return together((block.config, prefix + block.sequences(1, tokens)[1]) for block in flow.blocks)


def together(blocks: Iterable[tuple[BlockConfig, int]]) -> int:
    """`at_once` of blocks with the positions that each of them sees of a sample."""
    read = [(config.num_layers, config.channels * positions) for config, positions in blocks if config.num_layers]
    numbers = sum(layers * each for layers, each in read) + LAYER * max((each for _, each in read), default=0)
    return max(1, ROOM // max(1, 4 * numbers))


def clean(x: mx.array, prediction: mx.array) -> mx.array:
    """Noisy data and what a learned denoiser predicts of it -> clean data."""
    return x.astype(mx.float32) - PREDICTION_STD * prediction
