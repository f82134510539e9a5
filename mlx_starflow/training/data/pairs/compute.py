"""Pairs of a flow: its noise and the data that it makes of it, with the states between its blocks."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_starflow.models.flow import Flow, active_blocks
from mlx_starflow.sampling.denoise import denoise
from mlx_starflow.sampling.guidance import SamplingOptions
from mlx_starflow.sampling.progress import Progress
from mlx_starflow.sampling.sampler import SamplingTrace, sample


@dataclass(frozen=True)
class Pairs:
    """Some pairs, all as tokens in raster order, float32.

    Attributes:
        noise: as the flow's `sample` takes it, with its temperature, `[B, N, C]`.
        states: what each block that does something makes of it, deep block first, `[B, S, N, C]`; the last of them is
            the flow's sample.
        clean: the data without the flow's training noise, `[B, N, C]`.
        condition: text embeddings `[B, L, D]` or labels `[B]`; None of a flow that has none.
    """

    noise: np.ndarray
    states: np.ndarray
    clean: np.ndarray
    condition: np.ndarray | None

    def arrays(self) -> dict[str, np.ndarray]:
        found = {"noise": self.noise, "states": self.states, "clean": self.clean}
        return found if self.condition is None else {**found, "condition": self.condition}


def pairs_of_data(flow: Flow, clean: mx.array, noise: mx.array, condition: mx.array | None = None) -> Pairs:
    """Pairs of data: exact, in one forward pass.

    Args:
        clean: data `[B, H, W, C]`.
        noise: standard normal of its shape; times the flow's `noise_std` it is what the flow was trained with.
        condition: text embeddings `[B, L, D]` or labels `[B]`.
    """
    out = flow(clean + flow.noise_std * noise, condition)
    states = [out.hidden[index] for index in active_blocks(flow)]
    z = flow.output_tokens(flow.standardize(out.z))
    return _pairs(flow, z, states, clean, condition)


def pairs_of_samples(
    flow: Flow,
    z: mx.array,
    condition: mx.array | None = None,
    null_condition: mx.array | None = None,
    options: SamplingOptions | None = None,
    progress: Progress | None = None,
) -> Pairs:
    """Pairs of the flow's own samples of noise z, with guidance; a score step gives the clean data."""
    options = options or SamplingOptions()
    progress = progress or Progress()
    trace = SamplingTrace(keep_states=True)
    x = sample(
        flow,
        z,
        condition,
        null_condition,
        options.guidance,
        attn_temp=options.attn_temp,
        annealed_guidance=options.annealed_guidance,
        guidance_mode=options.guidance_mode,
        guided_blocks=options.guided_blocks,
        progress=progress,
        trace=trace,
    )
    count = len(flow.blocks)
    states = [trace.states[count - 1 - index] for index in active_blocks(flow)]
    clean = denoise(flow, x, condition, progress=progress)
    return _pairs(flow, flow.output_tokens(z), states, clean, condition)


def _pairs(flow: Flow, z: mx.array, states: list[mx.array], clean: mx.array, condition: mx.array | None) -> Pairs:
    def numbers(array: mx.array) -> np.ndarray:
        return np.array(array.astype(mx.float32))

    stacked = mx.stack([flow.tokens(state) for state in states], axis=1)
    own = None
    if condition is not None:
        own = np.array(condition) if mx.issubdtype(condition.dtype, mx.integer) else numbers(condition)
    return Pairs(numbers(z), numbers(stacked), numbers(flow.tokens(clean)), own)
