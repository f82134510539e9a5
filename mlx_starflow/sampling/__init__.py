"""Noise -> latents: KV cache, sequential and Jacobi inversion, guidance, denoising. Knows nothing of pixels."""

from mlx_starflow.sampling.certificate import Certificate, certify
from mlx_starflow.sampling.denoise import denoise
from mlx_starflow.sampling.guided import GuidedFlow
from mlx_starflow.sampling.methods import JacobiSettings, RollingSettings, SamplingPlan, SequentialSettings
from mlx_starflow.sampling.sampler import SamplingTrace, sample

__all__ = [
    "Certificate",
    "GuidedFlow",
    "JacobiSettings",
    "RollingSettings",
    "SamplingPlan",
    "SamplingTrace",
    "SequentialSettings",
    "certify",
    "denoise",
    "sample",
]
