"""The MLX text encoder against the PyTorch reference, on configs drawn from the whole space."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.torch_reference import DEVICES, both, give_weights, relative, to_numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_starflow.models.t5 import T5Config, T5Encoder

pytestmark = [pytest.mark.torch, pytest.mark.parametrize("device", DEVICES)]

ACTIVATIONS = ["relu", "gelu", "gelu_new", "silu"]
CONFIGS = st.fixed_dictionaries(
    {
        "vocab_size": st.sampled_from([7, 40]),
        "d_model": st.sampled_from([16, 32]),
        "d_kv": st.sampled_from([4, 8]),
        "d_ff": st.sampled_from([16, 48]),
        "num_layers": st.integers(1, 3),
        "num_heads": st.integers(1, 4),
        "relative_attention_num_buckets": st.sampled_from([4, 8, 32]),
        "relative_attention_max_distance": st.sampled_from([9, 20, 128]),
        "layer_norm_epsilon": st.sampled_from([1e-6, 1e-5]),
        "feed_forward_proj": st.sampled_from([*ACTIVATIONS, *(f"gated-{name}" for name in ACTIVATIONS)]),
    }
)


def make_pair(values: dict, seed: int, device: str) -> tuple:
    from mlx_starflow.reference.t5 import T5Encoder as Reference

    encoder = T5Encoder(T5Config(**values))
    rng = np.random.default_rng(seed)
    weights = []
    for name, value in tree_flatten(encoder.parameters()):
        noise = mx.array(rng.standard_normal(value.shape).astype(np.float32))
        # T5 folds the 1/sqrt(d) of attention into its queries.
        scale = (value.shape[-1] * (values["d_kv"] if name.endswith(".q.weight") else 1)) ** -0.5
        weights.append((name, 1 + 0.2 * noise if value.ndim == 1 else scale * noise))
    encoder.load_weights(weights)
    return encoder, give_weights(Reference(encoder.config), encoder, device)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(values=CONFIGS, length=st.integers(1, 40), kept=st.tuples(*[st.floats(0, 1)] * 3), seed=st.integers(0, 2**16))
def test_mlx_equals_the_reference(values, length, kept, seed, device):
    encoder, torch_model = make_pair(values, seed, device)
    rng = np.random.default_rng(seed)
    ids = rng.integers(values["vocab_size"], size=(3, length))
    # Some of the samples may be nothing but padding.
    mask = (np.arange(length) < np.ceil(length * np.array(kept))[:, None]).astype(np.int32)
    weights = rng.standard_normal((3, length, values["d_model"])).astype(np.float32)
    (ids, ids_torch), (mask, mask_torch), (weights, weights_torch) = (both(a, device) for a in (ids, mask, weights))
    assert relative(encoder(ids), torch_model(ids_torch)) < 1e-5
    encoded = torch_model.encode(ids_torch, mask_torch)
    assert relative(encoder.encode(ids, mask), encoded) < 1e-5

    def loss(parameters):
        encoder.update(parameters)
        return (encoder.encode(ids, mask) * weights).mean()

    (encoded * weights_torch).mean().backward()
    gradients = dict(tree_flatten(mx.grad(loss)(encoder.trainable_parameters())))
    for name, parameter in torch_model.named_parameters():
        gradient = to_numpy(parameter.grad)
        assert np.abs(to_numpy(gradients[name]) - gradient).max() < 1e-4 * max(np.abs(gradient).max(), 1e-3), name


def test_bfloat16_stays_close(device):
    import torch

    values = {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
    encoder, torch_model = make_pair({**values, "feed_forward_proj": "gated-gelu"}, 0, device)
    ids, ids_torch = both(np.arange(20).reshape(2, 10), device)
    mask, mask_torch = both((np.arange(10) < np.array([[10], [4]])).astype(np.int32), device)
    encoded = torch_model.to(torch.bfloat16).encode(ids_torch, mask_torch)
    assert encoded.dtype == torch.bfloat16
    assert relative(encoder.encode(ids, mask), encoded) < 0.05
