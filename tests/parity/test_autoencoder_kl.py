"""The MLX autoencoder against the PyTorch reference, on configs drawn from the whole space."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.torch_reference import DEVICES, difference, give_weights, relative, to_torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_starflow.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig

pytestmark = [pytest.mark.torch, pytest.mark.parametrize("device", DEVICES)]

CONFIGS = st.fixed_dictionaries(
    {
        "block_out_channels": st.lists(st.sampled_from([8, 12, 16]), min_size=1, max_size=3).map(tuple),
        "layers_per_block": st.integers(1, 2),
        "in_channels": st.sampled_from([1, 3]),
        "out_channels": st.sampled_from([1, 3]),
        "latent_channels": st.sampled_from([1, 4]),
        "norm_num_groups": st.sampled_from([1, 2, 4]),
        "mid_block_add_attention": st.booleans(),
        "use_quant_conv": st.booleans(),
        "use_post_quant_conv": st.booleans(),
        "scaling_factor": st.sampled_from([0.18215, 1.0]),
        "shift_factor": st.sampled_from([None, 0.1]),
        "statistics": st.booleans(),
    }
)


def make_pair(values: dict, seed: int, device: str) -> tuple:
    from mlx_starflow.reference.autoencoder_kl import AutoencoderKL as Reference

    rng = np.random.default_rng(seed)
    if values.pop("statistics"):
        values["latents_mean"], values["latents_std"] = (
            tuple(numbers.tolist()) for numbers in rng.uniform(0.5, 2, (2, values["latent_channels"]))
        )
    vae = AutoencoderKL(AutoencoderKLConfig(**values))
    weights = []
    for name, value in tree_flatten(vae.parameters()):
        noise = mx.array(rng.standard_normal(value.shape).astype(np.float32))
        scale = 0.2 if value.ndim == 1 else np.prod(value.shape[1:]) ** -0.5
        weights.append((name, (value if value.ndim == 1 else 0) + float(scale) * noise))
    vae.load_weights(weights)
    return vae, give_weights(Reference(vae.config), vae, device)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(values=CONFIGS, size=st.sampled_from([(2, 2), (4, 3), (2, 5)]), seed=st.integers(0, 2**16))
def test_mlx_equals_the_reference(values, size, seed, device):
    vae, torch_model = make_pair(dict(values), seed, device)
    rng = np.random.default_rng(seed)
    step = vae.config.downscale
    pictures = rng.uniform(-1, 1, (2, size[0] * step, size[1] * step, vae.config.in_channels)).astype(np.float32)
    latents = rng.standard_normal((2, *size, vae.config.latent_channels)).astype(np.float32)
    pictures_torch, latents_torch = (to_torch(array, device).requires_grad_() for array in (pictures, latents))
    pictures, latents = mx.array(pictures), mx.array(latents)

    posterior, (mean, logvar) = vae.encode(pictures), torch_model.encode(pictures_torch)
    assert relative(posterior.mean, mean.permute(0, 2, 3, 1)) < 1e-5
    assert relative(posterior.logvar, logvar.permute(0, 2, 3, 1)) < 1e-5
    decoded = torch_model.decode(latents_torch)
    assert difference(vae.decode(latents), decoded.permute(0, 2, 3, 1)) < 1e-4
    assert relative(vae.decode(latents), decoded.permute(0, 2, 3, 1)) < 1e-5
    for name in ("scale", "unscale"):
        expected = getattr(torch_model, name)(latents_torch).permute(0, 2, 3, 1)
        assert relative(getattr(vae, name)(latents), expected) < 1e-6

    (mean.square().sum() + logvar.sum()).backward()
    decoded.square().sum().backward()

    def encoded(x):
        posterior = vae.encode(x)
        return mx.square(posterior.mean).sum() + posterior.logvar.sum()

    assert relative(mx.grad(encoded)(pictures), pictures_torch.grad.permute(0, 2, 3, 1)) < 1e-4
    gradient = mx.grad(lambda z: mx.square(vae.decode(z)).sum())(latents)
    assert relative(gradient, latents_torch.grad.permute(0, 2, 3, 1)) < 1e-4
