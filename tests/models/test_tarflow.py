"""TarFlow: against the official code (tests/data), its configs and its labels. test_starflow.py checks it as a flow."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny_flows import tiny_case
from mlx.utils import tree_flatten

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.tarflow import TarFlow, TarFlowConfig, sanitize

CASES = ["tarflow", "tarflow_vp"]


@pytest.mark.parametrize("case", CASES)
def test_forward_is_the_official_one(golden, case):
    golden = golden(case)
    flow, x = golden.flow, golden["x"]
    assert golden.error(flow.tokens(x), "patches") == 0
    assert np.array_equal(np.array(flow.latents(flow.tokens(x))), np.array(x))
    out = flow(x, golden.get("y"))
    assert golden.relative_error(out.z, "z") < 1e-5
    assert float(out.loss()) == pytest.approx(float(golden.arrays["loss"]), rel=1e-5)
    assert out.log_det.shape == x.shape
    log_det = np.array(out.log_det).reshape(4, -1).mean(axis=1)
    assert np.abs(log_det - golden.arrays["logdet"]).max() <= 1e-5 * np.abs(golden.arrays["logdet"]).max()
    assert [block.config.flip for block in flow.blocks] == [False, True, False]
    assert np.array_equal(np.array(flow.tokens(out.hidden[-1])), np.array(out.z))


# Off by 0.0011 and 0.0007.
@pytest.mark.parametrize("case", CASES)
def test_bfloat16_weights(golden, case):
    golden = golden(case, mx.bfloat16)
    out = golden.flow(golden["x"], golden.get("y"))
    assert out.z.dtype == out.log_det.dtype == mx.float32
    assert golden.relative_error(out.z, "z") < 0.01
    assert abs(float(out.loss()) - float(golden.arrays["loss"])) < 0.002


def test_dropped_labels_read_the_mean_class(golden):
    golden = golden("tarflow")
    flow, x, labels = golden.flow, golden["x"], np.array(golden["y"])
    # The release dropped the second and the fourth.
    labels[[1, 3]] = -1
    assert golden.relative_error(flow(x, mx.array(labels)).z, "z_dropped") < 1e-5
    # No labels at all are dropped labels.
    assert np.abs(np.array(flow(x).z - flow(x, mx.full((4,), -1)).z)).max() < 1e-6


def test_first_token_of_a_block_passes_unchanged():
    for family in CASES:
        tiny = tiny_case(family)
        out = tiny.flow(tiny.x, tiny.text)
        hidden = [tiny.flow.tokens(h) for h in out.hidden]
        for index, block in enumerate(tiny.flow.blocks):
            first = -1 if block.config.flip else 0
            assert np.array_equal(np.array(hidden[index + 1][:, first]), np.array(hidden[index][:, first]))
            assert not np.array(tiny.flow.tokens(out.block_log_dets[index])[:, first]).any()


def test_volume_is_preserved_without_nvp():
    tiny = tiny_case("tarflow_vp")
    out = tiny.flow(tiny.x)
    assert not np.array(out.log_det).any()
    assert np.abs(np.array(out.z - tiny.flow.tokens(tiny.x))).max() > 0.1


def test_prior_variances():
    tiny = tiny_case("tarflow_vp")
    flow = tiny.flow
    z = flow(tiny.x).z
    noise = flow.standardize(z)
    assert np.abs(np.array(noise - z)).max() > 0.1
    assert np.abs(np.array(flow.noise_tokens(noise) - z)).max() < 1e-5
    assert float(mx.square(flow.noise_tokens(mx.ones_like(z)) - 0).mean()) == pytest.approx(float(flow.var.mean()))
    # They are no weights to train, whatever is thawed.
    flow.freeze()
    flow.unfreeze()
    names = {name for name, _ in tree_flatten(flow.trainable_parameters())}
    assert "var" not in names and "blocks.0.pos_embed" in names
    assert "var" in {name for name, _ in tree_flatten(flow.parameters())}


def test_new_flow_is_the_identity():
    for family in CASES:
        tiny = tiny_case(family)
        flow = TarFlow(tiny.flow.config)
        out = flow(tiny.x, tiny.text)
        assert np.array_equal(np.array(out.z), np.array(flow.tokens(tiny.x)))
        assert np.array_equal(np.array(flow.standardize(out.z)), np.array(out.z))


def test_wrong_inputs_are_named():
    tiny = tiny_case("tarflow")
    with pytest.raises(StarflowError, match=r"\(2, 4, 8, 1\); this flow reads \[batch, 4, 4, 1\]"):
        tiny.flow(mx.zeros((2, 4, 8, 1)), tiny.text)
    with pytest.raises(StarflowError, match="2 whole numbers"):
        tiny.flow(tiny.x, mx.array([0]))
    with pytest.raises(StarflowError, match="2 whole numbers"):
        tiny.flow(tiny.x, mx.array([0.0, 1.0]))
    with pytest.raises(StarflowError, match="no classes"):
        tiny_case("tarflow_vp").flow(tiny.x, tiny.text)
    # Inside traced functions labels cannot be looked at: a label that is no class cannot pass for one.
    for label in (3, -2):
        assert mx.isnan(tiny.flow(tiny.x, mx.array([label, 0])).loss()).item()


def test_sanitize_keeps_the_prior():
    kept = {"var": 1, "blocks.0.pos_embed": 2, "blocks.0.class_embed": 3}
    assert sanitize({**kept, "blocks.0.attn_mask": 0}) == kept


GOOD = {"img_size": 8, "channel_size": 3, "patch_size": 2, "channels": 128, "blocks": 3, "layers_per_block": 1}


def test_config_round_trip():
    for family in CASES:
        config = tiny_case(family).flow.config
        assert TarFlowConfig.from_dict({"model_type": "tarflow", **config.to_dict()}) == config


def test_official_arguments():
    training = {"nvp": 0, "noise_std": "7e-2", "dataset": "imagenet64", "cfg": None, "num_classes": 1000}
    config = TarFlowConfig.from_official({"arguments": [{key: value} for key, value in {**GOOD, **training}.items()]})
    assert config == TarFlowConfig(**GOOD, nvp=False, noise_std=0.07, num_classes=1000)
    assert config.num_patches == 16 and config.block(1).num_heads == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope": 1}, "unknown key rope"),
        ({"blocks": None}, "missing key blocks"),
        ({"blocks": 0}, "blocks must be a positive integer, not 0"),
        ({"img_size": 9}, "img_size 9 is no multiple of patch_size 2"),
        ({"channels": 100}, "channels 100 is no multiple of head_dim 64"),
        ({"layers_per_block": "1 1"}, "layers_per_block must be a positive integer"),
    ],
)
def test_config_mistakes_are_named(change, message):
    assert TarFlowConfig.from_dict(GOOD).num_classes == 0
    with pytest.raises(StarflowError, match=message):
        TarFlowConfig.from_dict({key: value for key, value in {**GOOD, **change}.items() if value is not None})
