"""A block's tokens in NumPy beside the C++ network, against the same in MLX."""

from __future__ import annotations

import warnings

import mlx.core as mx
import numpy as np
import pytest

from mlx_starflow import cpu
from mlx_starflow.cpu.inverter import NativeInverter
from mlx_starflow.cpu.inverter import predict as predict_in_numpy
from mlx_starflow.kernels.affine import AffineMap, predict, starflow_guidance
from mlx_starflow.models.flow import BlockConfig, Condition, FlowBlock
from mlx_starflow.models.tarflow import TarFlowBlock, TarFlowBlockConfig
from mlx_starflow.sampling.guidance import Guidance
from mlx_starflow.sampling.inverter import MLXInverter, make_inverter
from mlx_starflow.sampling.network import cached_network

pytestmark = pytest.mark.skipif(not cpu.has_fast_networks(), reason="there is no compiler, or no Linux CPU")

BATCH, LENGTH, CHANNELS = 2, 9, 3
SIZES = {"in_channels": CHANNELS, "channels": 32, "head_dim": 16, "num_heads": 2, "num_kv_heads": 2, "num_layers": 2}
GUIDED = [(None, "ab"), ("starflow", "ab"), ("tarflow", "ab"), ("tarflow", "a"), ("tarflow", "b"), ("itarflow", "ab")]


def draw(key: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(key))


def make(kind: str) -> FlowBlock:
    mx.random.seed(0)
    if kind == "means_alone":
        block = TarFlowBlock(TarFlowBlockConfig(num_patches=LENGTH, nvp=False, **SIZES))
    else:
        block = FlowBlock(BlockConfig(soft_clip=4.0 if kind == "clipped" else 0.0, sos=kind != "no_start", **SIZES))
    block.proj_out.weight = 0.2 * draw(1, *block.proj_out.weight.shape)
    block.proj_out.bias = 0.2 * draw(2, *block.proj_out.bias.shape)
    return block


def inverters(block: FlowBlock, guidance: Guidance | None, z: mx.array) -> list:
    """One of each kind, with a network of its own."""
    rows = z.shape[0] * (2 if guidance else 1)
    condition = Condition(draw(3, rows, 2, SIZES["channels"])) if not isinstance(block, TarFlowBlock) else Condition()
    first = block.first_input(rows)
    weight = guidance.at(0, LENGTH, LENGTH) if guidance else 0.0
    networks = [cached_network(block, rows, LENGTH, None, condition, 1.0) for _ in range(2)]
    arguments = (z, first, block.config.affine, guidance, weight)
    return [make_inverter(networks[0], *arguments), MLXInverter(networks[1], *arguments)]


@pytest.mark.parametrize(("mode", "target"), GUIDED)
@pytest.mark.parametrize("affine", [AffineMap(), AffineMap(4.0, True)])
def test_the_affine_map_is_that_of_mlx(affine, mode, target):
    parameters = 2 * draw(0, 2 * BATCH, LENGTH, 2 * CHANNELS)
    parameters[0, 0, 0], parameters[1, 2, 3], parameters[3, 3, 5] = float("nan"), float("inf"), float("-inf")
    rows = BATCH if mode else 2 * BATCH
    weight = draw(1, rows, LENGTH, 1)
    with np.errstate(invalid="ignore"):
        actual = predict_in_numpy(np.array(parameters), affine, mode, np.array(weight), target)
    for found, wanted in zip(actual, predict(parameters, affine, mode, weight, target), strict=True):
        assert found.shape == wanted.shape
        assert np.allclose(found, np.array(wanted), 1e-5, 1e-5, equal_nan=True)


@pytest.mark.parametrize("kind", ["clipped", "no_start", "means_alone"])
@pytest.mark.parametrize("annealed", [False, True])
@pytest.mark.parametrize(("mode", "target"), GUIDED)
def test_every_step_is_that_of_mlx(kind, annealed, mode, target):
    guidance = Guidance(mode, 1.5, annealed, target) if mode else None
    block, z = make(kind), draw(4, BATCH, LENGTH, CHANNELS)
    both = inverters(block, guidance, z)
    assert isinstance(both[0], NativeInverter)

    def agree(actual, expected) -> None:
        assert np.allclose(np.array(actual), np.array(expected), 1e-5, 1e-5)

    start = 0 if block.config.sos else 1
    for each in both:
        each.write(2, draw(5, BATCH, 2, CHANNELS))
        each.remember(start, 3)
    agree(*(each.data(0, LENGTH) for each in both))
    for actual, expected in zip(*(each.predict(3, 5) for each in both), strict=True):
        agree(actual, expected)
    for each in both:
        each.invert(5, 6)
    agree(*(each.sweep(6, LENGTH, lag=3) for each in both))
    agree(*(each.data(0, LENGTH) for each in both))
    assert np.abs(np.array(both[0].data(5, LENGTH) - z[:, 5:])).min() > 0


def test_data_that_were_read_stay():
    z = draw(4, BATCH, LENGTH, CHANNELS)
    for each in inverters(make("clipped"), None, z):
        before = each.data(0, LENGTH)
        each.invert(0, LENGTH)
        assert np.array_equal(np.array(before), np.array(z))


def test_other_guidance_is_computed_in_mlx():
    block, z = make("clipped"), draw(4, BATCH, LENGTH, CHANNELS)
    own, named = (inverters(block, Guidance(mode, 1.5), z)[0] for mode in (starflow_guidance, "starflow"))
    assert isinstance(own, MLXInverter) and isinstance(named, NativeInverter)
    for each in (own, named):
        each.invert(0, LENGTH)
    assert np.allclose(np.array(own.data(0, LENGTH)), np.array(named.data(0, LENGTH)), 1e-5, 1e-5)


def test_what_is_not_finite_warns_nobody():
    """It is for the sampler to report, and a change that is not a number ends an iteration as in MLX."""
    z = draw(4, BATCH, LENGTH, CHANNELS)
    z[:, 0] = float("inf")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        changes = [each.sweep(0, LENGTH) for each in inverters(make("clipped"), None, z)]
    assert np.isnan(changes).all()
