"""The MLX TarFlow against the PyTorch reference, on configs drawn from the whole space."""

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

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.tarflow import TarFlow, TarFlowConfig
from mlx_starflow.sampling import denoise

pytestmark = [pytest.mark.torch, pytest.mark.parametrize("device", DEVICES)]

CONFIGS = st.fixed_dictionaries(
    {
        "img_size": st.sampled_from([2, 4, 6]),
        "channel_size": st.integers(1, 3),
        "patch_size": st.sampled_from([1, 2]),
        "channels": st.sampled_from([32, 64]),
        "blocks": st.integers(1, 4),
        "layers_per_block": st.integers(1, 2),
        "head_dim": st.sampled_from([8, 32]),
        "expansion": st.sampled_from([2, 4]),
        "nvp": st.booleans(),
        "num_classes": st.sampled_from([0, 1, 5]),
        "noise_std": st.sampled_from([0.05, 0.1]),
    }
)
SAMPLING = st.fixed_dictionaries(
    {
        "guidance": st.sampled_from([0.0, 0.8, 1.5]),
        "attn_temp": st.sampled_from([1.0, 0.7]),
        "annealed_guidance": st.booleans(),
        "guidance_target": st.sampled_from(["ab", "a", "b"]),
    }
)
NULLS = st.sampled_from([None, [0], [-1, 0]])


def make_pair(values: dict, seed: int, device: str) -> tuple:
    from mlx_starflow.reference.tarflow import TarFlow as Reference

    config = TarFlowConfig(**values)
    return random_pixel_flows(TarFlow(config), Reference(config), seed, device)


def both_labels(labels: list[int] | None, device: str) -> tuple:
    return both(None if labels is None else np.array(labels), device)


@pytest.mark.slow
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(values=CONFIGS, options=SAMPLING, null=NULLS, labeled=st.booleans(), seed=st.integers(0, 2**16))
def test_mlx_equals_the_reference(values, options, null, labeled, seed, device):
    from mlx_starflow.reference import sampling as reference

    flow, torch_model = make_pair(values, seed, device)
    config = flow.config
    rng = np.random.default_rng(seed)
    shape = (2, config.img_size, config.img_size, config.channel_size)
    x = both(rng.standard_normal(shape).astype(np.float32), device)
    labels = [int(rng.integers(config.num_classes)), -1] if config.num_classes and labeled else None
    text = both_labels(labels, device)
    check_forward(flow, torch_model, x, text)
    out, theirs = flow(x[0], text[0]), torch_model(x[1], text[1])
    assert relative(flow.standardize(out.z), torch_model.standardize(theirs.z)) < 1e-5
    assert "var" not in dict(torch_model.named_parameters())

    if labels is None:
        options, null = {**options, "guidance": 0.0}, None
    z = both(0.7 * rng.standard_normal((2, *flow.var.shape)).astype(np.float32), device)
    check_sampling(flow, torch_model, z, text, both_labels(null, device), options)
    assert relative(denoise(flow, x[0], text[0]), reference.denoise(torch_model, x[1], text[1])) < 1e-4


def test_wrong_labels_are_named(device):
    from mlx_starflow.reference.sampling import sample as sample_in_torch

    values = {"img_size": 4, "channel_size": 1, "patch_size": 2, "channels": 32, "blocks": 1, "layers_per_block": 1}
    _, torch_model = make_pair({**values, "head_dim": 8, "num_classes": 3}, 0, device)
    _, unlabeled = make_pair({**values, "head_dim": 8}, 0, device)
    z = both(np.zeros((2, 4, 4), np.float32), device)[1]
    for flow, labels, guidance, wanted in (
        (torch_model, [0, 3], 0.0, "labels must be 0 to 2, or -1"),
        (torch_model, [-2, 0], 0.0, "labels must be 0 to 2, or -1"),
        (torch_model, None, 1.0, "guidance needs a class label"),
        (unlabeled, [0, 0], 0.0, "no classes"),
        (unlabeled, None, 1.0, "no classes, so guidance has no effect"),
    ):
        with pytest.raises(StarflowError, match=wanted):
            sample_in_torch(flow, z, both_labels(labels, device)[1], guidance=guidance)
