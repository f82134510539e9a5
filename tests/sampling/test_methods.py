"""Settings of sampling methods, and sampling plans on disk."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from helpers.tiny_flows import tiny_case

from mlx_starflow.errors import StarflowError
from mlx_starflow.sampling import (
    FramewiseSettings,
    JacobiSettings,
    RollingSettings,
    SamplingPlan,
    SequentialSettings,
    sample,
)
from mlx_starflow.sampling.methods import block_settings, for_videos

PLAN = SamplingPlan(
    (SequentialSettings(), JacobiSettings(8, 1e-5), RollingSettings(32, 1e-2, "previous", 16)),
    0.01,
    {"guidance": 2.5},
)


def test_a_plan_comes_back(tmp_path):
    assert SamplingPlan.find(tmp_path) is None
    path = PLAN.save(tmp_path)
    assert path == tmp_path / "sampling_plan.json"
    assert SamplingPlan.find(tmp_path) == PLAN
    assert [entry.name for entry in tmp_path.iterdir()] == ["sampling_plan.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan.pop("blocks"), "is damaged"),
        (lambda plan: plan.update(blocks=5), "is damaged"),
        (lambda plan: plan.update(version=2), "version 2 is not known"),
        (lambda plan: plan["blocks"][0].update(method="magic"), "is damaged.*magic"),
        (lambda plan: plan["blocks"][1].update(colour=3), "is damaged.*colour"),
        (lambda plan: plan["blocks"][2].update(window=0), "window must be 1 or more"),
    ],
)
def test_damaged_plans(tmp_path, change, message):
    values = PLAN.to_dict()
    change(values)
    (tmp_path / "sampling_plan.json").write_text(json.dumps(values))
    with pytest.raises(StarflowError, match=message):
        SamplingPlan.find(tmp_path)


def test_a_plan_of_videos_comes_back(tmp_path):
    later = RollingSettings(32, 1e-2, "motion-affine", 16)
    plan = replace(PLAN, blocks=(SequentialSettings(), FramewiseSettings(JacobiSettings(8), later)), frame=16)
    plan.save(tmp_path)
    assert SamplingPlan.find(tmp_path) == plan
    values = plan.to_dict()
    values["blocks"][1]["later"]["method"] = "framewise"
    with pytest.raises(StarflowError, match=r"is damaged.*unknown method framewise"):
        SamplingPlan.from_dict(values)
    del values["blocks"][1]["later"]
    with pytest.raises(StarflowError, match=r"is damaged.*later"):
        SamplingPlan.from_dict(values)


def test_a_plan_for_frames_of_another_size():
    later = RollingSettings(32, 1e-2, "motion-affine", 16)
    blocks = (RollingSettings(8), FramewiseSettings(JacobiSettings(8), later), SequentialSettings())
    plan = replace(PLAN, blocks=blocks, frame=16)
    assert for_videos(plan, 16) is plan and for_videos(PLAN, 99) is PLAN
    larger = for_videos(plan, 24)
    assert larger.frame == 24 and larger.blocks == (
        RollingSettings(8),
        FramewiseSettings(JacobiSettings(8), RollingSettings(48, 1e-2, "motion-affine", 24)),
        SequentialSettings(),
    )


def test_a_truncated_plan(tmp_path):
    (tmp_path / "sampling_plan.json").write_text('{"version": 1, "blo')
    with pytest.raises(StarflowError, match=r"sampling_plan.json is damaged.*mlx-starflow tune"):
        SamplingPlan.find(tmp_path)


def test_a_plan_that_cannot_be_written(tmp_path):
    with pytest.raises(StarflowError, match="cannot be written: No such file"):
        PLAN.save(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: JacobiSettings(block_size=0), "jacobi sampling: block_size must be 1 or more, not 0"),
        (lambda: JacobiSettings(threshold=-1.0), "threshold must be 0 or more"),
        (lambda: JacobiSettings(max_iterations=0), "max_iterations must be 1 or more"),
        (lambda: RollingSettings(window=0), "rolling sampling: window must be 1 or more"),
        (lambda: RollingSettings(tolerance=float("nan")), "tolerance must be 0 or more"),
        (
            lambda: RollingSettings(guess="luck"),
            "unknown first guess 'luck'; it must be one of noise, affine, previous",
        ),
        (lambda: RollingSettings(guess="previous"), 'first guess "previous" needs a lag'),
        (lambda: RollingSettings(guess="motion-affine"), 'first guess "motion-affine" needs a lag'),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(StarflowError, match=message):
        make()


def test_settings_of_each_block():
    assert block_settings("rolling", 2) == (RollingSettings(), RollingSettings())
    assert block_settings(JacobiSettings(4), 2) == (JacobiSettings(4), JacobiSettings(4))
    assert block_settings(PLAN, 3) == PLAN.blocks
    tiny = tiny_case("tarflow_vp")
    z = tiny.noise(tiny.flow(tiny.x).z)
    assert sample(tiny.flow, z, method=PLAN).shape == tiny.x.shape
    with pytest.raises(StarflowError, match="plan is for 3 blocks, and this flow has 2"):
        block_settings(PLAN, 2)
