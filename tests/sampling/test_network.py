"""A block's network in MLX: a GPU is given its first layers while Python builds the others."""

from __future__ import annotations

import mlx.core as mx
import pytest
from helpers.tiny_flows import tiny_flow

from mlx_starflow.models.flow import Condition
from mlx_starflow.models.transformer import TransformerLayer
from mlx_starflow.sampling import network
from mlx_starflow.sampling.network import CompiledNetwork

LAYERS = 10


@pytest.fixture(autouse=True)
def computed_by() -> None:
    """MLX computes this anywhere."""


@pytest.fixture
def evaluations():
    """Affine parameters of a few tokens at a time, some of them trimmed, and the cache that is left."""
    block = tiny_flow("image", layers_per_block=[1, LAYERS], txt_size=0, txt_dim=0).blocks[-1]
    tokens = mx.random.normal((2, 16, block.config.in_channels), key=mx.random.key(0))

    def run() -> list[mx.array]:
        fed, made = CompiledNetwork(block, 2, 16, None, Condition(), 1.0), []
        for start, stop, trimmed in ((0, 1, 0), (1, 6, 3), (3, 8, 0), (8, 16, 0)):
            made.append(fed(tokens[:, start:stop]))
            mx.eval(made[-1])
            fed.trim(trimmed)
        return [*made, *(array for cache in fed.caches for array in (cache.keys, cache.values))]

    return run


def test_layers_ahead_change_nothing(evaluations, monkeypatch):
    ahead = evaluations()
    monkeypatch.setattr(network, "LAYERS_AHEAD", LAYERS + 1)
    whole = evaluations()
    assert all(mx.array_equal(one, other) for one, other in zip(ahead, whole, strict=True))


def test_layers_are_launched_before_the_last_is_built(evaluations, monkeypatch):
    launched, launch = [], mx.async_eval
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: (launched.append(len(arrays)), launch(*arrays)))
    evaluations()
    # Each evaluation: its tokens, then what the first layer leaves for the next, then what layers 5 and 9 do.
    assert launched == [1, 4, 4, 4] * 4


def test_a_width_is_traced_once_however_long_the_sequence(monkeypatch):
    block = tiny_flow("image", layers_per_block=[1, LAYERS], txt_size=0, txt_dim=0).blocks[-1]
    tokens = mx.random.normal((2, 64, block.config.in_channels), key=mx.random.key(0))
    traced, before = [], TransformerLayer.before
    monkeypatch.setattr(
        TransformerLayer, "before", lambda self, x, rope: traced.append(x.shape[1]) or before(self, x, rope)
    )
    fed = CompiledNetwork(block, 2, 64, None, Condition(), 1.0)
    for _ in range(3):
        for width in (1, 3, 4):
            for start in range(0, 64 - width, width):
                mx.eval(fed(tokens[:, start : start + width]))
            fed.trim(64)
    assert sorted(traced) == sorted([1, 3, 4] * LAYERS)
