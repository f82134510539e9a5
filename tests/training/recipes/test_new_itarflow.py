"""Training an iTARFlow from class folders: `mlx-starflow train` with a config of one."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import Command
from helpers.images import write_gradients
from helpers.tiny_flows import tiny_case

from mlx_starflow import load_flow
from mlx_starflow.models.itarflow import ITarFlow
from mlx_starflow.training.config import TrainingConfig
from mlx_starflow.training.data.labelled_images import LabelledImages, draw_levels, level_weights
from mlx_starflow.training.loop.objective import batch_loss, batch_nll

command = Command("train")
CONFIG = {"model_type": "itarflow", "img_size": 8, "patch_sizes": [2], "channels": [64], "blocks": 2,
          "layers_per_block": [1], "t0": 0.1, "t1": 0.5}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gradients(tmp_path_factory.mktemp("data") / "pictures")


def test_levels_are_drawn_between_both_ends():
    rng = np.random.default_rng(0)
    uniform, square = (draw_levels(rng, 20_000, 0.1, 0.5, sampling) for sampling in ("uniform", "square"))
    for levels in (uniform, square):
        assert levels.dtype == np.float32 and 0.1 <= levels.min() < 0.11 and 0.49 < levels.max() <= 0.5
    assert uniform.mean() == pytest.approx(0.3, abs=0.005)
    assert np.square(square).mean() == pytest.approx((0.01 + 0.25) / 2, abs=0.003)


def test_weights_of_levels():
    levels = np.array([0.1, 0.5], np.float32)
    for weight, expected in (("1", [1, 1]), ("t", [0.1, 0.5]), ("t/(t0+t1)", [1 / 6, 5 / 6]), ("t^2", [0.01, 0.25])):
        assert level_weights(levels, 0.1, 0.5, weight) == pytest.approx(expected)


def test_loss_is_the_weighted_nll_at_each_samples_level():
    tiny = tiny_case("itarflow", batch=3)
    flow, config = tiny.flow, TrainingConfig(steps=1, level_weight="t^2")
    data = LabelledImages(
        np.random.default_rng(0).integers(0, 256, (9, 4, 4, 1), np.uint8), list("abcabcabc"), levels=(0.05, 0.4)
    )
    arrays = data.arrays(np.arange(3), np.random.default_rng(1), config, 0.0)
    batch = {name: mx.array(value) for name, value in arrays.items()}
    levels = arrays["noise_level"]
    expected = []
    for index, level in enumerate(levels):
        noisy = batch["latents"][index : index + 1] + float(level) * batch["noise"][index : index + 1]
        expected.append(float(flow.at(float(level))(noisy, batch["text"][index : index + 1]).nll()[0]))
    assert np.array(batch_nll(flow, batch)) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    loss, metrics = batch_loss(flow, batch)
    assert float(loss) == pytest.approx(float(np.mean(levels**2 * np.array(expected))), rel=1e-4, abs=1e-5)
    assert float(metrics["nll"]) == pytest.approx(np.mean(expected), rel=1e-4, abs=1e-4)
    assert (np.array(arrays["weight"]) == levels**2).all()


def test_an_itarflow_on_class_folders(pictures, tmp_path):
    path = tmp_path / "flow.json"
    path.write_text(json.dumps(CONFIG))
    words = [pictures, "-o", tmp_path / "run", "--model-config", path, "--steps", "2", "--batch-size", "2"]
    assert "no --noise-std" in command.mistake(*words, "--noise-std", "0.1")
    other = [pictures, "-o", tmp_path / "other", "--preset", "tarflow", "--dry-run"]
    assert "is for an iTARFlow" in command.mistake(*other, "--level-weight", "t")
    assert "level_weight" not in command.mistake(*words, "--level-weight", "t^3")
    done = command(*words, "--level-sampling", "square", "--level-weight", "1")
    assert done.exit_code == 0, done.output
    flow = load_flow(tmp_path / "run")
    assert isinstance(flow, ITarFlow)
    classes = (tmp_path / "run/classes.txt").read_text().splitlines()
    assert (flow.config.t0, flow.config.t1, flow.config.num_classes) == (0.1, 0.5, len(classes))
    assert (tmp_path / "run/samples.png").exists()
    saved = (tmp_path / "run/training/config.yaml").read_text()
    assert "square" in saved
