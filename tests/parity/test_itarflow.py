"""The MLX iTARFlow against the PyTorch reference, on configs drawn from the whole space."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.torch_reference import (
    DEVICES,
    both,
    check_forward,
    check_sampling,
    random_pixel_flows,
    relative,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_starflow.models.itarflow import ITarFlow, ITarFlowConfig
from mlx_starflow.sampling import denoise, iterate, noise_levels

pytestmark = [pytest.mark.torch, pytest.mark.parametrize("device", DEVICES)]


@st.composite
def configs(draw: st.DrawFn) -> dict:
    blocks = draw(st.integers(1, 4))
    each = st.lists(st.sampled_from([1, 2]), min_size=blocks, max_size=blocks)
    shared = draw(st.sampled_from([0, 0, 1, 2]))
    widths = st.lists(st.sampled_from([32, 64]), min_size=blocks, max_size=blocks)
    return {
        "img_size": draw(st.sampled_from([2, 4])),
        "channel_size": draw(st.integers(1, 3)),
        "patch_sizes": draw(each),
        "channels": [draw(st.sampled_from([32, 64]))] if shared else draw(widths),
        "blocks": blocks,
        "layers_per_block": draw(each),
        "head_dim": draw(st.sampled_from([8, 32])),
        "expansion": draw(st.sampled_from([2, 4])),
        "nvp": draw(st.booleans()),
        "num_classes": draw(st.sampled_from([0, 1, 5])),
        "shared_backbone_layers": shared,
    }


SAMPLING = st.fixed_dictionaries(
    {
        "guidance": st.sampled_from([0.0, 0.8, 1.5]),
        "attn_temp": st.sampled_from([1.0, 0.7]),
        "annealed_guidance": st.booleans(),
        "guidance_mode": st.sampled_from([None, "starflow", "tarflow", "itarflow"]),
        "guided_blocks": st.sampled_from([None, 1, 2]),
        "noise_level": st.sampled_from([None, 0.02, 0.5]),
    }
)


def make_pair(values: dict, seed: int, device: str) -> tuple:
    from mlx_starflow.reference.itarflow import ITarFlow as Reference

    config = ITarFlowConfig(**values)
    return random_pixel_flows(ITarFlow(config), Reference(config), seed, device)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(values=configs(), options=SAMPLING, labeled=st.booleans(), clip=st.booleans(), seed=st.integers(0, 2**16))
def test_mlx_equals_the_reference(values, options, labeled, clip, seed, device):
    from mlx_starflow.reference import sampling as reference

    flow, torch_model = make_pair(values, seed, device)
    config = flow.config
    rng = np.random.default_rng(seed)
    shape = (2, config.img_size, config.img_size, config.channel_size)
    x = both(rng.standard_normal(shape).astype(np.float32), device)
    labels = [int(rng.integers(config.num_classes)), -1] if config.num_classes and labeled else None
    text = both(None if labels is None else np.array(labels), device)
    check_forward(flow, torch_model, x, text)
    levels = both(np.array([0.02, 0.5], np.float32), device)
    out, theirs = flow(x[0], text[0], noise_level=levels[0]), torch_model(x[1], text[1], noise_level=levels[1])
    assert relative(out.z, theirs.z) < 1e-5 and relative(out.log_det, theirs.log_det) < 1e-5

    if labels is None:
        options = {**options, "guidance": 0.0}
    z = both(0.7 * rng.standard_normal((2, *flow.var.shape)).astype(np.float32), device)
    check_sampling(flow, torch_model, z, text, (None, None), options)
    assert relative(denoise(flow.at(0.1), x[0], text[0]), reference.denoise(torch_model.at(0.1), x[1], text[1])) < 1e-4
    steps, noise = noise_levels(0.5, 0.02, 3), both(rng.standard_normal((2, *shape)).astype(np.float32), device)
    ours = iterate(flow, x[0], text[0], steps, clip, noise=noise[0])
    assert relative(ours, reference.iterate(torch_model, x[1], text[1], steps, clip, noise=noise[1])) < 1e-3
    ours = iterate(flow, x[0], text[0], steps, clip)
    assert relative(ours, reference.iterate(torch_model, x[1], text[1], steps, clip)) < 1e-3
