"""Memory of enlarging: the plan is an upper estimate, and chooses tiles that fit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import message
from helpers.peaks import one_at_a_time
from helpers.upscalers import rrdb_tensors, span_tensors, srvgg_tensors, write_upscaler

from mlx_starflow import Upscaler
from mlx_starflow.models.upscalers import SPAN, RRDBNet, SRVGGNet
from mlx_starflow.planning import upscaling
from mlx_starflow.planning.upscaling import SIDES, frames_at_once, tile_side, upscaling_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    "tensors",
    [
        rrdb_tensors(32, 16, 1),
        rrdb_tensors(32, 16, 1, unshuffle=2),
        srvgg_tensors(32, 9, 4),
        span_tensors(32, 4),
    ],
    ids=["rrdb", "rrdb of squares", "srvgg", "span"],
)
@pytest.mark.parametrize("side", [256, 32])
def test_the_plan_is_above_what_is_held(tmp_path, tensors, side):
    upscaler = Upscaler.load(write_upscaler(tmp_path / "a.pth", tensors), dtype="float32")
    network = upscaler._network
    # More than one of the small tiles; of a network that reads squares of pixels, maps as large as of the others.
    size = (120, 90) if side > 32 else (120 * network.unshuffle, 90 * network.unshuffle)
    picture = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    held = 0
    # Even one at a time, an operation's arrays may be freed after the next one has begun, so peaks differ by half.
    for _ in range(3):
        with one_at_a_time():
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            upscaler(picture, tile=side)
            held = max(held, mx.get_peak_memory() - before)
    planned = upscaling_bytes(network, size, side=side) - upscaling_bytes(network, (1, 1), side=side)
    assert held <= planned <= 3 * held


NETWORKS = [RRDBNet(64, 32, 23), RRDBNet(64, 32, 23, unshuffle=2), SRVGGNet(64, 32, 4), SPAN(48, 4)]


@pytest.mark.parametrize("network", NETWORKS)
def test_less_memory_smaller_tiles(network, monkeypatch):
    size = (848, 480)
    needed = [upscaling_bytes(network, size, side=side) for side in SIDES]
    assert needed == sorted(needed, reverse=True)
    for side, room in zip(SIDES, needed, strict=True):
        if side == SIDES[-1] or room > needed[SIDES.index(side) + 1]:
            monkeypatch.setattr(upscaling, "available", lambda room=room: room + mx.get_active_memory())
            assert tile_side(network, size) == side
    monkeypatch.setattr(upscaling, "available", lambda: 0)
    assert tile_side(network, size) == SIDES[-1], "tried as long as the machine has so much"
    monkeypatch.setattr(upscaling, "installed", lambda: 2**20)
    assert "takes" in (line := message(tile_side, network, size)) and "GB of memory, and this machine has" in line


def test_no_image_has_such_sides():
    assert "too large to be enlarged by 4" in message(tile_side, NETWORKS[0], (20_000, 8))


def test_small_frames_go_together(monkeypatch):
    network = NETWORKS[3]
    assert frames_at_once(network, (64, 64)) == 8
    assert frames_at_once(network, (848, 480)) == 1
    monkeypatch.setattr(upscaling, "available", lambda: 0)
    assert frames_at_once(network, (64, 64)) == 1
