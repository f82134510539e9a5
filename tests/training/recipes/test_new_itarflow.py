"""Training an iTARFlow from class folders: `mlx-starflow train` with a config of one."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import Command
from helpers.images import write_gradients, write_images
from helpers.model_directories import write_level_model
from helpers.tiny_flows import tiny_case

from mlx_starflow import load_flow
from mlx_starflow.media.image_folder import ImageFolder
from mlx_starflow.model_dir.files import read_config
from mlx_starflow.model_dir.requantize import quantize_model
from mlx_starflow.model_dir.weights import parameters
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


@pytest.mark.parametrize("how", [None, 8])
def test_beginning_with_the_weights_of_another_one(pictures, tmp_path, how):
    """Its levels, its patches and the layers that its blocks share; with other classes their embeddings are new."""
    source = write_level_model(
        tmp_path / "source", num_classes=7, shared_backbone_layers=1, layers_per_block=[2], patch_sizes=[4, 2],
        channels=[64],
    )  # fmt: skip
    before = parameters(load_flow(source, dtype="float32"))
    if how is not None:
        source = quantize_model(source, tmp_path / "quantized", how)
    words = [pictures, "-o", tmp_path / "run", "--init", source, "--batch-size", "2", "--steps", "2", "--lr", "1e-12"]
    dry = command(*words, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "a step here" in dry.stdout and not (tmp_path / "run").exists()
    assert "no --noise-std" in command.mistake(*words, "--noise-std", "0.1")
    done = command(*words, "--ema", 0, "--level-sampling", "square")
    assert done.exit_code == 0, done.output
    flow = load_flow(tmp_path / "run", dtype="float32")
    assert isinstance(flow, ITarFlow) and "quantization" not in read_config(tmp_path / "run")
    assert (flow.config.t0, flow.config.t1, flow.config.patch_sizes) == (0.05, 0.4, [4, 2])
    after = parameters(flow)
    assert before.keys() == after.keys() and any(name.startswith("shared_backbone.0.") for name in after)
    for name in before:
        if name.endswith("class_embed"):
            assert before[name].shape[0] == 7 and after[name].shape[0] == 4
        else:
            # Eight bits of a group of numbers around 0.3 keep each to about a hundredth.
            assert mx.abs(before[name] - after[name]).max() < (1e-6 if how is None else 2e-2), name


def test_repeats_and_levels_go_together(tmp_path):
    for name in ("3_cat", "1_dog"):
        write_images(tmp_path / "pictures" / name, 5)
    folder = ImageFolder.read(tmp_path / "pictures", size=4)
    data = LabelledImages.of(folder, levels=(0.1, 0.5))
    assert data.repeats.tolist() == folder.repeats and data.order.length == sum(folder.repeats) > len(data.images)
    chosen, held_out = data.split(3)
    assert np.concatenate([chosen.repeats, held_out.repeats]).sum() == data.order.length
    for part in (data, chosen, held_out):
        config = TrainingConfig(steps=1, batch_size=part.order.length, caption_dropout=0.0)
        batch = part.batch(np.random.default_rng(0), config, 0.0)
        counts = np.bincount(batch["text"], minlength=2)
        assert counts.tolist() == [part.repeats[part.labels == label].sum() for label in (0, 1)]
        levels = batch["noise_level"]
        assert levels.shape == (part.order.length,) and 0.1 <= levels.min() < levels.max() <= 0.5
        assert (batch["weight"] == level_weights(levels, 0.1, 0.5, config.level_weight)).all()
