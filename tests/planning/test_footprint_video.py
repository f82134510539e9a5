"""Predicted memory of the video autoencoder against what MLX says it held."""

from __future__ import annotations

import mlx.core as mx
import pytest
from helpers.peaks import one_at_a_time

from mlx_starflow.models.autoencoder_wan import AutoencoderWan, AutoencoderWanConfig
from mlx_starflow.planning.footprint import decode_video

STATISTICS = {"latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4, "z_dim": 4, "num_res_blocks": 1}


@pytest.mark.parametrize(
    ("changes", "height", "width"),
    [
        ({"base_dim": 32, "decoder_base_dim": 32}, 6, 8),
        ({"base_dim": 24, "decoder_base_dim": 16}, 16, 24),
        ({"base_dim": 48, "decoder_base_dim": 32, "dim_mult": (1, 2, 2, 2)}, 16, 12),
    ],
)
def test_predicted_peaks(changes, height, width):
    config = AutoencoderWanConfig(**STATISTICS, **changes)
    vae = AutoencoderWan(config)
    z = mx.zeros((1, 1, height, width, 4))
    mx.eval(vae.parameters(), z)
    with one_at_a_time():
        before = mx.get_active_memory()
        decoder = vae.decoder_stream()
        mx.eval(decoder.push(z))
        mx.reset_peak_memory()
        mx.eval(decoder.push(z))
    taken = mx.get_peak_memory() - before
    assert taken <= decode_video(config, height, width, 4) <= 2 * taken


def test_the_released_autoencoder():
    config = AutoencoderWanConfig((0.0,) * 48, (1.0,) * 48)
    wide = decode_video(config, 30, 53, 2)
    assert 1.5e9 < wide < 2.5e9
    assert decode_video(config, 30, 53, 4) == pytest.approx(2 * wide)
