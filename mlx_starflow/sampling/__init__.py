"""Noise -> latents: KV cache, sequential and Jacobi inversion, guidance, denoising. Knows nothing of pixels."""

from mlx_starflow.sampling.denoise import denoise
from mlx_starflow.sampling.jacobi import JacobiSettings
from mlx_starflow.sampling.sampler import SamplingTrace, sample

__all__ = ["JacobiSettings", "SamplingTrace", "denoise", "sample"]
