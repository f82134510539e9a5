"""The anchor's divergence: its formula, where it is zero, and its gradient."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny_flows import tiny_flow

from mlx_starflow.training.finetuning.adapters import AdapterConfig, adapter_layers, attach
from mlx_starflow.training.finetuning.anchor import anchor_kl, gaussian_kl

RNG = np.random.default_rng(1)


def normal(*shape: int) -> mx.array:
    return mx.array(RNG.standard_normal(shape).astype(np.float32))


X, TEXT = normal(3, 4, 4, 4), normal(3, 6, 32)


def tuned(size: float = 0.05, **settings: object):
    flow = tiny_flow()
    attach(flow, AdapterConfig(**{"rank": 2, **settings}))
    mx.random.seed(4)
    for layer in adapter_layers(flow).values():
        layer.lora_b = size * mx.random.normal(layer.lora_b.shape)
    return flow


@pytest.mark.parametrize(("mu", "s", "mu2", "s2"), [(0.3, 0.8, -0.4, 1.1), (0.0, 2.0, 0.0, 0.5), (1.0, 0.3, 1.2, 0.3)])
def test_formula(mu, s, mu2, s2):
    x = RNG.normal(mu, s, 400_000)
    z, z2 = (x - mu) / s, (x - mu2) / s2
    # What any single x gives is the closed form, and the mean of log p - log q over samples of p is the same.
    one = gaussian_kl(mx.array(z[:5]), mx.array(-math.log(s)), mx.array(z2[:5]), mx.array(-math.log(s2)))
    closed = math.log(s2 / s) + (s**2 + (mu - mu2) ** 2) / (2 * s2**2) - 0.5
    assert np.allclose(np.array(one), closed, atol=1e-5)
    logs = 0.5 * z2**2 - 0.5 * z**2 + math.log(s2 / s)
    assert abs(logs.mean() - closed) < 5 * logs.std() / math.sqrt(len(x))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_zero_for_equal_models(kind):
    flow = tiny_flow()
    attach(flow, AdapterConfig(kind=kind, rank=2))
    assert abs(anchor_kl(flow, X, TEXT).item()) < 1e-7
    assert anchor_kl(tiny_flow(), X, TEXT, base=tiny_flow()).item() == 0


def test_switching_adapters_off_is_as_good_as_a_copy():
    flow = tuned()
    there = anchor_kl(flow, X, TEXT).item()
    assert there > 1e-4
    assert there == pytest.approx(anchor_kl(flow, X, TEXT, base=tiny_flow()).item(), rel=1e-5)


def test_untouched_blocks_add_nothing():
    flow = tuned(blocks="deep")
    assert anchor_kl(flow, X, TEXT).item() == pytest.approx(anchor_kl(flow, X, TEXT, base=tiny_flow()).item(), rel=1e-5)


def test_one_block_alone_is_the_likelihood_ratio():
    """Samples of the base: the mean log-likelihood ratio is the divergence."""
    flow = tuned(0.02, blocks="deep")
    base = tiny_flow()
    from mlx_starflow.sampling import sample

    z, text = normal(192, 4, 4, 4), mx.broadcast_to(TEXT[:1], (192, 6, 32))
    x = sample(base, z, text)
    ratio = np.array(flow(x, text).nll() - base(x, text).nll())
    divergence = anchor_kl(flow, x, text).item()
    assert divergence > 0
    assert abs(ratio.mean() - divergence) < 4 * ratio.std() / math.sqrt(len(ratio))


def test_gradient():
    flow = tuned()
    layer = next(iter(adapter_layers(flow).values()))
    direction = normal(*layer.lora_b.shape)

    def kl(step: mx.array) -> mx.array:
        before = layer.lora_b
        layer.lora_b = before + step * direction
        value = anchor_kl(flow, X, TEXT)
        layer.lora_b = before
        return value

    slope, step = mx.grad(kl)(mx.array(0.0)).item(), 1e-3
    assert slope == pytest.approx((kl(mx.array(step)) - kl(mx.array(-step))).item() / (2 * step), rel=2e-2)
