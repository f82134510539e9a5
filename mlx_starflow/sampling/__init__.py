"""Noise -> latents: KV cache, inversion, guidance, denoising, certificates, plans, and videos frame by frame."""

from mlx_starflow.sampling.certificate import Certificate, certify
from mlx_starflow.sampling.denoise import denoise
from mlx_starflow.sampling.guidance import SamplingOptions
from mlx_starflow.sampling.guided import GuidedFlow
from mlx_starflow.sampling.iterate import iterate, noise_levels
from mlx_starflow.sampling.methods import (
    FramewiseSettings,
    JacobiSettings,
    RollingSettings,
    SamplingPlan,
    SequentialSettings,
)
from mlx_starflow.sampling.progress import Progress
from mlx_starflow.sampling.sampler import SamplingTrace, sample
from mlx_starflow.sampling.video import sample_frames
from mlx_starflow.sampling.video_denoising import denoise_frames

__all__ = [
    "Certificate",
    "FramewiseSettings",
    "GuidedFlow",
    "JacobiSettings",
    "Progress",
    "RollingSettings",
    "SamplingOptions",
    "SamplingPlan",
    "SamplingTrace",
    "SequentialSettings",
    "certify",
    "denoise",
    "denoise_frames",
    "iterate",
    "noise_levels",
    "sample",
    "sample_frames",
]
