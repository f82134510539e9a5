"""Data to noise and back, under a prompt, under guidance, or under a mixture of two prompts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_starflow.kernels.memory import bounded
from mlx_starflow.likelihood.nll import is_dequantized
from mlx_starflow.likelihood.protocol import ImageModel
from mlx_starflow.models.flow import Flow
from mlx_starflow.sampling.decoder import check_finite
from mlx_starflow.sampling.denoise import denoise
from mlx_starflow.sampling.guidance import Guidance, SamplingOptions, guidance_function
from mlx_starflow.sampling.guided import GuidedFlow
from mlx_starflow.sampling.methods import Method, SamplingPlan, SequentialSettings, block_settings, for_videos
from mlx_starflow.sampling.progress import Watch, watch
from mlx_starflow.sampling.sampler import invert_block, state_of

WORST = 1.0
"""The largest distance of a sample from its noise that means anything, in standard deviations of the noise."""


class BlendedFlow(GuidedFlow):
    """A flow whose affine maps lie between those of two conditions.

    With strength s in 0..1 the mean is (1 - s) mu_source + s mu_target, and log sigma likewise; from 1 on the flow's
    own rule of guidance leads further away from the source, with weight s - 1. Each s gives one more invertible affine
    autoregressive flow: the source's at 0, the target's at 1.
    """

    def __init__(
        self,
        flow: Flow,
        shape: tuple[int, ...],
        source: mx.array,
        target: mx.array,
        strength: float | Sequence[float],
    ):
        """`shape` is the noise's; `strength` is one number from 0 on, or one a sample, `[B]`."""
        # Any guidance makes the blocks see both conditions; what is done with them is decided below.
        super().__init__(flow, shape, target, source, SamplingOptions(1.0))
        further = guidance_function(self.conditions.guidance_mode)

        def rule(
            mu: mx.array, log_sigma: mx.array, mu_source: mx.array, log_sigma_source: mx.array, s: float | mx.array
        ) -> tuple[mx.array, mx.array]:
            s = mx.array(s)
            beyond = further(mu, log_sigma, mu_source, log_sigma_source, mx.maximum(s - 1, 0))
            between = (mu_source + s * (mu - mu_source), log_sigma_source + s * (log_sigma - log_sigma_source))
            return mx.where(s > 1, beyond[0], between[0]), mx.where(s > 1, beyond[1], between[1])

        self.guidance = Guidance(rule, mx.array(np.asarray(strength, np.float32)).reshape(-1, 1, 1))


def prior_std(flow: Flow) -> mx.array:
    """Standard deviation of the prior's tokens: 1, or `[N, C]` where a TarFlow has learned it."""
    return mx.sqrt(flow.prior_variance)


@dataclass(frozen=True)
class Inversion:
    """How noise is made data again.

    Attributes:
        method: of sampling.
        progress: is told of each step, and can end it.
    """

    method: Method = "sequential"
    progress: Watch = False


SEQUENTIAL = Inversion()


@bounded()
def tokens_to_noise(guided: GuidedFlow, tokens: mx.array, inversion: Inversion = SEQUENTIAL) -> mx.array:
    """Data tokens `[B, N, C]` -> standard normal tokens, in data order; one parallel pass."""
    noise = guided.forward(tokens, inversion.progress) / prior_std(guided.flow)
    check_finite(noise, "the noise")
    return noise


def noise_to_tokens(guided: GuidedFlow, noise: mx.array, inversion: Inversion = SEQUENTIAL) -> mx.array:
    """The inverse of `tokens_to_noise`: exact, or with a method that is not, as exact as that is."""
    return _inverted(guided, noise * prior_std(guided.flow), inversion)


def _inverted(guided: GuidedFlow, tokens: mx.array, inversion: Inversion) -> mx.array:
    batch, length, _ = tokens.shape
    method = for_videos(inversion.method, length // guided.frames) if guided.frames > 1 else inversion.method
    settings, active = block_settings(method, len(guided.flow.blocks)), list(guided.active())
    with watch(inversion.progress).counting("flow", length * len(active), "tok", shown=False) as counter:
        for index in active:
            decoder = guided.decoder(index, batch, length)
            counter.block = index
            counter.state = partial(state_of, guided.flow, decoder, (batch, *guided.shape[1:]))
            tokens = invert_block(decoder, tokens, settings[index], advance=counter.advance)
    check_finite(tokens, "the sample")
    return tokens


def to_noise(guided: GuidedFlow, x: mx.array, inversion: Inversion = SEQUENTIAL) -> mx.array:
    """Data `[B, ...]` -> noise, shaped as `sample` takes it."""
    flow = guided.flow
    noise = tokens_to_noise(guided, flow.tokens(x), inversion)
    return flow.token_noise(noise, x.shape)


def from_noise(guided: GuidedFlow, z: mx.array, inversion: Inversion = SEQUENTIAL) -> mx.array:
    """Noise, shaped as `sample` takes it, -> data: the inverse of `to_noise`, as exact as the method."""
    flow = guided.flow
    return flow.latents(_inverted(guided, flow.noise_tokens(z), inversion), z.shape)


def regenerated(guided: GuidedFlow, z: mx.array, inversion: Inversion = SEQUENTIAL) -> mx.array:
    """`from_noise`, with a warning if the flow, run forwards over the data, does not lead back to the noise.

    A sample that is off by a standard deviation of the noise is another noise's, whatever it looks like; and one by a
    sampling plan that is off by more than the plan allows is not what the plan promises. A plan of sequential blocks
    alone is as exact as there is.
    """
    x, method, allowed = from_noise(guided, z, inversion), inversion.method, WORST
    if isinstance(method, SamplingPlan) and not all(isinstance(block, SequentialSettings) for block in method.blocks):
        allowed = min(method.tolerance, WORST)
    distance = float(np.abs(np.array(to_noise(guided, x, inversion) - z)).max())
    if not distance <= allowed:
        advice = "try a lower guidance or strength, or weights in float32"
        if allowed < WORST:
            advice = f"the sampling plan allows {allowed:.1e}; give the method sequential"
        warnings.warn(
            f"the result is not what its noise leads to (off by {distance:.1e} standard deviations): {advice}",
            stacklevel=3,
        )
    return x


def previews(model: ImageModel) -> Callable[[mx.array], list[Image.Image]]:
    """What shows states of an edit, data `[B, ...]`: an image of each, of a video its first frame."""

    def decode(data: mx.array) -> list[Image.Image]:
        images = model.to_images(data)
        model.release("vae")
        return [each[0] if isinstance(each, list) else each for each in images]

    return decode


def cleaned(flow: Flow, x: mx.array, text: mx.array | None, progress: Watch = False) -> mx.array:
    """A sample `[B, ...]` without the Gaussian noise that the flow was trained with, by one score step.

    The uniform noise of a dequantized pixel model is below what a pixel can show, and stays.
    """
    return x if is_dequantized(flow) else denoise(flow, x, text, progress=progress)
