"""Upscalers read from files against the same networks in PyTorch, on random weights and sizes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.torch_reference import relative
from helpers.upscalers import (
    rrdb_tensors,
    rrdb_torch,
    span_tensors,
    span_torch,
    srvgg_tensors,
    srvgg_torch,
    write_upscaler,
)

from mlx_starflow.convert.upscalers import open_upscaler

pytestmark = pytest.mark.torch

BOUND = 1e-5
"""Relative to the largest value; float32 on both sides."""

SIZES = [(8, 8), (7, 13), (1, 5)]


def check(path, reference, size, seed=3, batch=2):
    import torch

    network = open_upscaler(path).read()
    pictures = np.random.default_rng(seed).random((batch, *size, 3), np.float32)
    with torch.no_grad():
        theirs = reference(torch.from_numpy(pictures.transpose(0, 3, 1, 2)))
    ours = network(mx.array(pictures))
    assert ours.shape == (batch, size[0] * network.scale, size[1] * network.scale, 3)
    assert relative(ours, theirs.permute(0, 2, 3, 1)) < BOUND


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 4),
        ({"channels": 12, "growth": 5, "blocks": 1, "seed": 1}, 4),
        ({"doublings": 1, "seed": 2}, 2),
        ({"doublings": 0, "seed": 3}, 1),
        ({"doublings": 3, "blocks": 1, "seed": 4}, 8),
    ],
)
def test_rrdb(tmp_path, config, scale, size):
    tensors = rrdb_tensors(**config)
    path = write_upscaler(tmp_path / "a.pth", tensors)
    assert open_upscaler(path).network.scale == scale
    check(path, lambda x: rrdb_torch(tensors, x), size)


@pytest.mark.parametrize(
    ("unshuffle", "scale", "size"),
    [(2, 2, (8, 8)), (2, 2, (7, 13)), (2, 2, (4, 3)), (4, 1, (8, 8)), (4, 1, (7, 13)), (4, 1, (6, 5))],
)
def test_rrdb_of_squares_of_pixels(tmp_path, unshuffle, scale, size):
    """Real-ESRGAN's x2plus: four pixels in one position, and odd sizes mirrored to even ones."""
    tensors = rrdb_tensors(unshuffle=unshuffle)
    path = write_upscaler(tmp_path / "a.pth", tensors)
    assert open_upscaler(path).network.scale == scale
    check(path, lambda x: rrdb_torch(tensors, x, unshuffle), size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("convolutions", "scale"), [(3, 4), (0, 2), (10, 3), (17, 1)])
def test_srvgg(tmp_path, convolutions, scale, size):
    tensors = srvgg_tensors(convolutions=convolutions, scale=scale, seed=convolutions)
    path = write_upscaler(tmp_path / "a.safetensors", tensors)
    check(path, lambda x: srvgg_torch(tensors, x, scale), size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("channels", "scale", "normalized"), [(6, 4, True), (10, 2, True), (4, 3, False)])
def test_span(tmp_path, channels, scale, normalized, size):
    tensors = span_tensors(channels, scale, seed=channels, normalized=normalized)
    path = write_upscaler(tmp_path / "a.pth", tensors)
    check(path, lambda x: span_torch(tensors, x, scale), size)


def test_a_state_dict_as_the_training_saves_it(tmp_path):
    """{"params": ..., "params_ema": ...}: the averaged weights, without DistributedDataParallel's prefix."""
    import torch

    tensors, last = srvgg_tensors(seed=1), srvgg_tensors(seed=2)
    saved = {
        "params": {name: torch.from_numpy(each) for name, each in last.items()},
        "params_ema": {f"module.{name}": torch.from_numpy(each).half() for name, each in tensors.items()},
    }
    torch.save(saved, tmp_path / "a.pth")
    rounded = {name: each.astype(np.float16).astype(np.float32) for name, each in tensors.items()}
    check(tmp_path / "a.pth", lambda x: srvgg_torch(rounded, x, 4), (6, 5))
