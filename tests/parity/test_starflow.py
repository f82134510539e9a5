"""The MLX flow against the PyTorch reference, on configs drawn from the whole space that both know."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.torch_reference import DEVICES, both, check_forward, check_sampling, give_weights, relative
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.starflow import FlowConfig, STARFlow
from mlx_starflow.sampling import denoise

pytestmark = [pytest.mark.torch, pytest.mark.parametrize("device", DEVICES)]

# A deep block shaped like a language model, as official configs ask for with `top_block`.
LANGUAGE_MODEL = {
    "hf_style_rope": True, "use_swiglu": True, "use_qk_norm": True, "use_post_norm": True, "use_final_norm": True,
    "use_bias": False, "norm_type": "rms_norm", "num_heads": 3, "num_kv_heads": 1, "head_dim": 8, "channels": 10,
    "expansion": 2, "num_layers": 2, "use_proj_txt": False, "use_rope": True,
}  # fmt: skip

CONFIGS = st.fixed_dictionaries(
    {
        "channel_size": st.integers(1, 4),
        "patch_size": st.sampled_from([1, 2]),
        "channels": st.sampled_from([64, 96]),
        "layers_per_block": st.lists(st.integers(0, 2), min_size=1, max_size=4).filter(lambda n: n[-1] > 0),
        "head_dim": st.sampled_from([24, 32]),
        "num_heads": st.sampled_from([None, 3]),
        "num_kv_heads": st.sampled_from([None, 1]),
        "expansion": st.sampled_from([2, 4]),
        "txt_size": st.sampled_from([0, 5]),
        "sos": st.booleans(),
        "seq_order": st.sampled_from(["L2R", "R2L"]),
        "pt_seq_len": st.sampled_from([None, 7]),
        "use_softplus": st.booleans(),
        "cond_top_only": st.booleans(),
        "use_final_norm": st.booleans(),
        "soft_clip": st.sampled_from([0.0, 4.0]),
        "use_bias": st.booleans(),
        "use_swiglu": st.booleans(),
        "use_qk_norm": st.booleans(),
        "use_post_norm": st.booleans(),
        "norm_type": st.sampled_from(["layer_norm", "rms_norm"]),
        "top_block_channels": st.sampled_from([None, 128]),
        "top_block": st.sampled_from([None, None, LANGUAGE_MODEL]),
        "latent_norm_regularization": st.sampled_from([0.0, 1e-4]),
    }
)
SAMPLING = st.fixed_dictionaries(
    {
        "guidance": st.sampled_from([0.0, 1.5]),
        "attn_temp": st.sampled_from([1.0, 0.8]),
        "annealed_guidance": st.booleans(),
    }
)
SHAPES = st.sampled_from([(4, 4), (2, 6), (5, 3)])


def make_pair(values: dict, seed: int, device: str) -> tuple:
    """The same random flow twice, far enough from the identity to tell."""
    from mlx_starflow.reference.starflow import STARFlow as Reference

    config = FlowConfig(img_size=4, txt_dim=10, **values)
    flow = STARFlow(config)
    rng = np.random.default_rng(seed)
    weights = []
    for name, value in tree_flatten(flow.parameters()):
        scale = 0.25 if value.ndim == 1 or name.endswith("sos_embed") else value.shape[-1] ** -0.5
        # Mild affine maps: others multiply rounding a thousand times over the tokens, or overflow.
        scale = 0.05 * scale if "proj_out" in name else scale
        noise = scale * rng.standard_normal(value.shape).astype(np.float32)
        weights.append((name, mx.array(noise) + (value if value.ndim == 1 else 0)))
    flow.load_weights(weights)
    return flow, give_weights(Reference(config), flow, device)


def make_inputs(config: FlowConfig, shape: tuple, seed: int) -> tuple:
    """Data, text and null text."""
    rng = np.random.default_rng(seed)
    p = config.patch_size
    x = rng.standard_normal((2, p * shape[0], p * shape[1], config.channel_size)).astype(np.float32)
    text = rng.standard_normal((2, 5, 10)).astype(np.float32) if config.txt_size else None
    null = rng.standard_normal((1, 5, 10)).astype(np.float32) if config.txt_size else None
    return x, text, null


@pytest.mark.slow
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(values=CONFIGS, shape=SHAPES, options=SAMPLING, seed=st.integers(0, 2**16))
def test_mlx_equals_the_reference(values, shape, options, seed, device):
    from mlx_starflow.reference import sampling as reference

    flow, torch_model = make_pair(values, seed, device)
    x, text, null = make_inputs(flow.config, shape, seed)
    options = options if text is not None else {**options, "guidance": 0.0}
    noise, x, text, null = (both(array, device) for array in (0.7 * x, x, text, null))
    check_forward(flow, torch_model, x, text)
    check_sampling(flow, torch_model, noise, text, null, options)
    (x, x_torch), (text, text_torch) = x, text
    assert relative(denoise(flow, x, text), reference.denoise(torch_model, x_torch, text_torch)) < 1e-4


def test_bfloat16_stays_close(device):
    import torch

    values = {"channel_size": 3, "patch_size": 1, "channels": 64, "layers_per_block": [2, 2], "txt_size": 5}
    flow, torch_model = make_pair({**values, "use_softplus": True}, 0, device)
    x, text, _ = make_inputs(flow.config, (4, 4), 0)
    (x, x_torch), (text, text_torch) = both(x, device), both(text, device)
    exact = torch_model(x_torch, text_torch).z
    flow.update(tree_unflatten([(k, v.astype(mx.bfloat16)) for k, v in tree_flatten(flow.parameters())]))
    assert relative(flow(x, text).z, exact) < 0.03
    torch_model.to(torch.bfloat16)
    out = torch_model(x_torch, text_torch)
    assert out.z.dtype == out.log_det.dtype == torch.float32
    assert relative(out.z, exact) < 0.03


def test_wrong_arguments_are_named(device):
    from mlx_starflow.reference.sampling import sample as sample_in_torch

    values = {"channel_size": 3, "patch_size": 1, "channels": 64, "layers_per_block": [1]}
    (_, torch_model), (_, textless) = (make_pair({**values, "txt_size": size}, 0, device) for size in (5, 0))
    x, text, null = (both(array, device)[1] for array in make_inputs(torch_model.config, (4, 4), 0))
    for flow, arguments, message in (
        (torch_model, {"guidance": -1.0}, "guidance must be 0 or more"),
        (torch_model, {"attn_temp": 0.0}, "temperature must be greater than 0"),
        (torch_model, {"method": "parallel"}, "sequential or jacobi, not by 'parallel'"),
        (torch_model, {"guidance": 1.0, "null_text": None}, "guidance needs text and null_text"),
        (torch_model, {"text": None}, "this flow reads text"),
        (torch_model, {"guidance": 1.0, "guidance_target": "b"}, "TarFlow"),
        (textless, {"guidance": 1.0}, "reads no text, so guidance has no effect"),
        (torch_model, {"z": x * float("nan")}, "not finite"),
    ):
        with pytest.raises(StarflowError, match=message):
            sample_in_torch(flow, **{"z": x, "text": text, "null_text": null, **arguments})
