"""Sampling plans belong to the weights that they were measured with, and keep what they promise."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace

import mlx.core as mx
import pytest
from helpers.model_directories import edit_weights, write_image_model

from mlx_starflow import load
from mlx_starflow.model_dir.files import load_weights
from mlx_starflow.model_dir.fingerprint import fingerprint
from mlx_starflow.sampling import SamplingPlan
from mlx_starflow.sampling.methods import JacobiSettings


@pytest.fixture
def model(tmp_path):
    return write_image_model(tmp_path / "model")


def plan(tolerance=1e30, iterations=1):
    return SamplingPlan((JacobiSettings(16, 1e30, iterations),) * 2, tolerance, {})


def test_a_plan_of_other_weights_is_ignored(model, tmp_path):
    replace(plan(), fingerprint=fingerprint(model)).save(model)
    assert load(model).plan is not None
    other = shutil.copytree(model, tmp_path / "other")
    name = next(name for name in load_weights(other) if ".proj_out." in name)
    edit_weights(other, **{name.replace(".", "__"): mx.array(load_weights(other)[name]) + 1})
    with pytest.warns(UserWarning, match="measured with other weights and is ignored"):
        pipe = load(other)
    assert pipe.plan is None
    # A plan that does not say whose it is was written before plans did.
    content = json.loads((other / "sampling_plan.json").read_text())
    del content["fingerprint"]
    (other / "sampling_plan.json").write_text(json.dumps(content))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(other).plan is not None


def test_a_certificate_beyond_the_plan_is_said(model):
    plan(tolerance=1e-9, iterations=1).save(model)
    pipe = load(model)
    with pytest.warns(UserWarning, match="more than the 1.0e-09 of the sampling plan"):
        made = pipe.generate("a cat", seed=1)
    assert made.stats.certificate.max > 1e-9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.generate("a cat", seed=1, method="sequential")


def test_a_plan_of_another_precision_is_ignored(model):
    replace(plan(), precision="float32").save(model)
    assert load(model, dtype="float32").plan == replace(plan(), precision="float32")
    with pytest.warns(
        UserWarning, match="measured in float32 and is ignored in float16; run `mlx-starflow tune` again"
    ):
        pipe = load(model, dtype="float16")
    assert pipe.plan is None and pipe.method(pipe.settings) == "rolling"
    # A plan that does not say which is for any.
    plan().save(model)
    assert load(model, dtype="float16").plan == plan()


@pytest.mark.parametrize("bits", [8, (8, 4)])
def test_a_plan_is_for_keys_and_values_in_its_bits(model, bits):
    replace(plan(), kv_bits=bits).save(model)
    pipe = load(model)
    assert pipe.plan == replace(plan(), kv_bits=bits)
    assert pipe.method(pipe.settings.updated(kv_bits=bits)) is pipe.plan
    assert pipe.method(pipe.settings.updated(kv_bits=4)) == "rolling"
    assert pipe.method(pipe.settings.updated(kv_bits="none")) == "rolling"
    assert pipe.inversion() == "sequential"  # editing is exact
    plan().save(model)
    assert "kv_bits" not in json.loads((model / "sampling_plan.json").read_text())
    pipe = load(model)
    assert pipe.method(pipe.settings.updated(kv_bits=8)) == "rolling" and pipe.inversion() is pipe.plan


def test_files_say_what_auto_was(model):
    """Without a plan; with one, the plan is asked again."""
    for method in (None, "rolling"):
        (metadata,) = load(model).generate("a cat", seed=1, method=method).metadata
        assert metadata["settings"]["method"] == "rolling"
    plan().save(model)
    (metadata,) = load(model).generate("a cat", seed=1).metadata
    assert metadata["settings"]["method"] == "auto"


def test_a_flow_that_has_fallen_back_leaves_its_plan(model, monkeypatch):
    replace(plan(), precision="float32").save(model)
    pipe = load(model, dtype="float32")
    assert pipe.method(pipe.settings) == pipe.plan
    monkeypatch.setitem(pipe.backend._fallen, "flow", "bfloat16")
    assert pipe.method(pipe.settings) == "rolling"
