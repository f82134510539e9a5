"""The proof that a sample is right: run the flow forwards and compare with the noise it was made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_starflow.kernels.affine import GuidanceMode, GuidanceTarget
from mlx_starflow.models.flow import Flow
from mlx_starflow.models.itarflow import at_noise_level
from mlx_starflow.sampling.denoise import at_once
from mlx_starflow.sampling.guidance import SamplingOptions
from mlx_starflow.sampling.guided import GuidedFlow


@dataclass(frozen=True)
class Certificate:
    """How far f(x), the guided flow run forwards over a sample, is from the noise z that the sample was made of.

    Attributes:
        max: largest |f(x) - z|, in standard deviations of the noise.
        rms: its root mean square.
        noise_floor: the largest residual in a block that the precision cannot tell from 0 (see `noise_floor`); None if
            it was not measured.
    """

    max: float
    rms: float
    noise_floor: float | None = None

    def __str__(self) -> str:
        floor = "" if self.noise_floor is None else f" (this precision resolves {self.noise_floor:.1e})"
        return f"|f(x) - z| at most {self.max:.1e}, RMS {self.rms:.1e}{floor}"

    @classmethod
    def of(cls, residuals: np.ndarray) -> Certificate:
        """Of the differences f(x) - z; one that is not a number counts as infinite."""
        values = np.nan_to_num(np.abs(residuals), nan=math.inf)
        return cls(float(values.max()), float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))))

    @classmethod
    def worst(cls, certificates: list[Certificate]) -> Certificate:
        """Of several batches of one size: the largest difference and noise floor, and the RMS over all."""
        squares = [certificate.rms**2 for certificate in certificates]
        floors = [each.noise_floor for each in certificates if each.noise_floor is not None]
        largest = max(certificate.max for certificate in certificates)
        return cls(largest, math.sqrt(sum(squares) / len(squares)), max(floors, default=None))


def certify_each(
    flow: Flow,
    x: mx.array,
    z: mx.array,
    text: mx.array | None = None,
    null_text: mx.array | None = None,
    guidance: float = 0.0,
    *,
    attn_temp: float = 1.0,
    annealed_guidance: bool = False,
    guidance_target: GuidanceTarget = "ab",
    guidance_mode: GuidanceMode | None = None,
    guided_blocks: int | None = None,
    noise_level: float | None = None,
) -> list[Certificate]:
    """Certify samples x `[B, H, W, C]`, before denoising, of noise z: each by itself, in parallel forward passes.

    The other arguments are those of `sample`, and must be the ones that the samples were made with.
    """
    flow = at_noise_level(flow, noise_level)
    options = SamplingOptions(guidance, attn_temp, annealed_guidance, guidance_target, guidance_mode, guided_blocks)
    return [Certificate.of(each) for each in _residuals(flow, x, z, text, null_text, options)]


def certify(
    flow: Flow,
    x: mx.array,
    z: mx.array,
    text: mx.array | None = None,
    null_text: mx.array | None = None,
    guidance: float = 0.0,
    *,
    attn_temp: float = 1.0,
    annealed_guidance: bool = False,
    guidance_target: GuidanceTarget = "ab",
    guidance_mode: GuidanceMode | None = None,
    guided_blocks: int | None = None,
    noise_level: float | None = None,
) -> Certificate:
    """The certificate of all samples together, see `certify_each`."""
    flow = at_noise_level(flow, noise_level)
    options = SamplingOptions(guidance, attn_temp, annealed_guidance, guidance_target, guidance_mode, guided_blocks)
    return Certificate.of(_residuals(flow, x, z, text, null_text, options))


def _residuals(
    flow: Flow,
    x: mx.array,
    z: mx.array,
    text: mx.array | None,
    null_text: mx.array | None,
    options: SamplingOptions,
) -> np.ndarray:
    """f(x) - z, `[B, N, C]`, of as many samples at once as `denoise` takes."""
    tokens, noise, count = flow.tokens(x), flow.noise_tokens(z), at_once(flow, x, text)
    residuals = []
    for start in range(0, len(tokens), count):
        part = slice(start, start + count)
        null = null_text if null_text is None or len(null_text) == 1 else null_text[part]
        guided = GuidedFlow(flow, z[part].shape, None if text is None else text[part], null, options)
        residuals.append(np.array(guided.forward(tokens[part]) - noise[part]))
    return np.concatenate(residuals)
