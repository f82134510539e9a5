"""Noise and conditions to try methods with, for each kind of model."""

from __future__ import annotations

import mlx.core as mx
import pytest
from helpers.model_directories import write_image_model
from helpers.tiny_flows import tiny_flow

from mlx_starflow.bench.benchmark import bench
from mlx_starflow.bench.trials import prepare
from mlx_starflow.errors import StarflowError
from mlx_starflow.media.noise import draw_noise
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.models.tarflow import TarFlow, TarFlowConfig
from mlx_starflow.sampling import SamplingPlan, SequentialSettings


def test_a_model_that_reads_prompts(tmp_path):
    write_image_model(tmp_path)
    trials = prepare(tmp_path, ["a cat", "a dog"], seed=5)
    assert (
        trials.task.z.shape == (2, 4, 4, 4)
        and trials.task.text.shape == (2, 6, 32)
        and trials.task.null_text.shape == (1, 6, 32)
    )
    # The model's own guidance and temperature.
    assert trials.task.guidance == 1.0
    assert mx.allclose(trials.task.z, 0.8 * mx.array(draw_noise([5, 6], (4, 4, 4))))
    assert trials.plan is None
    assert trials.task.sample("sequential")[0].shape == trials.task.z.shape
    plan = SamplingPlan((SequentialSettings(),) * 2, 0.1, {})
    plan.save(tmp_path)
    assert prepare(tmp_path, ["a cat"], guidance=0.0).plan == plan
    with pytest.raises(StarflowError, match="there is no prompt"):
        prepare(tmp_path, [])


def test_a_model_without_conditions(tmp_path):
    flow = tiny_flow(txt_size=0, txt_dim=0)
    save_model(tmp_path, parameters(flow), {"model_type": "starflow", **flow.config.to_dict()})
    trials = prepare(tmp_path, ["", ""])
    assert trials.task.text is None and trials.task.guidance == 0.0
    assert trials.task.sample("sequential")[0].shape == (2, 4, 4, 4)


def test_a_model_of_classes(tmp_path):
    config = {"img_size": 4, "channel_size": 1, "patch_size": 2, "channels": 64, "blocks": 2, "layers_per_block": 1}
    flow = TarFlow(TarFlowConfig.from_dict({**config, "num_classes": 3}))
    save_model(tmp_path, parameters(flow), {"model_type": "tarflow", **flow.config.to_dict()})
    trials = prepare(tmp_path, ["", ""], guidance=1.5)
    assert trials.task.text.tolist() == [0, 1]
    assert trials.task.sample("sequential")[0].shape == (2, 4, 4, 1)
    assert trials.task.guidance == 1.5


def test_a_model_of_classes_has_its_own_guidance_and_temperature(tmp_path):
    flow = tiny_flow("tarflow", cfg=0.7)
    config = {"model_type": "tarflow", **flow.config.to_dict(), "pipeline": {"temperature": 0.9}}
    save_model(tmp_path, parameters(flow), config)
    trials = prepare(tmp_path, ["", ""], seed=3)
    assert trials.task.guidance == 0.7
    assert mx.allclose(trials.task.z, 0.9 * mx.array(draw_noise([3, 4], flow.var.shape)))


def test_tokens_of_blocks_with_patches_of_their_own(tmp_path):
    flow = tiny_flow("itarflow_patches")
    save_model(tmp_path, parameters(flow), {"model_type": "itarflow", **flow.config.to_dict()})
    lengths = [block.config.num_patches for block in flow.blocks]
    assert prepare(tmp_path, [""]).task.lengths == lengths and len(set(lengths)) == 2
    found = bench(tmp_path, methods=["sequential"], rounds=1).to_dict()["methods"][0]
    assert found["evaluations"] == [length - 1 for length in reversed(lengths)]
    assert found["tokens_per_evaluation"] == [length / (length - 1) for length in reversed(lengths)]
